//! The header of one part: how one tensor is coded, and everything its strips need (SPEC.md section 4.1; Eqs. 61-63).

use super::bytes::{Reader, Writer};
use super::difference::{BaseTensor, BasedInfo};
use super::error::FormatError;
use super::limits;
use super::units::UnitsInfo;

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
    /// Present in predicted parts, absent in keyframe parts: the paper's mode flag (Eq. 64).
    pub prediction: Option<StoredPrediction>,
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

const HAS_SCALES: u8 = 1;
const HAS_MEANS: u8 = 2;
const HAS_PREDICTION: u8 = 4;
const HAS_TRELLIS: u8 = 8;
const HAS_VECTORS: u8 = 16;

const SCALED_COPY: u8 = 0;
const ROW_AFFINE: u8 = 1;

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

impl QuantizerInfo {
    fn parse(reader: &mut Reader<'_>) -> Result<Self, FormatError> {
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
        if flags & !(HAS_SCALES | HAS_MEANS | HAS_PREDICTION | HAS_TRELLIS | HAS_VECTORS) != 0 {
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
        let prediction = if flags & HAS_PREDICTION != 0 { Some(StoredPrediction::parse(reader)?) } else { None };
        Ok(Self { step, raw_bits, trellis, vectors, scales, means, prediction })
    }

    fn write(&self, writer: &mut Writer) {
        writer.f32(self.step);
        writer.u8(self.raw_bits);
        let flag = |present: bool, bit: u8| if present { bit } else { 0 };
        writer.u8(flag(self.scales.is_some(), HAS_SCALES)
            | flag(self.means.is_some(), HAS_MEANS)
            | flag(self.prediction.is_some(), HAS_PREDICTION)
            | flag(self.trellis.is_some(), HAS_TRELLIS)
            | flag(self.vectors.is_some(), HAS_VECTORS));
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

impl StoredPrediction {
    fn parse(reader: &mut Reader<'_>) -> Result<Self, FormatError> {
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

    fn write(&self, writer: &mut Writer) {
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

#[cfg(test)]
mod tests {
    use super::super::difference::{StoredDifference, StoredLowRank};
    use super::*;
    use proptest::prelude::*;

    fn integers() -> impl Strategy<Value = StoredIntegers> {
        prop::collection::vec(any::<u8>(), 0..20).prop_map(StoredIntegers)
    }

    fn predictions() -> impl Strategy<Value = StoredPrediction> {
        let placement = (any::<u8>(), 0..1000_u32, any::<bool>(), any::<u32>())
            .prop_map(|(axis, repeat, per_member, unit)| StoredPlacement { axis, repeat, per_member, unit });
        let affine = (-9.0_f32..9.0, -9.0_f32..9.0, integers(), integers()).prop_map(
            |(gain_step, offset_step, gains, offsets)| StoredPredictor::RowAffine {
                gain_step,
                offset_step,
                gains,
                offsets,
            },
        );
        let copy = (-9.0_f32..9.0).prop_map(|gain| StoredPredictor::ScaledCopy { gain });
        (0..1000_u32, prop::option::of(placement), prop_oneof![copy, affine]).prop_map(
            |(reference_part, placement, predictor)| StoredPrediction { reference_part, placement, predictor },
        )
    }

    fn based() -> impl Strategy<Value = Coding> {
        let low_rank = (1..=256_u32, -1.0_f32..1.0, integers(), integers())
            .prop_map(|(rank, scale, left, right)| StoredLowRank { rank, scale, left, right });
        let difference = (0..32_u8, 0..32_u8, 1..=u32::MAX, integers(), integers()).prop_map(
            |(zero_bits, class_shift, class_row, class_offsets, table_raw_bits)| StoredDifference {
                zero_bits,
                class_shift,
                class_row,
                class_offsets,
                table_raw_bits,
            },
        );
        let place = (0..16_u32, 0..65_536_u32, any::<u32>());
        (place, prop::option::of(low_rank), prop::option::of(difference)).prop_map(
            |((base, file, tensor), low_rank, difference)| {
                Coding::Based(BasedInfo { reference: BaseTensor { base, file, tensor }, low_rank, difference })
            },
        )
    }

    fn codings() -> impl Strategy<Value = Coding> {
        let tables = prop::sample::select(vec![TrellisTables::Shared, TrellisTables::Pairs]);
        let trellis =
            (tables, limits::TRELLIS_STATE_BITS).prop_map(|(tables, state_bits)| StoredTrellis { tables, state_bits });
        let trellis = prop::option::of(trellis);
        let means = prop::option::of((-1.0_f32..1.0, integers()));
        let vectors = prop::option::of([0..256_u16, 0..256_u16].prop_map(|codebooks| StoredVectors { codebooks }));
        let codes = (0..=8_u8, trellis, vectors).prop_map(|(raw_bits, trellis, vectors)| match vectors {
            Some(_) => (0, None, vectors),
            None => (raw_bits, trellis, None),
        });
        let quantizer = (1e-6_f32..9.0, codes, prop::option::of(integers()), means, prop::option::of(predictions()))
            .prop_map(|(step, (raw_bits, trellis, vectors), scales, means, prediction)| {
                Coding::Quantized(QuantizerInfo { step, raw_bits, trellis, vectors, scales, means, prediction })
            })
            .boxed();
        let from_base = (quantizer.clone(), 0..16_u32).prop_map(|(coding, base)| match coding {
            Coding::Quantized(info) if info.prediction.is_none() && info.vectors.is_none() => {
                Coding::QuantizedFromBase(BaseTensor { base, file: 1, tensor: 2 }, info)
            }
            other => other,
        });
        let carrier = prop::sample::select(vec![Carrier::Own, Carrier::Bf16, Carrier::F16]);
        let split = (carrier, 1..=56_u8, prop::option::of(integers()))
            .prop_map(|(carrier, raw_bits, zero_bits)| Coding::Split { carrier, raw_bits, zero_bits });
        let values = prop::collection::vec(0..16_u64, 0..=61);
        let units = (prop::sample::select(vec![4_u8, 8, 16, 32, 64]), any::<bool>(), values);
        let units = units.prop_map(|(unit_bits, has_differences, values)| {
            let raw_bits = if values.is_empty() { unit_bits / 4 } else { 0 };
            Coding::Units(UnitsInfo { unit_bits, raw_bits, has_differences, values })
        });
        prop_oneof![Just(Coding::Raw), split, quantizer, from_base, units, based()]
    }

    proptest! {
        #[test]
        fn every_header_comes_back_and_its_cost_is_its_length(
            coding in codings(),
            tables in prop::collection::vec(0..4096_u16, 0..4),
            arrays in [integers(), integers(), integers()],
            run_elements in 1..256_u32,
            lane_bits in 0..6_u8,
            strip_crcs: Vec<u32>,
        ) {
            let [table_of_run, strip_words, strip_exceptions] = arrays;
            let table_of_run = if tables.len() > 1 { table_of_run } else { StoredIntegers::default() };
            let streams =
                SymbolStreams { run_elements, runs_per_strip: 256, lanes: 1_u8 << lane_bits, tables, table_of_run, strip_words, strip_exceptions };
            let streams = if coding.has_vectors() {
                Some(SymbolStreams { run_elements, runs_per_strip: 256, ..SymbolStreams::default() })
            } else {
                coding.has_symbols().then_some(streams)
            };
            let header = PartHeader { coding, streams, strip_crcs, cost: PartHeaderBytes::default() };
            let mut writer = Writer::new();
            header.write(&mut writer);
            let bytes = writer.into_bytes();
            let mut reader = Reader::new("test", &bytes);
            let parsed = PartHeader::parse(&mut reader).expect("just written");
            prop_assert_eq!(reader.left(), 0);
            let PartHeaderBytes { quantizer, entropy_model, metadata } = parsed.cost;
            prop_assert_eq!(quantizer + entropy_model + metadata, bytes.len() as u64);
            prop_assert_eq!(PartHeader { cost: PartHeaderBytes::default(), ..parsed }, header);
        }

        #[test]
        fn no_bytes_make_a_header_panic(bytes: Vec<u8>) {
            let _ = PartHeader::parse(&mut Reader::new("test", &bytes));
        }
    }
}
