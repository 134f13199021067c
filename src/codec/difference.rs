//! Bit-exact differences to a reference: the weights of a fine-tuned variant less those of its base (Appendix J's many
//! variants of one model; SPEC.md section 7.7).
//!
//! Bit patterns are taken as integers in the order of the numbers they stand for, so that a small change of a weight is a
//! small integer whatever its exponent. How large changes are, counted in such integers, depends on the reference's
//! magnitude above all. So the elements of a strip are coded class by class: those with small references first. The
//! reference is known before the first symbol is decoded, so the order costs nothing, and runs keep one table each.

use crate::codec::integers::Integers;

/// Classes of elements.
pub const CLASSES: usize = 64;

/// An element as an unsigned integer of its width.
pub trait Bits: Copy {
    /// Bytes of an element.
    const BYTES: usize;
    /// Its bytes, little-endian.
    type Raw: Copy + Default;
    /// Bytes as elements; a rest that is no whole element is left out.
    fn chunks(bytes: &[u8]) -> &[Self::Raw];
    /// The same, to be written.
    fn chunks_mut(bytes: &mut [u8]) -> &mut [Self::Raw];
    /// From its bytes.
    fn from_raw(raw: Self::Raw) -> Self;
    /// To its bytes.
    fn raw(self) -> Self::Raw;
    /// From little-endian bytes, as many as there are.
    fn read(bytes: &[u8]) -> Self;
    /// To little-endian bytes.
    fn write(self, bytes: &mut [u8]);
    /// The low bits of a number.
    fn truncate(number: u32) -> Self;
    /// All bits below the top one.
    fn magnitude(self) -> u32;
    /// The element that differs from `self` by `difference`; undoes [`Bits::difference`].
    fn changed_by(self, difference: Self) -> Self;
    /// How far `element` is from `self`, counted away from zero: a larger magnitude is a positive difference.
    fn difference(self, element: Self) -> Self;
    /// The number as a signed one.
    fn signed(self) -> i32;
}

macro_rules! bits {
    ($unsigned:ty, $signed:ty) => {
        impl Bits for $unsigned {
            const BYTES: usize = size_of::<Self>();
            type Raw = [u8; size_of::<Self>()];

            #[inline(always)]
            fn chunks(bytes: &[u8]) -> &[Self::Raw] {
                bytes.as_chunks().0
            }

            #[inline(always)]
            fn chunks_mut(bytes: &mut [u8]) -> &mut [Self::Raw] {
                bytes.as_chunks_mut().0
            }

            #[inline(always)]
            fn from_raw(raw: Self::Raw) -> Self {
                Self::from_le_bytes(raw)
            }

            #[inline(always)]
            fn raw(self) -> Self::Raw {
                self.to_le_bytes()
            }

            #[inline(always)]
            fn read(bytes: &[u8]) -> Self {
                Self::from_le_bytes(bytes.try_into().expect("the bytes of one element"))
            }

            #[inline(always)]
            fn write(self, bytes: &mut [u8]) {
                bytes.copy_from_slice(&self.to_le_bytes());
            }

            #[inline(always)]
            fn truncate(number: u32) -> Self {
                number as Self
            }

            #[inline(always)]
            fn magnitude(self) -> u32 {
                u32::from(self & (Self::MAX >> 1))
            }

            #[inline(always)]
            fn changed_by(self, difference: Self) -> Self {
                let sign = (self as $signed >> (Self::BITS - 1)) as Self; // all ones where the top bit is set
                ordered(self.ordered().wrapping_add((difference ^ sign).wrapping_sub(sign)))
            }

            #[inline(always)]
            fn difference(self, element: Self) -> Self {
                let sign = (self as $signed >> (Self::BITS - 1)) as Self;
                (element.ordered().wrapping_sub(self.ordered()) ^ sign).wrapping_sub(sign)
            }

            #[inline(always)]
            fn signed(self) -> i32 {
                i32::from(self as $signed)
            }
        }

        impl Ordered for $unsigned {
            #[inline(always)]
            fn ordered(self) -> Self {
                let sign = (self as $signed >> (Self::BITS - 1)) as Self;
                self ^ (sign & (Self::MAX >> 1))
            }
        }
    };
}

/// Sign and magnitude to two's complement, -0 below 0; its own inverse.
trait Ordered {
    fn ordered(self) -> Self;
}

#[inline(always)]
fn ordered<T: Ordered>(bits: T) -> T {
    bits.ordered()
}

bits!(u8, i8);
bits!(u16, i16);
bits!(u32, i32);

/// A difference from its symbol and the `raw_bits` raw bits below it, less its `zero_bits` common zero bits.
#[inline(always)]
pub fn join_difference(symbol: i16, raw: u32, raw_bits: u32, zero_bits: u32) -> u32 {
    // In 64 bits: 32 raw bits leave none for the symbol.
    (((i64::from(symbol) << raw_bits | i64::from(raw)) << zero_bits) & i64::from(u32::MAX)) as u32
}

/// How elements are put into classes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Classes {
    /// Low magnitude bits of the reference that do not matter.
    pub shift: u32,
    /// Consecutive elements of the tensor that share an offset.
    pub row_elements: usize,
    /// For each such row, what is taken off.
    pub offsets: Integers,
}

