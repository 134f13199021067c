//! Bit-exact coding of integers that lie in a tensor's bytes, whatever its type: packed 4-bit weights, quantized bytes, token
//! numbers, tensors of few values.
//!
//! A unit's number is a symbol with raw bits below it, or one of a list of values; it may be what is added to the unit before.

use crate::format::units::UnitsInfo;

/// What the symbols of a part of units stand for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UnitCoding {
    unit_bits: u32,
    raw_bits: u32,
    has_differences: bool,
    values: Vec<u64>,
}

impl UnitCoding {
    /// As the part's header says.
    pub fn new(info: &UnitsInfo) -> Self {
        Self {
            unit_bits: info.unit_bits.into(),
            raw_bits: info.raw_bits.into(),
            has_differences: info.has_differences,
            values: info.values.clone(),
        }
    }

    /// Bits of a unit.
    pub fn unit_bits(&self) -> u32 {
        self.unit_bits
    }

    /// Bytes of so many units.
    pub fn bytes_of(&self, units: usize) -> usize {
        units * self.unit_bits as usize / 8
    }

    /// Bytes of a number stored by itself.
    pub fn number_bytes(&self) -> usize {
        self.unit_bits.div_ceil(8) as usize
    }

    /// Whether numbers are added to the units before them.
    pub fn has_differences(&self) -> bool {
        self.has_differences
    }

    /// Whether symbols stand for listed values.
    pub fn has_values(&self) -> bool {
        !self.values.is_empty()
    }

    /// The values that symbols stand for, where they are listed.
    pub fn values(&self) -> &[u64] {
        &self.values
    }

    /// The number of a symbol and its raw bits, modulo two to the power of the unit's bits; 0 where values are listed and the
    /// code is none of them, which tables that parts share may have.
    #[inline]
    pub fn number(&self, code: i16, raw: u64) -> u64 {
        if self.has_values() {
            return usize::try_from(code).ok().and_then(|code| self.values.get(code)).copied().unwrap_or(0);
        }
        ((i64::from(code) as u64) << self.raw_bits | raw) & self.mask()
    }

    /// The number that an exception's value is, of [`Self::number_bytes`] bytes; of a unit of 4 bits the lower half.
    pub fn exception(&self, value: &[u8]) -> u64 {
        let mut bytes = [0; 8];
        bytes[..value.len()].copy_from_slice(value);
        u64::from_le_bytes(bytes) & self.mask()
    }

    /// Turns the numbers of a strip into its units.
    pub fn integrate(&self, numbers: &mut [u64]) {
        if self.has_differences {
            let mut before = 0_u64;
            for number in numbers {
                before = before.wrapping_add(*number) & self.mask();
                *number = before;
            }
        }
    }

    #[inline]
    fn mask(&self) -> u64 {
        u64::MAX >> (64 - self.unit_bits)
    }
}

/// Writes units as a tensor's bytes: little-endian, and of two units of 4 bits in a byte the first in the lower half.
pub fn write_units(units: &[u64], unit_bits: u32, out: &mut [u8]) {
    if unit_bits == 4 {
        for (out, pair) in out.iter_mut().zip(units.chunks(2)) {
            *out = pair.iter().rev().fold(0, |byte, &unit| byte << 4 | unit as u8);
        }
        return;
    }
    let bytes = unit_bits as usize / 8;
    for (out, unit) in out.chunks_mut(bytes).zip(units) {
        out.copy_from_slice(&unit.to_le_bytes()[..bytes]);
    }
}

/// Reads a tensor's bytes as units, the inverse of [`write_units`].
pub fn read_units(bytes: &[u8], unit_bits: u32, mut take: impl FnMut(u64)) {
    match unit_bits {
        4 => bytes.iter().for_each(|&byte| {
            take(u64::from(byte & 15));
            take(u64::from(byte >> 4));
        }),
        8 => bytes.iter().for_each(|&byte| take(byte.into())),
        16 => bytes.as_chunks().0.iter().for_each(|&bytes| take(u16::from_le_bytes(bytes).into())),
        32 => bytes.as_chunks().0.iter().for_each(|&bytes| take(u32::from_le_bytes(bytes).into())),
        _ => bytes.as_chunks().0.iter().for_each(|&bytes| take(u64::from_le_bytes(bytes))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn coding(unit_bits: u8, raw_bits: u8, values: Vec<u64>) -> UnitCoding {
        UnitCoding::new(&UnitsInfo { unit_bits, raw_bits, has_differences: true, values })
    }

    #[test]
    fn numbers_are_symbols_with_raw_bits_or_listed_values() {
        assert_eq!(coding(8, 3, vec![]).number(-1, 5), 0xfd);
        assert_eq!(coding(4, 0, vec![]).number(-8, 0), 8);
        assert_eq!(coding(64, 0, vec![]).number(-2, 0), u64::MAX - 1);
        assert_eq!(coding(32, 0, vec![9, 0xff7f_ffff]).number(1, 0), 0xff7f_ffff);
        assert_eq!([1, -1].map(|code| coding(32, 0, vec![9]).number(code, 0)), [0; 2], "not in the list");
    }

    #[test]
    fn differences_add_up_modulo_the_unit() {
        let mut numbers = [250, 10, 255];
        coding(8, 0, vec![]).integrate(&mut numbers);
        assert_eq!(numbers, [250, 4, 3]);
    }

    proptest! {
        #[test]
        fn units_come_back(bytes in prop::collection::vec(any::<u8>(), 0..9), bits in prop::sample::select(vec![4_u32, 8, 16, 32, 64])) {
            let bytes = bytes.repeat(8);
            let mut units = Vec::new();
            read_units(&bytes, bits, |unit| units.push(unit));
            prop_assert_eq!(units.len() * bits as usize, 8 * bytes.len());
            let mut written = vec![0; bytes.len()];
            write_units(&units, bits, &mut written);
            prop_assert_eq!(written, bytes);
        }
    }
}
