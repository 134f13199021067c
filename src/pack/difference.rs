//! A variant's tensor as differences to its base: which parameters code it shortest, and its strips (SPEC.md sections 4.3
//! and 7.7; `codec::difference` has what encoder and decoder share).

use std::collections::BTreeMap;

use rayon::prelude::*;

use super::entropy_model::{ClassHistograms, StreamKind, TablePool};
use super::histogram::Histogram;
use super::part::{EncodedPart, EncodedStrip, strip_bytes};
use super::symbols::{Placed, RunLayout};
use super::treatment::changes;
use crate::codec::difference::{Bits, CLASSES, Classes, coded_order};
use crate::codec::integers::{self, Integers};
use crate::format::difference::{BaseTensor, BasedInfo, StoredDifference, StoredLowRank};
use crate::format::part::Coding;
use crate::tensor::{Dtype, TensorInfo};

/// Elements of a run: classes begin anywhere in the coded order, and a run that two share fits neither.
const RUN_ELEMENTS: usize = 256;
/// Strips looked at to choose parameters.
const SAMPLED_STRIPS: usize = 4;
/// Of the elements of a run, one in so many may lie beyond the codes of a table before more of their bits become raw.
const BEYOND: usize = 128;
/// Where runs are coded, from none to one in so many is tried.
const MOST_BEYOND: usize = 32;
/// Codes on either side of zero that a table holds.
const REACH: u32 = 28;
/// Bits that a run must save to leave the table of the run before it: what the step takes.
const STEP_BITS: f64 = 5.0;
/// Bits per element that offsets by row, or finer classes, must save.
const CLASS_GAIN: f64 = 0.004;
/// Of the differences, so many need not be multiples of the common zero bits: they become exceptions.
const UNEVEN: usize = 2000;
/// Bits per element below which the states of all lanes would cost more than symbols do.
const FEW_LANES_BITS: f64 = 0.05;
/// Lanes then.
const FEW_LANES: usize = 4;

/// Parameters of a coded difference.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct DifferenceChoice {
    class_shift: u8,
    /// Whether classes follow how much each row changed.
    by_row: bool,
    zero_bits: u8,
    has_few_lanes: bool,
}

/// What all choices of parameters begin with, found out once.
#[derive(Clone, Debug, Default)]
struct Facts {
    /// The largest magnitude of what elements start from, as an unsigned integer.
    highest: u32,
    /// By row, octaves of the root mean square change; `None` where nothing changed. Empty where classes do not follow rows.
    row_octaves: Vec<Option<f64>>,
}

/// A tensor beside what it starts from.
#[derive(Clone, Copy, Debug)]
pub struct Pair<'a> {
    /// The tensor.
    pub tensor: &'a TensorInfo,
    /// Its bytes.
    pub bytes: &'a [u8],
    /// What its elements start from, as many bytes.
    pub predicted: &'a [u8],
}

/// Elements spread over a tensor, about so many, as integers in the order of the numbers.
pub fn spread_elements(tensor: &TensorInfo, bytes: &[u8], count: usize) -> Vec<f64> {
    let width = tensor.dtype.bits().unwrap_or(8) as usize / 8;
    let elements = bytes.len() / width.max(1);
    let value = |bytes: &[u8], element: usize| -> f64 {
        let mut number = [0; 8];
        number[..width].copy_from_slice(&bytes[element * width..][..width]);
        let number = u64::from_le_bytes(number);
        let magnitude = number & (u64::MAX >> (65 - 8 * width));
        if number >> (8 * width - 1) == 1 { -(magnitude as f64) } else { magnitude as f64 }
    };
    (0..elements).step_by((elements / count).max(1)).map(|element| value(bytes, element)).collect()
}

