//! Where the blocks of a record lie in its tensors, and how a permutation moves them (section 4.1, Appendix D).
//!
//! A [`Placement`] says which indices of one axis belong to which block. With a permutation it becomes an index map along
//! that axis, which [`gather`] applies: `target[i] = source[map[i]]`. To predict a layer, gather from the reference with
//! the stored permutation; to bring a layer into its reference's order, gather with the inverse.

use super::permutation::GroupedPermutation;
pub use super::permutation::Symmetry;

/// Why blocks do not fit a tensor.
#[derive(Clone, Debug, thiserror::Error, PartialEq, Eq)]
pub enum BlocksError {
    /// The tensor has no such axis.
    #[error("placement: axis {axis} of a tensor with {dimensions} dimensions")]
    Axis {
        /// The axis claimed.
        axis: u8,
        /// Dimensions of the tensor.
        dimensions: usize,
    },
    /// The blocks do not fill the axis.
    #[error(
        "placement: {repeat} times {blocks} blocks of {unit} along axis {axis}, expected the {extent} of shape {shape:?}"
    )]
    Extent {
        /// The axis.
        axis: u8,
        /// How often the row of blocks comes.
        repeat: u32,
        /// Blocks in a row.
        blocks: u32,
        /// Elements of a block.
        unit: u32,
        /// Elements along the axis.
        extent: u64,
        /// Shape of the tensor.
        shape: Vec<u64>,
    },
}

/// How the blocks of a record lie along one axis of one of its tensors.
///
/// An index along `axis` is `(repeat_index * blocks + block) * unit + element`. In BERT, `query` has axis 0 and the head
/// width as unit; in GPT-2, the fused `c_attn` has axis 1 and repeat 3; in GPT-NeoX, `query_key_value` has the three
/// parts of a head together: unit 3 times the head width.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Placement {
    /// The axis, 0 the slowest.
    pub axis: u8,
    /// How often the row of all blocks comes along the axis.
    pub repeat: u32,
    /// Whether the blocks are the members of the groups (query heads) or the groups themselves (key/value heads).
    pub per_member: bool,
    /// Elements of one block along the axis.
    pub unit: u32,
}

impl Placement {
    /// Blocks in a row along the axis.
    pub fn blocks(&self, symmetry: Symmetry) -> u32 {
        if self.per_member { symmetry.groups.saturating_mul(symmetry.members) } else { symmetry.groups }
    }

    /// Checks that the blocks fill the axis of a tensor of this shape exactly.
    ///
    /// # Errors
    /// When they do not, or there is no such axis.
    pub fn check(&self, symmetry: Symmetry, shape: &[u64]) -> Result<(), BlocksError> {
        let Some(&extent) = shape.get(usize::from(self.axis)) else {
            return Err(BlocksError::Axis { axis: self.axis, dimensions: shape.len() });
        };
        let blocks = self.blocks(symmetry);
        let filled = u128::from(self.repeat) * u128::from(blocks) * u128::from(self.unit);
        // Without elements the tensor's length bounds nothing, the map's least of all.
        if filled != u128::from(extent) || shape.contains(&0) || extent > u64::from(u32::MAX) {
            let Self { axis, repeat, unit, .. } = *self;
            return Err(BlocksError::Extent { axis, repeat, blocks, unit, extent, shape: shape.to_vec() });
        }
        Ok(())
    }

    /// For each index along the axis, the index that the permutation takes it to.
    ///
    /// [`Placement::check`] has been asked before: it bounds the length of the map by the tensor's.
    pub fn index_map(&self, permutation: &GroupedPermutation) -> Vec<u32> {
        let expanded;
        let blocks = if self.per_member {
            expanded = permutation.expanded();
            expanded.entries()
        } else {
            permutation.outer().entries()
        };
        let row = blocks.len() as u32;
        (0..self.repeat)
            .flat_map(|repeat| blocks.iter().map(move |&block| (repeat * row + block) * self.unit))
            .flat_map(|first| first..first + self.unit)
            .collect()
    }
}

/// A tensor seen along one axis: `outer` times `extent` times `inner` elements.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AxisLayout {
    /// Product of the dimensions before the axis.
    pub outer: usize,
    /// Elements along the axis.
    pub extent: usize,
    /// Product of the dimensions after the axis.
    pub inner: usize,
}

