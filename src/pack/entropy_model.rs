//! The encoder's entropy model: integer tables fitted to the data, one chosen per run by its measured cost (section 6.1).
//!
//! The paper's learned model maps a context to a distribution (Eqs. 86-90). Here the context is a run's scale, quantized to a
//! quarter of an octave, and what the model learned is sent as tables and one table number per run, so that no decoder
//! evaluates a distribution (SPEC.md section 5).

use std::collections::BTreeMap;
use std::sync::Arc;

use super::histogram::{EXCEPTION_BITS, Histogram};
use crate::codec::entropy::CodingTable;
use crate::codec::vector_quantizer::Codebook;
use crate::format::limits::TABLE_POSITIONS;
use crate::format::table::{TOTAL, Table};

/// Classes with fewer symbols than this share a neighbour's table: a table must earn its own bytes.
const CLASS_SYMBOLS: u64 = 4096;
/// Bits of a position of a table in the deflated index, about: its code and its frequency. Points take eight more.
const POSITION_BITS: f64 = 20.0;
/// Tables tried around a run's own class.
const NEIGHBOURS: i32 = 4;

/// Which tables fit together: symbols of one kind.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum StreamKind {
    /// Upper magnitude bits of elements `width` bits wide, above `raw_bits` raw ones.
    Split {
        /// Bits of an element.
        width: u8,
        /// Raw bits per symbol.
        raw_bits: u8,
        /// Whether the elements are bfloat16: exponents of bfloat16 and binary16 do not mix.
        bf16: bool,
    },
    /// Upper bits of integers of so many bits, above `raw_bits` raw ones.
    Units {
        /// Bits of an integer.
        bits: u8,
        /// Raw bits per symbol.
        raw_bits: u8,
    },
    /// Places of integers in a list, the most frequent first.
    Listed,
    /// Differences to a base above `raw_bits` raw bits.
    Difference {
        /// Raw bits per symbol.
        raw_bits: u8,
    },
    /// Scalar quantized codes above `raw_bits` raw ones.
    Quantized {
        /// Raw bits per symbol.
        raw_bits: u8,
        /// Present where the part has one table to itself.
        own: Option<OwnTable>,
    },
    /// Trellis-coded codes above `raw_bits` raw ones.
    Trellis {
        /// Raw bits per symbol.
        raw_bits: u8,
        /// Which of the two quantizers: 0 or 1.
        quantizer: u8,
        /// Present where the part has one table to itself.
        own: Option<OwnTable>,
    },
}

/// The one table of a part whose runs have no choice: the paper's IID and fixed-length entropy models (Table 15).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct OwnTable {
    /// Number of the part.
    pub part: u32,
    /// Whether all its codes have the same length.
    pub fixed_length: bool,
}

impl StreamKind {
    /// Whether tables of this kind may have points beside their codes: those above raw bits do not.
    pub fn has_points(self) -> bool {
        matches!(self, Self::Quantized { raw_bits: 0, .. } | Self::Trellis { raw_bits: 0, .. })
    }
}

/// Histograms by kind and class, gathered over a whole checkpoint before tables are fitted.
#[derive(Clone, Debug, Default)]
pub struct ClassHistograms(BTreeMap<(StreamKind, i32), Histogram>);

impl ClassHistograms {
    /// Adds the symbols of one run, `weight` times.
    pub fn add(&mut self, kind: StreamKind, class: i32, run: &Histogram, weight: u64) {
        self.0.entry((kind, class)).or_default().merge(run, weight);
    }

    /// Adds everything of `other`.
    pub fn merge(&mut self, other: &Self) {
        for (&(kind, class), histogram) in &other.0 {
            self.add(kind, class, histogram, 1);
        }
    }

    /// The same, each symbol counted so many times.
    #[must_use]
    pub fn times(&self, weight: u64) -> Self {
        let mut all = Self::default();
        for (&(kind, class), histogram) in &self.0 {
            all.add(kind, class, histogram, weight);
        }
        all
    }

    /// Whether symbols of this kind were counted.
    pub fn has(&self, kind: StreamKind) -> bool {
        self.0.range((kind, i32::MIN)..=(kind, i32::MAX)).next().is_some()
    }

    /// Bits of all symbols, those of each class with the table of `pool` that was fitted to it.
    pub fn bits(&self, pool: &TablePool) -> f64 {
        let of_class = |(&(kind, class), histogram): (&(StreamKind, i32), &Histogram)| {
            pool.choose(kind, class, histogram).map_or(0.0, |(_, bits)| bits)
        };
        self.0.iter().map(of_class).sum()
    }

