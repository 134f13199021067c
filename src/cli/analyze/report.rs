//! The numbers of an analysis and their table.

use std::collections::BTreeMap;
use std::fmt;

use indicatif::ProgressBar;
use log::warn;
use serde::Serialize;

use crate::codec::architecture::{BlockType, CheckpointPlan, RecordPlan};
use crate::codec::blocks::Symmetry;
use crate::codec::permutation::{GroupedPermutation, PermutationCoding, encode};
use crate::pack::align::{
    Alignment, BlockVectors, Half, MAGNITUDE_BINS, Magnitudes, PairStatistics, align, compare, residual_magnitudes,
};
use crate::pack::source::Checkpoint;
use crate::tensor::{TensorInfo, total_elements};

/// What the layers of a checkpoint have in common.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// The checkpoint as it was named.
    pub checkpoint: String,
    /// Family of architectures, or `None` if unknown.
    pub family: Option<&'static str>,
    /// Elements over all tensors.
    pub parameters: u64,
    /// Elements of tensors that a permutation may move, with their biases.
    pub alignable_parameters: u64,
    /// The share of the two (Eq. 134).
    pub alignable_fraction: f64,
    /// One entry per block type with a symmetry and two layers that follow one another.
    pub block_types: Vec<TypeReport>,
}

/// One block type over all pairs of layers.
#[derive(Clone, Debug, Serialize)]
pub struct TypeReport {
    /// `ffn` or `attention`.
    pub block_type: &'static str,
    /// Groups of blocks in a layer.
    pub groups: u32,
    /// Blocks in a group.
    pub members: u32,
    /// Pairs of layers that were compared.
    pub pairs: u32,
    /// Weights of all layers that have one below; biases are not counted.
    pub weights: u64,
    /// What the weights show.
    pub weights_found: Comparison,
    /// What Gaussian numbers of the same shape and scale show.
    pub gaussian_control: Comparison,
    /// How large residuals of the weights are (Figure 5).
    pub magnitudes: ResidualMagnitudes,
}

/// Shares of residuals by magnitude, in bins of an eighth of the weights' root mean square; the last bin has all above it,
/// too.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct ResidualMagnitudes {
    /// Of the weights themselves, which is what a keyframe codes.
    pub weights: Vec<f64>,
    /// Of what the block in the same place below leaves.
    pub unaligned: Vec<f64>,
    /// Of what the block that alignment finds leaves.
    pub aligned: Vec<f64>,
    /// The same block, scaled by the best gain: alignment and prediction.
    pub predicted: Vec<f64>,
}

/// Before and after alignment.
#[derive(Clone, Debug, Serialize)]
pub struct Comparison {
    /// Cosine of a block with its reference (Eq. 105), over blocks and pairs, in canonical order.
    pub cosine_before: Spread,
    /// The same with the permutation.
    pub cosine_after: Spread,
    /// Explained variance (Eq. 106) of a scaled copy, over pairs, in canonical order.
    pub r2_before: Spread,
    /// The same with the permutation.
    pub r2_after: Spread,
    /// Normalized residual energy (Eq. 107) of a scaled copy, over pairs, in canonical order.
    pub nre_before: Spread,
    /// The same with the permutation.
    pub nre_after: Spread,
    /// Explained variance where nothing was fitted: permutation and gain are chosen on every second element of the blocks
    /// and judged on the others, so that what they find by chance counts for nothing. Negative where they do harm.
    pub r2_held_out: Spread,
    /// Gain of mean cosine (Eq. 135).
    pub cosine_gain: f64,
    /// Relative reduction of mean residual energy (Eq. 136).
    pub nre_reduction: f64,
    /// Bits of the permutations as they would be stored.
    pub permutation_bits: u64,
    /// Estimate for Gaussian weights: bits that prediction without alignment saves, `-0.5 log2 NRE` per weight.
    pub estimated_bits_saved_before: f64,
    /// The same with alignment, the permutations not yet paid for.
    pub estimated_bits_saved_after: f64,
    /// What alignment adds to prediction once the permutations are paid for (Eq. 17): an estimate.
    pub estimated_net_bits: f64,
    /// The same per weight.
    pub estimated_net_bits_per_weight: f64,
}

/// Mean and standard deviation.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Spread {
    /// Mean.
    pub mean: f64,
    /// Standard deviation, of the whole population.
    pub deviation: f64,
}

