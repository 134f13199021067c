//! Low-rank prediction: a product of two thin integer matrices added to the reference (SPEC.md section 7.8). A LoRA merged
//! into the weights of its base is such a product, and costs far less than the weights it changed.
//!
//! Sums of integer products are exact in any order, so that engines may compute them as they like. Finding the factors is
//! the encoder's business: `pack::low_rank`.

use crate::numerics::{bf16_from_f32, f16_from_f32, f32_from_bf16, f32_from_f16};
use crate::tensor::Dtype;

/// Two factors and their scale.
#[derive(Clone, Debug, PartialEq)]
pub struct LowRank {
    /// Columns of the left factor, rows of the right one.
    pub rank: usize,
    /// Columns of the right factor, and of the tensor seen as a matrix.
    pub columns: usize,
    /// The product is taken times this, in weight units.
    pub scale: f32,
    /// The left factor, `[rows, rank]`, magnitudes up to [`crate::format::limits::FACTOR`].
    pub left: Vec<i16>,
    /// The right factor, `[rank, columns]`, alike.
    pub right: Vec<i16>,
}

impl LowRank {
    /// Adds the product to consecutive elements: `elements` are the bytes of references of type `dtype`, `first_element` the
    /// number of the first in the tensor. Each sum is rounded to `dtype`.
    ///
    /// Panics where `dtype` is not `F32`, `F16` or `BF16`: it is checked when a part is prepared.
    #[inline(always)] // so that it is compiled for the instructions of who calls it
    pub fn add(&self, dtype: &Dtype, first_element: usize, elements: &mut [u8]) {
        match dtype {
            Dtype::BF16 => self.add_to::<2>(first_element, elements, |value, product| {
                bf16_from_f32(f32_from_bf16(u16::from_le_bytes(value)) + product).to_le_bytes()
            }),
            Dtype::F16 => self.add_to::<2>(first_element, elements, |value, product| {
                f16_from_f32(f32_from_f16(u16::from_le_bytes(value)) + product).to_le_bytes()
            }),
            Dtype::F32 => self.add_to::<4>(first_element, elements, |value, product| {
                (f32::from_le_bytes(value) + product).to_le_bytes()
            }),
            other => unreachable!("a low-rank product is not added to {other}"),
        }
    }

    #[inline(always)]
    fn add_to<const BYTES: usize>(
        &self,
        first_element: usize,
        elements: &mut [u8],
        add: impl Fn([u8; BYTES], f32) -> [u8; BYTES],
    ) {
        let mut rest = elements.as_chunks_mut::<BYTES>().0;
        let (mut row, mut column) = (first_element / self.columns, first_element % self.columns);
        let mut sums = Vec::new();
        while !rest.is_empty() {
            let (of_row, later) = rest.split_at_mut(rest.len().min(self.columns - column));
            self.products(row, column, of_row.len(), &mut sums);
            for (element, &sum) in of_row.iter_mut().zip(&sums) {
                *element = add(*element, self.scale * sum as f32); // two roundings, never fused: the format says so
            }
            (row, column, rest) = (row + 1, 0, later);
        }
    }

    /// Integer products of a row of the left factor with consecutive columns of the right one.
    #[inline(always)]
    fn products(&self, row: usize, column: usize, count: usize, sums: &mut Vec<i32>) {
        sums.clear();
        sums.resize(count, 0);
        for (k, &left) in self.left[row * self.rank..][..self.rank].iter().enumerate() {
            let right = &self.right[k * self.columns + column..][..count];
            for (sum, &right) in sums.iter_mut().zip(right) {
                *sum += i32::from(left) * i32::from(right);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_product_is_added_row_by_row_wherever_the_elements_begin() {
        let product =
            LowRank { rank: 2, columns: 3, scale: 0.5, left: vec![1, 0, -2, 4], right: vec![1, 2, 3, 10, 20, 30] };
        let base: Vec<f32> = (0..6).map(|element| 100.0 * element as f32).collect();
        let expected = [0.5, 101.0, 201.5, 319.0, 438.0, 557.0];
        let bytes: Vec<u8> = base.iter().flat_map(|value| value.to_le_bytes()).collect();
        for cut in 0..=6 {
            let (mut head, mut tail) = (bytes[..4 * cut].to_vec(), bytes[4 * cut..].to_vec());
            product.add(&Dtype::F32, 0, &mut head);
            product.add(&Dtype::F32, cut, &mut tail);
            let sums: Vec<f32> = [head, tail].concat().as_chunks().0.iter().copied().map(f32::from_le_bytes).collect();
            assert_eq!(sums, expected, "cut at {cut}");
        }
    }
}
