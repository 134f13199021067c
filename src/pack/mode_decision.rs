//! Which records are predicted, from where, and how: every stage must earn its bits (Eq. 17, the right way round, extended to
//! all stages).
//!
//! A keyframe part costs its symbols. A predicted part costs the symbols of its residual and its coefficients, and a record's
//! permutation is paid for once by all parts that use it. All are measured with the tables that will be used.

use rayon::prelude::*;

use super::counting::{measure, sum_of_squares};
use super::entropy_model::TablePool;
use super::options::PredictorChoice;
use super::quantized_symbols::{EncoderPrediction, QuantizedSymbols, Rounding};
use super::symbols::RunLayout;
use crate::codec::integers;
use crate::codec::predictor::RunPredictor;
use crate::format::part::StoredPredictor;

/// A prediction whose residual keeps more energy than this cannot pay: not measured.
const HOPELESS_ENERGY: f64 = 0.999;
/// Bits of a predicted part's header beside its coefficients, roughly.
const HEADER_BITS: f64 = 64.0;

/// Fitted coefficients of a predictor.
#[derive(Clone, Debug, PartialEq)]
pub enum FittedPredictor {
    /// One gain.
    ScaledCopy(f32),
    /// A gain and an offset per run, as integers times a step.
    RowAffine {
        /// Gain of one unit.
        gain_step: f32,
        /// Offset of one unit, in weight units.
        offset_step: f32,
        /// One per run.
        gains: Vec<i32>,
        /// One per run.
        offsets: Vec<i32>,
    },
    /// Motion vectors along an axis, see `codec::predictor::vectors`.
    Vectors {
        /// The axis.
        axis: u8,
        /// Gain of one unit.
        gain_step: f32,
        /// Vectors of each index along the axis.
        counts: Vec<i32>,
        /// One per vector.
        sources: Vec<i32>,
        /// One per vector.
        gains: Vec<i32>,
    },
    /// A network of the archive, see `codec::predictor::network`; its own bits are not the part's.
    Network(StoredPredictor),
}

impl FittedPredictor {
    /// The predictor of a run, with the decoder's arithmetic.
    pub fn of_run(&self, run: usize) -> RunPredictor {
        match self {
            Self::ScaledCopy(gain) => RunPredictor::ScaledCopy { gain: *gain },
            Self::RowAffine { gain_step, offset_step, gains, offsets } => RunPredictor::RowAffine {
                gain: gain_step * gains[run] as f32,
                offset: offset_step * offsets[run] as f32,
            },
            // Their references are predictions already.
            Self::Vectors { .. } | Self::Network(_) => RunPredictor::COPY,
        }
    }

    /// As the archive stores it.
    pub fn stored(&self) -> StoredPredictor {
        match self {
            Self::ScaledCopy(gain) => StoredPredictor::ScaledCopy { gain: *gain },
            Self::RowAffine { gain_step, offset_step, gains, offsets } => StoredPredictor::RowAffine {
                gain_step: *gain_step,
                offset_step: *offset_step,
                gains: integers::encode(gains),
                offsets: integers::encode(offsets),
            },
            Self::Vectors { axis, gain_step, counts, sources, gains } => StoredPredictor::MotionVectors {
                axis: *axis,
                gain_step: *gain_step,
                counts: integers::encode(counts),
                sources: integers::encode(sources),
                gains: integers::encode(gains),
            },
            Self::Network(stored) => stored.clone(),
        }
    }

    fn bits(&self) -> f64 {
        HEADER_BITS
            + match self {
                Self::ScaledCopy(_) => 32.0,
                Self::RowAffine { gains, offsets, .. } => {
                    64.0 + 8.0 * (integers::encode(gains).0.len() + integers::encode(offsets).0.len()) as f64
                }
                Self::Vectors { counts, sources, gains, .. } => {
                    let bytes = [counts, sources, gains].map(|integers| integers::encode(integers).0.len());
                    32.0 + 8.0 * bytes.iter().sum::<usize>() as f64
                }
                Self::Network(_) => 64.0,
            }
    }
}

