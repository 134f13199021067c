//! The learned predictor of Appendix F.1 on the encoder's side: its shape, what it is fitted to, and its use on one part.
//!
//! [`training`] fits it in binary32, [`integers`] makes the archive's network of that (`codec::predictor::network`). What the
//! decoder will have is measured, never what was trained.

pub mod integers;
pub mod training;

use std::collections::BTreeMap;
use std::sync::Arc;

use ndarray::Array2;

use self::training::Samples;
use super::mode_decision::FittedPredictor;
use super::quantize::root_mean_square;
use super::symbols::RunLayout;
use crate::codec::architecture::RecordPlan;
use crate::codec::predictor::network::{Network, NetworkPredictor};
use crate::codec::predictor::references::References;
use crate::decode::prepared::Motions;
use crate::format::part::StoredPredictor;
use crate::tensor::TensorInfo;

/// Elements predicted at once.
pub const UNIT: usize = 64;

/// Root mean squares of a reference that are the largest input: eight bits resolve a thirtieth of one.
pub const INPUT_RANGE: f32 = 4.0;

/// Which embeddings condition a network (Eq. 77).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Embeddings {
    /// None: all kinds of tensors share what is added to the input map.
    None,
    /// Of the kind of tensor.
    Kind,
    /// Of the layer and of the kind of tensor.
    LayerAndKind,
}

/// The shape of a network.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NetworkShape {
    /// Latent elements.
    pub width: usize,
    /// Whether there is a hidden layer, four times as wide.
    pub has_hidden: bool,
    /// What it is conditioned by.
    pub embeddings: Embeddings,
    /// Layers below that it looks at.
    pub contexts: usize,
}

/// Numbers of the kinds of tensors, by block type and part of its record.
pub type Kinds = BTreeMap<(u8, usize), usize>;

/// A network fitted to a checkpoint.
#[derive(Clone, Debug)]
pub struct FittedNetwork {
    network: Arc<Network>,
    kinds: Kinds,
    /// Of the variance of units that it was not fitted to, how much it explains.
    pub held_out: f64,
}

impl FittedNetwork {
    /// Fits a network to samples of all kinds.
    pub fn fit(shape: NetworkShape, samples: &[Samples], layers: usize, kinds: Kinds, steps: usize) -> Self {
        let (trained, held_out) = training::train(shape, samples, layers, steps);
        let network = integers::quantize(&trained, samples);
        Self { network: Arc::new(Network::new(network)), kinds, held_out }
    }

    /// The network as the archive has it.
    pub fn network(&self) -> &Arc<Network> {
        &self.network
    }

    /// Layers below that it looks at.
    pub fn contexts(&self) -> usize {
        self.network.contexts()
    }

    /// Fits the scale of the network's outputs to a part, and predicts it with the decoder's arithmetic. `references` are the
    /// decoded bytes of one or two tensors. `None` where the network knows no such tensors.
    pub fn predict(
        &self,
        (plan, ordinal): (&RecordPlan, usize),
        tensor: &TensorInfo,
        layout: RunLayout,
        references: &[u8],
        motions: Motions,
        values: &[f32],
    ) -> Option<(FittedPredictor, Vec<f32>)> {
        let kind = *self.kinds.get(&(plan.block_type.number(), ordinal))?;
        let layer = plan.layer.map(|layer| layer as usize).filter(|&layer| layer < self.network.stored().layers.len());
        let contexts = references.len() / tensor.length_bytes.max(1) as usize;
        let references = References::new(&tensor.dtype, references, values.len());
        let nearest: Vec<f32> = (0..values.len()).map(|element| references.value(0, element)).collect();
        let input_scale = input_scale(&nearest)?;
        let predictor = NetworkPredictor {
            network: Arc::clone(&self.network),
            kind,
            layer,
            input_scale,
            output_scale: 1.0,
            run_elements: layout.run_elements,
            elements: values.len(),
            contexts,
            motions: [motions.nearest, motions.second],
        };
        let mut predicted = vec![0.0; values.len()];
        predict_all(&predictor, &references, &mut predicted);
        let output_scale = gain(values, &predicted);
        predicted.iter_mut().for_each(|value| *value *= output_scale);
        let stored = StoredPredictor::Network {
            network: 0,
            kind: kind as u16,
            layer: layer.map(|layer| layer as u16),
            input_scale,
            output_scale,
            second_part: (contexts == 2).then_some(ordinal as u32),
        };
        Some((FittedPredictor::Network(stored), predicted))
    }
}

/// What makes inputs of a reference's values; `None` of one that is zero or not finite.
pub fn input_scale(reference: &[f32]) -> Option<f32> {
    let scale = 127.0 / (INPUT_RANGE * root_mean_square(reference) as f32);
    (scale.is_finite() && scale > 0.0).then_some(scale)
}

/// The gain of least squares, 0 where there is none.
fn gain(values: &[f32], outputs: &[f32]) -> f32 {
    let (mut energy, mut product) = (0.0, 0.0);
    for (&value, &output) in values.iter().zip(outputs) {
        energy += f64::from(output).powi(2);
        product += f64::from(value) * f64::from(output);
    }
    let gain = (product / energy) as f32;
    if gain.is_finite() { gain } else { 0.0 }
}

/// Predicts a whole part, run by run on all threads.
fn predict_all(predictor: &NetworkPredictor, references: &References<'_>, predicted: &mut [f32]) {
    use rayon::prelude::*;
    predicted.par_chunks_mut(predictor.run_elements).enumerate().for_each(|(run, predicted)| {
        let start = run * predictor.run_elements;
        predictor.predict(references, start..start + predicted.len(), predicted);
    });
}

/// Units of one part for training: inputs as the network reads them, targets of unit variance.
pub fn samples_of_part(
    kind: usize,
    layer: Option<usize>,
    (values, references): (&[f32], &[Vec<f32>]),
    (layout, contexts): (RunLayout, usize),
    (count, seed): (usize, u64),
) -> Option<Samples> {
    let scale = input_scale(references.first()?)? / 127.0 * INPUT_RANGE;
    let deviation = root_mean_square(values) as f32;
    if deviation <= 0.0 || !deviation.is_finite() {
        return None;
    }
    let units_per_run = layout.run_elements / UNIT;
    let runs = layout.elements / layout.run_elements;
    if units_per_run == 0 || runs == 0 {
        return None;
    }
    // None twice, or the units held out would be known.
    let mut units: Vec<usize> = (0..units_per_run * runs).collect();
    fastrand::Rng::with_seed(seed).shuffle(&mut units);
    units.truncate(count);
    let count = units.len();
    let (mut inputs, mut targets) = (Array2::zeros((count, contexts * UNIT)), Array2::zeros((count, UNIT)));
    for (sample, unit) in units.into_iter().enumerate() {
        let start = unit / units_per_run * layout.run_elements + unit % units_per_run * UNIT;
        for element in 0..UNIT {
            targets[(sample, element)] = values[start + element] / deviation;
            for (context, reference) in references.iter().take(contexts).enumerate() {
                let input = (reference[start + element] * scale).clamp(-INPUT_RANGE, INPUT_RANGE);
                inputs[(sample, context * UNIT + element)] = input;
            }
        }
    }
    Some(Samples { kind, layer, inputs, targets })
}
