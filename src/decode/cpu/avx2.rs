//! Entropy decoding with AVX2: the 32 lanes of a strip are four registers of eight states.
//!
//! One gather from the table of slots answers a whole lookup. The positions it finds are packed into the bytes of one
//! register, and everything that depends on them is looked up sixteen entries at a time (`vpshufb`): gathers are the
//! slowest thing here. The words of lanes that ran low are spread by a permutation chosen by which lanes those are.

use core::arch::x86_64::*;

use super::kernels::{Output, RunJob};
use super::portable;
use crate::codec::entropy::PADDED;
use crate::format::strip::LANES;

/// States in a register.
const GROUP: usize = 8;
const GROUPS: usize = LANES / GROUP;

const ONE_TABLE: usize = 0;
const TRELLIS_TABLES: usize = 2;

/// Strips decoded in one call. The four groups of one strip hide one another's latency: two strips in lockstep take a tenth
/// less time in a loop of their own, and more where runs are short, as the tables of both must be laid out.
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

/// A table of 64 bytes as four registers, each with sixteen entries in both halves.
#[derive(Clone, Copy)]
struct ByteTable([__m256i; 4]);

impl ByteTable {
    /// `entries[i] >> shift`, its lower byte.
    #[target_feature(enable = "avx2")]
    fn new<const SHIFT: i32>(entries: &[u16; PADDED]) -> Self {
        let mut quarters = [_mm256_setzero_si256(); 4];
        for (quarter, entries) in quarters.iter_mut().zip(entries.as_chunks::<16>().0) {
            // SAFETY: sixteen words are a register.
            let words = unsafe { _mm256_loadu_si256(entries.as_ptr().cast()) };
            let bytes = _mm256_and_si256(_mm256_srli_epi16::<SHIFT>(words), _mm256_set1_epi16(0xff));
            let packed = _mm256_packus_epi16(bytes, bytes);
            // Eight bytes twice in each half: one of each half, in both halves.
            *quarter = _mm256_permute4x64_epi64::<0b10_00_10_00>(packed);
        }
        Self(quarters)
    }

    /// `entries[index]` in each byte.
    #[inline]
    #[target_feature(enable = "avx2")]
    fn look_up(&self, index: Index) -> __m256i {
        let [a, b, c, d] = self.0;
        let lower = _mm256_blendv_epi8(
            _mm256_shuffle_epi8(a, index.within),
            _mm256_shuffle_epi8(b, index.within),
            index.odd_quarter,
        );
        let upper = _mm256_blendv_epi8(
            _mm256_shuffle_epi8(c, index.within),
            _mm256_shuffle_epi8(d, index.within),
            index.odd_quarter,
        );
        _mm256_blendv_epi8(lower, upper, index.upper_half)
    }

    /// `b[index]` where `take_b` is all ones, else `a[index]`; only `a` where there is one table.
    #[inline]
    #[target_feature(enable = "avx2")]
    fn look_up_either<const TABLE_USE: usize>(a: &Self, b: &Self, take_b: __m256i, index: Index) -> __m256i {
        match TABLE_USE {
            ONE_TABLE => a.look_up(index),
            _ => _mm256_blendv_epi8(a.look_up(index), b.look_up(index), take_b),
        }
    }
}

/// Which byte of a [`ByteTable`] each byte looks up, less than 64. A shuffle goes by the lower four bits; the others choose
/// between shuffles, by the top bit of a byte.
#[derive(Clone, Copy)]
struct Index {
    within: __m256i,
    odd_quarter: __m256i,
    upper_half: __m256i,
}

impl Index {
    #[inline]
    #[target_feature(enable = "avx2")]
    fn new(index: __m256i) -> Self {
        Self { within: index, odd_quarter: _mm256_slli_epi16::<3>(index), upper_half: _mm256_slli_epi16::<2>(index) }
    }
}

/// Words by position, for both quantizers, as bytes.
#[derive(Clone, Copy)]
struct WordTables {
    low: [ByteTable; 2],
    high: [ByteTable; 2],
}

impl WordTables {
    #[inline]
    #[target_feature(enable = "avx2")]
    fn new<const TABLE_USE: usize>([a, b]: &[[u16; PADDED]; 2]) -> Self {
        let (low, high) = (ByteTable::new::<0>(a), ByteTable::new::<8>(a));
        if TABLE_USE == ONE_TABLE {
            return Self { low: [low; 2], high: [high; 2] };
        }
        Self { low: [low, ByteTable::new::<0>(b)], high: [high, ByteTable::new::<8>(b)] }
    }

