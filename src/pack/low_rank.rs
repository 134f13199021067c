//! Finds the low-rank product that a variant added to its base: what is left of a LoRA once it is merged (SPEC.md section 7.8).
//!
//! The change of a tensor is the product and the rounding of its sum. A randomized range finder gives the product's span and
//! how many of its directions stand out of the rounding. Then the rounding is taken back: the unrounded change of an element
//! is known to lie in an interval, and the nearest point of it to the product found so far is a better change to fit the next
//! product to. Integer factors are stored as finely as pays.

use rayon::prelude::*;

use super::difference::{DifferenceChoice, Pair};
use super::quantize::values_of;
use crate::codec::integers;
use crate::codec::low_rank::LowRank;
use crate::format::difference::StoredLowRank;
use crate::format::limits::FACTOR;
use crate::numerics::{bf16_from_f32, f16_from_f32};
use crate::tensor::{Dtype, TensorInfo};

/// Rows and columns below which a matrix has no low-rank part worth finding.
const LEAST_EXTENT: usize = 32;
/// Directions looked for, tried one after another while all of them stand out.
const DIRECTIONS: [usize; 2] = [40, 136];
/// Rows and columns of the sample that is looked at first.
const SAMPLED_EXTENT: usize = 160;
/// Directions looked for in the sample.
const SAMPLED_DIRECTIONS: usize = 24;
/// How much more than of noise their energy must be.
const STANDS_OUT: f64 = 1.6;
/// A singular value counts if it is so many times the largest of noise.
const ABOVE_NOISE: f64 = 1.1;
/// Rounds of taking the rounding back.
const ROUNDS: usize = 12;
/// Magnitudes of the largest factor that are tried.
const MAGNITUDES: [i32; 5] = [63, 127, 255, 511, 2047];
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
    /// Bits of factors and differences, about.
    pub bits: f64,
}

/// A matrix by rows.
#[derive(Clone, Debug)]
struct Matrix {
    rows: usize,
    columns: usize,
    values: Vec<f32>,
}

/// Finds the product that codes the tensor shortest. `decoded` is what it starts from. `None` where its change is of no low
/// rank, or is no shorter with a product.
pub fn find_product(tensor: &TensorInfo, bytes: &[u8], decoded: &[u8]) -> Option<FoundProduct> {
    if !matches!(tensor.dtype, Dtype::F32 | Dtype::F16 | Dtype::BF16) || tensor.shape.len() < 2 {
        return None;
    }
    let rows = tensor.shape[0] as usize;
    let columns = tensor.elements() as usize / rows.max(1);
    if rows.min(columns) < LEAST_EXTENT {
        return None;
    }
    let (values, base) = (values_of(&tensor.dtype, bytes), values_of(&tensor.dtype, decoded));
    if !values.iter().chain(&base).all(|value| value.is_finite()) {
        return None;
    }
    let change = Matrix { rows, columns, values: values.iter().zip(&base).map(|(value, base)| value - base).collect() };
    let sampled = change.sample(SAMPLED_EXTENT);
    if !sampled.stands_out(SAMPLED_DIRECTIONS) {
        return None;
    }
    let span = DIRECTIONS.into_iter().find_map(|directions| {
        let directions = directions.min(rows.min(columns) / 2);
        let (span, singular_values) = change.range(directions);
        let rank = change.rank_above_noise(&singular_values);
        (rank > 0 && rank < directions).then(|| span.first_columns(rank))
    })?;
    let intervals = Intervals { dtype: &tensor.dtype, values: &values, base: &base };
    let (left, right) = refine(&change, span, &intervals);
    quantized(tensor, bytes, decoded, &left, &right)
}

