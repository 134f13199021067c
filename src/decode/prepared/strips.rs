//! The strips of a prepared part: where their bytes lie, and what they turn into.

use std::ops::Range;

use super::{PartKind, PreparedPart, decode_integers, inconsistent};
use crate::codec::integers::Integers;
use crate::decode::DecodeError;
use crate::format::bytes::crc32c;
use crate::format::limits;
use crate::format::part::SymbolStreams;
use crate::format::strip::StripLayout;

/// One strip of a prepared part.
#[derive(Clone, Copy, Debug)]
pub(super) struct PreparedStrip {
    /// First stored byte, counted from the first strip of the part.
    pub(super) offset: u64,
    /// Stored bytes.
    pub(super) length: u64,
    pub(super) crc: u32,
    pub(super) words: usize,
    pub(super) raw_bytes: usize,
    pub(super) exceptions: usize,
}

impl PreparedPart {
    pub(super) fn prepare_raw_strips(&mut self, crcs: &[u32]) -> Result<(), DecodeError> {
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

    pub(super) fn prepare_symbol_strips(
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

    /// Tensor bytes of consecutive strips.
    pub fn output_range(&self, strips: Range<usize>) -> Range<u64> {
        let full = self.full_strip_output_bytes();
        strips.start as u64 * full..(strips.end as u64 * full).min(self.length_bytes)
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