impl Classes {
    /// Puts the classes of consecutive elements into `classes`: `reference` is their references' bytes, `first_element` the
    /// number of the first in the tensor.
    #[inline(always)] // so that it is compiled for the instructions of who calls it
    pub fn of<T: Bits>(&self, first_element: usize, reference: &[u8], classes: &mut Vec<u8>) {
        let reference = T::chunks(reference);
        let elements = reference.len();
        classes.clear();
        classes.resize(elements, 0);
        let mut start = 0;
        while start < elements {
            let row = (first_element + start) / self.row_elements;
            let end = ((row + 1) * self.row_elements - first_element).min(elements);
            let (shift, offset) = (self.shift, self.offsets.get(row));
            let (classes, references) = (&mut classes[start..end], &reference[start..end]);
            for index in 0..classes.len() {
                classes[index] = class_of(T::from_raw(references[index]).magnitude(), shift, offset);
            }
            start = end;
        }
    }
}

/// The class of an element whose reference has this magnitude, as an unsigned integer. Offsets are not negative.
#[inline(always)]
pub fn class_of(magnitude: u32, shift: u32, offset: i32) -> u8 {
    ((magnitude >> shift) as i32 - offset).clamp(0, CLASSES as i32 - 1) as u8
}

/// The order in which elements of these classes are coded: by class, and within one as they come.
///
/// ```
/// # use mcwcfs::codec::difference::coded_order;
/// assert_eq!(coded_order(&[2, 0, 2, 1]), [1, 3, 0, 2]);
/// ```
pub fn coded_order(classes: &[u8]) -> Vec<u32> {
    let mut next = first_places(classes);
    let mut order = vec![0; classes.len()];
    for (element, &class) in classes.iter().enumerate() {
        let place = &mut next[usize::from(class)];
        order[*place as usize] = element as u32;
        *place += 1;
    }
    order
}

/// Where in the coded order the elements of each class begin.
pub fn first_places(classes: &[u8]) -> [u32; CLASSES] {
    // Several tallies: neighbours of one class, as most are, need not wait for one another.
    let mut tallies = [[0; CLASSES]; 4];
    let (fours, rest) = classes.as_chunks::<4>();
    for classes in fours {
        for (tally, &class) in tallies.iter_mut().zip(classes) {
            tally[usize::from(class)] += 1;
        }
    }
    rest.iter().for_each(|&class| tallies[0][usize::from(class)] += 1);
    let mut first = 0;
    std::array::from_fn(|class| {
        let elements: u32 = tallies.iter().map(|tally| tally[class]).sum();
        first += elements;
        first - elements
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn check<T: Bits + PartialEq + std::fmt::Debug>(reference: T, element: T) {
        assert_eq!(reference.changed_by(reference.difference(element)), element);
    }

    #[test]
    fn every_pair_of_bytes_comes_back() {
        for reference in 0..=u8::MAX {
            (0..=u8::MAX).for_each(|element| check(reference, element));
        }
    }

    #[test]
    fn a_larger_magnitude_is_a_positive_difference_on_both_sides_of_zero() {
        assert_eq!((0x3f80_u16.difference(0x3f81), 0xbf80_u16.difference(0xbf81)), (1, 1));
        assert_eq!(0x0000_u16.difference(0x8000).signed(), -1, "minus zero is next to zero");
    }

    proptest! {
        #[test]
        fn every_element_comes_back(narrow: (u16, u16), wide: (u32, u32)) {
            check(narrow.0, narrow.1);
            check(wide.0, wide.1);
        }

        #[test]
        fn a_difference_is_its_symbol_and_its_raw_bits(difference: i32, raw_bits in 16_u32..=24) {
            let symbol = i16::try_from(difference >> raw_bits).expect("16 bits are left");
            let raw = difference as u32 & ((1 << raw_bits) - 1);
            prop_assert_eq!(join_difference(symbol, raw, raw_bits, 0), difference as u32);
        }

        #[test]
        fn the_coded_order_is_a_stable_sort(classes in prop::collection::vec(0..CLASSES as u8, 0..300)) {
            let mut sorted: Vec<u32> = (0..classes.len() as u32).collect();
            sorted.sort_by_key(|&element| classes[element as usize]);
            prop_assert_eq!(coded_order(&classes), sorted);
        }

        #[test]
        fn classes_do_not_depend_on_where_a_strip_begins(
            references: Vec<u16>,
            row_elements in 1_usize..9,
            cut: prop::sample::Index,
        ) {
            let bytes: Vec<u8> = references.iter().flat_map(|reference| reference.to_le_bytes()).collect();
            let rows = references.len().div_ceil(row_elements);
            let offsets = Integers::Each((0..rows).map(|row| row as i32 % 5 * 30).collect());
            let rule = Classes { shift: 7, row_elements, offsets };
            let (mut whole, mut head, mut tail) = (Vec::new(), Vec::new(), Vec::new());
            rule.of::<u16>(0, &bytes, &mut whole);
            let cut = cut.index(references.len() + 1);
            rule.of::<u16>(0, &bytes[..2 * cut], &mut head);
            rule.of::<u16>(cut, &bytes[2 * cut..], &mut tail);
            prop_assert_eq!([head, tail].concat(), whole);
        }
    }
}
