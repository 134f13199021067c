//! A variant's tensor as differences to its base: which parameters code it shortest, and its strips (SPEC.md sections 4.3
//! and 7.7; `codec::difference` has what encoder and decoder share).

mod known;
mod run;
mod search;

use std::borrow::Cow;
use std::collections::BTreeMap;

use rayon::prelude::*;

pub use self::known::KnownDifferences;
use self::known::{is_alike, is_as_short};
use self::run::{RUN_ELEMENTS, Run, class_of_run};
pub use self::search::DifferenceSearch;
use super::entropy_model::{ClassHistograms, StreamKind, TablePool};
use super::low_rank::{Work, run};
use super::part::{EncodedPart, EncodedStrip, strip_bytes};
use super::symbols::{Placed, RunLayout};
use crate::codec::difference::{Bits, CLASSES, Classes, first_places};
use crate::codec::integers::{self, Integers};
use crate::format::difference::{BaseTensor, BasedInfo, StoredDifference, StoredLowRank};
use crate::format::part::Coding;
use crate::numerics::{f32_from_bf16, f32_from_f16};
use crate::tensor::{Dtype, TensorInfo};

/// Strips of a part counted before tables are fitted, at most.
const COUNTED_STRIPS: usize = 64;
/// Bits that a run must save to leave the table of the run before it: what the step takes.
const STEP_BITS: f64 = 5.0;
/// Of the differences, so many need not be multiples of the common zero bits: they become exceptions.
const UNEVEN: usize = 2000;
/// Lanes where the states of all would cost more than symbols do.
const FEW_LANES: usize = 4;
/// Strips of a part that are coded as an earlier variant's were, to see whether they changed alike: one of so many, and so many
/// at most.
const TRIED_STRIPS_OF: usize = 16;
const TRIED_STRIPS: usize = 4;

/// Parameters of a coded difference.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct DifferenceChoice {
    class_shift: u8,
    /// Whether classes follow how much each row changed.
    by_row: bool,
    zero_bits: u8,
    has_few_lanes: bool,
}

/// A tensor's differences as they are counted before tables are fitted.
#[derive(Clone, Debug, Default)]
pub struct CountedDifferences {
    /// Their symbols.
    pub classes: ClassHistograms,
    /// Raw bits below all of them.
    pub raw_bits: f64,
    /// Strips of the part.
    pub strips: usize,
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
        let row_octaves = if follows_rows { row_octaves(pair) } else { Vec::new() };
        Self { highest: pair.for_width(&Highest(pair.predicted)), row_octaves }
    }
}

/// By row, octaves of the root mean square change; `None` where nothing changed.
fn row_octaves(pair: Pair<'_>) -> Vec<Option<f64>> {
    let columns = pair.columns();
    let row_bytes = columns * pair.element_bytes();
    let rows = pair.bytes.par_chunks(row_bytes).zip(pair.predicted.par_chunks(row_bytes));
    let octaves = rows.map(|(row, predicted)| {
        let octaves = 0.5 * (squared_change(&pair.tensor.dtype, row, predicted) / columns as f64).log2();
        octaves.is_finite().then_some(octaves)
    });
    octaves.collect()
}

/// Sum of the squares of what elements of a float type differ by.
fn squared_change(dtype: &Dtype, elements: &[u8], predicted: &[u8]) -> f64 {
    let mut sum = 0.0;
    run(SquaredChange { dtype, elements, predicted, sum: &mut sum });
    sum
}

struct SquaredChange<'a> {
    dtype: &'a Dtype,
    elements: &'a [u8],
    predicted: &'a [u8],
    sum: &'a mut f64,
}

impl Work for SquaredChange<'_> {
    #[inline(always)]
    fn run(self) {
        *self.sum = match self.dtype {
            Dtype::BF16 => self.sum_of(|element| f32_from_bf16(u16::from_le_bytes(element))),
            Dtype::F16 => self.sum_of(|element| f32_from_f16(u16::from_le_bytes(element))),
            _ => self.sum_of(f32::from_le_bytes),
        };
    }
}

