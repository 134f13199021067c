//! Fitting motion vectors: for every unit the few units of the reference, and their gains, that leave the least of it
//! (`codec::predictor::vectors`).
//!
//! Orthogonal matching pursuit: the unit of the reference that is most like what is left is added, the gains of all are fitted
//! again and rounded, as long as a vector saves more bits than it takes. Vectors from earlier units of the part itself would
//! save as much again (0.03 to 0.05 bit of an FFN weight), but then no strip could be decoded without those before it.

use ndarray::{Array2, ArrayRef1, ArrayView1, Axis};
use rayon::prelude::*;

use super::mode_decision::FittedPredictor;
use crate::format::limits::MOTION_VECTORS;

/// Gain of one unit: finer gains cost what they save.
const GAIN_STEP: f32 = 1.0 / 16.0;
/// Bits that a gain takes, about.
const GAIN_BITS: f64 = 4.5;
/// Gains beyond this are cut.
const LARGEST_GAIN: f64 = 64.0;
/// Units looked at together.
const TILE: usize = 128;

/// Fits vectors along an axis of a matrix. `values` and `reference` are `[rows, columns]`; residuals that are small beside
/// `step` save nothing. `None` where no vector pays.
pub fn fit(values: &[f32], reference: &[f32], (shape, axis): ([usize; 2], u8), step: f32) -> Option<FittedPredictor> {
    let units = |values: &[f32]| {
        let matrix = Array2::from_shape_vec(shape, values.to_vec()).expect("a matrix of this shape");
        if axis == 0 { matrix } else { matrix.reversed_axes().as_standard_layout().into_owned() }
    };
    let (current, below) = (units(values), units(reference));
    let lengths: Vec<f32> = below.rows().into_iter().map(|row| energy(&row).sqrt() as f32).collect();
    let pursuit = Pursuit { below: &below, lengths: &lengths, step };
    let found: Vec<Vec<(u32, i32)>> = (0..current.nrows().div_ceil(TILE))
        .into_par_iter()
        .flat_map_iter(|tile| {
            let rows = tile * TILE..current.nrows().min((tile + 1) * TILE);
            pursuit.follow(&current.slice_axis(Axis(0), rows.into()).to_owned())
        })
        .collect();
    if found.iter().all(Vec::is_empty) {
        return None;
    }
    Some(FittedPredictor::Vectors {
        axis,
        gain_step: GAIN_STEP,
        counts: found.iter().map(|vectors| vectors.len() as i32).collect(),
        sources: found.iter().flatten().map(|&(source, _)| source as i32).collect(),
        gains: found.iter().flatten().map(|&(_, gain)| gain).collect(),
    })
}

/// Multiplications that fitting takes.
pub fn work(shape: [usize; 2], axis: u8) -> u64 {
    let units = shape[usize::from(axis)] as u64;
    MOTION_VECTORS as u64 * units * (shape[0] as u64 * shape[1] as u64)
}

struct Pursuit<'a> {
    /// Units of the reference, `[units, width]`.
    below: &'a Array2<f32>,
    /// Their lengths.
    lengths: &'a [f32],
    step: f32,
}

impl Pursuit<'_> {
    /// The vectors of some units: source and gain, in units of [`GAIN_STEP`].
    fn follow(&self, units: &Array2<f32>) -> Vec<Vec<(u32, i32)>> {
        let width = units.ncols() as f64;
        // What the quantizer leaves is not worth predicting.
        let floor = width * f64::from(self.step).powi(2) / 12.0;
        let octaves = |energy: f64| 0.5 * width * (energy + floor).log2();
        let vector_bits = (self.lengths.len() as f64).log2() + GAIN_BITS;
        let mut chosen: Vec<Vec<u32>> = vec![Vec::new(); units.nrows()];
        let mut best: Vec<(f64, Vec<(u32, i32)>)> = vec![(0.0, Vec::new()); units.nrows()];
        // Units whose last vector paid, and what is left of them: what remains is less like anything with every vector, so
        // that a unit for which one does not pay is done with.
        let mut followed: Vec<usize> = (0..units.nrows()).collect();
        let mut left = units.clone();
        for count in 1..=MOTION_VECTORS as usize {
            let products = left.dot(&self.below.t());
            let mut paying = Vec::new();
            for (place, (&row, products)) in followed.iter().zip(products.rows()).enumerate() {
                let chosen = &mut chosen[row];
                let Some(source) = self.most_alike(&products, chosen) else { continue };
                chosen.push(source);
                let gains = self.gains(&units.row(row), chosen);
                let mut rest = left.row_mut(place);
                rest.assign(&units.row(row));
                for (&source, &gain) in chosen.iter().zip(&gains) {
                    rest.scaled_add(-GAIN_STEP * gain as f32, &self.below.row(source as usize));
                }
                let saved = octaves(energy(&units.row(row))) - octaves(energy(&rest)) - count as f64 * vector_bits;
                if saved > best[row].0 {
                    best[row] = (saved, chosen.iter().copied().zip(gains).collect());
                    paying.push(place);
                }
            }
            left = left.select(Axis(0), &paying);
            followed = paying.into_iter().map(|place| followed[place]).collect();
            if followed.is_empty() {
                break;
            }
        }
        best.into_iter().map(|(_, vectors)| vectors).collect()
    }

    /// The unit that is most like what is left, by its cosine, of those not chosen yet.
    fn most_alike(&self, products: &ArrayRef1<f32>, chosen: &[u32]) -> Option<u32> {
        let mut most = None;
        for (source, (&product, &length)) in products.iter().zip(self.lengths).enumerate() {
            let likeness = product.abs() / length;
            if likeness.is_finite()
                && likeness > most.map_or(0.0, |(_, most)| most)
                && !chosen.contains(&(source as u32))
            {
                most = Some((source as u32, likeness));
            }
        }
        most.map(|(source, _)| source)
    }

    /// The gains of least squares, rounded.
    fn gains(&self, unit: &ArrayRef1<f32>, chosen: &[u32]) -> Vec<i32> {
        let rows: Vec<ArrayView1<'_, f32>> = chosen.iter().map(|&source| self.below.row(source as usize)).collect();
        let mut equations: Vec<Vec<f64>> = (rows.iter())
            .map(|row| rows.iter().map(|other| product(row, other)).chain([product(row, unit)]).collect())
            .collect();
        let solved = solve(&mut equations);
        let rounded = solved.into_iter().map(|gain| {
            let gain = if gain.is_finite() { gain.clamp(-LARGEST_GAIN, LARGEST_GAIN) } else { 0.0 };
            (gain / f64::from(GAIN_STEP)).round() as i32
        });
        rounded.collect()
    }
}

