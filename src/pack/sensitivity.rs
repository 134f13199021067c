//! How much the model's outputs mind an error in each tensor, so that bits go where the outputs need them (Eq. 25's one lambda,
//! over what a model says and not over its weights).
//!
//! Near the checkpoint the distance of the outputs is quadratic in an error E of a tensor: the divergence of logits is half the
//! Fisher information along E, the squared error of hidden states E's image squared. Both are the mean of <G, E>^2 over
//! gradients G of random combinations of the outputs, of which a few batches give enough. For an error without direction that
//! is its energy times the mean square of G; closed-loop quantization gives it one, and what is left by that is known from the
//! factors of the Hessian.

use std::collections::BTreeMap;

use ndarray::Array2;

use super::calibration::{Calibration, InputStatistics};
use super::symbols::RunLayout;
use super::train::batches::Batches;
use super::train::loss::Target;
use crate::codec::architecture::RecordPlan;
use crate::forward::ForwardError;
use crate::forward::recorded::Recorded;
use crate::tensor::TensorInfo;

/// Tokens of a batch, about.
const BATCH_TOKENS: usize = 1024;
/// Parameters times tokens that gradients are taken of: some ten seconds on one core.
const PARAMETER_TOKENS: f64 = 4e10;
/// Most batches: the mean square over a whole tensor is steady long before.
const MOST_BATCHES: usize = 16;
/// Share of the octaves that the quadratic asks for. It holds for small errors; at 2.9 bits all-MiniLM-L6-v2 is nearest to the
/// original with this (1 - cosine 0.0226), where all of it gives 0.0234 and none 0.0294.
const STRENGTH: f64 = 0.7;
/// A tensor's step is at most so many octaves off the mean.
const MOST_OCTAVES: f64 = 3.0;
/// Parts of an octave that steps are rounded to, so that what is left to the last bits of sums hardly ever shows.
const PARTS_OF_OCTAVE: f64 = 16.0;

/// One record's tensors, with the layout of runs of those that are quantized.
pub type RecordTensors<'a> = (&'a RecordPlan, Vec<(&'a TensorInfo, Option<RunLayout>)>);

/// By tensor, how many times finer than the mean it is quantized for the least distance of the outputs at a given rate: in
/// proportion to the square root of what a squared error in it counts. Tensors that the model does not use have none.
///
/// # Errors
/// When the model cannot be run.
pub fn finenesses(
    calibration: &Calibration<'_>,
    records: &[RecordTensors<'_>],
    seed: u64,
) -> Result<BTreeMap<String, f32>, ForwardError> {
    let tensors = || records.iter().flat_map(|(_, tensors)| tensors.iter().filter(|(_, layout)| layout.is_some()));
    let parameters: u64 = tensors().map(|(tensor, _)| tensor.elements()).sum();
    let names: BTreeMap<&str, u64> = tensors().map(|(tensor, _)| (tensor.name.as_str(), tensor.elements())).collect();
    let squares = gradient_squares(calibration, &names, parameters, seed)?;
    let mut octaves = BTreeMap::new();
    let mut statistics = calibration.statistics();
    for (record, tensors) in records {
        let left = left_by_feedback(&mut statistics, record, tensors)?;
        for ((tensor, _), left) in tensors.iter().zip(left) {
            let counts = squares.get(tensor.name.as_str()).map(|square| square * left);
            if let Some(counts) = counts.filter(|counts| counts.is_normal()) {
                octaves.insert(tensor.name.clone(), (STRENGTH * 0.5 * counts.log2(), tensor.elements() as f64));
            }
        }
    }
    let elements: f64 = octaves.values().map(|(_, elements)| elements).sum();
    let mean = octaves.values().map(|(octaves, elements)| octaves * elements).sum::<f64>() / elements;
    let fineness = |(name, (octaves, _)): (String, (f64, f64))| {
        let octaves = (octaves - mean).clamp(-MOST_OCTAVES, MOST_OCTAVES);
        log::debug!("{name}: {octaves:.2} octaves finer than the mean");
        (name, ((PARTS_OF_OCTAVE * octaves).round() / PARTS_OF_OCTAVE).exp2() as f32)
    };
    Ok(octaves.into_iter().map(fineness).collect())
}

/// The mean square of an element of G, by tensor.
fn gradient_squares<'n>(
    calibration: &Calibration<'_>,
    names: &BTreeMap<&'n str, u64>,
    parameters: u64,
    seed: u64,
) -> Result<BTreeMap<&'n str, f64>, ForwardError> {
    let (model, weights) = (calibration.model(), calibration.weights());
    let target = Target::of(model, weights);
    let mut batches = Batches::new(calibration.inputs(), model.is_causal(), BATCH_TOKENS, seed);
    let count = PARAMETER_TOKENS / (parameters.max(1) as f64 * BATCH_TOKENS as f64);
    let random = &mut fastrand::Rng::with_seed(seed);
    let mut squares = BTreeMap::new();
    for _ in 0..(count as usize).clamp(1, MOST_BATCHES) {
        let run = Recorded::run(model, weights, &batches.next_batch(), &|name| names.contains_key(name))?;
        let outputs = match target {
            Target::Logits => surprise(run.outputs(), random),
            Target::Hidden => run.outputs().map(|_| if random.bool() { 1.0 } else { -1.0 }),
        };
        let rows = outputs.nrows().max(1) as f64;
        let layers = run.layers().map(|layer| Array2::zeros(layer.raw_dim())).collect();
        for (name, gradient) in run.gradients(layers, outputs) {
            let Some((&name, &elements)) = names.get_key_value(name.as_str()) else { continue };
            let square: f64 = gradient.iter().map(|&value| f64::from(value).powi(2)).sum();
            *squares.entry(name).or_insert(0.0) += square / (rows * elements as f64);
        }
    }
    Ok(squares)
}

