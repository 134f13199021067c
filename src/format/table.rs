//! Integer entropy tables: which codes are coded, how often, and where they reconstruct (SPEC.md section 5; Eq. 57).

use super::bytes::{Reader, Writer};
use super::error::FormatError;
use super::limits;

/// Frequencies are out of this many.
pub const TOTAL: u32 = 4096;
/// Slots per bucket of the depth rule.
pub const BUCKET: u32 = 32;
/// Most symbol boundaries strictly inside one bucket.
pub const BUCKET_BOUNDARIES: usize = 3;
/// A reconstruction point lies at `code + offset / POINT_UNIT`, in steps.
pub const POINT_UNIT: f32 = 256.0;

/// One entropy table. Positions are in the order in which they divide the 4096 slots.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Table {
    /// The code that each position stands for; all different.
    pub codes: Vec<i16>,
    /// How many of the 4096 slots each position has.
    pub frequencies: Vec<u16>,
    /// Per position, how far its reconstruction point lies from its code, in 1/256 step; empty if no point does.
    pub point_offsets: Vec<i8>,
}

impl Table {
    /// Reads one table and checks it, the depth rule included.
    pub fn parse(reader: &mut Reader<'_>) -> Result<Self, FormatError> {
        let start = reader.position();
        let positions = usize::from(reader.u8("table positions")?);
        if !(2..=limits::TABLE_POSITIONS as usize).contains(&positions) {
            return Err(reader.invalid("table positions", start, positions, "2 to 61"));
        }
        let has_points = match reader.u8("table flags")? {
            0 => false,
            1 => true,
            other => return Err(reader.invalid("table flags", start + 1, other, "0 or 1")),
        };
        let mut codes = Vec::with_capacity(positions);
        for _ in 0..positions {
            let offset = reader.position();
            let code = reader.zigzag("table code", i16::MIN.into(), i16::MAX.into())? as i16;
            if codes.contains(&code) {
                return Err(reader.invalid("table code", offset, code, "a code not seen before"));
            }
            codes.push(code);
        }
        let mut frequencies = Vec::with_capacity(positions);
        for _ in 0..positions {
            let offset = reader.position();
            let frequency = reader.varint("table frequency", u64::from(TOTAL) - 1)? as u16;
            if frequency == 0 {
                return Err(reader.invalid("table frequency", offset, 0, "1 to 4095"));
            }
            frequencies.push(frequency);
        }
        let total: u32 = frequencies.iter().copied().map(u32::from).sum();
        if total != TOTAL {
            return Err(reader.invalid("table frequencies", start, format!("a sum of {total}"), TOTAL));
        }
        if let Some(bucket) = first_overfull_bucket(&frequencies) {
            let found = format!("more than {BUCKET_BOUNDARIES} boundaries in bucket {bucket}");
            return Err(reader.invalid("table frequencies", start, found, "the depth rule kept"));
        }
        let mut point_offsets = Vec::new();
        if has_points {
            point_offsets.extend(reader.take("table points", positions as u64)?.iter().map(|&byte| byte as i8));
        }
        Ok(Self { codes, frequencies, point_offsets })
    }

    /// Writes the table.
    pub fn write(&self, writer: &mut Writer) {
        writer.u8(self.codes.len() as u8);
        writer.u8(u8::from(!self.point_offsets.is_empty()));
        for &code in &self.codes {
            writer.zigzag(code.into());
        }
        for &frequency in &self.frequencies {
            writer.varint(frequency.into());
        }
        for &offset in &self.point_offsets {
            writer.u8(offset as u8);
        }
    }
}

/// The first aligned bucket of 32 slots that has more than three symbol boundaries strictly inside it, if any: the depth
/// rule, which bounds a lookup at two comparisons.
pub fn first_overfull_bucket(frequencies: &[u16]) -> Option<u32> {
    let mut boundary = 0;
    let mut bucket = 0;
    let mut inside = 0;
    for &frequency in frequencies {
        boundary += u32::from(frequency);
        if boundary % BUCKET == 0 {
            continue; // a boundary between buckets lies inside none
        }
        if boundary / BUCKET != bucket {
            bucket = boundary / BUCKET;
            inside = 0;
        }
        inside += 1;
        if inside > BUCKET_BOUNDARIES {
            return Some(bucket);
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(table: &Table) -> Result<Table, FormatError> {
        let mut writer = Writer::new();
        table.write(&mut writer);
        Table::parse(&mut Reader::new("index", &writer.into_bytes()))
    }

    #[test]
    fn a_table_comes_back() {
        let plain = Table { codes: vec![0, -3], frequencies: vec![4095, 1], point_offsets: vec![] };
        assert_eq!(parse(&plain), Ok(plain.clone()));
        let pointed = Table { codes: vec![1, 2, -1], frequencies: vec![96, 3000, 1000], point_offsets: vec![-9, 0, 9] };
        assert_eq!(parse(&pointed), Ok(pointed.clone()));
    }

    #[test]
    fn the_example_of_the_specification_holds() {
        let mut writer = Writer::new();
        Table { codes: vec![0, -1, 1], frequencies: vec![2048, 1024, 1024], point_offsets: vec![] }.write(&mut writer);
        assert_eq!(writer.into_bytes(), [3, 0, 0, 1, 2, 0x80, 0x10, 0x80, 8, 0x80, 8]);
    }

    #[test]
    fn four_boundaries_in_a_bucket_are_an_error_and_three_are_not() {
        let three = Table { codes: (0..4).collect(), frequencies: vec![1, 1, 1, 4093], point_offsets: vec![] };
        assert!(parse(&three).is_ok());
        let four = Table { codes: (0..5).collect(), frequencies: vec![1, 1, 1, 1, 4092], point_offsets: vec![] };
        assert!(parse(&four).expect_err("four").to_string().contains("bucket 0"));
        assert_eq!(first_overfull_bucket(&[32, 1, 1, 1, 1, 28, 4032]), Some(1));
        assert_eq!(first_overfull_bucket(&[32, 1, 1, 1, 29, 4032]), None);
        assert_eq!(first_overfull_bucket(&[32, 1, 1, 30, 1, 1, 1, 4029]), None);
    }

    #[test]
    fn tables_that_cannot_code_are_errors() {
        for (codes, frequencies) in [
            (vec![0], vec![4095]),
            (vec![0, 0], vec![2048, 2048]),
            (vec![0, 1], vec![2048, 2047]),
            (vec![0, 1, 2], vec![2048, 0, 2048]),
        ] {
            assert!(parse(&Table { codes, frequencies, point_offsets: vec![] }).is_err());
        }
    }
}
