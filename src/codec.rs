//! The stages of the codec that encoder and decoder share, both directions side by side. No I/O.

pub mod architecture;
pub mod blocks;
pub mod permutation;
