//! A table as fast decoders look it up: padded to 64 positions for byte and word permutations, or one entry per slot.
//!
//! The depth rule (SPEC.md section 5) is what makes the first form possible: no aligned bucket of 32 slots has more than
//! three boundaries inside it, so the position of a slot is the bucket's first position and as many more as it has passed
//! boundaries: three comparisons, none of which waits for another.

use super::coding_table::CodingTable;
use crate::codec::trellis::multiple;
use crate::format::table::{BUCKET, TOTAL};

/// Positions of a padded table.
pub const PADDED: usize = 64;
const BUCKETS: usize = (TOTAL / BUCKET) as usize;
/// Boundaries inside a bucket at most.
pub const BOUNDARIES: usize = 3;

/// What one lookup of a vector decoder needs, each array a whole number of 512-bit registers.
#[derive(Clone, Debug)]
#[repr(C, align(64))]
pub struct DecodingTable {
    /// The position that the first slot of each bucket belongs to.
    pub first: [u8; BUCKETS],
    /// The boundaries inside each bucket, in order: how far into it the last slot before each lies, and 31, behind which
    /// no slot lies, where there are fewer.
    pub before_boundary: [[u8; BUCKETS]; BOUNDARIES],
    /// First slot of each position: cum\[p\].
    pub start: [u16; PADDED],
    /// Slots of each position.
    pub frequency: [u16; PADDED],
    /// All ones where the code of a position is odd, which is what leads a trellis, else 0.
    pub odd: [u16; PADDED],
    /// The code of each position.
    pub codes: [i16; PADDED],
    /// Reconstruction point of each position in steps, where codes are scalar.
    pub points: [f32; PADDED],
    /// Reconstruction points in steps by quantizer, where codes are trellis-coded without raw bits.
    pub trellis_points: [[f32; PADDED]; 2],
}

impl DecodingTable {
    /// Lays a table out for lookups.
    pub fn new(table: &CodingTable) -> Self {
        let positions = table.positions();
        let mut laid_out = Self {
            first: std::array::from_fn(|bucket| table.position_of_slot(bucket as u32 * BUCKET)),
            before_boundary: [[BUCKET as u8 - 1; BUCKETS]; BOUNDARIES],
            start: [0; PADDED],
            frequency: [0; PADDED],
            odd: [0; PADDED],
            codes: [0; PADDED],
            points: [0.0; PADDED],
            trellis_points: [[0.0; PADDED]; 2],
        };
        for position in 0..positions as u8 {
            let (start, slots) = table.interval(position);
            let code = table.code(position);
            let index = usize::from(position);
            let (bucket, within) = ((start / BUCKET) as usize, start % BUCKET);
            if within > 0 {
                let order = usize::from(position - laid_out.first[bucket]) - 1;
                laid_out.before_boundary[order][bucket] = within as u8 - 1;
            }
            laid_out.start[index] = start as u16;
            laid_out.frequency[index] = slots as u16;
            laid_out.codes[index] = code;
            laid_out.points[index] = table.points()[index];
            laid_out.odd[index] = (code as u16 & 1).wrapping_neg();
            for quantizer in 0..2 {
                let multiple = multiple(code.into(), quantizer);
                laid_out.trellis_points[usize::from(quantizer)][index] = multiple as f32 + table.point_offset(position);
            }
        }
        laid_out
    }

    /// The position of a slot, as vector decoders find it.
    #[inline]
    pub fn position_of_slot(&self, slot: u16) -> u8 {
        let (bucket, within) = (usize::from(slot) / BUCKET as usize % BUCKETS, slot as u8 % BUCKET as u8);
        let passed = self.before_boundary.iter().filter(|before| within > before[bucket]).count();
        self.first[bucket] + passed as u8
    }
}

/// One entry per slot, for decoders that gather: position, place within the position's slots, and its frequency.
#[derive(Clone, Debug)]
#[repr(C, align(64))]
pub struct SlotTable(pub [u32; TOTAL as usize]);

impl SlotTable {
    /// Frequency in bits 0 to 11, slot less the position's first slot in bits 12 to 23, position above.
    pub fn new(table: &CodingTable) -> Self {
        assert!(table.positions() <= PADDED, "a table has at most 61 positions");
        Self(std::array::from_fn(|slot| {
            let position = table.position_of_slot(slot as u32);
            let (start, slots) = table.interval(position);
            slots | (slot as u32 - start) << 12 | u32::from(position) << 24
        }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::table::{Table, first_overfull_bucket};
    use proptest::prelude::*;

    /// Frequencies that keep the depth rule: at most four positions of less than a bucket in a row.
    fn tables() -> impl Strategy<Value = CodingTable> {
        prop::collection::vec((1_u16..200, -300_i16..300, any::<i8>()), 2..=61).prop_filter_map("a table", |draws| {
            let mut frequencies: Vec<u16> = draws.iter().map(|&(frequency, ..)| frequency).collect();
            let sum: u16 = frequencies.iter().sum();
            *frequencies.last_mut()? += 4096_u16.checked_sub(sum)?;
            let codes: Vec<i16> =
                draws.iter().enumerate().map(|(index, &(_, code, _))| code * 64 + index as i16).collect();
            let point_offsets = draws.iter().map(|&(.., offset)| offset).collect();
            let fits = first_overfull_bucket(&frequencies).is_none() && frequencies.iter().all(|&slots| slots < 4096);
            fits.then(|| CodingTable::new(Table { codes, frequencies, point_offsets }))
        })
    }

    proptest! {
        #[test]
        fn every_slot_is_found_by_the_boundaries_it_has_passed(table in tables()) {
            let laid_out = DecodingTable::new(&table);
            let slots = SlotTable::new(&table);
            for slot in 0..4096_u16 {
                let position = table.position_of_slot(slot.into());
                prop_assert_eq!(laid_out.position_of_slot(slot), position);
                let (start, frequency) = table.interval(position);
                prop_assert_eq!(slots.0[usize::from(slot)] >> 24, u32::from(position));
                prop_assert_eq!(slots.0[usize::from(slot)] & 0xfff, frequency);
                prop_assert_eq!(slots.0[usize::from(slot)] >> 12 & 0xfff, u32::from(slot) - start);
            }
        }

        #[test]
        fn odd_codes_are_marked(table in tables()) {
            let laid_out = DecodingTable::new(&table);
            for position in 0..table.positions() as u8 {
                let expected = if table.code(position) % 2 == 0 { 0 } else { 0xffff };
                prop_assert_eq!(laid_out.odd[usize::from(position)], expected);
            }
        }
    }
}
