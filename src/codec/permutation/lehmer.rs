//! Lehmer digits of a permutation in O(n log n), both ways, with a Fenwick tree over the values not yet used.

use super::PermutationError;

/// Digit k is the number of later entries smaller than entry k (Eq. 100): below `len - k`.
pub(super) fn digits(entries: &[u32]) -> Vec<u32> {
    let mut unused = Unused::all(entries.len());
    entries
        .iter()
        .map(|&value| {
            let smaller = unused.count_below(value as usize);
            unused.remove(value as usize);
            smaller
        })
        .collect()
}

/// The entries with these digits: entry k is the unused value that `digits[k]` unused values precede.
pub(super) fn entries(digits: &[u32]) -> Result<Vec<u32>, PermutationError> {
    let len = digits.len();
    let mut unused = Unused::all(len);
    let mut entries = Vec::with_capacity(len);
    for (index, &digit) in digits.iter().enumerate() {
        let radix = (len - index) as u32;
        if digit >= radix {
            return Err(PermutationError::Digit { index, digit: i64::from(digit), radix });
        }
        let value = unused.find(digit);
        unused.remove(value);
        entries.push(value as u32);
    }
    Ok(entries)
}

/// The values not yet used, as a Fenwick tree: node `i` (from 1) counts the values in `i - lowbit(i) .. i`.
struct Unused {
    tree: Vec<u32>,
}

impl Unused {
    /// Every value below `len` is unused.
    fn all(len: usize) -> Self {
        Self { tree: (0..=len).map(|node| lowest_bit(node) as u32).collect() }
    }

    /// How many unused values are smaller than `value`.
    fn count_below(&self, value: usize) -> u32 {
        let (mut node, mut count) = (value, 0);
        while node > 0 {
            count += self.tree[node];
            node -= lowest_bit(node);
        }
        count
    }

    fn remove(&mut self, value: usize) {
        let mut node = value + 1;
        while node < self.tree.len() {
            self.tree[node] -= 1;
            node += lowest_bit(node);
        }
    }

    /// The unused value with exactly `rank` smaller ones; there are more than `rank` left.
    fn find(&self, mut rank: u32) -> usize {
        let len = self.tree.len() - 1;
        let mut node = 0;
        let mut step = (len + 1).next_power_of_two();
        while step > 0 {
            if let Some(&count) = self.tree.get(node + step)
                && count <= rank
            {
                rank -= count;
                node += step;
            }
            step /= 2;
        }
        node
    }
}

fn lowest_bit(node: usize) -> usize {
    node & node.wrapping_neg()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::tests::permutations;
    use super::*;

    #[test]
    fn digits_of_small_permutations_are_those_worked_by_hand() {
        assert_eq!(digits(&[0, 1, 2]), [0, 0, 0]);
        assert_eq!(digits(&[2, 1, 0]), [2, 1, 0]);
        assert_eq!(digits(&[1, 3, 0, 2]), [1, 2, 0, 0]);
        assert_eq!(entries(&[1, 2, 0, 0]).unwrap(), [1, 3, 0, 2]);
        assert_eq!(entries(&[]).unwrap(), [0u32; 0]);
    }

    #[test]
    fn a_digit_past_the_end_is_an_error() {
        assert_eq!(entries(&[3, 0, 0]).unwrap_err().to_string(), "Lehmer digit 0: 3, expected 0..3");
        assert_eq!(entries(&[0, 0, 1]).unwrap_err().to_string(), "Lehmer digit 2: 1, expected 0..1");
    }

    proptest! {
        #[test]
        fn digits_are_the_counts_of_the_definition(permutation in (0u32..60).prop_flat_map(permutations)) {
            let values = permutation.entries();
            let counted: Vec<u32> = (0..values.len())
                .map(|k| values[k + 1..].iter().filter(|&&later| later < values[k]).count() as u32)
                .collect();
            let digits = digits(values);
            prop_assert_eq!(&digits, &counted);
            prop_assert_eq!(entries(&digits).unwrap(), values);
        }
    }
}
