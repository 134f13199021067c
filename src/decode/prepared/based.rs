//! Side information of parts that start from a base archive, decoded and checked.

use std::borrow::Cow;
use std::sync::Arc;

use super::strips::PreparedStrip;
use super::symbols::tables_of;
use super::{PartKind, PreparedPart, Symbols, decode_integers, inconsistent};
use crate::codec::difference::Classes;
use crate::codec::entropy::CodingTable;
use crate::codec::integers::Integers;
use crate::codec::low_rank::LowRank;
use crate::decode::DecodeError;
use crate::format::difference::{BaseTensor, BasedInfo, StoredDifference, StoredLowRank};
use crate::format::limits::{self, RAW_STRIP_BYTES};
use crate::format::part::SymbolStreams;
use crate::tensor::{Dtype, TensorInfo};

/// How a part starts from a tensor of a base archive.
#[derive(Debug)]
pub struct Based {
    /// Where its reference is. Elements that the reference does not have start from zero bytes.
    pub reference: BaseTensor,
    /// What is added to the reference.
    pub low_rank: Option<LowRank>,
    /// Absent where every element is its (changed) reference.
    pub difference: Option<Difference>,
}

/// The coded differences.
#[derive(Debug)]
pub struct Difference {
    /// The symbols, in coded order: class by class within a strip.
    pub symbols: Symbols,
    /// Low bits that no difference has.
    pub zero_bits: u32,
    /// Which elements are coded first.
    pub classes: Classes,
}

impl Based {
    /// Whether every element is the reference's.
    pub fn is_identical(&self) -> bool {
        self.low_rank.is_none() && self.difference.is_none()
    }
}

/// Decodes what a header says of a part that starts from a base, strips excepted.
pub(super) fn prepare_based(
    info: &BasedInfo,
    tensor: &TensorInfo,
    streams: Option<&SymbolStreams>,
    tables: &[Arc<CodingTable>],
) -> Result<PartKind, DecodeError> {
    let low_rank = match &info.low_rank {
        Some(stored) => Some(prepare_low_rank(stored, tensor)?),
        None => None,
    };
    let difference = match (&info.difference, streams) {
        (Some(stored), Some(streams)) => Some(prepare_difference(stored, tensor, streams, tables)?),
        _ => None,
    };
    Ok(PartKind::Based(Based { reference: info.reference, low_rank, difference }))
}

fn prepare_low_rank(stored: &StoredLowRank, tensor: &TensorInfo) -> Result<LowRank, DecodeError> {
    if !matches!(tensor.dtype, Dtype::F32 | Dtype::F16 | Dtype::BF16) {
        return Err(inconsistent("base flags", format!("a low-rank product for {}", tensor.dtype), "F32, F16 or BF16"));
    }
    let columns: u64 = tensor.shape.iter().skip(1).product();
    if tensor.shape.len() < 2 || tensor.elements() == 0 {
        return Err(inconsistent("base flags", format!("a low-rank product for {:?}", tensor.shape), "a matrix"));
    }
    let (rank, rows) = (u64::from(stored.rank), tensor.shape[0]);
    let factor = |field, stored, count| {
        let integers = decode_integers(field, stored, count, -limits::FACTOR, limits::FACTOR)?;
        if matches!(integers, Integers::Constant(_)) && count > limits::STRIP_SYMBOLS {
            return Err(inconsistent(field, format!("{count} times the same"), "different numbers"));
        }
        Ok((0..count as usize).map(|index| integers.get(index) as i16).collect::<Vec<i16>>())
    };
    if rank > rows.min(columns) {
        return Err(inconsistent("rank", rank, format!("at most {}", rows.min(columns))));
    }
    Ok(LowRank {
        rank: rank as usize,
        columns: columns as usize,
        scale: stored.scale,
        left: factor("left factor", &stored.left, rows * rank)?,
        right: factor("right factor", &stored.right, rank * columns)?,
    })
}

