//! The exact assignment, in cubic time (section 4.4).

use ndarray::Array2;
use pathfinding::kuhn_munkres::kuhn_munkres;
use pathfinding::matrix::Matrix;

/// For each row of a square matrix the column of the assignment with the greatest sum (Eq. 2).
///
/// Scores are compared in steps of 2^-40 of the largest, so that equal scores are equal on every machine.
pub(super) fn assign(scores: &Array2<f32>) -> Vec<u32> {
    assert!(scores.is_square(), "as many blocks here as there");
    if scores.is_empty() {
        return Vec::new();
    }
    let largest = scores.iter().fold(0.0, |largest: f64, &score| largest.max(f64::from(score).abs()));
    let scale = if largest > 0.0 { (1u64 << 40) as f64 / largest } else { 0.0 };
    let steps: Vec<i64> = scores.iter().map(|&score| (f64::from(score) * scale) as i64).collect();
    let weights = Matrix::from_vec(scores.nrows(), scores.ncols(), steps).expect("as many scores as the shape has");
    kuhn_munkres(&weights).1.into_iter().map(|column| column as u32).collect()
}

#[cfg(test)]
mod tests {
    use ndarray::array;
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn the_greatest_sum_is_not_the_greedy_one() {
        assert_eq!(assign(&array![[0.9, 0.8], [0.85, 0.1]]), [1, 0]);
        assert_eq!(assign(&Array2::zeros((0, 0))), [0u32; 0]);
        let mut equal = assign(&Array2::zeros((3, 3)));
        equal.sort_unstable();
        assert_eq!(equal, [0, 1, 2]);
    }

    /// Every assignment of the rows from `row` on, by trying.
    fn best_sum(scores: &Array2<f32>, row: usize, used: &mut Vec<bool>) -> f32 {
        if row == scores.nrows() {
            return 0.0;
        }
        let mut best = f32::NEG_INFINITY;
        for column in 0..scores.ncols() {
            if !used[column] {
                used[column] = true;
                best = best.max(scores[(row, column)] + best_sum(scores, row + 1, used));
                used[column] = false;
            }
        }
        best
    }

    proptest! {
        #[test]
        fn no_assignment_has_a_greater_sum(size in 1usize..7, values in prop::collection::vec(-1.0f32..1.0, 36)) {
            let scores = Array2::from_shape_fn((size, size), |(row, column)| values[row * 6 + column]);
            let assigned = assign(&scores);
            let sum: f32 = assigned.iter().enumerate().map(|(row, &column)| scores[(row, column as usize)]).sum();
            prop_assert!((sum - best_sum(&scores, 0, &mut vec![false; size])).abs() < 1e-5);
        }
    }
}
