//! What the kernel is told: `kernel/description.h` is the same in C++, field by field, and says what each means.

use crate::codec::entropy::CodingTable;

pub(super) const MEANS: u32 = 1 << 0;
pub(super) const OFFSETS: u32 = 1 << 2;
pub(super) const TRELLIS: u32 = 1 << 3;
pub(super) const PAIRS: u32 = 1 << 4;
pub(super) const VECTORS: u32 = 1 << 5;
pub(super) const VALUES: u32 = 1 << 6;
pub(super) const DIFFERENCES: u32 = 1 << 7;
pub(super) const LOW_RANK: u32 = 1 << 8;
pub(super) const CODED: u32 = 1 << 9;
pub(super) const FROM_F16: u32 = 1 << 10;
pub(super) const FROM_BF16: u32 = 1 << 11;
pub(super) const COLUMN_SCALES: u32 = 1 << 12;

/// Element types that are computed with.
pub(super) const BITS: u32 = 0;
pub(super) const F32: u32 = 1;
pub(super) const F16: u32 = 2;
pub(super) const BF16: u32 = 3;

/// Values of [`Status::failure`].
pub(super) const NONE: u32 = 0;
pub(super) const WORDS: u32 = 1;
pub(super) const END_STATE: u32 = 2;
pub(super) const EXCEPTION_POSITION: u32 = 3;

/// Bytes of a table on the device.
pub(super) const TABLE_BYTES: usize = 1024;

/// What every run has of its own.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
pub(super) struct Run {
    pub table: u32,
    pub raw_bits: u32,
    pub step: f32,
    pub mean: f32,
    pub gain: f32,
    pub offset: f32,
}

/// A part.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
pub(super) struct Part {
    pub tables: u64,
    pub runs: u64,
    pub values: u64,
    pub second_values: u64,
    pub motion: u64,
    pub motion_stride: u64,
    pub column_scales: u64,
    pub class_offsets: u64,
    pub class_row_elements: u64,
    pub left: u64,
    pub right: u64,
    pub columns: u64,
    pub element: u32,
    pub flags: u32,
    pub symbol_bits: u32,
    pub run_elements: u32,
    pub lanes: u32,
    pub run_stride: u32,
    pub raw_bits: u32,
    pub carrier_bits: u32,
    pub exception_bytes: u32,
    pub from_second: u32,
    pub from_odd: u32,
    pub values_listed: u32,
    pub vector_elements: u32,
    pub first_index_bits: u32,
    pub second_index_bits: u32,
    pub motion_length: u32,
    pub class_shift: u32,
    pub zero_bits: u32,
    pub rank: u32,
    pub low_rank_scale: f32,
}

/// A strip.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
pub(super) struct Strip {
    pub part: u64,
    pub stored: u64,
    pub out: u64,
    pub reference: u64,
    pub order: u64,
    pub first_element: u64,
    pub first_run: u64,
    pub symbols: u32,
    pub words: u32,
    pub raw_bytes: u32,
    pub exceptions: u32,
}

/// How a strip went.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
pub(super) struct Status {
    pub failure: u32,
    pub found: u32,
    pub state: u32,
    pub reserved: u32,
}

/// Numbers side by side, without padding: bytes as they are.
///
/// # Safety
/// Every bit pattern is a value, and there is no padding.
pub(super) unsafe trait Plain: Copy {}

// SAFETY: all fields are integers and floats of 4 and 8 bytes, and none is behind a hole: the sizes below say so.
unsafe impl Plain for Run {}
// SAFETY: as above.
unsafe impl Plain for Part {}
// SAFETY: as above.
unsafe impl Plain for Strip {}
// SAFETY: as above.
unsafe impl Plain for Status {}
// SAFETY: numbers.
unsafe impl Plain for u32 {}
// SAFETY: numbers.
unsafe impl Plain for i32 {}
// SAFETY: numbers.
unsafe impl Plain for u64 {}
// SAFETY: numbers.
unsafe impl Plain for f32 {}

const _: () = assert!(size_of::<Run>() == 6 * 4 && size_of::<Part>() == 12 * 8 + 20 * 4);
const _: () = assert!(size_of::<Strip>() == 7 * 8 + 4 * 4 && size_of::<Status>() == 4 * 4);

/// The bytes of numbers side by side.
pub(super) fn bytes_of<T: Plain>(numbers: &[T]) -> &[u8] {
    // SAFETY: initialized bytes without padding, borrowed for as long.
    unsafe { std::slice::from_raw_parts(numbers.as_ptr().cast(), size_of_val(numbers)) }
}

impl Status {
    /// A status as the device wrote it.
    pub(super) fn read(bytes: &[u8; 16]) -> Self {
        let [failure, found, state, reserved] =
            [0, 4, 8, 12].map(|at| u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]));
        Self { failure, found, state, reserved }
    }
}

/// A table as the kernel looks it up.
pub(super) fn table_words(table: &CodingTable) -> [u32; TABLE_BYTES / 4] {
    let laid_out = table.decoding();
    let mut words = [0; TABLE_BYTES / 4];
    let (buckets, rest) = words.split_at_mut(128);
    let (intervals, values) = rest.split_at_mut(64);
    for (bucket, word) in buckets.iter_mut().enumerate() {
        let [a, b, c] = laid_out.before_boundary.map(|before| before[bucket]);
        *word = u32::from_le_bytes([laid_out.first[bucket], a, b, c]);
    }
    for position in 0..table.positions() as u8 {
        let index = usize::from(position);
        let (start, slots) = table.interval(position);
        intervals[index] = start | slots << 16;
        let offset = table.table().point_offsets.get(index).copied().unwrap_or(0);
        values[index] = u32::from(table.code(position) as u16) | u32::from(offset as u8) << 16;
    }
    words
}
