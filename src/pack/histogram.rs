//! Counts of symbols, and the integer table that fits them best (section 6.1; SPEC.md section 5).

use crate::format::limits::TABLE_POSITIONS;
use crate::format::table::{BUCKET, BUCKET_BOUNDARIES, POINT_UNIT, TOTAL, Table, first_overfull_bucket};

/// Bits charged for a symbol that its table does not hold: position and value of an exception.
pub const EXCEPTION_BITS: f64 = 40.0;

/// Counts of symbols, and where the values that got each symbol lie on average.
#[derive(Clone, Debug, Default)]
pub struct Histogram {
    /// Smallest symbol there is room for.
    low: i32,
    counts: Vec<u64>,
    /// Per symbol, the sum of how far its values lie beside its point, in steps; empty where symbols are exact or nothing is
    /// known of it.
    offsets: Vec<f64>,
    symbols: u64,
}

impl Histogram {
    /// Counts symbols.
    pub fn of(symbols: &[i32]) -> Self {
        let Some((low, slots)) = span(symbols) else { return Self::default() };
        // Two tallies: neighbours that are equal, as most are at low rates, need not wait for one another.
        let mut tallies = vec![[0_u32; 2]; slots];
        for pair in symbols.chunks(2) {
            for (tally, &symbol) in pair.iter().enumerate() {
                tallies[(symbol - low) as usize][tally] += 1;
            }
        }
        let counts = tallies.into_iter().map(|[a, b]| u64::from(a) + u64::from(b)).collect();
        Self { low, counts, offsets: Vec::new(), symbols: symbols.len() as u64 }
    }

    /// Counts symbols whose values lie so many steps beside their points.
    pub fn of_placed(symbols: &[i32], offsets: &[f32]) -> Self {
        let mut histogram = Self::of(symbols);
        let mut sums = vec![0.0; histogram.counts.len()];
        for (&symbol, &offset) in symbols.iter().zip(offsets) {
            sums[(symbol - histogram.low) as usize] += f64::from(offset);
        }
        histogram.offsets = sums;
        histogram
    }

    /// Adds all of `other`, `weight` times.
    pub fn merge(&mut self, other: &Self, weight: u64) {
        if other.counts.is_empty() {
            return;
        }
        self.make_room(other.low, other.low + other.counts.len() as i32 - 1);
        let first = (other.low - self.low) as usize;
        for (count, &more) in self.counts[first..].iter_mut().zip(&other.counts) {
            *count += weight * more;
        }
        if !other.offsets.is_empty() {
            self.offsets.resize(self.counts.len(), 0.0);
            for (offset, &more) in self.offsets[first..].iter_mut().zip(&other.offsets) {
                *offset += weight as f64 * more;
            }
        }
        self.symbols += weight * other.symbols;
    }

    /// Grows to hold the symbols from `low` to `high`.
    fn make_room(&mut self, low: i32, high: i32) {
        if self.counts.is_empty() {
            self.low = low;
        }
        if low < self.low {
            let grow = (self.low - low) as usize;
            self.counts.splice(0..0, std::iter::repeat_n(0, grow));
            if !self.offsets.is_empty() {
                self.offsets.splice(0..0, std::iter::repeat_n(0.0, grow));
            }
            self.low = low;
        }
        let slots = (high - self.low + 1) as usize;
        if slots > self.counts.len() {
            self.counts.resize(slots, 0);
            if !self.offsets.is_empty() {
                self.offsets.resize(slots, 0.0);
            }
        }
    }

    /// What points at the centroids take off the squared error, in squared steps.
    pub fn centroid_gain(&self) -> f64 {
        let gains = self.offsets.iter().zip(&self.counts).filter(|&(_, &count)| count > 0);
        gains.map(|(offset, &count)| offset * offset / count as f64).sum()
    }

    /// The smallest symbol there is room for, and the counts of all from it on.
    pub fn by_symbol(&self) -> (i32, &[u64]) {
        (self.low, &self.counts)
    }

    /// The histogram of the same symbols without their lowest bit: two neighbours, the even one first, become one.
    #[must_use]
    pub fn halved(&self) -> Self {
        let low = self.low >> 1;
        let mut counts = vec![0; (self.counts.len() + 2) / 2];
        for (slot, &count) in self.counts.iter().enumerate() {
            counts[(((self.low + slot as i32) >> 1) - low) as usize] += count;
        }
        Self { low, counts, offsets: Vec::new(), symbols: self.symbols }
    }

