//! Rotary positions: pairs of a head's elements turned by angles that grow with the position.

use ndarray::{Array2, ArrayViewMut2};

/// Rotary positions of a head: its first `width` elements are rotated, each half with the other.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Rotary {
    pub width: usize,
    pub base: f64,
    pub scaling: RotaryScaling,
}

/// How angles are changed for longer contexts than a model was first trained on.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum RotaryScaling {
    /// Not at all.
    None,
    /// All divided by this.
    Linear(f64),
    /// Slow ones divided by `factor`, fast ones left, those between in between: by how often a pair turns around within
    /// `positions`, at most `slow` times or at least `fast` times.
    Llama3 { factor: f64, slow: f64, fast: f64, positions: f64 },
}

/// Which way to turn.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Turn {
    Forward,
    /// Undoes `Forward`: the transposed rotation, which is what gradients take.
    Back,
}

/// Sine and cosine of every position and pair, `[positions, width / 2]`.
pub(super) struct Angles(Array2<(f32, f32)>);

impl Rotary {
    /// Radians from one position to the next of a pair of elements.
    fn frequency(self, index: usize) -> f64 {
        let frequency = self.base.powf(-2.0 * index as f64 / self.width as f64);
        match self.scaling {
            RotaryScaling::None => frequency,
            RotaryScaling::Linear(factor) => frequency / factor,
            RotaryScaling::Llama3 { factor, slow, fast, positions } => {
                let turns = positions * frequency / (2.0 * std::f64::consts::PI);
                let kept = ((turns - slow) / (fast - slow)).clamp(0.0, 1.0);
                kept * frequency + (1.0 - kept) * frequency / factor
            }
        }
    }

    /// The angles of so many positions.
    pub(super) fn angles(self, positions: usize) -> Angles {
        let frequencies: Vec<f64> = (0..self.width / 2).map(|index| self.frequency(index)).collect();
        Angles(Array2::from_shape_fn((positions, frequencies.len()), |(position, index)| {
            let (sine, cosine) = (position as f64 * frequencies[index]).sin_cos();
            (sine as f32, cosine as f32)
        }))
    }
}

impl Angles {
    /// Rotates the rows of one head, row `t` being at position `t`.
    pub(super) fn rotate(&self, mut head: ArrayViewMut2<'_, f32>, turn: Turn) {
        let half = self.0.ncols();
        for (mut row, angles) in head.rows_mut().into_iter().zip(self.0.rows()) {
            for (index, &(sine, cosine)) in angles.iter().enumerate() {
                let sine = if turn == Turn::Back { -sine } else { sine };
                let (first, second) = (row[index], row[index + half]);
                row[index] = first * cosine - second * sine;
                row[index + half] = second * cosine + first * sine;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn turning_back_undoes_turning() {
        let angles = Rotary { width: 4, base: 10_000.0, scaling: RotaryScaling::None }.angles(9);
        let rows = Array2::from_shape_fn((9, 6), |(row, column)| (row * 6 + column) as f32);
        let mut turned = rows.clone();
        angles.rotate(turned.view_mut(), Turn::Forward);
        assert!((&turned - &rows).iter().any(|&difference| difference.abs() > 1.0));
        angles.rotate(turned.view_mut(), Turn::Back);
        assert!((&turned - &rows).iter().all(|&difference| difference.abs() < 1e-4));
    }

    #[test]
    fn scaling_slows_what_turns_slowly() {
        let plain = Rotary { width: 8, base: 10_000.0, scaling: RotaryScaling::None };
        let llama = RotaryScaling::Llama3 { factor: 8.0, slow: 1.0, fast: 4.0, positions: 64.0 };
        let scaled = Rotary { scaling: llama, ..plain };
        assert_eq!(scaled.frequency(0), plain.frequency(0), "10 turns in 64 positions");
        let between = scaled.frequency(1) / plain.frequency(1); // 1.02 turns
        assert!((between - (0.0062 * 0.875 + 0.125)).abs() < 1e-3, "{between}");
        assert_eq!(scaled.frequency(3), plain.frequency(3) / 8.0);
        let linear = Rotary { scaling: RotaryScaling::Linear(2.0), ..plain };
        assert_eq!(linear.frequency(2), plain.frequency(2) / 2.0);
    }
}
