//! What packing did, for people and machines.

use serde::Serialize;

use super::evaluation::EvaluationReport;
use super::record::StageBits;

/// One tensor of the plan (`--dry-run`) and of the report.
#[derive(Clone, Debug, Serialize)]
pub struct TensorReport {
    /// Safetensors file.
    pub file: String,
    /// Tensor.
    pub name: String,
    /// Element type.
    pub dtype: String,
    /// Dimensions.
    pub shape: Vec<u64>,
    /// Layer, if it belongs to one.
    pub layer: Option<u32>,
    /// Block type of its record.
    pub block_type: &'static str,
    /// `raw`, `split` (bit-exact) or `quantized`.
    pub treatment: &'static str,
    /// What a `--keep` rule says of it: `lossless`, or bits per element.
    pub keep: Option<String>,
    /// Bits per element: estimated in a plan, of the body as written in a report.
    pub bits_per_element: f64,
    /// Squared error over squared weights of the decoded tensor; 0 where it is bit-exact, absent in a plan.
    pub relative_squared_error: Option<f64>,
    /// Sum of squares of its weights, where it is quantized; absent in a plan.
    pub energy: Option<f64>,
}

/// The result of packing.
#[derive(Clone, Debug, Serialize)]
pub struct PackReport {
    /// The archive.
    pub archive: String,
    /// Model family whose block rules were used.
    pub architecture: String,
    /// Bytes of the safetensors files.
    pub source_bytes: u64,
    /// Bytes of the archive, everything included.
    pub archive_bytes: u64,
    /// Elements over all tensors.
    pub parameters: u64,
    /// Archive bytes times eight over parameters.
    pub bits_per_parameter: f64,
    /// Whether every decoded byte is the original's.
    pub lossless: bool,
    /// Squared error over squared weights, over all quantized tensors; 0 if there are none.
    pub relative_squared_error: f64,
    /// What the model was run on, where it was calibrated.
    pub calibration: Option<String>,
    /// What training did, where it was tried.
    pub training: Option<TrainingReport>,
    /// What the decoded model says beside the original, where there was data to judge it by.
    pub evaluation: Option<EvaluationReport>,
    /// The same over the squares of what changed from the base, over the tensors that are quantized as changes; absent where
    /// none is.
    pub relative_squared_error_of_changes: Option<f64>,
    /// Why the target was not met, where it was not.
    pub target_missed: Option<String>,
    /// Records coded without prediction.
    pub keyframe_records: u64,
    /// Records with a predicted part.
    pub predicted_records: u64,
    /// Bits per symbol of predicted parts, as written (the paper's residual entropy proxy); absent where none is.
    pub residual_entropy: Option<f64>,
    /// Bits of permutations, in percent of the archive.
    pub permutation_percent: f64,
    /// What mode decision measured, summed over the records where it had a choice.
    pub stages: StageTotals,
    /// What every stage saved, where it was asked for.
    pub stats: Option<Vec<StageStatistic>>,
    /// Every tensor.
    pub tensors: Vec<TensorReport>,
}

/// Training, and what it was worth on inputs that it had not seen.
#[derive(Clone, Debug, Serialize)]
pub struct TrainingReport {
    /// Steps of the optimizer; 0 where only the distance was measured.
    pub steps: usize,
    /// Seed of the order of inputs.
    pub seed: u64,
    /// How far the decoded model is from the checkpoint on held-out calibration inputs: the divergence of what it says in nats,
    /// or the relative squared error of hidden states.
    pub held_out_distance: Option<f64>,
    /// The same without training, where that was tried too.
    pub held_out_distance_without: Option<f64>,
    /// Whether the archive is the trained one.
    pub is_kept: bool,
}

/// What one stage is worth: the archive would take so many bits more, at the same squared error, were it alone switched off.
#[derive(Clone, Debug, Serialize)]
pub struct StageStatistic {
    /// The stage.
    pub stage: &'static str,
    /// What takes its place.
    pub instead: &'static str,
    /// Bits saved; negative where the stage would have cost bits and was left out for that.
    pub bits_saved: f64,
    /// The same over all parameters of the checkpoint.
    pub bits_per_parameter: f64,
    /// Whether the archive uses the stage.
    pub is_used: bool,
}

/// Sums over records that could have been predicted, in bits.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub struct StageTotals {
    /// Had all their parts been keyframes.
    pub keyframe: f64,
    /// With prediction from what is in the same place.
    pub same_place: f64,
    /// With that or motion vectors, without alignment.
    pub unaligned: f64,
    /// With prediction and alignment, permutations not counted; unaligned where no permutation was found.
    pub aligned: f64,
    /// The permutations.
    pub permutation: f64,
    /// What was chosen, record by record, permutations included.
    pub chosen: f64,
    /// Permutations that were chosen, as coded.
    pub chosen_permutation: f64,
    /// The same as entries of fixed width.
    pub chosen_permutation_raw: f64,
}

impl StageTotals {
    /// Adds one record.
    pub fn add(&mut self, stages: &StageBits) {
        if let Some(unaligned) = stages.unaligned {
            self.keyframe += stages.keyframe;
            self.same_place += stages.same_place;
            self.unaligned += unaligned;
            self.aligned += stages.aligned.unwrap_or(unaligned);
            self.permutation += stages.permutation.unwrap_or(0.0);
            self.chosen += stages.chosen;
            if stages.is_aligned {
                self.chosen_permutation += stages.permutation.unwrap_or(0.0);
                self.chosen_permutation_raw += stages.permutation_raw.unwrap_or(0.0);
            }
        }
    }
}
