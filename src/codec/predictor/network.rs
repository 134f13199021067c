//! The learned predictor of Appendix F.1 in integers: sums of products of eight-bit numbers are exact in any order, so that
//! every engine and thread gives the same bits.
//!
//! Latent elements are the input map's sums (Eq. 76) with the layer's embedding (Eq. 77), cut to eight bits; the hidden
//! layer with its table of a nonlinearity is added to them (Eq. 79); the output map's sums times a scale are the prediction
//! (Eq. 80). A unit is some consecutive elements of a run. Training is `pack::predictor`.

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
        let Self(StoredNetwork { to_latent, hidden, kinds, layers, .. }) = self;
        let embedding = layer.map(|layer| layers[layer].as_slice());
        let mut latent: Vec<i8> = sums(&kinds[kind].input, inputs)
            .enumerate()
            .map(|(element, sum)| requantize(sum + embedding.map_or(0, |embedding| embedding[element]), *to_latent))
            .collect();
        if let Some(hidden) = hidden {
            let activated: Vec<i8> = sums(&hidden.up, &latent)
                .map(|sum| hidden.activation[(i32::from(requantize(sum, hidden.to_hidden)) + 128) as usize])
                .collect();
            let added = sums(&hidden.down, &activated).map(|sum| requantize(sum, hidden.to_latent));
            latent = latent.iter().zip(added).map(|(&element, added)| cut(element.into(), added.into())).collect();
        }
        for (output, sum) in outputs.iter_mut().zip(sums(&kinds[kind].output, &latent)) {
            *output = sum;
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

fn cut(element: i32, added: i32) -> i8 {
    (element + added).clamp(-127, 127) as i8
}

/// The sums of a map, biases included. They stay below 2^27: at most 2,048 products below 2^14 and a bias up to 2^24.
fn sums<'m>(map: &'m StoredMap, inputs: &'m [i8]) -> impl Iterator<Item = i32> + 'm {
    let rows = map.weights.chunks_exact(inputs.len());
    rows.zip(&map.biases).map(|(row, &bias)| bias + product(row, inputs))
}

/// Inner product, in a form that compilers vectorize.
fn product(a: &[i8], b: &[i8]) -> i32 {
    a.iter().zip(b).map(|(&a, &b)| i32::from(a) * i32::from(b)).sum()
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

    fn network(hidden: usize, contexts: u8, chance: &mut fastrand::Rng) -> StoredNetwork {
        let (unit, width) = (5, 7);
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
            let (hidden, contexts) = (round % 3 * 9, 1 + (round % 2) as u8);
            let stored = network(hidden, contexts, &mut chance);
            let inputs: Vec<i8> = (0..usize::from(contexts) * 5).map(|_| chance.i8(-127..=127)).collect();
            let (kind, layer) = (chance.usize(..2), chance.bool().then_some(0));
            let mut outputs = [0; 5];
            Network::new(stored.clone()).outputs(kind, layer, &inputs, &mut outputs);
            assert_eq!(outputs.map(i64::from).to_vec(), by_the_letter(&stored, kind, layer, &inputs));
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
            network: Arc::new(Network::new(network(4, 2, &mut chance))),
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
