//! The header fields of a quantizer: step, scales, means, trellis, vectors (SPEC.md section 4.1, *Quantized*; Eq. 61).

use super::{StoredIntegers, StoredPrediction};
use crate::format::bytes::{Reader, Writer};
use crate::format::error::FormatError;
use crate::format::limits;

const HAS_SCALES: u8 = 1;
const HAS_MEANS: u8 = 2;
const HAS_PREDICTION: u8 = 4;
const HAS_TRELLIS: u8 = 8;
const HAS_VECTORS: u8 = 16;
const HAS_COLUMN_SCALES: u8 = 32;
const KNOWN_FLAGS: u8 = HAS_SCALES | HAS_MEANS | HAS_PREDICTION | HAS_TRELLIS | HAS_VECTORS | HAS_COLUMN_SCALES;

/// Trellis-coded quantization: which of two interleaved quantizers a symbol belongs to depends on the symbols before it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StoredTrellis {
    /// How the quantizers use entropy tables.
    pub tables: TrellisTables,
    /// Base-2 logarithm of the number of states, 3 to 8.
    pub state_bits: u8,
}

/// How the two quantizers of a trellis use entropy tables.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TrellisTables {
    /// Both share each run's table.
    Shared,
    /// A run's table number stands for a pair: the first quantizer's table and the second's.
    Pairs,
}

/// Residual vector quantization in two stages: consecutive elements of a run are a codeword of each codebook, added.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StoredVectors {
    /// Numbers of the codebooks in the index; they have codewords of the same length.
    pub codebooks: [u16; 2],
}

/// Quantizer side information (Eq. 61).
#[derive(Clone, Debug, PartialEq)]
pub struct QuantizerInfo {
    /// Distance of two neighbouring codes, in weight units.
    pub step: f32,
    /// Raw low bits below every coded symbol.
    pub raw_bits: u8,
    /// Present where codes are trellis-coded, absent where they are scalar.
    pub trellis: Option<StoredTrellis>,
    /// Present where there are indices of codewords in place of codes: then without trellis and raw bits.
    pub vectors: Option<StoredVectors>,
    /// Per run, an integer whose multiplier the step is taken times; absent where all runs share the step.
    pub scales: Option<StoredIntegers>,
    /// A run's mean is its integer times this, in weight units; absent where no run has one.
    pub means: Option<(f32, StoredIntegers)>,
    /// Per element of a run, an integer whose multiplier what it stands for is taken times, step and mean applied; absent
    /// where all columns are alike. The archive announces it.
    pub column_scales: Option<StoredIntegers>,
    /// Present in predicted parts, absent in keyframe parts: the paper's mode flag (Eq. 64).
    pub prediction: Option<StoredPrediction>,
}

impl QuantizerInfo {
    pub(super) fn parse(reader: &mut Reader<'_>) -> Result<Self, FormatError> {
        let offset = reader.position();
        let step = reader.finite_f32("step")?;
        if step <= 0.0 {
            return Err(reader.invalid("step", offset, step, "a positive number"));
        }
        let offset = reader.position();
        let raw_bits = reader.u8("raw bits")?;
        if raw_bits > 8 {
            return Err(reader.invalid("raw bits", offset, raw_bits, "0 to 8"));
        }
        let offset = reader.position();
        let flags = reader.u8("quantizer flags")?;
        if flags & !KNOWN_FLAGS != 0 {
            return Err(FormatError::UnknownFeature {
                feature: format!("quantizer flags {flags:#x} at byte {offset}"),
            });
        }
        let trellis = match flags & HAS_TRELLIS {
            0 => None,
            _ => Some(StoredTrellis::parse(reader)?),
        };
        let vectors = match flags & HAS_VECTORS {
            0 => None,
            _ if raw_bits > 0 || trellis.is_some() => {
                return Err(reader.invalid("quantizer flags", offset, format!("{flags:#x}"), "vectors alone"));
            }
            _ => {
                let mut codebook = || Ok(reader.varint("vector codebook", limits::CODEBOOKS - 1)? as u16);
                Some(StoredVectors { codebooks: [codebook()?, codebook()?] })
            }
        };
        let scales = if flags & HAS_SCALES != 0 { Some(StoredIntegers::parse(reader, "scales")?) } else { None };
        let means = if flags & HAS_MEANS != 0 {
            Some((reader.finite_f32("mean step")?, StoredIntegers::parse(reader, "means")?))
        } else {
            None
        };
        let column_scales = match flags & HAS_COLUMN_SCALES {
            0 => None,
            _ => Some(StoredIntegers::parse(reader, "column scales")?),
        };
        let prediction = if flags & HAS_PREDICTION != 0 { Some(StoredPrediction::parse(reader)?) } else { None };
        Ok(Self { step, raw_bits, trellis, vectors, scales, means, column_scales, prediction })
    }

    pub(super) fn write(&self, writer: &mut Writer) {
        writer.f32(self.step);
        writer.u8(self.raw_bits);
        let flag = |present: bool, bit: u8| if present { bit } else { 0 };
        writer.u8(flag(self.scales.is_some(), HAS_SCALES)
            | flag(self.means.is_some(), HAS_MEANS)
            | flag(self.prediction.is_some(), HAS_PREDICTION)
            | flag(self.trellis.is_some(), HAS_TRELLIS)
            | flag(self.vectors.is_some(), HAS_VECTORS)
            | flag(self.column_scales.is_some(), HAS_COLUMN_SCALES));
        if let Some(trellis) = self.trellis {
            writer.u8(trellis.tables as u8);
            writer.u8(trellis.state_bits);
        }
        for &codebook in self.vectors.iter().flat_map(|vectors| &vectors.codebooks) {
            writer.varint(codebook.into());
        }
        if let Some(scales) = &self.scales {
            writer.blob(&scales.0);
        }
        if let Some((step, means)) = &self.means {
            writer.f32(*step);
            writer.blob(&means.0);
        }
        if let Some(column_scales) = &self.column_scales {
            writer.blob(&column_scales.0);
        }
        if let Some(prediction) = &self.prediction {
            prediction.write(writer);
        }
    }
}

impl StoredTrellis {
    fn parse(reader: &mut Reader<'_>) -> Result<Self, FormatError> {
        let tables = match reader.u8("trellis")? {
            0 => TrellisTables::Shared,
            1 => TrellisTables::Pairs,
            other => return Err(FormatError::UnknownFeature { feature: format!("trellis {other}") }),
        };
        let state_bits = reader.u8("trellis state bits")?;
        if !limits::TRELLIS_STATE_BITS.contains(&state_bits) {
            return Err(FormatError::UnknownFeature { feature: format!("trellis state bits {state_bits}") });
        }
        Ok(Self { tables, state_bits })
    }
}
