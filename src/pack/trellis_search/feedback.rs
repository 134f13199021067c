//! The search inside the feedback loop: the errors of a row's earlier columns move the targets of its later ones.
//!
//! With them moved (`pack::calibration`), the error of a row's outputs is a sum over its columns, as it is for plain squared
//! error. But each path has made errors of its own, so each survivor of the search carries the shifts that its own codes
//! have caused (per-survivor processing). Columns of other lanes have been decided before, and have moved the targets already.

use super::kernels::Level;
use super::{PRICED, PriceList, Prices, Search};
use crate::codec::trellis::Trellis;
use crate::numerics::nearest_integer;
use crate::pack::entropy_model::FittedTable;

/// A multiple further than this from its target, in steps, is coded as an exception: its table does not reach the target.
pub const BEYOND_REACH: f32 = 6.0;

/// One lane of a strip: some columns of consecutive rows.
pub struct LaneColumns<'a> {
    /// Columns of the lane.
    pub columns: usize,
    /// The weights or residuals in steps, row after row.
    pub values: &'a [f32],
    /// The same, moved by the errors of other lanes.
    pub targets: &'a [f32],
    /// How far an error of one step in a column moves a later one: `[columns, columns]`.
    pub feedback: &'a [f32],
    /// What a squared step of error in each column counts.
    pub weights: &'a [f32],
}

/// What a lane's symbols became, row after row.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct LaneMultiples {
    /// Multiples of the step.
    pub multiples: Vec<i32>,
    /// Value less decoded value, in steps.
    pub errors: Vec<f32>,
    /// Index and multiple of every exception.
    pub exceptions: Vec<(usize, i16)>,
}

impl Search {
    /// Finds the multiples of one lane. `tables` has each row's pair.
    pub fn lane_multiples(&self, lane: &LaneColumns<'_>, tables: &[[&FittedTable; 2]]) -> LaneMultiples {
        self.lane_multiples_at(Level::of_this_cpu(), lane, tables)
    }

    fn lane_multiples_at(&self, level: Level, lane: &LaneColumns<'_>, tables: &[[&FittedTable; 2]]) -> LaneMultiples {
        let multiples = match level {
            Level::Portable => self.lane_path(lane, tables),
            // SAFETY: `of_this_cpu` and `all_of_this_cpu` give only levels whose instructions the CPU has, here and below.
            #[cfg(target_arch = "x86_64")]
            Level::Avx2 => unsafe { self.lane_path_avx2(lane, tables) },
            // SAFETY: see above.
            #[cfg(target_arch = "x86_64")]
            Level::Avx512 => unsafe { self.lane_path_avx512(lane, tables) },
        };
        self.follow(lane, tables, multiples)
    }

    #[cfg(target_arch = "x86_64")]
    #[target_feature(enable = "avx2")]
    fn lane_path_avx2(&self, lane: &LaneColumns<'_>, tables: &[[&FittedTable; 2]]) -> Vec<i32> {
        self.lane_path(lane, tables)
    }

    #[cfg(target_arch = "x86_64")]
    #[target_feature(enable = "avx512f,avx512vl,avx2")]
    fn lane_path_avx512(&self, lane: &LaneColumns<'_>, tables: &[[&FittedTable; 2]]) -> Vec<i32> {
        self.lane_path(lane, tables)
    }

    /// The cheapest path. Arithmetic is single operations in one order, so that every level finds the same.
    #[inline(always)]
    fn lane_path(&self, lane: &LaneColumns<'_>, tables: &[[&FittedTable; 2]]) -> Vec<i32> {
        let states = self.trellis.states();
        let mut survivors = Survivors::new(self.trellis, lane.columns);
        let mut found = vec![Found::default(); lane.values.len() * states];
        let mut prices = PriceList::default();
        let rows = lane.values.chunks(lane.columns).zip(lane.targets.chunks(lane.columns));
        for ((row, (values, targets)), found) in rows.enumerate().zip(found.chunks_mut(lane.columns * states)) {
            let prices = prices.of(tables[row], self.raw_bits, self.lambda);
            survivors.shifts.fill(0.0); // rows do not share inputs
            for (column, found) in found.chunks_mut(states).enumerate() {
                survivors.price(targets[column], values[column], lane.weights[column], column, prices);
                survivors.select(&lane.feedback[column * lane.columns..][..lane.columns], column, found);
            }
        }
        let least = (0..states).min_by(|&a, &b| survivors.costs[a].total_cmp(&survivors.costs[b]));
        let mut state = least.unwrap_or(0) as u16;
        let mut multiples: Vec<i32> = (found.chunks(states).rev())
            .map(|found| {
                let Found { multiple, is_odd } = found[usize::from(state)];
                state = self.trellis.previous_state(state, is_odd);
                multiple
            })
            .collect();
        multiples.reverse();
        multiples
    }

