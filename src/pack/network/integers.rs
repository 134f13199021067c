//! A trained network in eight bits: one scale for each group of numbers, the largest magnitude at 127.

use ndarray::{Array2, ArrayRef1};

use super::training::{Map, Samples, Trained, gelu};
use super::{INPUT_RANGE, UNIT};
use crate::format::limits;
use crate::format::network::{Requantization, StoredHidden, StoredKind, StoredMap, StoredNetwork};

/// Units of each part that show how large latent and hidden numbers get.
const SHOWN: usize = 64;

/// Makes the archive's network.
pub fn quantize(trained: &Trained, samples: &[Samples]) -> StoredNetwork {
    let (mut latent, mut sums, mut activated) = (0.0_f32, 0.0_f32, 0.0_f32);
    for of_part in samples {
        let shown = ndarray::s![..of_part.inputs.nrows().min(SHOWN), ..];
        let passed = trained.forward(of_part.kind, of_part.layer, &of_part.inputs.slice(shown));
        latent = latent.max(largest(&passed.latent)).max(largest(&passed.features));
        sums = sums.max(passed.sums.as_ref().map_or(0.0, largest));
        activated = activated.max(passed.activated.as_ref().map_or(0.0, largest));
    }
    let [input, latent, sums, activated] = [INPUT_RANGE, latent, sums, activated].map(scale_of);
    // All kinds share a scale, because they share what follows.
    let of_inputs = scale_of(trained.inputs.iter().map(|map| largest(&map.weights)).fold(0.0, f32::max));
    let of_outputs = scale_of(trained.outputs.iter().map(|map| largest(&map.weights)).fold(0.0, f32::max));
    let hidden = trained.hidden.as_ref().map(|[up, down]| {
        let [of_up, of_down] = [up, down].map(|map| scale_of(largest(&map.weights)));
        let activation = |place: i32| (gelu(place as f32 * sums) / activated).round_ties_even().clamp(-127.0, 127.0);
        StoredHidden {
            up: map_of(up, of_up, latent * of_up),
            to_hidden: requantization(latent * of_up / sums),
            activation: (-128..128).map(|place| activation(place) as i8).collect(),
            down: map_of(down, of_down, activated * of_down),
            to_latent: requantization(activated * of_down / latent),
        }
    });
    let kinds = trained.inputs.iter().zip(&trained.outputs).map(|(inputs, outputs)| StoredKind {
        input: map_of(inputs, of_inputs, input * of_inputs),
        output: map_of(outputs, of_outputs, latent * of_outputs),
    });
    StoredNetwork {
        unit: UNIT as u16,
        contexts: trained.shape.contexts as u8,
        width: trained.shape.width as u16,
        to_latent: requantization(input * of_inputs / latent),
        hidden,
        kinds: kinds.collect(),
        layers: trained.layers.rows().into_iter().map(|layer| integers(&layer, input * of_inputs)).collect(),
    }
}

fn largest(values: &Array2<f32>) -> f32 {
    values.iter().fold(0.0, |largest: f32, value| largest.max(value.abs()))
}

/// The scale at which a magnitude is 127.
fn scale_of(largest: f32) -> f32 {
    if largest > 0.0 && largest.is_finite() { largest / 127.0 } else { 1.0 }
}

fn map_of(map: &Map, scale: f32, of_sums: f32) -> StoredMap {
    let weights = map.weights.iter().map(|weight| (weight / scale).round_ties_even().clamp(-127.0, 127.0) as i8);
    StoredMap { weights: weights.collect(), biases: integers(&map.biases.row(0), of_sums) }
}

fn integers(values: &ArrayRef1<f32>, scale: f32) -> Vec<i32> {
    let most = limits::NETWORK_BIAS as f32;
    values.iter().map(|value| (value / scale).round_ties_even().clamp(-most, most) as i32).collect()
}

/// Multiplier and shift nearest to a ratio, with as many bits as the multiplier has.
fn requantization(ratio: f32) -> Requantization {
    let (least, most) = (i32::from(*limits::NETWORK_SHIFT.start()), i32::from(*limits::NETWORK_SHIFT.end()));
    let shift = (15 - ratio.log2().floor() as i32).clamp(least, most);
    let multiplier = (f64::from(ratio) * f64::from(shift).exp2()).round().clamp(1.0, f64::from(u16::MAX));
    Requantization { multiplier: multiplier as u16, shift: shift as u8 }
}

#[cfg(test)]
mod tests {
    use super::super::training::train;
    use super::super::{Embeddings, NetworkShape};
    use super::*;
    use crate::codec::predictor::network::{Network, quantize_input};

    #[test]
    fn the_network_in_eight_bits_predicts_what_the_trained_one_does() {
        let mut chance = fastrand::Rng::with_seed(8);
        let mut random = |rows, columns| Array2::from_shape_simple_fn((rows, columns), || 4.0 * chance.f32() - 2.0);
        let inputs: Array2<f32> = random(1500, UNIT);
        let targets = inputs.mapv(|input| 0.6 * input);
        let samples = [Samples { kind: 0, layer: Some(0), inputs, targets }];
        let shape = NetworkShape { width: 64, has_hidden: true, embeddings: Embeddings::LayerAndKind, contexts: 1 };
        let (trained, explained) = train(shape, &samples, 1, 200);
        assert!(explained > 0.2, "{explained}");
        let network = Network::new(quantize(&trained, &samples));
        let passed = trained.forward(0, Some(0), &samples[0].inputs.view());
        let (mut product, mut energies) = (0.0_f64, [0.0_f64; 2]);
        for (inputs, expected) in samples[0].inputs.rows().into_iter().zip(passed.outputs.rows()).take(100) {
            let inputs: Vec<i8> = inputs.iter().map(|&input| quantize_input(input, 127.0 / INPUT_RANGE)).collect();
            let mut outputs = vec![0; UNIT];
            network.outputs(0, Some(0), &inputs, &mut outputs);
            for (&output, &expected) in outputs.iter().zip(expected) {
                product += f64::from(output) * f64::from(expected);
                energies[0] += f64::from(output).powi(2);
                energies[1] += f64::from(expected).powi(2);
            }
        }
        let cosine = product / (energies[0] * energies[1]).sqrt();
        assert!(cosine > 0.99, "{cosine}");
    }

    #[test]
    fn a_ratio_becomes_sixteen_bits_and_a_shift() {
        for ratio in [1e-7, 0.003, 0.9, 1.0, 700.0] {
            let Requantization { multiplier, shift } = requantization(ratio);
            let back = f32::from(multiplier) / f32::from(shift).exp2();
            assert!((back / ratio - 1.0).abs() < 1e-2, "{ratio} {back}");
        }
    }
}