    /// Symbols that occur, with their counts.
    pub fn occurring(&self) -> impl Iterator<Item = (i32, u64)> + '_ {
        let codes = self.counts.iter().enumerate().map(|(index, &count)| (self.low + index as i32, count));
        codes.filter(|&(_, count)| count > 0)
    }

    /// Bits of all symbols with the distribution that they have.
    pub fn entropy_bits(&self) -> f64 {
        let total = self.symbols as f64;
        self.occurring().map(|(_, count)| count as f64 * (total / count as f64).log2()).sum()
    }

    /// Symbols counted.
    pub fn symbols(&self) -> u64 {
        self.symbols
    }

    /// Fits a table over a whole range of codes, at least -2 to 2: a search may then choose any of them.
    pub fn fit_range(&self, with_points: bool) -> Option<Table> {
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
        self.table_of(&codes, with_points)
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

    /// Fits a table of 8, 16 or 32 neighbouring codes that all take the same number of bits. `None` where nothing was counted.
    pub fn fit_fixed_length(&self, with_points: bool) -> Option<Table> {
        let cost = |&(code_bits, low): &(u32, i32)| {
            let inside: u64 = (self.occurring())
                .filter(|&(code, _)| (low..low + (1 << code_bits)).contains(&code))
                .map(|(_, count)| count)
                .sum();
            f64::from(code_bits) + EXCEPTION_BITS * (self.symbols - inside) as f64 / self.symbols as f64
        };
        let windows = (3..=5).flat_map(|code_bits| {
            let half = 1 << (code_bits - 1);
            // The search needs the codes around zero.
            (2 - 2 * half + 1..=-2).map(move |low| (code_bits, low))
        });
        let (code_bits, low) = (self.symbols > 0).then(|| {
            windows.min_by(|a, b| cost(a).total_cmp(&cost(b)).then(a.0.cmp(&b.0))).expect("there are windows")
        })?;
        let codes: Vec<i32> = (low..low + (1 << code_bits)).collect();
        let offsets: Vec<i8> = codes.iter().map(|&code| self.point_offset(code)).collect();
        Some(Table {
            codes: codes.iter().map(|&code| code as i16).collect(),
            frequencies: vec![(TOTAL >> code_bits) as u16; codes.len()],
            point_offsets: if with_points { offsets } else { Vec::new() },
        })
    }

    /// Where the centroid of a code lies beside it, in units of a point; 0 where too few values say so.
    fn point_offset(&self, code: i32) -> i8 {
        let slot = (code - self.low) as usize;
        let (Some(&count), Some(&offset)) = (self.counts.get(slot), self.offsets.get(slot)) else { return 0 };
        if count < 8 { 0 } else { (offset / count as f64 * f64::from(POINT_UNIT)).round() as i8 }
    }

    /// The table over these codes and counts.
    fn table_of(&self, codes: &[(i32, u64)], with_points: bool) -> Option<Table> {
        let counts: Vec<u64> = codes.iter().map(|&(_, count)| count).collect();
        let (order, frequencies) = [1, 2, 3, 4, 6, 8, 11].into_iter().find_map(|least| {
            let frequencies = scaled_frequencies(&counts, least);
            spread(&frequencies).map(|order| (order, frequencies))
        })?;
        let offsets: Vec<i8> = order.iter().map(|&index| self.point_offset(codes[index].0)).collect();
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

/// The smallest symbol, and how many there are from it to the largest.
fn span(symbols: &[i32]) -> Option<(i32, usize)> {
    let first = *symbols.first()?;
    let (low, high) = symbols.iter().fold((first, first), |(low, high), &symbol| (low.min(symbol), high.max(symbol)));
    Some((low, (high - low + 1) as usize))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn histogram(counts: &[(i32, u64)]) -> Histogram {
        let mut histogram = Histogram::default();
        for &(code, count) in counts {
            histogram.merge(&Histogram::of(&[code]), count);
        }
        histogram
    }

    #[test]
    fn a_constant_run_costs_almost_nothing() {
        let table = histogram(&[(7, 10_000)]).fit(false).expect("something was counted");
        assert_eq!(table.codes.len(), 2);
        assert!(table.frequencies[table.codes.iter().position(|&code| code == 7).expect("counted")] > 4090);
    }

    #[test]
    fn one_giant_among_dwarfs_still_keeps_the_depth_rule() {
        let mut counts = vec![(0, 1_000_000)];
        counts.extend((1..61).map(|code| (code, 30)));
        let table = histogram(&counts).fit(false).expect("something was counted");
        assert_eq!(first_overfull_bucket(&table.frequencies), None);
    }

    #[test]
    fn points_lie_at_the_centroids() {
        let (symbols, offsets) = ([1, -1].repeat(100), [-0.25, 0.25].repeat(100));
        let table = Histogram::of_placed(&symbols, &offsets).fit(true).expect("something was counted");
        let offset = |code: i16| table.point_offsets[table.codes.iter().position(|&c| c == code).expect("counted")];
        assert_eq!((offset(1), offset(-1)), (-64, 64));
    }

    #[test]
    fn codes_of_fixed_length_all_take_the_same_bits() {
        let codes: Vec<i32> = (-5..=11).flat_map(|code| [code; 40]).collect();
        let table = Histogram::of(&codes).fit_fixed_length(true).expect("something was counted");
        assert_eq!(table.frequencies, [128; 32], "17 codes take five bits");
        assert!((-5..=11).all(|code| table.codes.contains(&code)));
        assert_eq!(first_overfull_bucket(&table.frequencies), None);
        assert_eq!(Histogram::default().fit_fixed_length(true), None);
    }

    #[test]
    fn a_weight_counts_a_run_so_often() {
        let run = Histogram::of_placed(&[-3, 5, 5], &[0.5, 0.25, 0.0]);
        let mut weighted = Histogram::of(&[7]);
        weighted.merge(&run, 3);
        assert_eq!(weighted.occurring().collect::<Vec<_>>(), [(-3, 3), (5, 6), (7, 1)]);
        assert_eq!((weighted.symbols(), weighted.offsets[0], weighted.offsets[8]), (10, 1.5, 0.75));
    }

    proptest! {
        #[test]
        fn a_halved_histogram_is_that_of_shifted_symbols(symbols in prop::collection::vec(-50..50_i32, 1..90)) {
            let shifted: Vec<i32> = symbols.iter().map(|symbol| symbol >> 1).collect();
            let (halved, counted) = (Histogram::of(&symbols).halved(), Histogram::of(&shifted));
            prop_assert!(halved.occurring().eq(counted.occurring()));
            prop_assert_eq!(halved.symbols(), counted.symbols());
        }

        #[test]
        fn every_histogram_gives_a_valid_table(counts in prop::collection::vec((-200..200_i32, 0..5000_u64), 1..120)) {
            let histogram = histogram(&counts);
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
