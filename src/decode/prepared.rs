//! A part checked and ready for any engine: everything its header says, against the tensor it must fill.

mod based;
mod quantized;

use std::ops::Range;
use std::sync::Arc;

use self::based::prepare_based;
use self::quantized::prepare_quantized;
use super::DecodeError;
use crate::codec::entropy::CodingTable;
use crate::codec::integers::{self, Integers};
use crate::codec::lossless::carrier_bits;
use crate::codec::motion::Motion;
use crate::codec::units::UnitCoding;
use crate::codec::vector_quantizer::{Codebook, VectorQuantizer};
use crate::format::bytes::crc32c;
use crate::format::difference::BaseTensor;
use crate::format::limits;
use crate::format::part::{Carrier, Coding, PartHeader, StoredIntegers, SymbolStreams, TrellisTables};
use crate::format::strip::{StripLayout, raw_bytes_of_run};
use crate::tensor::{Dtype, TensorInfo};

pub use self::based::{Based, Difference};
pub use self::quantized::{Prediction, Quantizer};

/// What parts of an archive refer to by number.
#[derive(Clone, Copy, Debug, Default)]
pub struct Pools<'a> {
    /// Entropy tables.
    pub tables: &'a [Arc<CodingTable>],
    /// Codebooks of vectors.
    pub codebooks: &'a [Arc<Codebook>],
}

/// A part ready for decoding.
#[derive(Debug)]
pub struct PreparedPart {
    dtype: Dtype,
    /// Bits of the tensor that a symbol stands for.
    symbol_bits: usize,
    length_bytes: u64,
    kind: PartKind,
    /// The tensor of a base archive that the part starts from.
    base: Option<BaseTensor>,
    strips: Vec<PreparedStrip>,
}

/// One strip of a prepared part.
#[derive(Clone, Copy, Debug)]
struct PreparedStrip {
    /// First stored byte, counted from the first strip of the part.
    offset: u64,
    /// Stored bytes.
    length: u64,
    crc: u32,
    words: usize,
    raw_bytes: usize,
    exceptions: usize,
}

/// How the elements of a part are coded.
#[derive(Debug)]
pub enum PartKind {
    /// Bytes as they are.
    Raw,
    /// Bit-exact, see `codec::lossless`.
    Split {
        /// The type that is split.
        carrier: Carrier,
        /// Bits of a carrier element.
        carrier_bits: u32,
        /// The symbols.
        symbols: Symbols,
    },
    /// Integers in the tensor's bytes, see `codec::units`.
    Units {
        /// What symbols stand for.
        units: UnitCoding,
        /// The symbols.
        symbols: Symbols,
    },
    /// Quantized, see `codec::quantizer`.
    Quantized {
        /// The symbols.
        symbols: Symbols,
        /// Step, scales, means.
        quantizer: Quantizer,
        /// Present in predicted parts.
        prediction: Option<Prediction>,
    },
    /// Bit-exact, see `codec::difference`.
    Based(Based),
}

/// Layout and tables of coded symbols.
#[derive(Debug)]
pub struct Symbols {
    /// Symbols of one run.
    pub run_elements: usize,
    /// Runs of one strip.
    pub runs_per_strip: usize,
    /// Lanes of a strip.
    pub lanes: usize,
    /// Raw low bits per symbol.
    pub raw_bits: u32,
    /// How many of the lowest raw bits of each run are zero and not stored.
    zero_bits: Integers,
    tables: Vec<Arc<CodingTable>>,
    table_of_run: Integers,
}

impl Symbols {
    /// The entropy table of a run.
    pub fn table_of_run(&self, run: usize) -> &CodingTable {
        &self.tables[self.table_of_run.get(run) as usize]
    }

    /// All tables that runs choose from.
    pub fn tables(&self) -> &[Arc<CodingTable>] {
        &self.tables
    }

    /// The number of a run's table, or of its pair of tables.
    pub fn table_number_of_run(&self, run: usize) -> usize {
        self.table_of_run.get(run) as usize
    }

    /// Raw bits that are stored of each symbol of a run, and how many zero ones follow them.
    pub fn stored_raw_bits(&self, run: usize) -> (u32, u32) {
        let zeros = self.zero_bits.get(run) as u32;
        (self.raw_bits - zeros, zeros)
    }

