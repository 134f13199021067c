//! Linear maps, norms and activations on rows of hidden states; each with its gradients beside it, so that the two cannot
//! drift apart.

use ndarray::linalg::general_mat_mul;
use ndarray::{Array1, Array2, ArrayRef2, ArrayView2, ArrayViewMut2, Axis, Zip, s};
use rayon::prelude::*;

/// Rows multiplied at once: fixed, so that no sum depends on the number of threads.
const ROWS: usize = 256;

/// How the weights of a linear map lie.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum WeightLayout {
    /// `[outputs, inputs]`.
    OutputsFirst,
    /// `[inputs, outputs]`, as in GPT-2's `Conv1D`.
    InputsFirst,
}

impl WeightLayout {
    /// Shape of weights with so many outputs and inputs.
    pub(super) fn shape(self, outputs: usize, inputs: usize) -> [usize; 2] {
        match self {
            Self::OutputsFirst => [outputs, inputs],
            Self::InputsFirst => [inputs, outputs],
        }
    }

    /// The weights as `[outputs, inputs]`, or such as they lie: it is its own inverse.
    pub(super) fn turned(self, weight: &Array2<f32>) -> ArrayView2<'_, f32> {
        match self {
            Self::OutputsFirst => weight.view(),
            Self::InputsFirst => weight.t(),
        }
    }
}

/// `inputs` times the transposed weights, `[outputs, inputs]`, plus the bias: `[rows, inputs]` to `[rows, outputs]`.
pub(super) fn linear(inputs: &ArrayRef2<f32>, weight: &ArrayRef2<f32>, bias: Option<&Array1<f32>>) -> Array2<f32> {
    let mut outputs = product(inputs, &weight.t());
    if let Some(bias) = bias {
        for_row_blocks(&mut outputs, |_, mut rows| rows += bias);
    }
    outputs
}

/// The gradient of a linear map's inputs, `[rows, inputs]`: that of its outputs times the weights, `[outputs, inputs]`.
pub(super) fn linear_gradient_of_inputs(of_outputs: &Array2<f32>, weight: &ArrayRef2<f32>) -> Array2<f32> {
    product(of_outputs, weight)
}

/// The gradient of a linear map's weights, `[outputs, inputs]`: the transposed gradient of its outputs times its inputs.
pub(super) fn linear_gradient_of_weights(of_outputs: &Array2<f32>, inputs: &Array2<f32>) -> Array2<f32> {
    let mut of_weights = Array2::zeros((of_outputs.ncols(), inputs.ncols()));
    for_row_blocks(&mut of_weights, |first, mut rows| {
        let of_outputs = of_outputs.slice(s![.., first..first + rows.nrows()]);
        general_mat_mul(1.0, &of_outputs.t(), inputs, 0.0, &mut rows);
    });
    of_weights
}

/// A product of matrices in blocks of rows.
fn product(left: &ArrayRef2<f32>, right: &ArrayRef2<f32>) -> Array2<f32> {
    let mut outputs = Array2::zeros((left.nrows(), right.ncols()));
    for_row_blocks(&mut outputs, |first, mut rows| {
        general_mat_mul(1.0, &left.slice(s![first..first + rows.nrows(), ..]), right, 0.0, &mut rows);
    });
    outputs
}