    /// What points at the centroids take off the squared error, in squared steps.
    pub fn centroid_gain(&self) -> f64 {
        let pointed = self.0.iter().filter(|((kind, _), _)| kind.has_points());
        pointed.map(|(_, histogram)| histogram.centroid_gain()).sum()
    }

    /// Fits one table per class, sparse classes joined to a neighbour.
    pub fn fit(&self) -> TablePool {
        let mut joined: BTreeMap<(StreamKind, i32), Histogram> = BTreeMap::new();
        let mut pending: Option<((StreamKind, i32), Histogram)> = None;
        for (&key, histogram) in &self.0 {
            let (key, histogram) = match pending.take() {
                Some(((kind, _), mut sparse)) if kind == key.0 => {
                    sparse.merge(histogram, 1);
                    (key, sparse)
                }
                Some((other, sparse)) => {
                    join_below(&mut joined, other, &sparse);
                    (key, histogram.clone())
                }
                None => (key, histogram.clone()),
            };
            if histogram.symbols() < CLASS_SYMBOLS {
                pending = Some((key, histogram));
            } else {
                joined.insert(key, histogram);
            }
        }
        if let Some((key, sparse)) = pending {
            join_below(&mut joined, key, &sparse);
        }
        let mut pool = TablePool::default();
        for ((kind, class), histogram) in join_where_tables_cost_more(joined) {
            let table = match kind {
                StreamKind::Quantized { own: Some(OwnTable { fixed_length: true, .. }), .. }
                | StreamKind::Trellis { own: Some(OwnTable { fixed_length: true, .. }), .. } => {
                    histogram.fit_fixed_length(kind.has_points())
                }
                StreamKind::Trellis { .. } => histogram.fit_range(kind.has_points()),
                StreamKind::Quantized { .. }
                | StreamKind::Split { .. }
                | StreamKind::Units { .. }
                | StreamKind::Listed
                | StreamKind::Difference { .. } => histogram.fit(kind.has_points()),
            };
            if let Some(table) = table {
                pool.add(kind, class, table);
            }
        }
        pool
    }
}

/// Joins neighbouring classes of a kind wherever symbols coded with one table for both take fewer bits more than the second
/// table does, those that save most first.
fn join_where_tables_cost_more(classes: BTreeMap<(StreamKind, i32), Histogram>) -> Vec<((StreamKind, i32), Histogram)> {
    let mut classes: Vec<((StreamKind, i32), Histogram)> = classes.into_iter().collect();
    let bits = |kind: StreamKind, histogram: &Histogram| {
        let positions = histogram.occurring().count().min(TABLE_POSITIONS as usize) as f64;
        let position_bits = POSITION_BITS + if kind.has_points() { 8.0 } else { 0.0 };
        histogram.entropy_bits() + positions * position_bits
    };
    // Where the trellis' quantizers have tables each, the search settles on pairs, and halves joined by themselves cost 0.007
    // bit at 2 bits.
    let has_pairs = classes.iter().any(|((kind, _), _)| matches!(kind, StreamKind::Trellis { quantizer: 1, .. }));
    let join = |classes: &[((StreamKind, i32), Histogram)], first: usize| {
        let [((kind, _), one), ((other_kind, _), other)] = &classes[first..first + 2] else { unreachable!("two") };
        if kind != other_kind || has_pairs && matches!(kind, StreamKind::Trellis { .. }) {
            return None;
        }
        let mut both = one.clone();
        both.merge(other, 1);
        let saved = bits(*kind, one) + bits(*kind, other) - bits(*kind, &both);
        (saved > 0.0).then_some((saved, first, both))
    };
    while let Some((_, first, both)) = (0..classes.len().saturating_sub(1))
        .filter_map(|first| join(&classes, first))
        .max_by(|(a, ..), (b, ..)| a.total_cmp(b))
    {
        // Under the name of the class that has more to say.
        let ((_, one), (key, other)) = (&classes[first], &classes[first + 1]);
        let key = if one.symbols() >= other.symbols() { classes[first].0 } else { *key };
        classes[first] = (key, both);
        classes.remove(first + 1);
    }
    classes
}