    /// Whether all runs have the same table and the same raw bits.
    pub fn runs_are_alike(&self) -> bool {
        matches!((&self.table_of_run, &self.zero_bits), (Integers::Constant(_), Integers::Constant(_)))
    }

    /// Whether all raw bits of all runs are stored.
    pub fn stores_all_raw_bits(&self) -> bool {
        matches!(self.zero_bits, Integers::Constant(0))
    }

    /// Bytes of a strip's raw bits.
    fn raw_bytes_of_strip(&self, strip: usize, symbols: usize) -> usize {
        let bytes = |run, symbols| {
            let (raw_bits, _) = self.stored_raw_bits(strip * self.runs_per_strip + run);
            raw_bytes_of_run(symbols, raw_bits as usize)
        };
        let (runs, rest) = (symbols / self.run_elements, symbols % self.run_elements);
        let of_rest = if rest > 0 { bytes(runs, rest) } else { 0 };
        match self.zero_bits {
            Integers::Constant(_) => runs * bytes(0, self.run_elements) + of_rest,
            _ => (0..runs).map(|run| bytes(run, self.run_elements)).sum::<usize>() + of_rest,
        }
    }

    /// The layout of indices of codewords: without lanes and tables.
    fn of_vectors(streams: &SymbolStreams) -> Self {
        Self {
            run_elements: streams.run_elements as usize,
            runs_per_strip: streams.runs_per_strip as usize,
            lanes: 0,
            raw_bits: 0,
            zero_bits: Integers::Constant(0),
            tables: Vec::new(),
            table_of_run: Integers::Constant(0),
        }
    }

    /// Bytes of a strip's indices of codewords.
    fn vector_bytes_of_strip(&self, vectors: &VectorQuantizer, elements: usize) -> usize {
        let (runs, rest) = (elements / self.run_elements, elements % self.run_elements);
        runs * vectors.bytes_of_run(self.run_elements) + vectors.bytes_of_run(rest)
    }

    /// The two tables of a run whose table number stands for a pair.
    pub fn table_pair_of_run(&self, run: usize) -> [&CodingTable; 2] {
        let first = 2 * self.table_of_run.get(run) as usize;
        [&self.tables[first], &self.tables[first + 1]]
    }
}