/// Calls `work` with blocks of rows and the number of their first row, in parallel.
pub(super) fn for_row_blocks(rows: &mut Array2<f32>, work: impl Fn(usize, ArrayViewMut2<'_, f32>) + Sync) {
    let blocks: Vec<_> = rows.axis_chunks_iter_mut(Axis(0), ROWS).collect();
    blocks.into_par_iter().enumerate().for_each(|(block, rows)| work(block * ROWS, rows));
}

/// A norm over the last axis.
#[derive(Clone, Debug)]
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
                let scale = self.centre(row.view_mut());
                Zip::from(&mut row).and(&self.weight).for_each(|value, weight| *value *= scale * weight);
                if let Some(bias) = &self.bias {
                    row += bias;
                }
            }
        });
        outputs
    }

    /// Takes the mean away where this norm does, and returns what makes the root of the mean square 1.
    fn centre(&self, mut row: ndarray::ArrayViewMut1<'_, f32>) -> f32 {
        let count = row.len() as f32;
        if self.bias.is_some() {
            let mean = row.sum() / count;
            row -= mean;
        }
        let mean_square = row.fold(0.0, |sum, value| sum + value * value) / count;
        1.0 / (mean_square + self.epsilon).sqrt()
    }

    /// The gradient of the inputs. With x^ the normed row and g that of the outputs times the weights, it is
    /// `scale * (g - mean(g) - x^ mean(g x^))`; without the middle term for the root-mean-square norm.
    pub(super) fn gradient(&self, inputs: &Array2<f32>, of_outputs: &Array2<f32>) -> Array2<f32> {
        let mut gradient = inputs.clone();
        for_row_blocks(&mut gradient, |first, mut rows| {
            for (index, mut row) in rows.rows_mut().into_iter().enumerate() {
                let count = row.len() as f32;
                let scale = self.centre(row.view_mut());
                let weighted = &of_outputs.row(first + index) * &self.weight;
                let mean = if self.bias.is_some() { weighted.sum() / count } else { 0.0 };
                let along = scale * scale * (&weighted * &row).sum() / count;
                Zip::from(&mut row).and(&weighted).for_each(|value, of_normed| {
                    *value = scale * (of_normed - mean - *value * along);
                });
            }
        });
        gradient
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

/// Factors of the approximation, sqrt(2 / pi) outside and inside.
const TANH_FACTORS: [f32; 2] = [0.797_884_6, 0.044_715];

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
        let [outside, inside] = TANH_FACTORS;
        let of = |x: f32| match self {
            Self::Gelu => 0.5 * x * (1.0 + libm::erff(x * std::f32::consts::FRAC_1_SQRT_2)),
            Self::GeluTanh => 0.5 * x * (1.0 + (outside * (x + inside * x * x * x)).tanh()),
            Self::Silu => x / (1.0 + (-x).exp()),
            Self::Relu => x.max(0.0),
        };
        for_row_blocks(rows, |_, mut rows| rows.mapv_inplace(of));
    }

    /// Turns the gradient of the outputs into that of the inputs.
    pub(super) fn gradient(self, inputs: &Array2<f32>, gradient: &mut Array2<f32>) {
        let [outside, inside] = TANH_FACTORS;
        let slope = |x: f32| match self {
            Self::Gelu => {
                let density =
                    (-0.5 * x * x).exp() * (0.5 * std::f32::consts::FRAC_2_SQRT_PI * std::f32::consts::FRAC_1_SQRT_2);
                0.5 * (1.0 + libm::erff(x * std::f32::consts::FRAC_1_SQRT_2)) + x * density
            }
            Self::GeluTanh => {
                let tangent = (outside * (x + inside * x * x * x)).tanh();
                let of_inside = outside * (1.0 + 3.0 * inside * x * x);
                0.5 * (1.0 + tangent) + 0.5 * x * (1.0 - tangent * tangent) * of_inside
            }
            Self::Silu => {
                let logistic = 1.0 / (1.0 + (-x).exp());
                logistic * (1.0 + x * (1.0 - logistic))
            }
            Self::Relu => f32::from(u8::from(x > 0.0)),
        };
        for_row_blocks(gradient, |first, mut rows| {
            let inputs = inputs.slice(s![first..first + rows.nrows(), ..]);
            Zip::from(&mut rows).and(&inputs).for_each(|gradient, &x| *gradient *= slope(x));
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn random(rows: usize, columns: usize, seed: u64) -> Array2<f32> {
        let random = &mut fastrand::Rng::with_seed(seed);
        Array2::from_shape_fn((rows, columns), |_| 3.0 * random.f32() - 1.5)
    }

    /// Whether `gradient` is that of `outputs(inputs)`, weighed with `weights`, by differences in single elements.
    fn assert_gradient(
        inputs: &Array2<f32>,
        weights: &Array2<f32>,
        gradient: &Array2<f32>,
        outputs: impl Fn(&Array2<f32>) -> Array2<f32>,
    ) {
        let value = |inputs: &Array2<f32>| -> f64 {
            outputs(inputs).iter().zip(weights).map(|(&output, &weight)| f64::from(output) * f64::from(weight)).sum()
        };
        const STEP: f32 = 1.0 / 256.0;
        for ((row, column), &found) in gradient.indexed_iter() {
            let moved = |by: f32| {
                let mut inputs = inputs.clone();
                inputs[[row, column]] += by;
                value(&inputs)
            };
            let expected = (moved(STEP) - moved(-STEP)) / f64::from(2.0 * STEP);
            assert!((f64::from(found) - expected).abs() < 3e-3 * (1.0 + expected.abs()), "{found} and {expected}");
        }
    }

    #[test]
    fn gradients_of_a_linear_map_are_its_differences() {
        let (inputs, weight, of_outputs) = (random(5, 4, 1), random(3, 4, 2), random(5, 3, 3));
        let of_inputs = linear_gradient_of_inputs(&of_outputs, &weight);
        assert_gradient(&inputs, &of_outputs, &of_inputs, |inputs| linear(inputs, &weight, None));
        let of_weights = linear_gradient_of_weights(&of_outputs, &inputs);
        assert_gradient(&weight, &of_outputs, &of_weights, |weight| linear(&inputs, weight, None));
    }

    #[test]
    fn gradients_of_norms_are_their_differences() {
        let (inputs, of_outputs) = (random(3, 8, 4), random(3, 8, 5));
        for bias in [None, Some(Array1::from_elem(8, 0.3))] {
            let norm = Norm { weight: random(1, 8, 6).row(0).to_owned(), bias, epsilon: 1e-5 };
            let gradient = norm.gradient(&inputs, &of_outputs);
            assert_gradient(&inputs, &of_outputs, &gradient, |inputs| norm.apply(inputs));
        }
    }

    #[test]
    fn gradients_of_activations_are_their_differences() {
        let (inputs, of_outputs) = (random(4, 8, 7), random(4, 8, 8));
        for activation in [Activation::Gelu, Activation::GeluTanh, Activation::Silu, Activation::Relu] {
            let mut gradient = of_outputs.clone();
            activation.gradient(&inputs, &mut gradient);
            assert_gradient(&inputs, &of_outputs, &gradient, |inputs| {
                let mut outputs = inputs.clone();
                activation.apply(&mut outputs);
                outputs
            });
        }
    }
}
