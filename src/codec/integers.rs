//! Arrays of small integers in side information: choices per run, scales, lengths (SPEC.md section 4.2).
//!
//! Three forms, the shortest is written: one value for all, bits of fixed width, or one lane of the entropy coder with its
//! table in front.

use constriction::stream::Encode;
use constriction::stream::stack::AnsCoder;

use super::entropy::{CodingTable, STATE_LOW};
use crate::format::FormatError;
use crate::format::bytes::{Reader, Writer};
use crate::format::limits;
use crate::format::part::StoredIntegers;
use crate::format::table::{TOTAL, Table};

const SECTION: &str = "integer array";
const CONSTANT: u8 = 0;
const PACKED: u8 = 1;
const CODED: u8 = 2;
/// A coded array may not hold more items per stored byte than this, so that few bytes cannot claim much memory.
const ITEMS_PER_BYTE: u64 = 512;

/// A decoded array. Constant arrays stay one value, so that a few bytes cannot claim much memory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Integers {
    /// The same value everywhere.
    Constant(i32),
    /// One value per item.
    Each(Vec<i32>),
}

impl Integers {
    /// Item number `index`; the caller keeps to the count it decoded.
    #[inline]
    pub fn get(&self, index: usize) -> i32 {
        match self {
            Self::Constant(value) => *value,
            Self::Each(values) => values[index],
        }
    }

    /// Smallest and largest value; `None` for an empty array.
    pub fn range(&self) -> Option<(i32, i32)> {
        match self {
            Self::Constant(value) => Some((*value, *value)),
            Self::Each(values) => Some((*values.iter().min()?, *values.iter().max()?)),
        }
    }
}

/// Stores `values` in the shortest form.
pub fn encode(values: &[i32]) -> StoredIntegers {
    let low = values.iter().copied().min().unwrap_or(0);
    let high = values.iter().copied().max().unwrap_or(0);
    let mut writer = Writer::new();
    if low == high {
        writer.u8(CONSTANT);
        writer.zigzag(low.into());
        return StoredIntegers(writer.into_bytes());
    }
    let width = 32 - high.abs_diff(low).leading_zeros();
    writer.u8(PACKED);
    writer.zigzag(low.into());
    writer.u8(width as u8);
    let mut pending = 0_u64;
    let mut bits = 0;
    for &value in values {
        pending |= u64::from(value.abs_diff(low)) << bits;
        bits += width;
        while bits >= 8 {
            writer.u8(pending as u8);
            pending >>= 8;
            bits -= 8;
        }
    }
    if bits > 0 {
        writer.u8(pending as u8);
    }
    let packed = writer.into_bytes();
    match encode_coded(values, low, high) {
        Some(coded) if coded.len() < packed.len() => StoredIntegers(coded),
        _ => StoredIntegers(packed),
    }
}

fn encode_coded(values: &[i32], low: i32, high: i32) -> Option<Vec<u8>> {
    let span = u64::from(high.abs_diff(low)) + 1;
    if span > limits::TABLE_POSITIONS {
        return None;
    }
    let mut counts = vec![0_u64; span as usize];
    for &value in values {
        counts[value.abs_diff(low) as usize] += 1;
    }
    let frequencies = frequencies_of_counts(&counts);
    let table = coding_table(&frequencies)?;
    let mut words = Vec::new();
    let mut lane = AnsCoder::<u16, u32>::from_raw_parts(std::mem::take(&mut words), STATE_LOW);
    let position_of: Vec<u8> = positions_of(&frequencies);
    for &value in values.iter().rev() {
        lane.encode_symbol(position_of[value.abs_diff(low) as usize], &table).expect("every value was counted");
    }
    let (mut words, state) = lane.into_raw_parts();
    words.reverse();
    let mut writer = Writer::new();
    writer.u8(CODED);
    writer.zigzag(low.into());
    writer.varint(span);
    for frequency in frequencies {
        writer.varint(frequency.into());
    }
    writer.u32(state);
    for word in words {
        writer.u16(word);
    }
    let bytes = writer.into_bytes();
    (bytes.len() as u64 * ITEMS_PER_BYTE >= values.len() as u64).then_some(bytes)
}

