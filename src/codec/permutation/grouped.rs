//! Permutations that keep groups together: whole key/value groups move, and query heads move inside theirs (Eq. 129).

use super::{MAX_BLOCKS, Permutation, PermutationError};

/// Which permutations of a record's blocks keep the layer's function (Appendices D, M).
///
/// Blocks form `groups` groups of `members`. FFN units and plain attention heads are groups of one; with grouped-query
/// attention a group is a key/value head and its members are the query heads that share it; multi-query attention is
/// one group.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Symmetry {
    /// Groups that may change places with one another.
    pub groups: u32,
    /// Blocks of each group, which may change places inside it.
    pub members: u32,
}

impl Symmetry {
    /// `blocks` blocks that may be in any order.
    pub fn free(blocks: u32) -> Self {
        Self { groups: blocks, members: 1 }
    }

    /// Blocks in all: groups times members.
    ///
    /// # Errors
    /// When there are none, or more than [`MAX_BLOCKS`].
    pub fn blocks(self) -> Result<u32, PermutationError> {
        match self.groups.checked_mul(self.members) {
            Some(blocks @ 1..=MAX_BLOCKS) => Ok(blocks),
            _ => Err(PermutationError::Blocks { groups: self.groups, members: self.members }),
        }
    }

    /// How many values each Lehmer digit of a permutation of this symmetry may take, in the order of the digits: those of
    /// the groups, then those of each group's members.
    pub(super) fn radices(self) -> impl DoubleEndedIterator<Item = u32> + Clone {
        let inner = (0..self.groups).flat_map(move |_| (1..=self.members).rev());
        (1..=self.groups).rev().chain(inner)
    }
}

/// A permutation that a [`Symmetry`] allows: of the groups, and of the members inside each.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct GroupedPermutation {
    outer: Permutation,
    /// One per group, in the order of this layer's groups; all of one length.
    inner: Vec<Permutation>,
}

impl GroupedPermutation {
    /// The permutation that moves nothing.
    ///
    /// # Errors
    /// When the symmetry has no blocks or too many.
    pub fn identity(symmetry: Symmetry) -> Result<Self, PermutationError> {
        symmetry.blocks()?;
        let inner = vec![Permutation::identity(symmetry.members); symmetry.groups as usize];
        Ok(Self { outer: Permutation::identity(symmetry.groups), inner })
    }

    /// Group `g` goes with group `outer[g]` of the reference, and its member `m` with that group's member `inner[g][m]`.
    ///
    /// # Errors
    /// When there is not one inner permutation per group, or they differ in length, or there are too many blocks.
    pub fn new(outer: Permutation, inner: Vec<Permutation>) -> Result<Self, PermutationError> {
        let members = inner.first().map_or(0, Permutation::len);
        let symmetry = Symmetry { groups: outer.len() as u32, members: members as u32 };
        symmetry.blocks()?;
        if inner.len() != outer.len() || inner.iter().any(|members_of_one| members_of_one.len() != members) {
            return Err(PermutationError::Malformed {
                field: "inner permutations",
                found: inner.len() as u64,
                expected: "one per group, of one length",
            });
        }
        Ok(Self { outer, inner })
    }

    /// A permutation of groups of one.
    ///
    /// # Errors
    /// When it is empty or too long.
    pub fn free(outer: Permutation) -> Result<Self, PermutationError> {
        let inner = vec![Permutation::identity(1); outer.len()];
        Self::new(outer, inner)
    }

    /// The symmetry that it respects.
    pub fn symmetry(&self) -> Symmetry {
        Symmetry { groups: self.outer.len() as u32, members: self.inner[0].len() as u32 }
    }

    /// The permutation of the groups.
    pub fn outer(&self) -> &Permutation {
        &self.outer
    }

    /// The permutations of the members, one per group of this layer.
    pub fn inner(&self) -> &[Permutation] {
        &self.inner
    }

    /// The permutation of all blocks, group by group: block `g * members + m` goes with block
    /// `outer[g] * members + inner[g][m]`.
    pub fn expanded(&self) -> Permutation {
        let members = self.symmetry().members;
        let blocks = self
            .outer
            .entries()
            .iter()
            .zip(&self.inner)
            .flat_map(|(&group, inner)| inner.entries().iter().map(move |&member| group * members + member))
            .collect();
        Permutation(blocks)
    }

