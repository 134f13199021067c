//! Differences to a base: symbols joined with raw bits, then put back from their coded order to the elements' own and
//! added to the reference (SPEC.md section 7.7).

use super::raw_bits::RawBits;
use crate::codec::difference::{Bits, CLASSES, Classes, join_difference};
use crate::codec::low_rank::LowRank;
use crate::tensor::Dtype;

/// How many stretches of a strip are put in order side by side: each waits for its own counters only. With eight an element
/// takes half the time that it takes with four.
const STRETCHES: usize = 8;

/// Bytes that must follow differences, so that a vector of them can be loaded anywhere.
pub const PADDING: usize = 64;

/// Puts differences in coded order back into the elements' own and adds them to their references: the classes, the number
/// of the first element in the tensor, the references, the differences with [`PADDING`] behind them, the elements. Room for the
/// classes comes with them.
pub type Add = unsafe fn(&Classes, usize, &[u8], &[u8], &mut [u8], &mut Vec<u8>);

/// [`LowRank::add`].
pub type AddProduct = unsafe fn(&LowRank, &Dtype, usize, &mut [u8]);

/// One compilation of what is done with every element.
///
/// All are safe to call where the CPU has the instructions of the level.
#[derive(Debug)]
pub struct Kernels {
    /// For elements of 16 bits.
    pub add_16: Add,
    /// For products.
    pub add_product: AddProduct,
}

impl Kernels {
    /// What adds a product.
    pub fn add_product(&self) -> impl FnOnce(&LowRank, &Dtype, usize, &mut [u8]) {
        let add = self.add_product;
        // SAFETY: whoever chose the kernels made sure that the CPU has their instructions.
        move |product, dtype, first_element, elements| unsafe { add(product, dtype, first_element, elements) }
    }
}

/// For any CPU.
pub const PORTABLE: Kernels = Kernels { add_16: add::<u16>, add_product: LowRank::add };

/// With AVX2.
#[cfg(target_arch = "x86_64")]
pub const AVX2: Kernels = Kernels { add_16: x86_64::add_16_avx2, add_product: x86_64::add_product_avx2 };

/// With AVX-512.
#[cfg(target_arch = "x86_64")]
pub const AVX512: Kernels = Kernels { add_16: x86_64::add_16_avx512, add_product: x86_64::add_product_avx2 };

/// [`Kernels::add_16`] for elements of any width, on any CPU.
#[inline(always)]
pub fn add<T: Bits>(
    rule: &Classes,
    first_element: usize,
    predicted: &[u8],
    differences: &[u8],
    out: &mut [u8],
    classes: &mut Vec<u8>,
) {
    rule.of::<T>(first_element, predicted, classes);
    merge::<T>(classes, differences, predicted, out);
}

#[cfg(target_arch = "x86_64")]
mod x86_64 {
    use core::arch::x86_64::*;

    use super::{Classes, PADDING, STRETCHES, add, merge, places};
    use crate::codec::difference::{Bits, CLASSES};
    use crate::codec::low_rank::LowRank;
    use crate::tensor::Dtype;

    /// Elements of a vector.
    const VECTOR: usize = 32;
    /// Classes of a strip above which one element after the other is faster.
    const MOST_CLASSES: usize = 24;

    /// # Safety
    /// The CPU has AVX2.
    #[target_feature(enable = "avx2,bmi1,bmi2,popcnt")]
    pub unsafe fn add_16_avx2(
        rule: &Classes,
        first: usize,
        predicted: &[u8],
        differences: &[u8],
        out: &mut [u8],
        classes: &mut Vec<u8>,
    ) {
        add::<u16>(rule, first, predicted, differences, out, classes);
    }

    /// # Safety
    /// The CPU has AVX2.
    #[target_feature(enable = "avx2")]
    pub unsafe fn add_product_avx2(product: &LowRank, dtype: &Dtype, first: usize, elements: &mut [u8]) {
        product.add(dtype, first, elements);
    }

    /// # Safety
    /// The CPU has AVX-512 F, BW, VL, VBMI and VBMI2.
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vbmi,avx512vbmi2,avx2,bmi1,bmi2,popcnt")]
    pub unsafe fn add_16_avx512(
        rule: &Classes,
        first: usize,
        predicted: &[u8],
        differences: &[u8],
        out: &mut [u8],
        classes: &mut Vec<u8>,
    ) {
        rule.of::<u16>(first, predicted, classes);
        // Class, and where its next difference lies.
        let [places, ..] = places(classes, classes.len().div_ceil(STRETCHES).max(1));
        let mut next: Vec<(u8, usize)> = Vec::with_capacity(CLASSES);
        for (class, &place) in places.iter().enumerate() {
            let end = places.get(class + 1).map_or(classes.len(), |&next| next as usize);
            if end > place as usize {
                next.push((class as u8, place as usize));
            }
        }
        if next.len() > MOST_CLASSES {
            merge::<u16>(classes, differences, predicted, out);
            return;
        }
        assert!(differences.len() >= 2 * classes.len() + PADDING, "a vector can be loaded from any difference on");
        assert!(predicted.len() >= 2 * classes.len() && out.len() >= 2 * classes.len(), "bytes of every element");
        let magnitude = _mm512_set1_epi16(0x7fff);
        let whole = classes.len() / VECTOR * VECTOR;
        for element in (0..whole).step_by(VECTOR) {
            // SAFETY: 32 classes and 64 bytes of references are left from `element` on.
            let (of_elements, references) = unsafe {
                (
                    _mm256_loadu_si256(classes.as_ptr().add(element).cast()),
                    _mm512_loadu_si512(predicted.as_ptr().add(2 * element).cast()),
                )
            };
            let mut changes = _mm512_setzero_si512();
            for (class, place) in &mut next {
                let mask = _mm256_cmpeq_epi8_mask(of_elements, _mm256_set1_epi8(*class as i8));
                // SAFETY: `place` is at most the number of elements, and `PADDING` bytes follow their differences.
                let differences = unsafe { _mm512_loadu_si512(differences.as_ptr().add(2 * *place).cast()) };
                changes = _mm512_mask_expand_epi16(changes, mask, differences);
                *place += mask.count_ones() as usize;
            }
            let sign = _mm512_srai_epi16::<15>(references);
            let ordered = _mm512_xor_si512(references, _mm512_and_si512(sign, magnitude));
            let changes = _mm512_sub_epi16(_mm512_xor_si512(changes, sign), sign);
            let sum = _mm512_add_epi16(ordered, changes);
            let elements = _mm512_xor_si512(sum, _mm512_and_si512(_mm512_srai_epi16::<15>(sum), magnitude));
            // SAFETY: 64 bytes of elements are left from `element` on.
            unsafe { _mm512_storeu_si512(out.as_mut_ptr().add(2 * element).cast(), elements) }
        }
        for (element, class) in classes.iter().enumerate().skip(whole) {
            let (_, place) = next.iter_mut().find(|(other, _)| other == class).expect("it was counted");
            let difference = u16::read(&differences[2 * *place..][..2]);
            *place += 1;
            let bytes = 2 * element..2 * element + 2;
            u16::read(&predicted[bytes.clone()]).changed_by(difference).write(&mut out[bytes]);
        }
    }
}

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

