//! The encoder's entropy model: integer tables fitted to the data, one chosen per run by its measured cost (section 6.1).
//!
//! The paper's learned model maps a context to a distribution (Eqs. 86-90). Here the context is a run's scale, quantized to a
//! quarter of an octave, and what the model learned is sent as tables and one table number per run, so that no decoder
//! evaluates a distribution (SPEC.md section 5).

use std::collections::BTreeMap;
use std::sync::Arc;

use crate::codec::entropy::CodingTable;
use crate::format::limits::TABLE_POSITIONS;
use crate::format::table::{BUCKET, BUCKET_BOUNDARIES, POINT_UNIT, TOTAL, Table, first_overfull_bucket};

/// Bits charged for a symbol that its table does not hold: position and value of an exception.
const EXCEPTION_BITS: f32 = 40.0;
/// Classes with fewer symbols than this share a neighbour's table: a table must earn its own bytes.
const CLASS_SYMBOLS: u64 = 4096;
/// Tables tried around a run's own class.
const NEIGHBOURS: i32 = 4;

/// Counts of codes, and the mean place of the values that got each code.
#[derive(Clone, Debug, Default)]
pub struct Histogram {
    /// Smallest code counted.
    low: i32,
    counts: Vec<u64>,
    /// Per code, the sum of `value / step - code`; stays zero where codes are exact.
    offsets: Vec<f64>,
    symbols: u64,
}

impl Histogram {
    fn slot(&mut self, code: i32) -> usize {
        if self.counts.is_empty() {
            self.low = code;
        }
        if code < self.low {
            let grow = (self.low - code) as usize;
            self.counts.splice(0..0, std::iter::repeat_n(0, grow));
            self.offsets.splice(0..0, std::iter::repeat_n(0.0, grow));
            self.low = code;
        }
        let slot = (code - self.low) as usize;
        if slot >= self.counts.len() {
            self.counts.resize(slot + 1, 0);
            self.offsets.resize(slot + 1, 0.0);
        }
        slot
    }

    /// Counts `code` once, for a value that lies `offset` steps beside it.
    pub fn add(&mut self, code: i32, offset: f32) {
        let slot = self.slot(code);
        self.counts[slot] += 1;
        self.offsets[slot] += f64::from(offset);
        self.symbols += 1;
    }

    /// Adds all of `other`.
    pub fn merge(&mut self, other: &Self) {
        for (index, (&count, &offset)) in other.counts.iter().zip(&other.offsets).enumerate() {
            if count > 0 {
                let slot = self.slot(other.low + index as i32);
                self.counts[slot] += count;
                self.offsets[slot] += offset;
            }
        }
        self.symbols += other.symbols;
    }

