//! Differences to a base: symbols joined with raw bits, then put back from their coded order to the elements' own and
//! added to the reference (SPEC.md section 7.7).

use super::raw_bits::RawBits;
use crate::codec::difference::{Bits, CLASSES, join_difference};

/// How many stretches of a strip are put in order side by side: each waits for its own counters only.
const STRETCHES: usize = 4;

/// Joins the symbols of a run with their raw bits.
pub fn join<T: Bits>(symbols: &[[u8; 2]], raw: &RawBits<'_>, zero_bits: u32, out: &mut [u8]) {
    let raw_bits = raw.count() - raw.zeros();
    for (index, (out, &symbol)) in out.chunks_exact_mut(T::BYTES).zip(symbols).enumerate() {
        let below = raw.planes().iter().rev().fold(0, |bits, plane| bits << 8 | u32::from(plane[index]));
        T::truncate(join_difference(i16::from_le_bytes(symbol), below, raw_bits, zero_bits)).write(out);
    }
}

/// [`join`] where nothing lies below the symbols, in place.
pub fn shift_in_place(symbols: &mut [[u8; 2]], zero_bits: u32) {
    for symbol in symbols {
        *symbol = (u16::from_le_bytes(*symbol) << zero_bits).to_le_bytes();
    }
}

/// Writes elements: `reference` has their references, `classes` their classes, and `differences` what they differ by, in
/// coded order.
pub fn merge<T: Bits>(classes: &[u8], differences: &[u8], reference: &[u8], out: &mut [u8]) {
    let length = classes.len();
    let stretch = length.div_ceil(STRETCHES).max(1);
    // Where the next difference of each class lies, by stretch.
    let mut next = [[0_u32; CLASSES]; STRETCHES];
    for (next, classes) in next.iter_mut().zip(classes.chunks(stretch)) {
        for &class in classes {
            next[usize::from(class) % CLASSES] += 1;
        }
    }
    let mut first = 0;
    for class in 0..CLASSES {
        for next in &mut next {
            first += std::mem::replace(&mut next[class], first);
        }
    }
    let mut place = |next: &mut [u32; CLASSES], element: usize| {
        let next = &mut next[usize::from(classes[element]) % CLASSES];
        let difference = T::read(&differences[*next as usize * T::BYTES..][..T::BYTES]);
        *next += 1;
        let bytes = element * T::BYTES..(element + 1) * T::BYTES;
        T::read(&reference[bytes.clone()]).changed_by(difference).write(&mut out[bytes]);
    };
    let [a, b, c, d] = &mut next;
    let of_last = length.saturating_sub((STRETCHES - 1) * stretch);
    for index in 0..of_last {
        place(a, index);
        place(b, stretch + index);
        place(c, 2 * stretch + index);
        place(d, 3 * stretch + index);
    }
    for (number, next) in next.iter_mut().enumerate() {
        for element in number * stretch + of_last..((number + 1) * stretch).min(length) {
            place(next, element);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::codec::difference::coded_order;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn elements_are_their_references_changed_by_what_the_coded_order_gives_them(
            elements in prop::collection::vec((0..CLASSES as u8, any::<u16>(), any::<u16>()), 0..200),
        ) {
            let classes: Vec<u8> = elements.iter().map(|element| element.0).collect();
            let bytes = |numbers: Vec<u16>| -> Vec<u8> { numbers.into_iter().flat_map(u16::to_le_bytes).collect() };
            let reference = bytes(elements.iter().map(|element| element.1).collect());
            let order = coded_order(&classes);
            let differences = bytes(order.iter().map(|&element| elements[element as usize].2).collect());
            let expected = bytes(elements.iter().map(|element| element.1.changed_by(element.2)).collect());
            let mut out = vec![0; expected.len()];
            merge::<u16>(&classes, &differences, &reference, &mut out);
            prop_assert_eq!(out, expected);
        }
    }
}
