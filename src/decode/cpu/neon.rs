//! Entropy decoding with NEON: the 32 lanes of a strip are eight registers of four states.
//!
//! Everything is looked up sixteen lanes at a time: 64 bytes are one instruction (`TBL`), so that a position is found as with
//! AVX-512, by the boundaries passed in its bucket. The words of lanes that ran low are spread by a permutation chosen by
//! which lanes those are.

use core::arch::aarch64::*;

use super::kernels::{Output, RunJob};
use super::portable;
use crate::codec::entropy::{CodingTable, DecodingTable, PADDED};
use crate::format::strip::LANES;

/// Strips decoded in one call. The groups of one strip hide one another's latency.
pub const STRIPS: usize = 1;

/// Lanes whose words are spread together.
const GROUP: usize = 8;

const ONE_TABLE: usize = 0;
const TRELLIS_TABLES: usize = 2;

/// For each set of lanes, which of the next bytes each of them takes; bytes past the end are 0.
static SPREAD: [[u8; 2 * GROUP]; 256] = spread();

const fn spread() -> [[u8; 2 * GROUP]; 256] {
    let mut table = [[u8::MAX; 2 * GROUP]; 256];
    let mut set = 0;
    while set < 256 {
        let (mut lane, mut next) = (0, 0);
        while lane < GROUP {
            if set >> lane & 1 == 1 {
                table[set][2 * lane] = next;
                table[set][2 * lane + 1] = next + 1;
                next += 2;
            }
            lane += 1;
        }
        set += 1;
    }
    table
}

