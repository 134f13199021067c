//! How an earlier variant coded the same tensor's differences: the order of its elements, and raw bits and table of each run.
//!
//! The order follows the base, which is the same, so that a run has the same elements in both variants, and what suited them
//! then suits them now as long as they changed about as much.

use std::ops::Range;

use super::run::RUN_ELEMENTS;
use super::{DifferenceChoice, FEW_LANES};
use crate::codec::difference::Classes;
use crate::codec::integers::Integers;
use crate::decode::PreparedPart;
use crate::decode::prepared::{Difference, Symbols};
use crate::pack::symbols::RunLayout;
use crate::tensor::TensorInfo;

/// A strip that takes so many times what it took, and [`CHANCE_BYTES`], has changed in another way than it did.
const MOST_TIMES: f64 = 1.05;
/// A part that takes less than so many times what it took is nearer to the base than the earlier one: another way suits it.
const LEAST_TIMES: f64 = 0.8;
/// Bits per element below which changes are rare, and which runs have them a matter of chance: each run chooses its table.
const RARE_BITS: f64 = 0.5;
/// Bytes by which two strips that changed alike may differ, however short they are.
const CHANCE_BYTES: f64 = 32.0;

/// An earlier variant's differences of one tensor.
#[derive(Debug)]
pub struct KnownDifferences {
    part: PreparedPart,
    /// For each table of the part, its number in the encoder's pool.
    numbers: Vec<usize>,
}

impl KnownDifferences {
    /// Those of a part. `numbers` has for each of its tables the number in the encoder's pool. `None` where the part has no
    /// differences, or has runs that are not as this encoder makes them.
    pub fn new(tensor: &TensorInfo, part: PreparedPart, numbers: Vec<usize>) -> Option<Self> {
        let Symbols { run_elements, runs_per_strip, .. } = part.based()?.difference.as_ref()?.symbols;
        let layout = RunLayout::of_runs(tensor.elements() as usize, RUN_ELEMENTS);
        let is_ours = (run_elements, runs_per_strip) == (layout.run_elements, layout.runs_per_strip);
        (is_ours && !numbers.is_empty()).then_some(Self { part, numbers })
    }

    fn difference(&self) -> &Difference {
        let difference = self.part.based().and_then(|based| based.difference.as_ref());
        difference.expect("a part without differences is not made into this")
    }

    /// The parameters they were coded with.
    pub fn choice(&self) -> DifferenceChoice {
        let Difference { classes, zero_bits, .. } = self.difference();
        DifferenceChoice {
            class_shift: classes.shift as u8,
            by_row: matches!(classes.offsets, Integers::Each(_)),
            zero_bits: *zero_bits as u8,
            has_few_lanes: self.lanes() <= FEW_LANES,
        }
    }

    /// The order of the elements.
    pub(super) fn classes(&self) -> &Classes {
        &self.difference().classes
    }

    pub(super) fn lanes(&self) -> usize {
        self.difference().symbols.lanes
    }

    /// Raw bits and table of each of these runs.
    pub(super) fn tables_of(&self, runs: Range<usize>) -> Vec<(u8, usize)> {
        let symbols = &self.difference().symbols;
        let of_run = |run| (symbols.stored_raw_bits(run).0 as u8, self.numbers[symbols.table_number_of_run(run)]);
        runs.map(of_run).collect()
    }

    /// Whether the runs of a strip are likely to have as many changes as they had.
    pub(super) fn suits_each_run(&self, strip: usize, elements: usize) -> bool {
        8.0 * self.strip_bytes(strip) as f64 >= RARE_BITS * elements as f64
    }

    /// Bytes that a strip took.
    pub(super) fn strip_bytes(&self, strip: usize) -> usize {
        let range = self.part.strip_range(strip);
        (range.end - range.start) as usize
    }

    /// Bytes that all strips took.
    pub fn bytes(&self) -> u64 {
        self.part.body_bytes()
    }
}

/// Whether strips that took `then` bytes, or would take them coded in another way, and take `now` are hardly longer.
pub(super) fn is_as_short(now: usize, then: usize) -> bool {
    now as f64 <= MOST_TIMES * then as f64 + CHANCE_BYTES
}

/// Whether strips that took `then` bytes and take `now` have changed about as much.
pub(super) fn is_alike(now: usize, then: usize) -> bool {
    is_as_short(now, then) && now as f64 + CHANCE_BYTES >= LEAST_TIMES * then as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn strips_changed_alike_where_they_take_about_as_much() {
        assert!([80_000, 100_000, 105_000].iter().all(|&now| is_alike(now, 100_000)));
        assert!([79_000, 106_000].iter().all(|&now| !is_alike(now, 100_000)));
        assert!(is_as_short(0, 100_000) && is_alike(30, 0), "chance moves short strips by more");
    }
}
