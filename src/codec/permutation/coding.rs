//! Permutations as bytes: raw entries, uniform Lehmer digits, or digit differences to the layer below (Eqs. 101-104).
//!
//! The first byte says which coding follows. Numbers are little endian.
//!
//! **Raw** (0): each entry of the outer permutation in `ceil(log2 groups)` bits, then those of each inner one in
//! `ceil(log2 members)`, lowest bit first, the last byte filled with zero bits.
//!
//! **Uniform** (1): digit k takes one of r(k) values, equally likely; digits with r = 1 are not coded. The last digits, as
//! many as have a product of radices P <= 2^61, are the number `t = d + r * (d' + r' * (d'' + ...))`, first of them in
//! front. If that is all digits, `t` follows in as many bytes as `P - 1` needs. Otherwise follow a `u64` state x and
//! `u32` words, and each earlier digit in turn is read as: `q = x mod 2^32`, `d = ((q + 1) * r - 1) >> 32`,
//! `c = (d << 32) / r`, `f = ((d + 1) << 32) / r - c`, `x = f * (x >> 32) + q - c`, and if `x < 2^32` then
//! `x = (x << 32) + next word`. At the end `t = x - 2^62`, and all words are used. The cost is log2(B!) and 3 bytes.
//!
//! **Delta** (2): 18 frequencies of 12 bits, in the bits of 27 bytes, lowest first: f(0) to f(16) of the magnitude of a
//! difference `digit - digit of the layer below`, and f(escape); each at least 1, `f(0) + 2 f(1) + ... + 2 f(16) +
//! f(escape) = 4096`. Symbols are the zig-zag indices 0 to 32 (0, -1, 1, -2, 2, ...) and 33 for the escape, with
//! cumulated frequencies in that order. Then a `u64` state and `u32` words as above: a symbol is read with
//! `q = x mod 4096` and `x = f * (x >> 12) + q - c`, refilled likewise; an escape is followed by the digit, uniform as
//! above. The state ends at 2^32 with all words used.

use super::{GroupedPermutation, PermutationError, Symmetry};

/// How a permutation is written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum PermutationCoding {
    /// Whichever of the others is shortest.
    #[default]
    Shortest,
    /// Fixed-width entries (the paper's ablation without entropy coding).
    Raw,
    /// Lehmer digits, each value equally likely: log2(B!) bits (Eq. 11).
    Uniform,
    /// Differences of Lehmer digits across depth (Eqs. 101-104); falls back to `Uniform` where nothing lies below.
    Delta,
}

const RAW: u8 = 0;
const UNIFORM: u8 = 1;
const DELTA: u8 = 2;

/// A coder state is never below this between symbols.
const STATE_MIN: u64 = 1 << 32;
/// What the uniform coding adds to the number of the last digits, so that it is a state.
const TAIL_BASE: u64 = 1 << 62;
/// The product of the radices of those digits is at most this.
const TAIL_LIMIT: u64 = 1 << 61;
/// Differences beyond this are escaped (section G.6).
const LARGEST_DELTA: u64 = 16;
/// Bits of a frequency.
const FREQUENCY_BITS: u32 = 12;
/// Magnitudes 0 to 16 and the escape.
const FREQUENCIES: usize = LARGEST_DELTA as usize + 2;
/// The escape's symbol; the others are zig-zag indices.
const ESCAPE: usize = 2 * LARGEST_DELTA as usize + 1;

/// Writes a permutation. `previous` is the one stored for the layer below, for delta coding.
pub fn encode(
    permutation: &GroupedPermutation,
    previous: Option<&GroupedPermutation>,
    coding: PermutationCoding,
) -> Vec<u8> {
    let previous = previous.filter(|previous| previous.symmetry() == permutation.symmetry());
    match (coding, previous) {
        (PermutationCoding::Raw, _) => encode_raw(permutation),
        (PermutationCoding::Uniform, _) | (PermutationCoding::Delta, None) => encode_uniform(permutation),
        (PermutationCoding::Delta, Some(previous)) => encode_delta(permutation, previous),
        (PermutationCoding::Shortest, _) => {
            let mut candidates = vec![encode_uniform(permutation), encode_raw(permutation)];
            candidates.extend(previous.map(|previous| encode_delta(permutation, previous)));
            candidates.into_iter().min_by_key(Vec::len).expect("two candidates at least") // the first of equals
        }
    }
}

