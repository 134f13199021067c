//! Codes of units joined to raw bits and written as the tensor's bytes: the same on every CPU.

use super::raw_bits::RawBits;
use crate::codec::units::{UnitCoding, write_units};

/// Writes the units of a run. Those that models are full of, packed 4-bit weights and bytes, in loops that vectorize.
pub fn join_units(codes: &[[u8; 2]], raw: &RawBits<'_>, units: &UnitCoding, out: &mut [u8]) {
    match (units.unit_bits(), raw.planes()) {
        (4, []) if !units.has_values() => {
            for (out, [low, high]) in out.iter_mut().zip(codes.as_chunks().0) {
                *out = low[0] & 15 | high[0] << 4;
            }
        }
        (8, [plane]) => {
            let raw_bits = raw.count();
            for ((out, code), raw) in out.iter_mut().zip(codes).zip(*plane) {
                *out = (u16::from_le_bytes(*code) << raw_bits) as u8 | raw;
            }
        }
        (unit_bits, planes) => {
            let number = |(index, &code): (usize, &[u8; 2])| {
                let mut bits = [0; 8];
                for (bits, plane) in bits.iter_mut().zip(planes) {
                    *bits = plane[index];
                }
                units.number(i16::from_le_bytes(code), u64::from_le_bytes(bits))
            };
            let numbers: Vec<u64> = codes.iter().enumerate().map(number).collect();
            write_units(&numbers, unit_bits, out);
        }
    }
}

/// Writes the unit that an exception stands for.
pub fn replace_unit(units: &UnitCoding, index: usize, value: &[u8], out: &mut [u8]) {
    if units.unit_bits() == 4 {
        let (byte, shift) = (&mut out[index / 2], 4 * (index % 2));
        *byte = *byte & !(15 << shift) | (units.exception(value) as u8) << shift;
        return;
    }
    out[units.bytes_of(index)..][..value.len()].copy_from_slice(value);
}
