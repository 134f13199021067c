//! What every stage is worth on this checkpoint, in bits (`--stats`).
//!
//! Alignment, prediction and the coding of permutations were measured by mode decision, record by record. Of everything else
//! the survey's sample is encoded once more with the stage switched off, at a step that leads to the same squared error.

use super::options::{EntropyModel, PackOptions, Quantization, Steps};
use super::rate::StepSearch;
use super::report::{StageStatistic, StageTotals};
use super::survey::{Probe, Survey};

/// Steps tried until a variant has the same error.
const TRIES: usize = 5;
/// The same error is one this near; the rest is made up for at half a bit per factor of two.
const ERROR_TOLERANCE: f64 = 0.02;

/// Measures every stage. `probe` is the survey at the step that was packed with; `stages` is what mode decision found.
pub fn measure(
    survey: &mut Survey<'_>,
    options: &PackOptions,
    probe: &Probe,
    stages: &StageTotals,
    parameters: u64,
) -> Vec<StageStatistic> {
    let mut statistics = Vec::new();
    let mut add = |stage, instead, bits_saved: f64, is_used| {
        let bits_per_parameter = bits_saved / parameters.max(1) as f64;
        statistics.push(StageStatistic { stage, instead, bits_saved, bits_per_parameter, is_used });
    };
    let quantized = probe.parts.iter().flatten().filter(|part| part.decision.is_quantized());
    let elements: u64 = quantized.clone().map(|part| part.elements).sum();
    if elements > 0 {
        let squared_error: f64 = quantized.map(|part| part.squared_error).sum();
        let base = Base { step: probe.step, squared_error, elements };
        let variants = variants(options);
        let with = if variants.is_empty() { 0.0 } else { base.bits(survey, options) };
        for (stage, instead, off, is_used) in variants {
            add(stage, instead, base.bits(survey, &off) - with, is_used);
        }
    }
    if stages.keyframe > 0.0 {
        let saved = stages.keyframe - stages.same_place;
        add("prediction", "every record a keyframe", saved, stages.unaligned < stages.keyframe);
        let vectors = stages.same_place - stages.unaligned;
        add("motion vectors", "prediction from what is in the same place", vectors, vectors > 0.0);
        let is_aligned = stages.chosen_permutation > 0.0;
        let aligned = "prediction without a permutation";
        add("alignment, where it pays", aligned, stages.unaligned - stages.chosen, is_aligned);
        let everywhere = stages.unaligned - stages.aligned - stages.permutation;
        add("alignment, everywhere", aligned, everywhere, false);
        let permutations = stages.chosen_permutation_raw - stages.chosen_permutation;
        add("permutation coding", "entries of fixed width", permutations, is_aligned);
    }
    statistics
}

/// The options with one stage switched off, or on where it is not used.
fn variants(options: &PackOptions) -> Vec<(&'static str, &'static str, PackOptions, bool)> {
    if options.quantization == Quantization::ResidualVector {
        return Vec::new(); // nothing of it is entropy-coded
    }
    let is_trellis = options.quantization != Quantization::Scalar;
    let mut variants = Vec::new();
    if is_trellis {
        let off = PackOptions { quantization: Quantization::Scalar, ..options.clone() };
        variants.push(("trellis-coded quantization", "scalar quantization", off, true));
    }
    if options.rate_aware_rounding {
        let off = PackOptions { rate_aware_rounding: false, ..options.clone() };
        variants.push(("rate-aware rounding", "the nearest code", off, true));
    }
    if options.entropy_model == EntropyModel::Contextual {
        let off = PackOptions { entropy_model: EntropyModel::Iid, ..options.clone() };
        variants.push(("a table per row scale", "one table per tensor", off, true));
    }
    if options.entropy_model != EntropyModel::FixedLength {
        let off = PackOptions { entropy_model: EntropyModel::FixedLength, ..options.clone() };
        variants.push(("entropy coding", "codes of fixed length", off, true));
    }
    if options.steps == Steps::Shared {
        let off = PackOptions { steps: Steps::PerRun, ..options.clone() };
        variants.push(("one step for all rows", "a step per row", off, true));
    }
    variants
}

/// What variants are compared at.
struct Base {
    step: f64,
    squared_error: f64,
    elements: u64,
}

impl Base {
    /// Bits of everything quantized at the base's error.
    fn bits(&self, survey: &mut Survey<'_>, options: &PackOptions) -> f64 {
        let mut search = StepSearch::new(0.0, 2.0);
        let mut step = self.step;
        let mut measured = survey.try_options(options, step);
        let excess = |(_, squared_error): (f64, f64)| (squared_error / self.squared_error).log2();
        for _ in 1..TRIES {
            if !excess(measured).is_finite() || excess(measured).abs() < ERROR_TOLERANCE {
                break;
            }
            step = search.next(step, excess(measured));
            measured = survey.try_options(options, step);
        }
        let (bits, _) = measured;
        let correction = if excess(measured).is_finite() { 0.5 * excess(measured) * self.elements as f64 } else { 0.0 };
        bits + correction
    }
}