/// How many of the elements of each class come before those of a stretch of the strip, by stretch and class, and in each
/// class's place the number of all elements of classes before it.
#[inline(always)]
fn places(classes: &[u8], stretch: usize) -> [[u32; CLASSES]; STRETCHES] {
    let mut next = [[0_u32; CLASSES]; STRETCHES];
    let of_last = classes.len().saturating_sub((STRETCHES - 1) * stretch);
    // Side by side: neighbours are often of one class, and its counter is not there again at once.
    for index in 0..of_last {
        for (number, next) in next.iter_mut().enumerate() {
            next[usize::from(classes[number * stretch + index]) % CLASSES] += 1;
        }
    }
    for (number, next) in next.iter_mut().enumerate() {
        let rest = (number * stretch + of_last).min(classes.len())..((number + 1) * stretch).min(classes.len());
        for &class in &classes[rest] {
            next[usize::from(class) % CLASSES] += 1;
        }
    }
    let mut first = 0;
    for class in 0..CLASSES {
        for next in &mut next {
            first += std::mem::replace(&mut next[class], first);
        }
    }
    next
}

/// Writes elements: `reference` has their references, `classes` their classes, and `differences` what they differ by, in
/// coded order.
#[inline(always)]
fn merge<T: Bits>(classes: &[u8], differences: &[u8], reference: &[u8], out: &mut [u8]) {
    let length = classes.len();
    let (differences, reference, out) = (T::chunks(differences), T::chunks(reference), T::chunks_mut(out));
    let (differences, reference, out) = (&differences[..length], &reference[..length], &mut out[..length]);
    let stretch = length.div_ceil(STRETCHES).max(1);
    let mut next = places(classes, stretch);
    // First every difference to its element, then all of them added at once: that is a loop for vectors.
    let of_last = length.saturating_sub((STRETCHES - 1) * stretch);
    for index in 0..of_last {
        for (number, next) in next.iter_mut().enumerate() {
            place(next, classes, differences, out, number * stretch + index);
        }
    }
    for (number, next) in next.iter_mut().enumerate() {
        for element in number * stretch + of_last..((number + 1) * stretch).min(length) {
            place(next, classes, differences, out, element);
        }
    }
    for index in 0..length {
        out[index] = T::from_raw(reference[index]).changed_by(T::from_raw(out[index])).raw();
    }
}

/// Gives an element the next difference of its class.
#[inline(always)]
fn place<R: Copy + Default>(
    next: &mut [u32; CLASSES],
    classes: &[u8],
    differences: &[R],
    out: &mut [R],
    element: usize,
) {
    let next = &mut next[usize::from(classes[element]) % CLASSES];
    out[element] = differences.get(*next as usize).copied().unwrap_or_default();
    *next += 1;
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

        #[test]
        fn every_level_adds_alike(
            elements in prop::collection::vec((any::<u16>(), any::<u16>()), 0..300),
            shift in 0..16_u32,
            offset in 0..300,
        ) {
            let rule = Classes { shift, row_elements: 7, offsets: crate::codec::integers::Integers::Constant(offset) };
            let bytes = |numbers: Vec<u16>| -> Vec<u8> { numbers.into_iter().flat_map(u16::to_le_bytes).collect() };
            let reference = bytes(elements.iter().map(|element| element.0).collect());
            let mut differences = bytes(elements.iter().map(|element| element.1).collect());
            differences.resize(differences.len() + PADDING, 0xa5);
            let mut expected = vec![0; reference.len()];
            add::<u16>(&rule, 3, &reference, &differences, &mut expected, &mut Vec::new());
            for engine in crate::decode::select::cpu_engines() {
                let level = engine.kernels;
                let mut out = vec![0; reference.len()];
                // SAFETY: the CPU has the instructions of these levels.
                unsafe { (level.differences.add_16)(&rule, 3, &reference, &differences, &mut out, &mut Vec::new()) }
                prop_assert_eq!(&out, &expected, "{}", level.name);
            }
        }
    }
}
