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
    /// Raw low bits per symbol.
    pub raw_bits: usize,
    /// Exceptions.
    pub exceptions: usize,
    /// Bytes of one exception's value.
    pub exception_value_bytes: usize,
}

impl StripLayout {
    /// Whole bytes of raw bits per symbol: as many byte planes.
    pub fn byte_planes(&self) -> usize {
        self.raw_bits / 8
    }

    /// Raw bits per symbol above the whole bytes: as many bit planes.
    pub fn bit_planes(&self) -> usize {
        self.raw_bits % 8
    }

    /// Groups of 32 symbols, the last of each run counted even if it is not full.
    pub fn vectors(&self) -> usize {
        let (runs, rest) = (self.symbols / self.run_elements, self.symbols % self.run_elements);
        runs * self.run_elements.div_ceil(LANES) + rest.div_ceil(LANES)
    }

    /// Bytes of the lane states.
    pub fn states_range(&self) -> Range<usize> {
        0..STATE_BYTES * self.lanes
    }

    /// Bytes of the lane words.
    pub fn words_range(&self) -> Range<usize> {
        let start = self.states_range().end;
        start..start + 2 * self.words
    }

    /// Bytes of byte plane `plane`: one per symbol.
    pub fn byte_plane_range(&self, plane: usize) -> Range<usize> {
        let start = self.words_range().end + plane * self.symbols;
        start..start + self.symbols
    }

    /// Bytes of the bit planes: per group of 32 symbols, one little-endian u32 per plane, bit = lane.
    pub fn bit_planes_range(&self) -> Range<usize> {
        let start = self.words_range().end + self.byte_planes() * self.symbols;
        start..start + 4 * self.bit_planes() * self.vectors()
    }

    /// Bytes of the exceptions: all positions (u16), then all values.
    pub fn exceptions_range(&self) -> Range<usize> {
        let start = self.bit_planes_range().end;
        start..start + self.exceptions * (2 + self.exception_value_bytes)
    }

    /// Length of the strip in bytes.
    pub fn bytes(&self) -> usize {
        self.exceptions_range().end
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_follow_one_another() {
        let layout = StripLayout {
            symbols: 100,
            run_elements: 40,
            lanes: 32,
            words: 7,
            raw_bits: 11,
            exceptions: 2,
            exception_value_bytes: 4,
        };
        assert_eq!(layout.vectors(), 2 + 2 + 1, "40 symbols are two groups, the last 20 one");
        assert_eq!(layout.words_range(), 128..142);
        assert_eq!(layout.byte_plane_range(0), 142..242);
        assert_eq!(layout.bit_planes_range(), 242..242 + 4 * 3 * 5);
        assert_eq!(layout.bytes(), 302 + 2 * 6);
        assert_eq!(StripLayout { lanes: 4, ..layout }.words_range(), 16..30);
    }
}
