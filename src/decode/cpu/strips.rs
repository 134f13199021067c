//! Strips of one part decoded in lockstep: runs walked, tables and values chosen, exceptions patched. Safe code; what is
//! worth writing per instruction set is behind [`Kernels`].

use std::ops::Range;
use std::sync::Arc;

use super::finish::{RunPrediction, join_any};
use super::kernels::{Kernels, Lanes, Output, PORTABLE, RunJob, RunValues, TableUse, WORDS_PADDING, Words};
use super::raw_bits::{ByTable, RawBits};
use super::stages::{Stage, StageClock};
use super::values::Meaning;
use crate::codec::entropy::CodingTable;
use crate::codec::lossless::widen;
use crate::codec::quantizer::{dequantize, join_code};
use crate::codec::trellis::{Trellis, multiple, quantizer_of};
use crate::decode::prepared::{PartKind, Prediction, PreparedPart, Quantizer, Symbols};
use crate::decode::{DecodeError, StripJob};
use crate::format::part::{Carrier, TrellisTables};
use crate::format::strip::{LANES, StripLayout};
use crate::tensor::Dtype;

/// Tables whose values are kept for a whole call; a part that lists more has them made run by run.
const KEPT_TABLES: usize = 64;

/// How the values of a run become elements.
#[derive(Clone, Copy, Debug)]
enum Path<'a> {
    /// Split elements of 16 bits.
    Split16 { carrier: Carrier },
    /// Split elements of 32 bits.
    Split32,
    /// Split elements of any other width.
    SplitAny { width: u32 },
    /// Values are elements already.
    Final,
    /// Values are binary32 residuals.
    Residual { prediction: &'a Prediction },
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
    path: Path<'a>,
    table_use: TableUse,
    /// Of parts without one, any.
    trellis: Trellis,
    meaning: Meaning,
    element_bytes: usize,
    clock: Option<&'a StageClock>,
    /// By table number, where neither step nor mean changes from run to run.
    kept_values: Vec<RunValues>,
}

/// A strip being decoded.
struct Strip<'a> {
    number: usize,
    layout: StripLayout,
    stored: &'a [u8],
    words: Words<'a>,
    lanes: Lanes,
    values: RunValues,
    out: &'a mut [u8],
    /// Values of the run, where they are not elements yet.
    scratch: Vec<u8>,
    /// Dequantized values of the run, where raw bits are below their codes.
    residuals: Vec<[u8; 4]>,
    /// Reference elements of the run, where they lie scattered.
    gathered: Vec<u8>,
}

