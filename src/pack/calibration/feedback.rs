//! How the errors of some columns move the targets of others (LDLQ).
//!
//! With H = R R^T, R upper triangular, an error e of a row costs
//! e H e^T = sum over i of R_ii^2 (e_i + sum over j < i of e_j R_ji / R_ii)^2. So column i is best coded as its weight plus the
//! earlier errors times R_ji / R_ii, and what is left of it then counts R_ii^2.
//!
//! The order of the columns is the encoder's choice, but a lane of a strip is searched as a whole: its columns, every so
//! manieth of a row, follow one another. Lanes with the strongest inputs come first, because all that follow can make up for
//! their errors.

use std::ops::Range;

use ndarray::Array2;

use super::cholesky::factorize;

/// Added to the diagonal of a Hessian, relative to its mean: inputs that calibration never saw are not worthless.
const DAMPING: f64 = 0.01;
/// Eighths of an octave that a column's step may be off the mean: of inputs that hardly ever are there, little is known.
const MOST_SCALE: f64 = 24.0;

/// What is added to the diagonal of a Hessian.
fn damping(hessian: &Array2<f32>) -> f64 {
    let sum: f64 = hessian.diag().iter().map(|&value| f64::from(value)).sum();
    (DAMPING * sum / hessian.ncols().max(1) as f64).max(f64::MIN_POSITIVE)
}

/// The order in which a tensor's columns are quantized, and what their errors do.
#[derive(Clone, Debug, PartialEq)]
pub struct ColumnFeedback {
    /// Columns in their order.
    pub order: Vec<usize>,
    /// The columns of each lane in `order`; lanes without columns are left out.
    pub lanes: Vec<Range<usize>>,
    /// Above the diagonal, how far an error in the column of the row's place moves that of the column's place:
    /// `[columns, columns]`, places as in `order`.
    pub moves: Array2<f32>,
    /// What a squared error in each column counts, once moved, in their order; 1 in the mean.
    pub weights: Vec<f32>,
    /// What errors count once moved, over what they count where they stay.
    pub left: f64,
}

impl ColumnFeedback {
    /// Feedback for rows whose columns are dealt out to so many lanes.
    pub fn new(hessian: &Array2<f32>, lanes: usize) -> Self {
        let columns = hessian.ncols();
        let diagonal = |column: usize| f64::from(hessian[[column, column]]);
        let strength = |lane: usize| (lane..columns).step_by(lanes).map(diagonal).sum::<f64>();
        let mut by_strength: Vec<usize> = (0..lanes.min(columns)).collect();
        by_strength.sort_by(|&a, &b| strength(b).total_cmp(&strength(a)));
        let mut order = Vec::with_capacity(columns);
        let mut ranges = Vec::with_capacity(by_strength.len());
        for lane in by_strength {
            let start = order.len();
            order.extend((lane..columns).step_by(lanes));
            ranges.push(start..order.len());
        }
        let damping = damping(hessian);
        // From the last column to the first, the lower factor is R from the last row to the first.
        let last = columns.saturating_sub(1);
        let mut factor = Array2::from_shape_fn((columns, columns), |(row, column)| {
            let value = f64::from(hessian[[order[last - row], order[last - column]]]);
            if row == column { value + damping } else { value }
        });
        factorize(&mut factor, damping / 2.0);
        let upper = |row: usize, column: usize| factor[[last - row, last - column]];
        let moves = Array2::from_shape_fn((columns, columns), |(row, column)| {
            if row < column { (upper(row, column) / upper(column, column)) as f32 } else { 0.0 }
        });
        let weights: Vec<f64> = (0..columns).map(|column| upper(column, column).powi(2)).collect();
        let mean = weights.iter().sum::<f64>() / columns.max(1) as f64;
        let weights = weights.iter().map(|weight| (weight / mean) as f32).collect();
        let diagonal: f64 = (0..columns).map(diagonal).sum::<f64>() / columns.max(1) as f64;
        Self { order, lanes: ranges, moves, weights, left: mean / (diagonal + damping) }
    }

    /// Scale integers, by column, for steps in proportion to the weights of errors to the power of minus half `strength`: with
    /// a strength of 1 all columns would add alike to the output's error. The mean scale is none.
    pub fn column_scales(&self, strength: f64) -> Vec<i32> {
        let octaves: Vec<f64> = self
            .weights
            .iter()
            .map(|&weight| -0.5 * strength * f64::from(weight.max(f32::MIN_POSITIVE)).log2())
            .collect();
        let mean = octaves.iter().sum::<f64>() / octaves.len().max(1) as f64;
        let mut scales = vec![0; octaves.len()];
        for (&column, octaves) in self.order.iter().zip(octaves) {
            scales[column] = (8.0 * (octaves - mean)).round().clamp(-MOST_SCALE, MOST_SCALE) as i32;
        }
        scales
    }

