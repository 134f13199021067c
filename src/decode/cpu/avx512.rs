//! Entropy decoding with AVX-512 VBMI2: the 32 lanes of a strip are the 32 words of a register.
//!
//! A 32-bit state is two words in two registers. A step looks up what its bucket begins with and the boundaries inside it
//! (`vpermi2b`), counts those passed to find the position, looks up its first slot, frequency and value (`vpermi2w`),
//! multiplies in two halves, and hands each lane that ran low the next word (`vpexpandw`). That takes some fifty cycles from
//! end to end and the hardware could do it in fifteen, so several strips run in lockstep. What is chosen here is chosen for
//! that: a comparison into a mask and back out of it takes eight cycles, a saturating subtraction two.

mod dequantize;
mod joining;

use core::arch::x86_64::*;

use self::joining::Joining;
use super::kernels::{RunJob, RunValues, Words};
use crate::codec::entropy::{CodingTable, DecodingTable, PADDED};
use crate::format::strip::{LANES, raw_bytes_of_run};

pub use dequantize::dequantize_trellis;

/// Strips in lockstep. More gain a twentieth, and leave groups of two over where four go evenly.
pub const STRIPS: usize = 4;

const ONE_TABLE: usize = 0;
const TRELLIS_TABLES: usize = 2;

/// Positions of a table that fills one register instead of two.
const FEW: usize = PADDED / 2;

