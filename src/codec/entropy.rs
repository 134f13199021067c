//! Entropy coding of symbols in up to 32 interleaved lanes ("S32", SPEC.md section 6).
//!
//! Every lane is exactly a `constriction` asymmetric numeral system with 16-bit words, 32-bit state and 12-bit
//! frequencies. Fitting tables to data and choosing one per run is the encoder's business: see `pack::entropy_model`.

mod coding_table;
mod decoding_table;
mod lanes;

pub use coding_table::CodingTable;
pub use decoding_table::{DecodingTable, PADDED, SlotTable};
pub use lanes::{LaneError, LaneReader, STATE_LOW, decode_run, encode_lanes};