/// The kernel of every [`TableUse`](super::kernels::TableUse), given as its number.
///
/// # Safety
/// None needed: every aarch64 has NEON.
pub unsafe fn run<const TABLE_USE: usize, O: Output>(jobs: &mut [RunJob<'_, O>]) {
    portable::with_rest::<TABLE_USE, O>(jobs, |jobs, symbols| {
        jobs.iter_mut().for_each(|job| whole_vectors::<TABLE_USE, O>(job, symbols));
    });
}

/// 64 bytes, looked up by sixteen indices less than 64.
#[derive(Clone, Copy)]
struct Bytes(uint8x16x4_t);

impl Bytes {
    #[inline(always)]
    fn new(entries: &[u8; PADDED]) -> Self {
        // SAFETY: the entries are four registers.
        Self(unsafe { vld1q_u8_x4(entries.as_ptr()) })
    }

    #[inline(always)]
    fn look_up(self, index: uint8x16_t) -> uint8x16_t {
        // SAFETY: every aarch64 has NEON.
        unsafe { vqtbl4q_u8(self.0, index) }
    }
}

/// 128 bytes, looked up by sixteen indices less than 128.
#[derive(Clone, Copy)]
struct BucketBytes([Bytes; 2]);

impl BucketBytes {
    #[inline(always)]
    fn new(entries: &[u8; 2 * PADDED]) -> Self {
        let (halves, _) = entries.as_chunks();
        Self([Bytes::new(&halves[0]), Bytes::new(&halves[1])])
    }

    #[inline(always)]
    fn look_up(&self, index: uint8x16_t) -> uint8x16_t {
        let [lower, upper] = self.0;
        // SAFETY: every aarch64 has NEON. Indices outside a table give 0 at first and keep what is there then.
        unsafe { vqtbx4q_u8(lower.look_up(index), upper.0, vsubq_u8(index, vdupq_n_u8(PADDED as u8))) }
    }
}

/// Positions by bucket and place within it.
#[derive(Clone, Copy)]
struct Buckets {
    first: BucketBytes,
    before_boundary: [BucketBytes; 3],
}

impl Buckets {
    #[inline(always)]
    fn new(table: &DecodingTable) -> Self {
        let before_boundary = table.before_boundary.each_ref().map(BucketBytes::new);
        Self { first: BucketBytes::new(&table.first), before_boundary }
    }

    #[inline(always)]
    fn positions(&self, bucket: uint8x16_t, within: uint8x16_t) -> uint8x16_t {
        self.before_boundary.iter().fold(self.first.look_up(bucket), |position, before| {
            // SAFETY: every aarch64 has NEON. What is greater gives -1.
            unsafe { vsubq_u8(position, vcgtq_u8(within, before.look_up(bucket))) }
        })
    }
}

/// 64 words by position, as bytes.
#[derive(Clone, Copy)]
struct Words {
    low: Bytes,
    high: Bytes,
}

impl Words {
    #[inline(always)]
    fn new(entries: &[u16; PADDED]) -> Self {
        // SAFETY: two registers of words are loaded four times.
        let [a, b, c, d] = [0, 1, 2, 3].map(|quarter| unsafe { vld2q_u8(entries.as_ptr().add(16 * quarter).cast()) });
        Self { low: Bytes(uint8x16x4_t(a.0, b.0, c.0, d.0)), high: Bytes(uint8x16x4_t(a.1, b.1, c.1, d.1)) }
    }

    /// The words of both tables where `take_b` is all ones and where not; only of `a` where there is one table.
    #[inline(always)]
    fn look_up_either<const TABLES: usize>(
        [a, b]: &[Self; 2],
        take_b: uint8x16_t,
        index: uint8x16_t,
    ) -> [uint16x8_t; 2] {
        let either = |a: Bytes, b: Bytes| match TABLES {
            1 => a.look_up(index),
            // SAFETY: every aarch64 has NEON.
            _ => unsafe { vbslq_u8(take_b, b.look_up(index), a.look_up(index)) },
        };
        let (low, high) = (either(a.low, b.low), either(a.high, b.high));
        // SAFETY: every aarch64 has NEON.
        unsafe { [vreinterpretq_u16_u8(vzip1q_u8(low, high)), vreinterpretq_u16_u8(vzip2q_u8(low, high))] }
    }
}

/// Decodes the first `symbols` symbols of a job, a multiple of 32.
#[inline(always)]
fn whole_vectors<const TABLE_USE: usize, O: Output>(job: &mut RunJob<'_, O>, symbols: usize) {
    let wide = size_of::<O>() == 4;
    assert!(symbols <= job.out.len() && (wide || size_of::<O>() == 2), "room for every value");
    let tables = job.tables.map(CodingTable::decoding);
    let buckets = tables.map(Buckets::new);
    let starts = tables.map(|table| Words::new(&table.start));
    let frequencies = tables.map(|table| Words::new(&table.frequency));
    let odd = tables.map(|table| Words::new(&table.odd).low);
    let low_values = job.values.low.each_ref().map(Words::new);
    let high_values = job.values.high.each_ref().map(Words::new);
    let trellis_bytes = job.lanes.trellis.map(|state| state as u8);
    let mut used = job.lanes.used;
    let out = job.out.as_mut_ptr().cast::<u8>();

    // SAFETY: every aarch64 has NEON. Registers are loaded from arrays of their length, words where `Words::pointer` has 64
    // bytes; values are stored sixteen at a time, and there is room for `symbols` of them.
    unsafe {
        let [from_second, from_odd] =
            [job.trellis.from_second, job.trellis.from_odd].map(|bits| vdupq_n_u8(bits as u8));
        let weights = vld1q_u16([1, 2, 4, 8, 16, 32, 64, 128].as_ptr());
        let mut low: [uint16x8_t; 4] = std::array::from_fn(|group| vld1q_u16(job.lanes.low[GROUP * group..].as_ptr()));
        let mut high: [uint16x8_t; 4] =
            std::array::from_fn(|group| vld1q_u16(job.lanes.high[GROUP * group..].as_ptr()));
        let mut trellis = [vld1q_u8(trellis_bytes.as_ptr()), vld1q_u8(trellis_bytes[16..].as_ptr())];

        for vector in 0..symbols / LANES {
            for half in 0..2 {
                let groups = [2 * half, 2 * half + 1];
                // All ones where the second quantizer is in use.
                let second = vtstq_u8(trellis[half], vdupq_n_u8(1));
                let slots = groups.map(|group| vandq_u16(low[group], vdupq_n_u16(0xfff)));
                let bucket = vcombine_u8(vshrn_n_u16::<5>(slots[0]), vshrn_n_u16::<5>(slots[1]));
                let low_bytes = vuzp1q_u8(vreinterpretq_u8_u16(slots[0]), vreinterpretq_u8_u16(slots[1]));
                let within = vandq_u8(low_bytes, vdupq_n_u8(31));
                let mut position = buckets[0].positions(bucket, within);
                if TABLE_USE == TRELLIS_TABLES {
                    position = vbslq_u8(second, buckets[1].positions(bucket, within), position);
                }
                let look_up = |words: &[Words; 2]| match TABLE_USE {
                    TRELLIS_TABLES => Words::look_up_either::<2>(words, second, position),
                    _ => Words::look_up_either::<1>(words, second, position),
                };
                let (start, frequency) = (look_up(&starts), look_up(&frequencies));
                for (index, group) in groups.into_iter().enumerate() {
                    // state = (state >> 12) * frequency + slot - start
                    let within = vsubq_u16(slots[index], start[index]);
                    let state = [vzip1q_u16(low[group], high[group]), vzip2q_u16(low[group], high[group])];
                    let [a, b] = state.map(|state| vshrq_n_u32::<12>(vreinterpretq_u32_u16(state)));
                    let frequency = frequency[index];
                    let a = vmlaq_u32(vmovl_u16(vget_low_u16(within)), a, vmovl_u16(vget_low_u16(frequency)));
                    let b = vmlaq_u32(vmovl_high_u16(within), b, vmovl_high_u16(frequency));
                    let (a, b) = (vreinterpretq_u16_u32(a), vreinterpretq_u16_u32(b));
                    let (next_low, next_high) = (vuzp1q_u16(a, b), vuzp2q_u16(a, b));

                    // A lane whose upper half is 0 moves up and takes the next word.
                    let ran_low = vceqzq_u16(next_high);
                    let set = usize::from(vaddvq_u16(vandq_u16(ran_low, weights)));
                    let next_words = vld1q_u8(job.words.pointer(used));
                    let words = vreinterpretq_u16_u8(vqtbl1q_u8(next_words, vld1q_u8(SPREAD[set].as_ptr())));
                    high[group] = vbslq_u16(ran_low, next_low, next_high);
                    low[group] = vbslq_u16(ran_low, words, next_low);
                    used += set.count_ones() as usize;
                }

                let value = |values: &[Words; 2]| match TABLE_USE {
                    ONE_TABLE => Words::look_up_either::<1>(values, second, position),
                    _ => Words::look_up_either::<2>(values, second, position),
                };
                let low_value = value(&low_values);
                let out = out.add(size_of::<O>() * (LANES * vector + 2 * GROUP * half));
                if wide {
                    let high_value = value(&high_values);
                    for index in 0..2 {
                        let (low, high) = (low_value[index], high_value[index]);
                        vst1q_u16(out.add(32 * index).cast(), vzip1q_u16(low, high));
                        vst1q_u16(out.add(32 * index + 16).cast(), vzip2q_u16(low, high));
                    }
                } else {
                    vst1q_u16(out.cast(), low_value[0]);
                    vst1q_u16(out.add(16).cast(), low_value[1]);
                }
                if TABLE_USE != ONE_TABLE {
                    let odd = match TABLE_USE {
                        TRELLIS_TABLES => vbslq_u8(second, odd[1].look_up(position), odd[0].look_up(position)),
                        _ => odd[0].look_up(position),
                    };
                    // As `Trellis::next_state` has it, a byte per state.
                    let leaps = veorq_u8(vandq_u8(second, from_second), vandq_u8(odd, from_odd));
                    trellis[half] = veorq_u8(vshrq_n_u8::<1>(trellis[half]), leaps);
                }
            }
        }

        for group in 0..4 {
            vst1q_u16(job.lanes.low[GROUP * group..].as_mut_ptr(), low[group]);
            vst1q_u16(job.lanes.high[GROUP * group..].as_mut_ptr(), high[group]);
        }
        let mut trellis_bytes = [0_u8; LANES];
        vst1q_u8(trellis_bytes.as_mut_ptr(), trellis[0]);
        vst1q_u8(trellis_bytes[16..].as_mut_ptr(), trellis[1]);
        job.lanes.trellis = trellis_bytes.map(u16::from);
    }
    job.lanes.used = used;
}
