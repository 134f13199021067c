//! What a decoded archive is worth: the model is run on data that nothing was tuned on, with the original's weights and with the
//! archive's as they decode, and what the two say is compared.
//!
//! Both go up layer by layer side by side, so that the error of hidden states is known after every layer (`weights` gives the
//! archive's). Where there are logits they are compared as distributions, elsewhere embeddings by their angle
//! (`outputs`). Sums are taken in the order of the rows, so nothing depends on the number of threads.

mod outputs;
mod weights;

use std::collections::HashSet;
use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use ndarray::{Array2, Axis};
use serde::Serialize;

use self::outputs::{ComparedLogits, compare_embeddings, compare_logits};
use self::weights::ArchiveWeights;
use super::calibration::inputs::{DataOrigin, IMAGE_TOKENS, InputData, load};
use super::calibration::{Calibration, CalibrationError, CalibrationSource, CheckpointWeights, open_model};
use super::counting::sum_of_squares;
use super::source::Checkpoint;
use crate::archive::Archive;
use crate::forward::inputs::Inputs;
use crate::forward::model::Transformer;
use crate::forward::pass::Pass;
use crate::forward::{ForwardError, Weights};
use crate::materialize::MaterializeError;

/// Tokens and patches that a model is judged by, together.
const MOST_TOKENS: usize = 65_536;
/// Tokens and patches that a model is run on at once: memory holds their hidden states and those of one layer's units.
const TOKENS_AT_ONCE: usize = 8_192;

/// Why nothing was evaluated.
#[derive(Debug, thiserror::Error)]
pub enum EvaluationError {
    /// The data cannot be read, or the model not be run on it.
    #[error(transparent)]
    Data(#[from] CalibrationError),
    /// The model cannot be run.
    #[error(transparent)]
    Forward(#[from] ForwardError),
    /// The archive does not decode.
    #[error(transparent)]
    Decode(#[from] MaterializeError),
    /// The model was calibrated on what it should be judged by.
    #[error("{0}: the model was calibrated on it, expected data that nothing was tuned on")]
    NotHeldOut(PathBuf),
    /// Outputs that are no numbers.
    #[error("outputs of the {0} model are not finite: a weight, the data or a field of config.json is not sound")]
    NotFinite(&'static str),
}

/// A checkpoint's model and data to judge it by.
pub struct Evaluation<'a> {
    model: Transformer,
    weights: CheckpointWeights<'a>,
    data: InputData,
    /// Inputs that the model was calibrated on, too.
    calibrated_on: usize,
}

/// What a model says before and after.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct BeforeAfter {
    /// With the original's weights.
    pub before: f64,
    /// With the decoded ones.
    pub after: f64,
}

/// Values over many places.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Distribution {
    /// Mean.
    pub mean: f64,
    /// The middle one.
    pub median: f64,
    /// What 99.9 % of them do not exceed.
    pub percentile_99_9: f64,
    /// Greatest.
    pub largest: f64,
}

impl Distribution {
    /// Of at least one value, by nearest rank.
    pub(super) fn of(mut values: Vec<f64>) -> Self {
        let mean = values.iter().sum::<f64>() / values.len() as f64;
        values.sort_by(f64::total_cmp);
        let rank = |share: f64| values[((share * values.len() as f64).ceil() as usize).clamp(1, values.len()) - 1];
        Self { mean, median: rank(0.5), percentile_99_9: rank(0.999), largest: rank(1.0) }
    }
}

/// The outcome of an evaluation.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct EvaluationReport {
    /// What the model was judged by.
    pub data: DataOrigin,
    /// How many of these inputs it was calibrated on, too.
    pub inputs_calibrated_on: usize,
    /// Outputs compared: one per token, image or embedded sequence.
    pub outputs: usize,
    /// Kullback-Leibler divergence of the decoded model's distribution from the original's, nats per output; absent where
    /// the model has no head.
    pub divergence: Option<Distribution>,
    /// Share of outputs whose likeliest token or class is the original's.
    pub top1_agreement: Option<f64>,
    /// Of the next token, where the model foretells it.
    pub perplexity: Option<BeforeAfter>,
    /// Share of images put into their class, where the data says which it is.
    pub accuracy: Option<BeforeAfter>,
    /// 1 - cosine of embeddings, where the model has no head: hidden states, averaged over each sequence, or the class
    /// token's of images.
    pub embedding_distance: Option<Distribution>,
    /// Squared error over squares of the hidden states: of the embedding, then after each layer.
    pub layers: Vec<f64>,
}

