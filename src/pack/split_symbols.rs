//! Bit-exact elements as symbols, see `codec::lossless`.

use std::ops::Range;

use rayon::prelude::*;

use super::entropy_model::{FittedTable, StreamKind};
use super::histogram::Histogram;
use super::symbols::{Placed, RunLayout, Symbols};
use crate::codec::integers;
use crate::codec::lossless::{narrow, split_element};
use crate::format::part::{Carrier, Coding};

/// Symbols of a bit-exact part, which say how its header describes them.
pub trait ExactSymbols: Symbols {
    /// What the part's header says.
    fn coding(&self) -> Coding;
}

/// Bit-exact elements, taken apart.
pub struct SplitSymbols<'a> {
    /// The tensor's bytes.
    bytes: &'a [u8],
    /// Bytes of one element.
    element_bytes: usize,
    layout: RunLayout,
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
        let zeros_of_run = |run| symbols.bits_in_use(run).trailing_zeros().min(raw_bits - 1) as u8;
        let zero_bits: Vec<u8> = (0..layout.runs()).into_par_iter().map(zeros_of_run).collect();
        if zero_bits.iter().any(|&zeros| zeros > 0) {
            symbols.zero_bits = zero_bits;
        }
        symbols
    }

    /// The bits that are set in any carrier element of a run.
    fn bits_in_use(&self, run: usize) -> u64 {
        let elements = self.layout.run_range(run);
        match (self.carrier, self.element_bytes) {
            // Most tensors by far; a plain loop over a slice becomes vector instructions.
            (Carrier::Own, 2) => {
                let bytes = &self.bytes[2 * elements.start..2 * elements.end];
                bytes.as_chunks().0.iter().fold(0, |bits, &bytes| bits | u16::from_le_bytes(bytes)).into()
            }
            _ => {
                let mut bits = 0;
                self.for_each(elements, |element| bits |= element);
                bits
            }
        }
    }

    /// Gives the carrier elements of consecutive tensor elements.
    #[inline(always)]
    fn for_each(&self, elements: Range<usize>, mut take: impl FnMut(u64)) {
        let carrier = self.carrier;
        let mut take = |element: u64| {
            take(narrow(carrier, element).expect("the carrier was chosen because it holds every element"));
        };
        let bytes = &self.bytes[elements.start * self.element_bytes..elements.end * self.element_bytes];
        match self.element_bytes {
            1 => bytes.iter().for_each(|&byte| take(byte.into())),
            2 => bytes.as_chunks().0.iter().for_each(|&bytes| take(u16::from_le_bytes(bytes).into())),
            4 => bytes.as_chunks().0.iter().for_each(|&bytes| take(u32::from_le_bytes(bytes).into())),
            _ => bytes.as_chunks().0.iter().for_each(|&bytes| take(u64::from_le_bytes(bytes))),
        }
    }
}

impl ExactSymbols for SplitSymbols<'_> {
    fn coding(&self) -> Coding {
        let zero_bits: Vec<i32> = self.zero_bits.iter().copied().map(i32::from).collect();
        Coding::Split {
            carrier: self.carrier,
            raw_bits: self.raw_bits as u8,
            zero_bits: (!zero_bits.is_empty()).then(|| integers::encode(&zero_bits)),
        }
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

    fn nearest(&self, run: usize, symbols: &mut Vec<i32>) {
        let (width, raw_bits) = (self.carrier_bits, self.raw_bits);
        self.for_each(self.layout.run_range(run), |element| {
            symbols.push(split_element(element, width, raw_bits).0 as i32);
        });
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

    fn place(&self, runs: Range<usize>, tables: &[[&FittedTable; 2]]) -> Placed {
        let mut placed = Placed::default();
        let value_bytes = self.carrier_bits as usize / 8;
        for (run, [table, _]) in runs.zip(tables) {
            self.for_each(self.layout.run_range(run), |element| {
                let (symbol, raw) = split_element(element, self.carrier_bits, self.raw_bits);
                let symbol = symbol as i32;
                placed.positions.push(match table.position(symbol) {
                    Some(position) => position,
                    None => {
                        let value = element.to_le_bytes()[..value_bytes].to_vec();
                        placed.exceptions.push((placed.symbols.len() as u16, value));
                        table.filler()
                    }
                });
                placed.symbols.push(symbol);
                placed.raw.push(raw);
            });
        }
        placed
    }
}
