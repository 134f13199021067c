//! A part checked and ready for any engine: everything its header says, against the tensor it must fill.

mod based;
mod prediction;
mod quantized;
mod strips;
mod symbols;
#[cfg(test)]
mod tests;

use std::sync::Arc;

use self::based::prepare_based;
use self::quantized::prepare_quantized;
use self::strips::PreparedStrip;
use self::symbols::prepare_symbols;
use super::DecodeError;
use crate::codec::entropy::CodingTable;
use crate::codec::integers::{self, Integers};
use crate::codec::lossless::carrier_bits;
use crate::codec::predictor::network::Network;
use crate::codec::units::UnitCoding;
use crate::codec::vector_quantizer::Codebook;
use crate::format::difference::BaseTensor;
use crate::format::part::{Carrier, Coding, PartHeader, StoredIntegers, TrellisTables};
use crate::tensor::{Dtype, TensorInfo};

pub use self::based::{Based, Difference};
pub use self::prediction::{Motions, Prediction};
pub use self::quantized::Quantizer;
pub use self::symbols::Symbols;

/// What parts of an archive refer to by number.
#[derive(Clone, Copy, Debug, Default)]
pub struct Pools<'a> {
    /// Entropy tables.
    pub tables: &'a [Arc<CodingTable>],
    /// Codebooks of vectors.
    pub codebooks: &'a [Arc<Codebook>],
    /// Networks of learned predictors.
    pub networks: &'a [Arc<Network>],
}

/// A part ready for decoding.
#[derive(Debug)]
pub struct PreparedPart {
    dtype: Dtype,
    /// Bits of the tensor that a symbol stands for.
    symbol_bits: usize,
    length_bytes: u64,
    kind: PartKind,
    /// The tensor of a base archive that the part starts from.
    base: Option<BaseTensor>,
    strips: Vec<PreparedStrip>,
}

/// How the elements of a part are coded.
#[derive(Debug)]
pub enum PartKind {
    /// Bytes as they are.
    Raw,
    /// Bit-exact, see `codec::lossless`.
    Split {
        /// The type that is split.
        carrier: Carrier,
        /// Bits of a carrier element.
        carrier_bits: u32,
        /// The symbols.
        symbols: Symbols,
    },
    /// Integers in the tensor's bytes, see `codec::units`.
    Units {
        /// What symbols stand for.
        units: UnitCoding,
        /// The symbols.
        symbols: Symbols,
    },
    /// Quantized, see `codec::quantizer`.
    Quantized {
        /// The symbols.
        symbols: Symbols,
        /// Step, scales, means.
        quantizer: Quantizer,
        /// Present in predicted parts.
        prediction: Option<Prediction>,
    },
    /// Bit-exact, see `codec::difference`.
    Based(Based),
}

