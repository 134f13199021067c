//! Mode decision for one record (Eq. 17): keyframe, prediction and aligned prediction of every part are measured, and the
//! cheapest way to code the record is taken; or where the user forces it, the cheapest prediction.

use std::collections::BTreeMap;
use std::sync::Arc;

use ndarray::Array2;

use super::super::align::{Alignment, BlockVectors, Method, align};
use super::super::mode_decision::{FittedPredictor, PartCandidate};
use super::super::motion_vectors;
use super::super::options::{AlignmentChoice, PredictorChoice};
use super::super::quantize::values_of;
use super::super::symbols::RunLayout;
use super::super::treatment::Drafted;
use super::{Below, Context, RecordEncoder, StageBits, motion_of};
use crate::codec::architecture::{PartPlan, RecordPlan};
use crate::codec::permutation::{self, GroupedPermutation, PermutationCoding};
use crate::codec::predictor::CompositePredictor;
use crate::codec::predictor::references::References;
use crate::codec::predictor::vectors::MotionVectors;
use crate::decode::prepared::Motions;
use crate::tensor::TensorInfo;

/// The chosen prediction of one part.
#[derive(Clone)]
pub(super) struct PartPrediction {
    pub(super) predictor: FittedPredictor,
    /// Reference values, motion applied; predictions where the predictor is composite.
    pub(super) reference: Arc<[f32]>,
    pub(super) moved: bool,
}

impl PartPrediction {
    /// What is left of the weights.
    pub(super) fn residual(&self, values: &[f32], layout: RunLayout) -> Vec<f32> {
        let runs = values.chunks(layout.run_elements).zip(self.reference.chunks(layout.run_elements)).enumerate();
        runs.flat_map(|(run, (values, reference))| {
            let predictor = self.predictor.of_run(run);
            values.iter().zip(reference).map(move |(&value, &reference)| value - predictor.predict(reference))
        })
        .collect()
    }
}

/// A prediction and the bits that the part then takes.
#[derive(Clone)]
struct Tried {
    prediction: PartPrediction,
    bits: f64,
}

fn cheapest(tried: impl IntoIterator<Item = Tried>) -> Option<Tried> {
    tried.into_iter().min_by(|a, b| a.bits.total_cmp(&b.bits))
}

/// What is decided of a record.
pub(super) struct Decided {
    pub(super) permutation: Option<GroupedPermutation>,
    /// Of every part, where it is predicted.
    pub(super) predictions: Vec<Option<PartPrediction>>,
    pub(super) stages: StageBits,
}

/// One part on its way to a decision.
struct Part<'a> {
    plan: &'a PartPlan,
    tensor: &'a TensorInfo,
    ordinal: usize,
    candidate: PartCandidate<'a>,
    /// Decoded reference values, in their own places.
    decoded: Vec<f32>,
}

