//! One tensor becomes one part: symbols counted, tables chosen per run, strips encoded (Algorithm 1, lines 9-14).
//!
//! Works strip by strip, so that a large tensor needs no second copy of itself.

use std::collections::BTreeMap;
use std::ops::Range;

use rayon::prelude::*;

use super::entropy_model::{ClassHistograms, Histogram, StreamKind, TablePool};
use crate::codec::entropy::{CodingTable, encode_lanes};
use crate::codec::integers;
use crate::codec::lossless::{narrow, split_element};
use crate::codec::predictor::RunPredictor;
use crate::codec::quantizer::{quantize, split_code};
use crate::decode::DecodeError;
use crate::format::limits::{RAW_STRIP_BYTES, STRIP_SYMBOLS};
use crate::format::part::{Carrier, Coding, PartHeader, PartHeaderBytes, SymbolStreams};
use crate::format::strip::LANES;

/// Where runs and strips of a tensor begin.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RunLayout {
    /// Elements of the tensor.
    pub elements: usize,
    /// Elements of one run.
    pub run_elements: usize,
    /// Runs of one strip.
    pub runs_per_strip: usize,
}

impl RunLayout {
    /// Runs for a tensor of this shape: rows of its first axis where they have a useful length, joined where they are short
    /// and cut where they are long.
    pub fn of_shape(shape: &[u64]) -> Self {
        let elements = shape.iter().product::<u64>() as usize;
        let row = match shape.len() {
            0 | 1 => 1,
            _ => shape[1..].iter().product::<u64>() as usize,
        };
        let run_elements = match row {
            0..64 => row.max(1) * 256_usize.div_ceil(row.max(1)),
            64..=16_384 => row,
            // Cut evenly, so that no short rest is left in every row.
            _ => row.div_ceil(row.div_ceil(16_384)),
        };
        let runs_per_strip = (STRIP_SYMBOLS as usize / run_elements).max(1);
        Self { elements, run_elements, runs_per_strip }
    }

    /// Number of runs.
    pub fn runs(&self) -> usize {
        self.elements.div_ceil(self.run_elements)
    }

    /// Elements of a run.
    pub fn run_range(&self, run: usize) -> Range<usize> {
        run * self.run_elements..((run + 1) * self.run_elements).min(self.elements)
    }

    /// Number of strips.
    pub fn strips(&self) -> usize {
        self.runs().div_ceil(self.runs_per_strip)
    }

    fn strip_range(&self, strip: usize) -> Range<usize> {
        let strip_elements = self.run_elements * self.runs_per_strip;
        strip * strip_elements..((strip + 1) * strip_elements).min(self.elements)
    }
}

/// A tensor as a sequence of symbols with raw bits below them.
pub trait Symbols: Sync {
    /// Layout of the runs.
    fn layout(&self) -> RunLayout;
    /// Which tables fit.
    fn kind(&self) -> StreamKind;
    /// Raw bits per symbol.
    fn raw_bits(&self) -> u32;
    /// Gives the symbol, the raw bits and the offset of the value from the code, in steps, of every element of a run.
    fn for_each(&self, run: usize, take: &mut dyn FnMut(i32, u64, f32));
    /// The bytes of an element as an exception.
    fn exception(&self, element: usize) -> Vec<u8>;

    /// The class of a run with these symbols: a quarter octave of scale.
    fn class(&self, run: &Histogram) -> i32;
}

/// Bit-exact elements, see `codec::lossless`.
pub struct SplitSymbols<'a> {
    /// The tensor's bytes.
    pub bytes: &'a [u8],
    /// Bytes of one element.
    pub element_bytes: usize,
    /// Layout of the runs.
    pub layout: RunLayout,
    /// The type that is split.
    pub carrier: Carrier,
    /// Bits of a carrier element.
    pub carrier_bits: u32,
    /// Mantissa bits of the carrier.
    pub mantissa_bits: u32,
    /// Raw bits per symbol.
    pub raw_bits: u32,
}

impl SplitSymbols<'_> {
    fn carrier_element(&self, element: usize) -> u64 {
        let mut bytes = [0; 8];
        let start = element * self.element_bytes;
        bytes[..self.element_bytes].copy_from_slice(&self.bytes[start..start + self.element_bytes]);
        narrow(self.carrier, u64::from_le_bytes(bytes)).expect("the carrier was chosen because it holds every element")
    }
}