impl PreparedPart {
    /// Checks `header` against the tensor it fills. `pools` are the archive's. `motion` is what the record's permutation
    /// does to this tensor; it is used only if the header asks for it.
    pub fn new(
        tensor: &TensorInfo,
        header: &PartHeader,
        pools: Pools<'_>,
        motion: Option<Motion>,
    ) -> Result<Self, DecodeError> {
        let element_bits = tensor.dtype.bits().unwrap_or(8);
        let mut part = Self {
            dtype: tensor.dtype.clone(),
            symbol_bits: 8 * element_bits.div_ceil(8) as usize,
            length_bytes: tensor.length_bytes,
            kind: PartKind::Raw,
            base: None,
            strips: Vec::new(),
        };
        if let Coding::Based(info) = &header.coding {
            part.kind = prepare_based(info, tensor, header.streams.as_ref(), pools.tables)?;
            part.base = Some(info.reference);
        }
        let Some(streams) = &header.streams else {
            if matches!(part.kind, PartKind::Based(_)) {
                if !header.strip_crcs.is_empty() {
                    return Err(inconsistent("strips", header.strip_crcs.len(), "none without differences"));
                }
                part.prepare_unstored_strips();
                return Ok(part);
            }
            part.prepare_raw_strips(&header.strip_crcs)?;
            return Ok(part);
        };
        let mut elements = tensor.elements();
        if let Coding::Units(info) = &header.coding {
            let bits = u64::from(info.unit_bits);
            // Below 2^63 bytes, so that twice as many units can be counted.
            let is_whole = tensor.length_bytes.is_multiple_of(bits.div_ceil(8))
                && (u64::from(streams.run_elements) * bits).is_multiple_of(8);
            if !is_whole {
                let found = format!("{bits}, runs of {}", streams.run_elements);
                let expected = format!("runs of whole bytes in a tensor of {}", tensor.length_bytes);
                return Err(inconsistent("unit bits", found, expected));
            }
            part.symbol_bits = bits as usize;
            elements = if bits == 4 { 2 * tensor.length_bytes } else { tensor.length_bytes / (bits / 8) };
        } else if !matches!(tensor.dtype.bits(), Some(8 | 16 | 32 | 64)) {
            return Err(inconsistent(
                "part coding",
                "coded elements",
                format!("raw bytes or units for {}", tensor.dtype),
            ));
        }
        let run_elements = u64::from(streams.run_elements);
        let runs = elements.div_ceil(run_elements);
        let expected_strips = runs.div_ceil(streams.runs_per_strip.into());
        if header.strip_crcs.len() as u64 != expected_strips {
            return Err(inconsistent("strips", header.strip_crcs.len(), expected_strips));
        }
        let exception_value_bytes = match &header.coding {
            Coding::Split { carrier, raw_bits, zero_bits } => {
                let bits = carrier_bits(*carrier, element_bits as u32);
                if *carrier != Carrier::Own && tensor.dtype != Dtype::F32 {
                    return Err(inconsistent("carrier", format!("{carrier:?} in {}", tensor.dtype), "F32"));
                }
                if u32::from(*raw_bits) > bits {
                    return Err(inconsistent("raw bits", raw_bits, format!("1 to {bits}")));
                }
                let mut symbols = prepare_symbols(streams, (*raw_bits).into(), pools.tables, runs, 1)?;
                if let Some(zero_bits) = zero_bits {
                    // The sign is always stored.
                    symbols.zero_bits = decode_integers("zero bits", zero_bits, runs, 0, i32::from(*raw_bits) - 1)?;
                }
                part.kind = PartKind::Split { carrier: *carrier, carrier_bits: bits, symbols };
                bits as usize / 8
            }
            Coding::Quantized(info) | Coding::QuantizedFromBase(_, info) => {
                if !matches!(tensor.dtype, Dtype::F32 | Dtype::F16 | Dtype::BF16) {
                    return Err(inconsistent("part coding", format!("quantized {}", tensor.dtype), "F32, F16 or BF16"));
                }
                let symbols = if info.vectors.is_some() {
                    Symbols::of_vectors(streams)
                } else {
                    let pairs = info.trellis.is_some_and(|trellis| trellis.tables == TrellisTables::Pairs);
                    let per_number = if pairs { 2 } else { 1 };
                    prepare_symbols(streams, info.raw_bits.into(), pools.tables, runs, per_number)?
                };
                part.kind = prepare_quantized(info, symbols, pools.codebooks, motion, runs)?;
                if let (Coding::QuantizedFromBase(reference, _), PartKind::Quantized { prediction, .. }) =
                    (&header.coding, &mut part.kind)
                {
                    part.base = Some(*reference);
                    *prediction = Some(Prediction::copy());
                }
                2
            }
            Coding::Units(info) => {
                let symbols = prepare_symbols(streams, info.raw_bits.into(), pools.tables, runs, 1)?;
                part.kind = PartKind::Units { units: UnitCoding::new(info), symbols };
                info.number_bytes()
            }
            Coding::Based(_) => part.symbol_bits / 8,
            Coding::Raw => unreachable!("raw parts have no streams"),
        };
        part.prepare_symbol_strips(streams, &header.strip_crcs, elements, exception_value_bytes)?;
        Ok(part)
    }

    fn prepare_raw_strips(&mut self, crcs: &[u32]) -> Result<(), DecodeError> {
        let expected = self.length_bytes.div_ceil(limits::RAW_STRIP_BYTES);
        if crcs.len() as u64 != expected {
            return Err(inconsistent("strips", crcs.len(), expected));
        }
        for (strip, &crc) in crcs.iter().enumerate() {
            let offset = strip as u64 * limits::RAW_STRIP_BYTES;
            let length = limits::RAW_STRIP_BYTES.min(self.length_bytes - offset);
            self.strips.push(PreparedStrip { offset, length, crc, words: 0, raw_bytes: 0, exceptions: 0 });
        }
        Ok(())
    }

