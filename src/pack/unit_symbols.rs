//! Integers in a tensor's bytes as symbols, see `codec::units`.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;

use super::entropy_model::{FittedTable, StreamKind};
use super::histogram::Histogram;
use super::split_symbols::ExactSymbols;
use super::symbols::{Placed, RunLayout, Symbols};
use crate::codec::units::read_units;
use crate::format::limits::TABLE_POSITIONS;
use crate::format::part::Coding;
use crate::format::units::UnitsInfo;
use crate::tensor::TensorInfo;

/// How a tensor's bytes are taken for units.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct UnitSplit {
    /// Bits of a unit.
    pub unit_bits: u32,
    /// Whether numbers are in two's complement: symbols near zero then stand for both signs.
    pub is_signed: bool,
    /// Raw bits below every symbol.
    pub raw_bits: u32,
    /// Whether symbols stand for listed values.
    pub has_values: bool,
    /// Whether numbers are added to the unit before them.
    pub has_differences: bool,
}

impl UnitSplit {
    /// Units whose numbers are listed, if they are few enough. `has_differences` asks for the differences of neighbours.
    pub fn listed(bytes: &[u8], unit_bits: u32, has_differences: bool, layout: RunLayout) -> Option<Self> {
        let split = Self { unit_bits, is_signed: false, raw_bits: 0, has_values: true, has_differences };
        let mut numbers = BTreeSet::new();
        for run in 0..layout.runs() {
            numbers_of_run(split, bytes, layout, run, |number| {
                if numbers.len() as u64 <= TABLE_POSITIONS {
                    numbers.insert(number);
                }
            });
            if numbers.len() as u64 > TABLE_POSITIONS {
                return None;
            }
        }
        Some(split)
    }

    /// Units whose symbols are their upper bits, with as few raw bits as leave no more symbols than a table has.
    pub fn numbers(bytes: &[u8], unit_bits: u32, is_signed: bool) -> Self {
        let mut split = Self { unit_bits, is_signed, raw_bits: 0, has_values: false, has_differences: false };
        let (mut low, mut high) = (i64::MAX, i64::MIN);
        read_units(bytes, unit_bits, |unit| {
            low = low.min(split.signed(unit));
            high = high.max(split.signed(unit));
        });
        let fits = |raw_bits: u32| {
            let (low, high) = (low >> raw_bits, high >> raw_bits);
            // All 64 of six bits come close: the rarest become exceptions.
            let are_few = high.abs_diff(low) <= TABLE_POSITIONS + 2;
            are_few && i16::try_from(low).is_ok() && i16::try_from(high).is_ok()
        };
        split.raw_bits =
            (0..unit_bits.min(56)).find(|&raw_bits| low > high || fits(raw_bits)).unwrap_or(unit_bits.min(56));
        split
    }

    /// A unit as a number with a sign, where it has one.
    fn signed(self, unit: u64) -> i64 {
        let beside = 64 - self.unit_bits;
        if self.is_signed || self.unit_bits == 64 {
            (unit << beside).cast_signed() >> beside
        } else {
            unit.cast_signed()
        }
    }

    /// The layout of a tensor's units: the rows of its bytes, joined or cut as others are, in whole bytes.
    pub fn layout(tensor: &TensorInfo, unit_bits: u32) -> RunLayout {
        let unit_bytes = u64::from(unit_bits.div_ceil(8));
        let rows = tensor.shape.first().copied().unwrap_or(1).max(1);
        let rows = if (tensor.length_bytes / unit_bytes).is_multiple_of(rows) { rows } else { 1 };
        let layout = RunLayout::of_shape(&[rows, tensor.length_bytes / unit_bytes / rows], None);
        if unit_bits < 8 { layout.of_pairs() } else { layout }
    }
}

/// Gives the numbers of a run, differences taken where the split has them.
#[inline(always)]
fn numbers_of_run(split: UnitSplit, bytes: &[u8], layout: RunLayout, run: usize, mut take: impl FnMut(u64)) {
    let bytes_of = |units: Range<usize>| {
        let bits = split.unit_bits as usize;
        &bytes[units.start * bits / 8..units.end * bits / 8]
    };
    let units = layout.run_range(run);
    if !split.has_differences {
        return read_units(bytes_of(units), split.unit_bits, take);
    }
    let mut before = 0;
    if !run.is_multiple_of(layout.runs_per_strip) {
        read_units(bytes_of(units.start - 1..units.start), split.unit_bits, |unit| before = unit);
    }
    let mask = u64::MAX >> (64 - split.unit_bits);
    read_units(bytes_of(units), split.unit_bits, |unit| {
        take(unit.wrapping_sub(before) & mask);
        before = unit;
    });
}

