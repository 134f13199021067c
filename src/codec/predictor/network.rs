//! The learned predictor of Appendix F.1 in integers: sums of products of eight-bit numbers are exact in any order, so that
//! every engine and thread gives the same bits.
//!
//! Latent elements are the input map's sums (Eq. 76) with the layer's embedding (Eq. 77), cut to eight bits; the hidden
//! layer with its table of a nonlinearity is added to them (Eq. 79); the output map's sums times a scale are the prediction
//! (Eq. 80). A unit is some consecutive elements of a run. Training is `pack::predictor`.

#[cfg(target_arch = "x86_64")]
use core::arch::x86_64::*;
use std::ops::Range;
use std::sync::Arc;

use super::references::References;
use crate::codec::motion::Motion;
use crate::format::network::{Requantization, StoredMap, StoredNetwork};

/// A network, sound by its format.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Network(StoredNetwork);

impl Network {
    /// Makes a network ready; its format has checked every size and range.
    pub fn new(stored: StoredNetwork) -> Self {
        Self(stored)
    }

    /// As an archive has it.
    pub fn stored(&self) -> &StoredNetwork {
        &self.0
    }

    /// Elements predicted at once.
    pub fn unit(&self) -> usize {
        self.0.unit.into()
    }

    /// Layers below that it looks at: 1 or 2.
    pub fn contexts(&self) -> usize {
        self.0.contexts.into()
    }

    /// The output map's sums for one unit: `inputs` are `[contexts * unit]`, `outputs` `[unit]`.
    pub fn outputs(&self, kind: usize, layer: Option<usize>, inputs: &[i8], outputs: &mut [i32]) {
        #[cfg(target_arch = "x86_64")]
        if is_x86_feature_detected!("avx512f") && is_x86_feature_detected!("avx512bw") {
            // SAFETY: the CPU has the instructions, here and below.
            return unsafe { self.outputs_avx512(kind, layer, inputs, outputs) };
        } else if is_x86_feature_detected!("avx2") {
            // SAFETY: see above.
            return unsafe { self.outputs_avx2(kind, layer, inputs, outputs) };
        }
        self.outputs_with(kind, layer, inputs, outputs, product);
    }

    #[cfg(target_arch = "x86_64")]
    #[target_feature(enable = "avx512f,avx512bw")]
    fn outputs_avx512(&self, kind: usize, layer: Option<usize>, inputs: &[i8], outputs: &mut [i32]) {
        self.outputs_with(kind, layer, inputs, outputs, |weights, inputs| {
            let (blocks, rest) = weights.as_chunks::<32>();
            let (blocks_of_inputs, rest_of_inputs) = inputs.as_chunks::<32>();
            let mut sums = _mm512_setzero_si512();
            for (weights, inputs) in blocks.iter().zip(blocks_of_inputs) {
                // SAFETY: 32 numbers are half a register of bytes, and one of words.
                let (weights, inputs) = unsafe {
                    (_mm256_loadu_si256(weights.as_ptr().cast()), _mm512_loadu_si512(inputs.as_ptr().cast()))
                };
                let products = _mm512_madd_epi16(_mm512_cvtepi8_epi16(weights), inputs);
                sums = _mm512_add_epi32(sums, products);
            }
            _mm512_reduce_add_epi32(sums) + product(rest, rest_of_inputs)
        });
    }

    #[cfg(target_arch = "x86_64")]
    #[target_feature(enable = "avx2")]
    fn outputs_avx2(&self, kind: usize, layer: Option<usize>, inputs: &[i8], outputs: &mut [i32]) {
        self.outputs_with(kind, layer, inputs, outputs, |weights, inputs| {
            let (blocks, rest) = weights.as_chunks::<16>();
            let (blocks_of_inputs, rest_of_inputs) = inputs.as_chunks::<16>();
            let mut sums = _mm256_setzero_si256();
            for (weights, inputs) in blocks.iter().zip(blocks_of_inputs) {
                // SAFETY: 16 numbers are half a register of bytes, and one of words.
                let (weights, inputs) =
                    unsafe { (_mm_loadu_si128(weights.as_ptr().cast()), _mm256_loadu_si256(inputs.as_ptr().cast())) };
                let products = _mm256_madd_epi16(_mm256_cvtepi8_epi16(weights), inputs);
                sums = _mm256_add_epi32(sums, products);
            }
            let halves = _mm_add_epi32(_mm256_castsi256_si128(sums), _mm256_extracti128_si256::<1>(sums));
            let quarters = _mm_add_epi32(halves, _mm_shuffle_epi32::<0b00_00_11_10>(halves));
            let sum = _mm_add_epi32(quarters, _mm_shuffle_epi32::<0b00_00_00_01>(quarters));
            _mm_cvtsi128_si32(sum) + product(rest, rest_of_inputs)
        });
    }