    /// Codes that occur, with their counts.
    pub fn occurring(&self) -> impl Iterator<Item = (i32, u64)> + '_ {
        let codes = self.counts.iter().enumerate().map(|(index, &count)| (self.low + index as i32, count));
        codes.filter(|&(_, count)| count > 0)
    }

    /// Symbols counted.
    pub fn symbols(&self) -> u64 {
        self.symbols
    }

    /// Fits a table over a whole range of codes, at least -2 to 2: a search may then choose any of them.
    pub fn fit_range(&self) -> Option<Table> {
        let mut codes: std::collections::VecDeque<(i32, u64)> =
            (0..self.counts.len()).map(|slot| (self.low + slot as i32, self.counts[slot])).collect();
        let rare = self.symbols / 40_000;
        loop {
            let (first, last) = (*codes.front()?, *codes.back()?);
            if codes.len() <= TABLE_POSITIONS as usize && first.1 > rare && last.1 > rare {
                break;
            }
            // From the thinner end.
            if first.1 <= last.1 {
                codes.pop_front()
            } else {
                codes.pop_back()
            };
        }
        while codes.front()?.0 > -2 {
            codes.push_front((codes.front()?.0 - 1, 0));
        }
        while codes.back()?.0 < 2 {
            codes.push_back((codes.back()?.0 + 1, 0));
        }
        let mut codes: Vec<(i32, u64)> = codes.into();
        while codes.len() > TABLE_POSITIONS as usize {
            codes.pop();
        }
        codes.sort_by_key(|&(code, count)| (std::cmp::Reverse(count), code));
        self.table_of(&codes, true)
    }

    /// Fits a table: the most frequent codes, frequencies in proportion, points at the centroids if `with_points`.
    /// `None` where nothing was counted.
    pub fn fit(&self, with_points: bool) -> Option<Table> {
        let mut codes: Vec<(i32, u64)> = self.occurring().filter(|&(code, _)| i16::try_from(code).is_ok()).collect();
        codes.sort_by_key(|&(code, count)| (std::cmp::Reverse(count), code));
        codes.truncate(TABLE_POSITIONS as usize);
        // Too rare for one slot in 4096 to be worth its share: cheaper as exceptions.
        let rare = self.symbols / 40_000;
        while codes.len() > 2 && codes.last().is_some_and(|&(_, count)| count <= rare) {
            codes.pop();
        }
        if codes.is_empty() {
            return None;
        }
        if codes.len() == 1 {
            let other = if codes[0].0 == 0 { 1 } else { 0 };
            codes.push((other, 0));
        }
        self.table_of(&codes, with_points)
    }

    /// The table over these codes and counts.
    fn table_of(&self, codes: &[(i32, u64)], with_points: bool) -> Option<Table> {
        let counts: Vec<u64> = codes.iter().map(|&(_, count)| count).collect();
        let (order, frequencies) = [1, 2, 3, 4, 6, 8, 11].into_iter().find_map(|least| {
            let frequencies = scaled_frequencies(&counts, least);
            spread(&frequencies).map(|order| (order, frequencies))
        })?;
        let offset_of = |code: i32| {
            let slot = (code - self.low) as usize;
            let Some(&count) = self.counts.get(slot) else { return 0 };
            if count < 8 { 0 } else { (self.offsets[slot] / count as f64 * f64::from(POINT_UNIT)).round() as i8 }
        };
        let offsets: Vec<i8> = order.iter().map(|&index| offset_of(codes[index].0)).collect();
        let with_points = with_points && offsets.iter().any(|&offset| offset != 0);
        Some(Table {
            codes: order.iter().map(|&index| codes[index].0 as i16).collect(),
            frequencies: order.iter().map(|&index| frequencies[index]).collect(),
            point_offsets: if with_points { offsets } else { Vec::new() },
        })
    }
}

/// Frequencies that sum to 4096, none below `least`, as near to the counts in coded length as single steps get.
fn scaled_frequencies(counts: &[u64], least: u16) -> Vec<u16> {
    let total: u64 = counts.iter().sum::<u64>().max(1);
    let most = TOTAL as u16 - least * (counts.len() as u16 - 1);
    let mut frequencies: Vec<u16> =
        counts.iter().map(|&count| ((count * u64::from(TOTAL) / total) as u16).clamp(least, most)).collect();
    let mut sum: i64 = frequencies.iter().copied().map(i64::from).sum();
    // What one slot more or less is worth to a symbol: count / frequency, the slope of its coded length.
    let slope = |index: usize, frequency: u16| counts[index] as f64 / f64::from(frequency);
    while sum != i64::from(TOTAL) {
        let grow = sum < i64::from(TOTAL);
        let candidates = (0..counts.len()).filter(|&index| grow || frequencies[index] > least);
        let best = if grow {
            candidates.max_by(|&a, &b| slope(a, frequencies[a]).total_cmp(&slope(b, frequencies[b])))
        } else {
            candidates.min_by(|&a, &b| slope(a, frequencies[a]).total_cmp(&slope(b, frequencies[b])))
        };
        let best = best.expect("the bounds leave room for a sum of 4096");
        if grow {
            frequencies[best] += 1;
            sum += 1;
        } else {
            frequencies[best] -= 1;
            sum -= 1;
        }
    }
    frequencies
}

