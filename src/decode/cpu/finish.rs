//! What follows entropy decoding, run by run while the values are in the first-level cache: raw bits joined, prediction
//! added, rounded (SPEC.md section 7).
//!
//! Every function is written once, as a loop that compilers vectorize, and compiled for every instruction set. All
//! arithmetic is single binary32 operations in the reference decoder's order.

#[cfg(target_arch = "x86_64")]
use super::raw_bits::ByMask;
use super::raw_bits::{ByTable, RawBits, Spread};
use crate::codec::lossless::join_element;
use crate::codec::predictor::RunPredictor;
use crate::codec::quantizer::{dequantize, join_code};
use crate::codec::trellis::{Trellis, multiple, quantizer_of};
use crate::format::strip::LANES;
use crate::numerics::{bf16_from_f32, f16_from_f32, f32_from_bf16, f32_from_f16};

/// A run's prediction: how, and the bytes of its reference elements in order.
pub type RunPrediction<'a> = Option<(RunPredictor, &'a [u8])>;

/// Joins symbols, shifted to their place in the element, with raw bits, in place.
type Join<O> = unsafe fn(raw: &RawBits<'_>, elements: &mut [O]);
/// Turns 16-bit elements into the binary32 they stand for.
type Widen = unsafe fn(elements: &[[u8; 2]], out: &mut [[u8; 4]]);
/// Dequantizes codes with raw bits below them: codes, raw bits, step, mean, binary32 values.
type Dequantize = unsafe fn(&[[u8; 2]], &RawBits<'_>, f32, Option<f32>, &mut [[u8; 4]]);
/// The same for trellis-coded codes; third, the trellis and the states of the lanes.
type DequantizeTrellis =
    unsafe fn(&[[u8; 2]], &RawBits<'_>, (Trellis, &mut [u16; LANES]), f32, Option<f32>, &mut [[u8; 4]]);
/// Adds the prediction to dequantized values and rounds to the element type.
type Round = unsafe fn(residuals: &[[u8; 4]], prediction: RunPrediction<'_>, out: &mut [u8]);

/// One compilation of every function here.
///
/// All are safe to call where the CPU has the instructions of the level.
#[derive(Debug)]
pub struct Kernels {
    /// Magnitude and raw bits of 16-bit elements.
    pub join_16: Join<[u8; 2]>,
    /// Magnitude and raw bits of 32-bit elements.
    pub join_32: Join<[u8; 4]>,
    /// bfloat16 to binary32.
    pub widen_bf16: Widen,
    /// binary16 to binary32.
    pub widen_f16: Widen,
    /// Codes and raw bits to binary32.
    pub dequantize: Dequantize,
    /// Trellis-coded codes and raw bits to binary32.
    pub dequantize_trellis: DequantizeTrellis,
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

            compile_for!(@function join_16::<$spread>(raw: &RawBits<'_>, elements: &mut [[u8; 2]]) $(, $features)?);
            compile_for!(@function join_32::<$spread>(raw: &RawBits<'_>, elements: &mut [[u8; 4]]) $(, $features)?);
            compile_for!(@function widen_bf16(elements: &[[u8; 2]], out: &mut [[u8; 4]]) $(, $features)?);
            compile_for!(@function widen_f16(elements: &[[u8; 2]], out: &mut [[u8; 4]]) $(, $features)?);
            compile_for!(@function dequantize_codes::<$spread>(
                codes: &[[u8; 2]], raw: &RawBits<'_>, step: f32, mean: Option<f32>, residuals: &mut [[u8; 4]]
            ) $(, $features)?);
            compile_for!(@function dequantize_trellis::<$spread>(
                codes: &[[u8; 2]],
                raw: &RawBits<'_>,
                states: (Trellis, &mut [u16; LANES]),
                step: f32,
                mean: Option<f32>,
                residuals: &mut [[u8; 4]]
            ) $(, $features)?);
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
            join_16: $module::join_16,
            join_32: $module::join_32,
            widen_bf16: $module::widen_bf16,
            widen_f16: $module::widen_f16,
            dequantize: $module::dequantize_codes,
            dequantize_trellis: $module::dequantize_trellis,
            round_bf16: $module::round_bf16,
            round_f16: $module::round_f16,
            round_f32: $module::round_f32,
        };
    };
    (@function $name:ident $(::<$spread:ident>)?($($argument:ident: $type:ty),*) $(, $features:literal)?) => {
        $(#[target_feature(enable = $features)])?
        pub(super) unsafe fn $name($($argument: $type),*) {
            super::$name$(::<$spread>)?($($argument),*);
        }
    };
}

compile_for!(PORTABLE, portable, ByTable);
compile_for!(
    #[cfg(target_arch = "x86_64")]
    AVX2,
    avx2,
    ByTable,
    "avx2,bmi1,bmi2,popcnt"
);
compile_for!(
    #[cfg(target_arch = "x86_64")]
    AVX512,
    avx512,
    ByMask,
    "avx512f,avx512bw,avx512vl,avx512vbmi,avx512vbmi2,avx2,bmi1,bmi2,popcnt"
);

#[inline(always)]
fn join_16<S: Spread>(raw: &RawBits<'_>, elements: &mut [[u8; 2]]) {
    if let Some(plane) = raw.only_byte_plane() {
        for (element, &raw) in elements.iter_mut().zip(plane) {
            let sign_and_low = u16::from(raw & 0x80) << 8 | u16::from(raw & 0x7f);
            *element = (u16::from_le_bytes(*element) | sign_and_low).to_le_bytes();
        }
        return;
    }
    let low_bits = raw.count() - 1;
    raw.for_each_vector::<S, _>(|start, raw: &[u16]| {
        for (element, &raw) in elements[start..].iter_mut().zip(raw) {
            let sign_and_low = (raw >> low_bits) << 15 | raw & ((1 << low_bits) - 1);
            *element = (u16::from_le_bytes(*element) | sign_and_low).to_le_bytes();
        }
    });
}

#[inline(always)]
fn join_32<S: Spread>(raw: &RawBits<'_>, elements: &mut [[u8; 4]]) {
    let low_bits = raw.count() - 1;
    raw.for_each_vector::<S, _>(|start, raw: &[u32]| {
        for (element, &raw) in elements[start..].iter_mut().zip(raw) {
            let sign_and_low = (raw >> low_bits) << 31 | raw & ((1 << low_bits) - 1);
            *element = (u32::from_le_bytes(*element) | sign_and_low).to_le_bytes();
        }
    });
}

/// Joins symbols of elements of any width, eight bytes each in `out` or fewer: types that are rare in checkpoints.
pub fn join_any(symbols: &[[u8; 2]], raw: &RawBits<'_>, width: u32, out: &mut [u8]) {
    let (element_bytes, raw_bits) = (width as usize / 8, raw.count());
    raw.for_each_vector::<ByTable, _>(|start, raw: &[u64]| {
        let elements = out[start * element_bytes..].chunks_mut(element_bytes);
        for ((out, symbol), &bits) in elements.zip(&symbols[start..]).zip(raw) {
            let symbol = u16::from_le_bytes(*symbol).into();
            let element = join_element(symbol, bits, width, raw_bits);
            out.copy_from_slice(&element.to_le_bytes()[..element_bytes]);
        }
    });
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
fn dequantize_codes<S: Spread>(
    codes: &[[u8; 2]],
    raw: &RawBits<'_>,
    step: f32,
    mean: Option<f32>,
    residuals: &mut [[u8; 4]],
) {
    let raw_bits = raw.count();
    raw.for_each_vector::<S, _>(|start, raw: &[u16]| {
        let run = residuals[start..].iter_mut().zip(&codes[start..]);
        for ((residual, &code), &raw) in run.zip(raw) {
            let point = join_code(i16::from_le_bytes(code), raw.into(), raw_bits) as f32;
            *residual = dequantize(point, step, mean).to_le_bytes();
        }
    });
}

#[inline(always)]
fn dequantize_trellis<S: Spread>(
    codes: &[[u8; 2]],
    raw: &RawBits<'_>,
    (trellis, states): (Trellis, &mut [u16; LANES]),
    step: f32,
    mean: Option<f32>,
    residuals: &mut [[u8; 4]],
) {
    let raw_bits = raw.count();
    raw.for_each_vector::<S, _>(|start, raw: &[u16]| {
        let lanes = states.iter_mut().zip(&mut residuals[start..]).zip(&codes[start..]);
        for (((state, residual), &code), &raw) in lanes.zip(raw) {
            let code = join_code(i16::from_le_bytes(code), raw.into(), raw_bits);
            let multiple = multiple(code, quantizer_of(*state));
            *state = trellis.next_state(*state, multiple);
            *residual = dequantize(multiple as f32, step, mean).to_le_bytes();
        }
    });
}

#[inline(always)]
fn round_bf16(residuals: &[[u8; 4]], prediction: RunPrediction<'_>, out: &mut [u8]) {
    let widen = |bytes| f32_from_bf16(u16::from_le_bytes(bytes));
    add_and_round(residuals, prediction, out, widen, |value| bf16_from_f32(value).to_le_bytes());
}

#[inline(always)]
fn round_f16(residuals: &[[u8; 4]], prediction: RunPrediction<'_>, out: &mut [u8]) {
    let widen = |bytes| f32_from_f16(u16::from_le_bytes(bytes));
    add_and_round(residuals, prediction, out, widen, |value| f16_from_f32(value).to_le_bytes());
}

#[inline(always)]
fn round_f32(residuals: &[[u8; 4]], prediction: RunPrediction<'_>, out: &mut [u8]) {
    add_and_round(residuals, prediction, out, f32::from_le_bytes, f32::to_le_bytes);
}

#[inline(always)]
fn add_and_round<const BYTES: usize>(
    residuals: &[[u8; 4]],
    prediction: RunPrediction<'_>,
    out: &mut [u8],
    widen: impl Fn([u8; BYTES]) -> f32,
    round: impl Fn(f32) -> [u8; BYTES],
) {
    let out = out.as_chunks_mut::<BYTES>().0.iter_mut().zip(residuals);
    match prediction {
        None => {
            for (out, &residual) in out {
                *out = round(f32::from_le_bytes(residual));
            }
        }
        // The match on the predictor is outside the loop: inside it, compilers do not vectorize.
        Some((RunPredictor::ScaledCopy { gain }, reference)) => {
            for ((out, &residual), &reference) in out.zip(reference.as_chunks::<BYTES>().0) {
                *out = round(f32::from_le_bytes(residual) + gain * widen(reference));
            }
        }
        Some((RunPredictor::RowAffine { gain, offset }, reference)) => {
            for ((out, &residual), &reference) in out.zip(reference.as_chunks::<BYTES>().0) {
                *out = round(f32::from_le_bytes(residual) + (gain * widen(reference) + offset));
            }
        }
    }
}