    /// The feedback of errors that are counted in steps times these multipliers of their columns.
    #[must_use]
    pub fn scaled(&self, multipliers: &[f32]) -> Self {
        let of_place = |place: usize| multipliers[self.order[place]];
        let moves = Array2::from_shape_fn(self.moves.raw_dim(), |(row, column)| {
            self.moves[[row, column]] * of_place(row) / of_place(column)
        });
        let weights: Vec<f32> =
            self.weights.iter().enumerate().map(|(place, weight)| weight * of_place(place).powi(2)).collect();
        let mean = self.mean_weight(multipliers) as f32;
        let weights = weights.into_iter().map(|weight| weight / mean).collect();
        Self { order: self.order.clone(), lanes: self.lanes.clone(), moves, weights, left: self.left }
    }

    /// The mean of what a squared error of one step counts, with steps times these multipliers of their columns.
    pub fn mean_weight(&self, multipliers: &[f32]) -> f64 {
        let weights = self.weights.iter().zip(&self.order);
        let sum: f64 =
            weights.map(|(&weight, &column)| f64::from(weight) * f64::from(multipliers[column]).powi(2)).sum();
        sum / self.weights.len().max(1) as f64
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::codec::quantizer::scale_multiplier;

    fn random_hessian(columns: usize) -> Array2<f32> {
        let random = &mut fastrand::Rng::with_seed(5);
        let inputs = Array2::from_shape_fn((3 * columns, columns), |(_, column)| {
            (random.f32() - 0.5) * (1.0 + column as f32) + random.f32()
        });
        super::super::hessian::hessian(&inputs)
    }

    #[test]
    fn the_moved_errors_weigh_as_much_as_the_output_error() {
        let hessian = random_hessian(10);
        let feedback = ColumnFeedback::new(&hessian, 4);
        assert_eq!(feedback.lanes.iter().map(Range::len).collect::<Vec<_>>().iter().sum::<usize>(), 10);
        let error: Vec<f32> = (0..10).map(|column| (column as f32 * 1.7).sin()).collect(); // in order
        let output = |damping: f32| -> f32 {
            let at = |a: usize, b: usize| hessian[[feedback.order[a], feedback.order[b]]];
            let pairs = (0..10).flat_map(|a| (0..10).map(move |b| (a, b)));
            pairs.map(|(a, b)| error[a] * error[b] * (at(a, b) + if a == b { damping } else { 0.0 })).sum()
        };
        let mean = (0..10).map(|column| hessian[[column, column]]).sum::<f32>() / 10.0;
        let moved: f32 = (0..10)
            .map(|column| {
                let shift: f32 = (0..column).map(|before| error[before] * feedback.moves[[before, column]]).sum();
                feedback.weights[column] * (error[column] + shift).powi(2)
            })
            .sum();
        // Weights are normed: compare two errors.
        let first: f32 = feedback.weights[0]
            + (1..10).map(|column| feedback.weights[column] * feedback.moves[[0, column]].powi(2)).sum::<f32>();
        let column = feedback.order[0];
        let expected = output(DAMPING as f32 * mean) / (hessian[[column, column]] + DAMPING as f32 * mean);
        assert!((moved / first / expected - 1.0).abs() < 1e-3, "{} and {expected}", moved / first);
    }

    #[test]
    fn columns_of_a_lane_follow_one_another_and_the_strongest_lane_comes_first() {
        let feedback = ColumnFeedback::new(&random_hessian(10), 4);
        assert_eq!(feedback.order[feedback.lanes[0].clone()], [1, 5, 9]);
        for range in &feedback.lanes {
            let columns = &feedback.order[range.clone()];
            assert!(columns.windows(2).all(|pair| pair[1] == pair[0] + 4), "{columns:?}");
        }
    }

    #[test]
    fn errors_in_scaled_steps_move_and_weigh_as_much() {
        let feedback = ColumnFeedback::new(&random_hessian(10), 4);
        let scales = feedback.column_scales(1.0);
        assert!(scales.iter().any(|&scale| scale != 0));
        let multipliers: Vec<f32> = scales.iter().map(|&scale| scale_multiplier(scale)).collect();
        let scaled = feedback.scaled(&multipliers);
        let of_place = |place: usize| multipliers[feedback.order[place]];
        // One scaled step of error in the first column moves the last by as many of its own steps.
        let moved = scaled.moves[[0, 9]] * of_place(9);
        assert!((moved - of_place(0) * feedback.moves[[0, 9]]).abs() < 1e-6);
        // All columns count nearly alike, as far as eighths of an octave go.
        assert!(scaled.weights.iter().all(|weight| (0.8..1.25).contains(weight)), "{:?}", scaled.weights);
        assert!(feedback.mean_weight(&multipliers) < 1.0, "the mean of logarithms is less than that of weights");
    }

    #[test]
    fn inputs_that_were_never_seen_have_feedback_all_the_same() {
        let feedback = ColumnFeedback::new(&Array2::zeros((6, 6)), 2);
        assert!(feedback.moves.iter().all(|&value| value == 0.0) && (feedback.left - 1.0).abs() < 1e-6);
        assert!(feedback.weights.iter().all(|&weight| (weight - 1.0).abs() < 1e-6));
    }
}
