//! Finds the low-rank product that a variant added to its base: what is left of a LoRA once it is merged (SPEC.md section 7.8).
//!
//! The change of a tensor is the product and the rounding of its sum. A randomized range finder, first on a sample, gives the
//! product's span and how many of its directions stand out of the rounding; a change of no low rank is known by its sample.
//! Then the rounding is taken back: the unrounded change of an element is known to lie in an interval, and beyond the
//! nearest point of it to the product found so far lies a better change to fit the next product to. Integer factors are stored
//! as finely as pays.

mod levels;
mod matrix;

use rayon::prelude::*;

pub use self::levels::{Work, run};
use self::matrix::{Approach, LANES, Matrix, Vector, eigen};
use super::difference::{CountedDifferences, DifferenceChoice, DifferenceSearch, Pair};
use super::quantize::values_of;
use crate::codec::difference::Bits;
use crate::codec::integers;
use crate::codec::low_rank::LowRank;
use crate::format::difference::StoredLowRank;
use crate::format::limits;
use crate::tensor::{Dtype, TensorInfo};

/// Rows and columns below which a matrix has no low-rank part worth finding.
const LEAST_EXTENT: usize = 32;
/// Rows and columns of the sample that is looked at first: at least, at most, and those of the matrix over it in between.
const SAMPLED_EXTENT: (usize, usize) = (128, 512);
const OVER_SAMPLE: usize = 3;
/// Directions looked for at once in the sample. While all of them stand out, as many again are looked for.
const SAMPLED_DIRECTIONS: usize = 24;
/// Directions of the whole matrix beside those that stood out of the sample.
const MORE_DIRECTIONS: usize = 8;
/// A singular value counts if it is so many times the largest of noise.
const ABOVE_NOISE: f64 = 1.1;
/// Share of a sample that must lie about as near to its directions as rounding moves it where a product explains it.
const EXPLAINED: f64 = 0.7;
/// About as near: the directions of a sample are inexact themselves.
const NEARNESS: f32 = 1.25;
/// Bits that a number of a factor takes, about.
const FACTOR_BITS: f64 = 5.0;
/// Rounds of taking the rounding back.
const ROUNDS: usize = 6;
/// How far a change is moved towards its interval, where 1 is its edge.
const RELAXATION: f32 = 1.7;
/// Magnitudes of the largest factor that are tried.
const MAGNITUDES: [i32; 5] = [63, 127, 255, 511, 2047];
/// Rows that they are tried on.
const SAMPLED_ROWS: usize = 48;
/// Elements that a product is added to at once.
const ADDED_ELEMENTS: usize = 1 << 16;
/// Seed of the range finder: the same tensor has the same product every time.
const SEED: u64 = 1;

/// A product that shortens a part.
#[derive(Clone, Debug)]
pub struct FoundProduct {
    /// As it is stored.
    pub stored: StoredLowRank,
    /// As it is computed.
    pub product: LowRank,
    /// How what is left is coded; absent where nothing is.
    pub difference: Option<DifferenceChoice>,
    /// What is left, counted.
    pub counted: CountedDifferences,
    /// Bits of factors and differences, about.
    pub bits: f64,
}

/// Finds the product that codes the tensor shortest. `decoded` is what it starts from. `None` where its change is of no low
/// rank, or is no shorter with a product.
pub fn find_product(tensor: &TensorInfo, bytes: &[u8], decoded: &[u8]) -> Option<FoundProduct> {
    let pair = Pair { tensor, bytes, predicted: decoded };
    let rank = paying_rank(pair)?;
    let rows = tensor.shape[0] as usize;
    let (change, values) = change_of(pair, rows, tensor.elements() as usize / rows)?;
    let directions = change.directions(rank)?;
    let intervals = Intervals::new(&tensor.dtype, &change, &values);
    let (left, right) = refined(change, directions, &intervals);
    quantized(pair, &left, &right)
}

