//! Raw bits joined to the magnitudes of split elements, 32 at a time.

use core::arch::x86_64::*;

use crate::decode::cpu::kernels::StoredRaw;

/// Where the raw bits of a run lie and where they go, alike in all strips.
///
/// An element's upper word has the sign, the upper magnitude bits of its symbol, and the upper raw bits; its lower word, where
/// it has one, two whole planes of raw bytes.
pub struct Joining {
    symbols: usize,
    /// Byte planes of the lower word.
    lower_planes: usize,
    /// Whether the upper word has a byte plane.
    has_byte_plane: bool,
    /// Bit planes.
    bits: usize,
    /// The upper word's raw bits but the highest, which is the sign.
    low_mask: __m512i,
    /// From the highest raw bit to the sign.
    to_sign: __m128i,
}

impl Joining {
    /// For a run of so many symbols with raw bits like these, 1 to 15 of an upper word.
    ///
    /// # Safety
    /// The CPU has AVX-512 F and BW, here and below, AVX2, VBMI and GFNI.
    #[inline(always)]
    pub unsafe fn new<const WIDE: bool>(raw: StoredRaw<'_>, symbols: usize) -> Self {
        let lower_planes = if WIDE { 2 } else { 0 };
        let upper_bits = raw.bits.saturating_sub(8 * lower_planes).clamp(1, 15);
        // SAFETY: nothing but arithmetic.
        unsafe {
            Self {
                symbols,
                lower_planes: lower_planes as usize,
                has_byte_plane: upper_bits >= 8,
                bits: upper_bits as usize % 8,
                low_mask: _mm512_set1_epi16((1 << (upper_bits - 1)) - 1),
                to_sign: _mm_cvtsi32_si128(16 - upper_bits as i32),
            }
        }
    }

    /// The byte plane `plane` of 32 symbols, a word each.
    #[inline(always)]
    unsafe fn byte_plane(&self, raw: *const u8, plane: usize, first: usize) -> __m512i {
        // SAFETY: the plane has a byte for each of the run's symbols.
        unsafe { _mm512_cvtepu8_epi16(_mm256_loadu_si256(raw.add(plane * self.symbols + first).cast())) }
    }

    /// The raw bits of the upper words of 32 symbols.
    #[inline(always)]
    unsafe fn upper(&self, raw: *const u8, first: usize) -> __m512i {
        // SAFETY: planes have a bit or byte for each of the run's symbols, and no more is loaded.
        unsafe {
            let mut upper = _mm512_setzero_si512();
            if self.has_byte_plane {
                upper = self.byte_plane(raw, self.lower_planes, first);
            }
            if self.bits > 0 {
                let byte_planes = self.lower_planes + usize::from(self.has_byte_plane);
                let planes = raw.add(byte_planes * self.symbols + first / 8 * self.bits);
                let words = _mm256_maskz_loadu_epi32((1 << self.bits) - 1, planes.cast());
                // Byte g of all planes, the highest first, are a matrix of bits with a column for each of eight symbols:
                // times the unit vectors, it is a byte for each.
                let matrices = _mm256_permutexvar_epi8(_mm256_load_si256(MATRICES.0.as_ptr().cast()), words);
                let units = _mm256_set1_epi64x(i64::from_le_bytes([1, 2, 4, 8, 16, 32, 64, 128]));
                let bits = _mm512_cvtepu8_epi16(_mm256_gf2p8affine_epi64_epi8::<0>(units, matrices));
                upper = if self.has_byte_plane { _mm512_or_si512(upper, _mm512_slli_epi16::<8>(bits)) } else { bits };
            }
            upper
        }
    }

    /// Joins the raw bits of 32 symbols, the run's from number `first` on, to the upper words of their magnitudes.
    ///
    /// # Safety
    /// `raw` points to the run's raw bits, which has 32 symbols from `first` on, a multiple of 32.
    #[inline(always)]
    pub unsafe fn join_upper(&self, magnitude: __m512i, raw: *const u8, first: usize) -> __m512i {
        const OR_OF_AND: i32 = 0b1111_1000; // first | second & third
        // SAFETY: passed on.
        unsafe {
            let raw = self.upper(raw, first);
            let element = _mm512_ternarylogic_epi32::<OR_OF_AND>(magnitude, raw, self.low_mask);
            let signs = _mm512_sll_epi16(raw, self.to_sign);
            _mm512_ternarylogic_epi32::<OR_OF_AND>(element, signs, _mm512_set1_epi16(i16::MIN))
        }
    }

    /// Joins the raw bits of 32 symbols to the lower words of their magnitudes.
    ///
    /// # Safety
    /// As of [`Self::join_upper`].
    #[inline(always)]
    pub unsafe fn join_lower(&self, magnitude: __m512i, raw: *const u8, first: usize) -> __m512i {
        const OR: i32 = 0b1111_1110; // of three
        // SAFETY: passed on.
        unsafe {
            let (lower, upper) = (self.byte_plane(raw, 0, first), self.byte_plane(raw, 1, first));
            _mm512_ternarylogic_epi32::<OR>(magnitude, lower, _mm512_slli_epi16::<8>(upper))
        }
    }
}

/// The permutation of the bytes of eight 32-bit words that gathers their first bytes, the last word's first, then their
/// second bytes, and so on.
static MATRICES: Bytes = Bytes(matrices());

#[repr(align(32))]
struct Bytes([u8; 32]);

const fn matrices() -> [u8; 32] {
    let mut index = [0; 32];
    let mut byte = 0;
    while byte < 32 {
        index[byte] = (4 * (7 - byte % 8) + byte / 8) as u8;
        byte += 1;
    }
    index
}