/// Mean distance of elements to others in units of their own spread: 0 where they are equal, about 1 where they have nothing in
/// common.
pub fn mean_distance(elements: &[f64], others: &[f64]) -> f64 {
    let (mut distance, mut spread) = (0.0, 0.0);
    for (number, (&element, other)) in elements.iter().zip(others).enumerate() {
        let next = elements[(number + elements.len() / 2 + 1) % elements.len()];
        distance += (element - other).abs();
        spread += (element - next).abs();
    }
    if distance == 0.0 { 0.0 } else { distance / spread }
}

impl DifferenceChoice {
    /// The parameters that code the tensor shortest, and bits of the part with tables of its own. `None` where differences are
    /// not coded: elements of other widths.
    pub fn choose(pair: Pair<'_>) -> Option<(Self, f64)> {
        let width = match pair.tensor.dtype.bits() {
            Some(bits @ (8 | 16 | 32)) => bits as u32,
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
        let zero_bits = common_zero_bits(pair);
        let follows_rows = pair.tensor.shape.len() >= 2 && pair.is_float();
        let facts = Facts::of(pair, follows_rows);
        let plain = Self::plain(mantissa_bits, zero_bits);
        let strips = DifferencePart::with_facts(pair, plain, &facts).layout.strips();
        let sampled: Vec<usize> = (0..strips).step_by(strips.div_ceil(SAMPLED_STRIPS)).collect();
        let cost = |choice: Self| {
            let part = DifferencePart::with_facts(pair, choice, &facts);
            let (classes, raw_bits) = part.count(&sampled);
            let elements: usize = sampled.iter().map(|&strip| part.layout.strip_elements(strip)).sum();
            let offsets =
                if choice.by_row { 8.0 * part.offsets().0.len() as f64 / pair.elements() as f64 } else { 0.0 };
            (classes.bits(&classes.fit()) + raw_bits) / elements.max(1) as f64 + offsets
        };
        let mut best = plain;
        let mut least = cost(best);
        for (finer, by_row) in [(0, true), (1, false), (2, false), (2, true)] {
            let class_shift = (mantissa_bits as u8).saturating_sub(finer);
            let choice = Self { class_shift, by_row, ..best };
            if by_row && !follows_rows {
                continue;
            }
            let bits = cost(choice);
            if bits < least - CLASS_GAIN {
                (best, least) = (choice, bits);
            }
        }
        best.has_few_lanes = least < FEW_LANES_BITS;
        let overhead = 32.0 * if best.has_few_lanes { FEW_LANES as f64 } else { 32.0 };
        Some((best, least * pair.elements() as f64 + strips as f64 * overhead))
    }

    fn plain(mantissa_bits: u32, zero_bits: u8) -> Self {
        Self { class_shift: mantissa_bits as u8, by_row: false, zero_bits, has_few_lanes: false }
    }
}

impl Pair<'_> {
    fn elements(&self) -> usize {
        self.tensor.elements() as usize
    }

    fn is_float(&self) -> bool {
        matches!(self.tensor.dtype, Dtype::F32 | Dtype::F16 | Dtype::BF16)
    }

    fn element_bytes(&self) -> usize {
        self.bytes.len() / self.elements().max(1)
    }

    fn columns(&self) -> usize {
        self.tensor.shape[1..].iter().product::<u64>() as usize
    }

    fn for_width<R>(&self, work: &impl ForWidth<R>) -> R {
        match self.element_bytes() {
            1 => work.of::<u8>(),
            2 => work.of::<u16>(),
            _ => work.of::<u32>(),
        }
    }
}

impl Facts {
    fn of(pair: Pair<'_>, follows_rows: bool) -> Self {
        let highest = pair.for_width(&Highest(pair.predicted));
        if !follows_rows {
            return Self { highest, row_octaves: Vec::new() };
        }
        let columns = pair.columns();
        let row_bytes = columns * pair.element_bytes();
        let rows = pair.bytes.par_chunks(row_bytes).zip(pair.predicted.par_chunks(row_bytes));
        let row_octaves = rows.map(|(row, predicted)| {
            let changes = changes(pair.tensor, row, predicted);
            let squares: f64 = changes.into_iter().map(|change| f64::from(change) * f64::from(change)).sum();
            let octaves = 0.5 * (squares / columns as f64).log2();
            octaves.is_finite().then_some(octaves)
        });
        Self { highest, row_octaves: row_octaves.collect() }
    }
}