impl fmt::Display for EvaluationReport {
    /// One line: what provenance keeps.
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(out, "{}:", self.data)?;
        let mut separator = " ";
        let mut fact = |out: &mut fmt::Formatter<'_>, text: String| {
            let written = write!(out, "{separator}{text}");
            separator = ", ";
            written
        };
        if let Some(BeforeAfter { before, after }) = self.perplexity {
            fact(out, format!("perplexity {before:.4} to {after:.4}"))?;
        }
        if let Some(BeforeAfter { before, after }) = self.accuracy {
            fact(out, format!("accuracy {before:.4} to {after:.4}"))?;
        }
        if let Some(Distribution { mean, median, percentile_99_9, .. }) = self.divergence {
            fact(
                out,
                format!("KL divergence mean {mean:.3e}, median {median:.3e}, 99.9 % {percentile_99_9:.3e} nats"),
            )?;
        }
        if let Some(agreement) = self.top1_agreement {
            fact(out, format!("top-1 agreement {agreement:.4}"))?;
        }
        if let Some(Distribution { mean, median, largest, .. }) = self.embedding_distance {
            fact(
                out,
                format!("1 - cosine of embeddings mean {mean:.3e}, median {median:.3e}, greatest {largest:.3e}"),
            )?;
        }
        if self.inputs_calibrated_on > 0 {
            fact(out, format!("{} inputs calibrated on, too", self.inputs_calibrated_on))?;
        }
        Ok(())
    }
}

impl<'a> Evaluation<'a> {
    /// Reads the data, which must not be what the model is calibrated on, and finds how the model runs.
    ///
    /// # Errors
    /// When the data or `config.json` and, for text, `tokenizer.json` beside the checkpoint cannot be read, no family runs
    /// this model on such data, or calibration has all of it.
    pub fn load(
        checkpoint: &'a Checkpoint,
        path: &Path,
        calibration: Option<&Calibration<'_>>,
    ) -> Result<Self, EvaluationError> {
        let (model, weights, tokenizer) = open_model(checkpoint)?;
        let data = load(&CalibrationSource::File(path.to_owned()), MOST_TOKENS, &model, &tokenizer)?;
        let calibrated_on = match calibration.map(Calibration::data) {
            Some(calibrated) if calibrated.origin.sha256 == data.origin.sha256 => data.inputs.count(),
            Some(calibrated) => shared(&data.inputs, &calibrated.inputs),
            None => 0,
        };
        if calibrated_on == data.inputs.count() {
            return Err(EvaluationError::NotHeldOut(path.to_owned()));
        }
        Ok(Self { model, weights, data, calibrated_on })
    }

    /// Compares what an archive of the checkpoint decodes to with the checkpoint.
    ///
    /// # Errors
    /// When the model cannot be run, the archive does not decode, or either gives no numbers.
    pub fn of_archive(&self, archive: &Arc<Archive>) -> Result<EvaluationReport, EvaluationError> {
        let decoded = ArchiveWeights::new(archive);
        let report = self.compare(&decoded);
        match decoded.into_error() {
            Some(error) => Err(error.into()),
            None => report,
        }
    }

    /// A report as long as the real one will be, for whoever must know how much room that takes.
    pub(super) fn stand_in(&self) -> EvaluationReport {
        let value = 1.2345e-3;
        let spread = Distribution { mean: value, median: value, percentile_99_9: value, largest: value };
        let both = BeforeAfter { before: 12.3456, after: 12.3457 };
        let has_head = self.model.is_causal() || self.model.takes_images();
        EvaluationReport {
            data: self.data.origin.clone(),
            inputs_calibrated_on: self.calibrated_on,
            outputs: 0,
            divergence: has_head.then_some(spread),
            top1_agreement: has_head.then_some(0.9876),
            perplexity: self.model.is_causal().then_some(both),
            accuracy: self.data.labels.as_ref().map(|_| both),
            embedding_distance: (!has_head).then_some(spread),
            layers: Vec::new(),
        }
    }