fn product(a: &ArrayRef1<f32>, b: &ArrayRef1<f32>) -> f64 {
    // Eight sums side by side: one alone waits for itself.
    let mut sums = [0.0_f64; 8];
    let mut add = |a: &[f32], b: &[f32]| {
        for ((sum, &a), &b) in sums.iter_mut().zip(a).zip(b) {
            *sum += f64::from(a) * f64::from(b);
        }
    };
    let [a, b] = [a, b].map(|row| row.as_slice().expect("rows lie in one piece"));
    let ((eights_of_a, rest_of_a), (eights_of_b, rest_of_b)) = (a.as_chunks::<8>(), b.as_chunks::<8>());
    eights_of_a.iter().zip(eights_of_b).for_each(|(a, b)| add(a, b));
    add(rest_of_a, rest_of_b);
    sums.iter().sum()
}

fn energy(values: &ArrayRef1<f32>) -> f64 {
    product(values, values)
}

/// Solves a few equations, each a row of coefficients and the right side, by Gauss and Jordan with pivots on the diagonal:
/// Gram matrices need no others.
fn solve(equations: &mut [Vec<f64>]) -> Vec<f64> {
    for pivot in 0..equations.len() {
        let scale = 1.0 / equations[pivot][pivot];
        equations[pivot].iter_mut().for_each(|value| *value *= scale);
        let row = equations[pivot].clone();
        for (other, equation) in equations.iter_mut().enumerate() {
            if other != pivot {
                let times = equation[pivot];
                equation.iter_mut().zip(&row).for_each(|(value, &of_pivot)| *value -= times * of_pivot);
            }
        }
    }
    equations.iter().map(|equation| equation[equation.len() - 1]).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn noise(count: usize, chance: &mut fastrand::Rng) -> Vec<f32> {
        (0..count).map(|_| (0..4).map(|_| chance.f32() - 0.5).sum()).collect()
    }

    #[test]
    fn units_made_of_two_others_are_found_along_either_axis() {
        let mut chance = fastrand::Rng::with_seed(4);
        let (units, width) = (40, 96);
        let below = noise(units * width, &mut chance);
        let of_unit = |unit: usize| [(unit * 7 + 3) % units, (unit * 11 + 5) % units];
        let own = noise(units * width, &mut chance);
        let current: Vec<f32> = (0..units * width)
            .map(|at| {
                let (unit, element) = (at / width, at % width);
                let [first, second] = of_unit(unit).map(|source| below[source * width + element]);
                0.75 * first - 0.5 * second + 0.01 * own[at]
            })
            .collect();
        let transposed = |values: &[f32]| -> Vec<f32> {
            (0..units * width).map(|at| values[at % units * width + at / units]).collect()
        };
        let rows = fit(&current, &below, ([units, width], 0), 0.01).expect("they pay");
        let columns = fit(&transposed(&current), &transposed(&below), ([width, units], 1), 0.01).expect("they pay");
        for found in [rows, columns] {
            let FittedPredictor::Vectors { counts, sources, gains, .. } = found else { panic!("vectors are fitted") };
            assert_eq!(counts, vec![2; units]);
            for unit in 0..units {
                let mut pairs: Vec<(usize, i32)> =
                    (2 * unit..2 * unit + 2).map(|vector| (sources[vector] as usize, gains[vector])).collect();
                let mut expected: Vec<(usize, i32)> = of_unit(unit).into_iter().zip([12, -8]).collect();
                pairs.sort_unstable();
                expected.sort_unstable();
                assert_eq!(pairs, expected, "unit {unit}");
            }
        }
    }

    #[test]
    fn units_unlike_all_others_have_no_vectors() {
        let mut chance = fastrand::Rng::with_seed(5);
        // So few and so long that none is like another by chance.
        let (current, below) = (noise(8 * 256, &mut chance), noise(8 * 256, &mut chance));
        assert_eq!(fit(&current, &below, ([8, 256], 0), 0.5), None);
        assert_eq!(fit(&current, &vec![0.0; 8 * 256], ([8, 256], 0), 0.01), None, "there is nothing to be like");
    }
}