/// Low bits that are zero in nearly all differences.
fn common_zero_bits(pair: Pair<'_>) -> u8 {
    if pair.tensor.dtype != Dtype::F32 {
        return 0;
    }
    let words = |bytes: &'_ [u8]| -> Vec<u32> { bytes.as_chunks().0.iter().copied().map(u32::from_le_bytes).collect() };
    let step = (pair.elements() / 65_536).max(1) * 4;
    let sampled = (0..pair.bytes.len()).step_by(step);
    let mut counts = [0_usize; 33];
    let mut total = 0;
    for at in sampled {
        let (element, predicted) = (words(&pair.bytes[at..at + 4])[0], words(&pair.predicted[at..at + 4])[0]);
        counts[predicted.difference(element).trailing_zeros() as usize] += 1;
        total += 1;
    }
    let mut uneven = 0;
    (0..32)
        .find(|&bits| {
            uneven += counts[bits];
            uneven > total / UNEVEN
        })
        .unwrap_or(0) as u8
}

/// A tensor's differences, strip by strip.
pub struct DifferencePart<'a> {
    pair: Pair<'a>,
    choice: DifferenceChoice,
    classes: Classes,
    layout: RunLayout,
}

/// A run's differences as symbols above raw bits.
struct RunSymbols {
    raw_bits: u8,
    histogram: Histogram,
}

impl<'a> DifferencePart<'a> {
    /// The differences of a pair, coded as chosen.
    pub fn new(pair: Pair<'a>, choice: DifferenceChoice) -> Self {
        Self::with_facts(pair, choice, &Facts::of(pair, choice.by_row))
    }

    fn with_facts(pair: Pair<'a>, choice: DifferenceChoice, facts: &Facts) -> Self {
        let elements = pair.elements();
        let mut layout = RunLayout::of_runs(elements, RUN_ELEMENTS);
        if choice.has_few_lanes {
            layout.lanes = layout.lanes.min(FEW_LANES);
        }
        let mut part = Self {
            pair,
            choice,
            classes: Classes {
                shift: choice.class_shift.into(),
                row_elements: elements.clamp(1, u32::MAX as usize),
                offsets: Integers::Constant(0),
            },
            layout,
        };
        part.classes = part.fit_classes(facts);
        part
    }

    /// Where classes begin: none is lost at the upper end, and where classes follow the rows each row's offset is how much
    /// larger its changes are than the least.
    fn fit_classes(&self, facts: &Facts) -> Classes {
        let highest = (facts.highest >> self.choice.class_shift) as i32;
        let mut classes = self.classes.clone();
        if !self.choice.by_row {
            classes.offsets = Integers::Constant((highest - (CLASSES as i32 - 1)).max(0));
            return classes;
        }
        // In units of classes.
        let mantissa = match self.pair.tensor.dtype {
            Dtype::BF16 => 7,
            Dtype::F16 => 10,
            _ => 23,
        };
        let per_octave = f64::from(1_u32 << (mantissa - self.choice.class_shift));
        let changes: Vec<Option<i32>> = facts
            .row_octaves
            .iter()
            .map(|octaves| octaves.map(|octaves| (per_octave * octaves).round() as i32))
            .collect();
        let largest = changes.iter().flatten().copied().max().unwrap_or(0);
        // Rows that changed most have their highest class at the top; a row that did not change at all is like them.
        let offsets: Vec<i32> = (changes.iter())
            .map(|change| (highest - (CLASSES as i32 - 1) + change.unwrap_or(largest) - largest).max(0))
            .collect();
        let lowest = offsets.iter().copied().min().unwrap_or(0);
        classes.row_elements = self.pair.columns();
        classes.offsets = match offsets.iter().all(|&offset| offset == lowest) {
            true => Integers::Constant(lowest),
            false => Integers::Each(offsets),
        };
        classes
    }

