//! How the symbols of a part are grouped, and what their strips need (SPEC.md section 4.1, *Streams*).

use super::bytes::{Reader, Writer};
use super::error::FormatError;
use super::limits;
use super::part::StoredIntegers;
use super::strip::LANES;

/// How symbols of a part are grouped, and what their strips need.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SymbolStreams {
    /// Elements of one run; the last may be shorter.
    pub run_elements: u32,
    /// Runs of one strip; the last may have fewer.
    pub runs_per_strip: u32,
    /// Lanes of a strip: a power of two, 32 at most.
    pub lanes: u8,
    /// Numbers of the entropy tables used.
    pub tables: Vec<u16>,
    /// Which of `tables` each run uses; empty where there is one table.
    pub table_of_run: StoredIntegers,
    /// 16-bit words of each strip.
    pub strip_words: StoredIntegers,
    /// Exceptions of each strip.
    pub strip_exceptions: StoredIntegers,
}

impl SymbolStreams {
    /// The streams, and where the entropy model's fields end in them.
    pub fn parse(reader: &mut Reader<'_>) -> Result<(Self, u64), FormatError> {
        let count = reader.count("part tables", limits::TABLES)?;
        let mut tables = Vec::with_capacity(count);
        for _ in 0..count {
            tables.push(reader.varint("part table", limits::TABLES - 1)? as u16);
        }
        let table_of_run = match count {
            0 | 1 => StoredIntegers::default(),
            _ => StoredIntegers::parse(reader, "table of run")?,
        };
        let entropy_end = reader.position();
        let (run_elements, runs_per_strip) = parse_layout(reader)?;
        let offset = reader.position();
        let lanes = reader.u8("lanes")?;
        if !lanes.is_power_of_two() || usize::from(lanes) > LANES {
            return Err(reader.invalid("lanes", offset, lanes, "1, 2, 4, 8, 16 or 32"));
        }
        let streams = Self {
            run_elements,
            runs_per_strip,
            lanes,
            tables,
            table_of_run,
            strip_words: StoredIntegers::parse(reader, "strip words")?,
            strip_exceptions: StoredIntegers::parse(reader, "strip exceptions")?,
        };
        Ok((streams, entropy_end))
    }

    /// The layout alone, which is all that indices of fixed length need.
    pub fn parse_layout(reader: &mut Reader<'_>) -> Result<Self, FormatError> {
        let (run_elements, runs_per_strip) = parse_layout(reader)?;
        Ok(Self { run_elements, runs_per_strip, ..Self::default() })
    }

    /// Writes the streams.
    pub fn write(&self, writer: &mut Writer) {
        writer.varint(self.tables.len() as u64);
        for &table in &self.tables {
            writer.varint(table.into());
        }
        if self.tables.len() > 1 {
            writer.blob(&self.table_of_run.0);
        }
        self.write_layout(writer);
        writer.u8(self.lanes);
        writer.blob(&self.strip_words.0);
        writer.blob(&self.strip_exceptions.0);
    }

    /// Writes the layout alone.
    pub fn write_layout(&self, writer: &mut Writer) {
        writer.varint(self.run_elements.into());
        writer.varint(self.runs_per_strip.into());
    }
}

/// *run elements* and *runs per strip*.
fn parse_layout(reader: &mut Reader<'_>) -> Result<(u32, u32), FormatError> {
    let offset = reader.position();
    let run_elements = reader.varint("run elements", limits::STRIP_SYMBOLS)?;
    let runs_per_strip = reader.varint("runs per strip", limits::STRIP_SYMBOLS)?;
    let symbols = run_elements * runs_per_strip;
    if !(1..=limits::STRIP_SYMBOLS).contains(&symbols) {
        let expected = format!("1 to {}", limits::STRIP_SYMBOLS);
        return Err(reader.invalid("runs per strip", offset, format!("{symbols} symbols a strip"), expected));
    }
    Ok((run_elements as u32, runs_per_strip as u32))
}
