//! The encoder's half of trellis-coded quantization: the Viterbi search for the sequence of codes that is cheapest in
//! squared error plus lambda times the bits of the actual tables.
//!
//! With the rate in the path metric the search includes rate-distortion-optimised rounding. Each lane of a strip has its own
//! path, as in the decoder (`codec::trellis`), and all are searched side by side.

pub mod feedback;
mod kernels;

use self::kernels::{Branches, Costs, Level, Step};
use super::entropy_model::FittedTable;
use crate::codec::trellis::Trellis;
use crate::format::strip::LANES;

/// Costs grow by about one per symbol; every so many symbols the least is taken off, so that none runs out of mantissa.
const STEPS_BETWEEN_REBASES: usize = 64;

/// What a search needs beside the values of a strip and their tables.
#[derive(Clone, Copy, Debug)]
pub struct Search {
    /// Values of one run; the last may have fewer.
    pub run_elements: usize,
    /// Lanes of the strip.
    pub lanes: usize,
    /// Raw bits per symbol.
    pub raw_bits: u32,
    /// What a bit is worth, in squared steps.
    pub lambda: f32,
    /// Which states follow which.
    pub trellis: Trellis,
}

impl Search {
    /// Finds the multiples of the step for one strip.
    ///
    /// `targets` are the values to be coded in steps, run after run; `tables` has each run's table for the first quantizer and
    /// for the second. Codes stay inside the tables; a target beyond them is the caller's exception.
    pub fn multiples(&self, targets: &[f32], tables: &[[&FittedTable; 2]]) -> Vec<i32> {
        self.multiples_at(Level::of_this_cpu(), targets, tables)
    }

    fn multiples_at(&self, level: Level, targets: &[f32], tables: &[[&FittedTable; 2]]) -> Vec<i32> {
        let &Self { run_elements, lanes, raw_bits, lambda, trellis } = self;
        let states = trellis.states();
        let steps: usize = targets.chunks(run_elements).map(|run| run.len().div_ceil(lanes)).sum();
        let mut costs = vec![Costs([f32::INFINITY; LANES]); states];
        costs[0] = Costs([0.0; LANES]);
        let mut next = costs.clone();
        // Per step: of each state, the lanes that enter it by an odd code; and the four multiples to choose from.
        let mut by_odd_code = vec![0_u32; steps * states];
        let mut branches = vec![Branches::NONE; steps];

        let mut prices = PriceList::default();
        let mut step = 0;
        for (run, values) in targets.chunks(run_elements).enumerate() {
            let prices = prices.of(tables[run], raw_bits, lambda);
            for vector in values.chunks(lanes) {
                let mut targets = [0.0; LANES];
                targets[..vector.len()].copy_from_slice(vector);
                let found = &mut by_odd_code[step * states..(step + 1) * states];
                level.take(Step {
                    trellis,
                    lanes,
                    targets: &targets,
                    prices,
                    branches: &mut branches[step],
                    costs: &costs,
                    next: &mut next,
                    by_odd_code: found,
                });
                if vector.len() < lanes {
                    // Lanes without a symbol stay where they are.
                    for (next, cost) in next.iter_mut().zip(&costs) {
                        next.0[vector.len()..lanes].copy_from_slice(&cost.0[vector.len()..lanes]);
                    }
                }
                std::mem::swap(&mut costs, &mut next);
                if step % STEPS_BETWEEN_REBASES == STEPS_BETWEEN_REBASES - 1 {
                    rebase(&mut costs);
                }
                step += 1;
            }
        }
        self.trace(targets.len(), &costs, &by_odd_code, &branches)
    }

