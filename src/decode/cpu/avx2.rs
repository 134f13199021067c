//! Entropy decoding with AVX2: the 32 lanes of a strip are four registers of eight states.
//!
//! One gather from the table of slots answers a whole lookup; another fetches the value. The words of lanes that ran low
//! are spread with a permutation looked up by which lanes those are.

use core::arch::x86_64::*;

use super::kernels::{Output, RunJob, RunValues};
use super::portable;
use crate::codec::trellis::{NEXT_STATE, STATES};
use crate::format::strip::LANES;

const GROUP: usize = 8;
const GROUPS: usize = LANES / GROUP;

/// Strips in lockstep. The four groups of one strip hide much of the gathers' latency already.
pub const STRIPS: usize = 1;

/// For each set of lanes, which of the next words each of them takes.
static SPREAD: [[u32; GROUP]; 256] = spread();

const fn spread() -> [[u32; GROUP]; 256] {
    let mut table = [[0; GROUP]; 256];
    let mut set = 0;
    while set < 256 {
        let (mut lane, mut next) = (0, 0);
        while lane < GROUP {
            if set >> lane & 1 == 1 {
                table[set][lane] = next;
                next += 1;
            }
            lane += 1;
        }
        set += 1;
    }
    table
}

/// The next state by `2 state + second bit`, twice over for both halves of a register. It starts with 0.
static NEXT: [u8; 32] = {
    let mut table = [0; 32];
    let mut index = 0;
    while index < 32 {
        table[index] = NEXT_STATE[index / 2 % STATES][index % 2];
        index += 1;
    }
    table
};

