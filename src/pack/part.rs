//! One tensor becomes one part: symbols counted, tables chosen per run, strips encoded (Algorithm 1, lines 9-14).
//!
//! Works strip by strip, so that a large tensor needs no second copy of itself.

use std::collections::BTreeMap;
use std::ops::Range;

use rayon::prelude::*;

use super::entropy_model::{ClassHistograms, FittedTable, Histogram, StreamKind, TablePool};
use crate::codec::entropy::{CodingTable, encode_lanes};
use crate::codec::integers;
use crate::codec::lossless::{narrow, split_element};
use crate::decode::DecodeError;
use crate::format::limits::{RAW_STRIP_BYTES, STRIP_SYMBOLS};
use crate::format::part::{Carrier, Coding, PartHeader, PartHeaderBytes, StoredIntegers, SymbolStreams};
use crate::format::strip::LANES;

/// Symbols for which a strip gets one more lane: a full strip, of at least 49,152 symbols, has all 32, as vector kernels want.
const SYMBOLS_PER_LANE: usize = 1536;

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

    /// Lanes of a strip. Each costs about three bytes of a strip's length, so small strips have few: a lane for every 1,536
    /// symbols, which keeps that to a 60th of a bit per symbol.
    pub fn lanes(&self) -> usize {
        let symbols = self.elements.min(self.run_elements * self.runs_per_strip);
        1 << (symbols / SYMBOLS_PER_LANE).max(1).ilog2().min(LANES.ilog2())
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

    /// Runs of a strip.
    pub fn strip_runs(&self, strip: usize) -> Range<usize> {
        strip * self.runs_per_strip..((strip + 1) * self.runs_per_strip).min(self.runs())
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
    /// Low raw bits that are zero in every element of a run, and not stored.
    fn zero_bits(&self, _run: usize) -> u32 {
        0
    }
    /// Gives the symbol, the raw bits and the offset of the value from the code, in steps, of every element of a run.
    fn for_each(&self, run: usize, take: &mut dyn FnMut(i32, u64, f32));
    /// What an offset of 1 means in a run, in weight units.
    fn unit(&self, _run: usize) -> f32 {
        1.0
    }
    /// The bytes of an element as an exception.
    fn exception(&self, element: usize) -> Vec<u8>;

    /// The kind of the second quantizer's tables, where the trellis has tables of its own for it.
    fn second_kind(&self) -> Option<StreamKind> {
        None
    }

    /// The class of a run with these symbols: a quarter octave of scale.
    fn class(&self, run: &Histogram) -> i32;

    /// Chooses the final symbols of consecutive runs, given the tables of each (for the trellis' two quantizers, else twice
    /// the same): the nearest, unless the kind knows better.
    fn place(&self, runs: Range<usize>, tables: &[[&FittedTable; 2]]) -> Placed {
        let mut placed = Placed::default();
        for (run, [table, _]) in runs.zip(tables) {
            self.for_each(run, &mut |symbol, raw, offset| {
                let index = placed.positions.len();
                match table.position(symbol) {
                    Some(position) => placed.positions.push(position),
                    None => {
                        placed.positions.push(table.filler());
                        let element = self.layout().run_range(run).start + index % self.layout().run_elements;
                        placed.exceptions.push((index as u16, self.exception(element)));
                    }
                }
                placed.symbols.push((symbol, offset));
                placed.raw.push(raw);
            });
        }
        placed
    }
}

/// The final symbols of consecutive runs.
#[derive(Clone, Debug, Default)]
pub struct Placed {
    /// Table positions.
    pub positions: Vec<u8>,
    /// Raw bits below each symbol.
    pub raw: Vec<u64>,
    /// Which of the trellis' two quantizers each symbol belongs to; empty without a trellis.
    pub quantizers: Vec<u8>,
    /// Symbols, and how far each value lies from its point before offsets, in steps.
    pub symbols: Vec<(i32, f32)>,
    /// Index in the strip and value of every exception, in order.
    pub exceptions: Vec<(u16, Vec<u8>)>,
}

/// Bit-exact elements, see `codec::lossless`.
pub struct SplitSymbols<'a> {
    /// The tensor's bytes.
    bytes: &'a [u8],
    /// Bytes of one element.
    element_bytes: usize,
    /// Layout of the runs.
    pub layout: RunLayout,
    /// The type that is split.
    carrier: Carrier,
    /// Bits of a carrier element.
    carrier_bits: u32,
    /// Mantissa bits of the carrier.
    mantissa_bits: u32,
    /// Raw bits per symbol.
    raw_bits: u32,
    /// Low bits that are zero in every element of each run; empty where none are in any.
    zero_bits: Vec<u8>,
}

