//! Entropy decoding with AVX-512 VBMI2: the 32 lanes of a strip are the 32 words of a register.
//!
//! A 32-bit state is two words in two registers. A step looks up the bucket's first position (`vpermi2b`), compares twice
//! to find the position, looks up its first slot, frequency and value (`vpermi2w`), multiplies in two halves, and hands
//! each lane that ran low the next word (`vpexpandw`). The lookups depend on one another, so several strips run in lockstep.

use core::arch::x86_64::*;

use super::kernels::{RunJob, RunValues, Words};
use crate::codec::entropy::{CodingTable, DecodingTable, PADDED};
use crate::format::strip::LANES;

/// Strips in lockstep. More hide no more latency and spill registers.
pub const STRIPS: usize = 4;

const ONE_TABLE: usize = 0;
const TRELLIS_TABLES: usize = 2;

/// Symbols to 16 bits.
///
/// # Safety
/// The CPU has AVX-512 F, BW, VL, VBMI and VBMI2.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vbmi,avx512vbmi2,avx2,bmi1,bmi2,popcnt")]
pub unsafe fn narrow<const TABLE_USE: usize>(jobs: &mut [RunJob<'_, [u8; 2]>]) {
    // SAFETY: the caller vouches for the instructions.
    unsafe { in_groups::<TABLE_USE, false, _>(jobs) }
}

/// Symbols to 32 bits.
///
/// # Safety
/// The CPU has AVX-512 F, BW, VL, VBMI and VBMI2.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vbmi,avx512vbmi2,avx2,bmi1,bmi2,popcnt")]
pub unsafe fn wide<const TABLE_USE: usize>(jobs: &mut [RunJob<'_, [u8; 4]>]) {
    // SAFETY: the caller vouches for the instructions.
    unsafe { in_groups::<TABLE_USE, true, _>(jobs) }
}

/// `O` has four bytes where `WIDE`, else two.
#[inline(always)]
unsafe fn in_groups<const TABLE_USE: usize, const WIDE: bool, O>(jobs: &mut [RunJob<'_, O>]) {
    const { assert!(size_of::<O>() == if WIDE { 4 } else { 2 }) };
    let symbols = jobs.first().map_or(0, |job| job.out.len());
    assert!(jobs.iter().all(|job| job.out.len() == symbols), "runs in lockstep are equally long");
    // SAFETY: every run has room for `symbols` values.
    unsafe {
        for group in jobs.chunks_mut(STRIPS) {
            match group.len() {
                1 => lockstep::<1, TABLE_USE, WIDE, O>(group, symbols),
                2 => lockstep::<2, TABLE_USE, WIDE, O>(group, symbols),
                3 => lockstep::<3, TABLE_USE, WIDE, O>(group, symbols),
                _ => lockstep::<4, TABLE_USE, WIDE, O>(group, symbols),
            }
        }
    }
}

/// The first `N` jobs, 1 to 4.
#[inline(always)]
unsafe fn lockstep<const N: usize, const TABLE_USE: usize, const WIDE: bool, O>(
    jobs: &mut [RunJob<'_, O>],
    symbols: usize,
) {
    // Four variables, used or not: LLVM keeps the states of an array in memory.
    // SAFETY: a step writes 32 values, or as many as the mask has bits, and there are `symbols` in all.
    unsafe {
        let mut a = Strip::start(&mut jobs[0]);
        let mut b = Strip::start(&mut jobs[1.min(N - 1)]);
        let mut c = Strip::start(&mut jobs[2.min(N - 1)]);
        let mut d = Strip::start(&mut jobs[3.min(N - 1)]);
        for vector in 0..symbols / LANES {
            let offset = size_of::<O>() * LANES * vector;
            a.step::<TABLE_USE, WIDE, false>(offset, !0);
            if N > 1 {
                b.step::<TABLE_USE, WIDE, false>(offset, !0);
            }
            if N > 2 {
                c.step::<TABLE_USE, WIDE, false>(offset, !0);
            }
            if N > 3 {
                d.step::<TABLE_USE, WIDE, false>(offset, !0);
            }
        }
        let rest = symbols % LANES;
        if rest > 0 {
            let (offset, lanes) = (size_of::<O>() * (symbols - rest), (1 << rest) - 1);
            a.step::<TABLE_USE, WIDE, true>(offset, lanes);
            if N > 1 {
                b.step::<TABLE_USE, WIDE, true>(offset, lanes);
            }
            if N > 2 {
                c.step::<TABLE_USE, WIDE, true>(offset, lanes);
            }
            if N > 3 {
                d.step::<TABLE_USE, WIDE, true>(offset, lanes);
            }
        }
        a.store(&mut jobs[0]);
        if N > 1 {
            b.store(&mut jobs[1]);
        }
        if N > 2 {
            c.store(&mut jobs[2]);
        }
        if N > 3 {
            d.store(&mut jobs[3]);
        }
    }
}

/// One strip in registers.
struct Strip<'a> {
    low: __m512i,
    high: __m512i,
    trellis: __m512i,
    from_second: __m512i,
    from_odd: __m512i,
    used: usize,
    words: Words<'a>,
    tables: [&'a DecodingTable; 2],
    values: &'a RunValues,
    out: *mut u8,
}

impl<'a> Strip<'a> {
    #[inline(always)]
    unsafe fn start<O>(job: &mut RunJob<'a, O>) -> Self {
        // SAFETY: the arrays are a register long.
        unsafe {
            Self {
                low: _mm512_loadu_si512(job.lanes.low.as_ptr().cast()),
                high: _mm512_loadu_si512(job.lanes.high.as_ptr().cast()),
                trellis: _mm512_loadu_si512(job.lanes.trellis.as_ptr().cast()),
                from_second: _mm512_set1_epi16(job.trellis.from_second as i16),
                from_odd: _mm512_set1_epi16(job.trellis.from_odd as i16),
                used: job.lanes.used,
                words: job.words,
                tables: job.tables.map(CodingTable::decoding),
                values: job.values,
                out: job.out.as_mut_ptr().cast(),
            }
        }
    }

    #[inline(always)]
    unsafe fn store<O>(self, job: &mut RunJob<'_, O>) {
        // SAFETY: the arrays are a register long.
        unsafe {
            _mm512_storeu_si512(job.lanes.low.as_mut_ptr().cast(), self.low);
            _mm512_storeu_si512(job.lanes.high.as_mut_ptr().cast(), self.high);
            _mm512_storeu_si512(job.lanes.trellis.as_mut_ptr().cast(), self.trellis);
        }
        job.lanes.used = self.used;
    }

    /// Decodes a symbol of each lane in `lanes` and writes its values `offset` bytes into the output, which has room.
    #[inline(always)]
    unsafe fn step<const TABLE_USE: usize, const WIDE: bool, const MASKED: bool>(
        &mut self,
        offset: usize,
        lanes: __mmask32,
    ) {
        // SAFETY: tables are two registers of words each, `Words::pointer` has a register behind it, and what is stored
        // is what the caller has room for.
        unsafe {
            let one = _mm512_set1_epi16(1);
            let second_quantizer = match TABLE_USE {
                ONE_TABLE => 0,
                _ => _mm512_test_epi16_mask(self.trellis, one),
            };
            let [a, b] = self.tables;
            let look_up = |of_a: &[u16; PADDED], of_b: &[u16; PADDED], index: __m512i| match TABLE_USE {
                TRELLIS_TABLES => look_up_either(of_a, of_b, second_quantizer, index),
                _ => look_up_word(of_a, index),
            };

            // The table position of each slot. Bucket numbers leave the upper bytes 0, and so does `first`, which starts
            // with position 0.
            let slot = _mm512_and_si512(self.low, _mm512_set1_epi16(0xfff));
            let bucket = _mm512_srli_epi16::<5>(slot);
            let mut position = look_up_byte(&a.first, bucket);
            if TABLE_USE == TRELLIS_TABLES {
                position = _mm512_mask_mov_epi16(position, second_quantizer, look_up_byte(&b.first, bucket));
            }
            let after_next = look_up(&a.after_next, &b.after_next, position);
            let is_after_next = _mm512_cmpge_epu16_mask(slot, after_next);
            position = _mm512_mask_add_epi16(position, is_after_next, position, _mm512_set1_epi16(2));
            let is_next = _mm512_cmpge_epu16_mask(slot, look_up(&a.next, &b.next, position));
            position = _mm512_mask_add_epi16(position, is_next, position, one);

            // state = (state >> 12) * frequency + slot - start, in halves; the product's upper half does not overflow.
            let frequency = look_up(&a.frequency, &b.frequency, position);
            let within = _mm512_sub_epi16(slot, look_up(&a.start, &b.start, position));
            let quotient_low = _mm512_shldi_epi16::<4>(self.high, self.low);
            let quotient_high = _mm512_srli_epi16::<12>(self.high);
            let product_high = _mm512_add_epi16(
                _mm512_mulhi_epu16(quotient_low, frequency),
                _mm512_mullo_epi16(quotient_high, frequency),
            );
            let low = _mm512_add_epi16(_mm512_mullo_epi16(quotient_low, frequency), within);
            let carry = _mm512_cmplt_epu16_mask(low, within);
            let high = _mm512_mask_add_epi16(product_high, carry, product_high, one);

            // A lane whose upper half is 0 moves up and takes the next word.
            let mut refill = _mm512_testn_epi16_mask(high, high);
            if MASKED {
                refill &= lanes;
            }
            let words = load_next_words(self.words.pointer(self.used));
            let refilled_high = _mm512_mask_mov_epi16(high, refill, low);
            let refilled_low = _mm512_mask_expand_epi16(low, refill, words);
            self.used += refill.count_ones() as usize;
            if MASKED {
                self.high = _mm512_mask_mov_epi16(self.high, lanes, refilled_high);
                self.low = _mm512_mask_mov_epi16(self.low, lanes, refilled_low);
            } else {
                self.high = refilled_high;
                self.low = refilled_low;
            }

            let value = |values: &[[u16; PADDED]; 2]| match TABLE_USE {
                ONE_TABLE => look_up_word(&values[0], position),
                _ => look_up_either(&values[0], &values[1], second_quantizer, position),
            };
            let low = value(&self.values.low);
            let out = self.out.add(offset);
            if WIDE {
                let high = value(&self.values.high);
                let first_half = _mm512_permutex2var_epi16(low, INTERLEAVE[0].load(), high);
                let second_half = _mm512_permutex2var_epi16(low, INTERLEAVE[1].load(), high);
                if MASKED {
                    _mm512_mask_storeu_epi32(out.cast(), lanes as __mmask16, first_half);
                    _mm512_mask_storeu_epi32(out.add(64).cast(), (lanes >> 16) as __mmask16, second_half);
                } else {
                    _mm512_storeu_si512(out.cast(), first_half);
                    _mm512_storeu_si512(out.add(64).cast(), second_half);
                }
            } else if MASKED {
                _mm512_mask_storeu_epi16(out.cast(), lanes, low);
            } else {
                _mm512_storeu_si512(out.cast(), low);
            }

            if TABLE_USE != ONE_TABLE {
                // As `Trellis::next_state` has it: state >> 1 ^ odd & from_odd, and from_second under its mask.
                let odd = look_up(&a.odd, &b.odd, position);
                const XOR_OF_AND: i32 = 0b0111_1000; // first ^ second & third
                let next =
                    _mm512_ternarylogic_epi32::<XOR_OF_AND>(_mm512_srli_epi16::<1>(self.trellis), odd, self.from_odd);
                let leaps = _mm512_maskz_mov_epi16(second_quantizer, self.from_second);
                let next = _mm512_xor_si512(next, leaps);
                self.trellis = if MASKED { _mm512_mask_mov_epi16(self.trellis, lanes, next) } else { next };
            }
        }
    }
}

/// A register of words.
///
/// Not an intrinsic, which LLVM would fold into the expansion: that form costs Zen several times the two instructions.
#[inline]
#[target_feature(enable = "avx512f")]
unsafe fn load_next_words(pointer: *const u8) -> __m512i {
    let words;
    // SAFETY: the caller has 64 bytes to read there.
    unsafe {
        core::arch::asm!(
            "vmovdqu64 {words}, [{pointer}]",
            words = out(zmm_reg) words,
            pointer = in(reg) pointer,
            options(pure, readonly, nostack, preserves_flags),
        );
    }
    words
}

/// `table[index]` in each word; upper bytes of the index are 0, and so is `table[0]`.
#[inline(always)]
unsafe fn look_up_byte(table: &[u8; 128], index: __m512i) -> __m512i {
    // SAFETY: the table is two registers long.
    unsafe {
        let (first, second) = (table.as_ptr(), table.as_ptr().add(64));
        _mm512_permutex2var_epi8(_mm512_loadu_si512(first.cast()), index, _mm512_loadu_si512(second.cast()))
    }
}

/// `table[index % 64]` in each word.
#[inline(always)]
unsafe fn look_up_word(table: &[u16; PADDED], index: __m512i) -> __m512i {
    // SAFETY: the table is two registers long.
    unsafe {
        let (first, second) = (table.as_ptr(), table.as_ptr().add(32));
        _mm512_permutex2var_epi16(_mm512_loadu_si512(first.cast()), index, _mm512_loadu_si512(second.cast()))
    }
}

/// `b[index % 64]` where `take_b`, else `a[index % 64]`.
#[inline(always)]
unsafe fn look_up_either(a: &[u16; PADDED], b: &[u16; PADDED], take_b: __mmask32, index: __m512i) -> __m512i {
    // SAFETY: passed on.
    unsafe { _mm512_mask_mov_epi16(look_up_word(a, index), take_b, look_up_word(b, index)) }
}

/// The permutations of two registers that interleave their words: the first halves, the second halves.
static INTERLEAVE: [Permutation; 2] = [interleave(0), interleave(16)];

/// Indices of a permutation of two registers of words.
#[repr(align(64))]
struct Permutation([u16; 32]);

const fn interleave(first: u16) -> Permutation {
    let mut index = [0; 32];
    let mut word = 0;
    while word < 32 {
        index[word] = first + word as u16 / 2 + 32 * (word as u16 % 2);
        word += 1;
    }
    Permutation(index)
}

impl Permutation {
    #[inline(always)]
    unsafe fn load(&self) -> __m512i {
        // SAFETY: the indices are a register.
        unsafe { _mm512_load_si512(self.0.as_ptr().cast()) }
    }
}
