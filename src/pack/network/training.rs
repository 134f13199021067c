//! Training of the predictor: least squares over units of all predicted parts, with AdamW (G.3).
//!
//! One thread and one order of sums: the same seed gives the same network on every run. Of the units every tenth is held
//! out, and the parameters that foretell those best are kept.

use ndarray::{Array1, Array2, ArrayView2, Axis, Zip, s};

use super::{Embeddings, NetworkShape, UNIT};

/// Units of one part.
#[derive(Clone, Debug)]
pub struct Samples {
    /// Kind of tensor.
    pub kind: usize,
    /// Layer.
    pub layer: Option<usize>,
    /// `[units, contexts * UNIT]`.
    pub inputs: Array2<f32>,
    /// `[units, UNIT]`.
    pub targets: Array2<f32>,
}

/// Units of a step.
const BATCH: usize = 192;
/// Steps between two tests on held-out units.
const TEST_EVERY: usize = 25;
/// Of so many units one is held out.
const HELD_OUT: usize = 10;
const LEARNING_RATE: f32 = 1e-3;
const WEIGHT_DECAY: f32 = 1e-2;
const SEED: u64 = 1;

/// A linear map and what is added to it.
#[derive(Clone, Debug)]
pub struct Map {
    /// `[rows, columns]`.
    pub weights: Array2<f32>,
    /// `[1, rows]`.
    pub biases: Array2<f32>,
}

impl Map {
    fn zero(rows: usize, columns: usize) -> Self {
        Self { weights: Array2::zeros((rows, columns)), biases: Array2::zeros((1, rows)) }
    }

    /// Weights that keep unit variance.
    fn random(rows: usize, columns: usize, chance: &mut fastrand::Rng) -> Self {
        let width = (3.0 / columns as f32).sqrt();
        let weights = Array2::from_shape_simple_fn((rows, columns), || width * (2.0 * chance.f32() - 1.0));
        Self { weights, ..Self::zero(rows, columns) }
    }

    /// `[units, columns]` to `[units, rows]`.
    pub fn apply(&self, inputs: &ArrayView2<'_, f32>) -> Array2<f32> {
        inputs.dot(&self.weights.t()) + &self.biases
    }

    /// The gradient of this map from that of what it gave, and the gradient of its inputs.
    fn back(&self, inputs: &ArrayView2<'_, f32>, gradient: &Array2<f32>) -> (Self, Array2<f32>) {
        let biases = gradient.sum_axis(Axis(0)).insert_axis(Axis(0));
        (Self { weights: gradient.t().dot(inputs), biases }, gradient.dot(&self.weights))
    }

    fn arrays(&mut self) -> [&mut Array2<f32>; 2] {
        [&mut self.weights, &mut self.biases]
    }
}

/// A network in binary32.
#[derive(Clone, Debug)]
pub struct Trained {
    /// Its shape.
    pub shape: NetworkShape,
    /// Input map of each kind.
    pub inputs: Vec<Map>,
    /// To the hidden layer and back, where there is one.
    pub hidden: Option<[Map; 2]>,
    /// Output map of each kind.
    pub outputs: Vec<Map>,
    /// Embeddings of layers, `[layers, width]`.
    pub layers: Array2<f32>,
}

/// What a forward pass leaves for the way back.
pub struct Passed {
    /// Latent elements, `[units, width]`.
    pub latent: Array2<f32>,
    /// Sums of the hidden layer, before the nonlinearity.
    pub sums: Option<Array2<f32>>,
    /// After it.
    pub activated: Option<Array2<f32>>,
    /// What the output map is applied to.
    pub features: Array2<f32>,
    /// The prediction, `[units, UNIT]`.
    pub outputs: Array2<f32>,
}

impl Trained {
    fn new(shape: NetworkShape, kinds: usize, layers: usize, chance: &mut fastrand::Rng) -> Self {
        let NetworkShape { width, has_hidden, embeddings, contexts } = shape;
        let layers = if embeddings == Embeddings::LayerAndKind { layers } else { 0 };
        Self {
            shape,
            inputs: (0..kinds).map(|_| Map::random(width, contexts * UNIT, chance)).collect(),
            hidden: has_hidden.then(|| [Map::random(4 * width, width, chance), Map::random(width, 4 * width, chance)]),
            outputs: (0..kinds).map(|_| Map::zero(UNIT, width)).collect(), // at first it predicts nothing
            layers: Array2::zeros((layers, width)),
        }
    }

    /// Predicts units of one part.
    pub fn forward(&self, kind: usize, layer: Option<usize>, inputs: &ArrayView2<'_, f32>) -> Passed {
        let mut latent = self.inputs[kind].apply(inputs);
        if let Some(layer) = layer.filter(|&layer| layer < self.layers.nrows()) {
            latent += &self.layers.row(layer);
        }
        let (sums, activated, features) = match &self.hidden {
            None => (None, None, latent.clone()),
            Some([up, down]) => {
                let sums = up.apply(&latent.view());
                let activated = sums.mapv(gelu);
                let features = &latent + &down.apply(&activated.view());
                (Some(sums), Some(activated), features)
            }
        };
        let outputs = self.outputs[kind].apply(&features.view());
        Passed { latent, sums, activated, features, outputs }
    }

