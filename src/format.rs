//! The `.mcwc` archive as bytes. `SPEC.md` beside this room is normative; every structure has `parse` and `write` under
//! one another in one file.
//!
//! Nothing is computed here: integers, lengths and checksums only. What the bytes mean as weights is `codec`; reading them
//! from a disk is `archive`.

pub mod bytes;
pub mod codebook;
pub mod difference;
pub mod error;
pub mod index;
pub mod limits;
pub mod network;
pub mod part;
pub mod preamble;
pub mod record;
pub mod streams;
pub mod strip;
pub mod table;
pub mod units;

pub use error::FormatError;