impl SquaredChange<'_> {
    /// Several sums at once, always the same: additions need not wait for one another.
    #[inline(always)]
    fn sum_of<const BYTES: usize>(&self, value: impl Fn([u8; BYTES]) -> f32) -> f64 {
        const SUMS: usize = 32;
        let square = |element, before| {
            let change = f64::from(value(element) - value(before));
            change * change
        };
        let (elements, rest) = self.elements.as_chunks().0.as_chunks::<SUMS>();
        let (predicted, rest_predicted) = self.predicted.as_chunks().0.as_chunks::<SUMS>();
        let mut sums = [0.0; SUMS];
        for (elements, predicted) in elements.iter().zip(predicted) {
            for index in 0..SUMS {
                sums[index] += square(elements[index], predicted[index]);
            }
        }
        let rest = rest.iter().zip(rest_predicted).map(|(&element, &before)| square(element, before));
        sums.into_iter().chain(rest).sum()
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
    /// How an earlier variant's were coded, where these are to be coded alike.
    known: Option<&'a KnownDifferences>,
}

/// A strip, and raw bits and table of each run.
type StripAndTables = (EncodedStrip, Vec<(u8, usize)>);

impl<'a> DifferencePart<'a> {
    /// The differences of a pair, coded as chosen.
    pub fn new(pair: Pair<'a>, choice: DifferenceChoice) -> Self {
        Self::with_facts(pair, choice, &Facts::of(pair, choice.by_row))
    }

