//! Residual vector quantization in two stages (Table 15, Appendix G.5), both directions: consecutive elements of a run are
//! approximated together by a codeword of a first codebook, and what is left by one of a second.
//!
//! Indices have a fixed length. Training codebooks and searching codewords is the encoder's business: see `pack::vectors`.

use std::sync::Arc;

use crate::format::codebook::StoredCodebook;
use crate::numerics::{f16_from_f32, f32_from_f16};

/// A codebook ready for look-ups.
#[derive(Clone, Debug, PartialEq)]
pub struct Codebook {
    elements: usize,
    index_bits: u32,
    /// `[codewords, elements]`.
    values: Vec<f32>,
}

impl Codebook {
    /// The codebook of these codewords, `[codewords, elements]`, rounded to binary16 as they are stored.
    ///
    /// Panics unless there are a power of two of them.
    pub fn new(elements: usize, codewords: &[f32]) -> Self {
        let count = codewords.len() / elements;
        assert!(count.is_power_of_two() && count * elements == codewords.len(), "as many codewords as indices");
        let values = codewords.iter().map(|&value| f32_from_f16(f16_from_f32(value))).collect();
        Self { elements, index_bits: count.ilog2(), values }
    }

    /// A codebook as the archive has it.
    pub fn of_stored(stored: &StoredCodebook) -> Self {
        let values = stored.values.iter().map(|&value| f32_from_f16(value)).collect();
        Self { elements: stored.elements.into(), index_bits: stored.index_bits.into(), values }
    }

    /// The codebook as the archive has it.
    pub fn stored(&self) -> StoredCodebook {
        let values = self.values.iter().map(|&value| f16_from_f32(value)).collect();
        StoredCodebook { elements: self.elements as u8, index_bits: self.index_bits as u8, values }
    }

    /// Elements of a codeword.
    pub fn elements(&self) -> usize {
        self.elements
    }

    /// Bits of an index.
    pub fn index_bits(&self) -> u32 {
        self.index_bits
    }

    /// All codewords, `[codewords, elements]`.
    pub fn values(&self) -> &[f32] {
        &self.values
    }

    /// The codeword of an index.
    #[inline]
    pub fn codeword(&self, index: u32) -> &[f32] {
        &self.values[index as usize * self.elements..][..self.elements]
    }
}

/// The codebooks of both stages.
#[derive(Clone, Debug, PartialEq)]
pub struct VectorQuantizer {
    stages: [Arc<Codebook>; 2],
}

impl VectorQuantizer {
    /// The quantizer of two codebooks; `None` unless their codewords have equally many elements.
    pub fn new(stages: [Arc<Codebook>; 2]) -> Option<Self> {
        (stages[0].elements == stages[1].elements).then_some(Self { stages })
    }

    /// The codebooks.
    pub fn stages(&self) -> &[Arc<Codebook>; 2] {
        &self.stages
    }

    /// Elements of a vector.
    pub fn elements(&self) -> usize {
        self.stages[0].elements
    }

    /// Bits of a vector: the indices of both stages.
    pub fn vector_bits(&self) -> u32 {
        self.stages[0].index_bits + self.stages[1].index_bits
    }

    /// Bytes of a run: its vectors' indices in whole bytes. Of a vector that the run's end cuts off both indices are there.
    pub fn bytes_of_run(&self, run_elements: usize) -> usize {
        (run_elements.div_ceil(self.elements()) * self.vector_bits() as usize).div_ceil(8)
    }

    /// Points of a run from its stored indices, in steps: `first codeword + second codeword`, one rounding.
    ///
    /// `stored` has [`Self::bytes_of_run`] bytes.
    pub fn points_of_run(&self, stored: &[u8], points: &mut [f32]) {
        let [first, second] = &self.stages;
        let mut bits = BitReader { bytes: stored, pending: 0, count: 0 };
        for points in points.chunks_mut(self.elements()) {
            let (first, second) =
                (first.codeword(bits.take(first.index_bits)), second.codeword(bits.take(second.index_bits)));
            for ((point, first), second) in points.iter_mut().zip(first).zip(second) {
                *point = first + second;
            }
        }
    }