/// Adds a sparse class to the class below it, if there is one of its kind.
fn join_below(joined: &mut BTreeMap<(StreamKind, i32), Histogram>, key: (StreamKind, i32), sparse: &Histogram) {
    match joined.range_mut(..key).next_back() {
        Some((&(kind, _), below)) if kind == key.0 => below.merge(sparse, 1),
        _ => {
            joined.insert(key, sparse.clone());
        }
    }
}

/// The class of runs of differences that a table suits: that of a run with symbols as frequent as it says.
pub fn class_of_table(table: &Table) -> i32 {
    class_of_magnitude(table.codes.iter().zip(&table.frequencies).map(|(&code, &count)| (code.into(), count.into())))
}

/// A quarter octave of the mean magnitude of symbols, which for rare changes says how rare they are.
pub fn class_of_magnitude(counted: impl Iterator<Item = (i32, u64)>) -> i32 {
    let (sum, symbols) = counted.fold((0, 0), |(sum, symbols), (symbol, count)| {
        (sum + u64::from(symbol.unsigned_abs().min(64)) * count, symbols + count)
    });
    let mean = sum as f64 / symbols.max(1) as f64;
    (4.0 * (mean + 1e-4).log2()).round() as i32
}

/// A table with the cost of every code.
#[derive(Clone, Debug)]
pub struct FittedTable {
    /// Ready for coding.
    pub coding: Arc<CodingTable>,
    low: i32,
    /// Bits of each code from `low` on; an exception's bits where the table has none.
    bits: Vec<f32>,
    position: Vec<Option<u8>>,
    /// The position that an exception is coded as: the cheapest.
    filler: u8,
    exception_bits: f32,
    /// Per position, how far its point lies from its code, in steps.
    point_offsets: Vec<f32>,
}

impl FittedTable {
    /// Prices every code of a table.
    pub fn new(table: Table) -> Self {
        let low = table.codes.iter().copied().map(i32::from).min().unwrap_or(0);
        let high = table.codes.iter().copied().map(i32::from).max().unwrap_or(0);
        let filler = (0..table.codes.len()).max_by_key(|&position| table.frequencies[position]).unwrap_or(0);
        let cost = |frequency: u16| (TOTAL as f32 / f32::from(frequency)).log2();
        let exception_bits = EXCEPTION_BITS as f32 + cost(table.frequencies[filler]);
        let mut bits = vec![exception_bits; (high - low + 1) as usize];
        let mut position = vec![None; bits.len()];
        for (index, (&code, &frequency)) in table.codes.iter().zip(&table.frequencies).enumerate() {
            let slot = (i32::from(code) - low) as usize;
            bits[slot] = cost(frequency);
            position[slot] = Some(index as u8);
        }
        let coding = Arc::new(CodingTable::new(table));
        let point_offsets = (0..coding.positions()).map(|position| coding.point_offset(position as u8)).collect();
        Self { coding, low, bits, position, filler: filler as u8, exception_bits, point_offsets }
    }

    /// The lowest and the highest code.
    pub fn range(&self) -> (i32, i32) {
        (self.low, self.low + self.bits.len() as i32 - 1)
    }

    /// Bits that coding `code` takes.
    #[inline]
    pub fn bits(&self, code: i32) -> f32 {
        self.bits.get((code - self.low) as usize).copied().unwrap_or(self.exception_bits)
    }

    /// Bits that coding everything counted takes.
    pub fn cost(&self, counted: &Histogram) -> f64 {
        self.cost_of(&Counts::of(counted))
    }

    fn cost_of(&self, counted: &Counts) -> f64 {
        const SUMS: usize = 4;
        let place = |code: i32| (code - counted.low).clamp(0, counted.counts.len() as i32) as usize;
        let inside = place(self.low)..place(self.low + self.bits.len() as i32);
        let (before, after) = (&counted.counts[..inside.start], &counted.counts[inside.end..]);
        let first = (counted.low - self.low).max(0) as usize;
        let (counts, rest) = counted.counts[inside].as_chunks::<SUMS>();
        let (bits, rest_bits) = self.bits[first.min(self.bits.len())..].as_chunks::<SUMS>();
        // Several sums at once, always the same: additions need not wait for one another.
        let mut sums = [0.0; SUMS];
        for (counts, bits) in counts.iter().zip(bits) {
            for (sum, (count, &bits)) in sums.iter_mut().zip(counts.iter().zip(bits)) {
                *sum += count * f64::from(bits);
            }
        }
        let bits_after = bits[counts.len()..].as_flattened().iter().chain(rest_bits);
        let rest: f64 = rest.iter().zip(bits_after).map(|(count, &bits)| count * f64::from(bits)).sum();
        let outside: f64 = before.iter().chain(after).sum();
        sums.into_iter().sum::<f64>() + rest + outside * f64::from(self.exception_bits)
    }

