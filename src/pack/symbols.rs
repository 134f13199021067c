//! A tensor as a sequence of symbols: where its runs and strips begin, and what an encoder asks of it.

use std::ops::Range;

use super::counting::sum_of_squares;
use super::entropy_model::{FittedTable, StreamKind};
use super::histogram::Histogram;
use crate::format::limits::STRIP_SYMBOLS;
use crate::format::strip::LANES;

/// Symbols from which on a strip has all 32 lanes, as vector kernels want: a full one has, even where long runs leave it shorter.
const FULL_STRIP: usize = 49_152;
/// Symbols for which a smaller strip gets one more lane.
const SYMBOLS_PER_LANE: usize = 3072;

/// Where runs and strips of a tensor begin.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RunLayout {
    /// Elements of the tensor.
    pub elements: usize,
    /// Elements of one run.
    pub run_elements: usize,
    /// Runs of one strip.
    pub runs_per_strip: usize,
    /// Lanes of a strip. Each costs about three bytes of a strip's length, so small strips have few: a lane for every 3,072
    /// symbols, which keeps that to a 120th of a bit per symbol.
    pub lanes: usize,
}

impl RunLayout {
    /// Runs for a tensor of this shape: rows of its first axis where they have a useful length, joined where they are short
    /// and cut where they are long. With a `group`, rows that are a multiple of it are cut into runs of that length.
    pub fn of_shape(shape: &[u64], group: Option<usize>) -> Self {
        let elements = shape.iter().product::<u64>() as usize;
        let row = match shape.len() {
            0 | 1 => 1,
            _ => shape[1..].iter().product::<u64>() as usize,
        };
        let grouped = group.filter(|group| row.is_multiple_of(*group));
        let run_elements = match row {
            _ if let Some(group) = grouped => group,
            0..64 => row.max(1) * 256_usize.div_ceil(row.max(1)),
            64..=16_384 => row,
            // Cut evenly, so that no short rest is left in every row.
            _ => row.div_ceil(row.div_ceil(16_384)),
        };
        Self::of_runs(elements, run_elements)
    }

    /// Runs of so many elements.
    pub fn of_runs(elements: usize, run_elements: usize) -> Self {
        let runs_per_strip = (STRIP_SYMBOLS as usize / run_elements).max(1);
        let strip_symbols = elements.min(run_elements * runs_per_strip);
        let lanes = match strip_symbols {
            FULL_STRIP.. => LANES,
            few => 1 << (few / SYMBOLS_PER_LANE).max(1).ilog2(),
        };
        Self { elements, run_elements, runs_per_strip, lanes }
    }

    /// The layout of this many elements in runs and strips of the same lengths.
    pub fn of_elements(&self, elements: usize) -> Self {
        Self { elements, ..*self }
    }

    /// The layout of pairs as one of their halves: the same runs, so that none begins in the middle of a pair.
    pub fn of_pairs(&self) -> Self {
        let (elements, run_elements) = (2 * self.elements, 2 * self.run_elements);
        Self::of_runs(elements, run_elements)
    }

    /// Number of runs.
    pub fn runs(&self) -> usize {
        self.elements.div_ceil(self.run_elements)
    }

    /// Elements of a run.
    pub fn run_range(&self, run: usize) -> Range<usize> {
        run * self.run_elements..((run + 1) * self.run_elements).min(self.elements)
    }

    /// Number of strips.
    pub fn strips(&self) -> usize {
        self.runs().div_ceil(self.runs_per_strip)
    }

    /// Elements of a strip.
    pub fn strip_elements(&self, strip: usize) -> usize {
        let runs = self.strip_runs(strip);
        (runs.end * self.run_elements).min(self.elements) - runs.start * self.run_elements
    }

    /// Runs of a strip.
    pub fn strip_runs(&self, strip: usize) -> Range<usize> {
        strip * self.runs_per_strip..((strip + 1) * self.runs_per_strip).min(self.runs())
    }
}

/// A tensor as a sequence of symbols with raw bits below them.
pub trait Symbols: Sync {
    /// Layout of the runs.
    fn layout(&self) -> RunLayout;

    /// Which tables fit.
    fn kind(&self) -> StreamKind;

    /// The kind of the second quantizer's tables, where the trellis has tables of its own for it.
    fn second_kind(&self) -> Option<StreamKind> {
        None
    }

    /// Raw bits per symbol.
    fn raw_bits(&self) -> u32;

    /// Low raw bits that are zero in every element of a run, and not stored.
    fn zero_bits(&self, _run: usize) -> u32 {
        0
    }

    /// Adds the symbol of every element of a run, each as near to its value as a symbol can be.
    fn nearest(&self, run: usize, symbols: &mut Vec<i32>);

    /// The class of a run with these nearest symbols: a quarter octave of scale.
    fn class(&self, run: &Histogram) -> i32;

    /// What an offset of 1 means in a run, in weight units.
    fn unit(&self, _run: usize) -> f32 {
        1.0
    }

    /// What the unit of a run is multiplied with for each of its elements, where they are not alike.
    fn column_units(&self) -> Option<&[f32]> {
        None
    }

    /// The squared error of a run that is off by so much at each element, in squared weight units.
    fn squared_error(&self, run: usize, offsets: &[f32]) -> f64 {
        let squares = match self.column_units() {
            Some(units) => {
                let offsets: Vec<f32> = offsets.iter().zip(units).map(|(offset, unit)| offset * unit).collect();
                sum_of_squares(&offsets)
            }
            None => sum_of_squares(offsets),
        };
        f64::from(self.unit(run)).powi(2) * squares
    }

    /// Chooses the final symbols of consecutive runs, given the tables of each (for the trellis' two quantizers, else twice
    /// the same).
    fn place(&self, runs: Range<usize>, tables: &[[&FittedTable; 2]]) -> Placed;
}

/// The final symbols of consecutive runs.
#[derive(Clone, Debug, Default)]
pub struct Placed {
    /// Table positions.
    pub positions: Vec<u8>,
    /// Raw bits below each symbol; empty where there are none.
    pub raw: Vec<u64>,
    /// Which of the trellis' two quantizers each symbol belongs to; empty without a trellis.
    pub quantizers: Vec<u8>,
    /// The symbols.
    pub symbols: Vec<i32>,
    /// How far each value lies from its point before the table's offsets, in steps; empty where symbols are exact.
    pub offsets: Vec<f32>,
    /// Index in the strip and value of every exception, in order.
    pub exceptions: Vec<(u16, Vec<u8>)>,
}

impl Placed {
    /// Which table of a run's two a symbol is coded with.
    pub fn quantizer(&self, index: usize) -> usize {
        self.quantizers.get(index).copied().map_or(0, usize::from)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_part_of_several_strips_has_all_lanes() {
        for columns in 1..70_000 {
            let layout = RunLayout::of_shape(&[70_000, columns], None);
            assert!(layout.strips() > 1 && layout.lanes == LANES, "{columns} columns: {} lanes", layout.lanes);
        }
    }

    #[test]
    fn a_small_part_has_few_lanes() {
        let lanes = |rows| RunLayout::of_shape(&[rows, 64], None).lanes;
        assert_eq!([1, 95, 96, 767, 768].map(lanes), [1, 1, 2, 8, 32]);
    }

    #[test]
    fn rows_that_are_whole_groups_are_cut_into_them() {
        let run = |columns| RunLayout::of_shape(&[100, columns], Some(128)).run_elements;
        assert_eq!([128, 384, 200, 4096].map(run), [128, 128, 200, 128]);
    }
}