    fn prepare_symbol_strips(
        &mut self,
        streams: &SymbolStreams,
        crcs: &[u32],
        elements: u64,
        exception_value_bytes: usize,
    ) -> Result<(), DecodeError> {
        let count = crcs.len() as u64;
        let strip_symbols = u64::from(streams.run_elements) * u64::from(streams.runs_per_strip);
        let symbols = self.symbols().expect("only parts with symbols come here");
        let vectors = match &self.kind {
            PartKind::Quantized { quantizer, .. } => quantizer.vectors.as_ref(),
            _ => None,
        };
        let (words, exceptions) = match vectors {
            Some(_) => (Integers::Constant(0), Integers::Constant(0)),
            None => {
                let most = limits::STRIP_SYMBOLS as i32;
                (
                    decode_integers("strip words", &streams.strip_words, count, 0, 1 << 17)?,
                    decode_integers("strip exceptions", &streams.strip_exceptions, count, 0, most)?,
                )
            }
        };
        let mut strips = Vec::with_capacity(crcs.len());
        let mut offset = 0;
        for (strip, &crc) in crcs.iter().enumerate() {
            let first = strip as u64 * strip_symbols;
            let symbols_of_strip = strip_symbols.min(elements - first) as usize;
            let layout = StripLayout {
                symbols: symbols_of_strip,
                run_elements: streams.run_elements as usize,
                lanes: symbols.lanes,
                words: words.get(strip) as usize,
                raw_bytes: match vectors {
                    Some(vectors) => symbols.vector_bytes_of_strip(vectors, symbols_of_strip),
                    None => symbols.raw_bytes_of_strip(strip, symbols_of_strip),
                },
                exceptions: exceptions.get(strip) as usize,
                exception_value_bytes,
            };
            if layout.exceptions > layout.symbols {
                let expected = format!("at most {}", layout.symbols);
                return Err(inconsistent("strip exceptions", layout.exceptions, expected));
            }
            let length = layout.bytes() as u64;
            let StripLayout { words, raw_bytes, exceptions, .. } = layout;
            strips.push(PreparedStrip { offset, length, crc, words, raw_bytes, exceptions });
            offset += length;
        }
        self.strips = strips;
        Ok(())
    }

    /// How the elements are coded.
    pub fn kind(&self) -> &PartKind {
        &self.kind
    }

    /// Element type of the tensor.
    pub fn dtype(&self) -> &Dtype {
        &self.dtype
    }

    /// Bits of the tensor that a symbol stands for, or an element where none are coded.
    pub fn symbol_bits(&self) -> usize {
        self.symbol_bits
    }

    /// Number of strips.
    pub fn strips(&self) -> usize {
        self.strips.len()
    }

    /// Stored length of all strips in bytes.
    pub fn body_bytes(&self) -> u64 {
        self.strips.last().map_or(0, |strip| strip.offset + strip.length)
    }

    /// Where the stored bytes of a strip lie, counted from the part's first strip.
    pub fn strip_range(&self, strip: usize) -> Range<u64> {
        let PreparedStrip { offset, length, .. } = self.strips[strip];
        offset..offset + length
    }

    /// Length of the tensor in bytes.
    pub fn length_bytes(&self) -> u64 {
        self.length_bytes
    }

    /// Tensor bytes of a full strip; the last may have fewer.
    pub fn full_strip_output_bytes(&self) -> u64 {
        match self.symbols() {
            Some(symbols) => (symbols.run_elements * symbols.runs_per_strip * self.symbol_bits / 8) as u64,
            None => limits::RAW_STRIP_BYTES,
        }
    }

    /// Tensor bytes of one strip.
    pub fn strip_output_bytes(&self, strip: usize) -> usize {
        let full = self.full_strip_output_bytes();
        full.min(self.length_bytes - strip as u64 * full) as usize
    }

    /// How a bit-exact part starts from a base archive, where it does.
    pub fn based(&self) -> Option<&Based> {
        match &self.kind {
            PartKind::Based(based) => Some(based),
            _ => None,
        }
    }

    /// Tensor bytes of consecutive strips.
    pub fn output_range(&self, strips: Range<usize>) -> Range<u64> {
        let full = self.full_strip_output_bytes();
        strips.start as u64 * full..(strips.end as u64 * full).min(self.length_bytes)
    }