/// Stores the factors as finely as pays.
fn quantized(tensor: &TensorInfo, bytes: &[u8], decoded: &[u8], left: &Matrix, right: &Matrix) -> Option<FoundProduct> {
    let largest = |matrix: &Matrix| matrix.values.iter().fold(0.0_f32, |most, value| most.max(value.abs()));
    let most = largest(left).max(largest(right));
    let try_magnitude = |magnitude: i32| {
        let step = most / magnitude.min(FACTOR) as f32;
        let integers =
            |matrix: &Matrix| -> Vec<i32> { matrix.values.iter().map(|value| (value / step).round() as i32).collect() };
        let product = LowRank {
            rank: left.columns,
            columns: right.columns,
            scale: step * step,
            left: integers(left),
            right: integers(right),
        };
        let mut predicted = decoded.to_vec();
        product.add(&tensor.dtype, 0, &mut predicted);
        let (difference, bits) = match predicted == bytes {
            true => (None, 0.0),
            false => {
                let (choice, bits) = DifferenceChoice::choose(Pair { tensor, bytes, predicted: &predicted })?;
                (Some(choice), bits)
            }
        };
        let stored = StoredLowRank {
            rank: product.rank as u32,
            scale: product.scale,
            left: integers::encode(&product.left),
            right: integers::encode(&product.right),
        };
        let bits = bits + 8.0 * (stored.left.0.len() + stored.right.0.len()) as f64;
        Some(FoundProduct { stored, product, difference, bits })
    };
    let mut best: Option<FoundProduct> = None;
    for magnitude in MAGNITUDES {
        let found = try_magnitude(magnitude)?;
        if best.as_ref().is_some_and(|best| best.bits <= found.bits) {
            break; // finer factors cost more than they save from here on
        }
        best = Some(found);
    }
    best
}

/// Where each element's change was before its sum was rounded.
struct Intervals<'a> {
    dtype: &'a Dtype,
    values: &'a [f32],
    base: &'a [f32],
}

impl Intervals<'_> {
    /// The point nearest to `product` that rounds to the element.
    fn nearest(&self, element: usize, product: f32) -> f32 {
        let (value, base) = (self.values[element], self.base[element]);
        let sum = base + product;
        let rounded = match self.dtype {
            Dtype::BF16 => f32::from_bits(u32::from(bf16_from_f32(sum)) << 16),
            Dtype::F16 => crate::numerics::f32_from_f16(f16_from_f32(sum)),
            _ => sum,
        };
        if rounded == value {
            return product;
        }
        // Half a unit in the last place of the element, towards the sum.
        let half = match self.dtype {
            Dtype::BF16 => f32::from_bits(value.to_bits() & 0x7f80_0000) / 256.0,
            Dtype::F16 => f32::from_bits(value.to_bits() & 0x7f80_0000).max(6.1e-5) / 2048.0,
            _ => 0.0,
        };
        value + half.copysign(sum - value) - base
    }
}

/// The factors of the product in `span` that fits the changes before they were rounded.
fn refine(change: &Matrix, mut span: Matrix, intervals: &Intervals<'_>) -> (Matrix, Matrix) {
    let mut target = change.clone();
    for _ in 0..ROUNDS {
        let right = target.transposed_times(&span); // columns of `span` as rows of the right factor, transposed
        let columns = change.columns;
        target.values.par_chunks_mut(columns).enumerate().for_each(|(row, target)| {
            let left = span.row(row);
            for (column, target) in target.iter_mut().enumerate() {
                let product: f32 = left.iter().zip(right.row(column)).map(|(a, b)| a * b).sum();
                *target = intervals.nearest(row * columns + column, product);
            }
        });
        span = target.times(&target.transposed_times(&span)).orthonormal();
    }
    let right = target.transposed_times(&span);
    let (squares, directions) = right.gram().eigen();
    // Both factors get the root of each singular value, so that one step suits both.
    let roots: Vec<f32> =
        squares.iter().map(|square| square.max(0.0).sqrt().sqrt().max(f64::MIN_POSITIVE) as f32).collect();
    let mut left = span.times(&directions);
    left.values
        .chunks_mut(roots.len())
        .for_each(|row| row.iter_mut().zip(&roots).for_each(|(value, root)| *value *= root));
    let mut right = right.times(&directions);
    right
        .values
        .chunks_mut(roots.len())
        .for_each(|row| row.iter_mut().zip(&roots).for_each(|(value, root)| *value /= root));
    (left, right.transposed())
}

impl Matrix {
    fn zeros(rows: usize, columns: usize) -> Self {
        Self { rows, columns, values: vec![0.0; rows * columns] }
    }

    fn row(&self, row: usize) -> &[f32] {
        &self.values[row * self.columns..][..self.columns]
    }

    fn energy(&self) -> f64 {
        self.values.iter().map(|&value| f64::from(value).powi(2)).sum()
    }

    /// Rows and columns spread over the matrix, `extent` of each at most.
    fn sample(&self, extent: usize) -> Self {
        let spread = |count: usize| -> Vec<usize> {
            let taken = count.min(extent);
            (0..taken).map(|index| index * count / taken).collect()
        };
        let (rows, columns) = (spread(self.rows), spread(self.columns));
        let values = rows.iter().flat_map(|&row| columns.iter().map(move |&column| self.row(row)[column])).collect();
        Self { rows: rows.len(), columns: columns.len(), values }
    }

