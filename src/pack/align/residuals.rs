//! How large residuals are (Figure 5): what is left of each weight once its prediction is taken away, counted by magnitude.

use super::blocks::BlockVectors;
use super::similarity::{Pairs, for_tiles};
use crate::codec::permutation::GroupedPermutation;

/// Bins of a standard deviation of the weights.
pub const MAGNITUDES_PER_DEVIATION: usize = 8;
/// Bins: up to four standard deviations; the last has all above, too.
pub const MAGNITUDE_BINS: usize = 4 * MAGNITUDES_PER_DEVIATION;

/// Numbers of residuals by magnitude, in units of the weights' root mean square over [`MAGNITUDES_PER_DEVIATION`].
pub type Magnitudes = [u64; MAGNITUDE_BINS];

/// Counts the magnitudes of `current - gain * previous`, each block with the one that `permutation` names. `deviation` is the
/// root mean square of the weights.
///
/// # Panics
/// When the three do not have the same symmetry.
pub fn residual_magnitudes(
    previous: &BlockVectors<'_>,
    current: &BlockVectors<'_>,
    permutation: &GroupedPermutation,
    gain: f64,
    deviation: f64,
) -> Magnitudes {
    let scale = MAGNITUDES_PER_DEVIATION as f64 / deviation;
    let add = |counts: &mut Magnitudes, pairs: &Pairs| {
        for (&value, &below) in pairs.current.iter().zip(&pairs.below) {
            let bin = ((f64::from(value) - gain * f64::from(below)).abs() * scale) as usize; // no number counts as 0
            counts[bin.min(MAGNITUDE_BINS - 1)] += 1;
        }
    };
    let tiles = for_tiles(previous, current, permutation, |groups, members| {
        let mut counts = [0; MAGNITUDE_BINS];
        add(&mut counts, &groups);
        if let Some(members) = &members {
            add(&mut counts, members);
        }
        counts
    });
    let mut total = [0; MAGNITUDE_BINS];
    for tile in tiles {
        total.iter_mut().zip(tile).for_each(|(total, count)| *total += count);
    }
    total
}
