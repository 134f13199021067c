//! The raw bits of one run, collected from the strip's byte and bit planes.

use std::ops::Range;

use crate::format::strip::{LANES, StripLayout};

/// Symbols whose raw bits are collected at a time: they stay in the first-level cache.
pub const BLOCK: usize = 1024;

/// Where the raw bits of a run lie.
#[derive(Clone, Debug)]
pub struct RawBits<'a> {
    stored: &'a [u8],
    layout: StripLayout,
    symbols: Range<usize>,
    bit_words: &'a [[u8; 4]],
}

/// An integer that raw bits are collected in; bits that do not fit are dropped.
pub trait RawWord: Copy + Default {
    /// `bits << shift`.
    fn shifted(bits: u8, shift: usize) -> Self;
    /// Both.
    fn or(self, other: Self) -> Self;
}

macro_rules! raw_words {
    ($($word:ty)*) => { $(
        impl RawWord for $word {
            #[inline(always)]
            fn shifted(bits: u8, shift: usize) -> Self {
                <$word>::from(bits).checked_shl(shift as u32).unwrap_or(0)
            }

            #[inline(always)]
            fn or(self, other: Self) -> Self {
                self | other
            }
        }
    )* };
}
raw_words!(u16 u32 u64);

impl<'a> RawBits<'a> {
    /// The raw bits of run `run` of a strip, whose symbols are `symbols`.
    pub fn of_run(stored: &'a [u8], layout: StripLayout, run: usize, symbols: Range<usize>) -> Self {
        let words = stored[layout.bit_planes_range()].as_chunks().0;
        let words_of_full_run = layout.run_elements.div_ceil(LANES) * layout.bit_planes();
        let words_of_run = symbols.len().div_ceil(LANES) * layout.bit_planes();
        let bit_words = &words[run * words_of_full_run..][..words_of_run];
        Self { stored, layout, symbols, bit_words }
    }

    /// Raw bits per symbol.
    #[inline(always)]
    pub fn count(&self) -> u32 {
        self.layout.raw_bits as u32
    }

    /// The byte plane, where raw bits are exactly that.
    #[inline(always)]
    pub fn only_byte_plane(&self) -> Option<&'a [u8]> {
        (self.layout.raw_bits == 8).then(|| self.byte_plane(0))
    }

    #[inline(always)]
    fn byte_plane(&self, plane: usize) -> &'a [u8] {
        &self.stored[self.layout.byte_plane_range(plane)][self.symbols.clone()]
    }

    /// Gives the raw bits of all symbols in blocks, each with the number of its first symbol in the run.
    #[inline(always)]
    pub fn for_each_block<T: RawWord>(&self, mut take: impl FnMut(usize, &[T])) {
        let mut block = [T::default(); BLOCK];
        for start in (0..self.symbols.len()).step_by(BLOCK) {
            let block = &mut block[..BLOCK.min(self.symbols.len() - start)];
            self.collect(start, block);
            take(start, block);
        }
    }

    #[inline(always)]
    fn collect<T: RawWord>(&self, start: usize, block: &mut [T]) {
        block.fill(T::default());
        for plane in 0..self.layout.byte_planes() {
            for (raw, &byte) in block.iter_mut().zip(&self.byte_plane(plane)[start..]) {
                *raw = raw.or(T::shifted(byte, 8 * plane));
            }
        }
        let planes = self.layout.bit_planes();
        if planes == 0 {
            return;
        }
        let shift = 8 * self.layout.byte_planes();
        let words = self.bit_words[start / LANES * planes..].chunks_exact(planes);
        for (raw, words) in block.chunks_mut(LANES).zip(words) {
            let mut bits = [0_u8; LANES];
            for (plane, &word) in words.iter().enumerate() {
                let word = u32::from_le_bytes(word);
                for (lane, bits) in bits.iter_mut().enumerate() {
                    *bits |= ((word >> lane & 1) as u8) << plane;
                }
            }
            for (raw, bits) in raw.iter_mut().zip(bits) {
                *raw = raw.or(T::shifted(bits, shift));
            }
        }
    }
}
