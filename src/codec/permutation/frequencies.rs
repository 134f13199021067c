//! The model of digit differences: a discrete Laplace distribution as integer frequencies (Eqs. 102-104, section G.6).
//!
//! The encoder fits it; the frequencies themselves are sent, so that no decoder evaluates an exponential.

use super::PermutationError;
use super::bits::{BitReader, BitWriter};

/// Differences beyond this are escaped (section G.6).
pub(super) const LARGEST_DELTA: u64 = 16;
/// Bits of a frequency.
pub(super) const FREQUENCY_BITS: u32 = 12;
/// Magnitudes 0 to 16 and the escape.
const FREQUENCIES: usize = LARGEST_DELTA as usize + 2;
/// Bytes of the table.
pub(super) const TABLE_BYTES: usize = FREQUENCIES * FREQUENCY_BITS as usize / 8;
/// The escape's symbol; the others are zig-zag indices.
pub(super) const ESCAPE: usize = 2 * LARGEST_DELTA as usize + 1;

/// Eq. 102.
pub(super) fn zig_zag(delta: i64) -> usize {
    (if delta >= 0 { 2 * delta } else { -2 * delta - 1 }) as usize
}

pub(super) fn zig_zag_inverse(symbol: usize) -> i64 {
    let half = symbol.div_ceil(2) as i64;
    if symbol.is_multiple_of(2) { half } else { -half }
}

/// Frequencies of the magnitudes 0 to 16 and of the escape.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Frequencies([u32; FREQUENCIES]);

impl Frequencies {
    /// A discrete Laplace distribution (Eq. 104) with the scale of greatest likelihood, and the escapes' share.
    pub(super) fn fitted(magnitudes: impl Iterator<Item = u64>) -> Self {
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

    /// Appends the frequencies, 12 bits each.
    pub(super) fn write(&self, bits: &mut BitWriter) {
        for &frequency in &self.0 {
            bits.write(frequency, FREQUENCY_BITS);
        }
    }

    /// Reads what [`Frequencies::write`] wrote.
    pub(super) fn parse(table: &[u8]) -> Result<Self, PermutationError> {
        let mut bits = BitReader::new(table);
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
    pub(super) fn of(&self, symbol: usize) -> u32 {
        self.0[symbol.div_ceil(2)] // the escape, 33, is entry 17
    }

    /// Sum of the frequencies of all symbols before this one.
    pub(super) fn cumulated(&self, symbol: usize) -> u32 {
        (0..symbol).map(|before| self.of(before)).sum()
    }

    /// The symbol of each of the 4096 slots.
    pub(super) fn slots(&self) -> Vec<u8> {
        (0..=ESCAPE).flat_map(|symbol| std::iter::repeat_n(symbol as u8, self.of(symbol) as usize)).collect()
    }
}
