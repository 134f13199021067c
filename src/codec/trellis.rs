//! Trellis-coded (dependent) quantization: the decoder's half, which the encoder's search shares.
//!
//! Two quantizers with twice the part's step interleave: the first has the even multiples of the step, the second the odd
//! ones. The state says which one a symbol belongs to, and the code's parity leads to the next state. The points that can
//! follow one another are so few that a code costs a bit less than on the fine grid, and the search over all sequences
//! (`pack::trellis_search`) still finds one near the weights. Transitions are those of Ungerboeck's codes for amplitude
//! modulation ("Trellis-coded modulation with redundant signal sets", part II, table I), as shift registers: a step costs a
//! decoder the same three operations whatever the number of states, and more states find a nearer path. Of the 0.25 bit
//! between plain scalar quantization and the rate-distortion bound, at 4 bits on Gaussian values, 8 states leave 0.075, 32
//! leave 0.053 and 256 leave 0.034.
//!
//! VVC and NNCodec give the second quantizer zero as well. Measured on Gaussian values at equal error, that costs 0.02 bit at
//! 4.4 bits, 0.035 at 3.6, 0.06 at 2.8 and 0.07 at 2.1, so it is not done here: the search finds its zeros through the states.
//!
//! Each lane of a strip runs a trellis of its own, from state 0 at the strip's first symbol to its last.

/// The transitions of one trellis.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Trellis {
    state_bits: u8,
    /// What a state of the second quantizer adds to the next.
    pub from_second: u16,
    /// What an odd code adds to the next state.
    pub from_odd: u16,
}

impl Trellis {
    /// The trellis of 2^`state_bits` states; `None` outside [`TRELLIS_STATE_BITS`](crate::format::limits::TRELLIS_STATE_BITS).
    pub const fn new(state_bits: u8) -> Option<Self> {
        // Parity-check polynomials h0 and h1 in octal. Both ends of h0 are 1, both ends of h1 are 0.
        let (h0, h1) = match state_bits {
            3 => (0o13, 0o4),
            4 => (0o23, 0o4),
            5 => (0o45, 0o10),
            6 => (0o103, 0o24),
            7 => (0o235, 0o126),
            8 => (0o515, 0o362),
            _ => return None,
        };
        Some(Self { state_bits, from_second: h0 >> 1, from_odd: h1 >> 1 })
    }

    /// The smallest.
    pub const EIGHT_STATES: Self = Self { state_bits: 3, from_second: 0o13 >> 1, from_odd: 0o4 >> 1 };

    /// Number of states.
    pub const fn states(self) -> usize {
        1 << self.state_bits
    }

    /// The state after a symbol whose multiple is `multiple`: the multiple's second bit is its code's parity.
    ///
    /// ```
    /// # use mcwcfs::codec::trellis::Trellis;
    /// let trellis = Trellis::new(3).unwrap();
    /// assert_eq!([0, 2, 4].map(|multiple| trellis.next_state(6, multiple)), [3, 1, 3]);
    /// assert_eq!([1, 3, 5].map(|multiple| trellis.next_state(7, multiple)), [6, 4, 6]);
    /// ```
    #[inline(always)]
    pub const fn next_state(self, state: u16, multiple: i32) -> u16 {
        let parity = (multiple >> 1 & 1) as u16;
        // Masks, not branches: loops over lanes vectorize.
        state >> 1 ^ self.from_second & (state & 1).wrapping_neg() ^ self.from_odd & parity.wrapping_neg()
    }

    /// The state that leads to `state` by a code of this parity: its upper bit tells the quantizer of both.
    #[inline(always)]
    pub const fn previous_state(self, state: u16, parity: u16) -> u16 {
        let second = state >> (self.state_bits - 1);
        let halved = state ^ self.from_second & second.wrapping_neg() ^ self.from_odd & parity.wrapping_neg();
        halved << 1 | second
    }
}

/// Which quantizer a state uses: 0 for even multiples, 1 for odd ones.
#[inline(always)]
pub const fn quantizer_of(state: u16) -> u8 {
    (state & 1) as u8
}

/// The multiple of the step that a code stands for: `2 code` in the first quantizer, `2 code + 1` in the second.
///
/// ```
/// # use mcwcfs::codec::trellis::multiple;
/// assert_eq!([-2, -1, 0, 1, 2].map(|code| multiple(code, 0)), [-4, -2, 0, 2, 4]);
/// assert_eq!([-2, -1, 0, 1, 2].map(|code| multiple(code, 1)), [-3, -1, 1, 3, 5]);
/// ```
#[inline]
pub fn multiple(code: i32, quantizer: u8) -> i32 {
    2 * code + i32::from(quantizer)
}

/// The code of a multiple, the inverse of [`multiple`]. The multiple must be one of the quantizer's.
#[inline]
pub fn code_of(multiple: i32, quantizer: u8) -> i32 {
    (multiple - i32::from(quantizer)) >> 1
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::limits::TRELLIS_STATE_BITS;

    #[test]
    fn every_multiple_has_its_code() {
        for code in -100..=100 {
            for quantizer in 0..2 {
                assert_eq!(code_of(multiple(code, quantizer), quantizer), code);
            }
        }
    }

    #[test]
    fn every_state_is_entered_from_two_states_of_one_quantizer() {
        for trellis in TRELLIS_STATE_BITS.map(|bits| Trellis::new(bits).expect("in range")) {
            let mut entered = vec![Vec::new(); trellis.states()];
            for state in 0..trellis.states() as u16 {
                for parity in 0..2 {
                    let next = trellis.next_state(state, i32::from(2 * parity));
                    entered[usize::from(next)].push(state);
                    assert_eq!(trellis.previous_state(next, parity), state);
                }
            }
            for (state, from) in entered.into_iter().enumerate() {
                let [a, b] = from[..] else { panic!("state {state} is entered from {from:?}") };
                assert_ne!(a, b, "by different ways");
                assert_eq!(quantizer_of(a), quantizer_of(b));
            }
        }
    }

    /// The squared distance of two paths that part in one state and meet again, in squared steps: what makes a trellis good.
    #[test]
    fn more_states_lie_further_apart() {
        for (state_bits, expected) in (3..).zip([10, 11, 13, 14, 16, 17]) {
            let trellis = Trellis::new(state_bits).expect("in range");
            // Of two residues modulo 4, the nearest multiples. The code is linear: the zero path stands for all.
            let least_square = |residue: u16| [0, 1, 4, 1][usize::from(residue)];
            let mut distance = vec![u32::MAX; trellis.states()];
            let start = usize::from(trellis.next_state(0, 2));
            distance[start] = least_square(2);
            let mut home = u32::MAX;
            for _ in 0..8 * trellis.states() {
                let mut next = vec![u32::MAX; trellis.states()];
                for state in (1..trellis.states() as u16).filter(|&state| distance[usize::from(state)] < u32::MAX) {
                    for second_bit in 0..2 {
                        let square = least_square(state & 1 | second_bit << 1);
                        let to = usize::from(trellis.next_state(state, i32::from(second_bit << 1)));
                        let through = distance[usize::from(state)] + square;
                        let known = if to == 0 { &mut home } else { &mut next[to] };
                        *known = through.min(*known);
                    }
                }
                distance = next;
            }
            assert_eq!(home, expected, "{state_bits} state bits");
        }
    }
}