    /// The errors along the path, and where it is too far from its target.
    fn follow(&self, lane: &LaneColumns<'_>, tables: &[[&FittedTable; 2]], multiples: Vec<i32>) -> LaneMultiples {
        let mut followed = LaneMultiples { errors: Vec::with_capacity(multiples.len()), ..LaneMultiples::default() };
        let mut prices = PriceList::default();
        let mut shifts = vec![0.0; lane.columns];
        for (row, row_multiples) in multiples.chunks(lane.columns).enumerate() {
            let prices = prices.of(tables[row], self.raw_bits, self.lambda);
            shifts.fill(0.0);
            for (column, &multiple) in row_multiples.iter().enumerate() {
                let index = row * lane.columns + column;
                let target = lane.targets[index] + shifts[column];
                let mut decoded = multiple as f32 + prices.point_offset(multiple);
                if (target - multiple as f32).abs() > BEYOND_REACH {
                    let exception = target.round_ties_even() as i16;
                    decoded = f32::from(exception);
                    followed.exceptions.push((index, exception));
                }
                let error = lane.values[index] - decoded;
                followed.errors.push(error);
                let feedback = &lane.feedback[column * lane.columns..][..lane.columns];
                for (shift, feedback) in shifts[column + 1..].iter_mut().zip(&feedback[column + 1..]) {
                    *shift += error * feedback;
                }
            }
        }
        followed.multiples = multiples;
        followed
    }
}

/// How a state was entered.
#[derive(Clone, Copy, Debug, Default)]
struct Found {
    multiple: i32,
    is_odd: u16,
}

/// The cheapest path to every state.
struct Survivors {
    trellis: Trellis,
    columns: usize,
    costs: Vec<f32>,
    next_costs: Vec<f32>,
    /// Per state, how far the errors of its path have moved each column of the row.
    shifts: Vec<f32>,
    next_shifts: Vec<f32>,
    /// Per parity of the code and state, what goes on with the code costs, what it stands for, and the error that it leaves.
    branches: [Vec<Branch>; 2],
}

/// A code that a path may go on with.
#[derive(Clone, Copy, Debug, Default)]
struct Branch {
    cost: f32,
    error: f32,
    multiple: i32,
}

impl Survivors {
    fn new(trellis: Trellis, columns: usize) -> Self {
        let states = trellis.states();
        let mut costs = vec![f32::INFINITY; states];
        costs[0] = 0.0;
        Self {
            trellis,
            columns,
            costs,
            next_costs: vec![0.0; states],
            shifts: vec![0.0; states * columns],
            next_shifts: vec![0.0; states * columns],
            branches: [0, 1].map(|_| vec![Branch::default(); states]),
        }
    }

    /// Prices both codes of every state for one column.
    #[inline(always)]
    fn price(&mut self, target: f32, value: f32, weight: f32, column: usize, prices: &Prices) {
        let [by_even, by_odd] = &mut self.branches;
        let states = self.costs.iter().zip(self.shifts.chunks(self.columns)).zip(by_even.iter_mut().zip(by_odd));
        for (state, ((&cost, shifts), (by_even, by_odd))) in states.enumerate() {
            let quantizer = state & 1;
            let target = target + shifts[column];
            let (least, greatest) = prices.bounds[quantizer];
            let inside = target.max(least).min(greatest);
            for (parity, branch) in [by_even, by_odd].into_iter().enumerate() {
                let residue = (2 * parity + quantizer) as f32;
                let steps = nearest_integer((inside - residue) * 0.25);
                let nearest = (2 * parity + quantizer) as i32 + 4 * steps;
                let shorter = nearest - 4 * nearest.signum();
                let price = |multiple: i32| {
                    let (error, index) = (target - multiple as f32, prices.index(multiple, quantizer));
                    (weight * error * error + prices.of_code[quantizer][index], index)
                };
                let (mut multiple, (mut least, mut index)) = (nearest, price(nearest));
                if shorter.abs() < nearest.abs() {
                    let (of_shorter, index_of_shorter) = price(shorter);
                    if of_shorter < least {
                        (multiple, least, index) = (shorter, of_shorter, index_of_shorter);
                    }
                }
                let multiple_steps = multiple as f32;
                let decoded = multiple_steps + prices.points[quantizer][index];
                // Too far away it will be an exception, which is exact but for rounding.
                let is_near = (target - multiple_steps).abs() <= BEYOND_REACH;
                let error = value - if is_near { decoded } else { target };
                *branch = Branch { cost: cost + least, error, multiple };
            }
        }
    }

