//! The header fields of a prediction: from where, and by which arithmetic (SPEC.md section 4.1, *prediction fields*).

use super::StoredIntegers;
use crate::format::bytes::{Reader, Writer};
use crate::format::error::FormatError;
use crate::format::limits;

const SCALED_COPY: u8 = 0;
const ROW_AFFINE: u8 = 1;
const MOTION_VECTORS: u8 = 2;
const NETWORK: u8 = 3;

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

/// The arithmetic that turns decoded reference values into a prediction (Eq. 70).
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
    /// Each index along an axis from a few of the reference's, each times a gain.
    MotionVectors {
        /// The axis.
        axis: u8,
        /// A vector's gain is its integer times this.
        gain_step: f32,
        /// One integer per index along the axis: how many vectors it has.
        counts: StoredIntegers,
        /// One integer per vector: the index of the reference.
        sources: StoredIntegers,
        /// One integer per vector.
        gains: StoredIntegers,
    },
    /// A network of the index, unit by unit (F.1).
    Network {
        /// Its number.
        network: u16,
        /// Its kind of tensor.
        kind: u16,
        /// Its layer embedding, where there is one.
        layer: Option<u16>,
        /// A reference value times this is an input.
        input_scale: f32,
        /// An output times this is a prediction.
        output_scale: f32,
        /// The part of the reference's own reference record, where the network looks at two layers.
        second_part: Option<u32>,
    },
}

impl StoredPredictor {
    /// Whether an archive with it announces so.
    pub fn needs_feature(&self) -> bool {
        matches!(self, Self::MotionVectors { .. } | Self::Network { .. })
    }
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
            MOTION_VECTORS => StoredPredictor::MotionVectors {
                axis: reader.u8("vector axis")?,
                gain_step: reader.finite_f32("gain step")?,
                counts: StoredIntegers::parse(reader, "vector counts")?,
                sources: StoredIntegers::parse(reader, "vector sources")?,
                gains: StoredIntegers::parse(reader, "vector gains")?,
            },
            NETWORK => StoredPredictor::Network {
                network: reader.varint("network", limits::NETWORKS - 1)? as u16,
                kind: reader.varint("network kind", limits::NETWORK_KINDS - 1)? as u16,
                layer: reader.varint("network layer", limits::NETWORK_LAYERS)?.checked_sub(1).map(|layer| layer as u16),
                input_scale: reader.finite_f32("input scale")?,
                output_scale: reader.finite_f32("output scale")?,
                second_part: (reader.varint("second reference part", limits::PARTS)?.checked_sub(1))
                    .map(|part| part as u32),
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
            StoredPredictor::MotionVectors { axis, gain_step, counts, sources, gains } => {
                writer.u8(MOTION_VECTORS);
                writer.u8(*axis);
                writer.f32(*gain_step);
                writer.blob(&counts.0);
                writer.blob(&sources.0);
                writer.blob(&gains.0);
            }
            StoredPredictor::Network { network, kind, layer, input_scale, output_scale, second_part } => {
                writer.u8(NETWORK);
                writer.varint((*network).into());
                writer.varint((*kind).into());
                writer.varint(layer.map_or(0, |layer| u64::from(layer) + 1));
                writer.f32(*input_scale);
                writer.f32(*output_scale);
                writer.varint(second_part.map_or(0, |part| u64::from(part) + 1));
            }
        }
    }
}
