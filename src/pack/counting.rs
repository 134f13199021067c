//! What symbols cost: counts by class before tables are fitted, measured bits and errors after.
//!
//! Everything is summed in the order of the runs, so that no sum depends on the number of threads.

use std::collections::BTreeSet;
use std::ops::Range;

use rayon::prelude::*;

use super::entropy_model::{ClassHistograms, FittedTable, StreamKind, TablePool};
use super::histogram::{EXCEPTION_BITS, Histogram};
use super::symbols::Symbols;
use crate::codec::integers;

/// Elements up to which a part's choices of tables are weighed against what they save: of larger parts they are nothing.
const SMALL_PART: usize = 1 << 18;

fn run_histogram(symbols: &dyn Symbols, run: usize, scratch: &mut Vec<i32>) -> Histogram {
    scratch.clear();
    symbols.nearest(run, scratch);
    Histogram::of(scratch)
}

/// Counts the nearest symbols of every `every`-th run of a tensor by class.
pub fn count(symbols: &dyn Symbols, every: usize) -> ClassHistograms {
    count_weighted(symbols, every, &|_| 1)
}

/// Counts the nearest symbols of every `every`-th run, each run as often as its weight says.
pub fn count_weighted(symbols: &dyn Symbols, every: usize, weight: &(dyn Fn(usize) -> u64 + Sync)) -> ClassHistograms {
    let runs: Vec<usize> = (0..symbols.layout().runs()).step_by(every.max(1)).collect();
    let counted: Vec<ClassHistograms> = runs
        .par_chunks(64)
        .map(|runs| {
            let mut counted = ClassHistograms::default();
            let mut scratch = Vec::new();
            for &run in runs {
                let histogram = run_histogram(symbols, run, &mut scratch);
                counted.add(symbols.kind(), symbols.class(&histogram), &histogram, weight(run));
            }
            counted
        })
        .collect();
    let mut all = ClassHistograms::default();
    for counted in &counted {
        all.merge(counted);
    }
    all
}

/// Bits that the nearest symbols of every `every`-th run take with the pool's best tables, scaled up to all runs. Raw bits
/// included; `None` where the pool has no fitting table.
pub fn measure(symbols: &dyn Symbols, pool: &TablePool, every: usize) -> Option<f64> {
    let layout = symbols.layout();
    let runs: Vec<usize> = (0..layout.runs()).step_by(every.max(1)).collect();
    let bits: Vec<Option<(f64, usize)>> = runs
        .par_iter()
        .map_init(Vec::new, |scratch, &run| {
            let histogram = run_histogram(symbols, run, scratch);
            let (_, bits) = pool.choose(symbols.kind(), symbols.class(&histogram), &histogram)?;
            Some((bits, layout.run_range(run).len()))
        })
        .collect();
    let mut total = 0.0;
    let mut measured = 0;
    for bits in bits {
        let (bits, elements) = bits?;
        total += bits;
        measured += elements;
    }
    Some((total / measured.max(1) as f64 + mean_raw_bits(symbols)) * layout.elements as f64)
}

/// Stored raw bits per symbol, over all runs.
pub fn mean_raw_bits(symbols: &dyn Symbols) -> f64 {
    let layout = symbols.layout();
    let zeros = |run| symbols.zero_bits(run) as usize * layout.run_range(run).len();
    let zeros: usize = (0..layout.runs()).map(zeros).sum();
    f64::from(symbols.raw_bits()) - zeros as f64 / layout.elements.max(1) as f64
}

/// The cheapest table of each run, or pair of tables, as numbers of the pool.
pub fn choose_tables(symbols: &dyn Symbols, pool: &TablePool, runs: Range<usize>) -> Option<Vec<[usize; 2]>> {
    let mut scratch = Vec::new();
    runs.map(|run| {
        let histogram = run_histogram(symbols, run, &mut scratch);
        let (first, _) = pool.choose(symbols.kind(), symbols.class(&histogram), &histogram)?;
        Some([first, symbols.second_kind().map_or(first, |kind| pool.companion(first, kind))])
    })
    .collect()
}

/// The one table that takes a small bit-exact part shorter than each run's own, whose choices cost bits too; `None` where none does.
pub fn sole_table(symbols: &dyn Symbols, pool: &TablePool) -> Option<usize> {
    let layout = symbols.layout();
    // Of codes, which a search will choose by what they cost, the nearest ones say too little.
    let are_codes = matches!(symbols.kind(), StreamKind::Quantized { .. } | StreamKind::Trellis { .. });
    if layout.elements > SMALL_PART || are_codes {
        return None;
    }
    let mut scratch = Vec::new();
    let runs: Vec<Histogram> = (0..layout.runs()).map(|run| run_histogram(symbols, run, &mut scratch)).collect();
    let choices: Vec<(usize, f64)> =
        runs.iter().map(|run| pool.choose(symbols.kind(), symbols.class(run), run)).collect::<Option<_>>()?;
    let used: BTreeSet<usize> = choices.iter().map(|&(table, _)| table).collect();
    let numbers: Vec<i32> = choices.iter().map(|(table, _)| used.range(..table).count() as i32).collect();
    let bits_of_choices = 8.0 * (integers::encode(&numbers).0.len() + used.len()) as f64;
    let bits: f64 = choices.iter().map(|(_, bits)| bits).sum::<f64>() + bits_of_choices;
    let alone = used.iter().map(|&table| (table, runs.iter().map(|run| pool.table(table).cost(run)).sum::<f64>()));
    let (table, fewest) = alone.min_by(|(_, a), (_, b)| a.total_cmp(b))?;
    (used.len() > 1 && fewest < bits).then_some(table)
}

