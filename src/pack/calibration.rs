//! What a model's weights are multiplied with, learned from a few inputs; and how an error in one weight is made up for by
//! the weights beside it.
//!
//! With inputs X of a linear map and an error E in a row of its weights, the error of the output is E H E^T, where H = X^T X is
//! the Hessian ([`mod@hessian`]). Factorised it is a sum over columns in which the errors of earlier columns move the targets of
//! later ones ([`mod@feedback`]), and the search of the trellis goes through them in that order: closed-loop quantization, as in
//! GPTQ and LDLQ.
//!
//! [`Calibration`] has the inputs ([`inputs`]) and runs the model ([`crate::forward`]); [`InputStatistics`] gives the feedback
//! of one tensor after another, with one layer's inputs in memory at a time.

pub mod cholesky;
pub mod feedback;
pub mod hessian;
pub mod inputs;
mod statistics;
mod weights;

use std::path::{Path, PathBuf};

use ndarray::Array2;

use self::inputs::InputData;
pub use self::statistics::InputStatistics;
pub(in crate::pack) use self::weights::CheckpointWeights;
use super::source::Checkpoint;
use crate::forward::inputs::Inputs;
use crate::forward::model::Transformer;
use crate::forward::pass::Pass;
use crate::forward::{ForwardError, Weights};

/// Where calibration inputs come from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum CalibrationSource {
    /// The text that comes with the program.
    BuiltIn,
    /// A file of text, token ids or pixels.
    File(PathBuf),
}

/// Why there is no calibration.
#[derive(Debug, thiserror::Error)]
pub enum CalibrationError {
    /// A file cannot be read.
    #[error("{path}: {source}")]
    Io {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// A file is not what it should be.
    #[error("{path}: {problem}")]
    Format {
        /// The file.
        path: PathBuf,
        /// What is wrong in it.
        problem: String,
    },
    /// The model cannot be run.
    #[error(transparent)]
    Forward(#[from] ForwardError),
    /// Two models in one checkpoint.
    #[error("{0}: several models, calibration expects one")]
    SeveralModels(PathBuf),
}

/// Tokens and patches that a model is calibrated on, together: enough for Hessians of a few thousand inputs.
const MOST_TOKENS: usize = 24_576;

/// A model and inputs to run it on.
pub struct Calibration<'a> {
    model: Transformer,
    weights: CheckpointWeights<'a>,
    data: InputData,
}

/// How the model of a checkpoint runs, its weights, and where its tokenizer would be.
///
/// # Errors
/// When there are several models, `config.json` beside the checkpoint cannot be read, or no family runs it.
pub(in crate::pack) fn open_model(
    checkpoint: &Checkpoint,
) -> Result<(Transformer, CheckpointWeights<'_>, PathBuf), CalibrationError> {
    if checkpoint.files.iter().any(|file| file.model != checkpoint.files[0].model) {
        return Err(CalibrationError::SeveralModels(checkpoint.path.clone()));
    }
    let directory = match checkpoint.path.is_dir() {
        true => checkpoint.path.as_path(),
        false => checkpoint.path.parent().unwrap_or(Path::new(".")),
    };
    let config = inputs::read_file(&directory.join("config.json"))?;
    let weights = CheckpointWeights::new(checkpoint);
    let model = Transformer::new(&config, &weights)?;
    Ok((model, weights, directory.join("tokenizer.json")))
}

impl<'a> Calibration<'a> {
    /// Reads the inputs and finds how the model runs.
    ///
    /// # Errors
    /// When the inputs or `config.json` and, for text, `tokenizer.json` beside the checkpoint cannot be read, or no family
    /// runs this model on such inputs.
    pub fn load(checkpoint: &'a Checkpoint, source: &CalibrationSource) -> Result<Self, CalibrationError> {
        let (model, weights, tokenizer) = open_model(checkpoint)?;
        let data = inputs::load(source, MOST_TOKENS, &model, &tokenizer)?;
        Ok(Self { model, weights, data })
    }

    /// What was used, for reports and the archive's provenance.
    pub fn data(&self) -> &InputData {
        &self.data
    }

    /// The model.
    pub(super) fn model(&self) -> &Transformer {
        &self.model
    }

    /// Whether the model takes images, tokens otherwise.
    pub fn takes_images(&self) -> bool {
        self.model.takes_images()
    }

    /// The checkpoint's weights.
    pub(super) fn weights(&self) -> &dyn Weights {
        &self.weights
    }

    /// What the model is run on.
    pub(super) fn inputs(&self) -> &Inputs {
        &self.data.inputs
    }

    /// What the model's linear maps are multiplied with, from the first layer on.
    pub fn statistics(&self) -> InputStatistics<'_> {
        InputStatistics::new(self)
    }

    /// What the model says to the inputs.
    ///
    /// # Errors
    /// When a tensor is missing or has a wrong shape.
    pub fn outputs(&self) -> Result<Array2<f32>, ForwardError> {
        let watch = &mut |_: &[String], _: &Array2<f32>| ();
        let mut pass = Pass::new(&self.model, &self.weights, &self.data.inputs, watch)?;
        while pass.next_layer() < self.model.layers {
            pass.layer(watch)?;
        }
        pass.finish(watch)
    }
}
