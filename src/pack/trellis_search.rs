//! The encoder's half of trellis-coded quantization: the Viterbi search for the sequence of codes that is cheapest in
//! squared error plus lambda times the bits of the actual tables.
//!
//! With the rate in the path metric the search includes rate-distortion-optimised rounding. Each lane of a strip has its own
//! path, as in the decoder (`codec::trellis`).

use super::entropy_model::FittedTable;
use crate::codec::trellis::{NEXT_STATE, STATES, code_of, quantizer_of};
use crate::format::strip::LANES;

/// The four residues of a multiple modulo 4, in the order of quantizer and second bit: residue = 2 * bit + quantizer.
const RESIDUES: usize = 4;

/// Finds the multiples of the step for one strip.
///
/// `targets` are the values to be coded in steps, run after run of `run_elements`; `tables` has each run's table for the first
/// quantizer and for the second. Codes stay
/// inside the tables; a target beyond them is the caller's exception. `lambda` is in squared steps per bit.
pub fn search(
    targets: &[f32],
    run_elements: usize,
    tables: &[[&FittedTable; 2]],
    raw_bits: u32,
    lambda: f32,
) -> Vec<i32> {
    let mut multiples = vec![0; targets.len()];
    let prepared: Vec<RunCosts<'_>> = tables.iter().map(|&tables| RunCosts::new(tables, raw_bits, lambda)).collect();
    let mut path = Path::default();
    for lane in 0..LANES {
        path.clear();
        for (run, values) in targets.chunks(run_elements).enumerate() {
            for &target in values.iter().skip(lane).step_by(LANES) {
                path.step(target, &prepared[run]);
            }
        }
        let mut chosen = path.trace().into_iter();
        for run in multiples.chunks_mut(run_elements) {
            for multiple in run.iter_mut().skip(lane).step_by(LANES) {
                *multiple = chosen.next().expect("one step per symbol of the lane");
            }
        }
    }
    multiples
}

/// What the codes of a run cost.
struct RunCosts<'a> {
    tables: [&'a FittedTable; 2],
    raw_bits: u32,
    lambda: f32,
    /// Per quantizer, the least and the greatest target for which all residues have a multiple inside the table.
    bounds: [(f32, f32); 2],
}

impl<'a> RunCosts<'a> {
    fn new(tables: [&'a FittedTable; 2], raw_bits: u32, lambda: f32) -> Self {
        let bounds = [0, 1].map(|quantizer| {
            let (low, high) = tables[quantizer as usize].range();
            let (low, high) = (low << raw_bits, (high << raw_bits) + (1 << raw_bits) - 1);
            let (least, greatest) = (2 * low + quantizer, 2 * high + quantizer);
            ((least + 2) as f32, (greatest - 2) as f32)
        });
        Self { tables, raw_bits, lambda, bounds }
    }

    #[inline]
    fn cost(&self, target: f32, multiple: i32, quantizer: u8) -> f32 {
        let error = target - multiple as f32;
        error * error
            + self.lambda * self.tables[usize::from(quantizer)].bits(code_of(multiple, quantizer) >> self.raw_bits)
    }

    /// The cheapest multiple of one residue: the nearest, or the next one towards zero if its code is so much shorter.
    #[inline]
    fn best(&self, target: f32, residue: usize) -> (i32, f32) {
        let quantizer = (residue & 1) as u8;
        let (least, greatest) = self.bounds[usize::from(quantizer)];
        let inside = target.max(least).min(greatest);
        let residue = residue as i32;
        let nearest = residue + 4 * ((inside - residue as f32) * 0.25).round_ties_even() as i32;
        let mut best = (nearest, self.cost(target, nearest, quantizer));
        let shorter = nearest - 4 * nearest.signum();
        if shorter.abs() < nearest.abs() {
            let cost = self.cost(target, shorter, quantizer);
            if cost < best.1 {
                best = (shorter, cost);
            }
        }
        best
    }
}

/// The best way to every state, symbol after symbol.
#[derive(Default)]
struct Path {
    costs: [f32; STATES],
    /// Per symbol and state, the state before.
    before: Vec<[u8; STATES]>,
    /// Per symbol and residue, the multiple that stands for it.
    multiples: Vec<[i32; RESIDUES]>,
}

impl Path {
    fn clear(&mut self) {
        self.costs = [f32::INFINITY; STATES];
        self.costs[0] = 0.0;
        self.before.clear();
        self.multiples.clear();
    }

