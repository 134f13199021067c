//! What follows entropy decoding, run by run while the values are in the first-level cache: raw bits joined, prediction
//! added, rounded (SPEC.md section 7).
//!
//! Every function is written once, as a loop that compilers vectorize, and compiled for every instruction set. All
//! arithmetic is single binary32 operations in the reference decoder's order.

use super::raw_bits::{RawBits, Spread, spread_by_table};
#[cfg(target_arch = "x86_64")]
use super::raw_bits::{spread_by_mask, spread_by_shuffle};
use crate::codec::lossless::join_element;
use crate::codec::predictor::RunPredictor;
use crate::codec::quantizer::{dequantize, join_code};
use crate::codec::trellis::{Trellis, multiple, quantizer_of};
use crate::format::strip::LANES;
use crate::numerics::{bf16_from_f32, f16_from_f32, f32_from_bf16, f32_from_f16};

/// A run's prediction.
#[derive(Clone, Copy, Debug)]
pub enum RunPrediction<'a> {
    /// There is none.
    None,
    /// How, and the bytes of its reference elements in order.
    Elementwise(RunPredictor, &'a [u8]),
    /// The predictions themselves, binary32.
    Values(&'a [[u8; 4]]),
}

/// Joins symbols, shifted to their place in the element, with raw bits, in place.
type JoinInPlace = unsafe fn(raw: &RawBits<'_>, elements: &mut [[u8; 2]]);
/// Joins symbols and raw bits to elements.
type Join = unsafe fn(symbols: &[[u8; 2]], raw: &RawBits<'_>, out: &mut [[u8; 4]]);
/// Turns 16-bit elements into the binary32 they stand for.
type Widen = unsafe fn(elements: &[[u8; 2]], out: &mut [[u8; 4]]);
/// Dequantizes codes with raw bits below them: codes, raw bits, step, mean, binary32 values.
type Dequantize = unsafe fn(&[[u8; 2]], &RawBits<'_>, f32, Option<f32>, &mut [[u8; 4]]);
/// The same for trellis-coded codes; third, the trellis and the states of the lanes.
type DequantizeTrellis =
    unsafe fn(&[[u8; 2]], &RawBits<'_>, (Trellis, &mut [u16; LANES]), f32, Option<f32>, &mut [[u8; 4]]);
/// Multiplies the dequantized values of a run by the scales of their columns.
type ScaleColumns = unsafe fn(scales: &[f32], residuals: &mut [[u8; 4]]);
/// Adds the prediction to dequantized values and rounds to the element type.
type Round = unsafe fn(residuals: &[[u8; 4]], prediction: RunPrediction<'_>, out: &mut [u8]);

/// One compilation of every function here.
///
/// All are safe to call where the CPU has the instructions of the level.
#[derive(Debug)]
pub struct Kernels {
    /// Bit planes to bytes.
    pub spread: Spread,
    /// Magnitude and raw bits of 16-bit elements.
    pub join_16: JoinInPlace,
    /// Symbols and raw bits of 32-bit elements.
    pub join_32: Join,
    /// bfloat16 to binary32.
    pub widen_bf16: Widen,
    /// binary16 to binary32.
    pub widen_f16: Widen,
    /// Codes and raw bits to binary32.
    pub dequantize: Dequantize,
    /// Trellis-coded codes and raw bits to binary32.
    pub dequantize_trellis: DequantizeTrellis,
    /// Values times the scales of their columns.
    pub scale_columns: ScaleColumns,
    /// Residuals and prediction to bfloat16.
    pub round_bf16: Round,
    /// Residuals and prediction to binary16.
    pub round_f16: Round,
    /// Residuals and prediction to binary32.
    pub round_f32: Round,
}

macro_rules! compile_for {
    ($(#[$attribute:meta])* $level:ident, $module:ident, $spread:ident $(, $features:literal)?) => {
        $(#[$attribute])*
        mod $module {
            use super::*;

            compile_for!(@function join_16(raw: &RawBits<'_>, elements: &mut [[u8; 2]]) $(, $features)?);
            compile_for!(@function join_32(
                symbols: &[[u8; 2]], raw: &RawBits<'_>, out: &mut [[u8; 4]]
            ) $(, $features)?);
            compile_for!(@function widen_bf16(elements: &[[u8; 2]], out: &mut [[u8; 4]]) $(, $features)?);
            compile_for!(@function widen_f16(elements: &[[u8; 2]], out: &mut [[u8; 4]]) $(, $features)?);
            compile_for!(@function dequantize_codes(
                codes: &[[u8; 2]], raw: &RawBits<'_>, step: f32, mean: Option<f32>, residuals: &mut [[u8; 4]]
            ) $(, $features)?);
            compile_for!(@function dequantize_trellis(
                codes: &[[u8; 2]],
                raw: &RawBits<'_>,
                states: (Trellis, &mut [u16; LANES]),
                step: f32,
                mean: Option<f32>,
                residuals: &mut [[u8; 4]]
            ) $(, $features)?);
            compile_for!(@function scale_columns(scales: &[f32], residuals: &mut [[u8; 4]]) $(, $features)?);
            compile_for!(@function round_bf16(
                residuals: &[[u8; 4]], prediction: RunPrediction<'_>, out: &mut [u8]
            ) $(, $features)?);
            compile_for!(@function round_f16(
                residuals: &[[u8; 4]], prediction: RunPrediction<'_>, out: &mut [u8]
            ) $(, $features)?);
            compile_for!(@function round_f32(
                residuals: &[[u8; 4]], prediction: RunPrediction<'_>, out: &mut [u8]
            ) $(, $features)?);
        }

        $(#[$attribute])*
        #[doc = concat!("Compiled for the level `", stringify!($module), "`.")]
        pub const $level: Kernels = Kernels {
            spread: $spread,
            join_16: $module::join_16,
            join_32: $module::join_32,
            widen_bf16: $module::widen_bf16,
            widen_f16: $module::widen_f16,
            dequantize: $module::dequantize_codes,
            dequantize_trellis: $module::dequantize_trellis,
            scale_columns: $module::scale_columns,
            round_bf16: $module::round_bf16,
            round_f16: $module::round_f16,
            round_f32: $module::round_f32,
        };
    };
    (@function $name:ident($($argument:ident: $type:ty),*) $(, $features:literal)?) => {
        $(#[target_feature(enable = $features)])?
        pub(super) unsafe fn $name($($argument: $type),*) {
            super::$name($($argument),*);
        }
    };
}

compile_for!(PORTABLE, portable, spread_by_table);
compile_for!(
    #[cfg(target_arch = "x86_64")]
    AVX2,
    avx2,
    spread_by_shuffle,
    "avx2,bmi1,bmi2,popcnt"
);
compile_for!(
    #[cfg(target_arch = "x86_64")]
    AVX512,
    avx512,
    spread_by_mask,
    "avx512f,avx512bw,avx512vl,avx512vbmi,avx512vbmi2,avx2,bmi1,bmi2,popcnt"
);

// Loops over whole runs, by index, whose length the compiler does not know: it vectorizes these. It unrolls loops over the
// lanes of a vector instead, and may leave closures and iterators uninlined, which are then compiled for any CPU.

#[inline(always)]
fn join_16(raw: &RawBits<'_>, elements: &mut [[u8; 2]]) {
    let (low_bits, zeros, length) = (raw.count() - 1, raw.zeros(), elements.len());
    match *raw.planes() {
        [low] => {
            let low = &low[..length];
            for index in 0..length {
                elements[index] = join_element_16(elements[index], u16::from(low[index]) << zeros, low_bits);
            }
        }
        [low, high] => {
            let (low, high) = (&low[..length], &high[..length]);
            for index in 0..length {
                let raw = u16::from_le_bytes([low[index], high[index]]);
                elements[index] = join_element_16(elements[index], raw << zeros, low_bits);
            }
        }
        _ => unreachable!("16 raw bits at most are checked when a part is prepared"),
    }
}

/// Sign and low bits joined to the other magnitude bits of an element.
#[inline(always)]
fn join_element_16(magnitude: [u8; 2], raw: u16, low_bits: u32) -> [u8; 2] {
    let sign_and_low = (raw >> low_bits) << 15 | raw & ((1 << low_bits) - 1);
    (u16::from_le_bytes(magnitude) | sign_and_low).to_le_bytes()
}

#[inline(always)]
fn join_32(symbols: &[[u8; 2]], raw: &RawBits<'_>, out: &mut [[u8; 4]]) {
    let (low_bits, zeros, length) = (raw.count() - 1, raw.zeros(), out.len());
    let symbols = &symbols[..length];
    match *raw.planes() {
        [a] => {
            let a = &a[..length];
            for index in 0..length {
                out[index] = join_element_32(symbols[index], [a[index], 0, 0, 0], zeros, low_bits);
            }
        }
        [a, b] => {
            let (a, b) = (&a[..length], &b[..length]);
            for index in 0..length {
                out[index] = join_element_32(symbols[index], [a[index], b[index], 0, 0], zeros, low_bits);
            }
        }
        [a, b, c] => {
            let (a, b, c) = (&a[..length], &b[..length], &c[..length]);
            for index in 0..length {
                out[index] = join_element_32(symbols[index], [a[index], b[index], c[index], 0], zeros, low_bits);
            }
        }
        [a, b, c, d] => {
            let (a, b, c, d) = (&a[..length], &b[..length], &c[..length], &d[..length]);
            for index in 0..length {
                out[index] = join_element_32(symbols[index], [a[index], b[index], c[index], d[index]], zeros, low_bits);
            }
        }
        _ => unreachable!("32 raw bits at most are checked when a part is prepared"),
    }
}

/// As [`join_element`]: magnitude bits that do not fit are dropped.
#[inline(always)]
fn join_element_32(symbol: [u8; 2], raw: [u8; 4], zeros: u32, low_bits: u32) -> [u8; 4] {
    let (symbol, raw) = (u32::from(u16::from_le_bytes(symbol)), u32::from_le_bytes(raw) << zeros);
    let magnitude = (symbol << low_bits | raw & ((1 << low_bits) - 1)) & (u32::MAX >> 1);
    ((raw >> low_bits) << 31 | magnitude).to_le_bytes()
}

/// Joins symbols of elements of any width, eight bytes each in `out` or fewer: types that are rare in checkpoints.
pub fn join_any(symbols: &[[u8; 2]], raw: &RawBits<'_>, width: u32, out: &mut [u8]) {
    let element_bytes = width as usize / 8;
    for (index, (out, &symbol)) in out.chunks_mut(element_bytes).zip(symbols).enumerate() {
        let mut bits = [0; 8];
        for (bits, plane) in bits.iter_mut().zip(raw.planes()) {
            *bits = plane[index];
        }
        let symbol = u16::from_le_bytes(symbol).into();
        let element = join_element(symbol, u64::from_le_bytes(bits) << raw.zeros(), width, raw.count());
        out.copy_from_slice(&element.to_le_bytes()[..element_bytes]);
    }
}

#[inline(always)]
fn widen_bf16(elements: &[[u8; 2]], out: &mut [[u8; 4]]) {
    for (out, &element) in out.iter_mut().zip(elements) {
        *out = f32_from_bf16(u16::from_le_bytes(element)).to_le_bytes();
    }
}

#[inline(always)]
fn widen_f16(elements: &[[u8; 2]], out: &mut [[u8; 4]]) {
    for (out, &element) in out.iter_mut().zip(elements) {
        *out = f32_from_f16(u16::from_le_bytes(element)).to_le_bytes();
    }
}

#[inline(always)]
fn dequantize_codes(codes: &[[u8; 2]], raw: &RawBits<'_>, step: f32, mean: Option<f32>, residuals: &mut [[u8; 4]]) {
    let [raw_bits] = *raw.planes() else { unreachable!("8 raw bits at most below codes") };
    let length = residuals.len();
    let (codes, raw_bits) = (&codes[..length], &raw_bits[..length]);
    for index in 0..length {
        let code = join_code(i16::from_le_bytes(codes[index]), raw_bits[index].into(), raw.count());
        residuals[index] = dequantize(code as f32, step, mean).to_le_bytes();
    }
}

/// Dequantizes trellis-coded codes with raw bits below them, and leaves the states where the run ends.
#[inline(always)]
pub fn dequantize_trellis(
    codes: &[[u8; 2]],
    raw: &RawBits<'_>,
    (trellis, states): (Trellis, &mut [u16; LANES]),
    step: f32,
    mean: Option<f32>,
    residuals: &mut [[u8; 4]],
) {
    let [raw_bits] = *raw.planes() else { unreachable!("8 raw bits at most below codes") };
    let length = residuals.len();
    for first in (0..length).step_by(LANES) {
        let lanes = LANES.min(length - first);
        let (states, residuals) = (&mut states[..lanes], &mut residuals[first..][..lanes]);
        let (codes, raw_bits) = (&codes[first..][..lanes], &raw_bits[first..][..lanes]);
        for lane in 0..lanes {
            let code = join_code(i16::from_le_bytes(codes[lane]), raw_bits[lane].into(), raw.count());
            let multiple = multiple(code, quantizer_of(states[lane]));
            states[lane] = trellis.next_state(states[lane], multiple);
            residuals[lane] = dequantize(multiple as f32, step, mean).to_le_bytes();
        }
    }
}

#[inline(always)]
fn scale_columns(scales: &[f32], residuals: &mut [[u8; 4]]) {
    let length = residuals.len();
    let scales = &scales[..length];
    for index in 0..length {
        residuals[index] = (f32::from_le_bytes(residuals[index]) * scales[index]).to_le_bytes();
    }
}

/// How weights of a type are stored. A trait and no closures, for the reason above.
trait Weight<const BYTES: usize> {
    fn widen(bytes: [u8; BYTES]) -> f32;
    fn round(value: f32) -> [u8; BYTES];
}

struct Bf16;

impl Weight<2> for Bf16 {
    #[inline(always)]
    fn widen(bytes: [u8; 2]) -> f32 {
        f32_from_bf16(u16::from_le_bytes(bytes))
    }

    #[inline(always)]
    fn round(value: f32) -> [u8; 2] {
        bf16_from_f32(value).to_le_bytes()
    }
}

struct F16;

impl Weight<2> for F16 {
    #[inline(always)]
    fn widen(bytes: [u8; 2]) -> f32 {
        f32_from_f16(u16::from_le_bytes(bytes))
    }

    #[inline(always)]
    fn round(value: f32) -> [u8; 2] {
        f16_from_f32(value).to_le_bytes()
    }
}

struct F32;

impl Weight<4> for F32 {
    #[inline(always)]
    fn widen(bytes: [u8; 4]) -> f32 {
        f32::from_le_bytes(bytes)
    }

    #[inline(always)]
    fn round(value: f32) -> [u8; 4] {
        value.to_le_bytes()
    }
}

#[inline(always)]
fn round_bf16(residuals: &[[u8; 4]], prediction: RunPrediction<'_>, out: &mut [u8]) {
    add_and_round::<2, Bf16>(residuals, prediction, out);
}

#[inline(always)]
fn round_f16(residuals: &[[u8; 4]], prediction: RunPrediction<'_>, out: &mut [u8]) {
    add_and_round::<2, F16>(residuals, prediction, out);
}

#[inline(always)]
fn round_f32(residuals: &[[u8; 4]], prediction: RunPrediction<'_>, out: &mut [u8]) {
    add_and_round::<4, F32>(residuals, prediction, out);
}

#[inline(always)]
fn add_and_round<const BYTES: usize, W: Weight<BYTES>>(
    residuals: &[[u8; 4]],
    prediction: RunPrediction<'_>,
    out: &mut [u8],
) {
    let out = out.as_chunks_mut::<BYTES>().0;
    let length = out.len();
    let residuals = &residuals[..length];
    match prediction {
        RunPrediction::None => {
            for index in 0..length {
                out[index] = W::round(f32::from_le_bytes(residuals[index]));
            }
        }
        // The match on the predictor is outside the loop: inside it, compilers do not vectorize.
        RunPrediction::Elementwise(RunPredictor::ScaledCopy { gain }, reference) => {
            let reference = &reference.as_chunks::<BYTES>().0[..length];
            for index in 0..length {
                out[index] = W::round(f32::from_le_bytes(residuals[index]) + gain * W::widen(reference[index]));
            }
        }
        RunPrediction::Elementwise(RunPredictor::RowAffine { gain, offset }, reference) => {
            let reference = &reference.as_chunks::<BYTES>().0[..length];
            for index in 0..length {
                let predicted = gain * W::widen(reference[index]) + offset;
                out[index] = W::round(f32::from_le_bytes(residuals[index]) + predicted);
            }
        }
        RunPrediction::Values(predicted) => {
            let predicted = &predicted[..length];
            for index in 0..length {
                out[index] = W::round(f32::from_le_bytes(residuals[index]) + f32::from_le_bytes(predicted[index]));
            }
        }
    }
}