impl<'a> SplitSymbols<'a> {
    /// The elements of `bytes` split as told.
    pub fn new(
        bytes: &'a [u8],
        element_bytes: usize,
        layout: RunLayout,
        carrier: (Carrier, u32),
        mantissa_bits: u32,
        raw_bits: u32,
    ) -> Self {
        let (carrier, carrier_bits) = carrier;
        let zero_bits = Vec::new();
        let mut symbols =
            Self { bytes, element_bytes, layout, carrier, carrier_bits, mantissa_bits, raw_bits, zero_bits };
        let zeros_of_run = |run| {
            let bits = layout.run_range(run).fold(0, |bits, element| bits | symbols.carrier_element(element));
            bits.trailing_zeros().min(raw_bits - 1) as u8
        };
        let zero_bits: Vec<u8> = (0..layout.runs()).into_par_iter().map(zeros_of_run).collect();
        if zero_bits.iter().any(|&zeros| zeros > 0) {
            symbols.zero_bits = zero_bits;
        }
        symbols
    }

    /// What the part's header says of the split.
    pub fn coding(&self) -> Coding {
        let zero_bits: Vec<i32> = self.zero_bits.iter().copied().map(i32::from).collect();
        Coding::Split {
            carrier: self.carrier,
            raw_bits: self.raw_bits as u8,
            zero_bits: (!zero_bits.is_empty()).then(|| integers::encode(&zero_bits)),
        }
    }

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

    fn zero_bits(&self, run: usize) -> u32 {
        self.zero_bits.get(run).copied().unwrap_or(0).into()
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
    Some((total / measured.max(1) as f64 + mean_raw_bits(symbols)) * layout.elements as f64)
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
    /// Pool numbers: one table twice, or a pair.
    tables_of_run: Vec<[usize; 2]>,
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
        let mut numbers: BTreeMap<[usize; 2], i32> = BTreeMap::new();
        for &tables in strips.iter().flat_map(|strip| &strip.tables_of_run) {
            numbers.insert(tables, 0);
        }
        for (number, (_, local)) in numbers.iter_mut().enumerate() {
            *local = number as i32;
        }
        let table_of_run: Vec<i32> =
            strips.iter().flat_map(|strip| &strip.tables_of_run).map(|tables| numbers[tables]).collect();
        let tables_per_number = if symbols.second_kind().is_some() { 2 } else { 1 };
        let tables: Vec<usize> =
            numbers.into_keys().flat_map(|tables| tables.into_iter().take(tables_per_number)).collect();
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
                lanes: layout.lanes() as u8,
                tables: Vec::new(),
                table_of_run: if tables.len() > 1 {
                    integers::encode(&table_of_run)
                } else {
                    StoredIntegers::default()
                },
                strip_words: integers::encode(&words),
                strip_exceptions: integers::encode(&exceptions),
            }),
            tables,
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
    let runs = layout.strip_runs(strip);
    let tables_of_run = choose_tables(symbols, pool, runs.clone())?;
    let fitted: Vec<[&FittedTable; 2]> =
        tables_of_run.iter().map(|tables| tables.map(|table| pool.table(table))).collect();
    let placed = symbols.place(runs.clone(), &fitted);
    let tables: Vec<[&CodingTable; 2]> = fitted.iter().map(|tables| tables.map(|table| &*table.coding)).collect();
    let (states, words) = encode_lanes(&placed.positions, layout.run_elements, layout.lanes(), |run, index| {
        tables[run][placed.quantizers.get(index).copied().map_or(0, usize::from)]
    });

    let mut bytes: Vec<u8> = states.iter().flat_map(|state| state.to_le_bytes()).collect();
    bytes.extend(words.iter().flat_map(|word| word.to_le_bytes()));
    for (run, raw) in runs.zip(placed.raw.chunks(layout.run_elements)) {
        write_raw_bits(raw, symbols.raw_bits(), symbols.zero_bits(run), &mut bytes);
    }
    bytes.extend(placed.exceptions.iter().flat_map(|(index, _)| index.to_le_bytes()));
    for (_, value) in &placed.exceptions {
        bytes.extend(value);
    }
    Some(EncodedStrip { bytes, words: words.len(), exceptions: placed.exceptions.len(), tables_of_run })
}

/// The cheapest table of each run, or pair of tables, as numbers of the pool.
fn choose_tables(symbols: &dyn Symbols, pool: &TablePool, runs: Range<usize>) -> Option<Vec<[usize; 2]>> {
    runs.map(|run| {
        let histogram = run_histogram(symbols, run);
        let (first, _) = pool.choose(symbols.kind(), symbols.class(&histogram), &histogram)?;
        Some([first, symbols.second_kind().map_or(first, |kind| pool.companion(first, kind))])
    })
    .collect()
}

