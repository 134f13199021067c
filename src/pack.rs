//! The offline encoder: alignment, mode decision, quantization, entropy coding, rate control.

pub mod entropy_model;
pub mod encode {
    //! The encoding loop.
}