    /// The multiples of each lane's cheapest path, last symbol first.
    fn trace(&self, count: usize, costs: &[Costs], by_odd_code: &[u32], branches: &[Branches]) -> Vec<i32> {
        let &Self { run_elements, lanes, trellis, .. } = self;
        let mut state_of: [u16; LANES] = std::array::from_fn(|lane| {
            let least = (0..trellis.states()).min_by(|&a, &b| costs[a].0[lane].total_cmp(&costs[b].0[lane]));
            least.unwrap_or(0) as u16
        });
        let mut multiples = vec![0; count];
        let mut steps = by_odd_code.chunks(trellis.states()).zip(branches).rev();
        for run in multiples.chunks_mut(run_elements).rev() {
            for vector in run.chunks_mut(lanes).rev() {
                let (by_odd_code, branches) = steps.next().expect("a step per vector");
                for (lane, multiple) in vector.iter_mut().enumerate() {
                    let state = &mut state_of[lane];
                    let odd = by_odd_code[usize::from(*state)] >> lane & 1;
                    *state = trellis.previous_state(*state, odd as u16);
                    *multiple = branches.multiples[usize::from(2 * odd as u16 + (*state & 1))][lane];
                }
            }
        }
        multiples
    }
}

/// Takes the least cost of each lane off all of them.
fn rebase(costs: &mut [Costs]) {
    let mut least = [f32::INFINITY; LANES];
    for costs in &*costs {
        for (least, &cost) in least.iter_mut().zip(&costs.0) {
            *least = cost.min(*least);
        }
    }
    for costs in costs {
        for (cost, least) in costs.0.iter_mut().zip(least) {
            *cost -= least;
        }
    }
}

/// Codes of a table, the one below it and what is above: all indices that `Prices` has a cost for.
const PRICED: usize = 128;
/// What a code costs that its table does not have: more than any error.
const NOT_CODED: f32 = 1e12;

/// What the codes of a run cost.
#[derive(Clone, Debug)]
struct Prices {
    /// Per quantizer, lambda times the bits of each code from one below the lowest on.
    of_code: [[f32; PRICED]; 2],
    /// Per quantizer, how far the point of each code lies from it, in steps.
    points: [[f32; PRICED]; 2],
    /// Per quantizer, one less than the lowest code.
    below: [i32; 2],
    raw_bits: u32,
    /// Per quantizer, the least and the greatest target for which all residues have a multiple inside the table.
    bounds: [(f32, f32); 2],
}

impl Prices {
    fn new(tables: [&FittedTable; 2], raw_bits: u32, lambda: f32) -> Self {
        let bounds = [0, 1].map(|quantizer| {
            let (low, high) = tables[quantizer as usize].range();
            let (low, high) = (low << raw_bits, (high << raw_bits) + (1 << raw_bits) - 1);
            let (least, greatest) = (2 * low + quantizer, 2 * high + quantizer);
            ((least + 2) as f32, (greatest - 2) as f32)
        });
        let of_code = tables.map(|table| {
            let (low, high) = table.range();
            let mut costs = [NOT_CODED; PRICED];
            for (cost, code) in costs[1..].iter_mut().zip(low..=high) {
                *cost = lambda * table.bits(code);
            }
            costs
        });
        let points = tables.map(|table| {
            let (low, high) = table.range();
            let mut points = [0.0; PRICED];
            for (point, code) in points[1..].iter_mut().zip(low..=high) {
                *point = table.position(code).map_or(0.0, |position| table.point_offset(position));
            }
            points
        });
        Self { of_code, points, below: tables.map(|table| table.range().0 - 1), raw_bits, bounds }
    }
}

/// The prices of the tables met so far: a strip has many runs and few tables.
#[derive(Debug, Default)]
struct PriceList<'t>(Vec<([&'t FittedTable; 2], Prices)>);