impl Report {
    /// Measures every pair of layers of every block type.
    pub fn of(checkpoint: &Checkpoint, plan: &CheckpointPlan, seed: u64, progress: &ProgressBar) -> Self {
        let parameters = checkpoint.parameters();
        let placed = plan.records.iter().flat_map(|record| &record.parts).filter(|part| part.placement.is_some());
        let alignable_parameters =
            total_elements(placed.map(|part| &checkpoint.files[part.file].header.tensors[part.tensor]));
        let pairs = pairs(checkpoint, plan);
        progress.set_length(pairs.len() as u64);
        progress.set_message("layers compared");
        let names = BlockType::NAMES.iter().copied();
        let block_types = names
            .filter_map(|name| {
                let pairs: Vec<Pair<'_>> =
                    pairs.iter().filter(|(record, _)| record.block_type.name() == name).copied().collect();
                type_report(checkpoint, name, &pairs, seed, progress)
            })
            .collect();
        Self {
            checkpoint: checkpoint.path.display().to_string(),
            family: plan.family,
            parameters,
            alignable_parameters,
            alignable_fraction: if parameters == 0 { 0.0 } else { alignable_parameters as f64 / parameters as f64 },
            block_types,
        }
    }
}

/// Two records that follow one another, the upper one first.
type Pair<'a> = (&'a RecordPlan, &'a RecordPlan);

/// The records that have a symmetry and follow another one.
pub(super) fn pairs<'a>(checkpoint: &Checkpoint, plan: &'a CheckpointPlan) -> Vec<Pair<'a>> {
    let files = checkpoint.plan_files();
    let mut pairs = Vec::new();
    let mut last: BTreeMap<BlockType, &RecordPlan> = BTreeMap::new();
    for record in plan.records.iter().filter(|record| record.symmetry.is_some()) {
        let previous = last.insert(record.block_type, record);
        if let Some(previous) = previous.filter(|previous| record.follows(previous, &files)) {
            pairs.push((record, previous));
        }
    }
    pairs
}

/// The blocks of a record; `None` with a warning where they are no floating-point numbers.
pub(super) fn vectors<'a>(checkpoint: &'a Checkpoint, record: &RecordPlan) -> Option<BlockVectors<'a>> {
    let parts = record.parts.iter().filter_map(|part| {
        let file = &checkpoint.files[part.file];
        let info: &TensorInfo = &file.header.tensors[part.tensor];
        part.placement.map(|placement| (info, placement, file.tensor_bytes(part.tensor)))
    });
    let vectors = BlockVectors::new(record.symmetry?, parts);
    if let Err(error) = &vectors {
        let (layer, block_type) = (record.layer.unwrap_or_default(), record.block_type.name());
        warn!("not compared: layer {layer}, {block_type}: {error}");
    }
    vectors.ok()
}

/// Gives back the memory of a record's tensors.
pub(super) fn release(checkpoint: &Checkpoint, record: &RecordPlan) {
    for part in &record.parts {
        checkpoint.files[part.file].release(part.tensor);
    }
}