    fn compare(&self, decoded: &dyn Weights) -> Result<EvaluationReport, EvaluationError> {
        let mut sums = Sums::default();
        for (inputs, labels) in chunks(&self.data) {
            self.add(decoded, &inputs, labels, &mut sums)?;
        }
        let Sums { logits, embedding_distances, hidden_errors } = sums;
        let outputs = logits.divergences.len() + embedding_distances.len();
        let has_head = !logits.divergences.is_empty();
        let loss = logits.mean_loss();
        Ok(EvaluationReport {
            data: self.data.origin.clone(),
            inputs_calibrated_on: self.calibrated_on,
            outputs,
            top1_agreement: has_head.then(|| logits.agreement()),
            perplexity: loss
                .filter(|_| self.model.is_causal())
                .map(|BeforeAfter { before, after }| BeforeAfter { before: before.exp(), after: after.exp() }),
            accuracy: logits.accuracy().filter(|_| self.model.takes_images()),
            divergence: has_head.then(|| Distribution::of(logits.divergences)),
            embedding_distance: (!embedding_distances.is_empty()).then(|| Distribution::of(embedding_distances)),
            layers: hidden_errors
                .into_iter()
                .map(|(error, energy)| if energy > 0.0 { error / energy } else { 0.0 })
                .collect(),
        })
    }

    /// Runs both models on some of the inputs, side by side.
    fn add(
        &self,
        decoded: &dyn Weights,
        inputs: &Inputs,
        labels: Option<&[u32]>,
        sums: &mut Sums,
    ) -> Result<(), EvaluationError> {
        let ignore = &mut |_: &[String], _: &Array2<f32>| ();
        let mut before = Pass::new(&self.model, &self.weights, inputs, ignore)?;
        let mut after = Pass::new(&self.model, decoded, inputs, ignore)?;
        sums.hidden_errors.resize(self.model.layers + 1, (0.0, 0.0));
        for stage in 0..=self.model.layers {
            if stage > 0 {
                before.layer(ignore)?;
                after.layer(ignore)?;
            }
            let (error, energy) = error_and_energy(&before, &after);
            sums.hidden_errors[stage].0 += error;
            sums.hidden_errors[stage].1 += energy;
        }
        for (pass, which) in [(&before, "original"), (&after, "decoded")] {
            if !pass.hidden().iter().all(|value| value.is_finite()) {
                return Err(EvaluationError::NotFinite(which));
            }
        }
        let sequences = before.sequences().to_vec();
        let (before, after) = (before.outputs(ignore)?, after.outputs(ignore)?);
        if before.are_logits() {
            let targets = self.targets(inputs, labels, before.width());
            compare_logits(&before, &after, &targets, &mut sums.logits);
        } else {
            let rows_are_images = self.model.takes_images();
            sums.embedding_distances.extend(compare_embeddings(&before, &after, &sequences, rows_are_images));
        }
        Ok(())
    }

    /// What each output should have been: the token that follows, or the image's class; `None` where nobody knows.
    fn targets(&self, inputs: &Inputs, labels: Option<&[u32]>, classes: usize) -> Vec<Option<usize>> {
        let class = |&number: &u32| Some(number as usize).filter(|&number| number < classes);
        match (inputs, labels) {
            (Inputs::Tokens(sequences), _) if self.model.is_causal() => {
                let following = sequences.iter().flat_map(|sequence| sequence[1..].iter().map(class).chain([None]));
                following.collect()
            }
            (Inputs::Tokens(sequences), _) => vec![None; sequences.iter().map(Vec::len).sum()],
            (Inputs::Images(_), Some(labels)) => labels.iter().map(class).collect(),
            (Inputs::Images(images), None) => vec![None; images.dim().0],
        }
    }
}

/// What was found so far.
#[derive(Default)]
struct Sums {
    logits: ComparedLogits,
    embedding_distances: Vec<f64>,
    /// Squared error and squares of the hidden states, after the embedding and after each layer.
    hidden_errors: Vec<(f64, f64)>,
}

/// The inputs, as many at a time as memory should hold the hidden states of.
fn chunks(data: &InputData) -> Vec<(Inputs, Option<&[u32]>)> {
    match &data.inputs {
        Inputs::Tokens(sequences) => {
            let mut chunks: Vec<Vec<Vec<u32>>> = Vec::new();
            let mut tokens = TOKENS_AT_ONCE;
            for sequence in sequences {
                if tokens + sequence.len() > TOKENS_AT_ONCE {
                    chunks.push(Vec::new());
                    tokens = 0;
                }
                tokens += sequence.len();
                chunks.last_mut().expect("one was begun").push(sequence.clone());
            }
            chunks.into_iter().map(|chunk| (Inputs::Tokens(chunk), None)).collect()
        }
        Inputs::Images(images) => {
            let at_once = TOKENS_AT_ONCE / IMAGE_TOKENS;
            let labels = data.labels.as_deref();
            let chunk = |(number, chunk): (usize, ndarray::ArrayView4<'_, f32>)| {
                let first = number * at_once;
                (Inputs::Images(chunk.to_owned()), labels.map(|labels| &labels[first..first + chunk.dim().0]))
            };
            images.axis_chunks_iter(Axis(0), at_once).enumerate().map(chunk).collect()
        }
    }
}