    /// Whether so many directions hold much more energy than they would of noise.
    fn stands_out(&self, directions: usize) -> bool {
        let directions = directions.min(self.rows.min(self.columns) / 2);
        let (_, singular_values) = self.range(directions);
        let found: f64 = singular_values.iter().map(|value| value * value).sum();
        let (rows, columns) = (self.rows as f64, self.columns as f64);
        // The largest singular value of noise, squared, for all of them: more than they have.
        let of_noise = self.energy() / (rows * columns) * (rows.sqrt() + columns.sqrt()).powi(2) * directions as f64;
        found > STANDS_OUT * of_noise.min(self.energy() * 0.6)
    }

    /// How many singular values stand out of the noise that is left beside them.
    fn rank_above_noise(&self, singular_values: &[f64]) -> usize {
        let (rows, columns) = (self.rows as f64, self.columns as f64);
        let mut rank = singular_values.len();
        loop {
            let kept: f64 = singular_values[..rank].iter().map(|value| value * value).sum();
            let left = (self.energy() - kept).max(0.0) / ((rows - rank as f64) * (columns - rank as f64)).max(1.0);
            let threshold = ABOVE_NOISE * left.sqrt() * (rows.sqrt() + columns.sqrt());
            let above = singular_values[..rank].iter().filter(|&&value| value > threshold).count();
            if above == rank {
                return rank;
            }
            rank = above;
        }
    }

    /// Orthonormal columns that span nearly all of the matrix that so many can, the most important first, and the singular
    /// values that belong to them.
    fn range(&self, directions: usize) -> (Self, Vec<f64>) {
        let mut random = fastrand::Rng::with_seed(SEED);
        let mut normal = || (0..12).map(|_| random.f32()).sum::<f32>() - 6.0; // near enough
        let probes = Self {
            rows: self.columns,
            columns: directions,
            values: (0..self.columns * directions).map(|_| normal()).collect(),
        };
        let mut span = self.times(&probes).orthonormal();
        span = self.times(&self.transposed_times(&span)).orthonormal();
        let (squares, rotation) = self.transposed_times(&span).gram().eigen();
        (span.times(&rotation), squares.into_iter().map(|square| square.max(0.0).sqrt()).collect())
    }

    fn first_columns(&self, columns: usize) -> Self {
        let values = (0..self.rows).flat_map(|row| self.row(row)[..columns].iter().copied()).collect();
        Self { rows: self.rows, columns, values }
    }

    fn transposed(&self) -> Self {
        let values =
            (0..self.columns).flat_map(|column| (0..self.rows).map(move |row| self.row(row)[column])).collect();
        Self { rows: self.columns, columns: self.rows, values }
    }

    fn times(&self, other: &Self) -> Self {
        let mut product = Self::zeros(self.rows, other.columns);
        product.values.par_chunks_mut(other.columns).enumerate().for_each(|(row, sums)| {
            for (&value, other) in self.row(row).iter().zip(other.values.chunks_exact(other.columns)) {
                add_times(sums, value, other);
            }
        });
        product
    }

    /// The transpose times another matrix of as many rows. Columns are shared out in pieces of fixed size, so that no sum
    /// depends on the number of threads.
    fn transposed_times(&self, other: &Self) -> Self {
        const PIECE: usize = 128;
        let mut product = Self::zeros(self.columns, other.columns);
        product.values.par_chunks_mut(PIECE * other.columns).enumerate().for_each(|(piece, sums)| {
            for row in 0..self.rows {
                let values = &self.row(row)[piece * PIECE..];
                for (sums, &value) in sums.chunks_exact_mut(other.columns).zip(values) {
                    add_times(sums, value, other.row(row));
                }
            }
        });
        product
    }

    /// The transpose times the matrix itself.
    fn gram(&self) -> Vec<Vec<f64>> {
        let mut sums = vec![vec![0.0; self.columns]; self.columns];
        for row in 0..self.rows {
            let row = self.row(row);
            for (sums, &a) in sums.iter_mut().zip(row) {
                for (sum, &b) in sums.iter_mut().zip(row) {
                    *sum += f64::from(a) * f64::from(b);
                }
            }
        }
        sums
    }