/// Reads what [`encode`] wrote; `bytes` hold the permutation and nothing else.
///
/// # Errors
/// When the symmetry is out of bounds, the coding unknown or delta without `previous`, the bytes too few, too many, or
/// no permutation.
pub fn decode(
    bytes: &[u8],
    symmetry: Symmetry,
    previous: Option<&GroupedPermutation>,
) -> Result<GroupedPermutation, PermutationError> {
    symmetry.blocks()?;
    let Some((&coding, payload)) = bytes.split_first() else {
        return Err(PermutationError::Truncated { field: "coding", needed: 1, left: 0 });
    };
    match coding {
        RAW => decode_raw(payload, symmetry),
        UNIFORM => decode_uniform(payload, symmetry),
        DELTA => {
            let previous = previous.filter(|previous| previous.symmetry() == symmetry);
            decode_delta(payload, symmetry, previous.ok_or(PermutationError::NoReference)?)
        }
        other => Err(PermutationError::Malformed { field: "coding", found: u64::from(other), expected: "0, 1 or 2" }),
    }
}

fn encode_raw(permutation: &GroupedPermutation) -> Vec<u8> {
    let Symmetry { groups, members } = permutation.symmetry();
    let mut bits = BitWriter { bytes: vec![RAW], used: 8 };
    for &entry in permutation.outer().entries() {
        bits.write(entry, width(groups));
    }
    for &entry in permutation.inner().iter().flat_map(|inner| inner.entries()) {
        bits.write(entry, width(members));
    }
    bits.bytes
}

fn decode_raw(payload: &[u8], symmetry: Symmetry) -> Result<GroupedPermutation, PermutationError> {
    let Symmetry { groups, members } = symmetry;
    let mut bits = BitReader { bytes: payload, position: 0 };
    let outer = bits.permutation(groups)?;
    let inner = (0..groups).map(|_| bits.permutation(members)).collect::<Result<_, _>>()?;
    bits.finish()?;
    GroupedPermutation::new(outer, inner)
}

fn encode_uniform(permutation: &GroupedPermutation) -> Vec<u8> {
    let symmetry = permutation.symmetry();
    let digits: Vec<(u32, u32)> = permutation.digits().into_iter().zip(symmetry.radices()).collect();
    let tail = Tail::of(symmetry);
    let (earlier, last) = digits.split_at(tail.start);
    let number = last.iter().rev().fold(0, |number, &(digit, radix)| number * u64::from(radix) + u64::from(digit));
    let mut bytes = vec![UNIFORM];
    if tail.start == 0 {
        bytes.extend(&number.to_le_bytes()[..tail.bytes()]);
        return bytes;
    }
    let mut coder = Encoder { state: TAIL_BASE + number, words: Vec::new() };
    for &(digit, radix) in earlier.iter().rev() {
        coder.push_uniform(digit, radix);
    }
    coder.finish(bytes)
}

fn decode_uniform(payload: &[u8], symmetry: Symmetry) -> Result<GroupedPermutation, PermutationError> {
    let tail = Tail::of(symmetry);
    let mut radices = symmetry.radices();
    let mut digits = Vec::with_capacity((symmetry.groups + symmetry.groups * symmetry.members) as usize);
    let mut number = if tail.start == 0 {
        if payload.len() != tail.bytes() {
            return Err(wrong_length("digits", tail.bytes(), payload.len()));
        }
        let mut number = [0; 8];
        number[..payload.len()].copy_from_slice(payload);
        u64::from_le_bytes(number)
    } else {
        let mut coder = Decoder::new(payload)?;
        for radix in radices.by_ref().take(tail.start) {
            digits.push(coder.pop_uniform(radix)?);
        }
        coder.finish()?.wrapping_sub(TAIL_BASE) // a state below the base becomes a number far above the limit
    };
    if number >= tail.product {
        return Err(PermutationError::Malformed {
            field: "last digits",
            found: number,
            expected: "a number below the product of their radices",
        });
    }
    for radix in radices {
        digits.push((number % u64::from(radix)) as u32);
        number /= u64::from(radix);
    }
    GroupedPermutation::from_digits(&digits, symmetry)
}