/// Frequencies out of 4096 in proportion to the counts; zero only where the count is zero.
fn frequencies_of_counts(counts: &[u64]) -> Vec<u16> {
    let total: u64 = counts.iter().sum();
    let mut frequencies: Vec<u16> = counts
        .iter()
        .map(|&count| if count == 0 { 0 } else { (count * u64::from(TOTAL) / total).clamp(1, 4095) as u16 })
        .collect();
    // The rest goes to, or comes from, the most frequent value: it feels it least.
    let sum: i32 = frequencies.iter().copied().map(i32::from).sum();
    let largest = (0..counts.len()).max_by_key(|&index| frequencies[index]).unwrap_or(0);
    frequencies[largest] = (i32::from(frequencies[largest]) + TOTAL as i32 - sum) as u16;
    frequencies
}

/// Table positions of the values that occur.
fn positions_of(frequencies: &[u16]) -> Vec<u8> {
    let mut next = 0;
    let position = |&frequency: &u16| {
        let position = next;
        next += u8::from(frequency > 0);
        position
    };
    frequencies.iter().map(position).collect()
}

/// A table over the values that occur; its codes are their distances from the lowest. `None` if fewer than two occur.
fn coding_table(frequencies: &[u16]) -> Option<CodingTable> {
    let present = || frequencies.iter().enumerate().filter(|&(_, &frequency)| frequency > 0);
    let codes: Vec<i16> = present().map(|(distance, _)| distance as i16).collect();
    let frequencies = present().map(|(_, &frequency)| frequency).collect();
    (codes.len() >= 2).then(|| CodingTable::new(Table { codes, frequencies, point_offsets: vec![] }))
}

/// Reads back `count` values that lie between `low` and `high`.
pub fn decode(stored: &StoredIntegers, count: u64, low: i32, high: i32) -> Result<Integers, FormatError> {
    let mut reader = Reader::new(SECTION, &stored.0);
    let form = reader.u8("form")?;
    let least = reader.zigzag("lowest value", i32::MIN.into(), i32::MAX.into())?;
    let values = match form {
        CONSTANT => Integers::Constant(least as i32),
        PACKED => Integers::Each(decode_packed(&mut reader, count, least)?),
        CODED => Integers::Each(decode_coded(&mut reader, count, least, stored.0.len() as u64)?),
        other => return Err(reader.invalid("form", 0, other, "0, 1 or 2")),
    };
    reader.end()?;
    if let Some((smallest, largest)) = values.range()
        && (smallest < low || largest > high)
    {
        return Err(reader.invalid("values", 0, format!("{smallest} to {largest}"), format!("{low} to {high}")));
    }
    Ok(values)
}

fn decode_packed(reader: &mut Reader<'_>, count: u64, least: i64) -> Result<Vec<i32>, FormatError> {
    let offset = reader.position();
    let width = reader.u8("width")?;
    if !(1..=32).contains(&width) {
        return Err(reader.invalid("width", offset, width, "1 to 32"));
    }
    let bits = count.checked_mul(width.into());
    let length = bits.map_or(u64::MAX, |bits| bits.div_ceil(8));
    let offset = reader.position();
    let mut bytes = reader.take("packed values", length)?.iter();
    let mut values = Vec::with_capacity(count as usize); // at most eight items a byte that is there
    let mut pending = 0_u64;
    let mut available = 0;
    for _ in 0..count {
        while available < width {
            pending |= u64::from(*bytes.next().expect("the length was computed for this")) << available;
            available += 8;
        }
        let distance = pending & ((1 << width) - 1);
        pending >>= width;
        available -= width;
        match i32::try_from(least + distance as i64) {
            Ok(value) => values.push(value),
            Err(_) => return Err(reader.invalid("packed values", offset, least + distance as i64, "32 bits")),
        }
    }
    Ok(values)
}