impl RecordEncoder<'_> {
    pub(super) fn decide(
        &self,
        plan: &RecordPlan,
        source: &[(&TensorInfo, &[u8])],
        drafts: &[Drafted<'_>],
        Below { context, activations, found }: Below<'_>,
    ) -> Decided {
        let method = self.options.alignment_method();
        let may_align = self.options.predictor() != PredictorChoice::None && method.alignment != Alignment::None;
        let permutation = found.permutation.get_or_insert_with(|| {
            let aligned =
                if may_align { self.align_record(plan, source, drafts, activations, context, method) } else { None };
            aligned.filter(|permutation| !permutation.is_identity())
        });
        let permutation = permutation.clone();
        let coded_bits = |coding| {
            let of = |permutation| permutation::encode(permutation, context.permutation.as_ref(), coding).len();
            permutation.as_ref().map(|permutation| 8.0 * of(permutation) as f64)
        };
        let mut stages = StageBits {
            permutation: coded_bits(self.options.permutation_coding()),
            permutation_raw: coded_bits(PermutationCoding::Raw),
            ..StageBits::default()
        };
        let (mut same_place_bits, mut unaligned_bits, mut aligned_bits) = (0.0, 0.0, 0.0);
        let (mut unaligned, mut aligned) = (Vec::new(), Vec::new());
        for (ordinal, draft) in drafts.iter().enumerate() {
            let (mut in_place, mut with_motion) = (None, None);
            if let (Drafted::Quantized { values, layout, quantizer, base: None }, Some(bytes)) =
                (draft, &context.decoded[ordinal])
            {
                let tensor = source[ordinal].0;
                let step_of_run = |run: usize| quantizer.step_of_run(run);
                let part = Part {
                    plan: &plan.parts[ordinal],
                    tensor,
                    ordinal,
                    candidate: PartCandidate {
                        values,
                        layout: *layout,
                        step_of_run: &step_of_run,
                        raw_bits: quantizer.choice.raw_bits,
                        rounding: quantizer.choice.rounding,
                        measured_elements: self.options.effort.measured_elements(),
                        vector_bits: quantizer.choice.vectors.map(|[first, second]| self.vector_bits(first, second)),
                    },
                    decoded: values_of(&tensor.dtype, bytes),
                };
                let keyframe = part.candidate.keyframe_bits(self.pool);
                let pays = |tried: &Tried| self.options.force_prediction || tried.bits < keyframe;
                let same_place = self.same_place(plan, &part, context).filter(pays);
                let vectors = self.motion_vectors(&part, bytes, &mut found.vectors).filter(pays);
                in_place = cheapest(same_place.iter().cloned().chain(vectors));
                let moved = permutation.as_ref().and_then(|permutation| self.moved(plan, &part, context, permutation));
                with_motion = match moved.filter(pays) {
                    Some(moved) if self.options.force_prediction => Some(moved),
                    moved => cheapest(in_place.iter().cloned().chain(moved)),
                };
                let bits = |tried: &Option<Tried>| tried.as_ref().map_or(keyframe, |tried| tried.bits);
                stages.keyframe += keyframe;
                same_place_bits += bits(&same_place);
                unaligned_bits += bits(&in_place);
                aligned_bits += bits(&with_motion);
            }
            unaligned.push(in_place.map(|tried| tried.prediction));
            aligned.push(with_motion.map(|tried| tried.prediction));
        }
        stages.same_place = same_place_bits;
        stages.unaligned = Some(unaligned_bits);
        stages.aligned = stages.permutation.map(|_| aligned_bits);
        // Alignment is kept only where what it saves exceeds what its permutation costs.
        let uses_motion = aligned.iter().flatten().any(|prediction| prediction.moved);
        match stages.permutation {
            Some(cost) if uses_motion && (self.options.force_prediction || aligned_bits + cost < unaligned_bits) => {
                stages.chosen = aligned_bits + cost;
                stages.is_aligned = true;
                Decided { permutation, predictions: aligned, stages }
            }
            _ => {
                stages.chosen = unaligned_bits;
                Decided { permutation: None, predictions: unaligned, stages }
            }
        }
    }

    /// The cheapest prediction from what is in the same place one layer below.
    fn same_place(&self, plan: &RecordPlan, part: &Part<'_>, context: &Context) -> Option<Tried> {
        let elementwise = self.elementwise(part, &part.decoded, false);
        let network = self.network_prediction(plan, part, context, None);
        cheapest(elementwise.into_iter().chain(network))
    }

    /// The cheapest prediction with one, where it moves the part.
    fn moved(
        &self,
        plan: &RecordPlan,
        part: &Part<'_>,
        context: &Context,
        permutation: &GroupedPermutation,
    ) -> Option<Tried> {
        let motion = motion_of(part.plan, part.tensor, permutation)?;
        let decoded = &part.decoded;
        let reference: Vec<f32> = (0..decoded.len()).map(|element| decoded[motion.reference_of(element)]).collect();
        let elementwise = self.elementwise(part, &reference, true);
        let network = self.network_prediction(plan, part, context, Some(permutation));
        cheapest(elementwise.into_iter().chain(network))
    }

    fn elementwise(&self, part: &Part<'_>, reference: &[f32], moved: bool) -> Option<Tried> {
        let (choice, force) = (self.options.predictor(), self.options.force_prediction);
        let best = part.candidate.best_prediction(reference, choice, force, self.pool)?;
        let prediction = PartPrediction { predictor: best.predictor, reference: reference.into(), moved };
        Some(Tried { prediction, bits: best.bits })
    }

    /// Predictions made of several reference values, with the decoder's arithmetic.
    fn composite(&self, part: &Part<'_>, predictor: FittedPredictor, predicted: Vec<f32>, moved: bool) -> Tried {
        let bits = part.candidate.predicted_bits(&predicted, &predictor, self.pool);
        Tried { prediction: PartPrediction { predictor, reference: predicted.into(), moved }, bits }
    }

    /// Predictions by motion vectors, where any pay; those `found` before, if the part was looked at.
    fn motion_vectors(
        &self,
        part: &Part<'_>,
        bytes: &[u8],
        found: &mut BTreeMap<usize, Option<FittedPredictor>>,
    ) -> Option<Tried> {
        if !matches!(self.options.predictor(), PredictorChoice::Auto | PredictorChoice::MotionVectors) {
            return None;
        }
        let &[rows, columns] = part.tensor.shape.as_slice() else { return None };
        let shape = [rows as usize, columns as usize];
        let axis = part.plan.placement.map_or(0, |placement| placement.axis);
        if motion_vectors::work(shape, axis) > self.options.effort.vector_work() {
            return None;
        }
        let PartCandidate { values, step_of_run, .. } = part.candidate;
        let fit = || motion_vectors::fit(values, &part.decoded, (shape, axis), step_of_run(0));
        let fitted = found.entry(part.ordinal).or_insert_with(fit).clone()?;
        let FittedPredictor::Vectors { gain_step, counts, sources, gains, .. } = &fitted else { return None };
        let vectors = MotionVectors::new(
            &part.tensor.shape,
            axis.into(),
            counts.iter().map(|&count| count as u32),
            sources.iter().map(|&source| source as u32).collect(),
            gains.iter().map(|&gain| gain_step * gain as f32).collect(),
        );
        let predictor = CompositePredictor::Vectors(vectors.expect("fitted to this tensor"));
        let mut predicted = vec![0.0; values.len()];
        predictor.predict(&References::new(&part.tensor.dtype, bytes, values.len()), 0..values.len(), &mut predicted);
        Some(self.composite(part, fitted, predicted, false))
    }

    fn network_prediction(
        &self,
        plan: &RecordPlan,
        part: &Part<'_>,
        context: &Context,
        permutation: Option<&GroupedPermutation>,
    ) -> Option<Tried> {
        let network = self.network?;
        let bytes = context.references(part.ordinal, network.contexts())?;
        let motions = match permutation {
            Some(permutation) => context.motions_of(part.plan, part.tensor, permutation),
            None => Motions::default(),
        };
        let PartCandidate { values, layout, .. } = part.candidate;
        let (fitted, predicted) =
            network.predict((plan, part.ordinal), part.tensor, layout, &bytes, motions, values)?;
        Some(self.composite(part, fitted, predicted, permutation.is_some()))
    }

    /// Finds the permutation of a record's blocks onto those of the decoded record below it (Appendix A). `None` where the
    /// architecture allows none or there is nothing to compare.
    fn align_record<'a>(
        &self,
        plan: &RecordPlan,
        source: &'a [(&TensorInfo, &[u8])],
        drafts: &[Drafted<'_>],
        activations: Option<&'a Array2<f32>>,
        context: &'a Context,
        method: Method,
    ) -> Option<GroupedPermutation> {
        let symmetry = plan.symmetry?;
        let layer = plan.layer?;
        let compared = || {
            let parts = plan.parts.iter().zip(source).zip(drafts.iter().zip(&context.decoded));
            parts.filter_map(|((part, &(tensor, bytes)), (draft, decoded))| match draft {
                Drafted::Quantized { base: None, .. } => Some((tensor, part.placement?, bytes, decoded.as_deref()?)),
                _ => None,
            })
        };
        let current =
            BlockVectors::new(symmetry, compared().map(|(tensor, placement, bytes, _)| (tensor, placement, bytes)));
        let below =
            BlockVectors::new(symmetry, compared().map(|(tensor, placement, _, decoded)| (tensor, placement, decoded)));
        match (below, current) {
            (Ok(below), Ok(current)) => {
                let compared = |vectors: BlockVectors<'a>, of: Option<&'a Array2<f32>>| match (
                    self.options.alignment.weight_of_weights(),
                    of,
                ) {
                    (Some(weight), Some(activations)) => vectors.with_activations(weight, activations),
                    _ if self.options.alignment == AlignmentChoice::ResidualEnergy => vectors.by_energy(),
                    _ => vectors,
                };
                // Both sides or neither: layers without known activations are compared by weights.
                let known = activations.zip(context.activations.as_ref());
                let below = compared(below, known.map(|(_, below)| below));
                let current = compared(current, known.map(|(current, _)| current));
                Some(align(method, plan.block_type, layer, &below, &current))
            }
            (Err(error), _) | (_, Err(error)) => {
                log::debug!("not aligned: layer {layer}, {}: {error}", plan.block_type.name());
                None
            }
        }
    }
}