fn encode_delta(permutation: &GroupedPermutation, previous: &GroupedPermutation) -> Vec<u8> {
    let symmetry = permutation.symmetry();
    // Each digit, its difference to the one below and how many values it may take, where that is more than one.
    let coded: Vec<(u32, i64, u32)> = permutation
        .digits()
        .into_iter()
        .zip(previous.digits())
        .zip(symmetry.radices())
        .filter(|&(_, radix)| radix > 1)
        .map(|((digit, before), radix)| (digit, i64::from(digit) - i64::from(before), radix))
        .collect();
    let frequencies = Frequencies::fitted(coded.iter().map(|&(_, delta, _)| delta.unsigned_abs()));
    let mut bits = BitWriter { bytes: vec![DELTA], used: 8 };
    for &frequency in &frequencies.0 {
        bits.write(frequency, FREQUENCY_BITS);
    }
    let mut coder = Encoder { state: STATE_MIN, words: Vec::new() };
    for &(digit, delta, radix) in coded.iter().rev() {
        if delta.unsigned_abs() > LARGEST_DELTA {
            coder.push_uniform(digit, radix); // the last pushed is the first popped: the escape comes before its digit
            coder.push_symbol(ESCAPE, &frequencies);
        } else {
            coder.push_symbol(zig_zag(delta), &frequencies);
        }
    }
    coder.finish(bits.bytes)
}

fn decode_delta(
    payload: &[u8],
    symmetry: Symmetry,
    previous: &GroupedPermutation,
) -> Result<GroupedPermutation, PermutationError> {
    const TABLE_BYTES: usize = FREQUENCIES * FREQUENCY_BITS as usize / 8;
    let Some((table, stream)) = payload.split_at_checked(TABLE_BYTES) else {
        return Err(PermutationError::Truncated { field: "frequencies", needed: TABLE_BYTES, left: payload.len() });
    };
    let frequencies = Frequencies::parse(table)?;
    let symbols = frequencies.slots();
    let mut coder = Decoder::new(stream)?;
    let mut digits = previous.digits();
    for (index, (digit, radix)) in digits.iter_mut().zip(symmetry.radices()).enumerate() {
        if radix == 1 {
            continue;
        }
        let symbol = coder.pop_symbol(&symbols, &frequencies)?;
        if symbol == ESCAPE {
            *digit = coder.pop_uniform(radix)?;
            continue;
        }
        let sum = i64::from(*digit) + zig_zag_inverse(symbol);
        match u32::try_from(sum) {
            Ok(sum) if sum < radix => *digit = sum,
            _ => return Err(PermutationError::Digit { index, digit: sum, radix }),
        }
    }
    let state = coder.finish()?;
    if state != STATE_MIN {
        return Err(PermutationError::Malformed { field: "final state", found: state, expected: "2^32" });
    }
    GroupedPermutation::from_digits(&digits, symmetry)
}

/// Eq. 102.
fn zig_zag(delta: i64) -> usize {
    (if delta >= 0 { 2 * delta } else { -2 * delta - 1 }) as usize
}

fn zig_zag_inverse(symbol: usize) -> i64 {
    let half = symbol.div_ceil(2) as i64;
    if symbol.is_multiple_of(2) { half } else { -half }
}

/// The last digits of the uniform coding, which are one exact number.
struct Tail {
    /// Index of the first of them.
    start: usize,
    /// Product of their radices.
    product: u64,
}

