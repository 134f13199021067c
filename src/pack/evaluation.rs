//! What a decoded archive is worth: the model is run on data that nothing was tuned on, with the original's weights and with the
//! archive's as they decode, and what the two say is compared.
//!
//! Both go up layer by layer side by side, so that the error of hidden states is known after every layer ([`mod@weights`] gives
//! the archive's). Where there are logits they are compared as distributions, elsewhere embeddings by their angle
//! ([`mod@outputs`]). Sums are taken in the order of the rows, so nothing depends on the number of threads.

mod outputs;
mod weights;

use std::collections::HashSet;
use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use ndarray::Array2;
use serde::Serialize;

use self::outputs::{compare_embeddings, compare_logits};
use self::weights::ArchiveWeights;
use super::calibration::inputs::{DataOrigin, InputData, load};
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
    path: PathBuf,
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
        Ok(Self { model, weights, data, path: path.to_owned(), calibrated_on })
    }

    /// Where the data was read from.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Where the data is from.
    pub fn origin(&self) -> &DataOrigin {
        &self.data.origin
    }

    /// Whether the model foretells tokens.
    pub fn has_targets(&self) -> bool {
        self.model.is_causal()
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

    fn compare(&self, decoded: &dyn Weights) -> Result<EvaluationReport, EvaluationError> {
        let ignore = &mut |_: &[String], _: &Array2<f32>| ();
        let inputs = &self.data.inputs;
        let mut before = Pass::new(&self.model, &self.weights, inputs, ignore)?;
        let mut after = Pass::new(&self.model, decoded, inputs, ignore)?;
        let mut layers = vec![relative_squared_error(&before, &after)];
        while before.next_layer() < self.model.layers {
            before.layer(ignore)?;
            after.layer(ignore)?;
            layers.push(relative_squared_error(&before, &after));
        }
        for (pass, which) in [(&before, "original"), (&after, "decoded")] {
            if !pass.hidden().iter().all(|value| value.is_finite()) {
                return Err(EvaluationError::NotFinite(which));
            }
        }
        let sequences = before.sequences().to_vec();
        let (before, after) = (before.outputs(ignore)?, after.outputs(ignore)?);
        let mut report = EvaluationReport {
            data: self.data.origin.clone(),
            inputs_calibrated_on: self.calibrated_on,
            outputs: before.count(),
            divergence: None,
            top1_agreement: None,
            perplexity: None,
            accuracy: None,
            embedding_distance: None,
            layers,
        };
        if before.are_logits() {
            let compared = compare_logits(&before, &after, &self.targets(before.width()));
            report.divergence = Some(Distribution::of(compared.divergences));
            report.top1_agreement = Some(compared.agreement);
            report.perplexity = compared
                .loss
                .filter(|_| self.model.is_causal())
                .map(|loss| BeforeAfter { before: loss.before.exp(), after: loss.after.exp() });
            report.accuracy = compared.accuracy.filter(|_| self.model.takes_images());
        } else {
            let distances = compare_embeddings(&before, &after, &sequences, self.model.takes_images());
            report.outputs = distances.len();
            report.embedding_distance = Some(Distribution::of(distances));
        }
        Ok(report)
    }

    /// What each output should have been: the token that follows, or the image's class; `None` where nobody knows.
    fn targets(&self, classes: usize) -> Vec<Option<usize>> {
        match (&self.data.inputs, &self.data.labels) {
            (Inputs::Tokens(sequences), _) if self.model.is_causal() => {
                let following = sequences.iter().flat_map(|sequence| {
                    let next =
                        sequence.iter().skip(1).map(|&token| Some(token as usize).filter(|&token| token < classes));
                    next.chain((!sequence.is_empty()).then_some(None))
                });
                following.collect()
            }
            (Inputs::Tokens(sequences), _) => vec![None; sequences.iter().map(Vec::len).sum()],
            (Inputs::Images(_), Some(labels)) => {
                labels.iter().map(|&label| Some(label as usize).filter(|&label| label < classes)).collect()
            }
            (Inputs::Images(images), None) => vec![None; images.dim().0],
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

/// Squared error over squares of the hidden states.
fn relative_squared_error(before: &Pass<'_>, after: &Pass<'_>) -> f64 {
    let (before, after) = (before.hidden(), after.hidden());
    let error: Vec<f32> = before.iter().zip(after).map(|(before, after)| after - before).collect();
    let energy = sum_of_squares(before.as_slice().expect("rows one after another"));
    if energy > 0.0 { sum_of_squares(&error) / energy } else { 0.0 }
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
    fn inputs_that_two_sets_share_are_counted_whatever_their_order() {
        let tokens = |sequences: &[&[u32]]| Inputs::Tokens(sequences.iter().map(|tokens| tokens.to_vec()).collect());
        assert_eq!(shared(&tokens(&[&[1, 2], &[3], &[4]]), &tokens(&[&[4], &[2, 1], &[1, 2]])), 2);
        let image = |value: f32| ndarray::Array4::from_elem((1, 1, 1, 2), value);
        assert_eq!(shared(&Inputs::Images(image(1.0)), &Inputs::Images(image(1.0))), 1);
        assert_eq!(shared(&Inputs::Images(image(1.0)), &Inputs::Images(image(2.0))), 0);
        assert_eq!(shared(&Inputs::Images(image(1.0)), &tokens(&[&[1]])), 0);
    }
}
