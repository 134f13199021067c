//! What a model is run on.

use ndarray::Array4;

/// Sequences of token numbers, or images.
#[derive(Clone, Debug, PartialEq)]
pub enum Inputs {
    /// One list of token numbers per sequence.
    Tokens(Vec<Vec<u32>>),
    /// `[images, channels, height, width]`, normed as the model wants them.
    Images(Array4<f32>),
}

impl Inputs {
    /// Number of sequences or images.
    pub fn count(&self) -> usize {
        match self {
            Self::Tokens(sequences) => sequences.len(),
            Self::Images(images) => images.dim().0,
        }
    }
}