/// The kernel of every [`TableUse`](super::kernels::TableUse), given as its number.
///
/// # Safety
/// The CPU has AVX2 and POPCNT.
#[target_feature(enable = "avx2,bmi1,bmi2,popcnt")]
pub unsafe fn run<const TABLE_USE: usize, O: Output>(jobs: &mut [RunJob<'_, O>]) {
    for job in jobs {
        let whole = job.out.len() / LANES * LANES;
        // SAFETY: the caller vouches for the instructions.
        unsafe { whole_vectors::<TABLE_USE, O>(job, whole) };
        if whole < job.out.len() {
            let rest = &mut job.out[whole..];
            let RunJob { words, tables, values, .. } = *job;
            let rest = RunJob { lanes: &mut *job.lanes, words, tables, values, out: rest };
            // SAFETY: it is for any CPU.
            unsafe { portable::run::<TABLE_USE, O>(&mut [rest]) };
        }
    }
}

/// Decodes the first `symbols` symbols of a job, a multiple of 32.
#[inline(always)]
unsafe fn whole_vectors<const TABLE_USE: usize, O: Output>(job: &mut RunJob<'_, O>, symbols: usize) {
    let wide = size_of::<O>() == 4;
    let slots = job.tables.map(|table| table.slots().0.as_ptr().cast::<i32>());
    let transitions = job.tables.map(|table| &table.decoding().transitions);
    // SAFETY: slots are 12 bits wide and their tables 4096 entries long; positions are less than 64 because the tables were
    // laid out for that; a gather of 16-bit entries reads two bytes more, which `RunValues` and `DecodingTable` have;
    // `Words::pointer` has 64 bytes behind it; `symbols` outputs have room.
    unsafe {
        let mut states: [__m256i; GROUPS] = std::array::from_fn(|group| {
            let states: [u32; GROUP] = std::array::from_fn(|lane| job.lanes.state(GROUP * group + lane));
            _mm256_loadu_si256(states.as_ptr().cast())
        });
        let mut trellis: [__m256i; GROUPS] = std::array::from_fn(|group| {
            _mm256_cvtepu16_epi32(_mm_loadu_si128(job.lanes.trellis.as_ptr().add(GROUP * group).cast()))
        });
        let mut used = job.lanes.used;
        let out = job.out.as_mut_ptr().cast::<u8>();
        let twelve_bits = _mm256_set1_epi32(0xfff);
        for vector in 0..symbols / LANES {
            let mut narrow = [_mm256_setzero_si256(); GROUPS];
            for group in 0..GROUPS {
                let state = states[group];
                let slot = _mm256_and_si256(state, twelve_bits);
                // All ones where the second quantizer is in use.
                let second = match TABLE_USE {
                    0 => _mm256_setzero_si256(),
                    _ => {
                        _mm256_cmpeq_epi32(_mm256_and_si256(trellis[group], _mm256_set1_epi32(1)), _mm256_set1_epi32(1))
                    }
                };
                let mut entry = _mm256_i32gather_epi32::<4>(slots[0], slot);
                if TABLE_USE == 2 {
                    entry = _mm256_blendv_epi8(entry, _mm256_i32gather_epi32::<4>(slots[1], slot), second);
                }
                let position = _mm256_srli_epi32::<24>(entry);
                let frequency = _mm256_and_si256(entry, twelve_bits);
                let within = _mm256_and_si256(_mm256_srli_epi32::<12>(entry), twelve_bits);
                let next = _mm256_mullo_epi32(_mm256_srli_epi32::<12>(state), frequency);
                let next = _mm256_add_epi32(next, within);

                let ran_low = _mm256_cmpeq_epi32(_mm256_srli_epi32::<16>(next), _mm256_setzero_si256());
                let set = _mm256_movemask_ps(_mm256_castsi256_ps(ran_low)) as usize;
                let words = _mm256_cvtepu16_epi32(_mm_loadu_si128(job.words.pointer(used).cast()));
                let order = _mm256_loadu_si256(SPREAD[set].as_ptr().cast());
                let words = _mm256_permutevar8x32_epi32(words, order);
                let refilled = _mm256_or_si256(_mm256_slli_epi32::<16>(next), words);
                states[group] = _mm256_blendv_epi8(next, refilled, ran_low);
                used += set.count_ones() as usize;

                let value = |of: fn(&RunValues) -> &[[u16; 64]; 2]| {
                    let values = of(job.values);
                    let first = gather_words(&values[0], position);
                    if TABLE_USE == 0 {
                        first
                    } else {
                        _mm256_blendv_epi8(first, gather_words(&values[1], position), second)
                    }
                };
                let low = value(|values| &values.low);
                if wide {
                    let high = _mm256_slli_epi32::<16>(value(|values| &values.high));
                    let at = out.add(4 * (LANES * vector + GROUP * group));
                    _mm256_storeu_si256(at.cast(), _mm256_or_si256(low, high));
                } else {
                    narrow[group] = low;
                }
                if TABLE_USE != 0 {
                    let mut leads = gather_words(transitions[0], position);
                    if TABLE_USE == 2 {
                        leads = _mm256_blendv_epi8(leads, gather_words(transitions[1], position), second);
                    }
                    // Bit 3 leads the first quantizer's states, bit 4 the second's; `second` is -1 there.
                    let shift = _mm256_sub_epi32(_mm256_set1_epi32(3), second);
                    let bit = _mm256_and_si256(_mm256_srlv_epi32(leads, shift), _mm256_set1_epi32(1));
                    let index = _mm256_or_si256(_mm256_slli_epi32::<1>(trellis[group]), bit);
                    trellis[group] = _mm256_shuffle_epi8(_mm256_loadu_si256(NEXT.as_ptr().cast()), index);
                }
            }
            if !wide {
                for (half, pair) in narrow.chunks(2).enumerate() {
                    // Packing works in 128-bit halves: their middle quarters trade places afterwards.
                    let packed = _mm256_permute4x64_epi64::<0b11_01_10_00>(_mm256_packus_epi32(pair[0], pair[1]));
                    _mm256_storeu_si256(out.add(2 * (LANES * vector + 2 * GROUP * half)).cast(), packed);
                }
            }
        }
        for group in 0..GROUPS {
            let (mut state, mut led) = ([0_u32; GROUP], [0_u32; GROUP]);
            _mm256_storeu_si256(state.as_mut_ptr().cast(), states[group]);
            _mm256_storeu_si256(led.as_mut_ptr().cast(), trellis[group]);
            for lane in 0..GROUP {
                job.lanes.set_state(GROUP * group + lane, state[lane]);
                job.lanes.trellis[GROUP * group + lane] = led[lane] as u16;
            }
        }
        job.lanes.used = used;
    }
}

/// `table[index]` in each 32-bit lane.
///
/// Two readable bytes must follow the table.
#[inline(always)]
unsafe fn gather_words(table: &[u16; 64], index: __m256i) -> __m256i {
    // SAFETY: see above.
    unsafe {
        let words = _mm256_i32gather_epi32::<2>(table.as_ptr().cast(), index);
        _mm256_and_si256(words, _mm256_set1_epi32(0xffff))
    }
}