/// What placing a part's symbols gave.
#[derive(Clone, Debug)]
pub struct PlacedCounts {
    /// Symbols by the class that chose their table.
    pub classes: ClassHistograms,
    /// Bits of the whole part.
    pub bits: f64,
    /// Squared error of the whole part, in squared weight units.
    pub squared_error: f64,
}

/// Counts the symbols of every `every`-th strip as they are placed with the tables of `pool`, by the class that chose the
/// table; bits and error are scaled up to all strips. `None` where the pool has no fitting table.
pub fn count_placed(symbols: &dyn Symbols, pool: &TablePool, every: usize) -> Option<PlacedCounts> {
    let layout = symbols.layout();
    let strips: Vec<usize> = (0..layout.strips()).step_by(every.max(1)).collect();
    let counted: Vec<Option<(PlacedCounts, usize)>> = strips
        .par_iter()
        .map(|&strip| {
            let runs = layout.strip_runs(strip);
            let tables_of_run = choose_tables(symbols, pool, runs.clone())?;
            let fitted: Vec<[&FittedTable; 2]> =
                tables_of_run.iter().map(|tables| tables.map(|table| pool.table(table))).collect();
            let placed = symbols.place(runs, &fitted);
            let mut classes = ClassHistograms::default();
            let mut bits = 40.0 * placed.exceptions.len() as f64;
            let mut squared_error = 0.0;
            let first_run = layout.strip_runs(strip).start;
            let kinds = [symbols.kind(), symbols.second_kind().unwrap_or(symbols.kind())];
            for (run, of_run) in placed.symbols.chunks(layout.run_elements).enumerate() {
                let mut histograms = [Histogram::default(), Histogram::default()];
                for (index, &(symbol, offset)) in of_run.iter().enumerate() {
                    let quantizer =
                        placed.quantizers.get(run * layout.run_elements + index).copied().map_or(0, usize::from);
                    histograms[quantizer].add(symbol, offset);
                    bits += f64::from(fitted[run][quantizer].bits(symbol)).min(20.0);
                    squared_error += f64::from(offset * symbols.unit(first_run + run)).powi(2);
                }
                for (kind, histogram) in kinds.into_iter().zip(&histograms) {
                    classes.add(kind, pool.class_of(tables_of_run[run][0]), histogram);
                }
            }
            Some((PlacedCounts { classes, bits, squared_error }, placed.symbols.len()))
        })
        .collect();
    let mut all = ClassHistograms::default();
    let (mut bits, mut squared_error, mut placed) = (0.0, 0.0, 0);
    for counted in counted {
        let (strip, symbols) = counted?;
        all.merge(&strip.classes);
        bits += strip.bits;
        squared_error += strip.squared_error;
        placed += symbols;
    }
    let share = layout.elements as f64 / placed.max(1) as f64;
    let bits = bits * share + mean_raw_bits(symbols) * layout.elements as f64;
    Some(PlacedCounts { classes: all, bits, squared_error: squared_error * share })
}

/// Stored raw bits per symbol, over all runs.
pub fn mean_raw_bits(symbols: &dyn Symbols) -> f64 {
    let layout = symbols.layout();
    let zeros = |run| symbols.zero_bits(run) as usize * layout.run_range(run).len();
    let zeros: usize = (0..layout.runs()).map(zeros).sum();
    f64::from(symbols.raw_bits()) - zeros as f64 / layout.elements.max(1) as f64
}

/// The raw bits of a run as `format::strip` lays them out, less the lowest `zeros`.
fn write_raw_bits(raw: &[u64], raw_bits: u32, zeros: u32, bytes: &mut Vec<u8>) {
    let (whole, end) = (zeros + (raw_bits - zeros) / 8 * 8, raw_bits);
    for bit in (zeros..whole).step_by(8) {
        bytes.extend(raw.iter().map(|&raw| (raw >> bit) as u8));
    }
    for vector in raw.chunks(LANES) {
        for bit in whole..end {
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_part_of_several_strips_has_all_lanes() {
        for columns in 1..70_000 {
            let layout = RunLayout::of_shape(&[70_000, columns]);
            assert!(layout.strips() > 1 && layout.lanes() == LANES, "{columns} columns: {} lanes", layout.lanes());
        }
    }

    #[test]
    fn a_small_part_has_few_lanes() {
        let lanes = |rows| RunLayout::of_shape(&[rows, 64]).lanes();
        assert_eq!([1, 47, 48, 767, 768].map(lanes), [1, 1, 2, 16, 32]);
    }
}
