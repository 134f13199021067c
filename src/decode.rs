//! Engines: the decoding stages run on real hardware. Whatever the engine, an archive gives the same bytes; the
//! [`mod@reference`] decoder says which.
//!
//! A part is checked once, as a [`PreparedPart`]; after that an engine sees one strip at a time and whatever is wrong with
//! its bytes is a [`DecodeError`], never a panic.

pub mod cpu;
pub mod cuda;
pub mod prepared;
pub mod reference;
pub mod select;

#[cfg(test)]
mod random_parts;

pub use prepared::{Pools, PreparedPart};
pub use select::EngineChoice;

use crate::codec::blocks::BlocksError;
use crate::codec::entropy::LaneError;
use crate::codec::permutation::PermutationError;
use crate::format::FormatError;

/// Why a part does not decode.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DecodeError {
    /// The part's header contradicts the tensor, or itself.
    #[error("{field}: found {found}, expected {expected}")]
    Inconsistent {
        /// Name of the field in `SPEC.md`.
        field: &'static str,
        /// What it says.
        found: String,
        /// What would fit.
        expected: String,
    },
    /// An array of the side information does not decode.
    #[error("{field}: {error}")]
    SideInformation {
        /// Name of the field in `SPEC.md`.
        field: &'static str,
        /// What is wrong with it.
        error: FormatError,
    },
    /// The record's permutation does not decode.
    #[error(transparent)]
    Permutation(PermutationError),
    /// The record's blocks do not fill the tensor.
    #[error(transparent)]
    Placement(BlocksError),
    /// The bytes of a strip are not what was packed.
    #[error("strip {strip}: CRC-32C is {found:#010x}, expected {expected:#010x}: the archive is damaged")]
    StripChecksum {
        /// Strip of the part.
        strip: usize,
        /// Checksum of the bytes as read.
        found: u32,
        /// Checksum that the side information states.
        expected: u32,
    },
    /// The lanes of a strip do not decode to an end.
    #[error("strip {strip}: {error}")]
    Lanes {
        /// Strip of the part.
        strip: usize,
        /// What the lanes did.
        error: LaneError,
    },
    /// An exception lies outside its strip or out of order.
    #[error("strip {strip}: exception position {position} is not after the one before it and under {symbols}")]
    ExceptionPosition {
        /// Strip of the part.
        strip: usize,
        /// The position found.
        position: u16,
        /// Symbols of the strip.
        symbols: usize,
    },
}

/// One strip to decode: from its stored bytes into the tensor's bytes for the elements it holds.
#[derive(Debug)]
pub struct StripJob<'a> {
    /// Strip of the part.
    pub strip: usize,
    /// Starts with the bytes that [`PreparedPart::strip_range`] covers; what follows them means nothing. A vector engine
    /// copies less where at least [`cpu::WORDS_PADDING`] bytes follow.
    pub stored: &'a [u8],
    /// [`PreparedPart::strip_output_bytes`] long.
    pub out: &'a mut [u8],
}

impl<'a> StripJob<'a> {
    /// The strip's stored bytes and nothing else.
    pub fn stored_bytes(&self, part: &PreparedPart) -> &'a [u8] {
        let range = part.strip_range(self.strip);
        &self.stored[..(range.end - range.start) as usize]
    }
}

/// Decodes strips. One per process, shared by all threads.
pub trait Engine: Send + Sync + std::fmt::Debug {
    /// Name for logs and `--engine`.
    fn name(&self) -> &'static str;

    /// How many strips [`Self::decode_strips`] decodes best together.
    fn strips_at_once(&self) -> usize {
        1
    }

    /// Decodes strips of `part`, in any order, each from its stored bytes into the tensor's bytes for the elements it holds; the
    /// first error found ends it. May change the order of `jobs`.
    ///
    /// `reference` is the whole decoded reference tensor where the part is predicted, followed by that tensor's own reference
    /// where the predictor looks at two layers; where the part starts from a base, the
    /// reference bytes from the first of these strips on. Checksums are checked first. After an error the content of the
    /// outputs means nothing.
    fn decode_strips(
        &self,
        part: &PreparedPart,
        reference: Option<&[u8]>,
        jobs: &mut [StripJob<'_>],
    ) -> Result<(), DecodeError>;

    /// [`Self::decode_strips`] of one: `stored` is what [`PreparedPart::strip_range`] covers, and `out` is
    /// [`PreparedPart::strip_output_bytes`] long.
    fn decode_strip(
        &self,
        part: &PreparedPart,
        strip: usize,
        stored: &[u8],
        reference: Option<&[u8]>,
        out: &mut [u8],
    ) -> Result<(), DecodeError> {
        self.decode_strips(part, reference, &mut [StripJob { strip, stored, out }])
    }
}

/// The lowest of the strips' numbers.
fn first_strip(jobs: &[StripJob<'_>]) -> usize {
    jobs.iter().map(|job| job.strip).min().unwrap_or(0)
}