/// Symbols to 16 bits.
///
/// # Safety
/// The CPU has AVX-512 F, BW, VL, VBMI, VBMI2 and GFNI.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vbmi,avx512vbmi2,gfni,avx2,bmi1,bmi2,popcnt")]
pub unsafe fn narrow<const TABLE_USE: usize>(jobs: &mut [RunJob<'_, [u8; 2]>]) {
    // SAFETY: the caller vouches for the instructions.
    unsafe { by_positions::<TABLE_USE, false, false, _>(jobs) }
}

/// Symbols to 32 bits.
///
/// # Safety
/// The CPU has AVX-512 F, BW, VL, VBMI, VBMI2 and GFNI.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vbmi,avx512vbmi2,gfni,avx2,bmi1,bmi2,popcnt")]
pub unsafe fn wide<const TABLE_USE: usize>(jobs: &mut [RunJob<'_, [u8; 4]>]) {
    // SAFETY: the caller vouches for the instructions.
    unsafe { by_positions::<TABLE_USE, true, false, _>(jobs) }
}

/// Symbols and raw bits to elements of 16 bits.
///
/// # Safety
/// The CPU has AVX-512 F, BW, VL, VBMI, VBMI2 and GFNI.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vbmi,avx512vbmi2,gfni,avx2,bmi1,bmi2,popcnt")]
pub unsafe fn narrow_joined(jobs: &mut [RunJob<'_, [u8; 2]>]) {
    check_raw(jobs, 1..16);
    // SAFETY: the caller vouches for the instructions.
    unsafe { by_positions::<ONE_TABLE, false, true, _>(jobs) }
}

/// Symbols and raw bits to elements of 32 bits.
///
/// # Safety
/// The CPU has AVX-512 F, BW, VL, VBMI, VBMI2 and GFNI.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vbmi,avx512vbmi2,gfni,avx2,bmi1,bmi2,popcnt")]
pub unsafe fn wide_joined(jobs: &mut [RunJob<'_, [u8; 4]>]) {
    check_raw(jobs, 17..32);
    // SAFETY: the caller vouches for the instructions.
    unsafe { by_positions::<ONE_TABLE, true, true, _>(jobs) }
}

/// Checks what the kernels that join raw bits read without looking.
fn check_raw<O>(jobs: &[RunJob<'_, O>], bits: std::ops::Range<u32>) {
    for RunJob { raw, out, .. } in jobs {
        assert!(
            bits.contains(&raw.bits) && raw.bits == jobs[0].raw.bits,
            "raw bits that fit the element, alike in all"
        );
        assert!(out.len().is_multiple_of(LANES), "whole vectors of symbols");
        assert_eq!(raw.planes.len(), raw_bytes_of_run(out.len(), raw.bits as usize), "raw bits of every symbol");
    }
}

/// `O` has four bytes where `WIDE`, else two.
#[inline(always)]
unsafe fn by_positions<const TABLE_USE: usize, const WIDE: bool, const JOINED: bool, O>(jobs: &mut [RunJob<'_, O>]) {
    const { assert!(size_of::<O>() == if WIDE { 4 } else { 2 }) };
    let symbols = jobs.first().map_or(0, |job| job.out.len());
    assert!(jobs.iter().all(|job| job.out.len() == symbols), "runs in lockstep are equally long");
    let has_few = |job: &RunJob<'_, O>| job.tables.iter().all(|table| table.positions() <= FEW);
    // SAFETY: every run has room for `symbols` values.
    unsafe {
        if jobs.iter().all(has_few) {
            in_groups::<TABLE_USE, WIDE, JOINED, true, O>(jobs, symbols);
        } else {
            in_groups::<TABLE_USE, WIDE, JOINED, false, O>(jobs, symbols);
        }
    }
}

#[inline(always)]
unsafe fn in_groups<const TABLE_USE: usize, const WIDE: bool, const JOINED: bool, const IS_SMALL: bool, O>(
    jobs: &mut [RunJob<'_, O>],
    symbols: usize,
) {
    // SAFETY: passed on.
    unsafe {
        for group in jobs.chunks_mut(STRIPS) {
            match group.len() {
                1 => lockstep::<1, TABLE_USE, WIDE, JOINED, IS_SMALL, O>(group, symbols),
                2 => lockstep::<2, TABLE_USE, WIDE, JOINED, IS_SMALL, O>(group, symbols),
                3 => lockstep::<3, TABLE_USE, WIDE, JOINED, IS_SMALL, O>(group, symbols),
                _ => lockstep::<4, TABLE_USE, WIDE, JOINED, IS_SMALL, O>(group, symbols),
            }
        }
    }
}

/// The first `N` jobs, 1 to 4.
#[inline(always)]
unsafe fn lockstep<
    const N: usize,
    const TABLE_USE: usize,
    const WIDE: bool,
    const JOINED: bool,
    const IS_SMALL: bool,
    O,
>(
    jobs: &mut [RunJob<'_, O>],
    symbols: usize,
) {
    // Four variables, used or not: LLVM keeps the states of an array in memory.
    // SAFETY: a step writes 32 values, or as many as the mask has bits, and there are `symbols` in all.
    unsafe {
        let joining = Joining::new::<WIDE>(jobs[0].raw, symbols);
        let mut a = Strip::start(&mut jobs[0]);
        let mut b = Strip::start(&mut jobs[1.min(N - 1)]);
        let mut c = Strip::start(&mut jobs[2.min(N - 1)]);
        let mut d = Strip::start(&mut jobs[3.min(N - 1)]);
        for first in (0..symbols / LANES).map(|vector| LANES * vector) {
            a.step::<TABLE_USE, WIDE, JOINED, IS_SMALL, false>(first, !0, &joining);
            if N > 1 {
                b.step::<TABLE_USE, WIDE, JOINED, IS_SMALL, false>(first, !0, &joining);
            }
            if N > 2 {
                c.step::<TABLE_USE, WIDE, JOINED, IS_SMALL, false>(first, !0, &joining);
            }
            if N > 3 {
                d.step::<TABLE_USE, WIDE, JOINED, IS_SMALL, false>(first, !0, &joining);
            }
        }
        let rest = symbols % LANES;
        if !JOINED && rest > 0 {
            let (first, lanes) = (symbols - rest, (1 << rest) - 1);
            a.step::<TABLE_USE, WIDE, false, IS_SMALL, true>(first, lanes, &joining);
            if N > 1 {
                b.step::<TABLE_USE, WIDE, false, IS_SMALL, true>(first, lanes, &joining);
            }
            if N > 2 {
                c.step::<TABLE_USE, WIDE, false, IS_SMALL, true>(first, lanes, &joining);
            }
            if N > 3 {
                d.step::<TABLE_USE, WIDE, false, IS_SMALL, true>(first, lanes, &joining);
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
    raw: *const u8,
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
                raw: job.raw.planes.as_ptr(),
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

    /// Decodes a symbol of each lane in `lanes`, the run's symbols from `first` on, and writes their values.
    #[inline(always)]
    unsafe fn step<
        const TABLE_USE: usize,
        const WIDE: bool,
        const JOINED: bool,
        const IS_SMALL: bool,
        const MASKED: bool,
    >(
        &mut self,
        first: usize,
        lanes: __mmask32,
        joining: &Joining,
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

            // The table position of each slot. Bucket numbers and places within a bucket leave the upper bytes 0. So does
            // `first`, which starts with position 0; of other tables upper bytes are subtracted from 0, with saturation.
            let slot = _mm512_and_si512(self.low, _mm512_set1_epi16(0xfff));
            let within_bucket = _mm512_and_si512(self.low, _mm512_set1_epi16(31));
            let bucket = _mm512_srli_epi16::<5>(slot);
            let look_up_bucket = |of_a: &[u8; 128], of_b: &[u8; 128]| match TABLE_USE {
                TRELLIS_TABLES => {
                    _mm512_mask_mov_epi16(look_up_byte(of_a, bucket), second_quantizer, look_up_byte(of_b, bucket))
                }
                _ => look_up_byte(of_a, bucket),
            };
            let passed = |boundary: usize| {
                let before = look_up_bucket(&a.before_boundary[boundary], &b.before_boundary[boundary]);
                _mm512_min_epu8(_mm512_subs_epu8(within_bucket, before), one)
            };
            let mut position = _mm512_add_epi16(
                _mm512_add_epi16(look_up_bucket(&a.first, &b.first), passed(0)),
                _mm512_add_epi16(passed(1), passed(2)),
            );
            if TABLE_USE != ONE_TABLE && IS_SMALL {
                // A place in two small tables, one behind the other.
                position = _mm512_mask_add_epi16(position, second_quantizer, position, _mm512_set1_epi16(FEW as i16));
            }
            let look_up = |of_a: &[u16; PADDED], of_b: &[u16; PADDED]| match (TABLE_USE, IS_SMALL) {
                (TRELLIS_TABLES, true) => look_up_joint(of_a, of_b, position),
                (TRELLIS_TABLES, false) => look_up_either(of_a, of_b, second_quantizer, position),
                (_, true) => look_up_small(of_a, position),
                (_, false) => look_up_word(of_a, position),
            };

            // state = (state >> 12) * frequency + slot - start, in halves; the product's upper half does not overflow.
            let frequency = look_up(&a.frequency, &b.frequency);
            let within = _mm512_sub_epi16(slot, look_up(&a.start, &b.start));
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

            let value = |values: &[[u16; PADDED]; 2]| match (TABLE_USE, IS_SMALL) {
                (ONE_TABLE, true) => look_up_small(&values[0], position),
                (ONE_TABLE, false) => look_up_word(&values[0], position),
                (_, true) => look_up_joint(&values[0], &values[1], position),
                (_, false) => look_up_either(&values[0], &values[1], second_quantizer, position),
            };
            let mut low = value(&self.values.low);
            if JOINED && WIDE {
                low = joining.join_lower(low, self.raw, first);
            } else if JOINED {
                low = joining.join_upper(low, self.raw, first);
            }
            let out = self.out.add(if WIDE { 4 } else { 2 } * first);
            if WIDE {
                let mut high = value(&self.values.high);
                if JOINED {
                    high = joining.join_upper(high, self.raw, first);
                }
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
                let odd = look_up(&a.odd, &b.odd);
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

/// `table[index % 32]` in each word.
#[inline(always)]
unsafe fn look_up_small(table: &[u16; PADDED], index: __m512i) -> __m512i {
    // SAFETY: the table is longer than a register.
    unsafe { _mm512_permutexvar_epi16(index, _mm512_loadu_si512(table.as_ptr().cast())) }
}

/// `a[index % 32]` where `index % 64` is less than 32, else `b[index % 32]`.
#[inline(always)]
unsafe fn look_up_joint(a: &[u16; PADDED], b: &[u16; PADDED], index: __m512i) -> __m512i {
    // SAFETY: the tables are longer than a register.
    unsafe {
        let (a, b) = (_mm512_loadu_si512(a.as_ptr().cast()), _mm512_loadu_si512(b.as_ptr().cast()));
        _mm512_permutex2var_epi16(a, index, b)
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