impl AxisLayout {
    /// The layout of a tensor of this shape along `axis`.
    ///
    /// # Errors
    /// When there is no such axis.
    pub fn new(shape: &[u64], axis: u8) -> Result<Self, BlocksError> {
        let Some((before, rest)) = shape.split_at_checked(usize::from(axis)) else {
            return Err(BlocksError::Axis { axis, dimensions: shape.len() });
        };
        let Some((&extent, after)) = rest.split_first() else {
            return Err(BlocksError::Axis { axis, dimensions: shape.len() });
        };
        let product = |dimensions: &[u64]| dimensions.iter().product::<u64>() as usize;
        Ok(Self { outer: product(before), extent: extent as usize, inner: product(after) })
    }

    fn elements(&self) -> usize {
        self.outer * self.extent * self.inner
    }
}

/// `target[outer, i, inner] = source[outer, map[i], inner]`.
///
/// # Panics
/// When `source`, `target` or `map` do not have the layout's lengths: the caller has checked the placement.
pub fn gather<T: Copy>(source: &[T], target: &mut [T], layout: AxisLayout, map: &[u32]) {
    check_lengths(source.len(), target.len(), layout, map);
    if layout.elements() == 0 {
        return;
    }
    let plane = layout.extent * layout.inner;
    for (source, target) in source.chunks_exact(plane).zip(target.chunks_exact_mut(plane)) {
        if layout.inner == 1 {
            for (element, &from) in target.iter_mut().zip(map) {
                *element = source[from as usize];
            }
        } else {
            for (row, &from) in target.chunks_exact_mut(layout.inner).zip(map) {
                row.copy_from_slice(&source[from as usize * layout.inner..][..layout.inner]);
            }
        }
    }
}

/// `target[outer, map[i], inner] = source[outer, i, inner]`: undoes [`gather`] with the same map.
///
/// # Panics
/// Like [`gather`].
pub fn scatter<T: Copy>(source: &[T], target: &mut [T], layout: AxisLayout, map: &[u32]) {
    check_lengths(source.len(), target.len(), layout, map);
    if layout.elements() == 0 {
        return;
    }
    let plane = layout.extent * layout.inner;
    for (source, target) in source.chunks_exact(plane).zip(target.chunks_exact_mut(plane)) {
        for (row, &to) in source.chunks_exact(layout.inner).zip(map) {
            target[to as usize * layout.inner..][..layout.inner].copy_from_slice(row);
        }
    }
}

/// [`gather`] on the bytes of elements of `element_bytes` each.
///
/// # Panics
/// Like [`gather`].
pub fn gather_bytes(source: &[u8], target: &mut [u8], layout: AxisLayout, element_bytes: usize, map: &[u32]) {
    match element_bytes {
        2 => gather(exact_chunks::<2>(source), exact_chunks_mut::<2>(target), layout, map),
        4 => gather(exact_chunks::<4>(source), exact_chunks_mut::<4>(target), layout, map),
        _ => gather(source, target, AxisLayout { inner: layout.inner * element_bytes, ..layout }, map),
    }
}

fn exact_chunks<const N: usize>(bytes: &[u8]) -> &[[u8; N]] {
    let (chunks, rest) = bytes.as_chunks();
    assert!(rest.is_empty(), "whole elements");
    chunks
}

fn exact_chunks_mut<const N: usize>(bytes: &mut [u8]) -> &mut [[u8; N]] {
    let (chunks, rest) = bytes.as_chunks_mut();
    assert!(rest.is_empty(), "whole elements");
    chunks
}