    /// Written once, with the inner product of each instruction set. Loops and no iterators that collect: those would not
    /// become part of the function that has the instructions.
    #[inline(always)]
    fn outputs_with(
        &self,
        kind: usize,
        layer: Option<usize>,
        inputs: &[i8],
        outputs: &mut [i32],
        product: impl Fn(&[i8], &[i16]) -> i32,
    ) {
        let Self(StoredNetwork { to_latent, hidden, kinds, layers, .. }) = self;
        let sum = |map: &StoredMap, row: usize, inputs: &[i16]| {
            map.biases[row] + product(&map.weights[row * inputs.len()..][..inputs.len()], inputs)
        };
        // Eight-bit numbers in sixteen bits, as products take them: they are all used once per row of a map.
        let mut wide = vec![0; inputs.len()];
        for (wide, &input) in wide.iter_mut().zip(inputs) {
            *wide = i16::from(input);
        }
        let kind = &kinds[kind];
        let mut latent = vec![0; kind.input.biases.len()];
        for (row, element) in latent.iter_mut().enumerate() {
            let embedding = layer.map_or(0, |layer| layers[layer][row]);
            *element = i16::from(requantize(sum(&kind.input, row, &wide) + embedding, *to_latent));
        }
        if let Some(hidden) = hidden {
            let mut activated = vec![0; hidden.up.biases.len()];
            for (row, element) in activated.iter_mut().enumerate() {
                let index = i32::from(requantize(sum(&hidden.up, row, &latent), hidden.to_hidden)) + 128;
                *element = i16::from(hidden.activation[index as usize]);
            }
            for (row, element) in latent.iter_mut().enumerate() {
                let added = requantize(sum(&hidden.down, row, &activated), hidden.to_latent);
                *element = (*element + i16::from(added)).clamp(-127, 127);
            }
        }
        for (row, output) in outputs.iter_mut().enumerate().take(kind.output.biases.len()) {
            *output = sum(&kind.output, row, &latent);
        }
    }
}

/// An input of a network: the nearest integer, ties to even, cut to -127 to 127; 0 for what is no number.
///
/// ```
/// # use mcwcfs::codec::predictor::network::quantize_input;
/// assert_eq!([0.05, -0.5, 2.0, f32::NAN].map(|value| quantize_input(value, 90.0)), [4, -45, 127, 0]);
/// ```
#[inline]
pub fn quantize_input(value: f32, scale: f32) -> i8 {
    (value * scale).round_ties_even().clamp(-127.0, 127.0) as i8 // the cast makes 0 of a NaN
}

/// A sum of products as eight bits.
///
/// ```
/// # use mcwcfs::codec::predictor::network::requantize;
/// # use mcwcfs::format::network::Requantization;
/// let half = Requantization { multiplier: 1, shift: 1 };
/// assert_eq!([3, -3, 1000, -1000].map(|sum| requantize(sum, half)), [2, -1, 127, -127]);
/// ```
#[inline]
pub fn requantize(sum: i32, Requantization { multiplier, shift }: Requantization) -> i8 {
    let rounded = (i64::from(sum) * i64::from(multiplier) + (1 << (shift - 1))) >> shift;
    rounded.clamp(-127, 127) as i8
}

/// Inner product, in a form that compilers vectorize. Sums of a map, its bias included, stay below 2^27: at most 2,048
/// products below 2^14 and a bias up to 2^24.
#[inline(always)]
fn product(weights: &[i8], inputs: &[i16]) -> i32 {
    weights.iter().zip(inputs).map(|(&weight, &input)| i32::from(weight) * i32::from(input)).sum()
}

