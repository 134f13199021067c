//! Decoded reference tensors as a predictor sees them: the deployed weights, exactly as binary32.

use std::ops::Range;

use crate::numerics::{f32_from_bf16, f32_from_f16};
use crate::tensor::Dtype;

/// The bytes of one decoded tensor, or of two, the lower layer's second.
#[derive(Clone, Copy, Debug)]
pub struct References<'a> {
    values: Values<'a>,
    /// Elements of one tensor.
    elements: usize,
}

#[derive(Clone, Copy, Debug)]
enum Values<'a> {
    F32(&'a [[u8; 4]]),
    F16(&'a [[u8; 2]]),
    Bf16(&'a [[u8; 2]]),
}

/// Evaluates an expression with the stored elements and the function that widens one: a match outside of loops.
macro_rules! with_values {
    ($values:expr, |$stored:ident, $widen:ident| $body:expr) => {
        match $values {
            Values::F32($stored) => {
                let $widen = f32::from_le_bytes;
                $body
            }
            Values::F16($stored) => {
                let $widen = |bytes: [u8; 2]| f32_from_f16(u16::from_le_bytes(bytes));
                $body
            }
            Values::Bf16($stored) => {
                let $widen = |bytes: [u8; 2]| f32_from_bf16(u16::from_le_bytes(bytes));
                $body
            }
        }
    };
}

impl<'a> References<'a> {
    /// Tensors of `elements` elements, one after another.
    pub fn new(dtype: &Dtype, bytes: &'a [u8], elements: usize) -> Self {
        let values = match dtype {
            Dtype::F16 => Values::F16(bytes.as_chunks().0),
            Dtype::BF16 => Values::Bf16(bytes.as_chunks().0),
            _ => Values::F32(bytes.as_chunks().0),
        };
        Self { values, elements }
    }

    /// An element of a tensor, the nearest layer's first.
    #[inline]
    pub fn value(&self, context: usize, element: usize) -> f32 {
        let at = context * self.elements + element;
        with_values!(self.values, |stored, widen| widen(stored[at]))
    }

    /// Adds a gain times consecutive elements of the first tensor.
    ///
    /// ```
    /// # use mcwcfs::codec::predictor::references::References;
    /// # use mcwcfs::tensor::Dtype;
    /// let bytes: Vec<u8> = [1.0_f32, 2.0, 4.0].iter().flat_map(|value| value.to_le_bytes()).collect();
    /// let mut sums = [10.0, 20.0];
    /// References::new(&Dtype::F32, &bytes, 3).add_times(0.5, 1..3, &mut sums);
    /// assert_eq!(sums, [11.0, 22.0]);
    /// ```
    pub fn add_times(&self, gain: f32, elements: Range<usize>, sums: &mut [f32]) {
        with_values!(self.values, |stored, widen| {
            for (sum, &value) in sums.iter_mut().zip(&stored[elements]) {
                *sum += gain * widen(value); // two roundings
            }
        });
    }

    /// Adds to each sum gains times elements of the first tensor: `terms_of` gives a sum's, in order.
    pub fn add_terms<'t>(&self, sums: &mut [f32], terms_of: impl Fn(usize) -> (usize, &'t [u32], &'t [f32])) {
        with_values!(self.values, |stored, widen| {
            for (index, sum) in sums.iter_mut().enumerate() {
                let (line, sources, gains) = terms_of(index);
                for (&source, &gain) in sources.iter().zip(gains) {
                    *sum += gain * widen(stored[line + source as usize]);
                }
            }
        });
    }
}