fn check_lengths(source: usize, target: usize, layout: AxisLayout, map: &[u32]) {
    assert_eq!(source, layout.elements(), "source has the layout's elements");
    assert_eq!(target, layout.elements(), "target has the layout's elements");
    assert_eq!(map.len(), layout.extent, "one map entry per index along the axis");
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::permutation::Permutation;
    use super::*;

    fn swap_two() -> GroupedPermutation {
        GroupedPermutation::free(Permutation::new(vec![1, 0]).unwrap()).unwrap()
    }

    #[test]
    fn a_fused_projection_moves_the_same_head_in_each_of_its_parts() {
        let placement = Placement { axis: 1, repeat: 3, per_member: false, unit: 2 };
        placement.check(Symmetry::free(2), &[5, 12]).unwrap();
        assert_eq!(placement.index_map(&swap_two()), [2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9]);
    }

    #[test]
    fn query_heads_follow_their_group() {
        let inner = vec![Permutation::new(vec![1, 0]).unwrap(), Permutation::identity(2)];
        let permutation = GroupedPermutation::new(Permutation::new(vec![1, 0]).unwrap(), inner).unwrap();
        let query = Placement { axis: 0, repeat: 1, per_member: true, unit: 1 };
        let key = Placement { per_member: false, ..query };
        assert_eq!(query.index_map(&permutation), [3, 2, 0, 1]);
        assert_eq!(key.index_map(&permutation), [1, 0]);
    }

    #[test]
    fn blocks_that_do_not_fill_the_axis_are_refused() {
        let placement = Placement { axis: 0, repeat: 1, per_member: false, unit: 3 };
        let message = placement.check(Symmetry::free(4), &[13, 2]).unwrap_err().to_string();
        assert_eq!(message, "placement: 1 times 4 blocks of 3 along axis 0, expected the 13 of shape [13, 2]");
        let huge = Placement { axis: 0, repeat: u32::MAX, per_member: true, unit: u32::MAX };
        huge.check(Symmetry { groups: u32::MAX, members: u32::MAX }, &[u64::MAX]).unwrap_err();
        placement.check(Symmetry::free(4), &[]).unwrap_err();
        let empty = Placement { unit: 0, ..placement };
        empty.check(Symmetry::free(4), &[0]).unwrap_err();
    }

    #[test]
    fn columns_and_rows_are_gathered_alike() {
        let source: Vec<u16> = (0..6).collect();
        let mut target = vec![0; 6];
        gather(&source, &mut target, AxisLayout::new(&[3, 2], 0).unwrap(), &[2, 0, 1]);
        assert_eq!(target, [4, 5, 0, 1, 2, 3]);
        gather(&source, &mut target, AxisLayout::new(&[2, 3], 1).unwrap(), &[2, 0, 1]);
        assert_eq!(target, [2, 0, 1, 5, 3, 4]);
    }

    #[test]
    fn a_tensor_without_elements_is_gathered() {
        gather::<u8>(&[], &mut [], AxisLayout::new(&[3, 0], 0).unwrap(), &[2, 0, 1]);
        scatter::<u8>(&[], &mut [], AxisLayout::new(&[0, 3], 1).unwrap(), &[2, 0, 1]);
    }

    proptest! {
        #[test]
        fn scatter_undoes_gather_for_every_element_size(
            (outer, inner, unit, blocks, repeat) in (1usize..4, 1usize..4, 1u32..4, 1u32..5, 1u32..4),
            element_bytes in prop::sample::select(vec![1usize, 2, 4, 8]),
            seed in any::<prop::sample::Index>(),
        ) {
            let mut entries: Vec<u32> = (0..blocks).collect();
            entries.rotate_left(seed.index(blocks as usize));
            let permutation = GroupedPermutation::free(Permutation::new(entries).unwrap()).unwrap();
            let placement = Placement { axis: 1, repeat, per_member: false, unit };
            let extent = (repeat * blocks * unit) as usize;
            let shape = [outer as u64, extent as u64, inner as u64];
            placement.check(permutation.symmetry(), &shape).unwrap();
            let map = placement.index_map(&permutation);
            let layout = AxisLayout::new(&shape, 1).unwrap();
            let source: Vec<u8> = (0..outer * extent * inner * element_bytes).map(|byte| byte as u8).collect();
            let mut gathered = vec![0; source.len()];
            gather_bytes(&source, &mut gathered, layout, element_bytes, &map);
            let mut back = vec![0; source.len()];
            scatter(&gathered, &mut back, AxisLayout { inner: inner * element_bytes, ..layout }, &map);
            prop_assert_eq!(&back, &source);
            let mut inverse = vec![0; source.len()];
            gather_bytes(&gathered, &mut inverse, layout, element_bytes, &placement.index_map(&permutation.inverse()));
            prop_assert_eq!(&inverse, &source);
        }
    }
}
