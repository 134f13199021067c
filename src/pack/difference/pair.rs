//! A tensor beside what it starts from: how far the two are apart, and what every choice of parameters begins with.

use rayon::prelude::*;

use super::super::low_rank::{Work, run};
use crate::codec::difference::Bits;
use crate::numerics::{f32_from_bf16, f32_from_f16};
use crate::tensor::{Dtype, TensorInfo};

/// Of the differences, so many need not be multiples of the common zero bits: they become exceptions.
const UNEVEN: usize = 2000;

/// A tensor beside what it starts from.
#[derive(Clone, Copy, Debug)]
pub struct Pair<'a> {
    /// The tensor.
    pub tensor: &'a TensorInfo,
    /// Its bytes.
    pub bytes: &'a [u8],
    /// What its elements start from, as many bytes.
    pub predicted: &'a [u8],
}

/// What all choices of parameters begin with, found out once.
#[derive(Clone, Debug, Default)]
pub(super) struct Facts {
    /// The largest magnitude of what elements start from, as an unsigned integer.
    pub highest: u32,
    /// By row, octaves of the root mean square change; `None` where nothing changed. Empty where classes do not follow rows.
    pub row_octaves: Vec<Option<f64>>,
}

/// Elements spread over a tensor, about so many, as integers in the order of the numbers.
pub fn spread_elements(tensor: &TensorInfo, bytes: &[u8], count: usize) -> Vec<f64> {
    let width = tensor.dtype.bits().unwrap_or(8) as usize / 8;
    let elements = bytes.len() / width.max(1);
    let value = |bytes: &[u8], element: usize| -> f64 {
        let mut number = [0; 8];
        number[..width].copy_from_slice(&bytes[element * width..][..width]);
        let number = u64::from_le_bytes(number);
        let magnitude = number & (u64::MAX >> (65 - 8 * width));
        if number >> (8 * width - 1) == 1 { -(magnitude as f64) } else { magnitude as f64 }
    };
    (0..elements).step_by((elements / count).max(1)).map(|element| value(bytes, element)).collect()
}

/// Mean distance of elements to others in units of their own spread: 0 where they are equal, about 1 where they have nothing in
/// common.
pub fn mean_distance(elements: &[f64], others: &[f64]) -> f64 {
    let (mut distance, mut spread) = (0.0, 0.0);
    for (number, (&element, other)) in elements.iter().zip(others).enumerate() {
        let next = elements[(number + elements.len() / 2 + 1) % elements.len()];
        distance += (element - other).abs();
        spread += (element - next).abs();
    }
    if distance == 0.0 { 0.0 } else { distance / spread }
}

impl Pair<'_> {
    pub(super) fn elements(&self) -> usize {
        self.tensor.elements() as usize
    }

    pub(super) fn is_float(&self) -> bool {
        matches!(self.tensor.dtype, Dtype::F32 | Dtype::F16 | Dtype::BF16)
    }

    pub(super) fn element_bytes(&self) -> usize {
        self.bytes.len() / self.elements().max(1)
    }

    pub(super) fn columns(&self) -> usize {
        self.tensor.shape[1..].iter().product::<u64>() as usize
    }

    pub(super) fn for_width<R>(&self, work: &impl ForWidth<R>) -> R {
        match self.element_bytes() {
            1 => work.of::<u8>(),
            2 => work.of::<u16>(),
            _ => work.of::<u32>(),
        }
    }
}

impl Facts {
    pub fn of(pair: Pair<'_>, follows_rows: bool) -> Self {
        let row_octaves = if follows_rows { row_octaves(pair) } else { Vec::new() };
        Self { highest: pair.for_width(&Highest(pair.predicted)), row_octaves }
    }
}

/// By row, octaves of the root mean square change; `None` where nothing changed.
pub(super) fn row_octaves(pair: Pair<'_>) -> Vec<Option<f64>> {
    let columns = pair.columns();
    let row_bytes = columns * pair.element_bytes();
    let rows = pair.bytes.par_chunks(row_bytes).zip(pair.predicted.par_chunks(row_bytes));
    let octaves = rows.map(|(row, predicted)| {
        let octaves = 0.5 * (squared_change(&pair.tensor.dtype, row, predicted) / columns as f64).log2();
        octaves.is_finite().then_some(octaves)
    });
    octaves.collect()
}