/// The rank of a product that shortens the tensor, by a sample of its change; `None` where there seems to be none. Takes little
/// time beside finding the product.
pub fn paying_rank(pair: Pair<'_>) -> Option<usize> {
    let tensor = pair.tensor;
    if !matches!(tensor.dtype, Dtype::F32 | Dtype::F16 | Dtype::BF16) || tensor.shape.len() < 2 {
        return None;
    }
    let rows = tensor.shape[0] as usize;
    let columns = tensor.elements() as usize / rows.max(1);
    if rows.min(columns) < LEAST_EXTENT {
        return None;
    }
    let Sample { change, half_units } = Sample::of(pair, rows, columns)?;
    let energy = change.energy();
    let (rank, left) = rank_of_sample(change)?;
    // Nothing is left of a change that rounding explains beside the product; otherwise the product takes off so much.
    if left.share_within(&half_units) < EXPLAINED {
        let saved = 0.5 * (energy / left.energy()).log2() * tensor.elements() as f64;
        if saved < FACTOR_BITS * (rank * (rows + columns)) as f64 {
            return None;
        }
    }
    Some(rank)
}

/// The product of a tensor that is of the rank and fineness of an earlier variant's: neither is looked for. `None` where its
/// change is of no low rank.
pub fn find_product_like(
    known: &LowRank,
    tensor: &TensorInfo,
    bytes: &[u8],
    decoded: &[u8],
) -> Option<(StoredLowRank, LowRank)> {
    let pair = Pair { tensor, bytes, predicted: decoded };
    let (change, values) = change_of(pair, known.left.len() / known.rank, known.columns)?;
    let (directions, singular_values) = change.range(known.rank);
    let rank = change.rank_above_noise(&singular_values);
    if rank == 0 {
        return None;
    }
    let intervals = Intervals::new(&tensor.dtype, &change, &values);
    let (left, right) = refined(change, directions.first_rows(rank), &intervals);
    let magnitude = known.left.iter().chain(&known.right).map(|integer| integer.unsigned_abs()).max().unwrap_or(0);
    Some(with_factors(&left, &right, magnitude.max(1).into()))
}

/// The change of a matrix and what it became; `None` where any of it is no number.
fn change_of(pair: Pair<'_>, rows: usize, columns: usize) -> Option<(Matrix, Vec<f32>)> {
    let dtype = &pair.tensor.dtype;
    let (values, mut changes) = (values_of(dtype, pair.bytes), values_of(dtype, pair.predicted));
    changes.iter_mut().zip(&values).for_each(|(before, value)| *before = value - *before);
    let are_numbers = changes.iter().all(|change| change.is_finite());
    are_numbers.then(|| (Matrix::of_numbers(rows, columns, &changes), values))
}

/// What is looked at first.
struct Sample {
    /// The change of rows and columns spread over a tensor.
    change: Matrix,
    /// How far rounding alone may have moved each.
    half_units: Matrix,
}

impl Sample {
    /// `None` where any of it is no number.
    fn of(pair: Pair<'_>, rows: usize, columns: usize) -> Option<Self> {
        let extent = (rows.min(columns) / OVER_SAMPLE).clamp(SAMPLED_EXTENT.0, SAMPLED_EXTENT.1);
        let (sampled_rows, sampled_columns) = (rows.min(extent), columns.min(extent));
        let (row_bytes, dtype) = (pair.bytes.len() / rows, &pair.tensor.dtype);
        let mut changes = Vec::with_capacity(sampled_rows * sampled_columns);
        let mut half_units = Vec::with_capacity(changes.capacity());
        for row in (0..sampled_rows).map(|row| row * rows / sampled_rows) {
            let row = row * row_bytes..(row + 1) * row_bytes;
            let (values, base) = (values_of(dtype, &pair.bytes[row.clone()]), values_of(dtype, &pair.predicted[row]));
            for column in (0..sampled_columns).map(|column| column * columns / sampled_columns) {
                changes.push(values[column] - base[column]);
                half_units.push(half_unit(dtype, values[column]));
            }
        }
        let are_numbers = changes.iter().all(|change| change.is_finite());
        let matrix = |numbers: &[f32]| Matrix::of_numbers(sampled_rows, sampled_columns, numbers);
        are_numbers.then(|| Self { change: matrix(&changes), half_units: matrix(&half_units) })
    }
}