impl<'a> PartDecoder<'a> {
    /// Prepares to decode strips of `part`, which is not raw. `reference` is there if the part is predicted.
    /// `clock` adds up the time of stages, where somebody wants to know.
    pub fn new(
        kernels: &'static Kernels,
        part: &'a PreparedPart,
        reference: Option<&'a [u8]>,
        clock: Option<&'a StageClock>,
    ) -> Self {
        let dtype = part.dtype();
        let (symbols, quantizer, path, table_use, meaning) = match part.kind() {
            PartKind::Raw => unreachable!("raw parts have no symbols"),
            PartKind::Split { carrier, carrier_bits, symbols } => {
                let (path, meaning) = split_path(*carrier, *carrier_bits, symbols.raw_bits);
                (symbols, None, path, TableUse::One, meaning)
            }
            PartKind::Quantized { symbols, quantizer, prediction } => {
                let prediction = prediction.as_ref();
                let trellis = quantizer.trellis;
                let table_use = TableUse::of(trellis.map(|(tables, _)| tables));
                let (path, table_use, meaning) = match (symbols.raw_bits, prediction) {
                    (0, None) => (Path::Final, table_use, Meaning::weight(dtype)),
                    (0, Some(prediction)) => (Path::Residual { prediction }, table_use, Meaning::F32),
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
            path,
            table_use,
            trellis: quantizer
                .and_then(|quantizer| quantizer.trellis)
                .map_or(Trellis::EIGHT_STATES, |(_, trellis)| trellis),
            meaning,
            element_bytes,
            clock,
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

    /// Decodes strips of equal length.
    pub fn decode<const N: usize>(&self, jobs: [&mut StripJob<'_>; N]) -> Result<(), DecodeError> {
        let padded: [Option<Vec<u8>>; N] = std::array::from_fn(|job| self.padded_words(&*jobs[job]));
        let mut at = 0;
        let mut strips = jobs.map(|job| {
            let strip = self.start(job, padded[at].as_deref());
            at += 1;
            strip
        });
        let symbols = strips[0].layout.symbols;
        for run in 0..symbols.div_ceil(self.symbols.run_elements) {
            let first = run * self.symbols.run_elements;
            let elements = first..symbols.min(first + self.symbols.run_elements);
            match self.path {
                Path::Split16 { carrier: Carrier::Own } => {
                    self.run_into_output::<N, [u8; 2]>(&mut strips, run, elements.clone());
                }
                Path::Split32 => self.run_into_output::<N, [u8; 4]>(&mut strips, run, elements.clone()),
                Path::Final if self.element_bytes == 2 => {
                    self.run_into_output::<N, [u8; 2]>(&mut strips, run, elements.clone());
                }
                Path::Final => self.run_into_output::<N, [u8; 4]>(&mut strips, run, elements.clone()),
                Path::Residual { .. } => self.run_into_scratch::<N, [u8; 4]>(&mut strips, run, elements.clone()),
                // The trellis and its two tables go hand in hand.
                Path::Raw { trellis: Some((TrellisTables::Pairs, _)), .. } => {}
                Path::Split16 { .. } | Path::SplitAny { .. } | Path::Raw { .. } => {
                    self.run_into_scratch::<N, [u8; 2]>(&mut strips, run, elements.clone());
                }
            }
            self.ended(Stage::Entropy);
            for strip in &mut strips {
                self.finish_run(strip, run, elements.clone());
            }
        }
        strips.into_iter().try_for_each(|strip| self.end(strip))?;
        self.ended(Stage::Exceptions);
        Ok(())
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
            words: Words::new(words, layout.words).expect("padded where it was not long enough"),
            lanes: Lanes::new(states),
            values: RunValues::ZERO,
            out: job.out,
            scratch: Vec::new(),
            residuals: Vec::new(),
            gathered: Vec::new(),
        }
    }

    fn run_of_part(&self, strip: &Strip<'_>, run: usize) -> usize {
        strip.number * self.symbols.runs_per_strip + run
    }

    fn run_into_output<const N: usize, O: Output>(
        &self,
        strips: &mut [Strip<'_>; N],
        run: usize,
        elements: Range<usize>,
    ) {
        self.make_values(strips, run);
        let bytes = elements.start * size_of::<O>()..elements.end * size_of::<O>();
        let mut jobs = strips.each_mut().map(|strip| {
            let run = self.run_of_part(strip, run);
            let Strip { lanes, words, values, out, .. } = strip;
            self.job(run, lanes, *words, values, O::slice(&mut out[bytes.clone()]))
        });
        // SAFETY: whoever chose the kernels made sure that the CPU has their instructions.
        unsafe { O::kernel(self.entropy_kernels, self.table_use)(&mut jobs) }
    }

    fn run_into_scratch<const N: usize, O: Output>(
        &self,
        strips: &mut [Strip<'_>; N],
        run: usize,
        elements: Range<usize>,
    ) {
        self.make_values(strips, run);
        let mut jobs = strips.each_mut().map(|strip| {
            let run = self.run_of_part(strip, run);
            let Strip { lanes, words, values, scratch, .. } = strip;
            scratch.resize(elements.len() * size_of::<O>(), 0);
            self.job(run, lanes, *words, values, O::slice(scratch))
        });
        // SAFETY: whoever chose the kernels made sure that the CPU has their instructions.
        unsafe { O::kernel(self.entropy_kernels, self.table_use)(&mut jobs) }
    }

    fn make_values<const N: usize>(&self, strips: &mut [Strip<'_>; N], run: usize) {
        if self.kept_values.is_empty() {
            for strip in strips {
                let run = self.run_of_part(strip, run);
                self.fill(&mut strip.values, self.symbols.table_number_of_run(run), run);
            }
            self.ended(Stage::ValueTables);
        }
    }

    fn job<'j, O>(
        &'j self,
        run: usize,
        lanes: &'j mut Lanes,
        words: Words<'j>,
        own_values: &'j RunValues,
        out: &'j mut [O],
    ) -> RunJob<'j, O> {
        let number = self.symbols.table_number_of_run(run);
        let values = self.kept_values.get(number).unwrap_or(own_values);
        RunJob { lanes, words, tables: self.tables(number), values, trellis: self.trellis, out }
    }

    /// What is left to do with a run whose values are there.
    fn finish_run(&self, strip: &mut Strip<'_>, run: usize, elements: Range<usize>) {
        let finish = &self.kernels.finish;
        let run_of_part = self.run_of_part(strip, run);
        let bytes = elements.start * self.element_bytes..elements.end * self.element_bytes;
        let raw = RawBits::of_run(strip.stored, strip.layout, run, elements.clone());
        // SAFETY of every call below: whoever chose the kernels made sure that the CPU has their instructions.
        match self.path {
            Path::Final => {}
            Path::Split16 { carrier: Carrier::Own } => {
                // SAFETY: see above.
                unsafe { (finish.join_16)(&raw, strip.out[bytes].as_chunks_mut().0) }
            }
            Path::Split16 { carrier } => {
                let elements = strip.scratch.as_chunks_mut().0;
                let widen = if carrier == Carrier::Bf16 { finish.widen_bf16 } else { finish.widen_f16 };
                // SAFETY: see above.
                unsafe {
                    (finish.join_16)(&raw, elements);
                    widen(elements, strip.out[bytes].as_chunks_mut().0);
                }
            }
            // SAFETY: see above.
            Path::Split32 => unsafe { (finish.join_32)(&raw, strip.out[bytes].as_chunks_mut().0) },
            Path::SplitAny { width } => {
                join_any(strip.scratch.as_chunks().0, &raw, width, &mut strip.out[bytes]);
            }
            Path::Residual { prediction } => {
                let first = self.first_element(strip) + elements.start;
                let elements = first..first + elements.len();
                let prediction = self.prediction_of_run(prediction, run_of_part, elements, &mut strip.gathered);
                self.round(&strip.scratch, prediction, &mut strip.out[bytes]);
            }
            Path::Raw { trellis, prediction } => {
                let (step, mean) = self.step_and_mean(run_of_part);
                let mut residuals = std::mem::take(&mut strip.residuals);
                residuals.resize(elements.len(), [0; 4]);
                match trellis {
                    // SAFETY: see above.
                    None => unsafe {
                        (finish.dequantize)(strip.scratch.as_chunks().0, &raw, step, mean, &mut residuals);
                    },
                    // SAFETY: see above.
                    Some((TrellisTables::Shared, trellis)) if self.meaning == Meaning::Code => unsafe {
                        let codes = strip.scratch.as_chunks().0;
                        let states = (trellis, &mut strip.lanes.trellis);
                        (finish.dequantize_trellis)(codes, &raw, states, step, mean, &mut residuals);
                    },
                    Some(trellis) => {
                        let points = self.trellis_points(strip, trellis, &raw, run_of_part);
                        for (residual, point) in residuals.iter_mut().zip(points) {
                            *residual = dequantize(point, step, mean).to_le_bytes();
                        }
                    }
                }
                self.ended(Stage::RawBits);
                let first = self.first_element(strip) + elements.start;
                let prediction = prediction.and_then(|prediction| {
                    self.prediction_of_run(prediction, run_of_part, first..first + elements.len(), &mut strip.gathered)
                });
                self.round(residuals.as_flattened(), prediction, &mut strip.out[bytes]);
                strip.residuals = residuals;
            }
        }
        self.ended(Stage::RawBits);
    }

    /// The first element of a strip, counted in the part.
    fn first_element(&self, strip: &Strip<'_>) -> usize {
        self.run_of_part(strip, 0) * self.symbols.run_elements
    }

    /// Rounds residuals, with their prediction added, to elements.
    fn round(&self, residuals: &[u8], prediction: RunPrediction<'_>, out: &mut [u8]) {
        let finish = &self.kernels.finish;
        let round = match self.part.dtype() {
            Dtype::BF16 => finish.round_bf16,
            Dtype::F16 => finish.round_f16,
            _ => finish.round_f32,
        };
        // SAFETY: whoever chose the kernels made sure that the CPU has their instructions.
        unsafe { round(residuals.as_chunks().0, prediction, out) }
        self.ended(Stage::Prediction);
    }

    /// The predictor of a run and the reference bytes of its elements, gathered if motion has scattered them.
    fn prediction_of_run<'s>(
        &self,
        prediction: &Prediction,
        run: usize,
        elements: Range<usize>,
        gathered: &'s mut Vec<u8>,
    ) -> RunPrediction<'s>
    where
        'a: 's,
    {
        let reference = self.reference.expect("a predicted part is decoded with its reference at hand");
        let bytes_of = |elements: Range<usize>| elements.start * self.element_bytes..elements.end * self.element_bytes;
        let predictor = prediction.of_run(run);
        let Some(motion) = &prediction.motion else {
            return Some((predictor, &reference[bytes_of(elements)]));
        };
        let mut spans = motion.spans(elements.clone());
        if let Some(span) = spans.next()
            && span.len() == elements.len()
        {
            return Some((predictor, &reference[bytes_of(span)]));
        }
        gathered.resize(elements.len() * self.element_bytes, 0);
        match self.element_bytes {
            2 => gather::<2>(reference, motion.spans(elements), gathered),
            _ => gather::<4>(reference, motion.spans(elements), gathered),
        }
        self.ended(Stage::Placement);
        Some((predictor, gathered))
    }

    /// Reconstruction points of a run of trellis-coded codes with raw bits below them, in steps.
    fn trellis_points(
        &self,
        strip: &mut Strip<'_>,
        (tables_in_use, trellis): (TrellisTables, Trellis),
        raw: &RawBits<'_>,
        run: usize,
    ) -> Vec<f32> {
        let number = self.symbols.table_number_of_run(run);
        let tables = self.symbols.tables();
        let pair = match tables_in_use {
            TrellisTables::Shared => [&tables[number]; 2],
            TrellisTables::Pairs => [&tables[2 * number], &tables[2 * number + 1]],
        };
        let mut points = Vec::with_capacity(strip.scratch.len() / 2);
        raw.for_each_vector::<ByTable, u16>(|start, raw| {
            for (index, &raw) in (start..).zip(raw) {
                let lane = index % strip.lanes.count;
                let state = strip.lanes.trellis[lane];
                let in_use = quantizer_of(state);
                let table = pair[usize::from(in_use)];
                let position = match tables_in_use {
                    TrellisTables::Shared => strip.scratch[2 * index],
                    TrellisTables::Pairs => strip.lanes.decode_symbol(lane, strip.words, table),
                };
                let multiple = multiple(join_code(table.code(position), raw.into(), self.symbols.raw_bits), in_use);
                strip.lanes.trellis[lane] = trellis.next_state(state, multiple);
                points.push(multiple as f32 + table.point_offset(position));
            }
        });
        points
    }

    /// Checks that the lanes of a strip came home, and patches its exceptions.
    fn end(&self, strip: Strip<'_>) -> Result<(), DecodeError> {
        let Strip { number, layout, stored, lanes, out, .. } = strip;
        lanes.finish(layout.words).map_err(|error| DecodeError::Lanes { strip: number, error })?;
        let (positions, values) = stored[layout.exceptions_range()].split_at(2 * layout.exceptions);
        let mut least = 0;
        for (&position, value) in positions.as_chunks().0.iter().zip(values.chunks(layout.exception_value_bytes)) {
            let position = u16::from_le_bytes(position);
            let index = usize::from(position);
            if index < least || index >= layout.symbols {
                return Err(DecodeError::ExceptionPosition { strip: number, position, symbols: layout.symbols });
            }
            least = index + 1;
            self.patch(number, index, value, &mut out[index * self.element_bytes..][..self.element_bytes]);
        }
        Ok(())
    }

    /// Writes the element that an exception stands for.
    fn patch(&self, strip: usize, index: usize, value: &[u8], out: &mut [u8]) {
        let element = strip * self.symbols.runs_per_strip * self.symbols.run_elements + index;
        let PartKind::Quantized { quantizer, prediction, .. } = self.part.kind() else {
            let carrier = match self.path {
                Path::Split16 { carrier } => carrier,
                _ => Carrier::Own,
            };
            let mut bytes = [0; 8];
            bytes[..value.len()].copy_from_slice(value);
            let element = widen(carrier, u64::from_le_bytes(bytes)).to_le_bytes();
            out.copy_from_slice(&element[..out.len()]);
            return;
        };
        let run = element / self.symbols.run_elements;
        let code = i16::from_le_bytes([value[0], value[1]]);
        let residual = dequantize(code.into(), quantizer.step_of_run(run), quantizer.mean_of_run(run)).to_le_bytes();
        let mut gathered = Vec::new();
        let prediction = prediction
            .as_ref()
            .and_then(|prediction| self.prediction_of_run(prediction, run, element..element + 1, &mut gathered));
        self.round(&residual, prediction, out);
    }
}

/// Copies spans of elements from `reference`, one after another.
fn gather<const BYTES: usize>(reference: &[u8], spans: impl Iterator<Item = Range<usize>>, gathered: &mut [u8]) {
    let reference = reference.as_chunks::<BYTES>().0;
    let mut rest = gathered.as_chunks_mut::<BYTES>().0;
    for span in spans {
        let (next, later) = rest.split_at_mut(span.len());
        match next {
            [element] => *element = reference[span.start], // where every column moves alone: no call to copy it
            _ => next.copy_from_slice(&reference[span]),
        }
        rest = later;
    }
}

/// How split elements of a width are decoded.
fn split_path<'a>(carrier: Carrier, width: u32, raw_bits: u32) -> (Path<'a>, Meaning) {
    let magnitude = Meaning::Magnitude { width, low_bits: raw_bits - 1 };
    match width {
        16 => (Path::Split16 { carrier }, magnitude),
        32 => (Path::Split32, magnitude),
        _ => (Path::SplitAny { width }, Meaning::Code),
    }
}
