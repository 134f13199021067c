//! A run of differences: how many of its bits are raw, and how many of each symbol it has above them.

use super::super::entropy_model::class_of_magnitude;
use super::super::histogram::Histogram;

/// Elements of a run: classes begin anywhere in the coded order, and a run that two share fits neither.
pub const RUN_ELEMENTS: usize = 256;
/// Of the elements of a run, one in so many may lie beyond the codes of a table before more of their bits become raw.
const BEYOND: usize = 128;
/// Where runs are coded, from none to one in so many is tried.
const MOST_BEYOND: usize = 32;
/// Codes on either side of zero that a table holds.
const REACH: u32 = 28;
/// Raw bits tried beside the fewest.
const MORE_RAW_BITS: u8 = 4;

/// A run's differences.
#[derive(Clone, Copy)]
pub struct Run<'a> {
    differences: &'a [i32],
    /// Low bits that all but exceptions have as zeros, and that are neither symbol nor raw.
    zero_bits: u8,
}

impl<'a> Run<'a> {
    /// A run of at most [`RUN_ELEMENTS`] differences.
    pub fn new(differences: &'a [i32], zero_bits: u8) -> Self {
        Self { differences, zero_bits }
    }

    /// Raw bits that are likely to suit the run.
    pub fn raw_bits(self) -> u8 {
        self.fitting_raw_bits(self.differences.len() / BEYOND)
    }

    /// Counts the symbols above so many raw bits. Those that no code can be count as the nearest that can.
    pub fn count(self, raw_bits: u8) -> Histogram {
        let shift = (u32::from(raw_bits) + u32::from(self.zero_bits)).min(31);
        let mut symbols = [0; RUN_ELEMENTS];
        let symbols = &mut symbols[..self.differences.len()];
        for (symbol, &difference) in symbols.iter_mut().zip(self.differences) {
            *symbol = (difference >> shift).clamp(i16::MIN.into(), i16::MAX.into());
        }
        Histogram::of(symbols)
    }

    /// Counts the symbols above every number of raw bits that may suit the run.
    pub fn candidates(self) -> Vec<(u8, Histogram)> {
        let fewest = self.fitting_raw_bits(self.differences.len() / MOST_BEYOND);
        let most = self.fitting_raw_bits(0).min(fewest + MORE_RAW_BITS);
        let mut raw_bits = fewest.saturating_sub(1);
        let mut histogram = self.count(raw_bits);
        let mut candidates = Vec::with_capacity(usize::from(most - raw_bits) + 1);
        while raw_bits < most {
            let halved = histogram.halved();
            candidates.push((raw_bits, std::mem::replace(&mut histogram, halved)));
            raw_bits += 1;
        }
        candidates.push((raw_bits, histogram));
        candidates
    }

    /// The fewest raw bits with which all symbols but `most_beyond` are codes that a table can hold.
    fn fitting_raw_bits(self, most_beyond: usize) -> u8 {
        let magnitude = |&difference: &i32| (difference >> self.zero_bits).unsigned_abs();
        let longest =
            32 - self.differences.iter().fold(0, |bits, difference| bits | magnitude(difference)).leading_zeros();
        let reach_bits = 32 - REACH.leading_zeros();
        let mut raw_bits = longest.saturating_sub(reach_bits);
        while raw_bits > 0 {
            let limit = 1 << (reach_bits + raw_bits - 1);
            let beyond: u32 = self.differences.iter().map(|difference| u32::from(magnitude(difference) >= limit)).sum();
            if beyond as usize > most_beyond {
                break;
            }
            raw_bits -= 1;
        }
        raw_bits as u8
    }
}

/// The class of a run: how large its symbols are.
pub fn class_of_run(run: &Histogram) -> i32 {
    class_of_magnitude(run.occurring())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn raw_bits_grow_with_the_differences() {
        let run = |scale: i32| (0..256).map(|i| (i % 17 - 8) * scale).collect::<Vec<_>>();
        let raw_bits: Vec<u8> = [1, 2, 8, 64].into_iter().map(|scale| Run::new(&run(scale), 0).raw_bits()).collect();
        assert!(raw_bits.is_sorted() && raw_bits[0] == 0 && raw_bits[3] > 3, "{raw_bits:?}");
    }

    proptest! {
        #[test]
        fn candidates_are_counted_as_each_would_be(
            differences in prop::collection::vec(-3000..3000_i32, 1..RUN_ELEMENTS),
            zero_bits in 0_u8..3,
        ) {
            let run = Run::new(&differences, zero_bits);
            for (raw_bits, histogram) in run.candidates() {
                prop_assert!(histogram.occurring().eq(run.count(raw_bits).occurring()));
            }
        }
    }
}
