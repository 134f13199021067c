//! The table of kernels, and what a kernel is given: one run of one or several strips.
//!
//! A kernel decodes the same run of all its strips in lockstep: one strip alone is a chain of dependent lookups, several
//! hide one another's latency. What a symbol turns into is a table too ([`RunValues`]), so that a kernel knows nothing of
//! exponents, weights or rounding.

#[cfg(target_arch = "aarch64")]
use super::neon;
#[cfg(target_arch = "x86_64")]
use super::{avx2, avx512};
use super::{differences, finish, portable};
use crate::codec::entropy::{CodingTable, LaneError, PADDED, STATE_LOW};
use crate::codec::trellis::Trellis;
use crate::format::part::TrellisTables;
use crate::format::strip::LANES;

/// Bytes that must follow the words of a strip, so that a vector of them can be loaded anywhere.
pub const WORDS_PADDING: usize = 64;

/// The 16-bit words of a strip with readable bytes behind them.
#[derive(Clone, Copy, Debug)]
pub struct Words<'a> {
    bytes: &'a [u8],
    count: usize,
}

impl<'a> Words<'a> {
    /// The `count` words that `bytes` starts with; `None` unless [`WORDS_PADDING`] more bytes follow them.
    pub fn new(bytes: &'a [u8], count: usize) -> Option<Self> {
        (bytes.len() >= 2 * count + WORDS_PADDING).then_some(Self { bytes, count })
    }

    /// Number of words.
    #[inline(always)]
    pub fn count(&self) -> usize {
        self.count
    }

    /// Where word `index` lies, or where the words end if there are fewer: [`WORDS_PADDING`] bytes can be read there.
    #[inline(always)]
    pub fn pointer(&self, index: usize) -> *const u8 {
        // SAFETY: `new` has seen that the words and the padding are there.
        unsafe { self.bytes.as_ptr().add(2 * index.min(self.count)) }
    }

    /// Word `index`; something where there is none.
    #[inline(always)]
    pub fn word(&self, index: usize) -> u16 {
        let at = 2 * index.min(self.count);
        u16::from_le_bytes([self.bytes[at], self.bytes[at + 1]])
    }
}

/// The lanes of one strip between two runs. Of a strip with fewer lanes than there can be, the others stay at home.
#[derive(Clone, Debug)]
#[repr(C, align(64))]
pub struct Lanes {
    /// Lower halves of the states.
    pub low: [u16; LANES],
    /// Upper halves of the states.
    pub high: [u16; LANES],
    /// Trellis states.
    pub trellis: [u16; LANES],
    /// Number of lanes.
    pub count: usize,
    /// Words read so far.
    pub used: usize,
}

impl Lanes {
    /// Starts from the states that a strip starts with.
    pub fn new(states: &[u8]) -> Self {
        let states = states.as_chunks().0;
        let mut lanes = Self { low: [0; LANES], high: [1; LANES], trellis: [0; LANES], count: states.len(), used: 0 };
        for (lane, &state) in states.iter().enumerate() {
            lanes.set_state(lane, u32::from_le_bytes(state));
        }
        lanes
    }

    /// The state of a lane.
    #[inline(always)]
    pub fn state(&self, lane: usize) -> u32 {
        u32::from(self.high[lane]) << 16 | u32::from(self.low[lane])
    }

    /// Sets the state of a lane.
    #[inline(always)]
    pub fn set_state(&mut self, lane: usize, state: u32) {
        self.low[lane] = state as u16;
        self.high[lane] = (state >> 16) as u16;
    }

    /// Decodes one symbol of a lane, as the reference decoder does.
    pub fn decode_symbol(&mut self, lane: usize, words: Words<'_>, table: &CodingTable) -> u8 {
        let state = self.state(lane);
        let position = table.position_of_slot(state);
        let (start, slots) = table.interval(position);
        let mut next = (state >> 12) * slots + state % 4096 - start;
        if next < STATE_LOW {
            next = next << 16 | u32::from(words.word(self.used));
            self.used += 1;
        }
        self.set_state(lane, next);
        position
    }

