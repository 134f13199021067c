//! Bit-exact conversions between element types that every engine repeats (SPEC.md section 7).
//!
//! All arithmetic of the format is single IEEE 754 binary32 operations, rounded to nearest, ties to even, never fused.
//! Rust guarantees that for `f32` operators; the conversions are spelled out here.

/// binary32 to bfloat16, nearest, ties to even. NaN keeps sign and upper payload and becomes quiet.
#[inline]
pub fn bf16_from_f32(value: f32) -> u16 {
    let bits = value.to_bits();
    if value.is_nan() {
        return (bits >> 16) as u16 | 0x40;
    }
    // The sum carries into the exponent where it must, up to infinity.
    (bits.wrapping_add(0x7fff + ((bits >> 16) & 1)) >> 16) as u16
}

/// bfloat16 to binary32, exactly.
#[inline]
pub fn f32_from_bf16(bits: u16) -> f32 {
    f32::from_bits(u32::from(bits) << 16)
}

/// binary32 to binary16, nearest, ties to even, denormals included. NaN keeps sign and upper payload and becomes quiet.
#[inline]
pub fn f16_from_f32(value: f32) -> u16 {
    let bits = value.to_bits();
    let sign = (bits >> 16) as u16 & 0x8000;
    let magnitude = bits & 0x7fff_ffff;
    if magnitude > 0x7f80_0000 {
        return sign | 0x7e00 | (magnitude >> 13) as u16 & 0x01ff;
    }
    if magnitude >= 0x477f_f000 {
        return sign | 0x7c00; // 65520 and more round to infinity
    }
    if magnitude >= 0x3880_0000 {
        // A normal number: round away 13 bits, then move the exponent's bias from 127 to 15.
        let rounded = magnitude + 0x0fff + ((magnitude >> 13) & 1);
        return sign | ((rounded - 0x3800_0000) >> 13) as u16;
    }
    // A denormal: adding 0.5 leaves the value in units of 2^-24 in the low mantissa bits, rounded by the addition.
    let shifted = f32::from_bits(magnitude) + 0.5;
    sign | (shifted.to_bits() - 0.5_f32.to_bits()) as u16
}

/// binary16 to binary32, exactly; NaN payloads move up unchanged.
#[inline]
pub fn f32_from_f16(bits: u16) -> f32 {
    let sign = u32::from(bits & 0x8000) << 16;
    let exponent = u32::from(bits >> 10) & 0x1f;
    let mantissa = u32::from(bits & 0x3ff);
    let magnitude = match exponent {
        0 => (mantissa as f32 * f32::from_bits(0x3380_0000)).to_bits(), // times 2^-24: exact
        31 => 0x7f80_0000 | mantissa << 13,
        _ => (exponent + 112) << 23 | mantissa << 13,
    };
    f32::from_bits(sign | magnitude)
}

/// The nearest integer, ties to even, of a value smaller than 2^21: one addition, which compilers turn into vector
/// instructions on every CPU.
#[inline(always)]
pub fn nearest_integer(value: f32) -> i32 {
    // Adding 1.5 * 2^23 leaves the integer in the low mantissa bits, rounded by the addition.
    const MAGIC: f32 = 12_582_912.0;
    (value + MAGIC).to_bits().wrapping_sub(MAGIC.to_bits()) as i32
}

#[cfg(test)]
mod tests {
    use super::*;
    use half::{bf16, f16};
    use proptest::prelude::*;

    #[test]
    fn every_16_bit_value_survives_the_way_up_and_down() {
        for bits in 0..=u16::MAX {
            let up = f32_from_bf16(bits);
            assert_eq!(up.to_bits(), bf16::from_bits(bits).to_f32().to_bits() & !0x40_0000 | up.to_bits() & 0x40_0000);
            if !up.is_nan() {
                assert_eq!(bf16_from_f32(up), bits);
            }
            let up = f32_from_f16(bits);
            if up.is_nan() {
                assert_eq!(up.to_bits() >> 13 & 0x3ff, u32::from(bits) & 0x3ff);
            } else {
                assert_eq!(up.to_bits(), f16::from_bits(bits).to_f32_const().to_bits(), "{bits:#x}");
                assert_eq!(f16_from_f32(up), bits);
            }
        }
    }

    #[test]
    fn ties_go_to_even_and_overflow_to_infinity() {
        assert_eq!(bf16_from_f32(f32::from_bits(0x3f80_8000)), 0x3f80);
        assert_eq!(bf16_from_f32(f32::from_bits(0x3f81_8000)), 0x3f82);
        assert_eq!(bf16_from_f32(f32::MAX), 0x7f80);
        assert_eq!(f16_from_f32(65519.996), 0x7bff);
        assert_eq!(f16_from_f32(65520.0), 0x7c00);
        assert_eq!(f16_from_f32(f32::from_bits(0x3300_0000)), 0, "half the least denormal is a tie with zero");
        assert_eq!(f16_from_f32(f32::from_bits(0x3300_0001)), 1);
    }

    proptest! {
        #[test]
        fn the_nearest_integer_is_that_of_the_standard_library(value in -2_097_151.0_f32..2_097_151.0, half in -99..99_i32) {
            prop_assert_eq!(nearest_integer(value), value.round_ties_even() as i32);
            let tie = half as f32 + 0.5;
            prop_assert_eq!(nearest_integer(tie), tie.round_ties_even() as i32);
        }

        #[test]
        fn rounding_agrees_with_the_half_crate(bits: u32) {
            let value = f32::from_bits(bits);
            prop_assert_eq!(bf16_from_f32(value), bf16::from_f32(value).to_bits());
            prop_assert_eq!(f16_from_f32(value), f16::from_f32_const(value).to_bits());
        }

        #[test]
        fn rounding_near_the_f16_range_agrees_with_the_half_crate(bits in 0x3200_0000_u32..0x4800_0000, sign: bool) {
            let value = f32::from_bits(bits | u32::from(sign) << 31);
            prop_assert_eq!(f16_from_f32(value), f16::from_f32_const(value).to_bits());
        }
    }
}
