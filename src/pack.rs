//! The offline encoder: alignment, mode decision, quantization, entropy coding, rate control.

pub mod entropy_model;
pub mod lossless;
pub mod mode_decision;
pub mod options;
pub mod part;
pub mod encode {
    //! The encoding loop.
}
