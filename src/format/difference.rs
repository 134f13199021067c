//! Parts that start from a tensor of a base archive: what their header says (SPEC.md section 4.3).

use super::bytes::{Reader, Writer};
use super::error::FormatError;
use super::limits;
use super::part::StoredIntegers;

/// A tensor of a base archive.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct BaseTensor {
    /// Which of the archive's bases.
    pub base: u32,
    /// Which of its files.
    pub file: u32,
    /// Which tensor of that file, counted in the order of the data.
    pub tensor: u32,
}

/// A product of two thin integer matrices, added to the reference: what a merged LoRA added to the weights.
#[derive(Clone, Debug, PartialEq)]
pub struct StoredLowRank {
    /// Columns of the left factor, rows of the right one.
    pub rank: u32,
    /// The product is taken times this, in weight units.
    pub scale: f32,
    /// The left factor, `[rows, rank]`.
    pub left: StoredIntegers,
    /// The right factor, `[rank, columns]`.
    pub right: StoredIntegers,
}

/// How the elements' differences to their references are grouped and coded.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StoredDifference {
    /// Low bits that are zero in every difference, and not coded.
    pub zero_bits: u8,
    /// Low magnitude bits of a reference element that its class does not depend on.
    pub class_shift: u8,
    /// Consecutive elements that share a class offset.
    pub class_row: u32,
    /// For each class row, what is taken off the classes of its elements.
    pub class_offsets: StoredIntegers,
    /// For each of the part's tables, the raw bits below its symbols.
    pub table_raw_bits: StoredIntegers,
}

/// A part that starts from a tensor of a base archive.
#[derive(Clone, Debug, PartialEq)]
pub struct BasedInfo {
    /// Where its reference is.
    pub reference: BaseTensor,
    /// What is added to the reference.
    pub low_rank: Option<StoredLowRank>,
    /// Absent where every element is its (changed) reference.
    pub difference: Option<StoredDifference>,
}

impl StoredLowRank {
    /// Bits of both factors.
    pub fn bits(&self) -> f64 {
        8.0 * (self.left.0.len() + self.right.0.len()) as f64
    }
}

const HAS_LOW_RANK: u8 = 1;
const HAS_DIFFERENCE: u8 = 2;

impl BaseTensor {
    /// Reads the three numbers.
    pub fn parse(reader: &mut Reader<'_>) -> Result<Self, FormatError> {
        Ok(Self {
            base: reader.varint("base", limits::BASES - 1)? as u32,
            file: reader.varint("base file", limits::FILES)? as u32,
            tensor: reader.varint("base tensor", u32::MAX.into())? as u32,
        })
    }

    /// Writes them.
    pub fn write(self, writer: &mut Writer) {
        writer.varint(self.base.into());
        writer.varint(self.file.into());
        writer.varint(self.tensor.into());
    }
}

impl BasedInfo {
    /// Reads what follows the part coding.
    pub fn parse(reader: &mut Reader<'_>) -> Result<Self, FormatError> {
        let reference = BaseTensor::parse(reader)?;
        let flags = reader.u8("base flags")?;
        if flags & !(HAS_LOW_RANK | HAS_DIFFERENCE) != 0 {
            return Err(FormatError::UnknownFeature { feature: format!("base flags {flags:#x}") });
        }
        let low_rank = if flags & HAS_LOW_RANK != 0 { Some(StoredLowRank::parse(reader)?) } else { None };
        let difference = if flags & HAS_DIFFERENCE != 0 { Some(StoredDifference::parse(reader)?) } else { None };
        Ok(Self { reference, low_rank, difference })
    }

    /// Writes what follows the part coding.
    pub fn write(&self, writer: &mut Writer) {
        self.reference.write(writer);
        let flag = |present: bool, bit: u8| if present { bit } else { 0 };
        writer.u8(flag(self.low_rank.is_some(), HAS_LOW_RANK) | flag(self.difference.is_some(), HAS_DIFFERENCE));
        if let Some(low_rank) = &self.low_rank {
            low_rank.write(writer);
        }
        if let Some(difference) = &self.difference {
            difference.write(writer);
        }
    }
}

impl StoredLowRank {
    fn parse(reader: &mut Reader<'_>) -> Result<Self, FormatError> {
        let offset = reader.position();
        let rank = reader.varint("rank", limits::RANK)? as u32;
        if rank == 0 {
            return Err(reader.invalid("rank", offset, rank, format!("1 to {}", limits::RANK)));
        }
        Ok(Self {
            rank,
            scale: reader.finite_f32("low-rank scale")?,
            left: StoredIntegers::parse(reader, "left factor")?,
            right: StoredIntegers::parse(reader, "right factor")?,
        })
    }

    fn write(&self, writer: &mut Writer) {
        writer.varint(self.rank.into());
        writer.f32(self.scale);
        writer.blob(&self.left.0);
        writer.blob(&self.right.0);
    }
}

impl StoredDifference {
    fn parse(reader: &mut Reader<'_>) -> Result<Self, FormatError> {
        let below_32 = |reader: &mut Reader<'_>, field| {
            let offset = reader.position();
            match reader.u8(field)? {
                bits @ 0..=31 => Ok(bits),
                more => Err(reader.invalid(field, offset, more, "0 to 31")),
            }
        };
        let zero_bits = below_32(reader, "common zero bits")?;
        let class_shift = below_32(reader, "class shift")?;
        let offset = reader.position();
        let class_row = reader.varint("class row", u32::MAX.into())? as u32;
        if class_row == 0 {
            return Err(reader.invalid("class row", offset, class_row, "1 at least"));
        }
        Ok(Self {
            zero_bits,
            class_shift,
            class_row,
            class_offsets: StoredIntegers::parse(reader, "class offsets")?,
            table_raw_bits: StoredIntegers::parse(reader, "table raw bits")?,
        })
    }

    fn write(&self, writer: &mut Writer) {
        writer.u8(self.zero_bits);
        writer.u8(self.class_shift);
        writer.varint(self.class_row.into());
        writer.blob(&self.class_offsets.0);
        writer.blob(&self.table_raw_bits.0);
    }
}