    #[inline]
    fn step(&mut self, target: f32, costs: &RunCosts<'_>) {
        let best: [(i32, f32); RESIDUES] = std::array::from_fn(|residue| costs.best(target, residue));
        let mut next = [f32::INFINITY; STATES];
        let mut before = [0; STATES];
        for state in 0..STATES as u8 {
            for bit in 0..2 {
                let residue = usize::from(2 * bit + quantizer_of(state));
                let cost = self.costs[usize::from(state)] + best[residue].1;
                let to = usize::from(NEXT_STATE[usize::from(state)][usize::from(bit)]);
                if cost < next[to] {
                    next[to] = cost;
                    before[to] = state;
                }
            }
        }
        // Only differences matter; without this a long lane would run out of mantissa.
        let least = next.iter().copied().fold(f32::INFINITY, f32::min);
        self.costs = next.map(|cost| cost - least);
        self.before.push(before);
        self.multiples.push(best.map(|(multiple, _)| multiple));
    }

    /// The multiples of the cheapest path.
    fn trace(&self) -> Vec<i32> {
        let mut state = (0..STATES).min_by(|&a, &b| self.costs[a].total_cmp(&self.costs[b])).unwrap_or(0);
        let mut chosen: Vec<i32> = self
            .before
            .iter()
            .zip(&self.multiples)
            .rev()
            .map(|(before, multiples)| {
                let previous = before[state];
                let bit = usize::from(NEXT_STATE[usize::from(previous)][1] == state as u8);
                state = usize::from(previous);
                multiples[2 * bit + usize::from(quantizer_of(previous))]
            })
            .collect();
        chosen.reverse();
        chosen
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::codec::trellis::next_state;
    use crate::pack::entropy_model::Histogram;
    use proptest::prelude::*;

    fn table() -> FittedTable {
        let mut histogram = Histogram::default();
        for code in -20..=20_i32 {
            for _ in 0..=(200 / (1 + code.abs())) {
                histogram.add(code, 0.0);
            }
        }
        FittedTable::new(histogram.fit_range(true).expect("counted"))
    }

    /// All sequences tried.
    fn exhaustive(targets: &[f32], table: &FittedTable, lambda: f32) -> f32 {
        fn descend(state: u8, targets: &[f32], costs: &RunCosts<'_>) -> f32 {
            let Some((&target, rest)) = targets.split_first() else { return 0.0 };
            let quantizer = quantizer_of(state);
            let (low, high) = costs.tables[0].range();
            (low..=high)
                .map(|code| crate::codec::trellis::multiple(code, quantizer))
                .map(|multiple| {
                    costs.cost(target, multiple, quantizer) + descend(next_state(state, multiple), rest, costs)
                })
                .fold(f32::INFINITY, f32::min)
        }
        descend(0, targets, &RunCosts::new([table, table], 0, lambda))
    }

    fn path_cost(targets: &[f32], multiples: &[i32], table: &FittedTable, lambda: f32) -> f32 {
        let costs = RunCosts::new([table, table], 0, lambda);
        let mut state = 0;
        let mut total = 0.0;
        for (&target, &multiple) in targets.iter().zip(multiples) {
            total += costs.cost(target, multiple, quantizer_of(state));
            state = next_state(state, multiple);
        }
        total
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(24))]
        #[test]
        fn the_search_finds_the_cheapest_of_all_sequences(targets in prop::collection::vec(-8.0_f32..8.0, 1..4)) {
            // One lane: every 32nd symbol.
            let mut strip = vec![0.0; 32 * targets.len()];
            for (slot, &target) in strip.iter_mut().step_by(LANES).zip(&targets) {
                *slot = target;
            }
            let table = table();
            let found = search(&strip, strip.len(), &[[&table, &table]], 0, 0.1);
            let lane: Vec<i32> = found.into_iter().step_by(LANES).collect();
            let (found, best) = (path_cost(&targets, &lane, &table, 0.1), exhaustive(&targets, &table, 0.1));
            prop_assert!((found - best).abs() < 1e-3, "{found} against {best}");
        }
    }
}