    fn offsets(&self) -> crate::format::part::StoredIntegers {
        match &self.classes.offsets {
            Integers::Constant(offset) => integers::encode(&[*offset]),
            Integers::Each(offsets) => integers::encode(offsets),
        }
    }

    /// Differences of a strip, in coded order, common zero bits still below them.
    fn strip(&self, strip: usize) -> Vec<i32> {
        self.pair.for_width(&StripOf { part: self, strip })
    }

    /// Counts the symbols of strips by kind and class; and raw bits.
    pub fn count(&self, strips: &[usize]) -> (ClassHistograms, f64) {
        let counted: Vec<(ClassHistograms, f64)> = strips
            .par_iter()
            .map(|&strip| {
                let (mut classes, mut raw_bits) = (ClassHistograms::default(), 0.0);
                for run in self.strip(strip).chunks(RUN_ELEMENTS) {
                    let symbols =
                        self.symbols_of(run, fitting_raw_bits(run, self.choice.zero_bits, run.len() / BEYOND));
                    raw_bits += f64::from(symbols.raw_bits) * run.len() as f64;
                    let kind = StreamKind::Difference { raw_bits: symbols.raw_bits };
                    classes.add(kind, class_of_run(&symbols.histogram), &symbols.histogram, 1);
                }
                (classes, raw_bits)
            })
            .collect();
        // In order, so that no sum depends on the number of threads.
        let (mut all, mut raw_bits) = (ClassHistograms::default(), 0.0);
        for (classes, bits) in &counted {
            all.merge(classes);
            raw_bits += bits;
        }
        (all, raw_bits)
    }

    /// Counts all strips, or with many of them every so many so often.
    pub fn count_all(&self, most_elements: usize) -> (ClassHistograms, f64) {
        let every = (self.layout.elements / most_elements).max(1);
        let strips: Vec<usize> = (0..self.layout.strips()).step_by(every).collect();
        let (counted, raw_bits) = self.count(&strips);
        let weight = self.layout.strips() as f64 / strips.len().max(1) as f64;
        let mut all = ClassHistograms::default();
        (0..weight.round().max(1.0) as usize).for_each(|_| all.merge(&counted));
        (all, raw_bits * weight)
    }

    fn symbols_of(&self, run: &[i32], raw_bits: u8) -> RunSymbols {
        let shift = u32::from(raw_bits) + u32::from(self.choice.zero_bits);
        let symbols: Vec<i32> = run
            .iter()
            .map(|&difference| i64::from(difference) >> shift)
            .map(|s| s.clamp(-32_768, 32_767) as i32)
            .collect();
        RunSymbols { raw_bits, histogram: Histogram::of(&symbols) }
    }

    /// How many strips there are.
    pub fn strips(&self) -> usize {
        self.layout.strips()
    }

    /// Encodes all strips.
    pub fn encode(
        &self,
        pool: &TablePool,
        reference: BaseTensor,
        low_rank: Option<StoredLowRank>,
    ) -> Option<EncodedPart> {
        let strips: Vec<(EncodedStrip, Vec<(u8, usize)>)> = (0..self.layout.strips())
            .into_par_iter()
            .map(|strip| self.encode_strip(pool, strip))
            .collect::<Option<_>>()?;
        let mut numbers: BTreeMap<(u8, usize), i32> =
            strips.iter().flat_map(|(_, tables)| tables).map(|&table| (table, 0)).collect();
        for (number, local) in numbers.values_mut().enumerate() {
            *local = number as i32;
        }
        let mut before = 0;
        let steps: Vec<i32> = (strips.iter().flat_map(|(_, tables)| tables))
            .map(|table| numbers[table] - std::mem::replace(&mut before, numbers[table]))
            .collect();
        let table_raw_bits: Vec<i32> = numbers.keys().map(|&(raw_bits, _)| raw_bits.into()).collect();
        let difference = StoredDifference {
            zero_bits: self.choice.zero_bits,
            class_shift: self.choice.class_shift,
            class_row: self.classes.row_elements as u32,
            class_offsets: self.offsets(),
            table_raw_bits: integers::encode(&table_raw_bits),
        };
        let coding = Coding::Based(BasedInfo { reference, low_rank, difference: Some(difference) });
        let tables = numbers.into_keys().map(|(_, table)| table).collect();
        let strips: Vec<EncodedStrip> = strips.into_iter().map(|(strip, _)| strip).collect();
        Some(EncodedPart::of_strips(coding, self.layout, tables, &steps, &strips))
    }