impl<'t> PriceList<'t> {
    fn of(&mut self, tables: [&'t FittedTable; 2], raw_bits: u32, lambda: f32) -> &Prices {
        let known = |known: &[&FittedTable; 2]| std::ptr::eq(known[0], tables[0]) && std::ptr::eq(known[1], tables[1]);
        let index = self.0.iter().position(|(of, _)| known(of)).unwrap_or_else(|| {
            self.0.push((tables, Prices::new(tables, raw_bits, lambda)));
            self.0.len() - 1
        });
        &self.0[index].1
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::codec::trellis::{code_of, multiple, quantizer_of};
    use crate::format::limits::TRELLIS_STATE_BITS;
    use crate::pack::histogram::Histogram;
    use proptest::prelude::*;

    fn table(reach: i32) -> FittedTable {
        let mut histogram = Histogram::default();
        for code in -reach..=reach {
            histogram.merge(&Histogram::of(&[code]), u64::from(1 + 200 / (1 + code.unsigned_abs())));
        }
        FittedTable::new(histogram.fit_range(true).expect("counted"))
    }

    fn cost(target: f32, multiple: i32, quantizer: u8, table: &FittedTable, lambda: f32) -> f32 {
        let error = target - multiple as f32;
        error * error + lambda * table.bits(code_of(multiple, quantizer))
    }

    /// All sequences tried.
    fn exhaustive(state: u16, targets: &[f32], table: &FittedTable, lambda: f32, trellis: Trellis) -> f32 {
        let Some((&target, rest)) = targets.split_first() else { return 0.0 };
        let quantizer = quantizer_of(state);
        let (low, high) = table.range();
        (low..=high)
            .map(|code| multiple(code, quantizer))
            .map(|multiple| {
                let next = trellis.next_state(state, multiple);
                cost(target, multiple, quantizer, table, lambda) + exhaustive(next, rest, table, lambda, trellis)
            })
            .fold(f32::INFINITY, f32::min)
    }

    fn path_cost(targets: &[f32], multiples: &[i32], table: &FittedTable, lambda: f32, trellis: Trellis) -> f32 {
        let mut state = 0;
        let mut total = 0.0;
        for (&target, &multiple) in targets.iter().zip(multiples) {
            assert_eq!(multiple & 1, i32::from(state & 1), "a multiple of the state's quantizer");
            total += cost(target, multiple, quantizer_of(state), table, lambda);
            state = trellis.next_state(state, multiple);
        }
        total
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(24))]
        #[test]
        fn the_search_finds_the_cheapest_of_all_sequences(
            targets in prop::collection::vec(-8.0_f32..8.0, 1..4),
            state_bits in TRELLIS_STATE_BITS,
            (lanes, lane) in prop::sample::select(vec![1, 4, LANES]).prop_flat_map(|lanes| (Just(lanes), 0..lanes)),
        ) {
            let trellis = Trellis::new(state_bits).expect("in range");
            // One lane of them.
            let mut strip = vec![0.0; lanes * targets.len()];
            for (slot, &target) in strip.iter_mut().skip(lane).step_by(lanes).zip(&targets) {
                *slot = target;
            }
            let table = table(20);
            let found = Search { run_elements: strip.len(), lanes, raw_bits: 0, lambda: 0.1, trellis }
                .multiples(&strip, &[[&table, &table]]);
            let lane: Vec<i32> = found.into_iter().skip(lane).step_by(lanes).collect();
            let found = path_cost(&targets, &lane, &table, 0.1, trellis);
            let best = exhaustive(0, &targets, &table, 0.1, trellis);
            prop_assert!((found - best).abs() < 1e-3, "{found} against {best}");
        }

        #[test]
        fn every_level_finds_the_same_path(
            seed: u64,
            elements in 1..2000_usize,
            run_elements in 1..200_usize,
            state_bits in TRELLIS_STATE_BITS,
            raw_bits in 0..3_u32,
            lane_bits in 0..6,
        ) {
            let random = &mut fastrand::Rng::with_seed(seed);
            let targets: Vec<f32> = (0..elements).map(|_| (random.f32() - 0.5) * 90.0).collect();
            let fitted = [table(20), table(9)];
            let tables: Vec<_> = (0..elements.div_ceil(run_elements)).map(|run| [&fitted[run % 2]; 2]).collect();
            let trellis = Trellis::new(state_bits).expect("in range");
            let search = Search { run_elements, lanes: 1_usize << lane_bits, raw_bits, lambda: 0.4, trellis };
            let expected = search.multiples_at(Level::Portable, &targets, &tables);
            for level in Level::all_of_this_cpu() {
                prop_assert_eq!(&search.multiples_at(level, &targets, &tables), &expected, "{:?}", level);
            }
        }
    }
}