/// What placing a part's symbols gave, each run counted as often as its weight says.
#[derive(Clone, Debug, Default)]
pub struct PlacedCounts {
    /// Symbols by the class that chose their table.
    pub classes: ClassHistograms,
    /// Raw bits and exceptions, in bits.
    pub other_bits: f64,
    /// Squared error, in squared weight units.
    pub squared_error: f64,
    /// Symbols counted.
    pub symbols: u64,
}

impl PlacedCounts {
    fn add(&mut self, other: &Self) {
        self.classes.merge(&other.classes);
        self.other_bits += other.other_bits;
        self.squared_error += other.squared_error;
        self.symbols += other.symbols;
    }
}

/// Places the symbols of all strips with the tables of `pool` and counts them, each run as often as its weight says. `None`
/// where the pool has no fitting table.
pub fn count_placed(
    symbols: &dyn Symbols,
    pool: &TablePool,
    weight: &(dyn Fn(usize) -> u64 + Sync),
) -> Option<PlacedCounts> {
    let layout = symbols.layout();
    let counted: Vec<PlacedCounts> = (0..layout.strips())
        .into_par_iter()
        .map(|strip| count_placed_strip(symbols, pool, layout.strip_runs(strip), weight))
        .collect::<Option<_>>()?;
    let mut all = PlacedCounts::default();
    for counted in &counted {
        all.add(counted);
    }
    Some(all)
}

fn count_placed_strip(
    symbols: &dyn Symbols,
    pool: &TablePool,
    runs: Range<usize>,
    weight: &(dyn Fn(usize) -> u64 + Sync),
) -> Option<PlacedCounts> {
    let layout = symbols.layout();
    let tables_of_run = choose_tables(symbols, pool, runs.clone())?;
    let fitted: Vec<[&FittedTable; 2]> =
        tables_of_run.iter().map(|tables| tables.map(|table| pool.table(table))).collect();
    let placed = symbols.place(runs.clone(), &fitted);
    let mut counts = PlacedCounts::default();
    let run_weight = |index: usize| weight(runs.start + index / layout.run_elements) as f64;
    counts.other_bits +=
        placed.exceptions.iter().map(|&(index, _)| EXCEPTION_BITS * run_weight(index.into())).sum::<f64>();
    let kinds = [symbols.kind(), symbols.second_kind().unwrap_or(symbols.kind())];
    let mut start = 0;
    for (run, tables) in runs.clone().zip(&tables_of_run) {
        let weight = weight(run);
        let range = start..(start + layout.run_elements).min(placed.symbols.len());
        start = range.end;
        let class = pool.class_of(tables[0]);
        let (run_symbols, offsets) = (&placed.symbols[range.clone()], &placed.offsets[range.clone()]);
        if symbols.second_kind().is_some() {
            for (quantizer, kind) in kinds.into_iter().enumerate() {
                let of_quantizer = || range.clone().filter(|&index| placed.quantizer(index) == quantizer);
                let run_symbols: Vec<i32> = of_quantizer().map(|index| placed.symbols[index]).collect();
                let offsets: Vec<f32> = of_quantizer().map(|index| placed.offsets[index]).collect();
                counts.classes.add(kind, class, &Histogram::of_placed(&run_symbols, &offsets), weight);
            }
        } else {
            counts.classes.add(kinds[0], class, &Histogram::of_placed(run_symbols, offsets), weight);
        }
        counts.squared_error += weight as f64 * symbols.squared_error(run, &placed.offsets[range.clone()]);
        counts.symbols += weight * range.len() as u64;
        counts.other_bits +=
            weight as f64 * f64::from(symbols.raw_bits() - symbols.zero_bits(run)) * range.len() as f64;
    }
    Some(counts)
}

/// Sum of squares, in an order that lets it be summed fast.
pub fn sum_of_squares(values: &[f32]) -> f64 {
    let mut sums = [0.0_f64; 8];
    let (whole, rest) = values.as_chunks::<8>();
    for values in whole {
        for (sum, &value) in sums.iter_mut().zip(values) {
            *sum += f64::from(value) * f64::from(value);
        }
    }
    sums.iter().sum::<f64>() + rest.iter().map(|&value| f64::from(value).powi(2)).sum::<f64>()
}
