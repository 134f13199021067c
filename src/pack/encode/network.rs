//! The network that parts are predicted with, where one is asked for: fitted to the checkpoint's own weights before anything
//! is encoded, and used only where it is worth its parameters or forced.

use super::super::align::{Alignment, BlockVectors, align};
use super::super::network::training::Samples;
use super::super::network::{FittedNetwork, Kinds, NetworkShape, samples_of_part};
use super::super::quantize::values_of;
use super::super::record::motion_of;
use super::super::symbols::RunLayout;
use super::super::treatment::Treatment;
use super::Encoder;
use crate::codec::architecture::RecordPlan;
use crate::codec::motion::Motion;
use crate::codec::permutation::GroupedPermutation;
use crate::format::bytes::Writer;
use crate::tensor::TensorInfo;

/// Units that a network is fitted to.
const UNITS: usize = 24_576;

/// A record with the one or two below it in its segment, the nearest first.
struct Chain<'p> {
    record: &'p RecordPlan,
    below: Vec<&'p RecordPlan>,
}

impl Encoder<'_> {
    /// The network, fitted when first asked for.
    pub(super) fn network(&self) -> Option<&FittedNetwork> {
        self.network.get_or_init(|| self.fit_network(self.options.predictor().network()?)).as_ref()
    }

    fn fit_network(&self, shape: NetworkShape) -> Option<FittedNetwork> {
        let chains = self.chains();
        let parts: usize = chains.iter().map(|chain| chain.record.parts.len()).sum();
        let (mut samples, mut kinds, mut elements) = (Vec::new(), Kinds::new(), 0);
        for chain in &chains {
            elements += self.add_samples(chain, shape, UNITS.div_ceil(parts.max(1)), &mut kinds, &mut samples);
        }
        if samples.is_empty() {
            return None;
        }
        let layers = self.plan.records.iter().filter_map(|record| record.layer).max().map_or(0, |layer| layer + 1);
        let steps = self.options.effort.training_steps();
        let fitted = FittedNetwork::fit(shape, &samples, layers as usize, kinds, steps);
        let mut writer = Writer::new();
        fitted.network().stored().write(&mut writer);
        let bits = 8.0 * writer.into_bytes().len() as f64;
        let saved = -0.5 * (1.0 - fitted.held_out).log2() * elements as f64;
        log::info!(
            "network fitted: explains {:.4} of the variance of units held out, saves {saved:.0} bits, takes {bits:.0}",
            fitted.held_out
        );
        (saved > bits || self.options.force_prediction).then_some(fitted)
    }

    /// Every record that may be predicted.
    fn chains(&self) -> Vec<Chain<'_>> {
        let files = self.checkpoint.plan_files();
        let mut chains: Vec<Chain<'_>> = Vec::new();
        for record in &self.plan.records {
            if self.is_keyframe(record) {
                continue;
            }
            let Some(nearest) = self.plan.records.iter().find(|below| record.follows(below, &files)) else { continue };
            let second = chains.iter().find(|chain| std::ptr::eq(chain.record, nearest)).map(|chain| chain.below[0]);
            chains.push(Chain { record, below: [nearest].into_iter().chain(second).collect() });
        }
        chains
    }

    /// Adds units of every part of a record that is quantized on its own; how many elements these have.
    fn add_samples(
        &self,
        chain: &Chain<'_>,
        shape: NetworkShape,
        count: usize,
        kinds: &mut Kinds,
        samples: &mut Vec<Samples>,
    ) -> u64 {
        let permutation = self.align_originals(chain.record, chain.below[0]);
        let below = chain.below.get(1).and_then(|second| self.align_originals(chain.below[0], second));
        let mut elements = 0;
        for (ordinal, part) in chain.record.parts.iter().enumerate() {
            let (tensor, bytes) = self.tensor(part.file, part.tensor);
            if !self.is_quantized_alone(part.file, part.tensor) {
                continue;
            }
            let nearest = permutation.as_ref().and_then(|permutation| motion_of(part, tensor, permutation));
            let second = match (&nearest, below.as_ref().and_then(|below| motion_of(part, tensor, below))) {
                (Some(nearest), Some(below)) => Some(nearest.then(&below)),
                _ => nearest.clone(),
            };
            let references: Vec<Vec<f32>> = (chain.below.iter().zip([nearest, second]))
                .take(shape.contexts)
                .map(|(record, motion)| self.moved_values(record, ordinal, motion.as_ref()))
                .collect();
            let values = values_of(&tensor.dtype, bytes);
            let layout = RunLayout::of_shape(&tensor.shape, self.options.steps.group());
            let number = kinds.len();
            let kind = *kinds.entry((chain.record.block_type.number(), ordinal)).or_insert(number);
            let layer = chain.record.layer.map(|layer| layer as usize);
            let seed = samples.len() as u64;
            let of_part = (values.as_slice(), references.as_slice());
            samples.extend(samples_of_part(kind, layer, of_part, (layout, shape.contexts), (count, seed)));
            elements += tensor.elements();
        }
        elements
    }

    /// A part's original values where another part finds them.
    fn moved_values(&self, record: &RecordPlan, part: usize, motion: Option<&Motion>) -> Vec<f32> {
        let (tensor, bytes) = self.tensor(record.parts[part].file, record.parts[part].tensor);
        let values = values_of(&tensor.dtype, bytes);
        match motion {
            Some(motion) => (0..values.len()).map(|element| values[motion.reference_of(element)]).collect(),
            None => values,
        }
    }

    fn is_quantized_alone(&self, file: usize, tensor: usize) -> bool {
        let planned = self.plan.records.iter().zip(&self.treatments);
        let mut parts = planned.flat_map(|(record, treatments)| record.parts.iter().zip(treatments));
        let treatment =
            parts.find(|(part, _)| (part.file, part.tensor) == (file, tensor)).map(|(_, treatment)| treatment);
        matches!(treatment, Some(Treatment::Quantized(_))) && !self.based.contains_key(&(file, tensor))
    }

    /// The permutation of a record onto the one below, both as they were: what is decoded is not known yet.
    fn align_originals(&self, record: &RecordPlan, below: &RecordPlan) -> Option<GroupedPermutation> {
        let (symmetry, method) = (record.symmetry?, self.options.alignment_method());
        if method.alignment == Alignment::None {
            return None;
        }
        let vectors = |record: &RecordPlan| {
            let parts: Vec<(&TensorInfo, _, &[u8])> = (record.parts.iter())
                .filter(|part| self.is_quantized_alone(part.file, part.tensor))
                .filter_map(|part| {
                    let (tensor, bytes) = self.tensor(part.file, part.tensor);
                    Some((tensor, part.placement?, bytes))
                })
                .collect();
            BlockVectors::new(symmetry, parts).ok()
        };
        Some(align(method, record.block_type, record.layer?, &vectors(below)?, &vectors(record)?))
    }
}