fn type_report(
    checkpoint: &Checkpoint,
    block_type: &'static str,
    pairs: &[Pair<'_>],
    seed: u64,
    progress: &ProgressBar,
) -> Option<TypeReport> {
    let (mut found, mut control) = (Measured::default(), Measured::default());
    let mut counted = CountedMagnitudes::default();
    for (record, previous) in pairs {
        let layer = record.layer.unwrap_or_default();
        if let (Some(upper), Some(lower)) = (vectors(checkpoint, record), vectors(checkpoint, previous)) {
            let block_type = record.block_type;
            let (permutation, after) = found.add(block_type, layer, &lower, &upper);
            counted.add(&lower, &upper, &permutation, &after);
            // A layer's noise is the same as the upper of one pair and the lower of the next.
            let noise = |layer: u32| seed.wrapping_mul(1 << 32).wrapping_add(u64::from(layer));
            let lower = lower.gaussian_control(noise(layer.wrapping_sub(1)));
            control.add(block_type, layer, &lower, &upper.gaussian_control(noise(layer)));
        }
        release(checkpoint, previous);
        progress.inc(1);
    }
    let symmetry: Symmetry = pairs.first()?.0.symmetry?;
    let pairs = found.after.len() as u32;
    (pairs > 0).then(|| TypeReport {
        block_type,
        groups: symmetry.groups,
        members: symmetry.members,
        pairs,
        weights: found.after.iter().map(|pair| pair.weights).sum(),
        weights_found: found.comparison(),
        gaussian_control: control.comparison(),
        magnitudes: counted.shares(),
    })
}

/// Statistics of the pairs so far.
#[derive(Default)]
struct Measured {
    before: Vec<PairStatistics>,
    after: Vec<PairStatistics>,
    /// Explained variance of what was fitted to the other half.
    held_out: Vec<f64>,
    permutation_bits: u64,
    last: Option<GroupedPermutation>,
}

impl Measured {
    /// Adds a pair of layers; returns its alignment, and what that gives.
    fn add(
        &mut self,
        block_type: BlockType,
        layer: u32,
        lower: &BlockVectors<'_>,
        upper: &BlockVectors<'_>,
    ) -> (GroupedPermutation, PairStatistics) {
        let permutation = align(Alignment::Similarity, block_type, layer, lower, upper);
        let identity = GroupedPermutation::identity(upper.symmetry()).expect("checked when the blocks were made");
        self.before.push(compare(lower, upper, &identity));
        let after = compare(lower, upper, &permutation);
        self.after.push(after.clone());
        let halves = [Half::Fitted, Half::HeldOut].map(|half| (lower.clone().half(half), upper.clone().half(half)));
        let [(fitted_lower, fitted_upper), (held_out_lower, held_out_upper)] = &halves;
        let of_half = align(Alignment::Similarity, block_type, layer, fitted_lower, fitted_upper);
        let fitted = compare(fitted_lower, fitted_upper, &of_half);
        let held_out = compare(held_out_lower, held_out_upper, &of_half);
        self.held_out.push(held_out.explained_variance_with_gain_of(&fitted));
        self.permutation_bits += 8 * encode(&permutation, self.last.as_ref(), PermutationCoding::Shortest).len() as u64;
        self.last = Some(permutation.clone());
        (permutation, after)
    }

    fn comparison(&self) -> Comparison {
        let cosines = |pairs: &[PairStatistics]| Spread::of(pairs.iter().flat_map(|pair| pair.cosines.iter().copied()));
        let r2 = |pairs: &[PairStatistics]| Spread::of(pairs.iter().map(PairStatistics::explained_variance));
        let nre = |pairs: &[PairStatistics]| Spread::of(pairs.iter().map(PairStatistics::normalized_residual_energy));
        let saved = |pairs: &[PairStatistics]| pairs.iter().map(PairStatistics::gaussian_bits_saved).sum::<f64>();
        let (cosine_before, cosine_after) = (cosines(&self.before), cosines(&self.after));
        let (nre_before, nre_after) = (nre(&self.before), nre(&self.after));
        let (saved_before, saved_after) = (saved(&self.before), saved(&self.after));
        let net = saved_after - saved_before - self.permutation_bits as f64;
        let weights: u64 = self.after.iter().map(|pair| pair.weights).sum();
        Comparison {
            cosine_before,
            cosine_after,
            r2_before: r2(&self.before),
            r2_after: r2(&self.after),
            nre_before,
            nre_after,
            r2_held_out: Spread::of(self.held_out.iter().copied()),
            cosine_gain: cosine_after.mean - cosine_before.mean,
            nre_reduction: if nre_before.mean > 0.0 { 1.0 - nre_after.mean / nre_before.mean } else { 0.0 },
            permutation_bits: self.permutation_bits,
            estimated_bits_saved_before: saved_before,
            estimated_bits_saved_after: saved_after,
            estimated_net_bits: net,
            estimated_net_bits_per_weight: if weights == 0 { 0.0 } else { net / weights as f64 },
        }
    }
}

/// Residuals of the pairs so far.
#[derive(Default)]
struct CountedMagnitudes {
    weights: Magnitudes,
    unaligned: Magnitudes,
    aligned: Magnitudes,
    predicted: Magnitudes,
}

impl CountedMagnitudes {
    fn add(
        &mut self,
        lower: &BlockVectors<'_>,
        upper: &BlockVectors<'_>,
        permutation: &GroupedPermutation,
        after: &PairStatistics,
    ) {
        let deviation = (after.energy / after.weights.max(1) as f64).sqrt();
        if deviation == 0.0 {
            return; // no residual either
        }
        let identity = GroupedPermutation::identity(upper.symmetry()).expect("checked when the blocks were made");
        for (total, permutation, gain) in [
            (&mut self.weights, &identity, 0.0),
            (&mut self.unaligned, &identity, 1.0),
            (&mut self.aligned, permutation, 1.0),
            (&mut self.predicted, permutation, after.gain()),
        ] {
            let counts = residual_magnitudes(lower, upper, permutation, gain, deviation);
            total.iter_mut().zip(counts).for_each(|(total, count)| *total += count);
        }
    }

    fn shares(&self) -> ResidualMagnitudes {
        let shares = |counts: &[u64; MAGNITUDE_BINS]| {
            let all = counts.iter().sum::<u64>().max(1) as f64;
            counts.iter().map(|&count| count as f64 / all).collect()
        };
        ResidualMagnitudes {
            weights: shares(&self.weights),
            unaligned: shares(&self.unaligned),
            aligned: shares(&self.aligned),
            predicted: shares(&self.predicted),
        }
    }
}

impl Spread {
    fn of(values: impl Iterator<Item = f64> + Clone) -> Self {
        let count = values.clone().count().max(1) as f64;
        let mean = values.clone().sum::<f64>() / count;
        let variance = values.map(|value| (value - mean).powi(2)).sum::<f64>() / count;
        Self { mean, deviation: variance.sqrt() }
    }
}

impl fmt::Display for Spread {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.pad(&format!("{:.3}±{:.3}", self.mean, self.deviation))
    }
}