/// Half a unit in the last place of a value; 0 where a type has so many that rounding does not matter.
#[inline(always)]
fn half_unit(dtype: &Dtype, value: f32) -> f32 {
    match dtype {
        Dtype::BF16 => f32::from_bits(value.to_bits() & 0x7f80_0000) / 256.0,
        Dtype::F16 => f32::from_bits(value.to_bits() & 0x7f80_0000).max(6.1e-5) / 2048.0,
        _ => 0.0,
    }
}

/// How many directions of a sample stand out of its noise, and what is left beside them. `None` where none does, or nearly all
/// do.
fn rank_of_sample(mut sample: Matrix) -> Option<(usize, Matrix)> {
    let most = sample.rows.min(sample.columns) / 2;
    let mut found = 0;
    while found < most {
        let wanted = SAMPLED_DIRECTIONS.min(most - found);
        let (directions, singular_values) = sample.range(wanted);
        let rank = sample.rank_above_noise(&singular_values);
        found += rank;
        if rank < wanted {
            sample.remove(&directions.first_rows(rank));
            return (found > 0).then_some((found, sample));
        }
        sample.remove(&directions);
    }
    None
}

/// Stores the factors as finely as pays.
fn quantized(pair: Pair<'_>, left: &Matrix, right: &Matrix) -> Option<FoundProduct> {
    let elements = pair.tensor.elements() as f64;
    let mut best: Option<(f64, _)> = None;
    for magnitude in MAGNITUDES {
        let found = with_factors(left, right, magnitude);
        let bits = found.0.bits() + elements * bits_beside(pair, &found.1);
        if best.as_ref().is_some_and(|(least, _)| *least <= bits) {
            break; // finer factors cost more than they save from here on
        }
        best = Some((bits, found));
    }
    let (_, (stored, product)) = best?;
    let mut predicted = pair.predicted.to_vec();
    add_product(&product, &pair.tensor.dtype, &mut predicted);
    let (difference, counted, bits) = match predicted == pair.bytes {
        true => (None, CountedDifferences::default(), 0.0),
        false => {
            let search = DifferenceSearch::new(Pair { predicted: &predicted, ..pair })?.refined();
            let (choice, counted) = search.found();
            (Some(choice), counted, search.bits())
        }
    };
    let bits = bits + stored.bits();
    Some(FoundProduct { stored, product, difference, counted, bits })
}

/// The product of integer factors of which the largest has this magnitude, as it is stored and as it is computed.
fn with_factors(left: &Matrix, right: &Matrix, magnitude: i32) -> (StoredLowRank, LowRank) {
    let most = left.numbers().chain(right.numbers()).fold(0.0_f32, |most, value| most.max(value.abs()));
    let step = most / magnitude as f32;
    let integers =
        |matrix: &Matrix| -> Vec<i32> { matrix.numbers().map(|value| (value / step).round() as i32).collect() };
    let narrow = |integers: &[i32]| integers.iter().map(|&integer| integer as i16).collect();
    let (rank, columns, scale) = (left.columns, right.columns, step * step);
    let (left, right) = (integers(left), integers(right));
    let product = LowRank { rank, columns, scale, left: narrow(&left), right: narrow(&right) };
    let (left, right) = (integers::encode(&left), integers::encode(&right));
    (StoredLowRank { rank: rank as u32, scale, left, right }, product)
}

/// Bits of an element of some rows, about, that differs from its prediction with the product added.
fn bits_beside(pair: Pair<'_>, product: &LowRank) -> f64 {
    match pair.tensor.dtype {
        Dtype::F32 => bits_beside_of::<u32>(pair, product),
        _ => bits_beside_of::<u16>(pair, product),
    }
}