    /// One strip, and raw bits and table of each run.
    fn encode_strip(&self, pool: &TablePool, strip: usize) -> Option<(EncodedStrip, Vec<(u8, usize)>)> {
        let differences = self.strip(strip);
        let mut tables: Vec<(u8, usize)> = Vec::with_capacity(differences.len().div_ceil(RUN_ELEMENTS));
        for run in differences.chunks(RUN_ELEMENTS) {
            let mut best: Option<(f64, (u8, usize))> = None;
            let fitting = |beyond| fitting_raw_bits(run, self.choice.zero_bits, beyond);
            let (least, most) = (fitting(run.len() / MOST_BEYOND), fitting(0));
            for raw_bits in least.saturating_sub(1)..=most.min(least + 4) {
                let symbols = self.symbols_of(run, raw_bits);
                let kind = StreamKind::Difference { raw_bits };
                let class = class_of_run(&symbols.histogram);
                let Some((table, bits)) = pool.choose(kind, class, &symbols.histogram) else { continue };
                let bits = bits + f64::from(raw_bits) * run.len() as f64 + STEP_BITS;
                if best.is_none_or(|(least, _)| bits < least) {
                    best = Some((bits, (raw_bits, table)));
                }
            }
            let best = match best {
                Some(best) => best,
                None => (f64::INFINITY, pool.any_difference()?),
            };
            let chosen = match tables.last() {
                Some(&(raw_bits, table)) => {
                    let symbols = self.symbols_of(run, raw_bits);
                    let stay = pool.table(table).cost(&symbols.histogram) + f64::from(raw_bits) * run.len() as f64;
                    if stay <= best.0 { (raw_bits, table) } else { best.1 }
                }
                None => best.1,
            };
            tables.push(chosen);
        }
        let mut placed = Placed::default();
        let zero_bits = u32::from(self.choice.zero_bits);
        for (run, &(raw_bits, table)) in differences.chunks(RUN_ELEMENTS).zip(&tables) {
            let table = pool.table(table);
            for &difference in run {
                let shifted = i64::from(difference) >> zero_bits;
                let symbol = shifted >> raw_bits;
                let is_even = shifted << zero_bits == i64::from(difference);
                let position = i32::try_from(symbol).ok().filter(|_| is_even).and_then(|symbol| table.position(symbol));
                placed.positions.push(position.unwrap_or_else(|| {
                    let value = difference.to_le_bytes()[..self.pair.element_bytes()].to_vec();
                    placed.exceptions.push((placed.raw.len() as u16, value));
                    table.filler()
                }));
                placed.raw.push(shifted as u64 & ((1 << raw_bits) - 1));
            }
        }
        let coding_tables: Vec<_> = tables.iter().map(|&(_, table)| &*pool.table(table).coding).collect();
        let raw_bits_of_run = |run: usize| (u32::from(tables[run].0), 0);
        let encoded = strip_bytes(&placed, self.layout, |run, _| coding_tables[run], raw_bits_of_run);
        Some((encoded, tables))
    }
}

