//! Trellis-coded codes with raw bits below them, dequantized: the states of all lanes are a register.
//!
//! Compilers do not find this: states go from vector to vector, and a loop over the lanes of one is too short for them.

use core::arch::x86_64::*;

use crate::codec::trellis::Trellis;
use crate::decode::cpu::finish;
use crate::decode::cpu::raw_bits::RawBits;
use crate::format::strip::LANES;

/// `finish::Kernels::dequantize_trellis` with AVX-512.
///
/// # Safety
/// The CPU has AVX-512 F, BW and VL.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx2")]
pub unsafe fn dequantize_trellis(
    codes: &[[u8; 2]],
    raw: &RawBits<'_>,
    (trellis, states): (Trellis, &mut [u16; LANES]),
    step: f32,
    mean: Option<f32>,
    residuals: &mut [[u8; 4]],
) {
    let [raw_bits] = *raw.planes() else { unreachable!("1 to 8 raw bits below codes") };
    let whole = residuals.len() / LANES * LANES;
    let (from_second, from_odd) =
        (_mm512_set1_epi16(trellis.from_second as i16), _mm512_set1_epi16(trellis.from_odd as i16));
    let count = _mm_cvtsi32_si128(raw.count() as i32);
    let steps = _mm512_set1_ps(step);
    // SAFETY: the states are a register, here and below.
    let mut state = unsafe { _mm512_loadu_si512(states.as_ptr().cast()) };
    let vectors = codes[..whole].as_chunks::<LANES>().0.iter().zip(raw_bits[..whole].as_chunks::<LANES>().0);
    for ((codes, raw_bits), residuals) in vectors.zip(residuals[..whole].as_chunks_mut::<LANES>().0) {
        // SAFETY: 32 words are a register, and 32 bytes half of one.
        let (codes, raw_bits) =
            unsafe { (_mm512_loadu_si512(codes.as_ptr().cast()), _mm256_loadu_si256(raw_bits.as_ptr().cast())) };
        let second_quantizer = _mm512_and_si512(state, _mm512_set1_epi16(1));
        for half in 0..2 {
            let (codes, raw_bits, second_quantizer) = match half {
                0 => (
                    _mm512_castsi512_si256(codes),
                    _mm256_castsi256_si128(raw_bits),
                    _mm512_castsi512_si256(second_quantizer),
                ),
                _ => (
                    _mm512_extracti64x4_epi64::<1>(codes),
                    _mm256_extracti128_si256::<1>(raw_bits),
                    _mm512_extracti64x4_epi64::<1>(second_quantizer),
                ),
            };
            // As `join_code` and `multiple` have it.
            let code = _mm512_sll_epi32(_mm512_cvtepi16_epi32(codes), count);
            let code = _mm512_or_si512(code, _mm512_cvtepu8_epi32(raw_bits));
            let multiple = _mm512_add_epi32(_mm512_add_epi32(code, code), _mm512_cvtepu16_epi32(second_quantizer));
            let mut value = _mm512_mul_ps(_mm512_cvtepi32_ps(multiple), steps);
            if let Some(mean) = mean {
                value = _mm512_add_ps(value, _mm512_set1_ps(mean));
            }
            // SAFETY: 32 residuals are two registers.
            unsafe { _mm512_storeu_ps(residuals[half * LANES / 2..].as_mut_ptr().cast(), value) };
        }
        // As `Trellis::next_state` has it. The lowest raw bit says whether a code is odd.
        let is_second = _mm512_test_epi16_mask(state, _mm512_set1_epi16(1));
        let is_odd = _mm256_test_epi8_mask(raw_bits, _mm256_set1_epi8(1));
        let leaps =
            _mm512_xor_si512(_mm512_maskz_mov_epi16(is_second, from_second), _mm512_maskz_mov_epi16(is_odd, from_odd));
        state = _mm512_xor_si512(_mm512_srli_epi16::<1>(state), leaps);
    }
    // SAFETY: see above.
    unsafe { _mm512_storeu_si512(states.as_mut_ptr().cast(), state) };
    if whole < residuals.len() {
        let (codes, raw, residuals) = (&codes[whole..], &raw.from(whole), &mut residuals[whole..]);
        finish::dequantize_trellis(codes, raw, (trellis, states), step, mean, residuals);
    }
}