fn bits_beside_of<T: Bits>(pair: Pair<'_>, product: &LowRank) -> f64 {
    let row_bytes = product.columns * T::BYTES;
    let rows = pair.bytes.len() / row_bytes;
    // By the length of their magnitude; below it bits are as good as random.
    let mut counts = [0_u64; 33];
    let mut below = 0;
    for sampled in 0..rows.min(SAMPLED_ROWS) {
        let row = sampled * rows / rows.min(SAMPLED_ROWS);
        let bytes = row * row_bytes..(row + 1) * row_bytes;
        let mut predicted = pair.predicted[bytes.clone()].to_vec();
        run(Add { product, dtype: &pair.tensor.dtype, first: row * product.columns, elements: &mut predicted });
        for (before, element) in predicted.chunks_exact(T::BYTES).zip(pair.bytes[bytes].chunks_exact(T::BYTES)) {
            let difference = T::read(before).difference(T::read(element)).signed();
            let length = 32 - difference.unsigned_abs().leading_zeros();
            counts[length as usize] += 1;
            below += length; // the sign, and all bits but the highest
        }
    }
    let total = counts.iter().sum::<u64>().max(1) as f64;
    let of_lengths =
        counts.iter().filter(|&&count| count > 0).map(|&count| count as f64 * (total / count as f64).log2());
    (of_lengths.sum::<f64>() + f64::from(below)) / total
}

/// Adds a product to all elements of a tensor.
pub fn add_product(product: &LowRank, dtype: &Dtype, elements: &mut [u8]) {
    let element_bytes = dtype.bits().unwrap_or(8) as usize / 8;
    let rows = (ADDED_ELEMENTS / product.columns).max(1);
    elements.par_chunks_mut(rows * product.columns * element_bytes).enumerate().for_each(|(piece, elements)| {
        run(Add { product, dtype, first: piece * rows * product.columns, elements });
    });
}

/// Adds a product to elements from number `first` on.
struct Add<'a> {
    product: &'a LowRank,
    dtype: &'a Dtype,
    first: usize,
    elements: &'a mut [u8],
}

impl Work for Add<'_> {
    #[inline(always)]
    fn run(self) {
        self.product.add(self.dtype, self.first, self.elements);
    }
}

/// Where each element's change was before its sum was rounded.
struct Intervals {
    low: Matrix,
    high: Matrix,
}

impl Intervals {
    /// Of the `change` of elements that became `values`.
    fn new(dtype: &Dtype, change: &Matrix, values: &[f32]) -> Self {
        let zeros = || Matrix::zeros(change.rows, change.columns);
        let mut intervals = Self { low: zeros(), high: zeros() };
        run(Edges { dtype, change, values, intervals: &mut intervals });
        intervals
    }
}

/// Fills in where intervals begin and end.
struct Edges<'a> {
    dtype: &'a Dtype,
    change: &'a Matrix,
    values: &'a [f32],
    intervals: &'a mut Intervals,
}

impl Work for Edges<'_> {
    #[inline(always)]
    fn run(self) {
        for (row, values) in self.values.chunks_exact(self.change.columns).enumerate() {
            let change = self.change.row(row);
            let Intervals { low, high } = &mut *self.intervals;
            let edges = low.numbers_mut(row).iter_mut().zip(high.numbers_mut(row));
            for (((low, high), change), &value) in edges.zip(change).zip(values) {
                let half_unit = half_unit(self.dtype, value);
                (*low, *high) = (change - half_unit, change + half_unit);
            }
        }
    }
}

impl Approach for Intervals {
    #[inline(always)]
    fn approach(&self, place: usize, product: &Vector, vector: &mut Vector) {
        let (low, high) = (&self.low.vectors()[place], &self.high.vectors()[place]);
        for lane in 0..LANES {
            let nearest = product[lane].max(low[lane]).min(high[lane]);
            vector[lane] = product[lane] + RELAXATION * (nearest - product[lane]);
        }
    }
}

