//! The Cholesky factorisation of a positive definite matrix, in blocks.

use ndarray::linalg::general_mat_mul;
use ndarray::{Array2, Axis, s};
use rayon::prelude::*;

/// Columns factorised at once.
const BLOCK: usize = 64;
/// Rows updated at once: fixed, so that nothing depends on the number of threads.
const ROWS: usize = 128;

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
    fn a_matrix_that_is_not_definite_has_a_factor_too() {
        let mut matrix = Array2::ones((3, 3));
        factorize(&mut matrix, 1e-6);
        assert!(matrix.iter().all(|value| value.is_finite()));
    }
}
