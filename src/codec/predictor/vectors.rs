//! Motion vectors: every unit, an index along one axis of a tensor, is predicted from a few units of the reference, each
//! times a gain.
//!
//! Unlike a permutation they need not be one to one, so nothing is known of the architecture: the best few of all units are
//! as good for a matrix without symmetry.

use std::ops::Range;

use super::references::References;

/// The vectors of all units of a tensor.
#[derive(Clone, Debug, PartialEq)]
pub struct MotionVectors {
    /// Elements from one index of the axis to the next.
    stride: usize,
    /// Where each unit's vectors start, and where the last one's end.
    starts: Vec<u32>,
    /// Index along the axis of the reference, of every vector.
    sources: Vec<u32>,
    /// Gain of every vector.
    gains: Vec<f32>,
}

impl MotionVectors {
    /// Vectors along `axis` of a tensor of this shape, unit after unit: `counts` says how many each has. `None` where counts,
    /// sources and shape do not fit one another.
    pub fn new(
        shape: &[u64],
        axis: usize,
        counts: impl IntoIterator<Item = u32>,
        sources: Vec<u32>,
        gains: Vec<f32>,
    ) -> Option<Self> {
        let length = *shape.get(axis)?;
        let stride = shape[axis + 1..].iter().try_fold(1_u64, |product, &extent| product.checked_mul(extent))?;
        let stride = usize::try_from(stride).ok()?;
        let mut starts = vec![0_u32];
        for count in counts {
            starts.push(starts.last()?.checked_add(count)?);
        }
        let valid = stride > 0
            && starts.len() as u64 == length + 1
            && *starts.last()? as usize == sources.len()
            && sources.len() == gains.len()
            && sources.iter().all(|&source| u64::from(source) < length);
        valid.then_some(Self { stride, starts, sources, gains })
    }

    /// The predictions of consecutive elements: from 0 on, gain times reference value is added for each vector in order.
    ///
    /// ```
    /// # use mcwcfs::codec::predictor::{references::References, vectors::MotionVectors};
    /// # use mcwcfs::tensor::Dtype;
    /// let bytes: Vec<u8> = [1.0_f32, 2.0, 30.0, 40.0].iter().flat_map(|value| value.to_le_bytes()).collect();
    /// let references = References::new(&Dtype::F32, &bytes, 4);
    /// let rows = MotionVectors::new(&[2, 2], 0, [2, 0], vec![0, 1], vec![1.0, 0.5]).unwrap();
    /// let mut predicted = [9.0; 4];
    /// rows.predict(&references, 0..4, &mut predicted);
    /// assert_eq!(predicted, [16.0, 22.0, 0.0, 0.0]);
    /// let columns = MotionVectors::new(&[2, 2], 1, [0, 1], vec![0], vec![2.0]).unwrap();
    /// columns.predict(&references, 0..4, &mut predicted);
    /// assert_eq!(predicted, [0.0, 2.0, 0.0, 60.0]);
    /// ```
    pub fn predict(&self, references: &References<'_>, elements: Range<usize>, predicted: &mut [f32]) {
        predicted.fill(0.0);
        let length = self.starts.len() - 1;
        if self.stride == 1 {
            references.add_terms(predicted, |index| {
                let element = elements.start + index;
                let vectors = self.vectors(element % length);
                (element / length * length, &self.sources[vectors.clone()], &self.gains[vectors])
            });
            return;
        }
        let mut at = elements.start;
        while at < elements.end {
            let (line, within) = (at / self.stride, at % self.stride);
            let (outer, index) = (line / length, line % length);
            let end = elements.end.min(at + self.stride - within);
            let predicted = &mut predicted[at - elements.start..end - elements.start];
            for vector in self.vectors(index) {
                let start = (outer * length + self.sources[vector] as usize) * self.stride + within;
                references.add_times(self.gains[vector], start..start + (end - at), predicted);
            }
            at = end;
        }
    }

    fn vectors(&self, index: usize) -> Range<usize> {
        self.starts[index] as usize..self.starts[index + 1] as usize
    }
}

#[cfg(test)]
mod tests {
    use half::bf16;
    use proptest::prelude::*;

    use super::*;
    use crate::tensor::Dtype;

    #[test]
    fn vectors_that_do_not_fit_the_tensor_are_none() {
        let new = |shape: &[u64], axis, counts: &[u32], sources: &[u32]| {
            MotionVectors::new(shape, axis, counts.iter().copied(), sources.to_vec(), vec![1.0; 2])
        };
        assert!(new(&[2, 3], 0, &[1, 1], &[0, 1]).is_some());
        assert_eq!(new(&[2, 3], 2, &[1, 1], &[0, 1]), None, "no such axis");
        assert_eq!(new(&[2, 3], 0, &[2], &[0, 1]), None, "a unit without a count");
        assert_eq!(new(&[2, 3], 0, &[1, 2], &[0, 1]), None, "a vector without a source");
        assert_eq!(new(&[2, 3], 0, &[1, 1], &[0, 2]), None, "past the end");
        assert_eq!(new(&[2, 0], 0, &[1, 1], &[0, 1]), None, "no element");
    }

    proptest! {
        #[test]
        fn ranges_of_any_axis_are_what_each_element_is_alone(
            outer in 1_usize..3,
            counts in prop::collection::vec(0_u32..=4, 5),
            stride in 1_usize..4,
            seed: u64,
            cut in any::<[prop::sample::Index; 2]>(),
        ) {
            let mut chance = fastrand::Rng::with_seed(seed);
            let total = counts.iter().sum::<u32>() as usize;
            let sources: Vec<u32> = (0..total).map(|_| chance.u32(..5)).collect();
            let gains: Vec<f32> = (0..total).map(|_| chance.f32() - 0.5).collect();
            let elements = outer * 5 * stride;
            let values: Vec<bf16> = (0..elements).map(|_| bf16::from_f32(chance.f32() - 0.5)).collect();
            let bytes: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
            let references = References::new(&Dtype::BF16, &bytes, elements);
            let shape = [outer as u64, 5, stride as u64];
            let vectors = MotionVectors::new(&shape, 1, counts.iter().copied(), sources.clone(), gains.clone());
            let vectors = vectors.expect("five counts, all sources below five");
            let alone = |element: usize| {
                let (outer, index, inner) = (element / stride / 5, element / stride % 5, element % stride);
                let first = counts[..index].iter().sum::<u32>() as usize;
                (first..first + counts[index] as usize).fold(0.0_f32, |sum, vector| {
                    sum + gains[vector] * values[(outer * 5 + sources[vector] as usize) * stride + inner].to_f32()
                })
            };
            let [a, b] = cut.map(|cut| cut.index(elements));
            let range = a.min(b)..a.max(b);
            let mut predicted = vec![f32::NAN; range.len()];
            vectors.predict(&references, range.clone(), &mut predicted);
            let bits = |values: Vec<f32>| values.into_iter().map(f32::to_bits).collect::<Vec<_>>();
            prop_assert_eq!(bits(predicted), bits(range.map(alone).collect()));
        }
    }
}
