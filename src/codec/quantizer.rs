//! Scalar quantizer of residuals and keyframe values (section 6.1, Appendix E.4), both directions.
//!
//! One step serves a part, optionally times a multiplier per run; a mean per run is optional. Choosing step, scales and
//! reconstruction points is the encoder's business: see `pack::quantize`.

/// Bounds of a run's scale integer: multipliers from 2^-100 to nearly 2^101.
pub const SCALE_RANGE: (i32, i32) = (-800, 807);

/// The multiplier that a run's scale integer stands for: an eighth of an octave apart, `(8 + q mod 8) / 8 * 2^(q div 8)`.
///
/// Exact in binary32. `scale` must lie in [`SCALE_RANGE`].
///
/// ```
/// # use mcwcfs::codec::quantizer::scale_multiplier;
/// assert_eq!(scale_multiplier(0), 1.0);
/// assert_eq!(scale_multiplier(12), 3.0);
/// assert_eq!(scale_multiplier(-8), 0.5);
/// ```
pub fn scale_multiplier(scale: i32) -> f32 {
    assert!((SCALE_RANGE.0..=SCALE_RANGE.1).contains(&scale), "scale integers are checked when a part is prepared");
    let exponent = scale.div_euclid(8);
    let mantissa = scale.rem_euclid(8) as u32;
    f32::from_bits(((127 + exponent) as u32) << 23 | mantissa << 20)
}

/// The nearest code of a residual, ties to even (section 6.1): `round((value - mean) / step)`.
///
/// The paper leaves ties open; half to even is one instruction on x86, NEON and CUDA alike.
///
/// ```
/// # use mcwcfs::codec::quantizer::{dequantize, quantize};
/// assert_eq!(quantize(0.74, 0.5, 0.0), 1);
/// assert_eq!(dequantize(1.0, 0.5, None), 0.5);
/// ```
#[inline]
pub fn quantize(value: f32, step: f32, mean: f32) -> i32 {
    ((value - mean) / step).round_ties_even() as i32
}

/// Turns a reconstruction point back into a weight or residual: `point * step [+ mean]` (Eq. 63).
///
/// Two roundings, never fused: the format says so. An absent mean is not added, so that a negative zero survives.
#[inline]
pub fn dequantize(point: f32, step: f32, mean: Option<f32>) -> f32 {
    let value = point * step;
    match mean {
        Some(mean) => value + mean,
        None => value,
    }
}

/// The code made of a coded symbol and the raw bits below it.
#[inline]
pub fn join_code(symbol: i16, raw: u32, raw_bits: u32) -> i32 {
    (i32::from(symbol) << raw_bits) | raw as i32
}

/// The coded symbol and the raw bits of a code; the symbol is rounded down.
#[inline]
pub fn split_code(code: i32, raw_bits: u32) -> (i32, u32) {
    (code >> raw_bits, code as u32 & ((1 << raw_bits) - 1))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn a_code_is_its_symbol_and_its_raw_bits(code in -30_000_i32..30_000, raw_bits in 0_u32..=8) {
            let (symbol, raw) = split_code(code, raw_bits);
            prop_assert_eq!(join_code(symbol as i16, raw, raw_bits), code);
        }

        #[test]
        fn the_error_is_at_most_half_a_step(value in -100.0_f32..100.0, step in 0.01_f32..10.0) {
            let code = quantize(value, step, 0.0);
            let error = (dequantize(code as f32, step, None) - value).abs();
            prop_assert!(error <= step * 0.501 + 1e-5, "{error}");
        }
    }

    #[test]
    fn multipliers_grow_and_double_every_eight() {
        for scale in SCALE_RANGE.0..SCALE_RANGE.1 {
            assert!(scale_multiplier(scale) < scale_multiplier(scale + 1));
        }
        assert_eq!(scale_multiplier(SCALE_RANGE.0), 2.0_f32.powi(-100));
    }
}
