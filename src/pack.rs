//! The offline encoder: alignment, mode decision, quantization, entropy coding, rate control.
pub mod align;
pub mod source;
pub mod encode {
    //! The encoding loop.
}
