//! The header fields of a part of units: bit-exact integers of 4 to 64 bits that lie in a tensor's bytes (SPEC.md section 4.1).

use super::bytes::{Reader, Writer};
use super::error::FormatError;
use super::limits;

const HAS_VALUES: u8 = 1;
const HAS_DIFFERENCES: u8 = 2;

/// How the units of a part are coded.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UnitsInfo {
    /// Bits of a unit: 4, of which two fill a byte, or 8, 16, 32, 64.
    pub unit_bits: u8,
    /// Raw bits below every coded symbol.
    pub raw_bits: u8,
    /// Whether a unit's number is added to the unit before it.
    pub has_differences: bool,
    /// The numbers that symbols stand for; empty where symbols are numbers. There are no raw bits then.
    pub values: Vec<u64>,
}

impl UnitsInfo {
    /// Bytes of one number that is stored by itself, in the list of values or as an exception.
    pub fn number_bytes(&self) -> usize {
        usize::from(self.unit_bits).div_ceil(8)
    }

    /// Reads the fields.
    pub fn parse(reader: &mut Reader<'_>) -> Result<Self, FormatError> {
        let offset = reader.position();
        let unit_bits = reader.u8("unit bits")?;
        if !matches!(unit_bits, 4 | 8 | 16 | 32 | 64) {
            return Err(reader.invalid("unit bits", offset, unit_bits, "4, 8, 16, 32 or 64"));
        }
        let offset = reader.position();
        let raw_bits = reader.u8("raw bits")?;
        if u64::from(raw_bits) > limits::RAW_BITS.min(unit_bits.into()) {
            return Err(reader.invalid("raw bits", offset, raw_bits, "0 to 56 and at most the unit's"));
        }
        let offset = reader.position();
        let flags = reader.u8("units flags")?;
        if flags & !(HAS_VALUES | HAS_DIFFERENCES) != 0 {
            return Err(FormatError::UnknownFeature { feature: format!("units flags {flags:#x}") });
        }
        let mut info = Self { unit_bits, raw_bits, has_differences: flags & HAS_DIFFERENCES != 0, values: Vec::new() };
        if flags & HAS_VALUES == 0 {
            return Ok(info);
        }
        if raw_bits > 0 {
            return Err(reader.invalid("units flags", offset, flags, "no values beside raw bits"));
        }
        let offset = reader.position();
        let count = reader.count("values", limits::TABLE_POSITIONS)?;
        if count == 0 {
            return Err(reader.invalid("values", offset, count, "1 to 61"));
        }
        for _ in 0..count {
            let offset = reader.position();
            let mut bytes = [0; 8];
            bytes[..info.number_bytes()].copy_from_slice(reader.take("value", info.number_bytes() as u64)?);
            let value = u64::from_le_bytes(bytes);
            if unit_bits == 4 && value > 15 {
                return Err(reader.invalid("value", offset, value, "0 to 15"));
            }
            info.values.push(value);
        }
        Ok(info)
    }

    /// Writes the fields.
    pub fn write(&self, writer: &mut Writer) {
        writer.u8(self.unit_bits);
        writer.u8(self.raw_bits);
        let flag = |is_set: bool, flag: u8| if is_set { flag } else { 0 };
        writer.u8(flag(!self.values.is_empty(), HAS_VALUES) | flag(self.has_differences, HAS_DIFFERENCES));
        if !self.values.is_empty() {
            writer.varint(self.values.len() as u64);
            for value in &self.values {
                writer.raw(&value.to_le_bytes()[..self.number_bytes()]);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(info: &UnitsInfo) -> Result<UnitsInfo, FormatError> {
        let mut writer = Writer::new();
        info.write(&mut writer);
        UnitsInfo::parse(&mut Reader::new("test", &writer.into_bytes()))
    }

    #[test]
    fn fields_come_back() {
        for unit_bits in [4, 8, 16, 32, 64] {
            for values in [vec![], vec![0], vec![7, 15, 3]] {
                let raw_bits = if values.is_empty() { unit_bits / 2 } else { 0 };
                let info = UnitsInfo { unit_bits, raw_bits, has_differences: unit_bits > 8, values };
                assert_eq!(parse(&info), Ok(info));
            }
        }
    }

    #[test]
    fn fields_out_of_range_are_errors() {
        let info = UnitsInfo { unit_bits: 4, raw_bits: 0, has_differences: false, values: vec![3] };
        assert!(parse(&UnitsInfo { unit_bits: 6, ..info.clone() }).is_err());
        assert!(parse(&UnitsInfo { raw_bits: 5, values: vec![], ..info.clone() }).is_err());
        assert!(parse(&UnitsInfo { raw_bits: 1, ..info.clone() }).is_err(), "values have no raw bits");
        assert!(parse(&UnitsInfo { values: vec![16], ..info.clone() }).is_err());
        assert!(parse(&UnitsInfo { values: vec![1; 62], ..info }).is_err());
    }
}
