//! Permutations of blocks: validated, inverted, composed, and written as Lehmer digits (Appendices B, G.6).
//!
//! A permutation `p` here is a *motion vector*: block `i` of a layer is predicted from block `p[i]` of its reference. The
//! paper's permutation of a whole chain, into the order of its first layer, is the composition of these.
//!
//! Choosing a permutation is the encoder's business (`pack::align`): a worse choice is still a valid archive. What is
//! here must be right, or the weights that come out are others.

mod ans;
mod bits;
mod coding;
mod frequencies;
mod grouped;
mod lehmer;

pub use coding::{PermutationCoding, decode, encode};
pub use grouped::{GroupedPermutation, Symmetry};

/// More blocks than this in one record are refused: sixteen times the widest FFN in use.
pub const MAX_BLOCKS: u32 = 1 << 20;

/// Why bytes or numbers are no permutation.
#[derive(Clone, Debug, thiserror::Error, PartialEq, Eq)]
pub enum PermutationError {
    /// The symmetry itself is out of bounds.
    #[error("symmetry: {groups} groups of {members}, expected 1 to {MAX_BLOCKS} blocks in all")]
    Blocks {
        /// Groups claimed.
        groups: u32,
        /// Members of each.
        members: u32,
    },
    /// A value repeats or lies outside.
    #[error("permutation entry {index}: {value}, expected each of 0..{blocks} once")]
    NotABijection {
        /// Which entry.
        index: usize,
        /// What it says.
        value: u32,
        /// How many blocks there are.
        blocks: usize,
    },
    /// A Lehmer digit lies outside its range (Eq. 100).
    #[error("Lehmer digit {index}: {digit}, expected 0..{radix}")]
    Digit {
        /// Which digit.
        index: usize,
        /// What it says.
        digit: i64,
        /// How many values it may take.
        radix: u32,
    },
    /// The stream ends too early.
    #[error("permutation: {field}: needs {needed} bytes, {left} left")]
    Truncated {
        /// What was being read.
        field: &'static str,
        /// Bytes needed.
        needed: usize,
        /// Bytes there are.
        left: usize,
    },
    /// The stream says more than a permutation needs, or says it in a way no encoder does.
    #[error("permutation: {field}: {found}, expected {expected}")]
    Malformed {
        /// Which field.
        field: &'static str,
        /// What it says.
        found: u64,
        /// What it should say.
        expected: &'static str,
    },
    /// Delta coding without a permutation to start from.
    #[error("permutation: delta-coded, expected a permutation of the same symmetry one layer below")]
    NoReference,
}

impl PermutationError {
    /// Too few bytes, or too many.
    fn wrong_length(field: &'static str, needed: usize, found: usize) -> Self {
        if found < needed {
            return Self::Truncated { field, needed, left: found };
        }
        Self::Malformed { field: "bytes after the digits", found: (found - needed) as u64, expected: "none" }
    }
}

/// A bijection of `0..len`.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Permutation(Vec<u32>);

impl Permutation {
    /// The permutation that moves nothing.
    pub fn identity(len: u32) -> Self {
        Self((0..len).collect())
    }

    /// Takes `entries` as a permutation.
    ///
    /// # Errors
    /// When an entry repeats or is `entries.len()` or more.
    pub fn new(entries: Vec<u32>) -> Result<Self, PermutationError> {
        let blocks = entries.len();
        let mut seen = vec![false; blocks];
        for (index, &value) in entries.iter().enumerate() {
            match seen.get_mut(value as usize) {
                Some(seen) if !*seen => *seen = true,
                _ => return Err(PermutationError::NotABijection { index, value, blocks }),
            }
        }
        Ok(Self(entries))
    }

    /// Number of blocks.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether there is nothing to permute.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The entries: block `i` goes with block `entries[i]` of the reference.
    pub fn entries(&self) -> &[u32] {
        &self.0
    }

    /// Whether nothing moves.
    pub fn is_identity(&self) -> bool {
        self.0.iter().enumerate().all(|(index, &value)| index == value as usize)
    }

    /// The permutation that undoes this one.
    #[must_use]
    pub fn inverse(&self) -> Self {
        let mut inverse = vec![0; self.len()];
        for (index, &value) in self.0.iter().enumerate() {
            inverse[value as usize] = index as u32;
        }
        Self(inverse)
    }

    /// First `self`, then `next`: `i -> next[self[i]]`.
    ///
    /// With `self` from layer l to l-1 and `next` from l-1 to l-2, the result goes from l to l-2.
    ///
    /// # Panics
    /// When the lengths differ: the caller has paired records of one symmetry.
    #[must_use]
    pub fn then(&self, next: &Self) -> Self {
        assert_eq!(self.len(), next.len(), "permutations of one set of blocks");
        Self(self.0.iter().map(|&middle| next.0[middle as usize]).collect())
    }

    /// The Lehmer digits: how many later entries are smaller (Eq. 100, counted from 0).
    ///
    /// ```
    /// # use mcwcfs::codec::permutation::Permutation;
    /// assert_eq!(Permutation::new(vec![2, 0, 1]).unwrap().lehmer_digits(), [2, 0, 0]);
    /// ```
    pub fn lehmer_digits(&self) -> Vec<u32> {
        lehmer::digits(&self.0)
    }

    /// The permutation with these Lehmer digits.
    ///
    /// # Errors
    /// When digit k is not below `len - k`.
    pub fn from_lehmer_digits(digits: &[u32]) -> Result<Self, PermutationError> {
        lehmer::entries(digits).map(Self)
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use proptest::prelude::*;

    use super::*;

    pub(crate) fn permutations(len: u32) -> impl Strategy<Value = Permutation> {
        Just((0..len).collect::<Vec<_>>()).prop_shuffle().prop_map(Permutation)
    }

    #[test]
    fn repeated_and_outside_entries_are_refused() {
        let error = Permutation::new(vec![0, 2, 2]).unwrap_err();
        assert_eq!(error.to_string(), "permutation entry 2: 2, expected each of 0..3 once");
        Permutation::new(vec![0, 3, 1]).unwrap_err();
        assert!(Permutation::new(Vec::new()).unwrap().is_empty());
    }

    #[test]
    fn then_follows_a_block_down_two_layers() {
        let upper = Permutation::new(vec![1, 2, 0]).unwrap();
        let lower = Permutation::new(vec![0, 2, 1]).unwrap();
        assert_eq!(upper.then(&lower).entries(), [2, 1, 0]);
    }

    proptest! {
        #[test]
        fn the_inverse_undoes(permutation in (0u32..40).prop_flat_map(permutations)) {
            prop_assert!(permutation.then(&permutation.inverse()).is_identity());
            prop_assert!(permutation.inverse().then(&permutation).is_identity());
        }
    }
}