    /// The position of `code`, or `None` if it must become an exception.
    #[inline]
    pub fn position(&self, code: i32) -> Option<u8> {
        self.position.get(code.wrapping_sub(self.low) as u32 as usize).copied().flatten()
    }

    /// How far the point of a position lies from its code, in steps.
    #[inline]
    pub fn point_offset(&self, position: u8) -> f32 {
        self.point_offsets[usize::from(position)]
    }

    /// The position to code in place of an exception.
    pub fn filler(&self) -> u8 {
        self.filler
    }
}

/// A histogram's counts as numbers to be multiplied.
struct Counts {
    low: i32,
    counts: Vec<f64>,
}

impl Counts {
    fn of(counted: &Histogram) -> Self {
        let (low, counts) = counted.by_symbol();
        Self { low, counts: counts.iter().map(|&count| count as f64).collect() }
    }
}

/// All fitted tables of an archive, and its codebooks.
#[derive(Clone, Debug, Default)]
pub struct TablePool {
    tables: Vec<FittedTable>,
    classes: Vec<i32>,
    by_class: BTreeMap<(StreamKind, i32), usize>,
    codebooks: Vec<Arc<Codebook>>,
}

impl TablePool {
    /// Adds a table for symbols of a class and gives its number. Where the class has one already, it goes for the next that
    /// has none.
    pub fn add(&mut self, kind: StreamKind, mut class: i32, table: Table) -> usize {
        while self.by_class.contains_key(&(kind, class)) {
            class += 1;
        }
        let number = self.tables.len();
        self.by_class.insert((kind, class), number);
        self.tables.push(FittedTable::new(table));
        self.classes.push(class);
        number
    }

    /// These tables under their numbers, and behind them those of `fitted`, which has no codebooks.
    #[must_use]
    pub fn followed_by(&self, fitted: Self) -> Self {
        if self.tables.is_empty() {
            return fitted;
        }
        let mut pool = self.clone();
        let mut keys: Vec<((StreamKind, i32), usize)> = fitted.by_class.into_iter().collect();
        keys.sort_by_key(|&(_, number)| number);
        for (((kind, class), _), table) in keys.into_iter().zip(fitted.tables) {
            pool.add(kind, class, table.coding.table().clone());
        }
        pool
    }

    /// Adds a codebook of vectors and gives its number.
    pub fn add_codebook(&mut self, codebook: Arc<Codebook>) -> u16 {
        self.codebooks.push(codebook);
        self.codebooks.len() as u16 - 1
    }

    /// All codebooks, by their numbers, which are those that the archive has.
    pub fn codebooks(&self) -> &[Arc<Codebook>] {
        &self.codebooks
    }

    /// All tables ready for coding, by their numbers in this pool.
    pub fn coding_tables(&self) -> Vec<Arc<CodingTable>> {
        self.tables.iter().map(|table| Arc::clone(&table.coding)).collect()
    }

    /// A table by its number in this pool.
    pub fn table(&self, number: usize) -> &FittedTable {
        &self.tables[number]
    }

    /// The class that a table is chosen for.
    pub fn class_of(&self, number: usize) -> i32 {
        self.classes[number]
    }

    /// Raw bits and number of some table for differences: for a run of which no sample showed the like.
    pub fn any_difference(&self) -> Option<(u8, usize)> {
        self.by_class.iter().rev().find_map(|(&(kind, _), &number)| match kind {
            StreamKind::Difference { raw_bits } => Some((raw_bits, number)),
            _ => None,
        })
    }

    /// Whether a table of this kind was fitted.
    pub fn has(&self, kind: StreamKind) -> bool {
        self.by_class.range((kind, i32::MIN)..=(kind, i32::MAX)).next().is_some()
    }

    /// The table of another kind for the class that `number` was fitted to; `number` itself where there is none.
    pub fn companion(&self, number: usize, kind: StreamKind) -> usize {
        self.by_class.get(&(kind, self.classes[number])).copied().unwrap_or(number)
    }

