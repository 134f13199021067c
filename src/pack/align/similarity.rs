//! Cosine similarity of blocks (Eq. 1), and what a permutation makes of a pair of layers (Appendix I).

use ndarray::{Array1, Array2, Axis, s};
use rayon::prelude::*;

use super::blocks::{BlockVectors, Level};
use super::hungarian;
use crate::codec::permutation::GroupedPermutation;

/// Vectors are made and multiplied in tiles of at most this many bytes.
const TILE_BYTES: usize = 16 << 20;

/// How many vectors of this width are taken at once.
pub(super) fn tile_rows(width: usize) -> usize {
    (TILE_BYTES / (4 * width.max(1))).clamp(4, 1024)
}

/// The vectors of these groups, each divided by its length unless energies are compared; a vector of zeros stays one. Where
/// activations count, theirs follow: the product of two such rows is the weighted sum of both cosines (section 4.2).
pub(super) fn unit_rows(vectors: &BlockVectors<'_>, indices: &[u32]) -> Array2<f32> {
    let mut rows = vectors.rows(Level::Groups, indices);
    if vectors.compares_energies() {
        return rows;
    }
    to_unit_length(&mut rows);
    let Some((weight, activations)) = vectors.activations() else { return rows };
    let indices: Vec<usize> = indices.iter().map(|&index| index as usize).collect();
    let mut activations = activations.select(Axis(0), &indices);
    to_unit_length(&mut activations);
    ndarray::concatenate![Axis(1), rows * weight.sqrt(), activations * (1.0 - weight).sqrt()]
}

fn to_unit_length(rows: &mut Array2<f32>) {
    for mut row in rows.rows_mut() {
        let length = energy(&row).sqrt();
        if length > 0.0 {
            row.mapv_inplace(|value| (f64::from(value) / length) as f32);
        }
    }
}

/// Products of the vectors in the rows of `a` and of `b`: `[rows of a, rows of b]`; what is no number counts as 0.
pub(super) fn products(a: &Array2<f32>, b: &Array2<f32>) -> Array2<f32> {
    a.dot(&b.t()).mapv_into(|product| if product.is_nan() { 0.0 } else { product.clamp(-1e30, 1e30) })
}

/// Cosines of all groups: `[current, previous]`. For few blocks: the matrix is in memory as a whole.
pub(super) fn cosines(current: &BlockVectors<'_>, previous: &BlockVectors<'_>) -> Array2<f32> {
    let all: Vec<u32> = (0..current.symmetry().groups).collect();
    cosines_among(current, &all, previous, &all)
}

/// Cosines of these groups of one layer with those of the other: `[of_current, of_previous]`.
pub(super) fn cosines_among(
    current: &BlockVectors<'_>,
    of_current: &[u32],
    previous: &BlockVectors<'_>,
    of_previous: &[u32],
) -> Array2<f32> {
    let tile = tile_rows(current.width(Level::Groups));
    let mut cosines = Array2::zeros((of_current.len(), of_previous.len()));
    for (mut target, rows) in cosines.axis_chunks_iter_mut(Axis(0), tile).zip(of_current.chunks(tile)) {
        let rows = unit_rows(current, rows);
        for (mut target, columns) in target.axis_chunks_iter_mut(Axis(1), tile).zip(of_previous.chunks(tile)) {
            target.assign(&products(&rows, &unit_rows(previous, columns)));
        }
    }
    cosines
}

/// Products of all groups and of all members of two layers, for symmetries whose groups have members.
pub(super) struct GroupProducts {
    members: usize,
    /// Products of what belongs to whole groups.
    groups: Array2<f32>,
    /// Products of the members, all with all.
    member_products: Array2<f32>,
    /// Lengths of the groups' whole vectors.
    current_lengths: Vec<f64>,
    previous_lengths: Vec<f64>,
    compares_energies: bool,
}

