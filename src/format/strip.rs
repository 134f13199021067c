//! Layout of one strip of symbols, "S32" (SPEC.md section 6): lane states, words, raw bits, exceptions.

use std::ops::Range;

/// The most lanes that a strip has: symbol i of a run belongs to lane i mod the number of lanes, 32 unless strips are small.
/// Raw bits come in groups of so many symbols whatever the number of lanes.
pub const LANES: usize = 32;
/// Bytes of the state of one lane.
const STATE_BYTES: usize = 4;

/// Where the pieces of one strip lie.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StripLayout {
    /// Symbols of the strip.
    pub symbols: usize,
    /// Symbols of one run; the strip's last run may be shorter.
    pub run_elements: usize,
    /// Lanes: a power of two, [`LANES`] at most.
    pub lanes: usize,
    /// 16-bit words of the lanes.
    pub words: usize,
    /// Bytes of the raw bits of all runs, see [`raw_bytes_of_run`].
    pub raw_bytes: usize,
    /// Exceptions.
    pub exceptions: usize,
    /// Bytes of one exception's value.
    pub exception_value_bytes: usize,
}

impl StripLayout {
    /// Bytes of the lane states.
    pub fn states_range(&self) -> Range<usize> {
        0..STATE_BYTES * self.lanes
    }

    /// Bytes of the lane words.
    pub fn words_range(&self) -> Range<usize> {
        let start = self.states_range().end;
        start..start + 2 * self.words
    }

    /// The raw bits, run after run.
    pub fn raw_range(&self) -> Range<usize> {
        let start = self.words_range().end;
        start..start + self.raw_bytes
    }

    /// Bytes of the exceptions: all positions (u16), then all values.
    pub fn exceptions_range(&self) -> Range<usize> {
        let start = self.raw_range().end;
        start..start + self.exceptions * (2 + self.exception_value_bytes)
    }

    /// Length of the strip in bytes.
    pub fn bytes(&self) -> usize {
        self.exceptions_range().end
    }
}

/// Bytes that `raw_bits` raw bits of each of a run's symbols take: a plane of one byte per symbol for each whole byte, lowest
/// first; then for every 32 symbols, the last of them perhaps fewer, a little-endian u32 for each bit that is left, with a bit
/// per symbol.
pub fn raw_bytes_of_run(symbols: usize, raw_bits: usize) -> usize {
    raw_bits / 8 * symbols + raw_bits % 8 * size_of::<u32>() * symbols.div_ceil(LANES)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_follow_one_another() {
        let raw_bytes = 2 * raw_bytes_of_run(40, 11) + raw_bytes_of_run(20, 11);
        assert_eq!(raw_bytes, 100 + 4 * 3 * 5, "40 symbols are two groups, the last 20 one");
        let layout = StripLayout {
            symbols: 100,
            run_elements: 40,
            lanes: 32,
            words: 7,
            raw_bytes,
            exceptions: 2,
            exception_value_bytes: 4,
        };
        assert_eq!(layout.words_range(), 128..142);
        assert_eq!(layout.raw_range(), 142..302);
        assert_eq!(layout.bytes(), 302 + 2 * 6);
        assert_eq!(StripLayout { lanes: 4, ..layout }.words_range(), 16..30);
    }
}