    /// Checks that every word was used and every lane came home.
    pub fn finish(&self, words: usize) -> Result<(), LaneError> {
        if self.used > words {
            return Err(LaneError::WordsMissing { words });
        }
        if self.used < words {
            return Err(LaneError::WordsLeft { used: self.used, words });
        }
        match (0..LANES).find(|&lane| self.state(lane) != STATE_LOW) {
            Some(lane) => Err(LaneError::EndState { lane, state: self.state(lane) }),
            None => Ok(()),
        }
    }
}

/// What each table position turns into: 16 bits, or 32 in two halves; by quantizer where a trellis chooses one.
#[derive(Clone, Debug)]
#[repr(C, align(64))]
pub struct RunValues {
    /// The lower, or only, half.
    pub low: [[u16; PADDED]; 2],
    /// The upper half.
    pub high: [[u16; PADDED]; 2],
}

impl RunValues {
    /// All zero.
    pub const ZERO: Self = Self { low: [[0; PADDED]; 2], high: [[0; PADDED]; 2] };
}

/// The raw bits of a run's symbols as a strip has them (SPEC.md section 6): byte planes one after another, then bit planes.
#[derive(Clone, Copy, Debug, Default)]
pub struct StoredRaw<'a> {
    /// The planes.
    pub planes: &'a [u8],
    /// Raw bits of each symbol.
    pub bits: u32,
}

/// One run of one strip. `O` is two or four bytes: a position's 16 or 32 bits, little-endian.
#[derive(Debug)]
pub struct RunJob<'a, O> {
    /// The strip's lanes.
    pub lanes: &'a mut Lanes,
    /// The strip's words.
    pub words: Words<'a>,
    /// The run's table, twice; or the tables of both quantizers.
    pub tables: [&'a CodingTable; 2],
    /// What positions turn into.
    pub values: &'a RunValues,
    /// How lanes go from quantizer to quantizer, where they do.
    pub trellis: Trellis,
    /// The run's raw bits; of kernels that do not join them, none.
    pub raw: StoredRaw<'a>,
    /// One per symbol; all jobs of one call have equally many.
    pub out: &'a mut [O],
}

/// Which entropy table and which values a symbol uses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TableUse {
    /// The run's.
    One,
    /// The run's table; the trellis state chooses the values.
    TrellisValues,
    /// The trellis state chooses both.
    TrellisTables,
}

impl TableUse {
    /// As a part's quantizer says.
    pub fn of(trellis: Option<TrellisTables>) -> Self {
        match trellis {
            None => Self::One,
            Some(TrellisTables::Shared) => Self::TrellisValues,
            Some(TrellisTables::Pairs) => Self::TrellisTables,
        }
    }
}

