//! The entropy coder of permutations: an asymmetric numeral system with a 64-bit state and 32-bit words.
//!
//! Weights go through the faster coder of `codec::entropy`; here a digit may take a million values, equally likely.

use super::PermutationError;
use super::frequencies::{FREQUENCY_BITS, Frequencies};

/// A state is never below this between symbols.
pub(super) const STATE_MIN: u64 = 1 << 32;

/// The last symbol pushed is the first popped.
pub(super) struct Encoder {
    state: u64,
    words: Vec<u32>,
}

impl Encoder {
    pub(super) fn new(state: u64) -> Self {
        Self { state, words: Vec::new() }
    }

    /// Pushes the slot range `start .. start + frequency` of `2^bits`.
    fn push(&mut self, start: u64, frequency: u64, bits: u32) {
        if self.state >= frequency << (64 - bits) {
            self.words.push(self.state as u32);
            self.state >>= 32;
        }
        self.state = ((self.state / frequency) << bits) + start + self.state % frequency;
    }

    pub(super) fn push_uniform(&mut self, digit: u32, radix: u32) {
        if radix > 1 {
            let (start, frequency) = slots_of_digit(digit, radix);
            self.push(start, frequency, 32);
        }
    }

    pub(super) fn push_symbol(&mut self, symbol: usize, frequencies: &Frequencies) {
        let frequency = u64::from(frequencies.of(symbol));
        self.push(u64::from(frequencies.cumulated(symbol)), frequency, FREQUENCY_BITS);
    }

    /// Appends the state, then the words in the order of their reading.
    pub(super) fn finish(self, mut bytes: Vec<u8>) -> Vec<u8> {
        bytes.extend(self.state.to_le_bytes());
        bytes.extend(self.words.iter().rev().flat_map(|word| word.to_le_bytes()));
        bytes
    }
}

/// Where digit `digit` of `radix` equally likely ones lies in 2^32 slots: its start and how many.
fn slots_of_digit(digit: u32, radix: u32) -> (u64, u64) {
    let start = |digit: u64| (digit << 32) / u64::from(radix);
    let first = start(u64::from(digit));
    (first, start(u64::from(digit) + 1) - first)
}

/// Pops what [`Encoder`] pushed, last first.
pub(super) struct Decoder<'a> {
    state: u64,
    words: std::slice::Iter<'a, [u8; 4]>,
}

impl<'a> Decoder<'a> {
    pub(super) fn new(bytes: &'a [u8]) -> Result<Self, PermutationError> {
        let Some((state, rest)) = bytes.split_first_chunk::<8>() else {
            return Err(PermutationError::Truncated { field: "state", needed: 8, left: bytes.len() });
        };
        let state = u64::from_le_bytes(*state);
        let (words, ragged) = rest.as_chunks::<4>();
        if !ragged.is_empty() {
            return Err(PermutationError::Truncated { field: "last word", needed: 4, left: ragged.len() });
        }
        if state < STATE_MIN {
            return Err(PermutationError::Malformed { field: "state", found: state, expected: "2^32 or more" });
        }
        Ok(Self { state, words: words.iter() })
    }

    /// Leaves the slot range that the state pointed into.
    fn pop(&mut self, start: u64, frequency: u64, slot: u64, bits: u32) -> Result<(), PermutationError> {
        self.state = frequency * (self.state >> bits) + slot - start;
        if self.state < STATE_MIN {
            let Some(word) = self.words.next() else {
                return Err(PermutationError::Truncated { field: "next word", needed: 4, left: 0 });
            };
            self.state = (self.state << 32) | u64::from(u32::from_le_bytes(*word));
        }
        Ok(())
    }

    pub(super) fn pop_uniform(&mut self, radix: u32) -> Result<u32, PermutationError> {
        if radix == 1 {
            return Ok(0);
        }
        let slot = self.state & (STATE_MIN - 1);
        let digit = (((slot + 1) * u64::from(radix) - 1) >> 32) as u32; // the last whose start is not behind the slot
        let (start, frequency) = slots_of_digit(digit, radix);
        self.pop(start, frequency, slot, 32)?;
        Ok(digit)
    }

    pub(super) fn pop_symbol(&mut self, slots: &[u8], frequencies: &Frequencies) -> Result<usize, PermutationError> {
        let slot = self.state & ((1 << FREQUENCY_BITS) - 1);
        let symbol = usize::from(slots[slot as usize]);
        let start = u64::from(frequencies.cumulated(symbol));
        self.pop(start, u64::from(frequencies.of(symbol)), slot, FREQUENCY_BITS)?;
        Ok(symbol)
    }

    /// The final state, all words used.
    pub(super) fn finish(self) -> Result<u64, PermutationError> {
        let left = self.words.len();
        if left > 0 {
            let found = 4 * left as u64;
            return Err(PermutationError::Malformed { field: "bytes after the last word", found, expected: "none" });
        }
        Ok(self.state)
    }
}