/// Work that depends on the width of the elements.
trait ForWidth<R> {
    fn of<T: Bits>(&self) -> R;
}

/// The largest magnitude in these bytes.
struct Highest<'a>(&'a [u8]);

impl ForWidth<u32> for Highest<'_> {
    fn of<T: Bits>(&self) -> u32 {
        T::chunks(self.0).iter().map(|&raw| T::from_raw(raw).magnitude()).max().unwrap_or(0)
    }
}

struct StripOf<'a> {
    part: &'a DifferencePart<'a>,
    strip: usize,
}

impl ForWidth<Vec<i32>> for StripOf<'_> {
    fn of<T: Bits>(&self) -> Vec<i32> {
        let DifferencePart { pair, classes, layout, .. } = self.part;
        let first = layout.run_range(layout.strip_runs(self.strip).start).start;
        let range = first * T::BYTES..(first + layout.strip_elements(self.strip)) * T::BYTES;
        let (bytes, predicted) = (&pair.bytes[range.clone()], &pair.predicted[range]);
        let mut of_elements = Vec::new();
        classes.of::<T>(first, predicted, &mut of_elements);
        let (elements, predicted) = (T::chunks(bytes), T::chunks(predicted));
        let difference = |(&before, &element)| T::from_raw(before).difference(T::from_raw(element)).signed();
        let differences: Vec<i32> = predicted.iter().zip(elements).map(difference).collect();
        coded_order(&of_elements).into_iter().map(|element| differences[element as usize]).collect()
    }
}

/// The fewest raw bits with which all symbols of a run but `most_beyond` are codes that a table can hold.
fn fitting_raw_bits(run: &[i32], zero_bits: u8, most_beyond: usize) -> u8 {
    let mut lengths = [0_usize; 34];
    for &difference in run {
        let magnitude = (i64::from(difference) >> zero_bits).unsigned_abs() as u32;
        lengths[(32 - magnitude.leading_zeros()) as usize] += 1;
    }
    let reach_bits = 32 - REACH.leading_zeros();
    let mut beyond = 0;
    let longest = (reach_bits..=33).rev().find(|&length| {
        beyond += lengths[length as usize];
        beyond > most_beyond
    });
    longest.map_or(0, |length| (length - reach_bits) as u8)
}

/// A quarter octave of the mean magnitude of a run's symbols, which for rare changes says how rare they are.
fn class_of_run(run: &Histogram) -> i32 {
    let sum: f64 = run.occurring().map(|(symbol, count)| f64::from(symbol.unsigned_abs().min(64)) * count as f64).sum();
    let mean = sum / run.symbols().max(1) as f64;
    (4.0 * (mean + 1e-4).log2()).round() as i32
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn raw_bits_grow_with_the_differences() {
        let run = |scale: i32| (0..256).map(|i| (i % 17 - 8) * scale).collect::<Vec<_>>();
        let raw_bits: Vec<u8> = [1, 2, 8, 64].into_iter().map(|scale| fitting_raw_bits(&run(scale), 0, 0)).collect();
        assert!(raw_bits.is_sorted() && raw_bits[0] == 0 && raw_bits[3] > 3, "{raw_bits:?}");
    }

    #[test]
    fn a_tensor_is_near_itself_and_far_from_others() {
        let values = |seed: u64| -> Vec<u8> {
            let mut random = fastrand::Rng::with_seed(seed);
            (0..400).flat_map(|_| half::bf16::from_f32(random.f32() - 0.5).to_le_bytes()).collect()
        };
        let tensor = TensorInfo {
            name: "w".into(),
            dtype: Dtype::BF16,
            shape: vec![20, 20],
            offset_bytes: 0,
            length_bytes: 800,
        };
        let [one, other] = [1, 2].map(|seed| spread_elements(&tensor, &values(seed), 512));
        assert_eq!(mean_distance(&one, &one), 0.0);
        assert!(mean_distance(&one, &other) > 0.5);
    }
}