    /// Keeps the cheaper of the two ways to every state, and lets its error move what comes.
    #[inline(always)]
    fn select(&mut self, feedback: &[f32], column: usize, found: &mut [Found]) {
        let range = column + 1..self.columns;
        let feedback = &feedback[range.clone()];
        let mut least = f32::INFINITY;
        for (state, found) in found.iter_mut().enumerate() {
            let [even, odd] = [0, 1].map(|parity| usize::from(self.trellis.previous_state(state as u16, parity)));
            let (by_even, by_odd) = (self.branches[0][even], self.branches[1][odd]);
            let is_odd = by_odd.cost < by_even.cost;
            let (from, branch) = if is_odd { (odd, by_odd) } else { (even, by_even) };
            least = branch.cost.min(least);
            self.next_costs[state] = branch.cost;
            *found = Found { multiple: branch.multiple, is_odd: u16::from(is_odd) };
            let before = &self.shifts[from * self.columns..][range.clone()];
            let after = &mut self.next_shifts[state * self.columns..][range.clone()];
            for ((after, before), feedback) in after.iter_mut().zip(before).zip(feedback) {
                *after = before + branch.error * feedback;
            }
        }
        for cost in &mut self.next_costs {
            *cost -= least; // costs stay small, and keep their precision
        }
        std::mem::swap(&mut self.costs, &mut self.next_costs);
        std::mem::swap(&mut self.shifts, &mut self.next_shifts);
    }
}

impl Prices {
    /// Where the price of a multiple's code is.
    #[inline(always)]
    fn index(&self, multiple: i32, quantizer: usize) -> usize {
        let code = (multiple - quantizer as i32) >> 1;
        ((code >> self.raw_bits) - self.below[quantizer]).clamp(0, PRICED as i32 - 1) as usize % PRICED
    }

    /// How far a multiple's point lies from it.
    fn point_offset(&self, multiple: i32) -> f32 {
        let quantizer = (multiple & 1) as usize;
        self.points[quantizer][self.index(multiple, quantizer)]
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::limits::TRELLIS_STATE_BITS;
    use crate::pack::histogram::Histogram;
    use proptest::prelude::*;

    fn table() -> FittedTable {
        let mut histogram = Histogram::default();
        for code in -20_i32..=20 {
            histogram.merge(&Histogram::of(&[code]), u64::from(1 + 200 / (1 + code.unsigned_abs())));
        }
        FittedTable::new(histogram.fit_range(true).expect("counted"))
    }

    fn random_lane(seed: u64, rows: usize, columns: usize) -> (Vec<f32>, Vec<f32>) {
        let random = &mut fastrand::Rng::with_seed(seed);
        let values = (0..rows * columns).map(|_| (random.f32() - 0.5) * 16.0).collect();
        let feedback = (0..columns * columns).map(|_| random.f32() - 0.5).collect();
        (values, feedback)
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(24))]
        #[test]
        fn without_feedback_it_is_the_plain_search(seed: u64, rows in 1..6_usize, state_bits in TRELLIS_STATE_BITS) {
            let (values, _) = random_lane(seed, rows, 8);
            let (table, trellis) = (table(), Trellis::new(state_bits).expect("in range"));
            let tables = vec![[&table; 2]; rows];
            let search = Search { run_elements: 8, lanes: 1, raw_bits: 0, lambda: 0.4, trellis };
            let lane = LaneColumns {
                columns: 8, values: &values, targets: &values, feedback: &[0.0; 64], weights: &[1.0; 8],
            };
            let found = search.lane_multiples(&lane, &tables);
            let cost = |multiples: &[i32]| -> f32 {
                let bits = |multiple: i32| table.bits(multiple >> 1);
                multiples.iter().zip(&values).map(|(&m, value)| (value - m as f32).powi(2) + 0.4 * bits(m)).sum()
            };
            let plain = search.multiples(&values, &tables);
            prop_assert!((cost(&found.multiples) - cost(&plain)).abs() < 1e-2);
        }

        #[test]
        fn every_level_finds_the_same_path(seed: u64, rows in 1..20_usize, columns in 1..20_usize) {
            let (values, feedback) = random_lane(seed, rows, columns);
            let weights = vec![1.0; columns];
            let lane = LaneColumns {
                columns, values: &values, targets: &values, feedback: &feedback, weights: &weights,
            };
            let table = table();
            let tables = vec![[&table; 2]; rows];
            let trellis = Trellis::new(5).expect("in range");
            let search = Search { run_elements: columns, lanes: 1, raw_bits: 0, lambda: 0.4, trellis };
            let expected = search.lane_multiples_at(Level::Portable, &lane, &tables);
            for level in Level::all_of_this_cpu() {
                prop_assert_eq!(&search.lane_multiples_at(level, &lane, &tables), &expected, "{:?}", level);
            }
        }
    }

    #[test]
    fn a_value_beyond_the_table_is_an_exception_and_moves_nothing() {
        let (table, trellis) = (table(), Trellis::EIGHT_STATES);
        let search = Search { run_elements: 2, lanes: 1, raw_bits: 0, lambda: 0.0, trellis };
        let lane = LaneColumns {
            columns: 2,
            values: &[900.0, 2.0],
            targets: &[900.0, 2.0],
            feedback: &[0.0, 1.0, 0.0, 0.0],
            weights: &[1.0; 2],
        };
        let found = search.lane_multiples(&lane, &[[&table; 2]]);
        assert_eq!(found.exceptions, [(0, 900)]);
        assert_eq!(found.errors[0], 0.0);
        assert!(found.errors[1].abs() < 3.0, "{found:?}");
    }
}
