//! Linear maps, norms, activations and rotary positions on rows of hidden states.

use ndarray::linalg::general_mat_mul;
use ndarray::{Array1, Array2, ArrayRef2, ArrayViewMut2, Axis, Zip, s};
use rayon::prelude::*;

/// Rows multiplied at once: fixed, so that no sum depends on the number of threads.
const ROWS: usize = 256;

/// A linear map: weights `[outputs, inputs]` and a bias.
pub(super) struct Linear {
    pub weight: Array2<f32>,
    pub bias: Option<Array1<f32>>,
}

impl Linear {
    /// `inputs` times the transposed weights plus the bias: `[rows, inputs]` to `[rows, outputs]`.
    pub(super) fn apply(&self, inputs: &ArrayRef2<f32>) -> Array2<f32> {
        let mut outputs = Array2::zeros((inputs.nrows(), self.weight.nrows()));
        for_row_blocks(&mut outputs, |first, mut outputs| {
            let inputs = inputs.slice(s![first..first + outputs.nrows(), ..]);
            general_mat_mul(1.0, &inputs, &self.weight.t(), 0.0, &mut outputs);
            if let Some(bias) = &self.bias {
                outputs += bias;
            }
        });
        outputs
    }
}

/// Calls `work` with blocks of rows and the number of their first row, in parallel.
pub(super) fn for_row_blocks(rows: &mut Array2<f32>, work: impl Fn(usize, ArrayViewMut2<'_, f32>) + Sync) {
    let blocks: Vec<_> = rows.axis_chunks_iter_mut(Axis(0), ROWS).collect();
    blocks.into_par_iter().enumerate().for_each(|(block, rows)| work(block * ROWS, rows));
}

/// A norm over the last axis.
pub(super) struct Norm {
    pub weight: Array1<f32>,
    /// `None` for the root-mean-square norm.
    pub bias: Option<Array1<f32>>,
    pub epsilon: f32,
}

impl Norm {
    /// The normed rows.
    pub(super) fn apply(&self, inputs: &Array2<f32>) -> Array2<f32> {
        let mut outputs = inputs.clone();
        for_row_blocks(&mut outputs, |_, mut rows| {
            for mut row in rows.rows_mut() {
                let count = row.len() as f32;
                if self.bias.is_some() {
                    let mean = row.sum() / count;
                    row -= mean;
                }
                let mean_square = row.fold(0.0, |sum, value| sum + value * value) / count;
                let scale = 1.0 / (mean_square + self.epsilon).sqrt();
                Zip::from(&mut row).and(&self.weight).for_each(|value, weight| *value *= scale * weight);
                if let Some(bias) = &self.bias {
                    row += bias;
                }
            }
        });
        outputs
    }
}

/// An activation function.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Activation {
    Gelu,
    /// GELU by its approximation with a hyperbolic tangent.
    GeluTanh,
    Silu,
    Relu,
}

impl Activation {
    /// The function that `config.json` calls so.
    pub(super) fn from_name(name: &str) -> Option<Self> {
        match name {
            "gelu" => Some(Self::Gelu),
            "gelu_new" | "gelu_fast" | "gelu_pytorch_tanh" => Some(Self::GeluTanh),
            "silu" | "swish" => Some(Self::Silu),
            "relu" => Some(Self::Relu),
            _ => None,
        }
    }

    /// Applies it to every element.
    pub(super) fn apply(self, rows: &mut Array2<f32>) {
        let of = |x: f32| match self {
            Self::Gelu => 0.5 * x * (1.0 + libm::erff(x * std::f32::consts::FRAC_1_SQRT_2)),
            Self::GeluTanh => 0.5 * x * (1.0 + (0.797_884_6 * (x + 0.044_715 * x * x * x)).tanh()),
            Self::Silu => x / (1.0 + (-x).exp()),
            Self::Relu => x.max(0.0),
        };
        for_row_blocks(rows, |_, mut rows| rows.mapv_inplace(of));
    }
}

/// Rotary positions of a head: its first `width` elements are rotated, each half with the other.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Rotary {
    pub width: usize,
    pub base: f64,
}

impl Rotary {
    /// Rotates the rows of one head, row `t` being at position `t`.
    pub(super) fn rotate(self, mut head: ArrayViewMut2<'_, f32>) {
        let half = self.width / 2;
        for (position, mut row) in head.rows_mut().into_iter().enumerate() {
            for index in 0..half {
                let frequency = self.base.powf(-2.0 * index as f64 / self.width as f64);
                let (sine, cosine) = (position as f64 * frequency).sin_cos();
                let (sine, cosine) = (sine as f32, cosine as f32);
                let (first, second) = (row[index], row[index + half]);
                row[index] = first * cosine - second * sine;
                row[index + half] = second * cosine + first * sine;
            }
        }
    }
}
