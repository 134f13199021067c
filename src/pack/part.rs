//! One tensor becomes one part: symbols counted, tables chosen per run, strips encoded (Algorithm 1, lines 9-14).
//!
//! Works strip by strip, so that a large tensor needs no second copy of itself.

use std::collections::BTreeMap;

use rayon::prelude::*;

use super::counting::{choose_tables, sole_table};
use super::entropy_model::{FittedTable, TablePool};
use super::symbols::{Placed, RunLayout, Symbols};
use super::vectors::VectorStrips;
use crate::codec::entropy::{CodingTable, encode_lanes};
use crate::codec::integers;
use crate::decode::DecodeError;
use crate::format::bytes::{Writer, crc32c};
use crate::format::limits::RAW_STRIP_BYTES;
use crate::format::part::{
    Coding, PartHeader, PartHeaderBytes, StoredIntegers, StoredPrediction, StoredPredictor, SymbolStreams,
};
use crate::format::strip::LANES;

/// A part ready to be written. Its tables are numbers of the encoder's pool until [`EncodedPart::header`] renames them.
#[derive(Clone, Debug)]
pub struct EncodedPart {
    coding: Coding,
    streams: Option<SymbolStreams>,
    tables: Vec<usize>,
    strip_crcs: Vec<u32>,
    /// All strips, one after another.
    pub body: Vec<u8>,
    /// Squared error in squared weight units, but for the rounding to the element type.
    pub squared_error: f64,
}

/// A strip ready to be written.
pub struct EncodedStrip {
    bytes: Vec<u8>,
    words: usize,
    exceptions: usize,
}

impl EncodedStrip {
    /// Bytes that it takes.
    pub fn length_bytes(&self) -> usize {
        self.bytes.len()
    }
}

/// A strip with what its part must know of it.
struct PlacedStrip {
    encoded: EncodedStrip,
    /// Pool numbers: one table twice, or a pair.
    tables_of_run: Vec<[usize; 2]>,
    squared_error: f64,
}

impl EncodedPart {
    /// Bytes as they are.
    pub fn raw(bytes: &[u8]) -> Self {
        let strip_crcs = bytes.chunks(RAW_STRIP_BYTES as usize).map(crc32c).collect();
        Self {
            coding: Coding::Raw,
            streams: None,
            tables: Vec::new(),
            strip_crcs,
            body: bytes.to_vec(),
            squared_error: 0.0,
        }
    }

    /// Encodes symbols. `coding` says what they mean. `None` where the pool has no fitting table.
    pub fn symbols(coding: Coding, symbols: &dyn Symbols, pool: &TablePool) -> Option<Self> {
        let layout = symbols.layout();
        let sole_table = sole_table(symbols, pool);
        let strips: Vec<PlacedStrip> = (0..layout.strips())
            .into_par_iter()
            .map(|strip| encode_strip(symbols, pool, strip, sole_table))
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
        let squared_error = strips.iter().map(|strip| strip.squared_error).sum();
        let strips: Vec<EncodedStrip> = strips.into_iter().map(|strip| strip.encoded).collect();
        Some(Self { squared_error, ..Self::of_strips(coding, layout, tables, &table_of_run, &strips) })
    }

    /// A part of encoded strips. `tables` are numbers of the pool; `table_of_run` is stored as it is where there are several.
    pub fn of_strips(
        coding: Coding,
        layout: RunLayout,
        tables: Vec<usize>,
        table_of_run: &[i32],
        strips: &[EncodedStrip],
    ) -> Self {
        let words: Vec<i32> = strips.iter().map(|strip| strip.words as i32).collect();
        let exceptions: Vec<i32> = strips.iter().map(|strip| strip.exceptions as i32).collect();
        let mut body = Vec::with_capacity(strips.iter().map(|strip| strip.bytes.len()).sum());
        let mut strip_crcs = Vec::with_capacity(strips.len());
        for strip in strips {
            strip_crcs.push(crc32c(&strip.bytes));
            body.extend_from_slice(&strip.bytes);
        }
        Self {
            coding,
            streams: Some(SymbolStreams {
                run_elements: layout.run_elements as u32,
                runs_per_strip: layout.runs_per_strip as u32,
                lanes: layout.lanes as u8,
                tables: Vec::new(),
                table_of_run: if tables.len() > 1 { integers::encode(table_of_run) } else { StoredIntegers::default() },
                strip_words: integers::encode(&words),
                strip_exceptions: integers::encode(&exceptions),
            }),
            tables,
            strip_crcs,
            body,
            squared_error: 0.0,
        }
    }

    /// What equals a tensor of a base: nothing is stored of it.
    pub fn without_strips(coding: Coding) -> Self {
        Self { coding, ..Self::raw(&[]) }
    }