/// Sum of the squares of what elements of a float type differ by.
fn squared_change(dtype: &Dtype, elements: &[u8], predicted: &[u8]) -> f64 {
    let mut sum = 0.0;
    run(SquaredChange { dtype, elements, predicted, sum: &mut sum });
    sum
}

struct SquaredChange<'a> {
    dtype: &'a Dtype,
    elements: &'a [u8],
    predicted: &'a [u8],
    sum: &'a mut f64,
}

impl Work for SquaredChange<'_> {
    #[inline(always)]
    fn run(self) {
        *self.sum = match self.dtype {
            Dtype::BF16 => self.sum_of(|element| f32_from_bf16(u16::from_le_bytes(element))),
            Dtype::F16 => self.sum_of(|element| f32_from_f16(u16::from_le_bytes(element))),
            _ => self.sum_of(f32::from_le_bytes),
        };
    }
}

impl SquaredChange<'_> {
    /// Several sums at once, always the same: additions need not wait for one another.
    #[inline(always)]
    fn sum_of<const BYTES: usize>(&self, value: impl Fn([u8; BYTES]) -> f32) -> f64 {
        const SUMS: usize = 32;
        let square = |element, before| {
            let change = f64::from(value(element) - value(before));
            change * change
        };
        let (elements, rest) = self.elements.as_chunks().0.as_chunks::<SUMS>();
        let (predicted, rest_predicted) = self.predicted.as_chunks().0.as_chunks::<SUMS>();
        let mut sums = [0.0; SUMS];
        for (elements, predicted) in elements.iter().zip(predicted) {
            for index in 0..SUMS {
                sums[index] += square(elements[index], predicted[index]);
            }
        }
        let rest = rest.iter().zip(rest_predicted).map(|(&element, &before)| square(element, before));
        sums.into_iter().chain(rest).sum()
    }
}

/// Low bits that are zero in nearly all differences.
pub(super) fn common_zero_bits(pair: Pair<'_>) -> u8 {
    if pair.tensor.dtype != Dtype::F32 {
        return 0;
    }
    let words = |bytes: &'_ [u8]| -> Vec<u32> { bytes.as_chunks().0.iter().copied().map(u32::from_le_bytes).collect() };
    let step = (pair.elements() / 65_536).max(1) * 4;
    let sampled = (0..pair.bytes.len()).step_by(step);
    let mut counts = [0_usize; 33];
    let mut total = 0;
    for at in sampled {
        let (element, predicted) = (words(&pair.bytes[at..at + 4])[0], words(&pair.predicted[at..at + 4])[0]);
        counts[predicted.difference(element).trailing_zeros() as usize] += 1;
        total += 1;
    }
    let mut uneven = 0;
    (0..32)
        .find(|&bits| {
            uneven += counts[bits];
            uneven > total / UNEVEN
        })
        .unwrap_or(0) as u8
}

/// Work that depends on the width of the elements.
pub(super) trait ForWidth<R> {
    fn of<T: Bits>(&self) -> R;
}

/// The largest magnitude in these bytes.
struct Highest<'a>(&'a [u8]);

impl ForWidth<u32> for Highest<'_> {
    fn of<T: Bits>(&self) -> u32 {
        let mut highest = 0;
        run(HighestOf::<T> { elements: T::chunks(self.0), highest: &mut highest });
        highest
    }
}

struct HighestOf<'a, T: Bits> {
    elements: &'a [T::Raw],
    highest: &'a mut u32,
}

impl<T: Bits> Work for HighestOf<'_, T> {
    #[inline(always)]
    fn run(self) {
        *self.highest = self.elements.iter().fold(0, |highest, &raw| highest.max(T::from_raw(raw).magnitude()));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tensor_is_near_itself_and_far_from_others() {
        let values = |seed: u64| -> Vec<u8> {
            let mut random = fastrand::Rng::with_seed(seed);
            (0..400).flat_map(|_| half::bf16::from_f32(random.f32() - 0.5).to_le_bytes()).collect()
        };
        let tensor = TensorInfo {
            name: "w".into(),
            dtype: Dtype::BF16,
            shape: vec![20, 20],
            offset_bytes: 0,
            length_bytes: 800,
        };
        let [one, other] = [1, 2].map(|seed| spread_elements(&tensor, &values(seed), 512));
        assert_eq!(mean_distance(&one, &one), 0.0);
        assert!(mean_distance(&one, &other) > 0.5);
    }
}