/// A quantized part as mode decision sees it.
pub struct PartCandidate<'a> {
    /// The weights.
    pub values: &'a [f32],
    /// Layout of its runs.
    pub layout: RunLayout,
    /// Step of each run.
    pub step_of_run: &'a (dyn Fn(usize) -> f32 + Sync),
    /// Raw bits per symbol.
    pub raw_bits: u32,
    /// How values become codes.
    pub rounding: Rounding,
    /// Elements measured; larger parts are sampled by whole runs.
    pub measured_elements: usize,
    /// Bits per element where vectors are quantized: a prediction then saves no bits but error, which counts for as many.
    pub vector_bits: Option<f64>,
}

/// The cheapest way found to predict a part from one reference, and what it costs.
#[derive(Clone, Debug)]
pub struct MeasuredPrediction {
    /// Coefficients.
    pub predictor: FittedPredictor,
    /// Bits of symbols, raw bits and coefficients.
    pub bits: f64,
}

impl PartCandidate<'_> {
    fn every(&self) -> usize {
        self.layout.elements.div_ceil(self.measured_elements)
    }

    fn bits(&self, symbols: &QuantizedSymbols<'_>, pool: &TablePool) -> f64 {
        match self.vector_bits {
            None => measure(symbols, pool, self.every()).unwrap_or(f64::INFINITY),
            Some(bits) => self.equivalent_bits(symbols, bits),
        }
    }

    /// Bits at which vectors of the weights themselves would have the error that those of the symbols' targets have at `bits`
    /// per element: half a bit for each factor of two between their energies, run by run.
    fn equivalent_bits(&self, symbols: &QuantizedSymbols<'_>, bits: f64) -> f64 {
        let of_run = |run: usize| {
            let (range, mut targets) = (self.layout.run_range(run), Vec::new());
            symbols.targets(run, &mut targets);
            let unit = f64::from((self.step_of_run)(run));
            let energy = unit * unit * sum_of_squares(&targets);
            let octaves = (energy / sum_of_squares(&self.values[range.clone()])).log2();
            (bits + 0.5 * if octaves.is_nan() { 0.0 } else { octaves.max(-2.0 * bits) }) * range.len() as f64
        };
        let runs: Vec<f64> = (0..self.layout.runs()).into_par_iter().map(of_run).collect();
        runs.into_iter().sum()
    }

    /// Bits of the part as a keyframe.
    pub fn keyframe_bits(&self, pool: &TablePool) -> f64 {
        let symbols = QuantizedSymbols {
            values: self.values,
            prediction: None,
            layout: self.layout,
            step_of_run: self.step_of_run,
            raw_bits: self.raw_bits,
            rounding: self.rounding,
            columns: None,
            feedback: None,
        };
        self.bits(&symbols, pool)
    }

    /// The cheapest allowed elementwise prediction from `reference`, if any can pay or one is forced.
    pub fn best_prediction(
        &self,
        reference: &[f32],
        allowed: PredictorChoice,
        force: bool,
        pool: &TablePool,
    ) -> Option<MeasuredPrediction> {
        let moments: Vec<Moments> = (0..self.layout.runs())
            .into_par_iter()
            .map(|run| {
                let range = self.layout.run_range(run);
                Moments::of(&self.values[range.clone()], &reference[range])
            })
            .collect();
        let most = if force { f64::INFINITY } else { HOPELESS_ENERGY };
        let mut candidates = Vec::new();
        if matches!(allowed, PredictorChoice::Auto | PredictorChoice::ScaledCopy) {
            candidates.extend(fit_scaled_copy(&moments, most));
        }
        if matches!(allowed, PredictorChoice::Auto | PredictorChoice::RowAffine) {
            candidates.extend(fit_row_affine(&moments, (self.step_of_run)(0) / 4.0, most));
        }
        let measured = candidates.into_iter().map(|predictor| {
            let bits = self.predicted_bits(reference, &predictor, pool);
            MeasuredPrediction { predictor, bits }
        });
        measured.min_by(|a, b| a.bits.total_cmp(&b.bits))
    }

    /// Bits of the part with a predictor, coefficients included. `reference` are the reference values, motion applied, or the
    /// predictions where the predictor makes them of several.
    pub fn predicted_bits(&self, reference: &[f32], predictor: &FittedPredictor, pool: &TablePool) -> f64 {
        let symbols = QuantizedSymbols {
            values: self.values,
            prediction: Some(EncoderPrediction { reference, of_run: &|run| predictor.of_run(run) }),
            layout: self.layout,
            step_of_run: self.step_of_run,
            raw_bits: self.raw_bits,
            rounding: self.rounding,
            columns: None,
            feedback: None,
        };
        self.bits(&symbols, pool) + predictor.bits()
    }
}

