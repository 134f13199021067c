//! The raw bits of one run as bytes: the strip's byte planes as they are, its bit planes gathered into one more.

use crate::format::limits::RAW_BITS;
use crate::format::strip::LANES;

/// Bytes that the raw bits of a symbol fill at most.
const MOST_PLANES: usize = RAW_BITS.div_ceil(8) as usize;

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

/// Gathers bit planes into one byte per symbol: `planes` words for each 32 symbols, bit = lane.
///
/// Safe to call where the CPU has the instructions of its level.
pub type Spread = unsafe fn(words: &[[u8; 4]], planes: usize, bytes: &mut [[u8; LANES]]);

/// [`Spread`] on any CPU: eight symbols of one plane are a table look-up.
///
/// # Safety
/// None needed: it is a safe function behind the type that kernels have.
pub unsafe fn spread_by_table(words: &[[u8; 4]], planes: usize, bytes: &mut [[u8; LANES]]) {
    let vectors = bytes.len().min(words.len() / planes);
    for vector in 0..vectors {
        let mut eights = [0_u64; LANES / 8];
        for (plane, word) in words[vector * planes..][..planes].iter().enumerate() {
            for (eight, &byte) in eights.iter_mut().zip(word) {
                *eight |= BYTES_OF_BITS[usize::from(byte)] << plane;
            }
        }
        for (bytes, eight) in bytes[vector].as_chunks_mut().0.iter_mut().zip(eights) {
            *bytes = eight.to_le_bytes();
        }
    }
}

/// [`Spread`] with AVX2: a word of a plane is broadcast, and each lane looks at its bit.
///
/// # Safety
/// The CPU has AVX2.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
pub unsafe fn spread_by_shuffle(words: &[[u8; 4]], planes: usize, bytes: &mut [[u8; LANES]]) {
    use core::arch::x86_64::*;
    // Four bytes of a word go to eight lanes each.
    let byte_of_lane = _mm256_setr_epi64x(0, 0x0101_0101_0101_0101, 0x0202_0202_0202_0202, 0x0303_0303_0303_0303);
    let bit_of_lane = _mm256_set1_epi64x(i64::from_le_bytes([1, 2, 4, 8, 16, 32, 64, 128]));
    let vectors = bytes.len().min(words.len() / planes);
    for vector in 0..vectors {
        let mut sum = _mm256_setzero_si256();
        let mut value = _mm256_set1_epi8(1);
        for &word in &words[vector * planes..][..planes] {
            let word = _mm256_shuffle_epi8(_mm256_set1_epi32(i32::from_le_bytes(word)), byte_of_lane);
            let is_set = _mm256_cmpeq_epi8(_mm256_and_si256(word, bit_of_lane), bit_of_lane);
            sum = _mm256_or_si256(sum, _mm256_and_si256(is_set, value));
            value = _mm256_add_epi8(value, value);
        }
        // SAFETY: 32 bytes are a register.
        unsafe { _mm256_storeu_si256(bytes[vector].as_mut_ptr().cast(), sum) }
    }
}

/// [`Spread`] with AVX-512: a word of a plane is a mask.
///
/// # Safety
/// The CPU has AVX-512 BW and VL.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx2")]
pub unsafe fn spread_by_mask(words: &[[u8; 4]], planes: usize, bytes: &mut [[u8; LANES]]) {
    match planes {
        1 => spread_masks::<1>(words, bytes),
        2 => spread_masks::<2>(words, bytes),
        3 => spread_masks::<3>(words, bytes),
        4 => spread_masks::<4>(words, bytes),
        5 => spread_masks::<5>(words, bytes),
        6 => spread_masks::<6>(words, bytes),
        _ => spread_masks::<7>(words, bytes),
    }
}

#[cfg(target_arch = "x86_64")]
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx2")]
fn spread_masks<const PLANES: usize>(words: &[[u8; 4]], bytes: &mut [[u8; LANES]]) {
    use core::arch::x86_64::*;
    let words = words.as_chunks::<PLANES>().0;
    for vector in 0..words.len().min(bytes.len()) {
        let mut sum = _mm256_setzero_si256();
        let mut value = _mm256_set1_epi8(1);
        for &word in &words[vector] {
            sum = _mm256_mask_add_epi8(sum, u32::from_le_bytes(word), sum, value);
            value = _mm256_add_epi8(value, value);
        }
        // SAFETY: 32 bytes are a register.
        unsafe { _mm256_storeu_si256(bytes[vector].as_mut_ptr().cast(), sum) }
    }
}

/// The raw bits of a run: bits 8p to 8p + 7 of every symbol are the bytes of plane p.
#[derive(Clone, Copy, Debug)]
pub struct RawBits<'a> {
    stored_bits: u32,
    zeros: u32,
    planes: [&'a [u8]; MOST_PLANES],
}

impl<'a> RawBits<'a> {
    /// The raw bits of a run of `symbols` symbols, whose planes are `stored`: `stored_bits` of each, and `zeros` below them
    /// that are not stored. Bits of bit planes are kept in `gathered`.
    pub fn of_run(
        stored: &'a [u8],
        symbols: usize,
        (stored_bits, zeros): (u32, u32),
        spread: Spread,
        gathered: &'a mut Vec<[u8; LANES]>,
    ) -> Self {
        let mut planes: [&[u8]; MOST_PLANES] = [&[]; MOST_PLANES];
        let (bytes, bits) = ((stored_bits / 8) as usize, (stored_bits % 8) as usize);
        let (byte_planes, bit_planes) = stored.split_at(bytes * symbols);
        for (plane, bytes) in planes.iter_mut().zip(byte_planes.chunks(symbols)) {
            *plane = bytes;
        }
        if bits > 0 {
            gathered.resize(symbols.div_ceil(LANES), [0; LANES]);
            // SAFETY: whoever chose the kernels made sure that the CPU has their instructions.
            unsafe { spread(bit_planes.as_chunks().0, bits, gathered) }
            planes[bytes] = &gathered.as_flattened()[..symbols];
        }
        Self { stored_bits, zeros, planes }
    }

    /// Those of the symbols from number `first` on.
    pub fn from(&self, first: usize) -> Self {
        let mut later = *self;
        let in_use = self.planes().len();
        later.planes[..in_use].iter_mut().for_each(|plane| *plane = &plane[first..]);
        later
    }

    /// Raw bits per symbol, those that are not stored included.
    #[inline(always)]
    pub fn count(&self) -> u32 {
        self.stored_bits + self.zeros
    }

    /// How many low raw bits are zero and in no plane.
    #[inline(always)]
    pub fn zeros(&self) -> u32 {
        self.zeros
    }

    /// One byte per symbol for each eight raw bits that are stored, begun or whole.
    #[inline(always)]
    pub fn planes(&self) -> &[&'a [u8]] {
        &self.planes[..self.stored_bits.div_ceil(8) as usize]
    }
}
