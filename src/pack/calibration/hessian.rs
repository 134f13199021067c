//! The Hessian of a linear map's output error: the second moments of its inputs.

use ndarray::linalg::general_mat_mul;
use ndarray::{Array2, Axis, s};
use rayon::prelude::*;

/// Columns computed at once: fixed, so that no sum depends on the number of threads.
const COLUMNS: usize = 256;

/// The mean of x x^T over the inputs, `[tokens, inputs]`: a symmetric `[inputs, inputs]`.
pub fn hessian(inputs: &Array2<f32>) -> Array2<f32> {
    let columns = inputs.ncols();
    let scale = 1.0 / inputs.nrows().max(1) as f32;
    let mut hessian = Array2::zeros((columns, columns));
    let blocks: Vec<_> = hessian.axis_chunks_iter_mut(Axis(0), COLUMNS).collect();
    blocks.into_par_iter().enumerate().for_each(|(block, mut rows)| {
        let range = block * COLUMNS..block * COLUMNS + rows.nrows();
        // The lower triangle, blocks on the diagonal whole.
        let mut lower = rows.slice_mut(s![.., ..range.end]);
        let of_rows = inputs.slice(s![.., range.clone()]);
        general_mat_mul(scale, &of_rows.t(), &inputs.slice(s![.., ..range.end]), 0.0, &mut lower);
    });
    for row in 0..columns {
        for column in row + 1..columns {
            hessian[[row, column]] = hessian[[column, row]];
        }
    }
    hessian
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_the_mean_outer_product() {
        let inputs = Array2::from_shape_fn((7, 300), |(row, column)| ((row * 31 + column * 17) % 13) as f32 - 6.0);
        let found = hessian(&inputs);
        let expected = inputs.t().dot(&inputs) / 7.0;
        assert!(found.iter().zip(&expected).all(|(a, b)| (a - b).abs() < 1e-3));
    }
}