/// The gradient of the log-likelihood of labels drawn from what the model says: its second moments are the Fisher information.
fn surprise(logits: &Array2<f32>, random: &mut fastrand::Rng) -> Array2<f32> {
    let mut gradients = logits.clone();
    for mut row in gradients.rows_mut() {
        let most = row.fold(f32::NEG_INFINITY, |most, &value| most.max(value));
        row.mapv_inplace(|value| (value - most).exp());
        let sum = row.sum();
        row.mapv_inplace(|value| value / sum);
        let mut left = random.f32();
        let drawn = row.iter().position(|&probability| {
            left -= probability;
            left < 0.0
        });
        let last = row.len() - 1;
        row[drawn.unwrap_or(last)] -= 1.0;
    }
    gradients
}

/// The share of an error's weight that feedback leaves, by tensor; 1 where there is none.
fn left_by_feedback(
    statistics: &mut InputStatistics<'_>,
    record: &RecordPlan,
    tensors: &[(&TensorInfo, Option<RunLayout>)],
) -> Result<Vec<f64>, ForwardError> {
    let feedback = statistics.of_record(record, tensors)?;
    Ok(feedback.iter().map(|feedback| feedback.as_ref().map_or(1.0, |feedback| feedback.left)).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn surprises_have_the_second_moments_of_the_fisher_information() {
        let logits = Array2::from_shape_vec((1, 3), vec![0.3_f32, -0.7, 1.1]).expect("a row");
        let sum: f32 = logits.iter().map(|value| value.exp()).sum();
        let probabilities: Vec<f32> = logits.iter().map(|value| value.exp() / sum).collect();
        let random = &mut fastrand::Rng::with_seed(1);
        let mut moments = [[0.0_f32; 3]; 3];
        const DRAWS: usize = 40_000;
        for _ in 0..DRAWS {
            let gradient = surprise(&logits, random);
            for row in 0..3 {
                for column in 0..3 {
                    moments[row][column] += gradient[(0, row)] * gradient[(0, column)] / DRAWS as f32;
                }
            }
        }
        for row in 0..3 {
            for column in 0..3 {
                let own = if row == column { probabilities[row] } else { 0.0 };
                let expected = own - probabilities[row] * probabilities[column];
                assert!((moments[row][column] - expected).abs() < 0.01, "{moments:?}");
            }
        }
    }
}