/// The gain of least squares over the whole part, if it leaves at most this share of the energy.
fn fit_scaled_copy(runs: &[Moments], most: f64) -> Option<FittedPredictor> {
    let sum = |of: fn(&Moments) -> f64| runs.iter().map(of).sum::<f64>();
    let (energy, product) = (sum(|run| run.energy), sum(|run| run.product));
    let gain = product / sum(|run| run.reference_energy);
    let residual_energy = energy - gain * product;
    let useful = gain.is_finite() && residual_energy < most * energy;
    useful.then_some(FittedPredictor::ScaledCopy(gain as f32))
}

/// Gain and offset of least squares per run, gains in 1/64, offsets in units of `offset_step`.
fn fit_row_affine(runs: &[Moments], offset_step: f32, most: f64) -> Option<FittedPredictor> {
    let gain_step = 1.0 / 64.0;
    let (mut gains, mut offsets) = (Vec::new(), Vec::new());
    let (mut energy, mut residual_energy) = (0.0, 0.0);
    for moments in runs {
        let (gain, offset) = moments.affine();
        let gain = (gain / gain_step).round().clamp(-1024.0, 1024.0);
        let offset = (offset / f64::from(offset_step)).round().clamp(-65_536.0, 65_536.0);
        residual_energy += moments.residual_energy(gain * gain_step, offset * f64::from(offset_step));
        energy += moments.energy;
        gains.push(gain as i32);
        offsets.push(offset as i32);
    }
    let gain_step = gain_step as f32;
    let useful = residual_energy < most * energy;
    useful.then_some(FittedPredictor::RowAffine { gain_step, offset_step, gains, offsets })
}

/// Sums over pairs of a value and its reference.
struct Moments {
    count: f64,
    sum: f64,
    reference_sum: f64,
    energy: f64,
    reference_energy: f64,
    product: f64,
}

impl Moments {
    /// In an order that lets them be summed fast.
    fn of(values: &[f32], reference: &[f32]) -> Self {
        let mut sums = [[0.0_f64; 8]; 5];
        let mut add = |lane: usize, value: f32, reference: f32| {
            let (value, reference) = (f64::from(value), f64::from(reference));
            sums[0][lane] += value;
            sums[1][lane] += reference;
            sums[2][lane] += value * value;
            sums[3][lane] += reference * reference;
            sums[4][lane] += value * reference;
        };
        let (whole, rest) = values.as_chunks::<8>();
        let (whole_reference, rest_reference) = reference.as_chunks::<8>();
        for (values, reference) in whole.iter().zip(whole_reference) {
            for lane in 0..8 {
                add(lane, values[lane], reference[lane]);
            }
        }
        for (&value, &reference) in rest.iter().zip(rest_reference) {
            add(0, value, reference);
        }
        let [sum, reference_sum, energy, reference_energy, product] = sums.map(|lanes| lanes.iter().sum());
        Self { count: values.len() as f64, sum, reference_sum, energy, reference_energy, product }
    }