impl Tail {
    fn of(symmetry: Symmetry) -> Self {
        let digits = (symmetry.groups + symmetry.groups * symmetry.members) as usize;
        let (mut product, mut count) = (1u64, 0);
        for radix in symmetry.radices().rev() {
            match product.checked_mul(u64::from(radix)) {
                Some(longer) if longer <= TAIL_LIMIT => product = longer,
                _ => break,
            }
            count += 1;
        }
        Self { start: digits - count, product }
    }

    /// Bytes that hold every number below the product.
    fn bytes(&self) -> usize {
        (u64::BITS - (self.product - 1).leading_zeros()).div_ceil(8) as usize
    }
}

/// Frequencies of the magnitudes 0 to 16 and of the escape.
#[derive(Debug, PartialEq, Eq)]
struct Frequencies([u32; FREQUENCIES]);

impl Frequencies {
    /// A discrete Laplace distribution (Eq. 104) with the scale of greatest likelihood, and the escapes' share.
    fn fitted(magnitudes: impl Iterator<Item = u64>) -> Self {
        let (mut count, mut escapes, mut sum) = (0u64, 0u64, 0u64);
        for magnitude in magnitudes {
            count += 1;
            if magnitude > LARGEST_DELTA {
                escapes += 1;
            } else {
                sum += magnitude;
            }
        }
        const TOTAL: u32 = 1 << FREQUENCY_BITS;
        const LEAST: u32 = 2 * LARGEST_DELTA as u32 + 1; // every symbol but the escape once
        let share = escapes as f64 / count.max(1) as f64;
        let escape = ((share * f64::from(TOTAL)).round() as u32).clamp(1, TOTAL - LEAST);
        // Mean magnitude of a two-sided geometric distribution with ratio q: 2 q / (1 - q^2), solved for q.
        let mean = sum as f64 / (count - escapes).max(1) as f64;
        let ratio = if mean > 0.0 { ((1.0 + mean * mean).sqrt() - 1.0) / mean } else { 0.0 };
        let weights: Vec<f64> = (0..=LARGEST_DELTA as i32).map(|magnitude| ratio.powi(magnitude)).collect();
        let total: f64 = weights[0] + 2.0 * weights[1..].iter().sum::<f64>();
        let spare = TOTAL - escape - LEAST; // shared out by weight on top of the 1 that every symbol has
        let mut frequencies = [1; FREQUENCIES];
        for (frequency, weight) in frequencies[1..].iter_mut().zip(&weights[1..]) {
            *frequency = 1 + (f64::from(spare) * weight / total) as u32;
        }
        frequencies[FREQUENCIES - 1] = escape;
        let others: u32 = 2 * frequencies[1..FREQUENCIES - 1].iter().sum::<u32>() + escape;
        frequencies[0] = TOTAL - others;
        Self(frequencies)
    }

    fn parse(table: &[u8]) -> Result<Self, PermutationError> {
        let mut bits = BitReader { bytes: table, position: 0 };
        let mut frequencies = [0; FREQUENCIES];
        for frequency in &mut frequencies {
            *frequency = bits.read(FREQUENCY_BITS)?;
        }
        let parsed = Self(frequencies);
        let sum: u64 = (0..=ESCAPE).map(|symbol| u64::from(parsed.of(symbol))).sum();
        if sum != 1 << FREQUENCY_BITS {
            return Err(PermutationError::Malformed { field: "sum of frequencies", found: sum, expected: "4096" });
        }
        if frequencies.contains(&0) {
            return Err(PermutationError::Malformed { field: "frequency", found: 0, expected: "1 or more" });
        }
        Ok(parsed)
    }

    /// Frequency of a symbol: both signs of a magnitude share theirs.
    fn of(&self, symbol: usize) -> u32 {
        self.0[symbol.div_ceil(2)] // the escape, 33, is entry 17
    }

    /// Sum of the frequencies of all symbols before this one.
    fn cumulated(&self, symbol: usize) -> u32 {
        (0..symbol).map(|before| self.of(before)).sum()
    }