/// Integers in a tensor's bytes, taken apart.
pub struct UnitSymbols<'a> {
    bytes: &'a [u8],
    layout: RunLayout,
    split: UnitSplit,
    /// Listed values, the most frequent first, and the symbol of each.
    values: Vec<u64>,
    symbol_of: BTreeMap<u64, i32>,
}

impl<'a> UnitSymbols<'a> {
    /// The units of `bytes` split as told.
    pub fn new(tensor: &TensorInfo, bytes: &'a [u8], split: UnitSplit) -> Self {
        let layout = UnitSplit::layout(tensor, split.unit_bits);
        let mut counts: BTreeMap<u64, u64> = BTreeMap::new();
        for run in 0..if split.has_values { layout.runs() } else { 0 } {
            numbers_of_run(split, bytes, layout, run, |number| *counts.entry(number).or_default() += 1);
        }
        let mut values: Vec<u64> = counts.keys().copied().collect();
        values.sort_by_key(|value| std::cmp::Reverse(counts[value])); // stable: equals stay in order
        let symbol_of = (0..).zip(&values).map(|(symbol, &value)| (value, symbol)).collect();
        Self { bytes, layout, split, values, symbol_of }
    }

    fn symbol(&self, number: u64) -> i32 {
        match self.split.has_values {
            true => self.symbol_of[&number],
            false => (self.split.signed(number) >> self.split.raw_bits) as i32,
        }
    }
}

impl ExactSymbols for UnitSymbols<'_> {
    fn coding(&self) -> Coding {
        Coding::Units(UnitsInfo {
            unit_bits: self.split.unit_bits as u8,
            raw_bits: self.split.raw_bits as u8,
            has_differences: self.split.has_differences,
            values: self.values.clone(),
        })
    }
}

impl Symbols for UnitSymbols<'_> {
    fn layout(&self) -> RunLayout {
        self.layout
    }

    fn kind(&self) -> StreamKind {
        match self.split.has_values {
            true => StreamKind::Listed,
            false => StreamKind::Units { bits: self.split.unit_bits as u8, raw_bits: self.split.raw_bits as u8 },
        }
    }

    fn raw_bits(&self) -> u32 {
        self.split.raw_bits
    }

    fn nearest(&self, run: usize, symbols: &mut Vec<i32>) {
        numbers_of_run(self.split, self.bytes, self.layout, run, |number| symbols.push(self.symbol(number)));
    }

    /// A quarter octave of spread, apart for symbols around another mean: tables that are to serve both serve neither.
    fn class(&self, run: &Histogram) -> i32 {
        let (mut sum, mut squares) = (0.0, 0.0);
        for (code, count) in run.occurring() {
            sum += f64::from(code) * count as f64;
            squares += f64::from(code).powi(2) * count as f64;
        }
        let total = run.symbols().max(1) as f64;
        let variance = (squares / total - (sum / total).powi(2)).max(0.0);
        let around = (sum / total / AROUND).round() as i32;
        around * SPREADS + (2.0 * (variance + 1.0 / 64.0).log2()).round() as i32
    }

    fn place(&self, runs: Range<usize>, tables: &[[&FittedTable; 2]]) -> Placed {
        let mut placed = Placed::default();
        let raw_mask = !(u64::MAX << self.split.raw_bits);
        let number_bytes = self.split.unit_bits.div_ceil(8) as usize;
        for (run, [table, _]) in runs.zip(tables) {
            numbers_of_run(self.split, self.bytes, self.layout, run, |number| {
                let symbol = self.symbol(number);
                placed.positions.push(table.position(symbol).unwrap_or_else(|| {
                    let value = number.to_le_bytes()[..number_bytes].to_vec();
                    placed.exceptions.push((placed.symbols.len() as u16, value));
                    table.filler()
                }));
                placed.symbols.push(symbol);
                if self.split.raw_bits > 0 {
                    placed.raw.push(number & raw_mask);
                }
            });
        }
        placed
    }
}

/// Symbols from one mean to the next that has tables of its own, and classes of spread around each.
const AROUND: f64 = 16.0;
const SPREADS: i32 = 64;
