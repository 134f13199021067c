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

use super::ans::{Decoder, Encoder, STATE_MIN};
use super::bits::{BitReader, BitWriter, width};
use super::frequencies::{ESCAPE, Frequencies, LARGEST_DELTA, TABLE_BYTES, zig_zag, zig_zag_inverse};
use super::{GroupedPermutation, Permutation, PermutationError, Symmetry};

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

/// What the uniform coding adds to the number of the last digits, so that it is a state.
const TAIL_BASE: u64 = 1 << 62;
/// The product of the radices of those digits is at most this.
const TAIL_LIMIT: u64 = 1 << 61;

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
    let mut bits = BitWriter::after(vec![RAW]);
    for &entry in permutation.outer().entries() {
        bits.write(entry, width(groups));
    }
    for &entry in permutation.inner().iter().flat_map(Permutation::entries) {
        bits.write(entry, width(members));
    }
    bits.finish()
}

fn decode_raw(payload: &[u8], symmetry: Symmetry) -> Result<GroupedPermutation, PermutationError> {
    let Symmetry { groups, members } = symmetry;
    let mut bits = BitReader::new(payload);
    let mut permutation = |len| Permutation::new(bits.read_all(len, width(len))?);
    let outer = permutation(groups)?;
    let inner = (0..groups).map(|_| permutation(members)).collect::<Result<_, _>>()?;
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
    let mut coder = Encoder::new(TAIL_BASE + number);
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
            return Err(PermutationError::wrong_length("digits", tail.bytes(), payload.len()));
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
    let mut bits = BitWriter::after(vec![DELTA]);
    frequencies.write(&mut bits);
    let mut coder = Encoder::new(STATE_MIN);
    for &(digit, delta, radix) in coded.iter().rev() {
        if delta.unsigned_abs() > LARGEST_DELTA {
            coder.push_uniform(digit, radix); // the last pushed is the first popped: the escape comes before its digit
            coder.push_symbol(ESCAPE, &frequencies);
        } else {
            coder.push_symbol(zig_zag(delta), &frequencies);
        }
    }
    coder.finish(bits.finish())
}

fn decode_delta(
    payload: &[u8],
    symmetry: Symmetry,
    previous: &GroupedPermutation,
) -> Result<GroupedPermutation, PermutationError> {
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

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

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
    fn the_bytes_of_each_coding_never_change() {
        let (permutation, previous) = (scattered(24), reversed(24));
        // Read back by a decoder written from this module's text alone.
        let raw: &[u8] = &[0, 230, 198, 179, 196, 43, 109, 162, 192, 6, 36, 137, 74, 11, 170, 114];
        let uniform: &[u8] = &[1, 55, 234, 253, 69, 127, 46, 21, 0, 251, 160, 111, 186];
        let delta: &[u8] = &[
            2, 106, 33, 18, 246, 16, 13, 177, 96, 9, 128, 192, 6, 92, 224, 4, 66, 128, 3, 48, 144, 2, 35, 208, 1, 25,
            32, 11, 141, 47, 64, 116, 230, 90, 141, 0, 35, 157, 197, 29, 103, 172, 12, 129, 227, 137, 98, 47,
        ];
        let codings = [PermutationCoding::Raw, PermutationCoding::Uniform, PermutationCoding::Delta];
        for (coding, bytes) in codings.into_iter().zip([raw, uniform, delta]) {
            if coding != PermutationCoding::Delta {
                // Its frequencies are fitted with floats, which another machine may round otherwise.
                assert_eq!(encode(&permutation, Some(&previous), coding), bytes);
            }
            assert_eq!(decode(bytes, Symmetry::free(24), Some(&previous)).unwrap(), permutation);
        }
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