    fn affine(&self) -> (f64, f64) {
        let covariance = self.product - self.sum * self.reference_sum / self.count;
        let variance = self.reference_energy - self.reference_sum * self.reference_sum / self.count;
        let gain = if variance > 0.0 { covariance / variance } else { 0.0 };
        (gain, (self.sum - gain * self.reference_sum) / self.count)
    }

    fn residual_energy(&self, gain: f64, offset: f64) -> f64 {
        self.energy + gain * gain * self.reference_energy + offset * offset * self.count
            - 2.0 * gain * self.product
            - 2.0 * offset * self.sum
            + 2.0 * gain * offset * self.reference_sum
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pack::counting::count;

    const NEAREST: Rounding = Rounding { trellis: None, lambda: 0.0, own_table: None };

    /// A deterministic stand-in for weights: sums of hashed uniform numbers.
    fn noise(seed: u64, count: usize) -> Vec<f32> {
        let mut state = seed;
        let mut uniform = || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 40) as f32 / (1 << 24) as f32 - 0.5
        };
        (0..count).map(|_| (0..4).map(|_| uniform()).sum::<f32>() * 0.1).collect()
    }

    fn decide(values: &[f32], reference: &[f32]) -> (f64, Option<MeasuredPrediction>) {
        let layout = RunLayout::of_shape(&[64, 128], None);
        let step_of_run = |_| 0.01;
        let part = PartCandidate {
            values,
            layout,
            step_of_run: &step_of_run,
            raw_bits: 0,
            rounding: NEAREST,
            measured_elements: usize::MAX,
            vector_bits: None,
        };
        let symbols = QuantizedSymbols {
            values,
            prediction: None,
            layout,
            step_of_run: &step_of_run,
            raw_bits: 0,
            rounding: NEAREST,
            columns: None,
            feedback: None,
        };
        // Tables for small scales too, as other parts of a checkpoint would bring them.
        let quiet: Vec<f32> = values.iter().map(|value| value / 8.0).collect();
        let quiet = QuantizedSymbols {
            values: &quiet,
            prediction: None,
            layout,
            step_of_run: &step_of_run,
            raw_bits: 0,
            rounding: NEAREST,
            columns: None,
            feedback: None,
        };
        let mut classes = count(&symbols, 1);
        classes.merge(&count(&quiet, 1));
        let pool = classes.fit();
        (part.keyframe_bits(&pool), part.best_prediction(reference, PredictorChoice::Auto, false, &pool))
    }

    #[test]
    fn a_layer_like_the_one_below_is_cheaper_predicted() {
        let reference = noise(1, 64 * 128);
        let values: Vec<f32> = reference.iter().zip(noise(2, 64 * 128)).map(|(a, b)| 0.9 * a + 0.1 * b).collect();
        let (keyframe, prediction) = decide(&values, &reference);
        let prediction = prediction.expect("the residual has a hundredth of the energy");
        assert!(prediction.bits < 0.6 * keyframe, "{} of {keyframe}", prediction.bits);
    }

    #[test]
    fn an_unrelated_layer_is_not_worth_predicting_from() {
        let (keyframe, prediction) = decide(&noise(1, 64 * 128), &noise(2, 64 * 128));
        assert!(prediction.is_none_or(|prediction| prediction.bits > keyframe * 0.999));
    }

    #[test]
    fn affine_coefficients_are_those_of_least_squares() {
        let reference = [1.0, 2.0, 3.0, 4.0];
        let values = [2.5, 4.5, 6.5, 8.5];
        let (gain, offset) = Moments::of(&values, &reference).affine();
        assert!((gain - 2.0).abs() < 1e-9 && (offset - 0.5).abs() < 1e-9);
    }
}