/// The factors of the product along `directions` that fits the changes before they were rounded.
fn refined(mut change: Matrix, mut directions: Matrix, intervals: &Intervals) -> (Matrix, Matrix) {
    for _ in 0..ROUNDS {
        directions = change.approach(&directions, intervals).orthonormal();
    }
    let left = change.coordinates(&directions);
    let (squares, rotation) = eigen(left.gram());
    // Both factors get the root of each singular value, so that one step suits both.
    let roots: Vec<f32> =
        squares.iter().map(|square| square.max(0.0).sqrt().sqrt().max(f64::MIN_POSITIVE) as f32).collect();
    let (left, right) = (left.times(&rotation.transposed()), rotation.times(&directions));
    (
        Matrix::of(left.rows, left.columns, |row, column| left.row(row)[column] / roots[column]),
        Matrix::of(right.rows, right.columns, |row, column| right.row(row)[column] * roots[row]),
    )
}

impl Matrix {
    /// The directions that stand out of noise, where a sample has shown so many.
    fn directions(&self, shown: usize) -> Option<Self> {
        let most = (self.rows.min(self.columns) / 2).min(limits::RANK as usize);
        let mut wanted = shown;
        loop {
            let looked_for = (wanted + MORE_DIRECTIONS).min(most);
            let (directions, singular_values) = self.range(looked_for);
            let rank = self.rank_above_noise(&singular_values);
            if (1..looked_for).contains(&rank) {
                return Some(directions.first_rows(rank));
            }
            if rank == 0 || looked_for == most {
                return None;
            }
            wanted *= 2;
        }
    }

    /// How many singular values stand out of the noise that is left beside them.
    fn rank_above_noise(&self, singular_values: &[f64]) -> usize {
        let (rows, columns) = (self.rows as f64, self.columns as f64);
        let energy = self.energy();
        let mut rank = singular_values.len();
        loop {
            let kept: f64 = singular_values[..rank].iter().map(|value| value * value).sum();
            let left = (energy - kept).max(0.0) / ((rows - rank as f64) * (columns - rank as f64)).max(1.0);
            let threshold = ABOVE_NOISE * left.sqrt() * (rows.sqrt() + columns.sqrt());
            let above = singular_values[..rank].iter().filter(|&&value| value > threshold).count();
            if above == rank {
                return rank;
            }
            rank = above;
        }
    }

    /// Orthonormal directions that hold nearly all of the rows that so many can, the most important first, and the singular
    /// values that belong to them.
    fn range(&self, directions: usize) -> (Self, Vec<f64>) {
        let mut random = fastrand::Rng::with_seed(SEED);
        // Near enough to a Gaussian.
        let probes = Self::of(directions, self.columns, |_, _| (0..12).map(|_| random.f32()).sum::<f32>() - 6.0);
        let directions = self.gathered(&probes).orthonormal();
        let directions = self.gathered(&directions).orthonormal();
        let (squares, rotation) = eigen(self.coordinates(&directions).gram());
        (rotation.times(&directions), squares.into_iter().map(|square| square.max(0.0).sqrt()).collect())
    }

    /// The share of the numbers that are nearly as small as those of `most`.
    fn share_within(&self, most: &Self) -> f64 {
        let within = self.numbers().zip(most.numbers()).filter(|(number, most)| number.abs() <= NEARNESS * most);
        within.count() as f64 / (self.rows * self.columns) as f64
    }

