//! The symbols of a part: how they are grouped, which tables they use, what lies below them raw.

use std::sync::Arc;

use super::{decode_integers, inconsistent};
use crate::codec::entropy::CodingTable;
use crate::codec::integers::Integers;
use crate::codec::vector_quantizer::VectorQuantizer;
use crate::decode::DecodeError;
use crate::format::part::SymbolStreams;
use crate::format::strip::raw_bytes_of_run;

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
    pub(super) zero_bits: Integers,
    pub(super) tables: Vec<Arc<CodingTable>>,
    pub(super) table_of_run: Integers,
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
    pub(super) fn raw_bytes_of_strip(&self, strip: usize, symbols: usize) -> usize {
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
    pub(super) fn of_vectors(streams: &SymbolStreams) -> Self {
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
    pub(super) fn vector_bytes_of_strip(&self, vectors: &VectorQuantizer, elements: usize) -> usize {
        let (runs, rest) = (elements / self.run_elements, elements % self.run_elements);
        runs * vectors.bytes_of_run(self.run_elements) + vectors.bytes_of_run(rest)
    }

    /// The two tables of a run whose table number stands for a pair.
    pub fn table_pair_of_run(&self, run: usize) -> [&CodingTable; 2] {
        let first = 2 * self.table_of_run.get(run) as usize;
        [&self.tables[first], &self.tables[first + 1]]
    }
}

/// The tables that a part names.
pub(super) fn tables_of(
    streams: &SymbolStreams,
    pool: &[Arc<CodingTable>],
) -> Result<Vec<Arc<CodingTable>>, DecodeError> {
    let table = |&number: &u16| {
        let table = pool.get(usize::from(number));
        table.cloned().ok_or_else(|| inconsistent("part table", number, format!("less than {}", pool.len())))
    };
    streams.tables.iter().map(table).collect()
}

/// Layout and tables of `runs` runs; `tables_per_number` is 2 where a table number stands for a pair.
pub(super) fn prepare_symbols(
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