impl GroupProducts {
    pub(super) fn of(current: &BlockVectors<'_>, previous: &BlockVectors<'_>) -> Self {
        let symmetry = current.symmetry();
        let members = symmetry.members as usize;
        let of_groups: Vec<u32> = (0..symmetry.groups).collect();
        let of_members: Vec<u32> = (0..symmetry.groups * symmetry.members).collect();
        let rows = |vectors: &BlockVectors<'_>| {
            let (groups, all) = (vectors.rows(Level::Groups, &of_groups), vectors.rows(Level::Members, &of_members));
            let lengths = (0..groups.nrows()).map(|group| {
                let own = all.slice(s![group * members..(group + 1) * members, ..]);
                (energy(groups.row(group)) + own.rows().into_iter().map(energy).sum::<f64>()).sqrt()
            });
            let lengths: Vec<f64> = lengths.collect();
            (groups, all, lengths)
        };
        let (current_groups, current_members, current_lengths) = rows(current);
        let (previous_groups, previous_members, previous_lengths) = rows(previous);
        Self {
            members,
            groups: products(&current_groups, &previous_groups),
            member_products: products(&current_members, &previous_members),
            current_lengths,
            previous_lengths,
            compares_energies: current.compares_energies(),
        }
    }

    /// The best matching of the members of a group with those of a group of the previous layer, and the cosine of the
    /// two groups that it gives.
    pub(super) fn match_members(&self, current: usize, previous: usize) -> (f32, Vec<u32>) {
        let span = |group: usize| group * self.members..(group + 1) * self.members;
        let products = self.member_products.slice(s![span(current), span(previous)]);
        let matched = hungarian::assign(&products.to_owned());
        let sum: f64 = matched.iter().enumerate().map(|(i, &j)| f64::from(products[(i, j as usize)])).sum();
        let lengths = self.current_lengths[current] * self.previous_lengths[previous];
        let product = f64::from(self.groups[(current, previous)]) + sum;
        let lengths = if self.compares_energies { 1.0 } else { lengths };
        (if lengths > 0.0 { (product / lengths) as f32 } else { 0.0 }, matched)
    }
}

/// How well one layer's blocks foretell the next one's under a permutation: sums over blocks, in f64 (Eqs. 105-107).
#[derive(Clone, Debug, PartialEq)]
pub struct PairStatistics {
    /// Cosine of each block with the one it is predicted from.
    pub cosines: Vec<f64>,
    /// Sum of squares of the layer's weights.
    pub energy: f64,
    /// Sum of squares of the reference's weights.
    pub reference_energy: f64,
    /// Sum of products of the two, permuted.
    pub product: f64,
    /// Sum of squares of the layer's weights around the mean block.
    pub energy_around_mean: f64,
    /// Weights in all blocks.
    pub weights: u64,
}

impl PairStatistics {
    /// Normalized residual energy (Eq. 107) of the best scaled copy.
    pub fn normalized_residual_energy(&self) -> f64 {
        if self.energy == 0.0 { 1.0 } else { self.residual() / self.energy }
    }

    /// Explained variance (Eq. 106) of the best scaled copy; 0 where the mean block is all there is, as with one block.
    pub fn explained_variance(&self) -> f64 {
        self.explained_by(self.residual())
    }

    fn explained_by(&self, residual: f64) -> f64 {
        // Where all blocks are the mean, rounding still leaves something around it.
        let is_all_mean = self.energy_around_mean <= 1e-10 * self.energy;
        if is_all_mean { 0.0 } else { 1.0 - residual / self.energy_around_mean }
    }

    /// Explained variance with the gain that was the best for `fitted`: what a prediction is worth where it was not fitted.
    pub fn explained_variance_with_gain_of(&self, fitted: &Self) -> f64 {
        let gain = fitted.gain();
        let residual = self.energy - 2.0 * gain * self.product + gain * gain * self.reference_energy;
        self.explained_by(residual)
    }

    /// Factor of the scaled copy with the least residual.
    pub fn gain(&self) -> f64 {
        if self.reference_energy == 0.0 { 0.0 } else { self.product / self.reference_energy }
    }

    /// Bits that the prediction saves if weights and residuals are Gaussian: an estimate, never a measured size.
    pub fn gaussian_bits_saved(&self) -> f64 {
        let floor = 1e-12; // a perfect copy saves 20 bits a weight, not infinitely many
        -0.5 * self.normalized_residual_energy().max(floor).log2() * self.weights as f64
    }

    /// Sum of squares that is left after the scaled copy with the least of it.
    fn residual(&self) -> f64 {
        if self.reference_energy == 0.0 {
            return self.energy;
        }
        (self.energy - self.product * self.product / self.reference_energy).max(0.0)
    }
}

/// Compares each block of `current` with the block of `previous` that `permutation` names.
///
/// # Panics
/// When the three do not have the same symmetry.
pub fn compare(
    previous: &BlockVectors<'_>,
    current: &BlockVectors<'_>,
    permutation: &GroupedPermutation,
) -> PairStatistics {
    let members = current.symmetry().members as usize;
    let tiles = for_tiles(previous, current, permutation, |groups, members_of| {
        let mut sums = Tile::compare(&groups.current, &groups.below, 1);
        if let Some(rows) = members_of {
            sums.add_members(&Tile::compare(&rows.current, &rows.below, members));
        }
        sums
    });
    Tile::total(&tiles, current.symmetry().groups, current.weights())
}