    /// The cheapest table for a run and the bits it takes, tried around the run's own class. `None` where no table of the
    /// kind was fitted.
    pub fn choose(&self, kind: StreamKind, class: i32, run: &Histogram) -> Option<(usize, f64)> {
        let below = self.by_class.range((kind, i32::MIN)..(kind, class)).rev().take(NEIGHBOURS as usize);
        let above = self.by_class.range((kind, class)..=(kind, i32::MAX)).take(NEIGHBOURS as usize + 1);
        let counts = Counts::of(run);
        below
            .chain(above)
            .map(|(_, &number)| (number, self.tables[number].cost_of(&counts)))
            .min_by(|a, b| a.1.total_cmp(&b.1).then(a.0.cmp(&b.0)))
    }

    /// Nearly the cheapest table for a run: from the run's own class on, upwards and downwards as long as tables get cheaper.
    pub fn choose_near(&self, kind: StreamKind, class: i32, run: &Histogram) -> Option<(usize, f64)> {
        let counts = Counts::of(run);
        let cheapest = |numbers: &mut dyn Iterator<Item = &usize>| {
            let mut best: Option<(usize, f64)> = None;
            for &number in numbers {
                let bits = self.tables[number].cost_of(&counts);
                if best.is_some_and(|(_, least)| bits >= least) {
                    break;
                }
                best = Some((number, bits));
            }
            best
        };
        let below = cheapest(&mut self.by_class.range((kind, i32::MIN)..(kind, class)).rev().map(|(_, number)| number));
        let above = cheapest(&mut self.by_class.range((kind, class)..=(kind, i32::MAX)).map(|(_, number)| number));
        below.into_iter().chain(above).min_by(|a, b| a.1.total_cmp(&b.1).then(a.0.cmp(&b.0)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const KIND: StreamKind = StreamKind::Units { bits: 8, raw_bits: 0 };

    /// So many symbols that fall off exponentially on both sides of zero.
    fn symbols(count: f64, scale: f64) -> Histogram {
        let mut histogram = Histogram::default();
        for code in -30..=30_i32 {
            let share = (-f64::from(code.abs()) / scale).exp() / (2.0 * scale);
            histogram.merge(&Histogram::of(&[code]), (count * share) as u64);
        }
        histogram
    }

    fn tables(classes: &[(i32, Histogram)]) -> usize {
        let mut counted = ClassHistograms::default();
        for (class, histogram) in classes {
            counted.add(KIND, *class, histogram, 1);
        }
        counted.fit().coding_tables().len()
    }

    #[test]
    fn a_table_suits_the_class_of_the_symbols_it_was_fitted_to() {
        for scale in [0.2, 1.0, 4.0] {
            let counted = symbols(8e5, scale);
            let table = counted.fit(false).expect("something was counted");
            let (class, fitted) = (class_of_magnitude(counted.occurring()), class_of_table(&table));
            assert!((class - fitted).abs() <= 1, "{class}, {fitted}");
        }
    }

    #[test]
    fn tables_keep_their_numbers_where_others_follow_and_all_are_chosen_from() {
        let table = |scale| symbols(8e5, scale).fit(false).expect("something was counted");
        let (mut known, mut fitted) = (TablePool::default(), TablePool::default());
        let class = class_of_table(&table(4.0));
        assert_eq!(known.add(KIND, class, table(4.0)), 0);
        fitted.add(KIND, class, table(2.0));
        fitted.add(KIND, class - 8, table(1.0));
        let pool = known.followed_by(fitted);
        assert!(pool.table(0).coding.table() == &table(4.0));
        for (scale, number) in [(4.0, 0), (2.0, 1), (1.0, 2)] {
            let run = symbols(2e4, scale);
            assert_eq!(
                pool.choose(KIND, class_of_magnitude(run.occurring()), &run).map(|(table, _)| table),
                Some(number)
            );
        }
    }

    #[test]
    fn classes_share_a_table_unless_another_pays_for_itself() {
        assert_eq!(tables(&[(0, symbols(8e4, 4.0)), (1, symbols(8e4, 4.0))]), 1);
        assert_eq!(tables(&[(0, symbols(8e4, 2.0)), (1, symbols(8e4, 6.0))]), 2);
        // A small difference pays once there are symbols enough.
        assert_eq!(tables(&[(0, symbols(1e4, 4.0)), (1, symbols(1e4, 4.4))]), 1);
        assert_eq!(tables(&[(0, symbols(1e7, 4.0)), (1, symbols(1e7, 4.4))]), 2);
    }
}
