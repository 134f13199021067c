//! A table ready for coding: cumulative frequencies, slot lookup, reconstruction points.

use std::borrow::Borrow;
use std::num::NonZeroU16;
use std::sync::OnceLock;

#[cfg(test)]
use constriction::stream::model::DecoderModel;
use constriction::stream::model::{EncoderModel, EntropyModel};

use super::decoding_table::{DecodingTable, SlotTable};
use crate::format::table::{POINT_UNIT, TOTAL, Table};

/// Bits of a frequency.
pub const PRECISION: usize = 12;

/// An entropy table with everything that coding looks up. Built once from a checked [`Table`].
#[derive(Clone, Debug)]
pub struct CodingTable {
    table: Table,
    /// First slot of each position, and 4096 at the end.
    cumulative: Vec<u16>,
    /// The position that each of the 4096 slots belongs to.
    position_of_slot: Box<[u8; TOTAL as usize]>,
    /// Reconstruction point of each position in steps.
    points: Vec<f32>,
    /// Laid out when a fast decoder first asks: most archives' tables meet only one kind.
    decoding: OnceLock<Box<DecodingTable>>,
    slots: OnceLock<Box<SlotTable>>,
}

impl CodingTable {
    /// Prepares a table whose frequencies sum to 4096, as [`Table::parse`] and the encoder guarantee.
    pub fn new(table: Table) -> Self {
        let mut cumulative = Vec::with_capacity(table.frequencies.len() + 1);
        let mut position_of_slot = Box::new([0; TOTAL as usize]);
        let mut slot = 0;
        for (position, &frequency) in table.frequencies.iter().enumerate() {
            cumulative.push(slot);
            let next = slot + frequency;
            position_of_slot[usize::from(slot)..usize::from(next)].fill(position as u8);
            slot = next;
        }
        assert_eq!(u32::from(slot), TOTAL, "frequencies of a table sum to 4096");
        cumulative.push(slot);
        let points = (table.codes.iter().enumerate())
            .map(|(position, &code)| {
                let offset = table.point_offsets.get(position).copied().unwrap_or(0);
                f32::from(code) + f32::from(offset) / POINT_UNIT // exact: fewer than 24 bits
            })
            .collect();
        let (decoding, slots) = (OnceLock::new(), OnceLock::new());
        Self { table, cumulative, position_of_slot, points, decoding, slots }
    }

    /// The table as vector decoders look it up.
    pub fn decoding(&self) -> &DecodingTable {
        self.decoding.get_or_init(|| Box::new(DecodingTable::new(self)))
    }

    /// The table as decoders that gather look it up.
    pub fn slots(&self) -> &SlotTable {
        self.slots.get_or_init(|| Box::new(SlotTable::new(self)))
    }

    /// The table as stored.
    pub fn table(&self) -> &Table {
        &self.table
    }

    /// Number of coded positions.
    pub fn positions(&self) -> usize {
        self.table.codes.len()
    }

    /// The code of a position.
    #[inline]
    pub fn code(&self, position: u8) -> i16 {
        self.table.codes[usize::from(position)]
    }

    /// Reconstruction points of all positions, in steps.
    pub fn points(&self) -> &[f32] {
        &self.points
    }

    /// How far the reconstruction point of a position lies from its code, in steps.
    #[inline]
    pub fn point_offset(&self, position: u8) -> f32 {
        let offset = self.table.point_offsets.get(usize::from(position)).copied().unwrap_or(0);
        f32::from(offset) / POINT_UNIT
    }

    /// The position that `slot` (0 to 4095) belongs to.
    #[inline]
    pub fn position_of_slot(&self, slot: u32) -> u8 {
        self.position_of_slot[(slot % TOTAL) as usize]
    }

    /// First slot and number of slots of a position.
    #[inline]
    pub fn interval(&self, position: u8) -> (u32, u32) {
        let position = usize::from(position);
        (self.cumulative[position].into(), self.table.frequencies[position].into())
    }
}

// The same table as constriction sees it: symbols are positions. It decodes in tests only, as the yardstick.
impl EntropyModel<PRECISION> for &CodingTable {
    type Symbol = u8;
    type Probability = u16;
}

impl EncoderModel<PRECISION> for &CodingTable {
    #[inline]
    fn left_cumulative_and_probability(&self, symbol: impl Borrow<u8>) -> Option<(u16, NonZeroU16)> {
        let position = usize::from(*symbol.borrow());
        let frequency = NonZeroU16::new(*self.table.frequencies.get(position)?)?;
        Some((self.cumulative[position], frequency))
    }
}

#[cfg(test)]
impl DecoderModel<PRECISION> for &CodingTable {
    fn quantile_function(&self, quantile: u16) -> (u8, u16, NonZeroU16) {
        let position = self.position_of_slot(quantile.into());
        let frequency = self.table.frequencies[usize::from(position)];
        let frequency = NonZeroU16::new(frequency).expect("a checked table has no zero frequency");
        (position, self.cumulative[usize::from(position)], frequency)
    }
}