/// An order of the symbols that keeps the depth rule, found greedily: the smallest symbol wherever the bucket has room for
/// its boundary, the largest where not. `None` where that does not work out.
fn spread(frequencies: &[u16]) -> Option<Vec<usize>> {
    let mut left: Vec<usize> = (0..frequencies.len()).collect();
    left.sort_by_key(|&index| (frequencies[index], index));
    let mut left = std::collections::VecDeque::from(left);
    let mut order = Vec::with_capacity(frequencies.len());
    let (mut boundary, mut bucket, mut inside) = (0_u32, 0, 0);
    while let Some(&smallest) = left.front() {
        let next = boundary + u32::from(frequencies[smallest]);
        let full = next % BUCKET != 0 && next / BUCKET == bucket && inside == BUCKET_BOUNDARIES;
        let chosen = if full { left.pop_back()? } else { left.pop_front()? };
        boundary += u32::from(frequencies[chosen]);
        if boundary / BUCKET != bucket {
            (bucket, inside) = (boundary / BUCKET, 0);
        }
        inside += usize::from(boundary % BUCKET != 0);
        order.push(chosen);
    }
    let ordered: Vec<u16> = order.iter().map(|&index| frequencies[index]).collect();
    first_overfull_bucket(&ordered).is_none().then_some(order)
}

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
    /// Scalar quantized codes above `raw_bits` raw ones.
    Quantized {
        /// Raw bits per symbol.
        raw_bits: u8,
    },
    /// Trellis-coded codes above `raw_bits` raw ones.
    Trellis {
        /// Raw bits per symbol.
        raw_bits: u8,
        /// Which of the two quantizers: 0 or 1.
        quantizer: u8,
    },
}

/// Histograms by kind and class, gathered over a whole checkpoint before tables are fitted.
#[derive(Clone, Debug, Default)]
pub struct ClassHistograms(BTreeMap<(StreamKind, i32), Histogram>);

impl ClassHistograms {
    /// Adds the codes of one run.
    pub fn add(&mut self, kind: StreamKind, class: i32, run: &Histogram) {
        self.0.entry((kind, class)).or_default().merge(run);
    }

    /// Adds everything of `other`.
    pub fn merge(&mut self, other: &Self) {
        for (&(kind, class), histogram) in &other.0 {
            self.add(kind, class, histogram);
        }
    }