    /// The tensor of a base archive that the part starts from, bit-exact or quantized.
    pub fn base(&self) -> Option<BaseTensor> {
        self.base
    }

    /// The prediction, where the part is predicted from another record.
    pub fn prediction(&self) -> Option<&Prediction> {
        match &self.kind {
            _ if self.base.is_some() => None,
            PartKind::Quantized { prediction, .. } => prediction.as_ref(),
            PartKind::Raw | PartKind::Split { .. } | PartKind::Units { .. } | PartKind::Based(_) => None,
        }
    }

    /// Layout and tables, where symbols are coded.
    pub fn symbols(&self) -> Option<&Symbols> {
        match &self.kind {
            PartKind::Raw => None,
            PartKind::Split { symbols, .. } | PartKind::Units { symbols, .. } | PartKind::Quantized { symbols, .. } => {
                Some(symbols)
            }
            PartKind::Based(based) => based.difference.as_ref().map(|difference| &difference.symbols),
        }
    }

    /// Layout of one strip; `None` in raw parts.
    pub fn layout(&self, strip: usize) -> Option<StripLayout> {
        let symbols = self.symbols()?;
        let exception_value_bytes = match &self.kind {
            PartKind::Split { carrier_bits, .. } => *carrier_bits as usize / 8,
            PartKind::Units { units, .. } => units.number_bytes(),
            PartKind::Based(_) => self.symbol_bits / 8,
            PartKind::Raw | PartKind::Quantized { .. } => 2,
        };
        Some(StripLayout {
            symbols: 8 * self.strip_output_bytes(strip) / self.symbol_bits,
            run_elements: symbols.run_elements,
            lanes: symbols.lanes,
            words: self.strips[strip].words,
            raw_bytes: self.strips[strip].raw_bytes,
            exceptions: self.strips[strip].exceptions,
            exception_value_bytes,
        })
    }

    /// Checks the stored bytes of a strip; every engine starts with this.
    pub fn check_strip(&self, strip: usize, stored: &[u8]) -> Result<(), DecodeError> {
        let found = crc32c(stored);
        let expected = self.strips[strip].crc;
        if found != expected {
            return Err(DecodeError::StripChecksum { strip, found, expected });
        }
        Ok(())
    }
}

#[allow(clippy::needless_pass_by_value)] // literals and numbers alike
fn inconsistent(field: &'static str, found: impl ToString, expected: impl ToString) -> DecodeError {
    DecodeError::Inconsistent { field, found: found.to_string(), expected: expected.to_string() }
}

fn decode_integers(
    field: &'static str,
    stored: &StoredIntegers,
    count: u64,
    low: i32,
    high: i32,
) -> Result<Integers, DecodeError> {
    integers::decode(stored, count, low, high).map_err(|error| DecodeError::SideInformation { field, error })
}

/// The tables that a part names.
fn tables_of(streams: &SymbolStreams, pool: &[Arc<CodingTable>]) -> Result<Vec<Arc<CodingTable>>, DecodeError> {
    let table = |&number: &u16| {
        let table = pool.get(usize::from(number));
        table.cloned().ok_or_else(|| inconsistent("part table", number, format!("less than {}", pool.len())))
    };
    streams.tables.iter().map(table).collect()
}

fn prepare_symbols(
    streams: &SymbolStreams,
    raw_bits: u32,
    pool: &[Arc<CodingTable>],
    runs: u64,
    tables_per_number: usize,
) -> Result<Symbols, DecodeError> {
    let tables = tables_of(streams, pool)?;
    if tables.len() % tables_per_number != 0 {
        return Err(inconsistent("part tables", tables.len(), "pairs of tables"));
    }
    let table_of_run = match tables.len() / tables_per_number {
        0 if runs > 0 => return Err(inconsistent("part tables", tables.len(), "one table at least")),
        _ if tables.len() < 2 => Integers::Constant(0), // no choices are stored
        count => decode_integers("table of run", &streams.table_of_run, runs, 0, count as i32 - 1)?,
    };
    Ok(Symbols {
        run_elements: streams.run_elements as usize,
        runs_per_strip: streams.runs_per_strip as usize,
        lanes: streams.lanes.into(),
        raw_bits,
        zero_bits: Integers::Constant(0),
        tables,
        table_of_run,
    })
}