/// Decodes one run of every job.
///
/// # Safety
/// The CPU has the instructions of the kernel's level.
pub type RunKernel<O> = unsafe fn(&mut [RunJob<'_, O>]);

/// Kernels that join the raw bits of split elements to their symbols on the way, instead of after it: values are magnitude
/// bits in their place. Runs are whole vectors of 32 symbols with one table.
#[derive(Debug)]
pub struct Joined {
    /// Elements of 16 bits, 1 to 15 of them raw.
    pub narrow: RunKernel<[u8; 2]>,
    /// Elements of 32 bits, 17 to 31 of them raw.
    pub wide: RunKernel<[u8; 4]>,
}

/// One implementation of everything that is worth having per instruction set. Filled once, chosen by `decode::select`.
#[derive(Debug)]
pub struct Kernels {
    /// Name of the level.
    pub name: &'static str,
    /// Strips that decode together best.
    pub strips_at_once: usize,
    /// Symbols to 16 bits, by `TableUse`.
    pub narrow: [RunKernel<[u8; 2]>; 3],
    /// Symbols to 32 bits, by `TableUse`.
    pub wide: [RunKernel<[u8; 4]>; 3],
    /// Split elements in one go, where the level has it.
    pub joined: Option<Joined>,
    /// What is done with values after entropy decoding.
    pub finish: finish::Kernels,
    /// What is done with differences to a base.
    pub differences: differences::Kernels,
}

/// Any CPU.
pub static PORTABLE: Kernels = Kernels {
    name: "portable",
    strips_at_once: 1,
    narrow: [portable::run::<0, [u8; 2]>, portable::run::<1, [u8; 2]>, portable::run::<2, [u8; 2]>],
    wide: [portable::run::<0, [u8; 4]>, portable::run::<1, [u8; 4]>, portable::run::<2, [u8; 4]>],
    joined: None,
    finish: finish::PORTABLE,
    differences: differences::PORTABLE,
};

/// x86-64 with AVX2: nearly all of them.
#[cfg(target_arch = "x86_64")]
pub static AVX2: Kernels = Kernels {
    name: "avx2",
    strips_at_once: avx2::STRIPS,
    narrow: [avx2::run::<0, [u8; 2]>, avx2::run::<1, [u8; 2]>, avx2::run::<2, [u8; 2]>],
    wide: [avx2::run::<0, [u8; 4]>, avx2::run::<1, [u8; 4]>, avx2::run::<2, [u8; 4]>],
    joined: None,
    finish: finish::AVX2,
    differences: differences::AVX2,
};

/// x86-64 with AVX-512 F, BW, VL, VBMI, VBMI2 and GFNI: Ice Lake, Zen 4 and later.
#[cfg(target_arch = "x86_64")]
pub static AVX512: Kernels = Kernels {
    name: "avx512",
    strips_at_once: avx512::STRIPS,
    narrow: [avx512::narrow::<0>, avx512::narrow::<1>, avx512::narrow::<2>],
    wide: [avx512::wide::<0>, avx512::wide::<1>, avx512::wide::<2>],
    joined: Some(Joined { narrow: avx512::narrow_joined, wide: avx512::wide_joined }),
    // Scales of columns are applied by the AVX2 function: no CPU of this level was at hand to test another on.
    finish: finish::Kernels {
        dequantize_trellis: avx512::dequantize_trellis,
        scale_columns: finish::AVX2.scale_columns,
        ..finish::AVX512
    },
    differences: differences::AVX512,
};

/// Any aarch64.
#[cfg(target_arch = "aarch64")]
pub static NEON: Kernels = Kernels {
    name: "neon",
    strips_at_once: neon::STRIPS,
    narrow: [neon::run::<0, [u8; 2]>, neon::run::<1, [u8; 2]>, neon::run::<2, [u8; 2]>],
    wide: [neon::run::<0, [u8; 4]>, neon::run::<1, [u8; 4]>, neon::run::<2, [u8; 4]>],
    joined: None,
    finish: finish::PORTABLE, // compilers vectorize it: NEON is part of the architecture
    differences: differences::PORTABLE,
};

/// Two or four bytes that a symbol turns into.
pub trait Output: Copy + Sized + 'static {
    /// The value of a position.
    fn of(values: &RunValues, quantizer: usize, position: usize) -> Self;
    /// The kernel that makes these.
    fn kernel(kernels: &Kernels, table_use: TableUse) -> RunKernel<Self>;
    /// The kernel that makes these and joins raw bits.
    fn joined_kernel(joined: &Joined) -> RunKernel<Self>;
    /// Bytes as values; a rest that is no whole value is left out.
    fn slice(bytes: &mut [u8]) -> &mut [Self];
}

impl Output for [u8; 2] {
    #[inline(always)]
    fn of(values: &RunValues, quantizer: usize, position: usize) -> Self {
        values.low[quantizer % 2][position % PADDED].to_le_bytes()
    }

    fn kernel(kernels: &Kernels, table_use: TableUse) -> RunKernel<Self> {
        kernels.narrow[table_use as usize]
    }

    fn joined_kernel(joined: &Joined) -> RunKernel<Self> {
        joined.narrow
    }

    fn slice(bytes: &mut [u8]) -> &mut [Self] {
        bytes.as_chunks_mut().0
    }
}

impl Output for [u8; 4] {
    #[inline(always)]
    fn of(values: &RunValues, quantizer: usize, position: usize) -> Self {
        let (low, high) = (&values.low[quantizer % 2], &values.high[quantizer % 2]);
        (u32::from(high[position % PADDED]) << 16 | u32::from(low[position % PADDED])).to_le_bytes()
    }

    fn kernel(kernels: &Kernels, table_use: TableUse) -> RunKernel<Self> {
        kernels.wide[table_use as usize]
    }

    fn joined_kernel(joined: &Joined) -> RunKernel<Self> {
        joined.wide
    }

    fn slice(bytes: &mut [u8]) -> &mut [Self] {
        bytes.as_chunks_mut().0
    }
}
