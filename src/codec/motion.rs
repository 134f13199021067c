//! Motion: where each element of a tensor finds its reference, given where each block does.
//!
//! Codes are stored in the tensor's own order, so the paper's inverse placement (Eq. 73) moves from the decoded residual to
//! the reference: element-wise predictors commute with it, strips stay contiguous in the output, and a tensor decodes with
//! one permutation, its own, whatever the layers below it were permuted by.

/// A map from the elements of a tensor to the elements of its reference, both of one shape.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Motion {
    /// Elements from one index of the moved axis to the next.
    stride: usize,
    /// For every index along the axis, the index along the axis of the reference.
    source_of_index: Vec<u32>,
}

impl Motion {
    /// Motion along `axis` of a tensor of this shape. `source_of_index` has one entry per index of the axis, each less than
    /// the axis is long; `None` where it is not so.
    pub fn new(shape: &[u64], axis: usize, source_of_index: Vec<u32>) -> Option<Self> {
        let length = *shape.get(axis)?;
        // A dimension of zero before the axis may hide that those after it overflow.
        let stride = shape[axis + 1..].iter().try_fold(1_u64, |product, &extent| product.checked_mul(extent))?;
        let stride = usize::try_from(stride).ok()?;
        let valid = source_of_index.len() as u64 == length
            && source_of_index.iter().all(|&source| u64::from(source) < length)
            && stride > 0;
        valid.then_some(Self { stride, source_of_index })
    }

    /// The reference element of `element`, both counted in the tensor's order.
    ///
    /// ```
    /// # use mcwcfs::codec::motion::Motion;
    /// let columns_swapped = Motion::new(&[2, 3], 1, vec![0, 2, 1]).unwrap();
    /// assert_eq!(columns_swapped.reference_of(4), 5);
    /// let rows_swapped = Motion::new(&[2, 3], 0, vec![1, 0]).unwrap();
    /// assert_eq!(rows_swapped.reference_of(4), 1);
    /// ```
    #[inline]
    pub fn reference_of(&self, element: usize) -> usize {
        let length = self.source_of_index.len();
        let (line, within) = (element / self.stride, element % self.stride);
        let (outer, index) = (line / length, line % length);
        (outer * length + self.source_of_index[index] as usize) * self.stride + within
    }

    /// Whether every block is predicted from its own place.
    pub fn is_identity(&self) -> bool {
        self.source_of_index.iter().enumerate().all(|(index, &source)| index == source as usize)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_shape_whose_stride_overflows_has_no_motion() {
        assert_eq!(Motion::new(&[0, 2, 1 << 40, 1 << 40], 1, vec![1, 0]), None);
    }

    #[test]
    fn a_map_that_does_not_fit_the_axis_is_no_motion() {
        assert_eq!(Motion::new(&[2, 3], 2, vec![]), None, "no such axis");
        assert_eq!(Motion::new(&[2, 3], 1, vec![0, 1]), None, "too short");
        assert_eq!(Motion::new(&[2, 3], 1, vec![0, 1, 3]), None, "past the end");
    }
}
