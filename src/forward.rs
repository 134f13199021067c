//! Forward passes of the architecture families, in binary32 on the CPU: what calibration learns a model's inputs from, and
//! what training takes gradients through.
//!
//! One configurable transformer serves all families ([`model`]): separate, fused and per-head fused projections, rotary and
//! learned positions, grouped queries, norms before or after, parallel residuals, gated feed-forward networks, and images
//! cut into patches. A family is data; what its `config.json` says of a checkpoint is read beside it.
//!
//! A [`pass::Pass`] holds the hidden states of all [`inputs`] and one layer's weights, and goes up layer by layer. Whoever
//! wants to know what a linear map is multiplied with watches it. Whoever wants gradients has the pass [`recorded`]: its
//! operations are kept on a tape that goes back through them. Products are summed in blocks of a fixed size, so that nothing
//! depends on the number of threads.
//!
//! Nothing here is needed to decode, and no decoded byte depends on it.

mod attention;
mod families;
pub mod inputs;
pub mod model;
mod operations;
pub mod pass;
pub mod recorded;
mod rotary;
mod tape;

/// Weights of a model by name, asked for one layer at a time.
pub trait Weights: Sync {
    /// Shape of a tensor, if there is one of this name.
    fn shape(&self, name: &str) -> Option<Vec<usize>>;
    /// Its elements in row-major order, if it has a float type.
    fn values(&self, name: &str) -> Option<Vec<f32>>;
    /// Names of all tensors.
    fn names(&self) -> Vec<String>;
}

/// Why a model cannot be run.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum ForwardError {
    /// The description is missing something.
    #[error("config.json: {field}: {problem}")]
    Config {
        /// Field of the description.
        field: &'static str,
        /// What is wrong with it.
        problem: String,
    },
    /// No family runs this model.
    #[error("no forward pass for {what}, expected {expected}")]
    Unsupported {
        /// What is not supported.
        what: String,
        /// What is.
        expected: String,
    },
    /// A tensor that the family needs is not there or has another shape.
    #[error("{tensor}: {found}, expected {expected}")]
    Tensor {
        /// Name.
        tensor: String,
        /// What is there.
        found: String,
        /// What the family needs.
        expected: String,
    },
    /// Running the model gives no numbers.
    #[error("inputs of {tensor}: not finite: a weight, the calibration data or a field of config.json is not sound")]
    NotFinite {
        /// The tensor that they are multiplied with.
        tensor: String,
    },
    /// Inputs that the model does not take.
    #[error("inputs: {found}, expected {expected}")]
    Inputs {
        /// What they are.
        found: String,
        /// What the model takes.
        expected: String,
    },
}