/// A network at work on one part.
#[derive(Clone, Debug)]
pub struct NetworkPredictor {
    /// The network.
    pub network: Arc<Network>,
    /// Number of the part's kind of tensor.
    pub kind: usize,
    /// Number of its layer embedding.
    pub layer: Option<usize>,
    /// A reference value times this is an input.
    pub input_scale: f32,
    /// An output times this is a prediction.
    pub output_scale: f32,
    /// Elements of a run, which units do not cross.
    pub run_elements: usize,
    /// Elements of the part.
    pub elements: usize,
    /// Contexts that there are: those of the network, or fewer where a reference has none itself.
    pub contexts: usize,
    /// Where elements find the reference values of each context.
    pub motions: [Option<Motion>; 2],
}

impl NetworkPredictor {
    /// The predictions of consecutive elements. Units that they do not fill are computed all the same.
    pub fn predict(&self, references: &References<'_>, elements: Range<usize>, predicted: &mut [f32]) {
        let unit = self.network.unit();
        let mut inputs = vec![0; self.network.contexts() * unit];
        let mut outputs = vec![0; unit];
        let mut at = elements.start;
        while at < elements.end {
            let run = at / self.run_elements * self.run_elements;
            let start = run + (at - run) / unit * unit;
            let end = (start + unit).min(run + self.run_elements).min(self.elements);
            self.read_inputs(references, start..end, &mut inputs);
            self.network.outputs(self.kind, self.layer, &inputs, &mut outputs);
            let wanted = at..end.min(elements.end);
            let outputs = &outputs[wanted.start - start..wanted.end - start];
            for (predicted, &output) in predicted[wanted.start - elements.start..].iter_mut().zip(outputs) {
                *predicted = output as f32 * self.output_scale;
            }
            at = wanted.end;
        }
    }

