//! The offline encoder: alignment, mode decision, quantization, entropy coding, rate control.
//!
//! [`encode`] is Algorithm 1's upper half over a whole checkpoint. It uses the decoder's own engine for its local decode loop
//! and never repeats it.

pub mod align;
pub mod encode;
pub mod entropy_model;
pub mod lossless;
pub mod mode_decision;
pub mod options;
pub mod part;
pub mod quantize;
pub mod quantized_symbols;
pub mod rate;
pub mod record;
pub mod report;
pub mod source;
pub mod trellis_search;