    /// Adds the stored indices of a run to `stored`, lowest bits first.
    pub fn write_run(&self, indices: &[[u32; 2]], stored: &mut Vec<u8>) {
        let (mut pending, mut count) = (0_u64, 0);
        for vector in indices {
            for (&index, stage) in vector.iter().zip(&self.stages) {
                pending |= u64::from(index) << count;
                count += stage.index_bits;
            }
            while count >= 8 {
                stored.push(pending as u8);
                pending >>= 8;
                count -= 8;
            }
        }
        if count > 0 {
            stored.push(pending as u8);
        }
    }
}

/// Numbers of some bits each, lowest bits of a byte first.
struct BitReader<'a> {
    bytes: &'a [u8],
    pending: u32,
    count: u32,
}

impl BitReader<'_> {
    /// The next `bits` bits, 12 at most.
    #[inline]
    fn take(&mut self, bits: u32) -> u32 {
        while self.count < bits {
            let (&next, rest) = self.bytes.split_first().expect("a run has the bytes of its indices");
            self.pending |= u32::from(next) << self.count;
            self.bytes = rest;
            self.count += 8;
        }
        let taken = self.pending & ((1 << bits) - 1);
        self.pending >>= bits;
        self.count -= bits;
        taken
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn codebook(elements: usize, index_bits: u32, from: f32) -> Arc<Codebook> {
        let values: Vec<f32> = (0..elements << index_bits).map(|at| from + at as f32).collect();
        Arc::new(Codebook::new(elements, &values))
    }

    #[test]
    fn the_example_of_the_specification_holds() {
        let first = Arc::new(Codebook::new(2, &[-1.0, -1.0, 1.0, 1.0]));
        let second = Arc::new(Codebook::new(2, &[0.0, 0.0, 0.5, 0.0, 0.0, 0.5, 0.5, 0.5]));
        let quantizer = VectorQuantizer::new([first, second]).expect("both of pairs");
        let mut stored = Vec::new();
        quantizer.write_run(&[[1, 2], [0, 1], [1, 3]], &mut stored);
        assert_eq!(stored, [0xd5, 0x01]);
        let mut points = [0.0; 5];
        quantizer.points_of_run(&stored, &mut points);
        assert_eq!(points, [1.0, 1.5, -0.5, -1.0, 1.5]);
    }

    #[test]
    fn codebooks_of_different_lengths_make_no_quantizer() {
        assert_eq!(VectorQuantizer::new([codebook(2, 1, 0.0), codebook(3, 1, 0.0)]), None);
    }

    proptest! {
        #[test]
        fn points_are_the_sums_of_the_codewords_written(
            elements in 2_usize..=16,
            index_bits in [1_u32..=7, 1_u32..=7],
            run_elements in 1_usize..200,
            seed: u32,
        ) {
            let stages = [codebook(elements, index_bits[0], 0.0), codebook(elements, index_bits[1], -300.0)];
            let quantizer = VectorQuantizer::new(stages).expect("one length");
            let draw = |at: usize, stage: usize| (seed.wrapping_mul(at as u32 + 7) >> (stage + 3)) & ((1 << index_bits[stage]) - 1);
            let indices: Vec<[u32; 2]> =
                (0..run_elements.div_ceil(elements)).map(|at| [draw(at, 0), draw(at, 1)]).collect();
            let mut stored = Vec::new();
            quantizer.write_run(&indices, &mut stored);
            prop_assert_eq!(stored.len(), quantizer.bytes_of_run(run_elements));
            let mut points = vec![0.0; run_elements];
            quantizer.points_of_run(&stored, &mut points);
            for (at, point) in points.into_iter().enumerate() {
                let [first, second] = indices[at / elements];
                let [one, other] = quantizer.stages();
                let place = at % elements;
                prop_assert_eq!(point, one.codeword(first)[place] + other.codeword(second)[place]);
            }
        }
    }
}
