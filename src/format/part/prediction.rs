//! The header fields of a prediction: from where, and by which arithmetic (SPEC.md section 4.1, *prediction fields*).

use super::StoredIntegers;
use crate::format::bytes::{Reader, Writer};
use crate::format::error::FormatError;
use crate::format::limits;

const SCALED_COPY: u8 = 0;
const ROW_AFFINE: u8 = 1;

/// Where blocks lie along an axis of a tensor: index = ((repeat * blocks) + block) * unit + element (Eq. 56, `BlockAxis`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StoredPlacement {
    /// Axis along which the blocks lie.
    pub axis: u8,
    /// How often the sequence of blocks repeats along it.
    pub repeat: u32,
    /// Whether a block is one member of a group, or else a whole group.
    pub per_member: bool,
    /// Consecutive indices of one block.
    pub unit: u32,
}

/// The arithmetic that turns a decoded reference value into a prediction (Eq. 70, elementwise).
#[derive(Clone, Debug, PartialEq)]
pub enum StoredPredictor {
    /// `gain * reference`.
    ScaledCopy {
        /// One gain for the part.
        gain: f32,
    },
    /// `gain * reference + offset`, both per run.
    RowAffine {
        /// A run's gain is its integer times this.
        gain_step: f32,
        /// A run's offset is its integer times this.
        offset_step: f32,
        /// One integer per run.
        gains: StoredIntegers,
        /// One integer per run.
        offsets: StoredIntegers,
    },
}

/// How a predicted part finds and uses its reference.
#[derive(Clone, Debug, PartialEq)]
pub struct StoredPrediction {
    /// Which part of the reference record.
    pub reference_part: u32,
    /// Where the record's permutation moves this tensor; absent where it does not.
    pub placement: Option<StoredPlacement>,
    /// What is done with the reference value.
    pub predictor: StoredPredictor,
}

impl StoredPrediction {
    pub(super) fn parse(reader: &mut Reader<'_>) -> Result<Self, FormatError> {
        let reference_part = reader.varint("reference part", limits::PARTS)? as u32;
        let offset = reader.position();
        let placement = match reader.u8("placement flag")? {
            0 => None,
            1 => {
                let axis = reader.u8("placement axis")?;
                let repeat = reader.varint("placement repeat", limits::BLOCKS)? as u32;
                let offset = reader.position();
                let per_member = match reader.u8("placement per member")? {
                    0 => false,
                    1 => true,
                    other => return Err(reader.invalid("placement per member", offset, other, "0 or 1")),
                };
                let unit = reader.varint("placement unit", u32::MAX.into())? as u32;
                Some(StoredPlacement { axis, repeat, per_member, unit })
            }
            other => return Err(reader.invalid("placement flag", offset, other, "0 or 1")),
        };
        let predictor = match reader.u8("predictor")? {
            SCALED_COPY => StoredPredictor::ScaledCopy { gain: reader.finite_f32("gain")? },
            ROW_AFFINE => StoredPredictor::RowAffine {
                gain_step: reader.finite_f32("gain step")?,
                offset_step: reader.finite_f32("offset step")?,
                gains: StoredIntegers::parse(reader, "gains")?,
                offsets: StoredIntegers::parse(reader, "offsets")?,
            },
            other => return Err(FormatError::UnknownFeature { feature: format!("predictor {other}") }),
        };
        Ok(Self { reference_part, placement, predictor })
    }

    pub(super) fn write(&self, writer: &mut Writer) {
        writer.varint(self.reference_part.into());
        writer.u8(u8::from(self.placement.is_some()));
        if let Some(placement) = &self.placement {
            writer.u8(placement.axis);
            writer.varint(placement.repeat.into());
            writer.u8(u8::from(placement.per_member));
            writer.varint(placement.unit.into());
        }
        match &self.predictor {
            StoredPredictor::ScaledCopy { gain } => {
                writer.u8(SCALED_COPY);
                writer.f32(*gain);
            }
            StoredPredictor::RowAffine { gain_step, offset_step, gains, offsets } => {
                writer.u8(ROW_AFFINE);
                writer.f32(*gain_step);
                writer.f32(*offset_step);
                writer.blob(&gains.0);
                writer.blob(&offsets.0);
            }
        }
    }
}
