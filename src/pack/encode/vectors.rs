//! The rate of residual vector quantization: how many elements share two indices of fixed length, part by part.
//!
//! With b bits for both indices, vectors of n elements take b / n bits an element. Two lengths that are next to one another
//! are used, the shorter for the parts with the most energy per element, as many as the budget has bits for. So the rate
//! asked for is met from below, as near as a tensor more or less allows.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::super::options::{PackOptions, Target};
use super::super::quantize::{PartQuantizer, QuantizerChoice};
use super::super::quantized_symbols::Rounding;
use super::super::survey::{PartSample, Survey};
use super::super::treatment::{Decision, Fineness};
use super::super::vectors::{VECTORS_PER_CODEWORD, train};
use super::target::StepPlan;
use super::{Encoder, PackError};
use crate::format::limits::VECTOR_ELEMENTS;

/// Bits of an index at most: 1024 codewords, as in the paper.
const MOST_INDEX_BITS: u32 = 10;
/// And at least: below that vectors are no better than numbers.
const LEAST_INDEX_BITS: u32 = 4;
/// Share of the budget that the codebooks of both lengths may take.
const CODEBOOK_SHARE: f64 = 0.05;
/// Bits of a run's scale, about.
const SCALE_BITS: f64 = 3.0;
/// Bits of a part's header and place in the index, and of a strip's checksum.
const PART_BITS: f64 = 8.0 * 32.0;
const STRIP_BITS: f64 = 32.0;

/// Bits of a part whose vectors have so many elements.
fn bits_of(part: &PartSample<'_>, elements: usize, index_bits: u32) -> f64 {
    let layout = part.layout;
    let run_bytes = |run: usize| (layout.run_range(run).len().div_ceil(elements) * 2 * index_bits as usize).div_ceil(8);
    let bytes: usize = (0..layout.runs()).map(run_bytes).sum();
    8.0 * bytes as f64 + SCALE_BITS * layout.runs() as f64 + STRIP_BITS * layout.strips() as f64 + PART_BITS
}

/// Bits of the codebooks of one length.
fn codebook_bits(elements: usize, index_bits: u32) -> f64 {
    32.0 * (elements << index_bits) as f64
}

fn refused(reason: String) -> PackError {
    PackError::Vectors { reason }
}

impl Encoder<'_> {
    /// Chooses the length of every part's vectors and trains their codebooks.
    pub(super) fn plan_vectors(&self, survey: &mut Survey<'_>) -> Result<StepPlan, PackError> {
        let mut probe = survey.probe_exact();
        let budget = match self.options.target {
            Target::BitsPerParameter(wanted) => {
                let exact: f64 = probe.parts.iter().flatten().map(|part| part.bits).sum();
                wanted * self.checkpoint.parameters() as f64 - self.index_bits(&probe) - exact
            }
            Target::RelativeSquaredError(_) => {
                return Err(refused("its rate is what can be chosen, not its error: expected --bpp".into()));
            }
            Target::Lossless => 0.0, // parts with a rate of their own, if any
        };
        let samples: Vec<PartSample<'_>> = survey.samples().collect();
        let index_bits = index_bits_for(budget, &samples);
        let lengths = self.lengths(&samples, budget, index_bits)?;
        let mut samples_of: BTreeMap<usize, Vec<&PartSample<'_>>> = BTreeMap::new();
        for (sample, &length) in samples.iter().zip(&lengths) {
            samples_of.entry(length).or_default().push(sample);
        }
        let mut of_length = BTreeMap::new();
        for (&length, samples) in &samples_of {
            let vectors = normalised_vectors(samples, length, VECTORS_PER_CODEWORD << index_bits, self.options);
            let vectors_in_all = vectors.len() / length;
            // Few weights train few codewords.
            let index_bits = index_bits.min((vectors_in_all / 2).max(2).ilog2());
            let trained = train(&vectors, length, index_bits);
            log::debug!("vectors of {length}: {vectors_in_all} trained, relative error {:.3e}", trained.squared_error);
            let [first, second] = trained.quantizer.stages();
            let numbers = [first, second].map(|codebook| probe.pool.add_codebook(Arc::clone(codebook)));
            of_length.insert(length, (numbers, trained.squared_error));
        }
        for (sample, length) in samples.iter().zip(&lengths) {
            let (numbers, error) = of_length[length];
            let part = &mut probe.parts[sample.place.0][sample.place.1];
            part.decision = Decision::Quantized(choice(sample.sample.root_mean_square, numbers));
            part.bits = bits_of(sample, *length, index_bits);
            part.squared_error = error * sample.sample.energy;
        }
        Ok(StepPlan { probe, slope: 1.0, budget: f64::INFINITY })
    }

    /// The length of every part's vectors.
    fn lengths(&self, samples: &[PartSample<'_>], budget: f64, index_bits: u32) -> Result<Vec<usize>, PackError> {
        let vector_bits = f64::from(2 * index_bits);
        let range = usize::from(*VECTOR_ELEMENTS.start())..=usize::from(*VECTOR_ELEMENTS.end());
        let (shortest, longest) = (*range.start(), *range.end());
        let mut lengths = vec![longest; samples.len()];
        let mut left = budget;
        for (sample, length) in samples.iter().zip(&mut lengths) {
            if let Fineness::Rate(bits) = sample.fineness {
                *length = ((vector_bits / bits).ceil() as usize).clamp(shortest, longest);
                left -= bits_of(sample, *length, index_bits);
            }
        }
        let following = |sample: &PartSample<'_>| matches!(sample.fineness, Fineness::Times(_));
        if !samples.iter().any(following) {
            return Ok(lengths);
        }
        let bits_at = |length: usize| {
            let bits: f64 = samples
                .iter()
                .filter(|&sample| following(sample))
                .map(|sample| bits_of(sample, length, index_bits))
                .sum();
            bits + codebook_bits(length, index_bits)
        };
        // The rate of the whole file at which so many bits more would be there.
        let rate_with = |more: f64| match self.options.target {
            Target::BitsPerParameter(asked) => asked + more / self.checkpoint.parameters() as f64,
            Target::Lossless | Target::RelativeSquaredError(_) => unreachable!("only a rate leaves parts to follow it"),
        };
        let Some(long) = range.clone().find(|&length| bits_at(length) <= left) else {
            let least = rate_with(bits_at(longest) - left);
            return Err(refused(format!("expected --bpp {least:.2} or more: there are no longer vectors")));
        };
        left -= bits_at(long);
        let elements: f64 =
            samples.iter().filter(|&sample| following(sample)).map(|sample| sample.layout.elements as f64).sum();
        if long == shortest && left > 0.1 * elements {
            let most = rate_with(-left);
            return Err(refused(format!("expected --bpp {most:.2} or less: there are no shorter vectors")));
        }
        for (_, length) in samples.iter().zip(&mut lengths).filter(|(sample, _)| following(sample)) {
            *length = long;
        }
        if long == shortest {
            return Ok(lengths);
        }
        // Those that gain most from shorter vectors first: error falls in proportion to energy.
        let mut order: Vec<usize> = (0..samples.len()).filter(|&number| following(&samples[number])).collect();
        let gain = |number: usize| {
            let Fineness::Times(times) = samples[number].fineness else { return 0.0 };
            samples[number].sample.root_mean_square * f64::from(times)
        };
        order.sort_by(|&a, &b| gain(b).total_cmp(&gain(a)).then(a.cmp(&b)));
        left -= codebook_bits(long - 1, index_bits);
        for number in order {
            let sample = &samples[number];
            let more = bits_of(sample, long - 1, index_bits) - bits_of(sample, long, index_bits);
            if more <= left {
                left -= more;
                lengths[number] = long - 1;
            }
        }
        Ok(lengths)
    }
}

