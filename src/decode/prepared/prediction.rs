//! Side information of predictions, decoded and checked.

use std::sync::Arc;

use super::quantized::prepare_coefficients;
use super::{Pools, decode_integers, inconsistent};
use crate::codec::integers::Integers;
use crate::codec::motion::Motion;
use crate::codec::predictor::network::NetworkPredictor;
use crate::codec::predictor::vectors::MotionVectors;
use crate::codec::predictor::{CompositePredictor, RunPredictor};
use crate::decode::DecodeError;
use crate::format::limits;
use crate::format::part::{StoredIntegers, StoredPrediction, StoredPredictor};
use crate::tensor::TensorInfo;

/// What the permutations of the records below do to a tensor.
#[derive(Clone, Debug, Default)]
pub struct Motions {
    /// From the part to its reference.
    pub nearest: Option<Motion>,
    /// From the part to its reference's own reference.
    pub second: Option<Motion>,
}

impl From<Option<Motion>> for Motions {
    fn from(nearest: Option<Motion>) -> Self {
        Self { nearest, second: None }
    }
}

/// Prediction side information, decoded.
#[derive(Debug)]
pub struct Prediction {
    /// Which part of the reference record.
    pub reference_part: u32,
    /// Which part of the reference record's own reference record, where the predictor looks at two layers.
    pub second_part: Option<u32>,
    /// Where elements find their reference; absent where it is their own place, or the predictor finds it.
    pub motion: Option<Motion>,
    method: Method,
}

#[derive(Debug)]
enum Method {
    ScaledCopy(f32),
    RowAffine { gain_step: f32, offset_step: f32, gains: Integers, offsets: Integers },
    Composite(CompositePredictor),
}

impl Prediction {
    /// The reference itself, each element from its own place.
    pub(super) fn copy() -> Self {
        Self { reference_part: 0, second_part: None, motion: None, method: Method::ScaledCopy(1.0) }
    }

    /// Where predictions are made of several reference values: what makes them. Nothing is left to do for
    /// [`Self::of_run`] then.
    pub fn composite(&self) -> Option<&CompositePredictor> {
        match &self.method {
            Method::Composite(predictor) => Some(predictor),
            _ => None,
        }
    }

    /// Whether all runs have the same predictor.
    pub fn is_uniform(&self) -> bool {
        matches!(self.method, Method::ScaledCopy(_))
    }

    /// The predictor of a run.
    pub fn of_run(&self, run: usize) -> RunPredictor {
        match &self.method {
            Method::ScaledCopy(gain) => RunPredictor::ScaledCopy { gain: *gain },
            Method::RowAffine { gain_step, offset_step, gains, offsets } => RunPredictor::RowAffine {
                gain: gain_step * gains.get(run) as f32,
                offset: offset_step * offsets.get(run) as f32,
            },
            Method::Composite(_) => RunPredictor::COPY,
        }
    }
}

/// Decodes the side information of a prediction of `tensor`, in runs of `run_elements`.
pub(super) fn prepare_prediction(
    stored: &StoredPrediction,
    tensor: &TensorInfo,
    (runs, run_elements): (u64, usize),
    pools: Pools<'_>,
    motions: Motions,
) -> Result<Prediction, DecodeError> {
    let mut motions = match &stored.placement {
        Some(_) if motions.nearest.is_none() => {
            return Err(inconsistent("placement", "a placement", "a permutation in the record that it fits"));
        }
        Some(_) => motions,
        None => Motions::default(),
    };
    let mut second_part = None;
    let method = match &stored.predictor {
        StoredPredictor::ScaledCopy { gain } => Method::ScaledCopy(*gain),
        StoredPredictor::RowAffine { gain_step, offset_step, gains, offsets } => Method::RowAffine {
            gain_step: *gain_step,
            offset_step: *offset_step,
            gains: prepare_coefficients("gains", *gain_step, gains, runs)?,
            offsets: prepare_coefficients("offsets", *offset_step, offsets, runs)?,
        },
        StoredPredictor::MotionVectors { axis, gain_step, counts, sources, gains } => {
            if motions.nearest.is_some() {
                return Err(inconsistent("placement", "a placement", "none beside motion vectors"));
            }
            let vectors = prepare_vectors(tensor, (*axis).into(), *gain_step, [counts, sources, gains])?;
            Method::Composite(CompositePredictor::Vectors(vectors))
        }
        StoredPredictor::Network { network, kind, layer, input_scale, output_scale, second_part: second } => {
            let (number, kind, layer) = (usize::from(*network), usize::from(*kind), layer.map(usize::from));
            let below = |bound: usize| format!("less than {bound}");
            let Some(network) = pools.networks.get(number) else {
                return Err(inconsistent("network", number, below(pools.networks.len())));
            };
            let (kinds, layers) = (network.stored().kinds.len(), network.stored().layers.len());
            if kind >= kinds {
                return Err(inconsistent("network kind", kind, below(kinds)));
            }
            if let Some(layer) = layer
                && layer >= layers
            {
                return Err(inconsistent("network layer", layer, below(layers)));
            }
            if second.is_some() && network.contexts() == 1 {
                return Err(inconsistent("second reference part", "a part", "none: the network looks at one layer"));
            }
            second_part = *second;
            Method::Composite(CompositePredictor::Network(NetworkPredictor {
                network: Arc::clone(network),
                kind,
                layer,
                input_scale: *input_scale,
                output_scale: *output_scale,
                run_elements,
                elements: tensor.elements() as usize,
                contexts: 1 + usize::from(second.is_some()),
                motions: [motions.nearest.take(), motions.second.take()],
            }))
        }
    };
    Ok(Prediction { reference_part: stored.reference_part, second_part, motion: motions.nearest, method })
}

fn prepare_vectors(
    tensor: &TensorInfo,
    axis: usize,
    gain_step: f32,
    [counts, sources, gains]: [&StoredIntegers; 3],
) -> Result<MotionVectors, DecodeError> {
    let misfit = |expected: &str| inconsistent("vector axis", format!("{axis} of {:?}", tensor.shape), expected);
    // Without elements nothing bounds the units of an axis.
    let units = match tensor.shape.get(axis) {
        Some(&units) if tensor.elements() > 0 => units,
        _ => return Err(misfit("an axis of a tensor with elements")),
    };
    if units > limits::BLOCKS {
        return Err(misfit("an axis of 2^20 units at most"));
    }
    let counts = decode_integers("vector counts", counts, units, 0, limits::MOTION_VECTORS)?;
    let counts: Vec<u32> = (0..units as usize).map(|unit| counts.get(unit) as u32).collect();
    let total = counts.iter().map(|&count| u64::from(count)).sum();
    let sources = decode_integers("vector sources", sources, total, 0, units as i32 - 1)?;
    let gains = prepare_coefficients("vector gains", gain_step, gains, total)?;
    let each = 0..total as usize;
    let sources = each.clone().map(|vector| sources.get(vector) as u32).collect();
    let gains = each.map(|vector| gain_step * gains.get(vector) as f32).collect();
    MotionVectors::new(&tensor.shape, axis, counts, sources, gains).ok_or_else(|| misfit("an axis that vectors fit"))
}