fn decode_coded(reader: &mut Reader<'_>, count: u64, least: i64, stored: u64) -> Result<Vec<i32>, FormatError> {
    let limit = stored * ITEMS_PER_BYTE;
    if count > limit {
        let field = "coded values";
        return Err(FormatError::TooLarge { section: SECTION, field, offset: 0, value: count, limit });
    }
    let offset = reader.position();
    let span = reader.count("span", limits::TABLE_POSITIONS)?;
    let mut frequencies = Vec::with_capacity(span);
    for _ in 0..span {
        frequencies.push(reader.varint("frequency", u64::from(TOTAL) - 1)? as u16);
    }
    let total: u32 = frequencies.iter().copied().map(u32::from).sum();
    let table = (total == TOTAL).then(|| coding_table(&frequencies)).flatten();
    let Some(table) = table else {
        return Err(reader.invalid("frequencies", offset, format!("a sum of {total}"), TOTAL));
    };
    let mut state = reader.u32("state")?;
    let mut values = Vec::with_capacity(count as usize);
    for _ in 0..count {
        let slot = state % TOTAL;
        let position = table.position_of_slot(slot);
        let (first_slot, slots) = table.interval(position);
        state = (state / TOTAL) * slots + slot - first_slot;
        if state < STATE_LOW {
            state = state << 16 | u32::from(reader.u16("words")?);
        }
        let Ok(value) = i32::try_from(least + i64::from(table.code(position))) else {
            return Err(reader.invalid("coded values", offset, least, "32 bits"));
        };
        values.push(value);
    }
    if state != STATE_LOW {
        return Err(reader.invalid("state", offset, state, format!("{STATE_LOW} at the end")));
    }
    Ok(values)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn there_and_back(values: &[i32]) -> usize {
        let stored = encode(values);
        let decoded = decode(&stored, values.len() as u64, i32::MIN, i32::MAX).expect("just written");
        assert!(values.iter().enumerate().all(|(index, &value)| decoded.get(index) == value));
        stored.0.len()
    }

    #[test]
    fn the_examples_of_the_specification_hold() {
        let decode = |bytes: &[u8], count| decode(&StoredIntegers(bytes.to_vec()), count, -10, 10);
        assert_eq!(decode(&[0, 5], 1 << 40), Ok(Integers::Constant(-3)));
        assert_eq!(decode(&[1, 0x0a, 2, 0x18], 4), Ok(Integers::Each(vec![5, 7, 6, 5])));
        let coded = [2, 0, 2, 0x80, 0x18, 0x80, 8, 0, 0x64, 5, 0];
        assert_eq!(decode(&coded, 2), Ok(Integers::Each(vec![0, 1])));
    }

    #[test]
    fn extremes_come_back() {
        there_and_back(&[]);
        there_and_back(&[5]);
        there_and_back(&[i32::MIN, i32::MAX, 0]);
        assert_eq!(there_and_back(&[-3; 100_000]), 2, "a constant array costs two bytes");
    }

    #[test]
    fn skewed_values_cost_about_their_entropy() {
        let values: Vec<i32> = (0..8000).map(|index| i32::from(index % 16 == 0)).collect();
        let bytes = there_and_back(&values); // 0.337 bits each
        assert!((337..360).contains(&bytes), "{bytes}");
    }

    #[test]
    fn a_value_out_of_range_is_an_error() {
        assert!(decode(&encode(&[0, 9]), 2, 0, 8).expect_err("9 is over 8").to_string().contains("0 to 9"));
    }

    #[test]
    fn a_huge_count_is_an_error_before_memory_is_taken() {
        for values in [vec![0, 1, 1, 0], (0..8000).map(|index| i32::from(index % 16 == 0)).collect()] {
            assert!(decode(&encode(&values), u64::MAX, 0, 9).is_err());
        }
    }

    proptest! {
        #[test]
        fn any_values_come_back(values: Vec<i32>) {
            there_and_back(&values);
        }

        #[test]
        fn small_values_come_back(values in prop::collection::vec(-20..40, 0..2000)) {
            there_and_back(&values);
        }

        #[test]
        fn no_bytes_make_it_panic(bytes: Vec<u8>, form in 0_u8..3, count in 0_u64..1000) {
            let bytes = [&[form], &bytes[..]].concat();
            let _ = decode(&StoredIntegers(bytes), count, -100, 100);
        }
    }
}