    /// Mean squared error over units of one part, per element, and its gradient.
    fn gradient(
        &self,
        kind: usize,
        layer: Option<usize>,
        inputs: &ArrayView2<'_, f32>,
        targets: &ArrayView2<'_, f32>,
    ) -> Self {
        let passed = self.forward(kind, layer, inputs);
        let of_outputs = (&passed.outputs - targets) * (2.0 / targets.len() as f32);
        let mut gradient = self.zeros();
        let (of_output, of_features) = self.outputs[kind].back(&passed.features.view(), &of_outputs);
        gradient.outputs[kind] = of_output;
        let mut of_latent = of_features.clone();
        if let (Some([up, down]), Some(sums), Some(activated)) = (&self.hidden, &passed.sums, &passed.activated) {
            let (of_down, mut of_sums) = down.back(&activated.view(), &of_features);
            Zip::from(&mut of_sums).and(sums).for_each(|gradient, &sum| *gradient *= gelu_slope(sum));
            let (of_up, through) = up.back(&passed.latent.view(), &of_sums);
            of_latent += &through;
            gradient.hidden = Some([of_up, of_down]);
        }
        if let Some(layer) = layer.filter(|&layer| layer < self.layers.nrows()) {
            gradient.layers.row_mut(layer).assign(&of_latent.sum_axis(Axis(0)));
        }
        let (of_input, _) = self.inputs[kind].back(inputs, &of_latent);
        if self.shape.embeddings == Embeddings::None {
            gradient.inputs.iter_mut().for_each(|map| map.biases.assign(&of_input.biases)); // all share them
        }
        gradient.inputs[kind] = of_input;
        gradient
    }

    fn zeros(&self) -> Self {
        let mut zeros = self.clone();
        zeros.arrays().into_iter().for_each(|array| array.fill(0.0));
        zeros
    }

    /// Every parameter, in one order.
    fn arrays(&mut self) -> Vec<&mut Array2<f32>> {
        let hidden = self.hidden.iter_mut().flatten();
        let maps = self.inputs.iter_mut().chain(hidden).chain(&mut self.outputs);
        maps.flat_map(Map::arrays).chain([&mut self.layers]).collect()
    }
}

/// AdamW with a norm clipped at 1, a warm-up of a tenth and a cosine.
struct Optimizer {
    first: Trained,
    second: Trained,
    steps: usize,
}

impl Optimizer {
    fn step(&mut self, model: &mut Trained, mut gradient: Trained, step: usize) {
        let norm = gradient.arrays().iter().map(|array| array.iter().map(|g| g * g).sum::<f32>()).sum::<f32>().sqrt();
        let clip = if norm > 1.0 { 1.0 / norm } else { 1.0 };
        let warm_up = (self.steps / 10).max(1);
        let progress = step as f32 / self.steps as f32;
        let rate = LEARNING_RATE
            * (0.5 + 0.5 * (std::f32::consts::PI * progress).cos())
            * ((step + 1) as f32 / warm_up as f32).min(1.0);
        let (one, two) = (1.0 - 0.9_f32.powi(step as i32 + 1), 1.0 - 0.999_f32.powi(step as i32 + 1));
        let moments = self.first.arrays().into_iter().zip(self.second.arrays());
        for ((parameters, gradient), (first, second)) in model.arrays().into_iter().zip(gradient.arrays()).zip(moments)
        {
            Zip::from(parameters).and(&*gradient).and(first).and(second).for_each(
                |parameter, &gradient, first, second| {
                    let gradient = clip * gradient;
                    *first = 0.9 * *first + 0.1 * gradient;
                    *second = 0.999 * *second + 0.001 * gradient * gradient;
                    let direction = (*first / one) / ((*second / two).sqrt() + 1e-8);
                    *parameter -= rate * (direction + WEIGHT_DECAY * *parameter);
                },
            );
        }
    }
}

/// Trains a network; and how much of the variance of held-out units it explains.
pub fn train(shape: NetworkShape, samples: &[Samples], layers: usize, steps: usize) -> (Trained, f64) {
    let mut chance = fastrand::Rng::with_seed(SEED);
    let kinds = samples.iter().map(|samples| samples.kind + 1).max().unwrap_or(0);
    let mut model = Trained::new(shape, kinds, layers, &mut chance);
    let mut optimizer = Optimizer { first: model.zeros(), second: model.zeros(), steps };
    let mut best = (model.clone(), 0.0); // predicting nothing explains nothing
    for step in 0..if samples.is_empty() { 0 } else { steps } {
        let of_part = &samples[chance.usize(..samples.len())];
        let units = of_part.targets.nrows() - of_part.targets.nrows() / HELD_OUT;
        let start = chance.usize(..=units.saturating_sub(BATCH));
        let batch = s![start..units.min(start + BATCH), ..];
        let (inputs, targets) = (of_part.inputs.slice(batch), of_part.targets.slice(batch));
        let gradient = model.gradient(of_part.kind, of_part.layer, &inputs, &targets);
        optimizer.step(&mut model, gradient, step);
        if (step + 1) % TEST_EVERY == 0 {
            let explained = explained(&model, samples);
            if explained > best.1 {
                best = (model.clone(), explained);
            }
        }
    }
    best
}

