//! Motion: where each element of a tensor finds its reference, given where each block does.
//!
//! Codes are stored in the tensor's own order, so the paper's inverse placement (Eq. 73) moves from the decoded residual to
//! the reference: element-wise predictors commute with it, strips stay contiguous in the output, and a tensor decodes with
//! one permutation, its own, whatever the layers below it were permuted by.

use std::ops::Range;

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

    /// The reference elements of consecutive `elements`, in order, as ranges that are as long as they can be.
    ///
    /// ```
    /// # use mcwcfs::codec::motion::Motion;
    /// let rows = Motion::new(&[3, 4], 0, vec![1, 2, 0]).unwrap();
    /// assert_eq!(rows.spans(2..10).collect::<Vec<_>>(), [6..12, 0..2]);
    /// ```
    pub fn spans(&self, elements: Range<usize>) -> impl Iterator<Item = Range<usize>> {
        let length = self.source_of_index.len();
        let (line, mut within) = (elements.start / self.stride, elements.start % self.stride);
        let (mut outer, mut index) = (line / length, line % length);
        let mut left = elements.len();
        std::iter::from_fn(move || {
            if left == 0 {
                return None;
            }
            let start = (outer * length + self.source_of_index[index] as usize) * self.stride + within;
            let mut end = start;
            loop {
                let taken = left.min(self.stride - within);
                end += taken;
                left -= taken;
                within = 0;
                index += 1;
                if index == length {
                    (outer, index) = (outer + 1, 0);
                }
                let next = (outer * length + self.source_of_index[index] as usize) * self.stride;
                if left == 0 || next != end {
                    return Some(start..end);
                }
            }
        })
    }

    /// Where every element of a line along the last axis moves alone: for each, its reference element in the same line.
    /// `None` where elements move together.
    pub fn single_elements(&self) -> Option<&[u32]> {
        (self.stride == 1).then_some(&self.source_of_index)
    }

    /// This motion and then another of the same shape and axis: where an element's reference finds its own reference.
    ///
    /// ```
    /// # use mcwcfs::codec::motion::Motion;
    /// let [once, twice] = [[1, 2, 0], [2, 0, 1]].map(|map| Motion::new(&[3], 0, map.to_vec()).unwrap());
    /// assert_eq!(once.then(&once), twice);
    /// ```
    #[must_use]
    pub fn then(&self, below: &Self) -> Self {
        assert_eq!(
            (self.stride, self.source_of_index.len()),
            (below.stride, below.source_of_index.len()),
            "motion along one axis of one shape"
        );
        let map = |&source: &u32| below.source_of_index[source as usize];
        Self { stride: self.stride, source_of_index: self.source_of_index.iter().map(map).collect() }
    }

    /// Elements from one index of the moved axis to the next, and for every index that of the reference.
    pub fn map(&self) -> (usize, &[u32]) {
        (self.stride, &self.source_of_index)
    }

    /// A range that holds the reference elements of consecutive `elements`: whole lines along the moved axis.
    ///
    /// ```
    /// # use mcwcfs::codec::motion::Motion;
    /// let columns = Motion::new(&[3, 4], 1, vec![1, 2, 0, 3]).unwrap();
    /// assert_eq!(columns.lines_around(5..7), 4..8);
    /// ```
    pub fn lines_around(&self, elements: Range<usize>) -> Range<usize> {
        let line = self.stride * self.source_of_index.len();
        elements.start / line * line..elements.end.div_ceil(line) * line
    }

    /// Whether every block is predicted from its own place.
    pub fn is_identity(&self) -> bool {
        self.source_of_index.iter().enumerate().all(|(index, &source)| index == source as usize)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

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

    proptest! {
        #[test]
        fn spans_are_the_references_of_the_elements(
            outer in 1_u64..4,
            source in prop::collection::vec(0_u32..6, 6),
            stride in 1_u64..5,
            cut in any::<[prop::sample::Index; 2]>(),
        ) {
            let motion = Motion::new(&[outer, 6, stride], 1, source).expect("a map of six");
            let [a, b] = cut.map(|cut| cut.index((outer * 6 * stride) as usize));
            let elements = a.min(b)..a.max(b);
            let spans: Vec<usize> = motion.spans(elements.clone()).flatten().collect();
            prop_assert_eq!(spans, elements.map(|element| motion.reference_of(element)).collect::<Vec<_>>());
        }
    }
}
