//! How far the student is from the teacher (Eq. 97): what the two say, softened, and a little of what their layers give.

use ndarray::{Array2, ArrayRef1, Axis};
use rayon::prelude::*;

use crate::forward::Weights;
use crate::forward::model::Transformer;
use crate::forward::recorded::Recorded;

/// Logits are divided by this before they become probabilities.
const TEMPERATURE: f32 = 2.0;
/// What the layers' outputs count.
const OF_LAYERS: f32 = 0.1;
/// Rows summed at once: fixed, so that no sum depends on the number of threads.
const ROWS: usize = 64;

/// What a model says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Target {
    /// Logits of tokens or classes. The cross-entropy with soft targets, which the paper has for vision, has the same gradient
    /// as the divergence.
    Logits,
    /// Hidden states.
    Hidden,
}

impl Target {
    /// Of a model with these weights.
    pub fn of(model: &Transformer, weights: &dyn Weights) -> Self {
        if model.head(weights).is_some() { Self::Logits } else { Self::Hidden }
    }
}

/// A loss and its gradients.
pub struct Loss {
    /// Mean over rows of what the model says, plus the layers'.
    pub value: f64,
    /// With respect to what each layer gave.
    pub of_layers: Vec<Array2<f32>>,
    /// With respect to what the model says.
    pub of_outputs: Array2<f32>,
}

/// The loss that is trained on: of logits the divergence at a temperature, times its square so that gradients do not depend on
/// it; of hidden states the squared error. Squared errors, those of layers too, are relative to the teacher's mean square:
/// models differ by orders of magnitude in what their layers give.
pub fn distillation(target: Target, teacher: &Recorded, student: &Recorded) -> Loss {
    let (mut value, of_outputs) = match target {
        Target::Logits => divergence(teacher.outputs(), student.outputs(), TEMPERATURE),
        Target::Hidden => squared_error(teacher.outputs(), student.outputs(), 1.0),
    };
    let share = OF_LAYERS / teacher.layers().len().max(1) as f32;
    let mut of_layers = Vec::with_capacity(teacher.layers().len());
    for (teacher, student) in teacher.layers().zip(student.layers()) {
        let (error, gradient) = squared_error(teacher, student, share);
        value += error;
        of_layers.push(gradient);
    }
    Loss { value, of_layers, of_outputs }
}

/// What an archive is judged by: the divergence in nats of a token or class, or the relative squared error of hidden states.
pub fn distance(target: Target, teacher: &Recorded, student: &Recorded) -> f64 {
    match target {
        Target::Logits => divergence(teacher.outputs(), student.outputs(), 1.0).0,
        Target::Hidden => squared_error(teacher.outputs(), student.outputs(), 1.0).0,
    }
}

/// The mean over rows of the divergence of softened probabilities, times the square of the temperature, and its gradient.
fn divergence(teacher: &Array2<f32>, student: &Array2<f32>, temperature: f32) -> (f64, Array2<f32>) {
    let scale = temperature / teacher.nrows().max(1) as f32;
    let mut gradient = Array2::zeros(student.raw_dim());
    let blocks: Vec<_> = gradient.axis_chunks_iter_mut(Axis(0), ROWS).collect();
    let sums: Vec<f64> = (blocks.into_par_iter().enumerate())
        .map(|(block, mut rows)| {
            let mut sum = 0.0;
            for (index, mut gradient) in rows.rows_mut().into_iter().enumerate() {
                let row = block * ROWS + index;
                let (of_teacher, of_student) = (
                    log_probabilities(&teacher.row(row), temperature),
                    log_probabilities(&student.row(row), temperature),
                );
                for ((gradient, of_teacher), of_student) in gradient.iter_mut().zip(of_teacher).zip(of_student) {
                    let (p, q) = (of_teacher.exp(), of_student.exp());
                    sum += f64::from(p * (of_teacher - of_student));
                    *gradient = scale * (q - p);
                }
            }
            sum
        })
        .collect();
    (sums.iter().sum::<f64>() * f64::from(temperature * scale), gradient)
}

fn log_probabilities(logits: &ArrayRef1<f32>, temperature: f32) -> Vec<f32> {
    let greatest = logits.iter().fold(f32::NEG_INFINITY, |greatest, &logit| greatest.max(logit));
    let softened: Vec<f32> = logits.iter().map(|logit| (logit - greatest) / temperature).collect();
    let sum: f32 = softened.iter().map(|value| value.exp()).sum();
    softened.into_iter().map(|value| value - sum.ln()).collect()
}

/// `share` of the squared error over the teacher's squares, and its gradient.
fn squared_error(teacher: &Array2<f32>, student: &Array2<f32>, share: f32) -> (f64, Array2<f32>) {
    let energy: f64 = teacher.iter().map(|&value| f64::from(value).powi(2)).sum();
    let scale = share / (energy as f32).max(f32::MIN_POSITIVE);
    let difference = student - teacher;
    let sum: f64 = difference.iter().map(|&value| f64::from(value).powi(2)).sum();
    (sum * f64::from(scale), difference * (2.0 * scale))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn random(seed: u64) -> Array2<f32> {
        let random = &mut fastrand::Rng::with_seed(seed);
        Array2::from_shape_fn((3, 5), |_| 4.0 * random.f32() - 2.0)
    }

    fn assert_gradient(loss: impl Fn(&Array2<f32>) -> (f64, Array2<f32>)) {
        let student = random(2);
        let (_, gradient) = loss(&student);
        const STEP: f32 = 1.0 / 64.0;
        for (place, &found) in gradient.indexed_iter() {
            let moved = |by: f32| {
                let mut student = student.clone();
                student[place] += by;
                loss(&student).0
            };
            let expected = (moved(STEP) - moved(-STEP)) / f64::from(2.0 * STEP);
            assert!((f64::from(found) - expected).abs() < 1e-4, "{found} and {expected}");
        }
    }

    #[test]
    fn gradients_are_differences_of_losses() {
        let teacher = random(1);
        for temperature in [1.0, 2.0] {
            assert_gradient(|student| divergence(&teacher, student, temperature));
        }
        assert_gradient(|student| squared_error(&teacher, student, 0.3));
    }

    #[test]
    fn the_teacher_is_nowhere_from_itself() {
        let teacher = random(1);
        let (divergence, gradient) = divergence(&teacher, &teacher, 2.0);
        assert!(divergence == 0.0 && gradient.iter().all(|&value| value == 0.0));
        assert_eq!(squared_error(&teacher, &teacher, 1.0).0, 0.0);
    }
}
