//! The raw bits of one run, collected from the strip's byte and bit planes.

use std::ops::Range;

use crate::format::limits::RAW_BITS;
use crate::format::strip::{LANES, StripLayout};

/// For each byte, its bits as one byte each.
static BYTES_OF_BITS: [u64; 256] = bytes_of_bits();

const fn bytes_of_bits() -> [u64; 256] {
    let mut table = [0; 256];
    let mut byte = 0;
    while byte < 256 {
        let mut bit = 0;
        while bit < 8 {
            table[byte] |= (byte as u64 >> bit & 1) << (8 * bit);
            bit += 1;
        }
        byte += 1;
    }
    table
}

/// How bit planes become one byte per symbol.
pub trait Spread {
    /// Gathers bit `plane` of each of 32 symbols from the words of `planes`, fewer than 8: bit = lane.
    fn spread(planes: &[[u8; 4]], bits: &mut [u8; LANES]);
}

/// Any CPU: eight symbols of one plane are a table look-up.
#[derive(Debug)]
pub struct ByTable;

impl Spread for ByTable {
    #[inline(always)]
    fn spread(planes: &[[u8; 4]], bits: &mut [u8; LANES]) {
        let mut eights = [0_u64; LANES / 8];
        for (plane, word) in planes.iter().enumerate() {
            for (eight, &byte) in eights.iter_mut().zip(word) {
                *eight |= BYTES_OF_BITS[usize::from(byte)] << plane;
            }
        }
        for (bits, eight) in bits.as_chunks_mut().0.iter_mut().zip(eights) {
            *bits = eight.to_le_bytes();
        }
    }
}

/// AVX-512: a word of a plane is a mask. Used only by what is compiled for AVX-512 with BW and VL.
#[cfg(target_arch = "x86_64")]
#[derive(Debug)]
pub struct ByMask;

#[cfg(target_arch = "x86_64")]
impl Spread for ByMask {
    #[inline(always)]
    fn spread(planes: &[[u8; 4]], bits: &mut [u8; LANES]) {
        use core::arch::x86_64::*;
        // SAFETY: `bits` is 32 bytes long; only functions compiled for AVX-512 are given this type.
        unsafe {
            let mut sum = _mm256_setzero_si256();
            let mut value = _mm256_set1_epi8(1);
            for &word in planes {
                sum = _mm256_mask_add_epi8(sum, u32::from_le_bytes(word), sum, value);
                value = _mm256_add_epi8(value, value);
            }
            _mm256_storeu_si256(bits.as_mut_ptr().cast(), sum);
        }
    }
}

/// Where the raw bits of a run lie.
#[derive(Clone, Debug)]
pub struct RawBits<'a> {
    stored: &'a [u8],
    layout: StripLayout,
    symbols: Range<usize>,
    bit_words: &'a [[u8; 4]],
}

/// An integer wide enough for the raw bits of a symbol.
pub trait RawWord: Copy + Default {
    /// `bits << shift`; the shift is less than the integer is wide.
    fn shifted(bits: u8, shift: usize) -> Self;
    /// Both.
    fn or(self, other: Self) -> Self;
}

macro_rules! raw_words {
    ($($word:ty)*) => { $(
        impl RawWord for $word {
            #[inline(always)]
            fn shifted(bits: u8, shift: usize) -> Self {
                <$word>::from(bits).wrapping_shl(shift as u32)
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

    /// Gives the raw bits of all symbols, 32 at a time and the rest of the run, with the number of the first in the run.
    #[inline(always)]
    pub fn for_each_vector<S: Spread, T: RawWord>(&self, mut take: impl FnMut(usize, &[T])) {
        let byte_planes: [&[u8]; MOST_BYTE_PLANES] =
            std::array::from_fn(|plane| if plane < self.layout.byte_planes() { self.byte_plane(plane) } else { &[] });
        let byte_planes = &byte_planes[..self.layout.byte_planes()];
        let whole = self.symbols.len() / LANES * LANES;
        for first in (0..whole).step_by(LANES) {
            let mut raw = self.bits_of_vector::<S, T>(first);
            for (plane, bytes) in byte_planes.iter().enumerate() {
                let bytes: &[u8; LANES] = bytes[first..].first_chunk().expect("a whole vector is left");
                for (raw, &byte) in raw.iter_mut().zip(bytes) {
                    *raw = raw.or(T::shifted(byte, 8 * plane));
                }
            }
            take(first, &raw);
        }
        if whole < self.symbols.len() {
            let mut raw = self.bits_of_vector::<S, T>(whole);
            for (plane, bytes) in byte_planes.iter().enumerate() {
                for (raw, &byte) in raw.iter_mut().zip(&bytes[whole..]) {
                    *raw = raw.or(T::shifted(byte, 8 * plane));
                }
            }
            take(whole, &raw[..self.symbols.len() - whole]);
        }
    }

    /// The bits of the bit planes at their place above the byte planes.
    #[inline(always)]
    fn bits_of_vector<S: Spread, T: RawWord>(&self, first: usize) -> [T; LANES] {
        let planes = self.layout.bit_planes();
        if planes == 0 {
            return [T::default(); LANES];
        }
        let mut bits = [0; LANES];
        S::spread(&self.bit_words[first / LANES * planes..][..planes], &mut bits);
        bits.map(|bits| T::shifted(bits, 8 * self.layout.byte_planes()))
    }
}

const MOST_BYTE_PLANES: usize = RAW_BITS as usize / 8;