    /// Fits one table per class, sparse classes joined to a neighbour.
    pub fn fit(&self) -> TablePool {
        let mut joined: BTreeMap<(StreamKind, i32), Histogram> = BTreeMap::new();
        let mut pending: Option<((StreamKind, i32), Histogram)> = None;
        for (&key, histogram) in &self.0 {
            let (key, histogram) = match pending.take() {
                Some(((kind, _), mut sparse)) if kind == key.0 => {
                    sparse.merge(histogram);
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
        for ((kind, class), histogram) in joined {
            let table = match kind {
                StreamKind::Trellis { raw_bits: 0, .. } => histogram.fit_range(),
                StreamKind::Trellis { .. } => histogram.fit_range().map(Table::without_points),
                StreamKind::Quantized { raw_bits: 0 } => histogram.fit(true),
                StreamKind::Quantized { .. } | StreamKind::Split { .. } => histogram.fit(false),
            };
            if let Some(table) = table {
                pool.by_class.insert((kind, class), pool.tables.len());
                pool.tables.push(FittedTable::new(table));
                pool.classes.push(class);
            }
        }
        pool
    }
}

/// Adds a sparse class to the class below it, if there is one of its kind.
fn join_below(joined: &mut BTreeMap<(StreamKind, i32), Histogram>, key: (StreamKind, i32), sparse: &Histogram) {
    match joined.range_mut(..key).next_back() {
        Some((&(kind, _), below)) if kind == key.0 => below.merge(sparse),
        _ => {
            joined.insert(key, sparse.clone());
        }
    }
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
}

impl FittedTable {
    /// Prices every code of a table.
    pub fn new(table: Table) -> Self {
        let low = table.codes.iter().copied().map(i32::from).min().unwrap_or(0);
        let high = table.codes.iter().copied().map(i32::from).max().unwrap_or(0);
        let filler = (0..table.codes.len()).max_by_key(|&position| table.frequencies[position]).unwrap_or(0);
        let cost = |frequency: u16| (TOTAL as f32 / f32::from(frequency)).log2();
        let exception_bits = EXCEPTION_BITS + cost(table.frequencies[filler]);
        let mut bits = vec![exception_bits; (high - low + 1) as usize];
        let mut position = vec![None; bits.len()];
        for (index, (&code, &frequency)) in table.codes.iter().zip(&table.frequencies).enumerate() {
            let slot = (i32::from(code) - low) as usize;
            bits[slot] = cost(frequency);
            position[slot] = Some(index as u8);
        }
        Self { coding: Arc::new(CodingTable::new(table)), low, bits, position, filler: filler as u8, exception_bits }
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

    /// The position of `code`, or `None` if it must become an exception.
    #[inline]
    pub fn position(&self, code: i32) -> Option<u8> {
        self.position.get((code - self.low) as usize).copied().flatten()
    }

    /// The position to code in place of an exception.
    pub fn filler(&self) -> u8 {
        self.filler
    }
}

/// All fitted tables of an archive.
#[derive(Clone, Debug, Default)]
pub struct TablePool {
    tables: Vec<FittedTable>,
    classes: Vec<i32>,
    by_class: BTreeMap<(StreamKind, i32), usize>,
}

impl TablePool {
    /// All tables ready for coding, by their numbers in this pool.
    pub fn coding_tables(&self) -> Vec<Arc<CodingTable>> {
        self.tables.iter().map(|table| Arc::clone(&table.coding)).collect()
    }

    /// A table by its number in this pool.
    pub fn table(&self, number: usize) -> &FittedTable {
        &self.tables[number]
    }

    /// The class that a table was fitted to.
    pub fn class_of(&self, number: usize) -> i32 {
        self.classes[number]
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
        let cost = |number: usize| -> f64 {
            let table = &self.tables[number];
            run.occurring().map(|(code, count)| count as f64 * f64::from(table.bits(code))).sum()
        };
        below
            .chain(above)
            .map(|(_, &number)| (number, cost(number)))
            .min_by(|a, b| a.1.total_cmp(&b.1).then(a.0.cmp(&b.0)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn histogram(counts: &[(i32, u64)]) -> Histogram {
        let mut histogram = Histogram::default();
        for &(code, count) in counts {
            for _ in 0..count {
                histogram.add(code, 0.0);
            }
        }
        histogram
    }

    #[test]
    fn a_constant_run_costs_almost_nothing() {
        let table = FittedTable::new(histogram(&[(7, 10_000)]).fit(false).expect("something was counted"));
        assert!(table.bits(7) < 0.001);
        assert_eq!(table.coding.positions(), 2);
    }

    #[test]
    fn one_giant_among_dwarfs_still_keeps_the_depth_rule() {
        let mut counts = vec![(0, 1_000_000)];
        counts.extend((1..61).map(|code| (code, 30)));
        let mut big = Histogram::default();
        for (code, count) in counts {
            let slot = big.slot(code);
            big.counts[slot] = count;
            big.symbols += count;
        }
        let table = big.fit(false).expect("something was counted");
        assert_eq!(first_overfull_bucket(&table.frequencies), None);
    }

    #[test]
    fn points_lie_at_the_centroids() {
        let mut histogram = Histogram::default();
        for _ in 0..100 {
            histogram.add(1, -0.25);
            histogram.add(-1, 0.25);
        }
        let table = histogram.fit(true).expect("something was counted");
        let offset = |code: i16| table.point_offsets[table.codes.iter().position(|&c| c == code).expect("counted")];
        assert_eq!((offset(1), offset(-1)), (-64, 64));
    }

    proptest! {
        #[test]
        fn every_histogram_gives_a_valid_table(counts in prop::collection::vec((-200..200_i32, 0..5000_u64), 1..120)) {
            let mut histogram = Histogram::default();
            for (code, count) in counts {
                let slot = histogram.slot(code);
                histogram.counts[slot] += count;
                histogram.symbols += count;
            }
            if let Some(table) = histogram.fit(false) {
                let mut writer = crate::format::bytes::Writer::new();
                table.write(&mut writer);
                let bytes = writer.into_bytes();
                prop_assert_eq!(Table::parse(&mut crate::format::bytes::Reader::new("test", &bytes)), Ok(table));
            } else {
                prop_assert_eq!(histogram.symbols(), 0);
            }
        }
    }
}