/// Vectors of some blocks, and of those that they are predicted from.
pub(super) struct Pairs {
    pub(super) current: Array2<f32>,
    pub(super) below: Array2<f32>,
}

/// Calls `of_tile` with some groups at a time and with their members, where groups have several, in parallel; what it
/// returns is in the order of the groups.
pub(super) fn for_tiles<T: Send>(
    previous: &BlockVectors<'_>,
    current: &BlockVectors<'_>,
    permutation: &GroupedPermutation,
    of_tile: impl Fn(Pairs, Option<Pairs>) -> T + Sync,
) -> Vec<T> {
    assert_eq!(previous.symmetry(), current.symmetry(), "blocks of one symmetry");
    assert_eq!(permutation.symmetry(), current.symmetry(), "a permutation of these blocks");
    let symmetry = current.symmetry();
    let members = symmetry.members as usize;
    let expanded = permutation.expanded();
    let group_width = current.width(Level::Groups) + members * current.width(Level::Members);
    let groups: Vec<u32> = (0..symmetry.groups).collect();
    let pairs = |level: Level, own: &[u32], below: &[u32]| Pairs {
        current: current.rows(level, own),
        below: previous.rows(level, below),
    };
    let tile_of = |tile: &[u32]| {
        let below: Vec<u32> = tile.iter().map(|&group| permutation.outer().entries()[group as usize]).collect();
        let groups = pairs(Level::Groups, tile, &below);
        let members = (members > 1).then(|| {
            let of_tile = |group: &u32| group * symmetry.members..(group + 1) * symmetry.members;
            let own: Vec<u32> = tile.iter().flat_map(of_tile).collect();
            let below: Vec<u32> = own.iter().map(|&member| expanded.entries()[member as usize]).collect();
            pairs(Level::Members, &own, &below)
        });
        of_tile(groups, members)
    };
    groups.par_chunks(tile_rows(group_width)).map(tile_of).collect()
}

/// Sums over some groups, kept apart so that adding them up has one order.
struct Tile {
    /// Energy of the group, of its reference, and their product.
    groups: Vec<[f64; 3]>,
    /// Sum of the groups' vectors.
    sum: Array1<f64>,
}

impl Tile {
    /// `members` rows of each group follow one another.
    fn compare(current: &Array2<f32>, previous: &Array2<f32>, members: usize) -> Self {
        let width = current.ncols() * members;
        let mut tile = Self { groups: Vec::new(), sum: Array1::zeros(width) };
        let pairs = current.axis_chunks_iter(Axis(0), members).zip(previous.axis_chunks_iter(Axis(0), members));
        for (rows, below) in pairs {
            let mut sums = [0.0; 3];
            for ((&value, &reference), total) in rows.iter().zip(&below).zip(&mut tile.sum) {
                let (value, reference) = (f64::from(value), f64::from(reference));
                sums[0] += value * value;
                sums[1] += reference * reference;
                sums[2] += value * reference;
                *total += value;
            }
            tile.groups.push(sums);
        }
        tile
    }

    fn add_members(&mut self, members: &Self) {
        for (group, more) in self.groups.iter_mut().zip(&members.groups) {
            for (sum, more) in group.iter_mut().zip(more) {
                *sum += more;
            }
        }
        self.sum = ndarray::concatenate![Axis(0), self.sum.view(), members.sum.view()];
    }

    fn total(tiles: &[Self], groups: u32, weights: u64) -> PairStatistics {
        let [mut energy, mut reference_energy, mut product] = [0.0; 3];
        let mut cosines = Vec::new();
        let mut sum = Array1::zeros(tiles.first().map_or(0, |tile| tile.sum.len()));
        for tile in tiles {
            for &[own, reference, both] in &tile.groups {
                energy += own;
                reference_energy += reference;
                product += both;
                let lengths = (own * reference).sqrt();
                cosines.push(if lengths > 0.0 { both / lengths } else { 0.0 });
            }
            sum += &tile.sum;
        }
        let mean_energy = sum.iter().map(|total: &f64| total * total).sum::<f64>() / f64::from(groups);
        let energy_around_mean = (energy - mean_energy).max(0.0);
        PairStatistics { cosines, energy, reference_energy, product, energy_around_mean, weights }
    }
}

/// Sum of squares.
fn energy<'a>(values: impl IntoIterator<Item = &'a f32>) -> f64 {
    values.into_iter().map(|&value| f64::from(value).powi(2)).sum()
}