    /// The words of 32 positions, in order.
    #[inline]
    #[target_feature(enable = "avx2")]
    fn look_up<const TABLE_USE: usize>(&self, second: __m256i, index: Index) -> [__m256i; 2] {
        let low = ByteTable::look_up_either::<TABLE_USE>(&self.low[0], &self.low[1], second, index);
        let high = ByteTable::look_up_either::<TABLE_USE>(&self.high[0], &self.high[1], second, index);
        let (a, b) = (_mm256_unpacklo_epi8(low, high), _mm256_unpackhi_epi8(low, high));
        [_mm256_permute2x128_si256::<0x20>(a, b), _mm256_permute2x128_si256::<0x31>(a, b)]
    }
}

/// The kernel of every [`TableUse`](super::kernels::TableUse), given as its number.
///
/// # Safety
/// The CPU has AVX2, BMI and POPCNT.
#[target_feature(enable = "avx2,bmi1,bmi2,popcnt")]
pub unsafe fn run<const TABLE_USE: usize, O: Output>(jobs: &mut [RunJob<'_, O>]) {
    portable::with_rest::<TABLE_USE, O>(jobs, |jobs, symbols| {
        jobs.iter_mut().for_each(|job| whole_vectors::<TABLE_USE, O>(job, symbols));
    });
}

/// Decodes the first `symbols` symbols of a job, a multiple of 32.
#[inline]
#[target_feature(enable = "avx2,bmi1,bmi2,popcnt")]
fn whole_vectors<const TABLE_USE: usize, O: Output>(job: &mut RunJob<'_, O>, symbols: usize) {
    let wide = size_of::<O>() == 4;
    assert!(symbols <= job.out.len() && (wide || size_of::<O>() == 2), "room for every value");
    let slots = job.tables.map(|table| table.slots().0.as_ptr().cast::<i32>());
    let low_tables = WordTables::new::<TABLE_USE>(&job.values.low);
    let high_tables = if wide { WordTables::new::<TABLE_USE>(&job.values.high) } else { low_tables };
    let [a, b] = job.tables.map(|table| &table.decoding().odd);
    let odd = [ByteTable::new::<0>(a), ByteTable::new::<0>(b)];
    let [from_second, from_odd] =
        [job.trellis.from_second, job.trellis.from_odd].map(|bits| _mm256_set1_epi8(bits as i8));
    let one = _mm256_set1_epi8(1);
    let twelve_bits = _mm256_set1_epi32(0xfff);

    let mut states: [__m256i; GROUPS] = std::array::from_fn(|group| {
        let states: [u32; GROUP] = std::array::from_fn(|lane| job.lanes.state(GROUP * group + lane));
        // SAFETY: eight states are a register.
        unsafe { _mm256_loadu_si256(states.as_ptr().cast()) }
    });
    let trellis_bytes = job.lanes.trellis.map(|state| state as u8);
    // SAFETY: 32 bytes are a register, here and below.
    let mut trellis = unsafe { _mm256_loadu_si256(trellis_bytes.as_ptr().cast()) };
    let mut used = job.lanes.used;
    let out = job.out.as_mut_ptr().cast::<u8>();

    for vector in 0..symbols / LANES {
        // All ones where the second quantizer is in use.
        let second = match TABLE_USE {
            ONE_TABLE => _mm256_setzero_si256(),
            _ => _mm256_cmpeq_epi8(_mm256_and_si256(trellis, one), one),
        };
        let second_of_group = match TABLE_USE {
            TRELLIS_TABLES => {
                let (lower, upper) = (_mm256_castsi256_si128(second), _mm256_extracti128_si256::<1>(second));
                [
                    _mm256_cvtepi8_epi32(lower),
                    _mm256_cvtepi8_epi32(_mm_srli_si128::<8>(lower)),
                    _mm256_cvtepi8_epi32(upper),
                    _mm256_cvtepi8_epi32(_mm_srli_si128::<8>(upper)),
                ]
            }
            _ => [_mm256_setzero_si256(); GROUPS],
        };
        let mut positions = [_mm256_setzero_si256(); GROUPS];
        for group in 0..GROUPS {
            let state = states[group];
            let slot = _mm256_and_si256(state, twelve_bits);
            // SAFETY: slots have 12 bits, and their tables 4096 entries.
            let mut entry = unsafe { _mm256_i32gather_epi32::<4>(slots[0], slot) };
            if TABLE_USE == TRELLIS_TABLES {
                // SAFETY: see above.
                let other = unsafe { _mm256_i32gather_epi32::<4>(slots[1], slot) };
                entry = _mm256_blendv_epi8(entry, other, second_of_group[group]);
            }
            positions[group] = _mm256_srli_epi32::<24>(entry);
            let frequency = _mm256_and_si256(entry, twelve_bits);
            let within = _mm256_and_si256(_mm256_srli_epi32::<12>(entry), twelve_bits);
            let next = _mm256_mullo_epi32(_mm256_srli_epi32::<12>(state), frequency);
            let next = _mm256_add_epi32(next, within);

            let ran_low = _mm256_cmpeq_epi32(_mm256_srli_epi32::<16>(next), _mm256_setzero_si256());
            let set = _mm256_movemask_ps(_mm256_castsi256_ps(ran_low)) as usize;
            // SAFETY: `Words::pointer` has 64 bytes behind it; an entry of `SPREAD` is a register.
            let (words, order) = unsafe {
                (_mm_loadu_si128(job.words.pointer(used).cast()), _mm256_loadu_si256(SPREAD[set].as_ptr().cast()))
            };
            let words = _mm256_permutevar8x32_epi32(_mm256_cvtepu16_epi32(words), order);
            let refilled = _mm256_or_si256(_mm256_slli_epi32::<16>(next), words);
            states[group] = _mm256_blendv_epi8(next, refilled, ran_low);
            used += set.count_ones() as usize;
        }
        // One byte per lane. Packing works in halves and leaves four positions of each group in each.
        let words = [_mm256_packus_epi32(positions[0], positions[1]), _mm256_packus_epi32(positions[2], positions[3])];
        let position = Index::new(_mm256_permutevar8x32_epi32(
            _mm256_packus_epi16(words[0], words[1]),
            _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7),
        ));

        let low = low_tables.look_up::<TABLE_USE>(second, position);
        // SAFETY: `symbols` values are so many vectors of values, and there is room for them.
        let out = unsafe { out.add(LANES * size_of::<O>() * vector) };
        if wide {
            let high = high_tables.look_up::<TABLE_USE>(second, position);
            for half in 0..2 {
                let (a, b) =
                    (_mm256_unpacklo_epi16(low[half], high[half]), _mm256_unpackhi_epi16(low[half], high[half]));
                // SAFETY: the values of a vector are four registers.
                unsafe {
                    let out = out.add(64 * half);
                    _mm256_storeu_si256(out.cast(), _mm256_permute2x128_si256::<0x20>(a, b));
                    _mm256_storeu_si256(out.add(32).cast(), _mm256_permute2x128_si256::<0x31>(a, b));
                }
            }
        } else {
            // SAFETY: the values of a vector are two registers.
            unsafe {
                _mm256_storeu_si256(out.cast(), low[0]);
                _mm256_storeu_si256(out.add(32).cast(), low[1]);
            }
        }
        if TABLE_USE != ONE_TABLE {
            let odd = match TABLE_USE {
                TRELLIS_TABLES => ByteTable::look_up_either::<TABLE_USE>(&odd[0], &odd[1], second, position),
                _ => odd[0].look_up(position),
            };
            // As `Trellis::next_state` has it, a byte per state.
            let halved = _mm256_and_si256(_mm256_srli_epi16::<1>(trellis), _mm256_set1_epi8(0x7f));
            let leaps = _mm256_xor_si256(_mm256_and_si256(second, from_second), _mm256_and_si256(odd, from_odd));
            trellis = _mm256_xor_si256(halved, leaps);
        }
    }

    for (group, state) in states.into_iter().enumerate() {
        let mut of_group = [0_u32; GROUP];
        // SAFETY: eight states are a register.
        unsafe { _mm256_storeu_si256(of_group.as_mut_ptr().cast(), state) };
        for (lane, state) in of_group.into_iter().enumerate() {
            job.lanes.set_state(GROUP * group + lane, state);
        }
    }
    let mut trellis_bytes = [0_u8; LANES];
    // SAFETY: 32 bytes are a register.
    unsafe { _mm256_storeu_si256(trellis_bytes.as_mut_ptr().cast(), trellis) };
    job.lanes.trellis = trellis_bytes.map(u16::from);
    job.lanes.used = used;
}
