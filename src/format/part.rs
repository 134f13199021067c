//! The header of one part: how one tensor is coded, and everything its strips need (SPEC.md section 4.1; Eqs. 61-63).

mod prediction;
mod quantizer;
#[cfg(test)]
mod tests;

use super::bytes::{Reader, Writer};
use super::difference::{BaseTensor, BasedInfo};
use super::error::FormatError;
use super::limits;
use super::units::UnitsInfo;

pub use self::prediction::{StoredPlacement, StoredPrediction, StoredPredictor};
pub use self::quantizer::{QuantizerInfo, StoredTrellis, StoredVectors, TrellisTables};
pub use super::streams::SymbolStreams;

/// An array of small integers as stored; `codec::integers` understands it, the number of items follows from the context.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct StoredIntegers(pub Vec<u8>);

impl StoredIntegers {
    /// Reads an array.
    pub fn parse(reader: &mut Reader<'_>, field: &'static str) -> Result<Self, FormatError> {
        Ok(Self(reader.blob(field, limits::SIDE_BYTES)?.to_vec()))
    }
}

/// A narrower type that holds every value of a wider tensor exactly.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Carrier {
    /// The tensor's own type.
    Own,
    /// bfloat16 values in an F32 tensor.
    Bf16,
    /// binary16 values in an F32 tensor.
    F16,
}

/// How the elements of a part are coded.
#[derive(Clone, Debug, PartialEq)]
pub enum Coding {
    /// Bytes as they are, in strips of 128 KiB.
    Raw,
    /// Bit-exact: the upper magnitude bits (the exponent) entropy-coded, sign and the bits below raw.
    Split {
        /// The type that is split.
        carrier: Carrier,
        /// Raw bits per symbol: the sign and `raw_bits - 1` low magnitude bits.
        raw_bits: u8,
        /// For each run, how many low bits are zero in all of its elements and not stored; absent where none are in any run.
        zero_bits: Option<StoredIntegers>,
    },
    /// Quantized codes, absolute (keyframe) or of a residual (predicted).
    Quantized(QuantizerInfo),
    /// Quantized codes of the difference to a tensor of a base archive.
    QuantizedFromBase(BaseTensor, QuantizerInfo),
    /// Bit-exact: integers of some bits that lie in the tensor's bytes, whatever its type.
    Units(UnitsInfo),
    /// Bit-exact: what differs from a tensor of a base archive.
    Based(BasedInfo),
}

impl Coding {
    /// Whether strips hold coded symbols.
    pub fn has_symbols(&self) -> bool {
        match self {
            Self::Raw => false,
            Self::Split { .. } | Self::Quantized(_) | Self::QuantizedFromBase(..) | Self::Units(_) => true,
            Self::Based(info) => info.difference.is_some(),
        }
    }

    /// Whether elements lose anything.
    pub fn is_quantized(&self) -> bool {
        matches!(self, Self::Quantized(_) | Self::QuantizedFromBase(..))
    }
}

impl Coding {
    /// Whether the part has indices of codewords, which are not entropy-coded.
    pub fn has_vectors(&self) -> bool {
        matches!(self, Self::Quantized(QuantizerInfo { vectors: Some(_), .. }))
    }

    /// Whether the part is of units, which an archive announces.
    pub fn is_of_units(&self) -> bool {
        matches!(self, Self::Units(_))
    }

    /// Whether the columns of the part have scales, which an archive announces.
    pub fn has_column_scales(&self) -> bool {
        matches!(self, Self::Quantized(info) | Self::QuantizedFromBase(_, info) if info.column_scales.is_some())
    }
}

/// Bytes of a part header by stream of the rate (Eq. 8, Table 1).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PartHeaderBytes {
    /// Steps, scales, means, predictor coefficients.
    pub quantizer: u64,
    /// Table numbers and choices per run.
    pub entropy_model: u64,
    /// Everything else: modes, layout, strip lengths and checksums.
    pub metadata: u64,
}

/// The header of one part.
#[derive(Clone, Debug, PartialEq)]
pub struct PartHeader {
    /// How the elements are coded.
    pub coding: Coding,
    /// Layout of the symbols; `None` where there are none.
    pub streams: Option<SymbolStreams>,
    /// CRC-32C of each strip.
    pub strip_crcs: Vec<u32>,
    /// What the header itself costs; `parse` fills it in.
    pub cost: PartHeaderBytes,
}

const CODING_RAW: u8 = 0;
const CODING_SPLIT: u8 = 1;
const CODING_QUANTIZED: u8 = 2;
const CODING_UNITS: u8 = 3;
const CODING_BASED: u8 = 4;
const CODING_QUANTIZED_FROM_BASE: u8 = 5;