/// How many of the inputs are also among `others`.
fn shared(inputs: &Inputs, others: &Inputs) -> usize {
    let bits = |images: &ndarray::Array4<f32>| -> Vec<Vec<u32>> {
        images.outer_iter().map(|image| image.iter().map(|value| value.to_bits()).collect()).collect()
    };
    let count = |ours: &[Vec<u32>], theirs: &[Vec<u32>]| {
        let theirs: HashSet<&Vec<u32>> = theirs.iter().collect();
        ours.iter().filter(|input| theirs.contains(input)).count()
    };
    match (inputs, others) {
        (Inputs::Tokens(ours), Inputs::Tokens(theirs)) => count(ours, theirs),
        (Inputs::Images(ours), Inputs::Images(theirs)) => count(&bits(ours), &bits(theirs)),
        _ => 0,
    }
}

/// Squared error and squares of the hidden states.
fn error_and_energy(before: &Pass<'_>, after: &Pass<'_>) -> (f64, f64) {
    let (before, after) = (before.hidden(), after.hidden());
    let error: Vec<f32> = before.iter().zip(after).map(|(before, after)| after - before).collect();
    (sum_of_squares(&error), sum_of_squares(before.as_slice().expect("rows one after another")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranks_of_a_distribution_are_those_of_its_values() {
        let thousand = Distribution::of((1..=1000).rev().map(f64::from).collect());
        let expected = Distribution { mean: 500.5, median: 500.0, percentile_99_9: 999.0, largest: 1000.0 };
        assert_eq!(thousand, expected);
        let one = Distribution { mean: 3.0, median: 3.0, percentile_99_9: 3.0, largest: 3.0 };
        assert_eq!(Distribution::of(vec![3.0]), one);
    }

    #[test]
    fn chunks_hold_all_inputs_in_order_and_few_tokens_each() {
        let sequences: Vec<Vec<u32>> = (0..40).map(|number| vec![number; 500]).collect();
        let origin = DataOrigin { built_in: false, sha256: String::new(), inputs: 40, tokens: Some(20_000) };
        let data = InputData { inputs: Inputs::Tokens(sequences.clone()), labels: None, origin };
        let chunks = chunks(&data);
        let of = |inputs: &Inputs| match inputs {
            Inputs::Tokens(sequences) => sequences.clone(),
            Inputs::Images(_) => unreachable!("these are tokens"),
        };
        assert_eq!(chunks.iter().map(|(inputs, _)| inputs.count()).collect::<Vec<_>>(), [16, 16, 8]);
        assert_eq!(chunks.iter().flat_map(|(inputs, _)| of(inputs)).collect::<Vec<_>>(), sequences);
        let images = ndarray::Array4::from_shape_fn((70, 1, 1, 1), |(image, ..)| image as f32);
        let labels = Some((0..70).collect());
        let data = InputData { inputs: Inputs::Images(images), labels, ..data };
        for (inputs, labels) in super::chunks(&data) {
            let Inputs::Images(images) = inputs else { unreachable!("these are images") };
            assert_eq!(labels.map(|labels| labels[0] as f32), Some(images[[0, 0, 0, 0]]));
            assert_eq!(labels.map(<[u32]>::len), Some(images.dim().0));
        }
    }

    #[test]
    fn inputs_that_two_sets_share_are_counted_whatever_their_order() {
        let tokens = |sequences: &[&[u32]]| Inputs::Tokens(sequences.iter().map(|tokens| tokens.to_vec()).collect());
        assert_eq!(shared(&tokens(&[&[1, 2], &[3], &[4]]), &tokens(&[&[4], &[2, 1], &[1, 2]])), 2);
        let image = |value: f32| ndarray::Array4::from_elem((1, 1, 1, 2), value);
        assert_eq!(shared(&Inputs::Images(image(1.0)), &Inputs::Images(image(1.0))), 1);
        assert_eq!(shared(&Inputs::Images(image(1.0)), &Inputs::Images(image(2.0))), 0);
        assert_eq!(shared(&Inputs::Images(image(1.0)), &tokens(&[&[1]])), 0);
    }
}
