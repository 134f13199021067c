//! The Cholesky factorisation of a positive definite matrix, in blocks.

use ndarray::linalg::general_mat_mul;
use ndarray::{Array2, Axis, s};
use rayon::prelude::*;

/// Columns factorised at once.
const BLOCK: usize = 64;
/// Rows updated at once: fixed, so that nothing depends on the number of threads.
const ROWS: usize = 128;
/// Pivots of an equation's matrix are raised to this, relative to the mean of its diagonal.
const LEAST_PIVOT: f64 = 1e-6;

/// Turns the lower triangle of a symmetric matrix into L with L L^T = `matrix`; what is above the diagonal means nothing
/// then. Pivots below `least` are raised to it, so that a matrix that rounding has made indefinite has a factor too.
pub fn factorize(matrix: &mut Array2<f64>, least: f64) {
    let count = matrix.nrows();
    for start in (0..count).step_by(BLOCK) {
        let end = (start + BLOCK).min(count);
        factorize_block(matrix, start, end, least);
        if end == count {
            return;
        }
        let diagonal = matrix.slice(s![start..end, start..end]).to_owned();
        let mut below = matrix.slice_mut(s![end.., start..end]);
        let blocks: Vec<_> = below.axis_chunks_iter_mut(Axis(0), ROWS).collect();
        blocks.into_par_iter().for_each(|mut rows| {
            for mut row in rows.rows_mut() {
                for column in 0..diagonal.ncols() {
                    let sum: f64 = (0..column).map(|before| row[before] * diagonal[[column, before]]).sum();
                    row[column] = (row[column] - sum) / diagonal[[column, column]];
                }
            }
        });
        let panel = matrix.slice(s![end.., start..end]).to_owned();
        let mut rest = matrix.slice_mut(s![end.., end..]);
        let blocks: Vec<_> = rest.axis_chunks_iter_mut(Axis(0), ROWS).collect();
        blocks.into_par_iter().enumerate().for_each(|(block, mut rows)| {
            let (first, last) = (block * ROWS, block * ROWS + rows.nrows());
            let mut lower = rows.slice_mut(s![.., ..last]);
            general_mat_mul(-1.0, &panel.slice(s![first..last, ..]), &panel.slice(s![..last, ..]).t(), 1.0, &mut lower);
        });
    }
}

/// The block on the diagonal from `start` to `end`.
fn factorize_block(matrix: &mut Array2<f64>, start: usize, end: usize, least: f64) {
    for column in start..end {
        for row in column..end {
            let sum: f64 = (start..column).map(|before| matrix[[row, before]] * matrix[[column, before]]).sum();
            let rest = matrix[[row, column]] - sum;
            matrix[[row, column]] =
                if row == column { rest.max(least).sqrt() } else { rest / matrix[[column, column]] };
        }
    }
}

/// The factor of a positive definite matrix, to solve equations with.
pub struct Factor(Array2<f64>);

impl Factor {
    /// Of a symmetric matrix.
    pub fn new(mut matrix: Array2<f64>) -> Self {
        let mean = matrix.diag().sum() / matrix.nrows().max(1) as f64;
        factorize(&mut matrix, (LEAST_PIVOT * mean).max(f64::MIN_POSITIVE));
        Self(matrix)
    }

    /// For each row b of `right`, the x with `matrix` x = b.
    pub fn solve_rows(&self, mut right: Array2<f32>) -> Array2<f32> {
        let Self(lower) = self;
        let rows: Vec<_> = right.rows_mut().into_iter().collect();
        rows.into_par_iter().for_each(|mut row| {
            let mut solved: Vec<f64> = row.iter().map(|&value| f64::from(value)).collect();
            for index in 0..solved.len() {
                let factors = lower.row(index);
                let (before, rest) = solved.split_at_mut(index);
                let sum: f64 = before.iter().zip(factors).map(|(value, factor)| value * factor).sum();
                rest[0] = (rest[0] - sum) / factors[index];
            }
            for index in (0..solved.len()).rev() {
                let factors = lower.row(index);
                let (before, rest) = solved.split_at_mut(index);
                rest[0] /= factors[index];
                for (value, factor) in before.iter_mut().zip(factors) {
                    *value -= rest[0] * factor;
                }
            }
            row.iter_mut().zip(solved).for_each(|(value, solved)| *value = solved as f32);
        });
        right
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_factor_times_its_transpose_is_the_matrix() {
        for count in [1, 5, 64, 65, 200, 330] {
            let random = &mut fastrand::Rng::with_seed(count as u64);
            let root = Array2::from_shape_fn((count, count), |_| random.f64() - 0.5);
            let matrix = root.dot(&root.t()) + Array2::<f64>::eye(count);
            let mut factor = matrix.clone();
            factorize(&mut factor, 1e-9);
            for row in 0..count {
                factor.slice_mut(s![row, row + 1..]).fill(0.0);
            }
            let product = factor.dot(&factor.t());
            let farthest = product.iter().zip(&matrix).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max);
            assert!(farthest < 1e-9 * count as f64, "{count}: {farthest}");
        }
    }

    #[test]
    fn what_is_solved_gives_the_right_side_again() {
        let random = &mut fastrand::Rng::with_seed(9);
        let root = Array2::from_shape_fn((70, 70), |_| random.f64() - 0.5);
        let matrix = root.dot(&root.t()) + Array2::<f64>::eye(70);
        let right = Array2::from_shape_fn((3, 70), |_| random.f32() - 0.5);
        let solved = Factor::new(matrix.clone()).solve_rows(right.clone());
        let found = solved.mapv(f64::from).dot(&matrix);
        assert!(found.iter().zip(&right).all(|(a, &b)| (a - f64::from(b)).abs() < 1e-4));
    }

    #[test]
    fn a_matrix_that_is_not_definite_has_a_factor_too() {
        let mut matrix = Array2::ones((3, 3));
        factorize(&mut matrix, 1e-6);
        assert!(matrix.iter().all(|value| value.is_finite()));
    }
}
