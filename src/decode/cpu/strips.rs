//! Strips of one part decoded in lockstep: runs walked, tables and values chosen. Safe code; what is worth writing per
//! instruction set is behind [`Kernels`]. What follows entropy decoding is in `finishing`.

mod finishing;

use std::ops::Range;
use std::sync::Arc;

use super::kernels::{
    Joined, Kernels, Lanes, Output, PORTABLE, RunJob, RunKernel, RunValues, StoredRaw, TableUse, WORDS_PADDING, Words,
};
use super::stages::{Stage, StageClock};
use super::values::Meaning;
use crate::codec::entropy::CodingTable;
use crate::codec::trellis::Trellis;
use crate::codec::units::UnitCoding;
use crate::decode::prepared::{PartKind, Prediction, PreparedPart, Quantizer, Symbols};
use crate::decode::{DecodeError, StripJob};
use crate::format::part::{Carrier, TrellisTables};
use crate::format::strip::{LANES, StripLayout, raw_bytes_of_run};

/// Tables whose values are kept for a whole call; a part that lists more has them made run by run.
const KEPT_TABLES: usize = 64;

/// Elements of a piece, which goes through one stage after the other: whole runs that stay in the first-level cache.
const PIECE_ELEMENTS: usize = 2048;

/// Where decoded symbols go.
#[derive(Clone, Copy, Debug)]
enum Place {
    Output,
    Scratch,
}

