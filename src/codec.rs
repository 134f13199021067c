//! The stages of the codec that encoder and decoder share, both directions side by side so that they cannot drift apart.
//!
//! The pipeline of the paper, in the order of decoding: entropy decoding ([`entropy`]), dequantization ([`quantizer`], [`trellis`]),
//! prediction ([`predictor`]) through motion ([`motion`], [`blocks`], [`permutation`]). [`lossless`] and [`units`] are the bit-exact
//! paths, [`difference`] and [`low_rank`] start from a base archive, [`integers`] codes side information. Choosing among them is
//! the encoder's business: `pack`. Nothing here reads or writes
//! files.

pub mod architecture;
pub mod blocks;
pub mod difference;
pub mod entropy;
pub mod integers;
pub mod lossless;
pub mod low_rank;
pub mod motion;
pub mod permutation;
pub mod predictor;
pub mod quantizer;
pub mod trellis;
pub mod units;
pub mod vector_quantizer;