impl fmt::Display for Report {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { checkpoint, parameters, .. } = self;
        let family = self.family.unwrap_or("unknown architecture");
        let percent = 100.0 * self.alignable_fraction;
        writeln!(formatter, "{checkpoint}: {family}, {parameters} parameters, {percent:.1} % of them alignable")?;
        if self.block_types.is_empty() {
            return writeln!(formatter, "No two layers have blocks that are known to be permutable.");
        }
        writeln!(formatter)?;
        let (cosine, r2, nre) = ("cosine", "R2", "residual energy");
        writeln!(formatter, "{:20}  {cosine:^27}  {r2:^42}  {nre:^27}", "")?;
        let (before, after) = ("before", "after");
        write!(formatter, "{:20}", "")?;
        for held_out in ["", "held out", ""] {
            write!(formatter, "  {before:>13} {after:>13}")?;
            if !held_out.is_empty() {
                write!(formatter, "  {held_out:>13}")?;
            }
        }
        writeln!(formatter, "  {:>17}  {:>15}", "permutation bits", "net bits/weight")?;
        for block_type in &self.block_types {
            for (name, found) in [
                (block_type.block_type, &block_type.weights_found),
                ("  Gaussian control", &block_type.gaussian_control),
            ] {
                write!(formatter, "{name:20}  {:>13} {:>13}", found.cosine_before, found.cosine_after)?;
                write!(formatter, "  {:>13} {:>13}  {:>13}", found.r2_before, found.r2_after, found.r2_held_out)?;
                write!(formatter, "  {:>13} {:>13}", found.nre_before, found.nre_after)?;
                let (bits, net) = (found.permutation_bits, found.estimated_net_bits_per_weight);
                writeln!(formatter, "  {bits:>17}  {net:>15.4}")?;
            }
        }
        writeln!(formatter)?;
        for block_type in &self.block_types {
            let TypeReport { block_type, groups, members, pairs, weights, .. } = block_type;
            let blocks =
                if *members == 1 { format!("{groups} blocks") } else { format!("{groups} groups of {members} blocks") };
            writeln!(formatter, "{block_type}: {pairs} pairs of layers, {blocks} each, {weights} weights.")?;
        }
        writeln!(
            formatter,
            "Biases are outside the blocks. Residual energy and R2 are those of one scaled copy per pair."
        )?;
        writeln!(
            formatter,
            "Held out: permutation and gain were chosen on every second element of the blocks, and judged on the others."
        )?;
        writeln!(
            formatter,
            "Net bits are an estimate for Gaussian weights: what alignment adds to prediction, less its permutations."
        )
    }
}
