//! Why packing failed.

use std::path::PathBuf;

use super::super::base::BaseError;
use super::super::calibration::CalibrationError;
use super::super::evaluation::EvaluationError;
use super::super::part::SelfCheckError;
use super::super::profile::ProfileError;
use super::super::source::SourceError;
use crate::archive::ArchiveError;
use crate::materialize::MaterializeError;

/// Why packing failed. Nothing that was on disk before has changed.
#[derive(Debug, thiserror::Error)]
pub enum PackError {
    /// The checkpoint cannot be read.
    #[error(transparent)]
    Source(#[from] SourceError),
    /// The base cannot be read.
    #[error(transparent)]
    Base(#[from] BaseError),
    /// An earlier variant cannot be read, or is none.
    #[error(transparent)]
    Profile(#[from] ProfileError),
    /// The output cannot be written.
    #[error("{path}: {source}")]
    Output {
        /// The archive or its directory.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// The output is there already.
    #[error("{0}: exists already, expected a new name; --force replaces it")]
    Exists(PathBuf),
    /// Somebody asked to stop.
    #[error("{0}: interrupted, nothing of it was kept")]
    Interrupted(PathBuf),
    /// The rate cannot be reached.
    #[error("--bpp {wanted}: {reason}")]
    Rate {
        /// Bits per parameter asked for.
        wanted: f64,
        /// What is in the way.
        reason: String,
    },
    /// The checkpoint was quantized before.
    #[error(
        "{tensor} is quantized already: expected --lossless; --force-requantize packs the other tensors with losses and this \
         one bit-exact"
    )]
    AlreadyQuantized {
        /// A tensor that shows it.
        tensor: String,
    },
    /// Residual vector quantization cannot do what is asked.
    #[error("--quantization residual-vector: {reason}")]
    Vectors {
        /// What is in the way.
        reason: String,
    },
    /// The error cannot be reached.
    #[error(
        "--max-rel-mse {wanted}: {found:.3e} after {encodings} encodings, nothing was written; try a lower one, or --lossless"
    )]
    Distortion {
        /// Relative squared error asked for.
        wanted: f64,
        /// What the last encoding had.
        found: f64,
        /// How many there were.
        encodings: usize,
    },
    /// The archive just written cannot be opened.
    #[error("the new archive does not open: {0}; please report this")]
    Reopen(#[from] ArchiveError),
    /// The archive just written does not decode.
    #[error("the new archive does not decode: {0}; please report this")]
    Redecode(#[from] MaterializeError),
    /// The model cannot be run on calibration inputs.
    #[error("calibration: {0}")]
    Calibration(#[from] CalibrationError),
    /// The model cannot be run on what it should be judged by.
    #[error("evaluation: {0}")]
    Evaluation(#[from] EvaluationError),
    /// An encoded part does not decode.
    #[error(transparent)]
    SelfCheck(#[from] SelfCheckError),
    /// A bit-exact tensor came back different.
    #[error("{file}: {tensor}: decoded bytes differ from the source's; please report this")]
    Mismatch {
        /// Safetensors file.
        file: String,
        /// Tensor.
        tensor: String,
    },
}