/// How much of the variance of the held-out units, the last of each part, a network explains.
fn explained(model: &Trained, samples: &[Samples]) -> f64 {
    let (mut left, mut all) = (0.0_f64, 0.0_f64);
    for of_part in samples {
        let units = of_part.targets.nrows() - of_part.targets.nrows() / HELD_OUT;
        let held_out = s![units.., ..];
        let targets = of_part.targets.slice(held_out);
        let passed = model.forward(of_part.kind, of_part.layer, &of_part.inputs.slice(held_out));
        let sum = |values: Array1<f32>| values.iter().map(|&value| f64::from(value)).sum::<f64>();
        left += sum((&passed.outputs - &targets).mapv(|error| error * error).sum_axis(Axis(0)));
        all += sum(targets.mapv(|value| value * value).sum_axis(Axis(0)));
    }
    if all > 0.0 { 1.0 - left / all } else { 0.0 }
}

const GELU_SCALE: f32 = 0.797_884_6; // sqrt(2 / pi)
const GELU_CUBE: f32 = 0.044_715;

/// The Gaussian error linear unit, by its usual hyperbolic tangent.
pub fn gelu(x: f32) -> f32 {
    0.5 * x * (1.0 + (GELU_SCALE * (x + GELU_CUBE * x * x * x)).tanh())
}

fn gelu_slope(x: f32) -> f32 {
    let tanh = (GELU_SCALE * (x + GELU_CUBE * x * x * x)).tanh();
    0.5 * (1.0 + tanh) + 0.5 * x * (1.0 - tanh * tanh) * GELU_SCALE * (1.0 + 3.0 * GELU_CUBE * x * x)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shape(has_hidden: bool) -> NetworkShape {
        NetworkShape { width: 8, has_hidden, embeddings: Embeddings::LayerAndKind, contexts: 1 }
    }

    fn random(rows: usize, columns: usize, chance: &mut fastrand::Rng) -> Array2<f32> {
        Array2::from_shape_simple_fn((rows, columns), || 2.0 * chance.f32() - 1.0)
    }

    #[test]
    fn gradients_are_what_small_changes_do_to_the_error() {
        let mut chance = fastrand::Rng::with_seed(3);
        let mut model = Trained::new(shape(true), 2, 3, &mut chance);
        for array in model.arrays() {
            *array = 0.3 * random(array.nrows(), array.ncols(), &mut chance);
        }
        let (inputs, targets) = (random(5, UNIT, &mut chance), random(5, UNIT, &mut chance));
        let error = |model: &Trained| {
            let outputs = model.forward(1, Some(2), &inputs.view()).outputs;
            (&outputs - &targets).iter().map(|&error| f64::from(error).powi(2)).sum::<f64>() / targets.len() as f64
        };
        let mut gradient = model.gradient(1, Some(2), &inputs.view(), &targets.view());
        let analytic: Vec<Array2<f32>> = gradient.arrays().into_iter().map(|array| array.clone()).collect();
        for (number, analytic) in analytic.iter().enumerate() {
            for _ in 0..6.min(analytic.len()) {
                let place = (chance.usize(..analytic.nrows()), chance.usize(..analytic.ncols()));
                let moved = |by: f32| {
                    let mut model = model.clone();
                    model.arrays()[number][place] += by;
                    error(&model)
                };
                let numeric = (moved(1e-2) - moved(-1e-2)) / 2e-2;
                let expected = f64::from(analytic[place]);
                assert!((numeric - expected).abs() < 1e-3 + 0.05 * expected.abs(), "{number} {numeric} {expected}");
            }
        }
    }

    #[test]
    fn a_linear_relation_is_learned_and_noise_is_not() {
        let mut chance = fastrand::Rng::with_seed(4);
        let inputs = random(2000, UNIT, &mut chance);
        let mix = random(UNIT, 8, &mut chance).dot(&random(8, UNIT, &mut chance)) * 0.2;
        let part = |targets: Array2<f32>| Samples { kind: 0, layer: Some(0), inputs: inputs.clone(), targets };
        let (_, explained) = train(shape(false), &[part(inputs.dot(&mix))], 1, 600);
        assert!(explained > 0.5, "{explained}");
        let (_, explained) = train(shape(true), &[part(random(2000, UNIT, &mut chance))], 1, 100);
        assert!(explained < 0.02, "{explained}");
    }

    #[test]
    fn training_gives_the_same_network_again() {
        let mut chance = fastrand::Rng::with_seed(5);
        let samples = [Samples {
            kind: 0,
            layer: None,
            inputs: random(300, UNIT, &mut chance),
            targets: random(300, UNIT, &mut chance),
        }];
        let weights = || train(shape(true), &samples, 0, 30).0.inputs[0].weights.clone();
        assert_eq!(weights(), weights());
    }
}
