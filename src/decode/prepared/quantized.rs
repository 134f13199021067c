//! Side information of quantized parts, decoded and checked: steps and means.

use std::sync::Arc;

use super::prediction::{Motions, prepare_prediction};
use super::{PartKind, Pools, Symbols, decode_integers, inconsistent};
use crate::codec::integers::Integers;
use crate::codec::quantizer::{SCALE_RANGE, scale_multiplier};
use crate::codec::trellis::Trellis;
use crate::codec::vector_quantizer::{Codebook, VectorQuantizer};
use crate::decode::DecodeError;
use crate::format::part::{QuantizerInfo, StoredIntegers, StoredVectors, TrellisTables};
use crate::tensor::TensorInfo;

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

/// Means, gains and offsets are integers that binary32 holds exactly.
pub(super) const COEFFICIENT_RANGE: (i32, i32) = (-(1 << 24), 1 << 24);

/// Decodes `count` coefficients, each an integer times `unit`.
pub(super) fn prepare_coefficients(
    field: &'static str,
    unit: f32,
    stored: &StoredIntegers,
    count: u64,
) -> Result<Integers, DecodeError> {
    let integers = decode_integers(field, stored, count, COEFFICIENT_RANGE.0, COEFFICIENT_RANGE.1)?;
    if let Some((least, largest)) = integers.range()
        && [least, largest].iter().any(|&integer| (unit * integer as f32).is_infinite())
    {
        return Err(inconsistent(field, format!("{least} to {largest} times {unit}"), "finite products"));
    }
    Ok(integers)
}

/// Decodes the side information of a quantized part.
pub(super) fn prepare_quantized(
    info: &QuantizerInfo,
    tensor: &TensorInfo,
    symbols: Symbols,
    pools: Pools<'_>,
    motions: Motions,
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
    let means = match &info.means {
        Some((step, means)) => Some((*step, prepare_coefficients("means", *step, means, runs)?)),
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
    let prediction = (info.prediction.as_ref())
        .map(|stored| prepare_prediction(stored, tensor, (runs, symbols.run_elements), pools, motions))
        .transpose()?;
    let trellis = match &info.trellis {
        Some(stored) => match Trellis::new(stored.state_bits) {
            Some(trellis) => Some((stored.tables, trellis)),
            None => return Err(inconsistent("trellis state bits", stored.state_bits, "3 to 8")),
        },
        None => None,
    };
    let vectors = info.vectors.map(|stored| prepare_vectors(stored, pools.codebooks)).transpose()?;
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