    /// The symbol of each of the 4096 slots.
    fn slots(&self) -> Vec<u8> {
        (0..=ESCAPE).flat_map(|symbol| std::iter::repeat_n(symbol as u8, self.of(symbol) as usize)).collect()
    }
}

/// Asymmetric numeral system with a 64-bit state and 32-bit words; the last symbol pushed is the first popped.
struct Encoder {
    state: u64,
    words: Vec<u32>,
}

impl Encoder {
    /// Pushes the slot range `start .. start + frequency` of `2^bits`.
    fn push(&mut self, start: u64, frequency: u64, bits: u32) {
        if self.state >= frequency << (64 - bits) {
            self.words.push(self.state as u32);
            self.state >>= 32;
        }
        self.state = ((self.state / frequency) << bits) + start + self.state % frequency;
    }

    fn push_uniform(&mut self, digit: u32, radix: u32) {
        if radix > 1 {
            let (start, frequency) = slots_of_digit(digit, radix);
            self.push(start, frequency, 32);
        }
    }

    fn push_symbol(&mut self, symbol: usize, frequencies: &Frequencies) {
        let frequency = u64::from(frequencies.of(symbol));
        self.push(u64::from(frequencies.cumulated(symbol)), frequency, FREQUENCY_BITS);
    }

    /// Appends the state, then the words in the order of their reading.
    fn finish(self, mut bytes: Vec<u8>) -> Vec<u8> {
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

struct Decoder<'a> {
    state: u64,
    words: std::slice::Iter<'a, [u8; 4]>,
}

impl<'a> Decoder<'a> {
    fn new(bytes: &'a [u8]) -> Result<Self, PermutationError> {
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

    fn pop_uniform(&mut self, radix: u32) -> Result<u32, PermutationError> {
        if radix == 1 {
            return Ok(0);
        }
        let slot = self.state & (STATE_MIN - 1);
        let digit = (((slot + 1) * u64::from(radix) - 1) >> 32) as u32; // the last whose start is not behind the slot
        let (start, frequency) = slots_of_digit(digit, radix);
        self.pop(start, frequency, slot, 32)?;
        Ok(digit)
    }

    fn pop_symbol(&mut self, slots: &[u8], frequencies: &Frequencies) -> Result<usize, PermutationError> {
        let slot = self.state & ((1 << FREQUENCY_BITS) - 1);
        let symbol = usize::from(slots[slot as usize]);
        let start = u64::from(frequencies.cumulated(symbol));
        self.pop(start, u64::from(frequencies.of(symbol)), slot, FREQUENCY_BITS)?;
        Ok(symbol)
    }

    /// The final state, all words used.
    fn finish(self) -> Result<u64, PermutationError> {
        let left = self.words.len();
        if left > 0 {
            let found = 4 * left as u64;
            return Err(PermutationError::Malformed { field: "bytes after the last word", found, expected: "none" });
        }
        Ok(self.state)
    }
}

/// Bits of a fixed-width entry below `count`.
fn width(count: u32) -> u32 {
    u32::BITS - (count - 1).leading_zeros()
}

/// Appends numbers bit by bit, lowest first.
struct BitWriter {
    bytes: Vec<u8>,
    /// Bits used of the last byte.
    used: u32,
}

impl BitWriter {
    fn write(&mut self, value: u32, width: u32) {
        for bit in 0..width {
            if self.used == 8 {
                self.bytes.push(0);
                self.used = 0;
            }
            let last = self.bytes.last_mut().expect("starts with the coding's byte");
            *last |= ((value >> bit & 1) as u8) << self.used;
            self.used += 1;
        }
    }
}

struct BitReader<'a> {
    bytes: &'a [u8],
    position: usize,
}

impl BitReader<'_> {
    fn read(&mut self, width: u32) -> Result<u32, PermutationError> {
        let mut value = 0;
        for bit in 0..width {
            let Some(byte) = self.bytes.get(self.position / 8) else {
                return Err(PermutationError::Truncated { field: "entries", needed: 1, left: 0 });
            };
            value |= u32::from(byte >> (self.position % 8) & 1) << bit;
            self.position += 1;
        }
        Ok(value)
    }

