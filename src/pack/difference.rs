//! A variant's tensor as differences to its base: which parameters code it shortest, and its strips (SPEC.md sections 4.3
//! and 7.7; `codec::difference` has what encoder and decoder share).

mod known;
mod pair;
mod run;
mod search;

use std::borrow::Cow;
use std::collections::BTreeMap;

use rayon::prelude::*;

pub use self::known::KnownDifferences;
use self::known::{is_alike, is_as_short};
use self::pair::{Facts, ForWidth, common_zero_bits};
pub use self::pair::{Pair, mean_distance, spread_elements};
use self::run::{RUN_ELEMENTS, Run, class_of_run};
pub use self::search::DifferenceSearch;
use super::entropy_model::{ClassHistograms, StreamKind, TablePool};
use super::part::{EncodedPart, EncodedStrip, strip_bytes};
use super::symbols::{Placed, RunLayout};
use crate::codec::difference::{Bits, CLASSES, Classes, first_places};
use crate::codec::integers::{self, Integers};
use crate::format::difference::{BaseTensor, BasedInfo, StoredDifference, StoredLowRank};
use crate::format::part::Coding;
use crate::tensor::Dtype;

/// Strips of a part counted before tables are fitted, at most.
const COUNTED_STRIPS: usize = 64;
/// Bits that a run must save to leave the table of the run before it: what the step takes.
const STEP_BITS: f64 = 5.0;
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
    /// less than they did, or more than with tables of their own in the same order: the tensor did not change alike.
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