impl Symbols for SplitSymbols<'_> {
    fn layout(&self) -> RunLayout {
        self.layout
    }

    fn kind(&self) -> StreamKind {
        StreamKind::Split {
            width: self.carrier_bits as u8,
            raw_bits: self.raw_bits as u8,
            bf16: self.carrier_bits == 16 && self.mantissa_bits == 7,
        }
    }

    fn raw_bits(&self) -> u32 {
        self.raw_bits
    }

    fn for_each(&self, run: usize, take: &mut dyn FnMut(i32, u64, f32)) {
        for element in self.layout.run_range(run) {
            let (symbol, raw) = split_element(self.carrier_element(element), self.carrier_bits, self.raw_bits);
            take(symbol as i32, raw, 0.0);
        }
    }

    fn exception(&self, element: usize) -> Vec<u8> {
        self.carrier_element(element).to_le_bytes()[..self.carrier_bits as usize / 8].to_vec()
    }

    fn class(&self, run: &Histogram) -> i32 {
        // Exponents are logarithms already; zeros say nothing about scale.
        let codes_per_octave = (2.0_f64).powi(self.mantissa_bits as i32 + 1 - self.raw_bits as i32);
        let (mut sum, mut count) = (0.0, 0);
        for (code, occurrences) in run.occurring().filter(|&(code, _)| code > 0) {
            sum += f64::from(code) * occurrences as f64;
            count += occurrences;
        }
        if count == 0 { 0 } else { (4.0 * sum / count as f64 / codes_per_octave).round() as i32 }
    }
}

/// What a predicted part subtracts before it quantizes.
pub struct EncoderPrediction<'a> {
    /// Decoded reference value of every element, motion already applied.
    pub reference: &'a [f32],
    /// The predictor of each run.
    pub of_run: &'a (dyn Fn(usize) -> RunPredictor + Sync),
}

/// Quantized values or residuals, see `codec::quantizer`.
pub struct QuantizedSymbols<'a> {
    /// The weights.
    pub values: &'a [f32],
    /// What they are predicted from.
    pub prediction: Option<EncoderPrediction<'a>>,
    /// Layout of the runs.
    pub layout: RunLayout,
    /// Step of each run, in weight units.
    pub step_of_run: &'a (dyn Fn(usize) -> f32 + Sync),
    /// Raw bits per symbol.
    pub raw_bits: u32,
}

impl QuantizedSymbols<'_> {
    #[inline]
    fn residual(&self, element: usize, predictor: Option<RunPredictor>) -> f32 {
        match (&self.prediction, predictor) {
            (Some(prediction), Some(predictor)) => {
                self.values[element] - predictor.predict(prediction.reference[element])
            }
            _ => self.values[element],
        }
    }

    fn predictor_of_run(&self, run: usize) -> Option<RunPredictor> {
        self.prediction.as_ref().map(|prediction| (prediction.of_run)(run))
    }
}

impl Symbols for QuantizedSymbols<'_> {
    fn layout(&self) -> RunLayout {
        self.layout
    }

    fn kind(&self) -> StreamKind {
        StreamKind::Quantized { raw_bits: self.raw_bits as u8 }
    }

    fn raw_bits(&self) -> u32 {
        self.raw_bits
    }

    fn for_each(&self, run: usize, take: &mut dyn FnMut(i32, u64, f32)) {
        let step = (self.step_of_run)(run);
        let predictor = self.predictor_of_run(run);
        for element in self.layout.run_range(run) {
            let residual = self.residual(element, predictor);
            let code = quantize(residual, step, 0.0);
            let (symbol, raw) = split_code(code, self.raw_bits);
            take(symbol, raw.into(), residual / step - code as f32);
        }
    }

    fn exception(&self, element: usize) -> Vec<u8> {
        let run = element / self.layout.run_elements;
        let residual = self.residual(element, self.predictor_of_run(run));
        let code = quantize(residual, (self.step_of_run)(run), 0.0);
        // A code beyond 16 bits is cut; whoever packs sees the error and keeps the tensor bit-exact.
        (code.clamp(i16::MIN.into(), i16::MAX.into()) as i16).to_le_bytes().to_vec()
    }

    fn class(&self, run: &Histogram) -> i32 {
        let square: f64 = run.occurring().map(|(code, count)| f64::from(code).powi(2) * count as f64).sum();
        let mean_square = square / run.symbols().max(1) as f64;
        (2.0 * (mean_square + 1.0 / 64.0).log2()).round() as i32
    }
}