/// How the values of a run become elements.
#[derive(Clone, Copy, Debug)]
enum Path<'a> {
    /// Split elements of 16 or 32 bits, which a kernel joins with their raw bits.
    Joined { kernels: &'static Joined, raw_bits: u32 },
    /// Split elements of 16 bits.
    Split16 { carrier: Carrier },
    /// Split elements of 32 bits.
    Split32,
    /// Split elements of any other width.
    SplitAny { width: u32 },
    /// Values are codes of units.
    Units { units: &'a UnitCoding },
    /// Values are elements already.
    Final,
    /// Values are symbols of differences to a base, in coded order.
    Difference { zero_bits: u32 },
    /// Values are binary32: residuals, or weights whose columns have scales.
    Residual { prediction: Option<&'a Prediction> },
    /// Values are codes, or positions under a trellis, with raw bits below them.
    Raw { trellis: Option<(TrellisTables, Trellis)>, prediction: Option<&'a Prediction> },
}

/// A part being decoded.
#[derive(Debug)]
pub struct PartDecoder<'a> {
    kernels: &'static Kernels,
    /// Those for entropy decoding: strips with few lanes are small, and any will do.
    entropy_kernels: &'static Kernels,
    part: &'a PreparedPart,
    symbols: &'a Symbols,
    /// Of quantized parts.
    quantizer: Option<&'a Quantizer>,
    reference: Option<&'a [u8]>,
    /// The strip that the reference begins with, where the part starts from a base.
    first_strip: usize,
    path: Path<'a>,
    table_use: TableUse,
    /// Of parts without one, any.
    trellis: Trellis,
    meaning: Meaning,
    element_bytes: usize,
    clock: Option<&'a StageClock>,
    /// Whether all runs have the same table and values.
    is_one_table: bool,
    /// By table number, where neither step nor mean changes from run to run.
    kept_values: Vec<RunValues>,
}

/// A strip being decoded.
struct Strip<'a> {
    number: usize,
    layout: StripLayout,
    stored: &'a [u8],
    /// Raw bits of this run and those after it.
    raw: &'a [u8],
    words: Words<'a>,
    lanes: Lanes,
    values: RunValues,
    out: &'a mut [u8],
    /// Values of the piece, where they are not elements yet.
    scratch: Vec<u8>,
    /// Dequantized values of the run, where raw bits are below their codes.
    residuals: Vec<[u8; 4]>,
    /// Raw bits of the run, gathered from bit planes.
    bit_planes: Vec<[u8; LANES]>,
    /// Reference elements of the run, where they lie scattered.
    gathered: Vec<u8>,
}

impl<'a> PartDecoder<'a> {
    /// Prepares to decode strips of `part`, which has symbols. `reference` is there if the part is predicted, or starts from
    /// a base; then with the number of the strip that it begins with.
    /// `clock` adds up the time of stages, where somebody wants to know.
    pub fn new(
        kernels: &'static Kernels,
        part: &'a PreparedPart,
        (reference, first_strip): (Option<&'a [u8]>, usize),
        clock: Option<&'a StageClock>,
    ) -> Self {
        let dtype = part.dtype();
        let (symbols, quantizer, path, table_use, meaning) = match part.kind() {
            PartKind::Raw => unreachable!("raw parts have no symbols"),
            PartKind::Split { carrier, carrier_bits, symbols } => {
                let joined =
                    kernels.joined.as_ref().filter(|_| *carrier == Carrier::Own && can_be_joined(part, symbols));
                let (path, meaning) = split_path(*carrier, *carrier_bits, symbols.raw_bits, joined);
                (symbols, None, path, TableUse::One, meaning)
            }
            PartKind::Units { units, symbols } => (symbols, None, Path::Units { units }, TableUse::One, Meaning::Code),
            PartKind::Based(based) => {
                let difference = based.difference.as_ref().expect("the part has symbols");
                let path = Path::Difference { zero_bits: difference.zero_bits };
                (&difference.symbols, None, path, TableUse::One, Meaning::Code)
            }
            PartKind::Quantized { symbols, quantizer, prediction } => {
                let prediction = prediction.as_ref();
                let trellis = quantizer.trellis;
                let table_use = TableUse::of(trellis.map(|(tables, _)| tables));
                let (path, table_use, meaning) = match (symbols.raw_bits, prediction) {
                    (0, None) if quantizer.column_scales().is_none() => {
                        (Path::Final, table_use, Meaning::weight(dtype))
                    }
                    (0, prediction) => (Path::Residual { prediction }, table_use, Meaning::F32),
                    // Raw bits lead the trellis, so its kernels cannot follow it.
                    _ => {
                        // Points beside their codes are found by position; kernels step all lanes of a trellis.
                        let on_codes = |table: &Arc<CodingTable>| table.table().point_offsets.is_empty();
                        let is_plain =
                            trellis.is_none() || symbols.lanes == LANES && symbols.tables().iter().all(on_codes);
                        let meaning = if is_plain { Meaning::Code } else { Meaning::Position };
                        (Path::Raw { trellis, prediction }, TableUse::One, meaning)
                    }
                };
                (symbols, Some(quantizer), path, table_use, meaning)
            }
        };
        let element_bytes = dtype.bits().map_or(1, |bits| bits as usize / 8);
        let mut decoder = Self {
            kernels,
            entropy_kernels: if symbols.lanes == LANES { kernels } else { &PORTABLE },
            part,
            symbols,
            quantizer,
            reference,
            first_strip,
            path,
            table_use,
            trellis: quantizer
                .and_then(|quantizer| quantizer.trellis)
                .map_or(Trellis::EIGHT_STATES, |(_, trellis)| trellis),
            meaning,
            element_bytes,
            clock,
            is_one_table: false,
            kept_values: Vec::new(),
        };
        decoder.keep_values();
        decoder.ended(Stage::ValueTables);
        decoder
    }

    #[inline(always)]
    fn ended(&self, stage: Stage) {
        if let Some(clock) = self.clock {
            clock.end(stage);
        }
    }

    fn keep_values(&mut self) {
        let numbers = self.symbols.tables().len() / self.tables_per_number();
        // Codes and positions are the same whatever the step.
        let is_uniform = matches!(self.meaning, Meaning::Code | Meaning::Position | Meaning::Magnitude { .. })
            || self.quantizer.is_none_or(Quantizer::is_uniform);
        if numbers > KEPT_TABLES || !is_uniform {
            return;
        }
        let mut kept = vec![RunValues::ZERO; numbers];
        for (number, values) in kept.iter_mut().enumerate() {
            self.fill(values, number, 0);
        }
        // Byte planes and bit planes of a run lie one behind the other, unless there is only one of the two.
        let is_raw_continuous = !matches!(self.path, Path::Joined { raw_bits, .. } if raw_bits > 8);
        self.is_one_table = numbers == 1 && self.symbols.run_elements.is_multiple_of(LANES) && is_raw_continuous;
        self.kept_values = kept;
    }

    /// How many tables a table number stands for.
    fn tables_per_number(&self) -> usize {
        if self.table_use == TableUse::TrellisTables { 2 } else { 1 }
    }

    /// The table of a number, twice; or the pair it stands for.
    fn tables(&self, number: usize) -> [&'a CodingTable; 2] {
        let tables = self.symbols.tables();
        match self.table_use {
            TableUse::TrellisTables => [&tables[2 * number], &tables[2 * number + 1]],
            _ => [&tables[number]; 2],
        }
    }

    fn step_and_mean(&self, run: usize) -> (f32, Option<f32>) {
        self.quantizer.map_or((1.0, None), |quantizer| (quantizer.step_of_run(run), quantizer.mean_of_run(run)))
    }

    fn fill(&self, values: &mut RunValues, number: usize, run: usize) {
        let (step, mean) = self.step_and_mean(run);
        self.meaning.fill(values, self.tables(number), self.table_use, step, mean);
    }

    /// Decodes strips in lockstep, the longest first.
    pub fn decode<const N: usize>(&self, jobs: [&mut StripJob<'_>; N]) -> Result<(), DecodeError> {
        let padded: [Option<Vec<u8>>; N] = std::array::from_fn(|job| self.padded_words(&*jobs[job]));
        let mut at = 0;
        let mut strips = jobs.map(|job| {
            let strip = self.start(job, padded[at].as_deref());
            at += 1;
            strip
        });
        let run_elements = self.symbols.run_elements;
        let piece_elements = run_elements * (PIECE_ELEMENTS / run_elements).max(1);
        let whole_runs = |strip: &Strip<'_>| strip.layout.symbols - strip.layout.symbols % run_elements;
        let mut start = 0;
        while start < whole_runs(&strips[0]) {
            let count = strips.iter().take_while(|strip| whole_runs(strip) > start).count();
            let end = whole_runs(&strips[count - 1]).min(start + piece_elements);
            self.decode_piece(&mut strips, count, start..end);
            start = end;
        }
        // The last run of a part may be shorter than the others.
        for strip in &mut strips {
            let rest = whole_runs(strip)..strip.layout.symbols;
            if !rest.is_empty() {
                self.decode_piece(std::array::from_mut(strip), 1, rest);
            }
        }
        strips.into_iter().try_for_each(|strip| self.end(strip))?;
        self.ended(Stage::Exceptions);
        Ok(())
    }

    /// Decodes the same elements of the first `count` strips.
    fn decode_piece<const N: usize>(&self, strips: &mut [Strip<'_>; N], count: usize, elements: Range<usize>) {
        match self.path {
            Path::Joined { .. } if self.element_bytes == 4 => {
                self.decode_symbols::<N, [u8; 4]>(strips, count, &elements, Place::Output);
            }
            Path::Joined { .. } | Path::Split16 { carrier: Carrier::Own } => {
                self.decode_symbols::<N, [u8; 2]>(strips, count, &elements, Place::Output);
            }
            Path::Final | Path::Difference { .. } if self.element_bytes == 2 => {
                self.decode_symbols::<N, [u8; 2]>(strips, count, &elements, Place::Output);
            }
            Path::Final => self.decode_symbols::<N, [u8; 4]>(strips, count, &elements, Place::Output),
            Path::Residual { .. } => self.decode_symbols::<N, [u8; 4]>(strips, count, &elements, Place::Scratch),
            // The trellis and its two tables go hand in hand.
            Path::Raw { trellis: Some((TrellisTables::Pairs, _)), .. } => {}
            Path::Split16 { .. }
            | Path::Split32
            | Path::SplitAny { .. }
            | Path::Units { .. }
            | Path::Difference { .. }
            | Path::Raw { .. } => {
                self.decode_symbols::<N, [u8; 2]>(strips, count, &elements, Place::Scratch);
            }
        }
        self.ended(Stage::Entropy);
        for strip in &mut strips[..count] {
            self.finish(strip, elements.clone());
        }
    }

    /// A copy of a strip's words where nothing readable follows them.
    fn padded_words(&self, job: &StripJob<'_>) -> Option<Vec<u8>> {
        let layout = self.part.layout(job.strip).expect("the part has symbols");
        let words = layout.words_range();
        (job.stored.len() < words.end + WORDS_PADDING).then(|| {
            let mut padded = Vec::with_capacity(words.len() + WORDS_PADDING);
            padded.extend_from_slice(&job.stored[words]);
            padded.resize(padded.len() + WORDS_PADDING, 0);
            padded
        })
    }

    fn start<'s>(&self, job: &'s mut StripJob<'_>, padded_words: Option<&'s [u8]>) -> Strip<'s> {
        let layout = self.part.layout(job.strip).expect("the part has symbols");
        let words = padded_words.unwrap_or(&job.stored[layout.words_range().start..]);
        let states = &job.stored[layout.states_range()];
        Strip {
            number: job.strip,
            layout,
            stored: job.stored,
            raw: &job.stored[layout.raw_range()],
            words: Words::new(words, layout.words).expect("padded where it was not long enough"),
            lanes: Lanes::new(states),
            values: RunValues::ZERO,
            out: job.out,
            scratch: Vec::new(),
            residuals: Vec::new(),
            bit_planes: Vec::new(),
            gathered: Vec::new(),
        }
    }

    fn run_of_part(&self, strip: &Strip<'_>, run: usize) -> usize {
        strip.number * self.symbols.runs_per_strip + run
    }

    /// Decodes the symbols of the runs that fill `elements`, all of them into one place.
    fn decode_symbols<const N: usize, O: Output>(
        &self,
        strips: &mut [Strip<'_>; N],
        count: usize,
        elements: &Range<usize>,
        place: Place,
    ) {
        // With one table for all, lanes need not stop between runs.
        let at_once = if self.is_one_table { elements.len() } else { self.symbols.run_elements };
        for start in elements.clone().step_by(at_once) {
            let end = elements.end.min(start + at_once);
            let run = start / self.symbols.run_elements;
            self.make_values(&mut strips[..count], run);
            let mut left = count;
            let mut jobs = strips.each_mut().map(|strip| {
                // A strip that has ended has no such run: its job is made of another and left out.
                let has_run = left > 0;
                left = left.saturating_sub(1);
                let run = self.run_of_part(strip, if has_run { run } else { 0 });
                let Strip { lanes, words, values, out, scratch, raw, .. } = strip;
                let raw = match self.path {
                    Path::Joined { raw_bits, .. } if has_run => {
                        let (planes, later) = raw.split_at(raw_bytes_of_run(end - start, raw_bits as usize));
                        *raw = later;
                        StoredRaw { planes, bits: raw_bits }
                    }
                    _ => StoredRaw::default(),
                };
                let out = match place {
                    _ if !has_run => &mut [],
                    Place::Output => &mut O::slice(out)[start..end],
                    Place::Scratch => {
                        scratch.resize(elements.len() * size_of::<O>(), 0);
                        &mut O::slice(scratch)[start - elements.start..end - elements.start]
                    }
                };
                let number = self.symbols.table_number_of_run(run);
                let values = self.kept_values.get(number).unwrap_or(values);
                RunJob { lanes, words: *words, tables: self.tables(number), values, trellis: self.trellis, raw, out }
            });
            // SAFETY: whoever chose the kernels made sure that the CPU has their instructions.
            unsafe { self.kernel::<O>()(&mut jobs[..count]) }
        }
    }

    fn kernel<O: Output>(&self) -> RunKernel<O> {
        match self.path {
            Path::Joined { kernels, .. } => O::joined_kernel(kernels),
            _ => O::kernel(self.entropy_kernels, self.table_use),
        }
    }

    fn make_values(&self, strips: &mut [Strip<'_>], run: usize) {
        if self.kept_values.is_empty() {
            for strip in strips {
                let run = self.run_of_part(strip, run);
                self.fill(&mut strip.values, self.symbols.table_number_of_run(run), run);
            }
            self.ended(Stage::ValueTables);
        }
    }
}

/// Whether vectors of 32 symbols can be joined with their raw bits as they are stored.
fn can_be_joined(part: &PreparedPart, symbols: &Symbols) -> bool {
    let elements = part.length_bytes() * 8 / part.dtype().bits().unwrap_or(8);
    symbols.lanes == LANES
        && symbols.run_elements.is_multiple_of(LANES)
        && elements.is_multiple_of(LANES as u64)
        && symbols.stores_all_raw_bits()
}

/// How split elements of a width are decoded. `joined` where kernels may join them.
fn split_path<'a>(carrier: Carrier, width: u32, raw_bits: u32, joined: Option<&'static Joined>) -> (Path<'a>, Meaning) {
    let magnitude = Meaning::Magnitude { width, low_bits: raw_bits - 1 };
    match (width, joined) {
        (16, Some(kernels)) if raw_bits < 16 => (Path::Joined { kernels, raw_bits }, magnitude),
        (32, Some(kernels)) if (17..32).contains(&raw_bits) => (Path::Joined { kernels, raw_bits }, magnitude),
        (16, _) => (Path::Split16 { carrier }, magnitude),
        (32, _) => (Path::Split32, Meaning::Code),
        _ => (Path::SplitAny { width }, Meaning::Code),
    }
}