    fn permutation(&mut self, len: u32) -> Result<super::Permutation, PermutationError> {
        let bits = u64::from(len) * u64::from(width(len));
        let left = (self.bytes.len() * 8 - self.position) as u64;
        if bits > left {
            return Err(wrong_length("entries", bits.div_ceil(8) as usize, left as usize / 8));
        }
        super::Permutation::new((0..len).map(|_| self.read(width(len))).collect::<Result<_, _>>()?)
    }

    /// Only zero bits of the last byte are left.
    fn finish(mut self) -> Result<(), PermutationError> {
        let left = self.bytes.len() * 8 - self.position;
        let padding = if left < 8 { self.read(left as u32)? } else { 1 };
        if padding != 0 {
            let found = left as u64;
            return Err(PermutationError::Malformed { field: "bits after the last entry", found, expected: "zeros" });
        }
        Ok(())
    }
}

/// Too few bytes, or too many.
fn wrong_length(field: &'static str, needed: usize, found: usize) -> PermutationError {
    if found < needed {
        return PermutationError::Truncated { field, needed, left: found };
    }
    PermutationError::Malformed { field: "bytes after the digits", found: (found - needed) as u64, expected: "none" }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::Permutation;
    use super::super::grouped::tests::grouped;
    use super::*;

    const CODINGS: [PermutationCoding; 4] =
        [PermutationCoding::Shortest, PermutationCoding::Raw, PermutationCoding::Uniform, PermutationCoding::Delta];

    fn reversed(len: u32) -> GroupedPermutation {
        GroupedPermutation::free(Permutation::new((0..len).rev().collect()).unwrap()).unwrap()
    }

    /// A permutation that looks like chance, the same in every run.
    fn scattered(len: u32) -> GroupedPermutation {
        let mut entries: Vec<u32> = (0..len).collect();
        let mut state = 1u64;
        for index in (1..entries.len()).rev() {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            entries.swap(index, (state >> 33) as usize % (index + 1));
        }
        GroupedPermutation::free(Permutation::new(entries).unwrap()).unwrap()
    }

    #[test]
    fn three_blocks_are_one_number_below_six() {
        // Lehmer digits of [2, 1, 0]: 2 of 3, 1 of 2, 0 of 1: 2 + 3 * 1.
        assert_eq!(encode(&reversed(3), None, PermutationCoding::Uniform), [UNIFORM, 5]);
        assert_eq!(encode(&reversed(1), None, PermutationCoding::Uniform), [UNIFORM]);
        let error = decode(&[UNIFORM, 6], Symmetry::free(3), None).unwrap_err();
        assert_eq!(
            error.to_string(),
            "permutation: last digits: 6, expected a number below the product of their radices"
        );
        assert_eq!(encode(&reversed(3), None, PermutationCoding::Raw), [RAW, 0b00_01_10]);
    }

    #[test]
    fn uniform_digits_cost_the_logarithm_of_the_factorial() {
        for len in [21, 64, 1000, 5000] {
            let bytes = encode(&scattered(len), None, PermutationCoding::Uniform);
            let factorial_bits: f64 = (1..=len).map(|k| f64::from(k).log2()).sum();
            let excess = bytes.len() as f64 - factorial_bits / 8.0;
            assert!((0.0..=8.0).contains(&excess), "{len}: {excess} bytes more");
            assert_eq!(decode(&bytes, Symmetry::free(len), None).unwrap(), scattered(len));
        }
    }

    #[test]
    fn equal_permutations_cost_almost_nothing_as_differences() {
        let permutation = scattered(2000);
        let bytes = encode(&permutation, Some(&permutation), PermutationCoding::Shortest);
        assert_eq!(bytes[0], DELTA);
        assert!(bytes.len() < 50, "{}", bytes.len());
        assert_eq!(decode(&bytes, Symmetry::free(2000), Some(&permutation)).unwrap(), permutation);
        let error = decode(&bytes, Symmetry::free(2000), None).unwrap_err();
        assert_eq!(error, PermutationError::NoReference);
    }

    #[test]
    fn differences_that_leave_the_range_are_an_error() {
        let last_to_front = |len: u32| {
            let entries = std::iter::once(len - 1).chain(0..len - 1).collect();
            GroupedPermutation::free(Permutation::new(entries).unwrap()).unwrap()
        };
        let identity = GroupedPermutation::identity(Symmetry::free(9)).unwrap();
        let bytes = encode(&last_to_front(9), Some(&identity), PermutationCoding::Delta);
        let error = decode(&bytes, Symmetry::free(9), Some(&last_to_front(9))).unwrap_err();
        assert_eq!(error, PermutationError::Digit { index: 0, digit: 16, radix: 9 });
    }

    #[test]
    fn a_claimed_size_is_checked_before_anything_is_allocated() {
        let symmetry = Symmetry { groups: u32::MAX, members: 1 };
        assert_eq!(
            decode(&[RAW], symmetry, None).unwrap_err(),
            PermutationError::Blocks { groups: u32::MAX, members: 1 }
        );
        decode(&[], Symmetry::free(4), None).unwrap_err();
        decode(&[3, 0], Symmetry::free(4), None).unwrap_err();
    }

    #[test]
    fn tables_that_no_encoder_writes_are_refused() {
        let identity = GroupedPermutation::identity(Symmetry::free(30)).unwrap();
        let bytes = encode(&identity, Some(&identity), PermutationCoding::Delta);
        let mut zero = bytes.clone();
        zero[1..28].fill(0);
        let message = decode(&zero, Symmetry::free(30), Some(&identity)).unwrap_err().to_string();
        assert_eq!(message, "permutation: sum of frequencies: 0, expected 4096");
        for length in 0..bytes.len() {
            decode(&bytes[..length], Symmetry::free(30), Some(&identity)).unwrap_err();
        }
    }

    proptest! {
        #[test]
        fn every_coding_gives_the_permutation_back(
            (permutation, previous) in (1u32..40, 1u32..6).prop_flat_map(|(g, m)| (grouped(g, m), grouped(g, m))),
        ) {
            let shortest = encode(&permutation, Some(&previous), PermutationCoding::Shortest);
            for coding in CODINGS {
                let bytes = encode(&permutation, Some(&previous), coding);
                prop_assert!(shortest.len() <= bytes.len());
                prop_assert_eq!(&decode(&bytes, permutation.symmetry(), Some(&previous)).unwrap(), &permutation);
                let mut longer = bytes.clone();
                longer.push(0);
                prop_assert!(decode(&longer, permutation.symmetry(), Some(&previous)).is_err());
                prop_assert!(decode(&bytes[..bytes.len() - 1], permutation.symmetry(), Some(&previous)).is_err());
            }
        }

        #[test]
        fn no_bytes_make_the_decoder_panic(
            mut bytes in prop::collection::vec(any::<u8>(), 1..200),
            coding in 0u8..4,
            previous in (1u32..40, 1u32..6).prop_flat_map(|(g, m)| grouped(g, m)),
        ) {
            bytes[0] = coding;
            let _ = decode(&bytes, previous.symmetry(), Some(&previous));
        }

        #[test]
        fn a_changed_byte_is_an_error_or_another_permutation(
            permutation in grouped(30, 1),
            position in any::<prop::sample::Index>(),
            change in 1u8..,
        ) {
            for coding in CODINGS {
                let mut bytes = encode(&permutation, Some(&reversed(30)), coding);
                let index = position.index(bytes.len());
                bytes[index] ^= change;
                if let Ok(other) = decode(&bytes, Symmetry::free(30), Some(&reversed(30))) {
                    prop_assert_ne!(other, permutation.clone());
                }
            }
        }
    }
}
