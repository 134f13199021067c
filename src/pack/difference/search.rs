//! Which parameters code a tensor's differences shortest, by a few of its strips.

use super::pair::row_octaves;
use super::run::RUN_ELEMENTS;
use super::{
    CountedDifferences, DifferenceChoice, DifferencePart, FEW_LANES, Facts, Pair, common_zero_bits, spread_strips,
};
use crate::pack::symbols::RunLayout;
use crate::tensor::Dtype;

/// Strips looked at to choose parameters: one of so many, and so many at most.
const SAMPLED_STRIPS_OF: usize = 4;
const SAMPLED_STRIPS: usize = 4;
/// Bits per element that offsets by row, or finer classes, must save.
const CLASS_GAIN: f64 = 0.004;
/// Bits per element below which the states of all lanes would cost more than symbols do.
const FEW_LANES_BITS: f64 = 0.05;

/// A search for the parameters that code a tensor shortest.
pub struct DifferenceSearch<'a> {
    pair: Pair<'a>,
    mantissa_bits: u8,
    /// Whether classes may follow how much each row changed.
    follows_rows: bool,
    facts: Facts,
    strips: usize,
    /// Strips that are looked at.
    sampled: Vec<usize>,
    best: DifferenceChoice,
    /// Bits per element with the best so far.
    least: f64,
}

impl<'a> DifferenceSearch<'a> {
    /// Begins with the plainest parameters. `None` where differences are not coded: elements of other widths.
    pub fn new(pair: Pair<'a>) -> Option<Self> {
        let width = match pair.tensor.dtype.bits() {
            Some(bits @ (8 | 16 | 32)) => bits as u8,
            _ => return None,
        };
        let mantissa_bits = match pair.tensor.dtype {
            Dtype::BF16 => 7,
            Dtype::F16 => 10,
            Dtype::F32 => 23,
            Dtype::F8_E4M3 => 3,
            Dtype::F8_E5M2 => 2,
            _ => width - 1,
        };
        let best = DifferenceChoice {
            class_shift: mantissa_bits,
            by_row: false,
            zero_bits: common_zero_bits(pair),
            has_few_lanes: false,
        };
        let follows_rows = pair.tensor.shape.len() >= 2 && pair.is_float();
        let facts = Facts::of(pair, false);
        let strips = RunLayout::of_runs(pair.elements(), RUN_ELEMENTS).strips();
        let sampled = spread_strips(strips, strips.div_ceil(SAMPLED_STRIPS_OF).min(SAMPLED_STRIPS));
        let mut search = Self { pair, mantissa_bits, follows_rows, facts, strips, sampled, best, least: 0.0 };
        search.least = search.cost(best);
        Some(search)
    }

    /// Tries all others.
    #[must_use]
    pub fn refined(mut self) -> Self {
        if self.follows_rows {
            self.facts.row_octaves = row_octaves(self.pair);
            self.attempt(DifferenceChoice { by_row: true, ..self.best });
        }
        for finer in [1, 2] {
            let class_shift = self.mantissa_bits.saturating_sub(finer);
            if !self.attempt(DifferenceChoice { class_shift, ..self.best }) {
                break;
            }
        }
        self
    }

    /// Takes parameters that are better than the best so far; whether these are.
    fn attempt(&mut self, choice: DifferenceChoice) -> bool {
        let bits = self.cost(choice);
        let is_better = bits < self.least - CLASS_GAIN;
        if is_better {
            (self.best, self.least) = (choice, bits);
        }
        is_better
    }

    /// Bits of the part with tables of its own and the best parameters so far.
    pub fn bits(&self) -> f64 {
        let lanes = if self.has_few_lanes() { FEW_LANES as f64 } else { 32.0 };
        self.least * self.pair.elements() as f64 + self.strips as f64 * 32.0 * lanes
    }

    /// The best parameters so far, and the symbols that they give.
    pub fn found(&self) -> (DifferenceChoice, CountedDifferences) {
        let choice = DifferenceChoice { has_few_lanes: self.has_few_lanes(), ..self.best };
        let part = DifferencePart::with_facts(self.pair, choice, &self.facts);
        (choice, part.count_some())
    }

    fn has_few_lanes(&self) -> bool {
        self.least < FEW_LANES_BITS
    }

    /// Bits per element of the sampled strips with these parameters.
    fn cost(&self, choice: DifferenceChoice) -> f64 {
        let part = DifferencePart::with_facts(self.pair, choice, &self.facts);
        let (classes, raw_bits) = part.count(&self.sampled);
        let elements: usize = self.sampled.iter().map(|&strip| part.layout.strip_elements(strip)).sum();
        let offsets =
            if choice.by_row { 8.0 * part.offsets().0.len() as f64 / self.pair.elements() as f64 } else { 0.0 };
        (classes.bits(&classes.fit()) + raw_bits) / elements.max(1) as f64 + offsets
    }
}