fn run_histogram(symbols: &dyn Symbols, run: usize) -> Histogram {
    let mut histogram = Histogram::default();
    symbols.for_each(run, &mut |symbol, _, offset| histogram.add(symbol, offset));
    histogram
}

/// Counts every `every`-th run of a tensor by class.
pub fn count(symbols: &dyn Symbols, every: usize) -> ClassHistograms {
    let runs: Vec<usize> = (0..symbols.layout().runs()).step_by(every.max(1)).collect();
    // Merged in order, so that the sums of offsets do not depend on the number of threads.
    let counted: Vec<ClassHistograms> = runs
        .par_chunks(64)
        .map(|runs| {
            let mut counted = ClassHistograms::default();
            for &run in runs {
                let histogram = run_histogram(symbols, run);
                counted.add(symbols.kind(), symbols.class(&histogram), &histogram);
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

/// Bits that the symbols of every `every`-th run take with the pool's best tables, scaled up to all runs. Raw bits included;
/// `None` where the pool has no fitting table.
pub fn measure(symbols: &dyn Symbols, pool: &TablePool, every: usize) -> Option<f64> {
    let layout = symbols.layout();
    let runs: Vec<usize> = (0..layout.runs()).step_by(every.max(1)).collect();
    let bits: Vec<Option<(f64, usize)>> = runs
        .par_iter()
        .map(|&run| {
            let histogram = run_histogram(symbols, run);
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
    Some((total / measured.max(1) as f64 + f64::from(symbols.raw_bits())) * layout.elements as f64)
}

/// A part ready to be written. Its tables are numbers of the encoder's pool until [`EncodedPart::header`] renames them.
#[derive(Clone, Debug)]
pub struct EncodedPart {
    coding: Coding,
    streams: Option<SymbolStreams>,
    tables: Vec<usize>,
    strip_crcs: Vec<u32>,
    /// All strips, one after another.
    pub body: Vec<u8>,
}

struct EncodedStrip {
    bytes: Vec<u8>,
    words: usize,
    exceptions: usize,
    table_of_run: Vec<usize>,
}

impl EncodedPart {
    /// Bytes as they are.
    pub fn raw(bytes: &[u8]) -> Self {
        let strip_crcs = bytes.chunks(RAW_STRIP_BYTES as usize).map(crc32c::crc32c).collect();
        Self { coding: Coding::Raw, streams: None, tables: Vec::new(), strip_crcs, body: bytes.to_vec() }
    }

    /// Encodes symbols. `coding` says what they mean. `None` where the pool has no fitting table.
    pub fn symbols(coding: Coding, symbols: &dyn Symbols, pool: &TablePool) -> Option<Self> {
        let layout = symbols.layout();
        let strips: Vec<EncodedStrip> = (0..layout.strips())
            .into_par_iter()
            .map(|strip| encode_strip(symbols, pool, strip))
            .collect::<Option<_>>()?;
        let mut numbers: BTreeMap<usize, i32> = BTreeMap::new();
        for &table in strips.iter().flat_map(|strip| &strip.table_of_run) {
            numbers.insert(table, 0);
        }
        for (number, (_, local)) in numbers.iter_mut().enumerate() {
            *local = number as i32;
        }
        let table_of_run: Vec<i32> = strips.iter().flat_map(|strip| &strip.table_of_run).map(|t| numbers[t]).collect();
        let words: Vec<i32> = strips.iter().map(|strip| strip.words as i32).collect();
        let exceptions: Vec<i32> = strips.iter().map(|strip| strip.exceptions as i32).collect();
        let mut body = Vec::with_capacity(strips.iter().map(|strip| strip.bytes.len()).sum());
        let mut strip_crcs = Vec::with_capacity(strips.len());
        for strip in &strips {
            strip_crcs.push(crc32c::crc32c(&strip.bytes));
            body.extend_from_slice(&strip.bytes);
        }
        Some(Self {
            coding,
            streams: Some(SymbolStreams {
                run_elements: layout.run_elements as u32,
                runs_per_strip: layout.runs_per_strip as u32,
                tables: Vec::new(),
                table_of_run: integers::encode(&table_of_run),
                strip_words: integers::encode(&words),
                strip_exceptions: integers::encode(&exceptions),
            }),
            tables: numbers.into_keys().collect(),
            strip_crcs,
            body,
        })
    }

    /// Pool numbers of the tables used, in the part's order.
    pub fn tables(&self) -> &[usize] {
        &self.tables
    }

    /// The header, with the number that each pool table has in the archive.
    pub fn header(&self, mut number_of: impl FnMut(usize) -> u16) -> PartHeader {
        let mut streams = self.streams.clone();
        if let Some(streams) = &mut streams {
            streams.tables = self.tables.iter().map(|&table| number_of(table)).collect();
        }
        PartHeader {
            coding: self.coding.clone(),
            streams,
            strip_crcs: self.strip_crcs.clone(),
            cost: PartHeaderBytes::default(),
        }
    }
}

fn encode_strip(symbols: &dyn Symbols, pool: &TablePool, strip: usize) -> Option<EncodedStrip> {
    let layout = symbols.layout();
    let elements = layout.strip_range(strip);
    let first_run = strip * layout.runs_per_strip;
    let runs = first_run..elements.end.div_ceil(layout.run_elements);

    let mut codes = Vec::with_capacity(elements.len());
    let mut raw = Vec::with_capacity(elements.len());
    let mut table_of_run = Vec::with_capacity(runs.len());
    for run in runs {
        let mut histogram = Histogram::default();
        symbols.for_each(run, &mut |symbol, low, _| {
            histogram.add(symbol, 0.0);
            codes.push(symbol);
            raw.push(low);
        });
        table_of_run.push(pool.choose(symbols.kind(), symbols.class(&histogram), &histogram)?.0);
    }

    let mut positions = Vec::with_capacity(codes.len());
    let mut exceptions = Vec::new();
    for (index, &code) in codes.iter().enumerate() {
        let table = pool.table(table_of_run[index / layout.run_elements]);
        positions.push(table.position(code).unwrap_or_else(|| {
            exceptions.push(index);
            table.filler()
        }));
    }
    let tables: Vec<&CodingTable> = table_of_run.iter().map(|&table| &*pool.table(table).coding).collect();
    let (states, words) = encode_lanes(&positions, layout.run_elements, |run| tables[run]);

    let mut bytes: Vec<u8> = states.iter().flat_map(|state| state.to_le_bytes()).collect();
    bytes.extend(words.iter().flat_map(|word| word.to_le_bytes()));
    write_raw_bits(&raw, layout.run_elements, symbols.raw_bits(), &mut bytes);
    bytes.extend(exceptions.iter().flat_map(|&index| (index as u16).to_le_bytes()));
    for &index in &exceptions {
        bytes.extend(symbols.exception(elements.start + index));
    }
    Some(EncodedStrip { bytes, words: words.len(), exceptions: exceptions.len(), table_of_run })
}

/// Byte planes, then bit planes, as `format::strip` lays them out.
fn write_raw_bits(raw: &[u64], run_elements: usize, raw_bits: u32, bytes: &mut Vec<u8>) {
    for plane in 0..raw_bits / 8 {
        bytes.extend(raw.iter().map(|&raw| (raw >> (8 * plane)) as u8));
    }
    let whole = raw_bits / 8 * 8;
    for vector in raw.chunks(run_elements).flat_map(|run| run.chunks(LANES)) {
        for bit in whole..raw_bits {
            let lanes = (vector.iter().enumerate())
                .fold(0_u32, |lanes, (lane, &raw)| lanes | ((raw >> bit & 1) as u32) << lane);
            bytes.extend(lanes.to_le_bytes());
        }
    }
}

/// A decoder that does not read what the encoder wrote: a bug here, never the user's file.
#[derive(Debug, thiserror::Error)]
#[error("the decoder does not read what the encoder wrote for {tensor}: {error}; please report this")]
pub struct SelfCheckError {
    /// Name of the tensor.
    pub tensor: String,
    /// What the decoder said.
    pub error: DecodeError,
}