    /// The inputs of one unit: the reference values of its elements, context by context; 0 beyond its end and without one.
    fn read_inputs(&self, references: &References<'_>, elements: Range<usize>, inputs: &mut [i8]) {
        inputs.fill(0);
        for (context, inputs) in inputs.chunks_mut(self.network.unit()).take(self.contexts).enumerate() {
            let motion = self.motions[context].as_ref();
            for (input, element) in inputs.iter_mut().zip(elements.clone()) {
                let source = motion.map_or(element, |motion| motion.reference_of(element));
                *input = quantize_input(references.value(context, source), self.input_scale);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::network::{StoredHidden, StoredKind};
    use crate::tensor::Dtype;

    fn map(rows: usize, columns: usize, chance: &mut fastrand::Rng) -> StoredMap {
        let weights = (0..rows * columns).map(|_| chance.i8(..)).collect();
        StoredMap { weights, biases: (0..rows).map(|_| chance.i32(-(1 << 24)..=1 << 24)).collect() }
    }

    fn network(
        (unit, width): (usize, usize),
        hidden: usize,
        contexts: u8,
        chance: &mut fastrand::Rng,
    ) -> StoredNetwork {
        let mut requantization = || Requantization { multiplier: chance.u16(1..), shift: chance.u8(18..30) };
        let [to_latent, to_hidden, back] = [requantization(), requantization(), requantization()];
        StoredNetwork {
            unit: unit as u16,
            contexts,
            width: width as u16,
            to_latent,
            hidden: (hidden > 0).then(|| StoredHidden {
                up: map(hidden, width, chance),
                to_hidden,
                activation: (0..256).map(|_| chance.i8(..)).collect(),
                down: map(width, hidden, chance),
                to_latent: back,
            }),
            kinds: (0..2)
                .map(|_| StoredKind {
                    input: map(width, usize::from(contexts) * unit, chance),
                    output: map(unit, width, chance),
                })
                .collect(),
            layers: vec![(0..width).map(|_| chance.i32(-100_000..100_000)).collect()],
        }
    }

    /// The specification's formulas, in 64 bits and one element at a time.
    fn by_the_letter(network: &StoredNetwork, kind: usize, layer: Option<usize>, inputs: &[i8]) -> Vec<i64> {
        let sums = |map: &StoredMap, inputs: &[i64]| -> Vec<i64> {
            (0..map.biases.len())
                .map(|row| {
                    let weight = |column: usize| i64::from(map.weights[row * inputs.len() + column]);
                    i64::from(map.biases[row]) + (0..inputs.len()).map(|at| weight(at) * inputs[at]).sum::<i64>()
                })
                .collect()
        };
        let cut = |value: i64| value.clamp(-127, 127);
        let eight = |sum: i64, by: Requantization| {
            let exact = i128::from(sum) * i128::from(by.multiplier);
            cut((exact + (1_i128 << (by.shift - 1))).div_euclid(1_i128 << by.shift) as i64)
        };
        let inputs: Vec<i64> = inputs.iter().map(|&input| input.into()).collect();
        let mut latent = sums(&network.kinds[kind].input, &inputs);
        for (at, element) in latent.iter_mut().enumerate() {
            *element = eight(*element + layer.map_or(0, |layer| network.layers[layer][at].into()), network.to_latent);
        }
        if let Some(hidden) = &network.hidden {
            let activated: Vec<i64> = sums(&hidden.up, &latent)
                .into_iter()
                .map(|sum| hidden.activation[(eight(sum, hidden.to_hidden) + 128) as usize].into())
                .collect();
            let added = sums(&hidden.down, &activated);
            latent = latent.iter().zip(added).map(|(&at, sum)| cut(at + eight(sum, hidden.to_latent))).collect();
        }
        sums(&network.kinds[kind].output, &latent)
    }

    #[test]
    fn outputs_are_those_of_the_specification() {
        let mut chance = fastrand::Rng::with_seed(5);
        for round in 0..200 {
            let (hidden, contexts) = (round % 3 * 29, 1 + (round % 2) as u8);
            // Shorter than a register, and several of them with some left over.
            let unit = [5, 70][round / 2 % 2];
            let stored = network((unit, unit + 2), hidden, contexts, &mut chance);
            let inputs: Vec<i8> = (0..usize::from(contexts) * unit).map(|_| chance.i8(-127..=127)).collect();
            let (kind, layer) = (chance.usize(..2), chance.bool().then_some(0));
            let mut outputs = [vec![0; unit], vec![0; unit]];
            let network = Network::new(stored.clone());
            network.outputs(kind, layer, &inputs, &mut outputs[0]);
            network.outputs_with(kind, layer, &inputs, &mut outputs[1], product);
            let expected = by_the_letter(&stored, kind, layer, &inputs);
            for outputs in outputs {
                assert_eq!(outputs.into_iter().map(i64::from).collect::<Vec<_>>(), expected);
            }
            #[cfg(target_arch = "x86_64")]
            if is_x86_feature_detected!("avx2") {
                let mut outputs = vec![0; unit];
                // SAFETY: the CPU has the instructions.
                unsafe { network.outputs_avx2(kind, layer, &inputs, &mut outputs) };
                assert_eq!(outputs.into_iter().map(i64::from).collect::<Vec<_>>(), expected);
            }
        }
    }

    #[test]
    fn any_range_of_a_part_is_predicted_as_the_whole_of_it() {
        let mut chance = fastrand::Rng::with_seed(6);
        let (elements, run_elements) = (44, 12); // units of 5, 5 and 2; a last run of 8
        let values: Vec<u8> = (0..2 * elements).flat_map(|_| (chance.f32() - 0.5).to_le_bytes()).collect();
        let references = References::new(&Dtype::F32, &values, elements);
        let motion = Motion::new(&[4, 11], 1, (0..11).rev().collect());
        let predictor = NetworkPredictor {
            network: Arc::new(Network::new(network((5, 7), 4, 2, &mut chance))),
            kind: 1,
            layer: Some(0),
            input_scale: 250.0,
            output_scale: 1e-6,
            run_elements,
            elements,
            contexts: 2,
            motions: [motion, None],
        };
        let mut whole = vec![0.0; elements];
        predictor.predict(&references, 0..elements, &mut whole);
        assert!(whole.iter().any(|&value| value != whole[0]));
        for (start, end) in [(0, 1), (3, 17), (11, 13), (30, 44), (43, 44)] {
            let mut part = vec![0.0; end - start];
            predictor.predict(&references, start..end, &mut part);
            assert_eq!(part, whole[start..end]);
        }
    }
}