fn prepare_difference(
    stored: &StoredDifference,
    tensor: &TensorInfo,
    streams: &SymbolStreams,
    pool: &[Arc<CodingTable>],
) -> Result<Difference, DecodeError> {
    let bits = match tensor.dtype.bits() {
        Some(bits @ (8 | 16 | 32)) => bits as i32,
        _ => return Err(inconsistent("base flags", format!("differences of {}", tensor.dtype), "8, 16 or 32 bits")),
    };
    for (field, found) in [("common zero bits", stored.zero_bits), ("class shift", stored.class_shift)] {
        if i32::from(found) >= bits {
            return Err(inconsistent(field, found, format!("less than {bits}")));
        }
    }
    let elements = tensor.elements();
    let runs = elements.div_ceil(streams.run_elements.into());
    let tables = tables_of(streams, pool)?;
    if tables.is_empty() && runs > 0 {
        return Err(inconsistent("part tables", 0, "one table at least"));
    }
    let count = tables.len() as u64;
    let raw_bits = decode_integers("table raw bits", &stored.table_raw_bits, count, 0, bits)?;
    let most = raw_bits.range().map_or(0, |(_, most)| most);
    let table_of_run = match tables.len() {
        0 | 1 => Integers::Constant(0), // no choices are stored
        _ => table_after_steps(streams, runs, tables.len() as i32)?,
    };
    let unstored = |table: i32| most - raw_bits.get(table as usize);
    let zero_bits = match &table_of_run {
        _ if tables.is_empty() => Integers::Constant(0),
        Integers::Constant(table) => Integers::Constant(unstored(*table)),
        Integers::Each(numbers) => Integers::Each(numbers.iter().map(|&table| unstored(table)).collect()),
    };
    let class_rows = elements.div_ceil(stored.class_row.into());
    Ok(Difference {
        symbols: Symbols {
            run_elements: streams.run_elements as usize,
            runs_per_strip: streams.runs_per_strip as usize,
            lanes: streams.lanes.into(),
            raw_bits: most as u32,
            zero_bits,
            tables,
            table_of_run,
        },
        zero_bits: stored.zero_bits.into(),
        classes: Classes {
            shift: stored.class_shift.into(),
            row_elements: stored.class_row as usize,
            offsets: decode_integers("class offsets", &stored.class_offsets, class_rows, 0, i32::MAX)?,
        },
    })
}

/// The table of each run: each number is the one before it, 0 at first, plus a step.
fn table_after_steps(streams: &SymbolStreams, runs: u64, tables: i32) -> Result<Integers, DecodeError> {
    let steps = decode_integers("table of run", &streams.table_of_run, runs, 1 - tables, tables - 1)?;
    if steps == Integers::Constant(0) {
        return Ok(steps);
    }
    // A constant step other than 0 soon leaves the tables: it claims no more memory than they do.
    let (mut table, mut numbers) = (0, Vec::new());
    for run in 0..runs as usize {
        table += steps.get(run);
        if !(0..tables).contains(&table) {
            return Err(inconsistent("table of run", table, format!("0 to {}", tables - 1)));
        }
        numbers.push(table);
    }
    Ok(Integers::Each(numbers))
}

impl PreparedPart {
    /// Strips of a part without symbols: nothing is stored of them, and their length is that of raw ones.
    pub(super) fn prepare_unstored_strips(&mut self) {
        let strips = self.length_bytes.div_ceil(RAW_STRIP_BYTES) as usize;
        let nothing = PreparedStrip { offset: 0, length: 0, crc: 0, words: 0, raw_bytes: 0, exceptions: 0 };
        self.strips = vec![nothing; strips];
    }
}

impl PreparedPart {
    /// What the elements of a strip start from: `reference`, the bytes of the base's elements from the strip's first one on,
    /// with the low-rank product added by `add`, which is [`LowRank::add`] or another compilation of it.
    pub fn predicted_strip<'r>(
        &self,
        strip: usize,
        reference: &'r [u8],
        add: impl FnOnce(&LowRank, &Dtype, usize, &mut [u8]),
    ) -> Cow<'r, [u8]> {
        let length = self.strip_output_bytes(strip);
        let reference = &reference[..length];
        let PartKind::Based(Based { low_rank: Some(low_rank), .. }) = &self.kind else { return reference.into() };
        let first = self.output_range(strip..strip + 1).start as usize / (self.symbol_bits / 8);
        let mut predicted = reference.to_vec();
        add(low_rank, &self.dtype, first, &mut predicted);
        predicted.into()
    }

    /// The reference of strip number `strip`, given that of strips that lie side by side from number `first` on: a part that
    /// starts from a base is decoded with the references of the strips that are wanted, any other with the whole tensor.
    pub fn reference_of<'r>(&self, strip: usize, first: usize, reference: Option<&'r [u8]>) -> Option<&'r [u8]> {
        match self.base {
            Some(_) => {
                reference.map(|reference| &reference[(strip - first) * self.full_strip_output_bytes() as usize..])
            }
            None => reference,
        }
    }
}