    /// Vectors as quantized. `coding` says with which codebooks.
    pub fn vectors(coding: Coding, layout: RunLayout, quantized: &VectorStrips) -> Self {
        Self {
            coding,
            streams: Some(SymbolStreams {
                run_elements: layout.run_elements as u32,
                runs_per_strip: layout.runs_per_strip as u32,
                ..SymbolStreams::default()
            }),
            tables: Vec::new(),
            strip_crcs: quantized.strips.iter().map(|strip| crc32c(strip)).collect(),
            body: quantized.strips.concat(),
            squared_error: quantized.squared_error,
        }
    }

    /// What the part's symbols mean.
    pub fn coding(&self) -> &Coding {
        &self.coding
    }

    /// Whether a base is needed to decode the part.
    pub fn starts_from_base(&self) -> bool {
        matches!(self.coding, Coding::Based(_) | Coding::QuantizedFromBase(..))
    }

    /// How the part is predicted, where it is.
    pub fn prediction(&self) -> Option<&StoredPrediction> {
        match &self.coding {
            Coding::Quantized(info) => info.prediction.as_ref(),
            _ => None,
        }
    }

    /// Whether the part is predicted from two layers.
    pub fn looks_at_two_layers(&self) -> bool {
        let predictor = self.prediction().map(|prediction| &prediction.predictor);
        matches!(predictor, Some(StoredPredictor::Network { second_part: Some(_), .. }))
    }

    /// Bits of the body and the header, as good as exactly.
    pub fn stored_bits(&self) -> f64 {
        let mut header = Writer::new();
        self.header(|table| table as u16).write(&mut header);
        8.0 * (self.body.len() + header.into_bytes().len()) as f64
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

fn encode_strip(
    symbols: &dyn Symbols,
    pool: &TablePool,
    strip: usize,
    sole_table: Option<usize>,
) -> Option<PlacedStrip> {
    let layout = symbols.layout();
    let runs = layout.strip_runs(strip);
    let tables_of_run = match sole_table {
        Some(table) => vec![[table; 2]; runs.len()],
        None => choose_tables(symbols, pool, runs.clone())?,
    };
    let fitted: Vec<[&FittedTable; 2]> =
        tables_of_run.iter().map(|tables| tables.map(|table| pool.table(table))).collect();
    let placed = symbols.place(runs.clone(), &fitted);
    let tables: Vec<[&CodingTable; 2]> = fitted.iter().map(|tables| tables.map(|table| &*table.coding)).collect();
    let raw_bits_of_run = |run: usize| (symbols.raw_bits(), symbols.zero_bits(runs.start + run));
    let encoded = strip_bytes(&placed, layout, |run, index| tables[run][placed.quantizer(index)], raw_bits_of_run);
    let squared_error = squared_error(symbols, runs.start, &placed, &fitted);
    Some(PlacedStrip { encoded, tables_of_run, squared_error })
}

/// The bytes of a strip: lanes, raw bits, exceptions. `table_of` gives the table of a symbol by its run and its index, and
/// `raw_bits_of_run` how many raw bits a run's symbols have and how many of the lowest are zero and not stored, both counted
/// in the strip.
pub fn strip_bytes<'t>(
    placed: &Placed,
    layout: RunLayout,
    table_of: impl Fn(usize, usize) -> &'t CodingTable,
    raw_bits_of_run: impl Fn(usize) -> (u32, u32),
) -> EncodedStrip {
    let (states, words) = encode_lanes(&placed.positions, layout.run_elements, layout.lanes, table_of);
    let mut bytes: Vec<u8> = states.iter().flat_map(|state| state.to_le_bytes()).collect();
    bytes.reserve(2 * words.len() + placed.raw.len());
    words.iter().for_each(|word| bytes.extend_from_slice(&word.to_le_bytes()));
    for (run, raw) in placed.raw.chunks(layout.run_elements).enumerate() {
        let (raw_bits, zeros) = raw_bits_of_run(run);
        write_raw_bits(raw, raw_bits, zeros, &mut bytes);
    }
    bytes.extend(placed.exceptions.iter().flat_map(|(index, _)| index.to_le_bytes()));
    for (_, value) in &placed.exceptions {
        bytes.extend(value);
    }
    EncodedStrip { bytes, words: words.len(), exceptions: placed.exceptions.len() }
}

/// Squared error of placed symbols, the points' offsets counted.
fn squared_error(symbols: &dyn Symbols, first_run: usize, placed: &Placed, tables: &[[&FittedTable; 2]]) -> f64 {
    let run_elements = symbols.layout().run_elements;
    let mut sum = 0.0;
    let mut errors = Vec::with_capacity(run_elements);
    for (run, (offsets, tables)) in placed.offsets.chunks(run_elements).zip(tables).enumerate() {
        let start = run * run_elements;
        errors.clear();
        errors.extend(offsets.iter().enumerate().map(|(index, offset)| {
            let index = start + index;
            offset - tables[placed.quantizer(index)].point_offset(placed.positions[index])
        }));
        sum += symbols.squared_error(first_run + run, &errors);
    }
    sum
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