    /// Orthonormal columns with the same span (Gram-Schmidt, twice: once is not enough in 32 bits).
    fn orthonormal(&self) -> Self {
        let mut columns: Vec<Vec<f32>> =
            self.transposed().values.chunks_exact(self.rows).map(<[f32]>::to_vec).collect();
        for column in 0..columns.len() {
            let (before, rest) = columns.split_at_mut(column);
            let own = &mut rest[0];
            for _ in 0..2 {
                for other in &*before {
                    let overlap = dot(own, other) as f32;
                    own.iter_mut().zip(other).for_each(|(value, other)| *value -= overlap * other);
                }
                let length = dot(own, own).sqrt();
                let scale = if length > 0.0 { (1.0 / length) as f32 } else { 0.0 };
                own.iter_mut().for_each(|value| *value *= scale);
            }
        }
        Self { rows: columns.len(), columns: self.rows, values: columns.concat() }.transposed()
    }
}

/// `sums += value * others`.
fn add_times(sums: &mut [f32], value: f32, others: &[f32]) {
    for (sum, other) in sums.iter_mut().zip(others) {
        *sum += value * other;
    }
}

fn dot(a: &[f32], b: &[f32]) -> f64 {
    a.iter().zip(b).map(|(&a, &b)| f64::from(a) * f64::from(b)).sum()
}

/// Eigenvalues, largest first, and eigenvectors as columns.
trait Eigen {
    fn eigen(self) -> (Vec<f64>, Matrix);
}

impl Eigen for Vec<Vec<f64>> {
    /// Of a symmetric matrix, by Jacobi's rotations.
    fn eigen(mut self) -> (Vec<f64>, Matrix) {
        let size = self.len();
        let mut vectors: Vec<Vec<f64>> =
            (0..size).map(|row| (0..size).map(|column| f64::from(u8::from(row == column))).collect()).collect();
        for _ in 0..30 {
            let beside: f64 =
                (0..size).flat_map(|i| (0..i).map(move |j| (i, j))).map(|(i, j)| self[i][j].powi(2)).sum();
            let diagonal: f64 = (0..size).map(|i| self[i][i].powi(2)).sum();
            if beside <= 1e-20 * diagonal {
                break;
            }
            for p in 0..size {
                for q in p + 1..size {
                    if self[p][q] == 0.0 {
                        continue;
                    }
                    let theta = (self[q][q] - self[p][p]) / (2.0 * self[p][q]);
                    let t = theta.signum() / (theta.abs() + (theta * theta + 1.0).sqrt());
                    let t = if theta == 0.0 { 1.0 } else { t };
                    let c = 1.0 / (t * t + 1.0).sqrt();
                    let s = t * c;
                    for row in &mut self {
                        (row[p], row[q]) = (c * row[p] - s * row[q], s * row[p] + c * row[q]);
                    }
                    let (upper, lower) = self.split_at_mut(q);
                    for (a, b) in upper[p].iter_mut().zip(&mut lower[0]) {
                        (*a, *b) = (c * *a - s * *b, s * *a + c * *b);
                    }
                    for row in &mut vectors {
                        (row[p], row[q]) = (c * row[p] - s * row[q], s * row[p] + c * row[q]);
                    }
                }
            }
        }
        let mut order: Vec<usize> = (0..size).collect();
        order.sort_by(|&a, &b| self[b][b].total_cmp(&self[a][a]));
        let values = vectors.iter().flat_map(|row| order.iter().map(|&column| row[column] as f32)).collect();
        (order.iter().map(|&index| self[index][index]).collect(), Matrix { rows: size, columns: size, values })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

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
        let (_, plain) = DifferenceChoice::choose(Pair { tensor: &tensor, bytes: &variant, predicted: &base }).unwrap();
        assert!(found.bits < 0.5 * plain, "{} bits, {plain} without a product", found.bits);
        let mut predicted = base;
        found.product.add(&Dtype::BF16, 0, &mut predicted);
        let same = predicted.as_chunks::<2>().0.iter().zip(variant.as_chunks::<2>().0).filter(|(a, b)| a == b).count();
        assert!(same > 192 * 256 * 9 / 10, "{same} elements are predicted to the bit");
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

    #[test]
    fn eigenvectors_of_a_symmetric_matrix_are_stretched_by_their_eigenvalues() {
        let matrix = vec![vec![4.0, 1.0, 0.0], vec![1.0, 3.0, 1.0], vec![0.0, 1.0, 2.0]];
        let (values, vectors) = matrix.clone().eigen();
        assert!(values.is_sorted_by(|a, b| a >= b));
        for (column, value) in values.iter().enumerate() {
            for row in &matrix {
                let index = matrix.iter().position(|other| other == row).unwrap();
                let product: f64 = (0..3).map(|k| row[k] * f64::from(vectors.row(k)[column])).sum();
                assert!((product - value * f64::from(vectors.row(index)[column])).abs() < 1e-5);
            }
        }
    }
}