impl PreparedPart {
    /// Checks `header` against the tensor it fills. `pools` are the archive's. `motions` is what the permutations of
    /// this record and the next below do to this tensor; they are used only if the header asks for them.
    pub fn new(
        tensor: &TensorInfo,
        header: &PartHeader,
        pools: Pools<'_>,
        motions: impl Into<Motions>,
    ) -> Result<Self, DecodeError> {
        let element_bits = tensor.dtype.bits().unwrap_or(8);
        let mut part = Self {
            dtype: tensor.dtype.clone(),
            symbol_bits: 8 * element_bits.div_ceil(8) as usize,
            length_bytes: tensor.length_bytes,
            kind: PartKind::Raw,
            base: None,
            strips: Vec::new(),
        };
        if let Coding::Based(info) = &header.coding {
            part.kind = prepare_based(info, tensor, header.streams.as_ref(), pools.tables)?;
            part.base = Some(info.reference);
        }
        let Some(streams) = &header.streams else {
            if matches!(part.kind, PartKind::Based(_)) {
                if !header.strip_crcs.is_empty() {
                    return Err(inconsistent("strips", header.strip_crcs.len(), "none without differences"));
                }
                part.prepare_unstored_strips();
                return Ok(part);
            }
            part.prepare_raw_strips(&header.strip_crcs)?;
            return Ok(part);
        };
        let mut elements = tensor.elements();
        if let Coding::Units(info) = &header.coding {
            let bits = u64::from(info.unit_bits);
            // Below 2^63 bytes, so that twice as many units can be counted.
            let is_whole = tensor.length_bytes.is_multiple_of(bits.div_ceil(8))
                && (u64::from(streams.run_elements) * bits).is_multiple_of(8);
            if !is_whole {
                let found = format!("{bits}, runs of {}", streams.run_elements);
                let expected = format!("runs of whole bytes in a tensor of {}", tensor.length_bytes);
                return Err(inconsistent("unit bits", found, expected));
            }
            part.symbol_bits = bits as usize;
            elements = if bits == 4 { 2 * tensor.length_bytes } else { tensor.length_bytes / (bits / 8) };
        } else if !matches!(tensor.dtype.bits(), Some(8 | 16 | 32 | 64)) {
            return Err(inconsistent(
                "part coding",
                "coded elements",
                format!("raw bytes or units for {}", tensor.dtype),
            ));
        }
        let run_elements = u64::from(streams.run_elements);
        let runs = elements.div_ceil(run_elements);
        let expected_strips = runs.div_ceil(streams.runs_per_strip.into());
        if header.strip_crcs.len() as u64 != expected_strips {
            return Err(inconsistent("strips", header.strip_crcs.len(), expected_strips));
        }
        let exception_value_bytes = match &header.coding {
            Coding::Split { carrier, raw_bits, zero_bits } => {
                let bits = carrier_bits(*carrier, element_bits as u32);
                if *carrier != Carrier::Own && tensor.dtype != Dtype::F32 {
                    return Err(inconsistent("carrier", format!("{carrier:?} in {}", tensor.dtype), "F32"));
                }
                if u32::from(*raw_bits) > bits {
                    return Err(inconsistent("raw bits", raw_bits, format!("1 to {bits}")));
                }
                let mut symbols = prepare_symbols(streams, (*raw_bits).into(), pools.tables, runs, 1)?;
                if let Some(zero_bits) = zero_bits {
                    // The sign is always stored.
                    symbols.zero_bits = decode_integers("zero bits", zero_bits, runs, 0, i32::from(*raw_bits) - 1)?;
                }
                part.kind = PartKind::Split { carrier: *carrier, carrier_bits: bits, symbols };
                bits as usize / 8
            }
            Coding::Quantized(info) | Coding::QuantizedFromBase(_, info) => {
                if !matches!(tensor.dtype, Dtype::F32 | Dtype::F16 | Dtype::BF16) {
                    return Err(inconsistent("part coding", format!("quantized {}", tensor.dtype), "F32, F16 or BF16"));
                }
                let symbols = if info.vectors.is_some() {
                    Symbols::of_vectors(streams)
                } else {
                    let pairs = info.trellis.is_some_and(|trellis| trellis.tables == TrellisTables::Pairs);
                    let per_number = if pairs { 2 } else { 1 };
                    prepare_symbols(streams, info.raw_bits.into(), pools.tables, runs, per_number)?
                };
                part.kind = prepare_quantized(info, tensor, symbols, pools, motions.into(), runs)?;
                if let (Coding::QuantizedFromBase(reference, _), PartKind::Quantized { prediction, .. }) =
                    (&header.coding, &mut part.kind)
                {
                    part.base = Some(*reference);
                    *prediction = Some(Prediction::copy());
                }
                2
            }
            Coding::Units(info) => {
                let symbols = prepare_symbols(streams, info.raw_bits.into(), pools.tables, runs, 1)?;
                part.kind = PartKind::Units { units: UnitCoding::new(info), symbols };
                info.number_bytes()
            }
            Coding::Based(_) => part.symbol_bits / 8,
            Coding::Raw => unreachable!("raw parts have no streams"),
        };
        part.prepare_symbol_strips(streams, &header.strip_crcs, elements, exception_value_bytes)?;
        Ok(part)
    }

    /// How the elements are coded.
    pub fn kind(&self) -> &PartKind {
        &self.kind
    }

    /// Element type of the tensor.
    pub fn dtype(&self) -> &Dtype {
        &self.dtype
    }

    /// Length of the tensor in bytes.
    pub fn length_bytes(&self) -> u64 {
        self.length_bytes
    }

    /// How a bit-exact part starts from a base archive, where it does.
    pub fn based(&self) -> Option<&Based> {
        match &self.kind {
            PartKind::Based(based) => Some(based),
            _ => None,
        }
    }

    /// The tensor of a base archive that the part starts from, bit-exact or quantized.
    pub fn base(&self) -> Option<BaseTensor> {
        self.base
    }

    /// The prediction, where the part is predicted from another record.
    pub fn prediction(&self) -> Option<&Prediction> {
        match &self.kind {
            _ if self.base.is_some() => None,
            PartKind::Quantized { prediction, .. } => prediction.as_ref(),
            PartKind::Raw | PartKind::Split { .. } | PartKind::Units { .. } | PartKind::Based(_) => None,
        }
    }

    /// Layout and tables, where symbols are coded.
    pub fn symbols(&self) -> Option<&Symbols> {
        match &self.kind {
            PartKind::Raw => None,
            PartKind::Split { symbols, .. } | PartKind::Units { symbols, .. } | PartKind::Quantized { symbols, .. } => {
                Some(symbols)
            }
            PartKind::Based(based) => based.difference.as_ref().map(|difference| &difference.symbols),
        }
    }
}

#[allow(clippy::needless_pass_by_value)] // literals and numbers alike
fn inconsistent(field: &'static str, found: impl ToString, expected: impl ToString) -> DecodeError {
    DecodeError::Inconsistent { field, found: found.to_string(), expected: expected.to_string() }
}

fn decode_integers(
    field: &'static str,
    stored: &StoredIntegers,
    count: u64,
    low: i32,
    high: i32,
) -> Result<Integers, DecodeError> {
    integers::decode(stored, count, low, high).map_err(|error| DecodeError::SideInformation { field, error })
}
