//! Side information of quantized parts, decoded and checked: steps, means, predictors.

use std::sync::Arc;

use super::{PartKind, Symbols, decode_integers, inconsistent};
use crate::codec::integers::Integers;
use crate::codec::motion::Motion;
use crate::codec::predictor::RunPredictor;
use crate::codec::quantizer::{SCALE_RANGE, scale_multiplier};
use crate::codec::trellis::Trellis;
use crate::codec::vector_quantizer::{Codebook, VectorQuantizer};
use crate::decode::DecodeError;
use crate::format::part::{QuantizerInfo, StoredPredictor, StoredVectors, TrellisTables};

/// Quantizer side information, decoded.
#[derive(Debug)]
pub struct Quantizer {
    /// Present where codes are trellis-coded.
    pub trellis: Option<(TrellisTables, Trellis)>,
    /// Present where there are indices of codewords in place of codes.
    pub vectors: Option<VectorQuantizer>,
    step: f32,
    scales: Option<Integers>,
    means: Option<(f32, Integers)>,
    column_scales: Option<Vec<f32>>,
}

impl Quantizer {
    /// The step of a run: the part's step times the run's multiplier.
    pub fn step_of_run(&self, run: usize) -> f32 {
        match &self.scales {
            Some(scales) => self.step * scale_multiplier(scales.get(run)),
            None => self.step,
        }
    }

    /// What the values of a run are multiplied with, element by element, where columns have scales: `[run elements]`.
    pub fn column_scales(&self) -> Option<&[f32]> {
        self.column_scales.as_deref()
    }

    /// Whether all runs share step and mean.
    pub fn is_uniform(&self) -> bool {
        self.scales.is_none() && self.means.is_none()
    }

    /// The mean of a run.
    pub fn mean_of_run(&self, run: usize) -> Option<f32> {
        self.means.as_ref().map(|(step, means)| step * means.get(run) as f32)
    }
}

/// Prediction side information, decoded.
#[derive(Debug)]
pub struct Prediction {
    /// Which part of the reference record.
    pub reference_part: u32,
    /// Where elements find their reference; absent where it is their own place.
    pub motion: Option<Motion>,
    coefficients: Coefficients,
}

#[derive(Debug)]
enum Coefficients {
    ScaledCopy(f32),
    RowAffine { gain_step: f32, offset_step: f32, gains: Integers, offsets: Integers },
}

impl Prediction {
    /// The reference itself, each element from its own place.
    pub(super) fn copy() -> Self {
        Self { reference_part: 0, motion: None, coefficients: Coefficients::ScaledCopy(1.0) }
    }

    /// Whether all runs have the same predictor.
    pub fn is_uniform(&self) -> bool {
        matches!(self.coefficients, Coefficients::ScaledCopy(_))
    }

    /// The predictor of a run.
    pub fn of_run(&self, run: usize) -> RunPredictor {
        match &self.coefficients {
            Coefficients::ScaledCopy(gain) => RunPredictor::ScaledCopy { gain: *gain },
            Coefficients::RowAffine { gain_step, offset_step, gains, offsets } => RunPredictor::RowAffine {
                gain: gain_step * gains.get(run) as f32,
                offset: offset_step * offsets.get(run) as f32,
            },
        }
    }
}

/// Means, gains and offsets are integers that binary32 holds exactly.
pub(super) const COEFFICIENT_RANGE: (i32, i32) = (-(1 << 24), 1 << 24);

/// Decodes the side information of a quantized part.
pub(super) fn prepare_quantized(
    info: &QuantizerInfo,
    symbols: Symbols,
    codebooks: &[Arc<Codebook>],
    motion: Option<Motion>,
    runs: u64,
) -> Result<PartKind, DecodeError> {
    // Finite coefficients: arithmetic cannot make a NaN of finite references, and engines need not agree on one.
    let scales = match &info.scales {
        Some(scales) => {
            let scales = decode_integers("scales", scales, runs, SCALE_RANGE.0, SCALE_RANGE.1)?;
            if let Some((_, largest)) = scales.range()
                && (info.step * scale_multiplier(largest)).is_infinite()
            {
                return Err(inconsistent("scales", format!("{largest} on a step of {}", info.step), "a finite step"));
            }
            Some(scales)
        }
        None => None,
    };
    let coefficients = |field, unit: f32, stored| {
        let integers = decode_integers(field, stored, runs, COEFFICIENT_RANGE.0, COEFFICIENT_RANGE.1)?;
        if let Some((least, largest)) = integers.range()
            && [least, largest].iter().any(|&integer| (unit * integer as f32).is_infinite())
        {
            return Err(inconsistent(field, format!("{least} to {largest} times {unit}"), "finite products"));
        }
        Ok(integers)
    };
    let means = match &info.means {
        Some((step, means)) => Some((*step, coefficients("means", *step, means)?)),
        None => None,
    };
    // Bounded by the elements of a run; step and mean stay finite times any of them, or become infinite, never a NaN.
    let column_scales = match &info.column_scales {
        Some(stored) => {
            let columns = symbols.run_elements;
            let scales = decode_integers("column scales", stored, columns as u64, SCALE_RANGE.0, SCALE_RANGE.1)?;
            Some((0..columns).map(|column| scale_multiplier(scales.get(column))).collect())
        }
        None => None,
    };
    let prediction = match &info.prediction {
        None => None,
        Some(stored) => {
            let motion = match &stored.placement {
                Some(_) if motion.is_none() => {
                    return Err(inconsistent("placement", "a placement", "a permutation in the record that it fits"));
                }
                Some(_) => motion,
                None => None,
            };
            let coefficients = match &stored.predictor {
                StoredPredictor::ScaledCopy { gain } => Coefficients::ScaledCopy(*gain),
                StoredPredictor::RowAffine { gain_step, offset_step, gains, offsets } => Coefficients::RowAffine {
                    gain_step: *gain_step,
                    offset_step: *offset_step,
                    gains: coefficients("gains", *gain_step, gains)?,
                    offsets: coefficients("offsets", *offset_step, offsets)?,
                },
            };
            Some(Prediction { reference_part: stored.reference_part, motion, coefficients })
        }
    };
    let trellis = match &info.trellis {
        Some(stored) => match Trellis::new(stored.state_bits) {
            Some(trellis) => Some((stored.tables, trellis)),
            None => return Err(inconsistent("trellis state bits", stored.state_bits, "3 to 8")),
        },
        None => None,
    };
    let vectors = info.vectors.map(|stored| prepare_vectors(stored, codebooks)).transpose()?;
    let quantizer = Quantizer { trellis, vectors, step: info.step, scales, means, column_scales };
    Ok(PartKind::Quantized { symbols, quantizer, prediction })
}

fn prepare_vectors(stored: StoredVectors, codebooks: &[Arc<Codebook>]) -> Result<VectorQuantizer, DecodeError> {
    let codebook = |number: u16| {
        let codebook = codebooks.get(usize::from(number)).cloned();
        codebook.ok_or_else(|| inconsistent("vector codebook", number, format!("less than {}", codebooks.len())))
    };
    let [first, second] = stored.codebooks;
    let elements = |codebook: &Codebook| format!("codewords of {} elements", codebook.elements());
    let (first, second) = (codebook(first)?, codebook(second)?);
    VectorQuantizer::new([Arc::clone(&first), Arc::clone(&second)])
        .ok_or_else(|| inconsistent("vector codebook", elements(&second), elements(&first)))
}