    /// Whether nothing moves.
    pub fn is_identity(&self) -> bool {
        self.outer.is_identity() && self.inner.iter().all(Permutation::is_identity)
    }

    /// The permutation that undoes this one.
    #[must_use]
    pub fn inverse(&self) -> Self {
        let outer = self.outer.inverse();
        let inner = outer.entries().iter().map(|&group| self.inner[group as usize].inverse()).collect();
        Self { outer, inner }
    }

    /// First `self`, then `next`, like [`Permutation::then`].
    ///
    /// # Panics
    /// When the symmetries differ: the caller has paired records of one symmetry.
    #[must_use]
    pub fn then(&self, next: &Self) -> Self {
        let pairs = self.outer.entries().iter().zip(&self.inner);
        let inner = pairs.map(|(&group, inner)| inner.then(&next.inner[group as usize])).collect();
        Self { outer: self.outer.then(&next.outer), inner }
    }

    /// The Lehmer digits of the groups, then those of each group's members.
    pub(super) fn digits(&self) -> Vec<u32> {
        let mut digits = self.outer.lehmer_digits();
        for inner in &self.inner {
            digits.extend(inner.lehmer_digits());
        }
        digits
    }

    /// The inverse of [`GroupedPermutation::digits`]; there are as many digits as the symmetry has radices.
    pub(super) fn from_digits(digits: &[u32], symmetry: Symmetry) -> Result<Self, PermutationError> {
        let (outer, inner) = digits.split_at(symmetry.groups as usize);
        let outer = Permutation::from_lehmer_digits(outer)?;
        let inner = inner.chunks_exact(symmetry.members as usize).map(Permutation::from_lehmer_digits);
        Ok(Self { outer, inner: inner.collect::<Result<_, _>>()? })
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use proptest::prelude::*;

    use super::super::tests::permutations;
    use super::*;

    pub(crate) fn grouped(groups: u32, members: u32) -> impl Strategy<Value = GroupedPermutation> {
        (permutations(groups), prop::collection::vec(permutations(members), groups as usize))
            .prop_map(|(outer, inner)| GroupedPermutation { outer, inner })
    }

    #[test]
    fn members_stay_with_their_group() {
        let outer = Permutation::new(vec![1, 0]).unwrap();
        let inner = vec![Permutation::new(vec![0, 2, 1]).unwrap(), Permutation::identity(3)];
        let permutation = GroupedPermutation::new(outer, inner).unwrap();
        assert_eq!(permutation.expanded().entries(), [3, 5, 4, 0, 1, 2]);
    }

    #[test]
    fn no_blocks_and_too_many_are_refused() {
        for (groups, members) in [(0, 1), (1, 0), (1 << 20, 2), (u32::MAX, u32::MAX)] {
            GroupedPermutation::identity(Symmetry { groups, members }).unwrap_err();
        }
        let outer = Permutation::identity(2);
        GroupedPermutation::new(outer.clone(), vec![Permutation::identity(2)]).unwrap_err();
        GroupedPermutation::new(outer, vec![Permutation::identity(2), Permutation::identity(1)]).unwrap_err();
    }

    proptest! {
        #[test]
        fn inverse_and_composition_are_those_of_the_expanded_permutation(
            (first, second) in (1u32..6, 1u32..5).prop_flat_map(|(g, m)| (grouped(g, m), grouped(g, m)))
        ) {
            prop_assert_eq!(first.inverse().expanded(), first.expanded().inverse());
            prop_assert_eq!(first.then(&second).expanded(), first.expanded().then(&second.expanded()));
            prop_assert!(first.then(&first.inverse()).is_identity());
        }

        #[test]
        fn digits_and_radices_belong_together(permutation in (1u32..6, 1u32..5).prop_flat_map(|(g, m)| grouped(g, m))) {
            let digits = permutation.digits();
            let radices: Vec<_> = permutation.symmetry().radices().collect();
            prop_assert_eq!(digits.len(), radices.len());
            prop_assert!(digits.iter().zip(&radices).all(|(digit, radix)| digit < radix));
            prop_assert_eq!(GroupedPermutation::from_digits(&digits, permutation.symmetry()).unwrap(), permutation);
        }
    }
}