/// Bits of an index: as many as there are, unless codebooks would take too much of a small checkpoint.
fn index_bits_for(budget: f64, samples: &[PartSample<'_>]) -> u32 {
    let elements: usize = samples.iter().map(|sample| sample.layout.elements).sum();
    // Parts with rates of their own have no budget: a few bits for each of their elements.
    let bits = budget.max(elements as f64);
    let is_affordable = |&index_bits: &u32| {
        let length = (f64::from(2 * index_bits) * elements as f64 / bits).clamp(2.0, 16.0);
        2.0 * codebook_bits(length as usize, index_bits) <= CODEBOOK_SHARE * bits
    };
    (LEAST_INDEX_BITS..=MOST_INDEX_BITS).rev().find(is_affordable).unwrap_or(LEAST_INDEX_BITS)
}

/// The quantizer of a part of vectors: the step is its root mean square, and runs have scales relative to that.
fn choice(root_mean_square: f64, codebooks: [u16; 2]) -> QuantizerChoice {
    let rounding = Rounding { trellis: None, lambda: 0.0, own_table: None };
    QuantizerChoice { step: root_mean_square as f32, raw_bits: 0, rounding, root_mean_square, vectors: Some(codebooks) }
}

/// Vectors of the samples' values, each run in units of its step, about `most` of them spread over all.
fn normalised_vectors(samples: &[&PartSample<'_>], elements: usize, most: usize, options: &PackOptions) -> Vec<f32> {
    let vectors_in =
        |sample: &PartSample<'_>| sample.sample.layout.runs() * (sample.sample.layout.run_elements / elements);
    let every = samples.iter().map(|&sample| vectors_in(sample)).sum::<usize>().div_ceil(most).max(1);
    let mut vectors = Vec::new();
    let mut number = 0;
    for part in samples {
        let sample = part.sample;
        let choice = choice(sample.root_mean_square, [0; 2]);
        let quantizer = PartQuantizer::new(choice, &sample.values, sample.layout, options);
        for run in 0..sample.layout.runs() {
            let step = quantizer.step_of_run(run);
            for vector in sample.values[sample.layout.run_range(run)].chunks_exact(elements) {
                if number % every == 0 {
                    vectors.extend(vector.iter().map(|value| value / step));
                }
                number += 1;
            }
        }
    }
    vectors
}
