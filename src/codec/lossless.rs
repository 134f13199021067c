//! Bit-exact coding of elements of any type: the upper magnitude bits become a symbol, sign and the bits below stay raw.
//!
//! For bfloat16 with eight raw bits the symbol is the exponent; trained weights spend 2.6 bits on it.
//! A wider type whose values all fit a narrower one is carried as that ([`Carrier`]). Where only some rows do, or end in
//! zeros for another reason, the zero bits of those runs are not stored: a run's raw bits are shifted right by as many.

use crate::format::part::Carrier;
use crate::numerics::{bf16_from_f32, f16_from_f32, f32_from_bf16, f32_from_f16};

/// The symbol and the raw bits of an element `width` bits wide: `raw` is the sign above the `raw_bits - 1` low bits.
///
/// ```
/// # use mcwcfs::codec::lossless::{join_element, split_element};
/// let minus_one_and_a_half = 0xbfc0; // bfloat16
/// assert_eq!(split_element(minus_one_and_a_half, 16, 8), (0x7f, 0b1100_0000));
/// assert_eq!(join_element(0x7f, 0b1100_0000, 16, 8), minus_one_and_a_half);
/// ```
#[inline]
pub fn split_element(element: u64, width: u32, raw_bits: u32) -> (u64, u64) {
    let low_bits = raw_bits - 1;
    let sign = element >> (width - 1) & 1;
    let magnitude = element & ((1 << (width - 1)) - 1);
    (magnitude >> low_bits, sign << low_bits | magnitude & ((1 << low_bits) - 1))
}

/// The element that [`split_element`] took apart. Symbol bits that do not fit the width are dropped.
#[inline]
pub fn join_element(symbol: u64, raw: u64, width: u32, raw_bits: u32) -> u64 {
    let low_bits = raw_bits - 1;
    let magnitude = (symbol << low_bits | raw & ((1 << low_bits) - 1)) & ((1 << (width - 1)) - 1);
    (raw >> low_bits & 1) << (width - 1) | magnitude
}

/// Bits of one element of the carrier, for a tensor whose own elements have `own_bits`.
pub fn carrier_bits(carrier: Carrier, own_bits: u32) -> u32 {
    match carrier {
        Carrier::Own => own_bits,
        Carrier::Bf16 | Carrier::F16 => 16,
    }
}

/// The tensor's element that a carrier element stands for.
#[inline]
pub fn widen(carrier: Carrier, element: u64) -> u64 {
    match carrier {
        Carrier::Own => element,
        Carrier::Bf16 => f32_from_bf16(element as u16).to_bits().into(),
        Carrier::F16 => f32_from_f16(element as u16).to_bits().into(),
    }
}

/// The carrier element of a tensor's element, or `None` if the carrier does not hold it exactly.
#[inline]
pub fn narrow(carrier: Carrier, element: u64) -> Option<u64> {
    let narrowed = match carrier {
        Carrier::Own => return Some(element),
        Carrier::Bf16 => bf16_from_f32(f32::from_bits(element as u32)).into(),
        Carrier::F16 => f16_from_f32(f32::from_bits(element as u32)).into(),
    };
    (widen(carrier, narrowed) == element).then_some(narrowed)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn every_element_comes_back(element: u64, width in prop::sample::select(vec![8_u32, 16, 32, 64]), raw in 1_u32..=56) {
            let element = element & (u64::MAX >> (64 - width));
            let raw_bits = raw.min(width);
            let (symbol, low) = split_element(element, width, raw_bits);
            prop_assert_eq!(join_element(symbol, low, width, raw_bits), element);
        }

        #[test]
        fn what_narrows_widens_to_itself(bits: u32, carrier in prop::sample::select(vec![Carrier::Bf16, Carrier::F16])) {
            for element in [u64::from(bits), u64::from(bits & 0xffff_0000), u64::from(bits & 0xffff_e000)] {
                if let Some(narrowed) = narrow(carrier, element) {
                    prop_assert_eq!(widen(carrier, narrowed), element);
                }
            }
        }
    }

    #[test]
    fn every_finite_f16_narrows() {
        for bits in (0..=u16::MAX).filter(|bits| bits & 0x7c00 != 0x7c00) {
            assert_eq!(narrow(Carrier::F16, widen(Carrier::F16, bits.into())), Some(bits.into()));
        }
    }
}