#[cfg(test)]
mod tests {
    use super::quantized::COEFFICIENT_RANGE;
    use super::*;
    use crate::codec::quantizer::SCALE_RANGE;
    use crate::format::part::{QuantizerInfo, StoredVectors};
    use crate::format::table::Table;

    /// What a keyframe part of eight elements with this quantizer is refused for, if it is.
    fn refusal(step: f32, scales: Option<i32>, mean: Option<(f32, i32)>) -> Option<String> {
        let tensor =
            TensorInfo { name: "weight".into(), dtype: Dtype::F32, shape: vec![8], offset_bytes: 0, length_bytes: 32 };
        let streams = SymbolStreams {
            run_elements: 8,
            runs_per_strip: 1,
            lanes: 1,
            tables: vec![0],
            table_of_run: StoredIntegers::default(),
            strip_words: integers::encode(&[0]),
            strip_exceptions: integers::encode(&[0]),
        };
        let info = QuantizerInfo {
            step,
            raw_bits: 0,
            trellis: None,
            vectors: None,
            scales: scales.map(|scale| integers::encode(&[scale])),
            means: mean.map(|(step, mean)| (step, integers::encode(&[mean]))),
            prediction: None,
        };
        let header = PartHeader {
            coding: Coding::Quantized(info),
            streams: Some(streams),
            strip_crcs: vec![0],
            cost: crate::format::part::PartHeaderBytes::default(),
        };
        let table = Table { codes: vec![0, 1], frequencies: vec![2048; 2], point_offsets: vec![] };
        let tables = [Arc::new(CodingTable::new(table))];
        let pools = Pools { tables: &tables, ..Pools::default() };
        PreparedPart::new(&tensor, &header, pools, None).err().map(|error| error.to_string())
    }

    #[test]
    fn a_step_or_a_mean_that_overflows_is_an_error() {
        assert_eq!(refusal(1e38, Some(8), Some((1e30, 1 << 24))), None);
        let error = refusal(1e38, Some(16), None).expect("infinite");
        assert!(error.starts_with("scales: found 16 on a step of"), "{error}");
        let error = refusal(1.0, None, Some((-1e32, 1 << 24))).expect("infinite");
        assert!(error.starts_with("means: found 16777216 to 16777216 times -"), "{error}");
    }

    #[test]
    fn codebooks_that_are_missing_or_of_different_lengths_are_errors() {
        let tensor =
            TensorInfo { name: "weight".into(), dtype: Dtype::F32, shape: vec![8], offset_bytes: 0, length_bytes: 32 };
        let codebooks = [2, 2, 3].map(|elements| Arc::new(Codebook::new(elements, &vec![0.5; 4 * elements])));
        let refusal = |vectors: [u16; 2]| {
            let info = QuantizerInfo {
                step: 1.0,
                raw_bits: 0,
                trellis: None,
                vectors: Some(StoredVectors { codebooks: vectors }),
                scales: None,
                means: None,
                prediction: None,
            };
            let streams = SymbolStreams { run_elements: 8, runs_per_strip: 1, ..SymbolStreams::default() };
            let header = PartHeader {
                coding: Coding::Quantized(info),
                streams: Some(streams),
                strip_crcs: vec![0],
                cost: crate::format::part::PartHeaderBytes::default(),
            };
            let pools = Pools { codebooks: &codebooks, ..Pools::default() };
            let prepared = PreparedPart::new(&tensor, &header, pools, None);
            prepared.map(|part| part.body_bytes()).map_err(|error| error.to_string())
        };
        assert_eq!(refusal([0, 1]), Ok(2), "four vectors of two indices of two bits");
        assert!(refusal([0, 3]).expect_err("there are three").contains("less than 3"));
        assert!(refusal([1, 2]).expect_err("two and three").contains("codewords of 3 elements"));
    }

    #[test]
    fn coefficients_beyond_their_range_are_errors() {
        assert!(refusal(1.0, Some(SCALE_RANGE.1 + 1), None).is_some());
        assert!(refusal(1.0, Some(SCALE_RANGE.0 - 1), None).is_some());
        assert!(refusal(1.0, None, Some((1.0, COEFFICIENT_RANGE.1 + 1))).is_some());
    }
}