const HAS_ZERO_BITS: u8 = 1;

impl PartHeader {
    /// Reads one header.
    pub fn parse(reader: &mut Reader<'_>) -> Result<Self, FormatError> {
        let start = reader.position();
        let coding = match reader.u8("part coding")? {
            CODING_RAW => Coding::Raw,
            CODING_SPLIT => Self::parse_split(reader)?,
            CODING_QUANTIZED => Coding::Quantized(QuantizerInfo::parse(reader)?),
            CODING_QUANTIZED_FROM_BASE => {
                let reference = BaseTensor::parse(reader)?;
                let offset = reader.position();
                let info = QuantizerInfo::parse(reader)?;
                if info.prediction.is_some() || info.vectors.is_some() {
                    return Err(reader.invalid(
                        "quantizer flags",
                        offset,
                        "a prediction or vectors",
                        "none from a base",
                    ));
                }
                Coding::QuantizedFromBase(reference, info)
            }
            CODING_UNITS => Coding::Units(UnitsInfo::parse(reader)?),
            CODING_BASED => Coding::Based(BasedInfo::parse(reader)?),
            other => return Err(FormatError::UnknownFeature { feature: format!("part coding {other}") }),
        };
        let quantizer = match &coding {
            Coding::Quantized(_) | Coding::QuantizedFromBase(..) | Coding::Based(_) => reader.position() - start - 1,
            _ => 0,
        };
        let before_entropy = reader.position();
        let mut entropy_model = 0;
        let mut streams = None;
        if coding.has_vectors() {
            streams = Some(SymbolStreams::parse_layout(reader)?);
        } else if coding.has_symbols() {
            let (parsed, entropy_end) = SymbolStreams::parse(reader)?;
            entropy_model = entropy_end - before_entropy;
            streams = Some(parsed);
        }
        let strips = reader.count("strips", u64::MAX)?;
        let crcs = reader.take("strip checksums", 4 * strips as u64)?;
        let strip_crcs = crcs.as_chunks::<4>().0.iter().map(|&bytes| u32::from_le_bytes(bytes)).collect();
        let metadata = reader.position() - start - quantizer - entropy_model;
        Ok(Self { coding, streams, strip_crcs, cost: PartHeaderBytes { quantizer, entropy_model, metadata } })
    }

    fn parse_split(reader: &mut Reader<'_>) -> Result<Coding, FormatError> {
        let offset = reader.position();
        let carrier = match reader.u8("carrier")? {
            0 => Carrier::Own,
            1 => Carrier::Bf16,
            2 => Carrier::F16,
            other => return Err(reader.invalid("carrier", offset, other, "0, 1 or 2")),
        };
        let offset = reader.position();
        let raw_bits = reader.u8("raw bits")?;
        if !(1..=limits::RAW_BITS).contains(&raw_bits.into()) {
            return Err(reader.invalid("raw bits", offset, raw_bits, "1 to 56"));
        }
        let zero_bits = match reader.u8("split flags")? {
            0 => None,
            HAS_ZERO_BITS => Some(StoredIntegers::parse(reader, "zero bits")?),
            other => return Err(FormatError::UnknownFeature { feature: format!("split flags {other:#x}") }),
        };
        Ok(Coding::Split { carrier, raw_bits, zero_bits })
    }

    /// Writes the header.
    pub fn write(&self, writer: &mut Writer) {
        match &self.coding {
            Coding::Raw => writer.u8(CODING_RAW),
            Coding::Split { carrier, raw_bits, zero_bits } => {
                writer.u8(CODING_SPLIT);
                writer.u8(*carrier as u8);
                writer.u8(*raw_bits);
                writer.u8(if zero_bits.is_some() { HAS_ZERO_BITS } else { 0 });
                if let Some(zero_bits) = zero_bits {
                    writer.blob(&zero_bits.0);
                }
            }
            Coding::Quantized(info) => {
                writer.u8(CODING_QUANTIZED);
                info.write(writer);
            }
            Coding::QuantizedFromBase(reference, info) => {
                writer.u8(CODING_QUANTIZED_FROM_BASE);
                reference.write(writer);
                info.write(writer);
            }
            Coding::Units(info) => {
                writer.u8(CODING_UNITS);
                info.write(writer);
            }
            Coding::Based(info) => {
                writer.u8(CODING_BASED);
                info.write(writer);
            }
        }
        match &self.streams {
            Some(streams) if self.coding.has_vectors() => streams.write_layout(writer),
            Some(streams) => streams.write(writer),
            None => (),
        }
        writer.varint(self.strip_crcs.len() as u64);
        for crc in &self.strip_crcs {
            writer.u32(*crc);
        }
    }
}