    /// The differences of a pair, coded as those of an earlier variant, whose tables are in the pool.
    pub fn as_known(pair: Pair<'a>, known: &'a KnownDifferences) -> Self {
        let layout = RunLayout { lanes: known.lanes(), ..RunLayout::of_runs(pair.elements(), RUN_ELEMENTS) };
        Self { pair, choice: known.choice(), classes: known.classes().clone(), layout, known: Some(known) }
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
            known: None,
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
    fn count(&self, strips: &[usize]) -> (ClassHistograms, f64) {
        let counted: Vec<(ClassHistograms, f64)> = strips
            .par_iter()
            .map(|&strip| {
                let (mut classes, mut raw_bits) = (ClassHistograms::default(), 0.0);
                for run in self.strip(strip).chunks(RUN_ELEMENTS) {
                    let (elements, run) = (run.len() as f64, Run::new(run, self.choice.zero_bits));
                    let raw_bits_of_run = run.raw_bits();
                    raw_bits += f64::from(raw_bits_of_run) * elements;
                    let counted = run.count(raw_bits_of_run);
                    let kind = StreamKind::Difference { raw_bits: raw_bits_of_run };
                    classes.add(kind, class_of_run(&counted), &counted, 1);
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

    /// Counts all strips, of a large part some that stand for all.
    fn count_some(&self) -> CountedDifferences {
        let strips = self.layout.strips();
        let counted = spread_strips(strips, COUNTED_STRIPS);
        let weight = strips as f64 / counted.len().max(1) as f64;
        let (classes, raw_bits) = self.count(&counted);
        let times = weight.round().max(1.0) as u64;
        CountedDifferences { classes: classes.times(times), raw_bits: raw_bits * weight, strips }
    }

    /// Encodes all strips.
    pub fn encode(
        &self,
        pool: &TablePool,
        reference: BaseTensor,
        low_rank: Option<StoredLowRank>,
    ) -> Option<EncodedPart> {
        let strips: Vec<StripAndTables> = (0..self.layout.strips())
            .into_par_iter()
            .map(|strip| self.encode_strip(pool, strip))
            .collect::<Option<_>>()?;
        // In the order of what they suit, so that the steps from run to run are small.
        let key = |(raw_bits, table): (u8, usize)| (raw_bits, pool.class_of(table), table);
        let mut numbers: BTreeMap<(u8, i32, usize), i32> =
            strips.iter().flat_map(|(_, tables)| tables).map(|&table| (key(table), 0)).collect();
        for (number, local) in numbers.values_mut().enumerate() {
            *local = number as i32;
        }
        let mut before = 0;
        let steps: Vec<i32> = (strips.iter().flat_map(|(_, tables)| tables))
            .map(|&table| numbers[&key(table)] - std::mem::replace(&mut before, numbers[&key(table)]))
            .collect();
        let table_raw_bits: Vec<i32> = numbers.keys().map(|&(raw_bits, ..)| raw_bits.into()).collect();
        let difference = StoredDifference {
            zero_bits: self.choice.zero_bits,
            class_shift: self.choice.class_shift,
            class_row: self.classes.row_elements as u32,
            class_offsets: self.offsets(),
            table_raw_bits: integers::encode(&table_raw_bits),
        };
        let coding = Coding::Based(BasedInfo { reference, low_rank, difference: Some(difference) });
        let tables = numbers.into_keys().map(|(.., table)| table).collect();
        let strips: Vec<EncodedStrip> = strips.into_iter().map(|(strip, _)| strip).collect();
        Some(EncodedPart::of_strips(coding, self.layout, tables, &steps, &strips))
    }

    /// Bytes that all strips will take coded as in an earlier variant, by some of them. `None` where these take clearly more or
    /// less than they did, or more than with tables of their own: the tensor did not change alike.
    pub fn bytes_as_known(&self, pool: &TablePool) -> Option<f64> {
        let known = self.known?;
        let strips = self.layout.strips();
        let tried = spread_strips(strips, strips.div_ceil(TRIED_STRIPS_OF).min(TRIED_STRIPS));
        let bytes: Vec<usize> = (tried.par_iter())
            .map(|&strip| Some(self.encode_strip(pool, strip)?.0.length_bytes()))
            .collect::<Option<_>>()?;
        let now: usize = bytes.into_iter().sum();
        let then: usize = tried.iter().map(|&strip| known.strip_bytes(strip)).sum();
        let (classes, raw_bits) = self.count(&tried);
        let states = 4 * self.layout.lanes * tried.len();
        let of_their_own = states + ((classes.bits(&classes.fit()) + raw_bits) / 8.0) as usize;
        let did_change_alike = is_alike(now, then) && is_as_short(now, of_their_own);
        did_change_alike.then(|| known.bytes() as f64 * now as f64 / then.max(1) as f64)
    }

    /// One strip, and raw bits and table of each run.
    fn encode_strip(&self, pool: &TablePool, strip: usize) -> Option<StripAndTables> {
        let differences = self.strip(strip);
        let mut as_known = None;
        if let Some(known) = self.known
            && known.suits_each_run(strip, differences.len())
        {
            let tables = known.tables_of(self.layout.strip_runs(strip));
            let encoded = self.encode_with(pool, &differences, &tables);
            if is_as_short(encoded.length_bytes(), known.strip_bytes(strip)) {
                return Some((encoded, tables));
            }
            as_known = Some((encoded, tables));
        }
        let tables = self.choose_tables(pool, &differences)?;
        let encoded = self.encode_with(pool, &differences, &tables);
        let is_shorter = |(as_known, _): &StripAndTables| as_known.length_bytes() <= encoded.length_bytes();
        Some(as_known.filter(is_shorter).unwrap_or((encoded, tables)))
    }

    /// Raw bits and table that code each run of a strip shortest.
    fn choose_tables(&self, pool: &TablePool, differences: &[i32]) -> Option<Vec<(u8, usize)>> {
        let mut tables: Vec<(u8, usize)> = Vec::with_capacity(differences.len().div_ceil(RUN_ELEMENTS));
        for run in differences.chunks(RUN_ELEMENTS) {
            let elements = run.len() as f64;
            let run = Run::new(run, self.choice.zero_bits);
            let candidates = run.candidates();
            let mut best: Option<(f64, (u8, usize))> = None;
            for (raw_bits, histogram) in &candidates {
                let kind = StreamKind::Difference { raw_bits: *raw_bits };
                let Some((table, bits)) = pool.choose_near(kind, class_of_run(histogram), histogram) else { continue };
                let bits = bits + f64::from(*raw_bits) * elements + STEP_BITS;
                if best.is_some_and(|(least, _)| bits >= least) {
                    break; // more raw bits save no more
                }
                best = Some((bits, (*raw_bits, table)));
            }
            let best = match best {
                Some(best) => best,
                None => (f64::INFINITY, pool.any_difference()?),
            };
            let chosen = match tables.last() {
                Some(&(raw_bits, table)) => {
                    let counted = candidates.iter().find(|candidate| candidate.0 == raw_bits);
                    let counted =
                        counted.map_or_else(|| Cow::Owned(run.count(raw_bits)), |(_, counted)| Cow::Borrowed(counted));
                    let stay = pool.table(table).cost(&counted) + f64::from(raw_bits) * elements;
                    if stay <= best.0 { (raw_bits, table) } else { best.1 }
                }
                None => best.1,
            };
            tables.push(chosen);
        }
        Some(tables)
    }

    /// A strip coded with these raw bits and tables of its runs.
    fn encode_with(&self, pool: &TablePool, differences: &[i32], tables: &[(u8, usize)]) -> EncodedStrip {
        let mut placed = Placed::default();
        placed.positions.reserve(differences.len());
        let has_raw_bits = tables.iter().any(|&(raw_bits, _)| raw_bits > 0);
        if has_raw_bits {
            placed.raw.reserve(differences.len());
        }
        let zero_bits = u32::from(self.choice.zero_bits);
        for (run, &(raw_bits, table)) in differences.chunks(RUN_ELEMENTS).zip(tables) {
            let table = pool.table(table);
            let (first, symbol_shift, raw_mask) =
                (placed.positions.len(), u32::from(raw_bits).min(31), (1_u64 << raw_bits) - 1);
            let exceptions = &mut placed.exceptions;
            placed.positions.extend(run.iter().enumerate().map(|(index, &difference)| {
                let shifted = difference >> zero_bits;
                let is_even = shifted << zero_bits == difference;
                let position = table.position(shifted >> symbol_shift).filter(|_| is_even);
                position.unwrap_or_else(|| {
                    let value = difference.to_le_bytes()[..self.pair.element_bytes()].to_vec();
                    exceptions.push(((first + index) as u16, value));
                    table.filler()
                })
            }));
            if has_raw_bits {
                placed.raw.extend(run.iter().map(|&difference| (difference >> zero_bits) as u64 & raw_mask));
            }
        }
        let coding_tables: Vec<_> = tables.iter().map(|&(_, table)| &*pool.table(table).coding).collect();
        let raw_bits_of_run = |run: usize| (u32::from(tables[run].0), 0);
        strip_bytes(&placed, self.layout, |run, _| coding_tables[run], raw_bits_of_run)
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
        let mut highest = 0;
        run(HighestOf::<T> { elements: T::chunks(self.0), highest: &mut highest });
        highest
    }
}

struct HighestOf<'a, T: Bits> {
    elements: &'a [T::Raw],
    highest: &'a mut u32,
}

impl<T: Bits> Work for HighestOf<'_, T> {
    #[inline(always)]
    fn run(self) {
        *self.highest = self.elements.iter().fold(0, |highest, &raw| highest.max(T::from_raw(raw).magnitude()));
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
        let mut next = first_places(&of_elements);
        let mut differences = vec![0; of_elements.len()];
        for ((&class, &before), &element) in of_elements.iter().zip(predicted).zip(elements) {
            let place = &mut next[usize::from(class)];
            differences[*place as usize] = T::from_raw(before).difference(T::from_raw(element)).signed();
            *place += 1;
        }
        differences
    }
}

/// So many of a part's strips at most, spread over it, the first among them: the last may be short.
fn spread_strips(strips: usize, sampled: usize) -> Vec<usize> {
    let sampled = sampled.clamp(1, strips.max(1));
    (0..sampled.min(strips)).map(|number| number * strips / sampled).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

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