    /// Takes off the rows what they have of orthonormal directions.
    fn remove(&mut self, directions: &Self) {
        let held = self.coordinates(directions).times(directions);
        *self = Self::of(self.rows, self.columns, |row, column| self.row(row)[column] - held.row(row)[column]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::numerics::bf16_from_f32;

    fn normals(count: usize, seed: u64) -> Vec<f32> {
        let mut random = fastrand::Rng::with_seed(seed);
        (0..count).map(|_| (0..12).map(|_| random.f32()).sum::<f32>() - 6.0).collect()
    }

    fn bf16(values: &[f32]) -> Vec<u8> {
        values.iter().flat_map(|&value| bf16_from_f32(value).to_le_bytes()).collect()
    }

    fn matrix_tensor(rows: usize, columns: usize) -> TensorInfo {
        let length_bytes = 2 * (rows * columns) as u64;
        let shape = vec![rows as u64, columns as u64];
        TensorInfo { name: "w".into(), dtype: Dtype::BF16, shape, offset_bytes: 0, length_bytes }
    }

    /// A base, and the base with a product of this rank added, both rounded.
    fn merged(rows: usize, columns: usize, rank: usize) -> (Vec<u8>, Vec<u8>) {
        let base = bf16(&normals(rows * columns, 1));
        let (left, right) = (normals(rows * rank, 2), normals(rank * columns, 3));
        let sums = values_of(&Dtype::BF16, &base).into_iter().enumerate().map(|(element, value)| {
            let (row, column) = (element / columns, element % columns);
            let product: f32 = (0..rank).map(|k| left[row * rank + k] * right[k * columns + column]).sum();
            value + 0.01 * product
        });
        let sums = bf16(&sums.collect::<Vec<f32>>());
        (base, sums)
    }

    #[test]
    fn the_rank_of_a_merged_product_is_found_and_little_is_left_of_the_change() {
        let tensor = matrix_tensor(192, 256);
        let (base, variant) = merged(192, 256, 5);
        let found = find_product(&tensor, &variant, &base).expect("it is of low rank");
        assert_eq!(found.stored.rank, 5);
        let pair = Pair { tensor: &tensor, bytes: &variant, predicted: &base };
        let plain = DifferenceSearch::new(pair).expect("it has 16 bits").refined().bits();
        assert!(found.bits < 0.5 * plain, "{} bits, {plain} without a product", found.bits);
        let mut predicted = base;
        add_product(&found.product, &Dtype::BF16, &mut predicted);
        let same = predicted.as_chunks::<2>().0.iter().zip(variant.as_chunks::<2>().0).filter(|(a, b)| a == b).count();
        assert!(same > 192 * 256 * 9 / 10, "{same} elements are predicted to the bit");
    }

    #[test]
    fn a_product_like_one_that_is_known_has_its_fineness_and_no_more_rank_than_the_change() {
        let tensor = matrix_tensor(192, 256);
        let (base, variant) = merged(192, 256, 5);
        for rank in [5, 8] {
            let known =
                LowRank { rank, columns: 256, scale: 1.0, left: vec![90; 192 * rank], right: vec![-127; rank * 256] };
            let (stored, product) = find_product_like(&known, &tensor, &variant, &base).expect("it is of low rank");
            assert_eq!(stored.rank, 5);
            let largest = product.left.iter().chain(&product.right).map(|integer| integer.unsigned_abs()).max();
            assert_eq!(largest, Some(127));
            let mut predicted = base.clone();
            add_product(&product, &Dtype::BF16, &mut predicted);
            let same =
                predicted.as_chunks::<2>().0.iter().zip(variant.as_chunks::<2>().0).filter(|(a, b)| a == b).count();
            assert!(same > 192 * 256 * 8 / 10, "{same} elements are predicted to the bit");
        }
    }

    #[test]
    fn noise_is_of_no_low_rank() {
        let tensor = matrix_tensor(160, 160);
        let base = bf16(&normals(160 * 160, 1));
        let noise = normals(160 * 160, 4);
        let variant: Vec<f32> =
            values_of(&Dtype::BF16, &base).iter().zip(noise).map(|(value, noise)| value + 0.01 * noise).collect();
        assert!(find_product(&tensor, &bf16(&variant), &base).is_none());
    }
}
