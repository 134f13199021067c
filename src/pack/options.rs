//! What a user can choose when packing.
//!
//! The rows of the paper's Tables 14 and 15 that are about alignment, prediction and permutations, as options of `mcwc-pack`.
//! The paper's codec predicts whether it pays or not: `--force-prediction` does so too, and belongs to every row.
//!
//! | row | options beside `--force-prediction` |
//! |---|---|
//! | full (weights and activations, alpha 0.7; MLP of width 256 with embeddings) | `--alignment hybrid --calibration FILE --predictor network` |
//! | residual-energy alignment | `--alignment residual-energy` |
//! | permutations delta-coded across depth; fixed-length coded | `--permutations delta`; `--permutations raw` |
//! | no permutation transmission | not offered: a decoder would have to find the permutations from floating-point sums, which differ between machines. It would save the *permutation share* of the report |
//! | no alignment, random alignment | `--alignment none`, `--alignment random` |
//! | weight-only, activation-only similarity | `--alignment weights`, `--alignment activations --calibration FILE` |
//! | FFN-only, head-only alignment; coarse blocks | `--alignment ffn`, `--alignment heads`; `--alignment coarse` |
//! | Hungarian matching whatever the number of blocks | `--assignment exact` |
//! | screened greedy, 16 candidates and refinement | `--assignment screened` |
//! | screened greedy, 8 candidates, no refinement | `--assignment screened-unrefined` |
//! | random tie-breaking | `--alignment-seed N`, for several N |
//! | no predictor | `--predictor none` (the only row without `--force-prediction`) |
//! | linear predictor | `--predictor network-linear`; elementwise: `--predictor row-affine` |
//! | MLP of width 256 with embeddings; of width 128 | `--predictor network`; `--predictor network-narrow` |
//! | MLP without embeddings | `--predictor network-bare` |
//! | no keyframe embeddings, only that of the type | `--predictor network-type-only` |
//! | two-step context | `--predictor network-two-step` |
//! | keyframes K | `--keyframe-interval K` |
//! | step sizes, quantizer, entropy model | `--steps`, `--quantization`, `--entropy-model` |

mod prediction;
mod quantization;

use std::path::PathBuf;

pub use self::prediction::{AlignmentChoice, Assignment, Permutations, PredictorChoice};
pub use self::quantization::{BitAllocation, ColumnScales, EntropyModel, Quantization, Steps, TrellisStates};
use super::align::Method;
use super::entropy_model::OwnTable;
use super::keep::KeepRule;
use super::quantized_symbols::Rounding;
use super::train::{Schedule, Training};
use crate::codec::permutation::PermutationCoding;
use crate::format::part::{StoredTrellis, TrellisTables};

/// What the options of a run are called where an archive says how it was packed.
pub const OPTIONS: &str = "options";

/// How close the decoded weights must be to the original.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub enum Target {
    /// Every byte the same.
    #[default]
    Lossless,
    /// At most this many bits per parameter, counting the whole file.
    BitsPerParameter(f64),
    /// At most this relative squared error, over all quantized tensors together.
    RelativeSquaredError(f64),
}

impl Target {
    /// Whether tensors may lose anything.
    pub fn is_lossy(self) -> bool {
        self != Self::Lossless
    }
}

/// How much time packing may take for a smaller or more accurate archive.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum Effort {
    /// Every record is a keyframe: nothing is aligned or predicted. Tables and step are found on 1 M weights.
    Fast,
    /// Alignment and prediction are tried on every eligible record and measured on samples of 128 K weights a tensor; tables
    /// and step are found on 2 M weights. The target is met within 0.5 % in one encoding.
    #[default]
    Default,
    /// Measured on whole tensors; tables and step are found on 16 M weights. Encoded again until the target is met within
    /// 0.1 %.
    Max,
}

impl Effort {
    /// Weights of the whole checkpoint that tables and step are found on.
    pub fn surveyed_elements(self) -> u64 {
        match self {
            Self::Fast => 1 << 20,
            Self::Default => 1 << 21,
            Self::Max => 1 << 24,
        }
    }

    /// Steps tried on them at least: tables that symbols are placed with are fitted to the symbols placed before, and get
    /// better by that.
    pub fn least_probes(self) -> usize {
        match self {
            Self::Fast => 2,
            Self::Default => 3,
            Self::Max => 5,
        }
    }

    /// Weights of a part that mode decision measures.
    pub fn measured_elements(self) -> usize {
        match self {
            Self::Fast | Self::Default => 1 << 17,
            Self::Max => usize::MAX,
        }
    }

    /// How far off a met target may be, relative.
    pub fn tolerance(self) -> f64 {
        match self {
            Self::Fast | Self::Default => 0.005,
            Self::Max => 0.001,
        }
    }

    /// States of the trellis.
    pub fn trellis_states(self) -> TrellisStates {
        match self {
            Self::Fast => TrellisStates(8),
            Self::Default | Self::Max => TrellisStates(256),
        }
    }

    /// Multiplications that fitting motion vectors to one part may take.
    pub fn vector_work(self) -> u64 {
        match self {
            Self::Fast => 0,
            Self::Default => 1 << 36,
            Self::Max => u64::MAX,
        }
    }

    /// Steps of a network's training.
    pub fn training_steps(self) -> usize {
        match self {
            Self::Fast => 30,
            Self::Default => 400,
            Self::Max => 4000,
        }
    }

    /// Whether records may be predicted.
    pub fn predicts(self) -> bool {
        self != Self::Fast
    }
}

/// Options of one packing run.
#[derive(Clone, Debug)]
pub struct PackOptions {
    /// What is asked of the decoded weights.
    pub target: Target,
    /// How much time it may take.
    pub effort: Effort,
    /// What is asked of single tensors; the last rule that matches counts.
    pub keep: Vec<KeepRule>,
    /// Keyframe interval (K).
    pub keyframe_interval: u32,
    /// How blocks are matched.
    pub alignment: AlignmentChoice,
    /// How the assignment of blocks is solved.
    pub assignment: Assignment,
    /// Seed of random permutations, and of which of equally similar blocks go together; the blocks' order where not given.
    pub alignment_seed: Option<u64>,
    /// How permutations are written.
    pub permutations: Permutations,
    /// Which predictors may be chosen.
    pub predictor: PredictorChoice,
    /// Whether every record that may be is aligned and predicted, though it costs bits: the paper's codec.
    pub force_prediction: bool,
    /// Where steps are set.
    pub steps: Steps,
    /// What bits are spent for, with calibration.
    pub bit_allocation: BitAllocation,
    /// Which columns have steps of their own.
    pub column_scales: ColumnScales,
    /// How values become codes.
    pub quantization: Quantization,
    /// What codes are coded with.
    pub entropy_model: EntropyModel,
    /// States of the trellis; as many as the effort allows where not given.
    pub trellis_states: Option<TrellisStates>,
    /// Whether rounding weighs the bits that a code takes.
    pub rate_aware_rounding: bool,
    /// Embeddings and output heads get a step this many times finer. Finer helps GPT-NeoX and costs BERT and Llama, see
    /// `benches/task_metric.py`.
    pub embedding_refinement: f32,
    /// Whether the weights that are still ahead are trained to make up for what was lost, with calibration.
    pub training: Training,
    /// Steps of training; as many as the effort allows where not given.
    pub train_steps: Option<usize>,
    /// Of everything that is drawn by chance.
    pub seed: u64,
    /// A directory that keeps the state of training, so that a run that was stopped goes on.
    pub training_state: Option<PathBuf>,
    /// Whether to lose anything of checkpoints that were quantized before.
    pub force_requantize: bool,
    /// Whether to measure what every stage is worth; the archive is the same.
    pub stats: bool,
}

impl Default for PackOptions {
    fn default() -> Self {
        Self {
            target: Target::Lossless,
            effort: Effort::default(),
            keep: Vec::new(),
            keyframe_interval: 4,
            alignment: AlignmentChoice::default(),
            assignment: Assignment::default(),
            alignment_seed: None,
            permutations: Permutations::default(),
            predictor: PredictorChoice::default(),
            force_prediction: false,
            steps: Steps::default(),
            bit_allocation: BitAllocation::default(),
            column_scales: ColumnScales::default(),
            quantization: Quantization::default(),
            entropy_model: EntropyModel::default(),
            trellis_states: None,
            rate_aware_rounding: true,
            embedding_refinement: 1.2,
            training: Training::default(),
            train_steps: None,
            seed: 0,
            training_state: None,
            force_requantize: false,
            stats: false,
        }
    }
}

/// A choice by its name on the command line.
fn name_of(choice: &impl clap::ValueEnum) -> String {
    choice.to_possible_value().expect("every choice can be given").get_name().to_owned()
}

/// What a bit is worth in squared steps where rounding is rate-aware, for the scalar and the trellis quantizer. The slope of
/// distortion over rate, 2 ln 2 times the mean squared error, would be 0.12 and about 0.35; measured best on Gaussian
/// values from 2 to 4.4 bits.
const LAMBDA: [f32; 2] = [0.1, 0.4];

/// Bits per parameter up to which training is tried unasked: above, too little is lost for it to win anything back.
const MOST_TRAINED_BITS: f64 = 2.8;

impl PackOptions {
    /// The predictors that may be chosen at this effort.
    pub fn predictor(&self) -> PredictorChoice {
        if self.effort.predicts() || self.force_prediction { self.predictor } else { PredictorChoice::None }
    }

    /// How permutations are found.
    pub fn alignment_method(&self) -> Method {
        Method {
            alignment: self.alignment.alignment(self.alignment_seed),
            solver: self.assignment.solver(),
            tie_seed: self.alignment_seed,
        }
    }

    /// How permutations are written.
    pub fn permutation_coding(&self) -> PermutationCoding {
        match self.permutations {
            Permutations::Auto => PermutationCoding::Shortest,
            Permutations::Raw => PermutationCoding::Raw,
            Permutations::Lehmer => PermutationCoding::Uniform,
            Permutations::Delta => PermutationCoding::Delta,
        }
    }

    /// States of the trellis.
    pub fn trellis_states(&self) -> TrellisStates {
        self.trellis_states.unwrap_or_else(|| self.effort.trellis_states())
    }

    /// States of the trellis where errors of columns move others: each path has shifts of its own to carry, and the gain of
    /// more states is the same 0.02 bit for much more time.
    pub fn closed_loop_states(&self) -> TrellisStates {
        let most = if self.effort == Effort::Max { 256 } else { 16 };
        self.trellis_states.unwrap_or_else(|| TrellisStates(self.effort.trellis_states().0.min(most)))
    }

    /// How to train a model of so many parameters while it is packed; `None` where it is not to be.
    pub fn schedule(&self, parameters: u64, takes_images: bool) -> Option<Schedule> {
        let is_low = matches!(self.target, Target::BitsPerParameter(bits) if bits <= MOST_TRAINED_BITS);
        let steps = self.train_steps.unwrap_or(match (self.training, self.effort) {
            (Training::Auto, Effort::Fast) => 0,
            (_, Effort::Fast | Effort::Default) => Schedule::default_steps(parameters),
            (_, Effort::Max) => Schedule::paper_steps(takes_images),
        });
        let is_wanted = match self.training {
            Training::Off => false,
            Training::Auto => is_low,
            Training::On => matches!(self.target, Target::BitsPerParameter(_)),
        };
        (is_wanted && steps > 0).then_some(Schedule { steps, seed: self.seed })
    }

    /// The table of a part, where parts have one to themselves.
    pub fn own_table(&self, part: u32) -> Option<OwnTable> {
        // An archive has at most 4,096 tables, and pairs take two: beyond that parts share.
        let part = part % 2048;
        match self.entropy_model {
            EntropyModel::Contextual => None,
            EntropyModel::Iid => Some(OwnTable { part, fixed_length: false }),
            EntropyModel::FixedLength => Some(OwnTable { part, fixed_length: true }),
        }
    }

    /// How values become codes at the lowest rates.
    pub fn rounding(&self) -> Rounding {
        let tables = match self.quantization {
            Quantization::Trellis => Some(TrellisTables::Pairs),
            Quantization::TrellisShared => Some(TrellisTables::Shared),
            Quantization::Scalar | Quantization::ResidualVector => None,
        };
        let trellis = tables.map(|tables| StoredTrellis { tables, state_bits: self.trellis_states().state_bits() });
        let lambda = match self.rate_aware_rounding {
            true => LAMBDA[usize::from(trellis.is_some())],
            false => 0.0,
        };
        Rounding { trellis, lambda, own_table: None }
    }

    /// Tool and options as the archive keeps them. The same input and options give the same archive, so nothing of the
    /// machine or the hour is in it.
    pub fn provenance(&self) -> Vec<(String, String)> {
        vec![
            ("tool".to_owned(), concat!("mcwc-pack ", env!("CARGO_PKG_VERSION")).to_owned()),
            (OPTIONS.to_owned(), self.arguments()),
        ]
    }

    /// The options as they would be given on the command line. What the effort chooses is left to it.
    fn arguments(&self) -> String {
        let mut arguments = match self.target {
            Target::Lossless => "--lossless".to_owned(),
            Target::BitsPerParameter(bits) => format!("--bpp {bits}"),
            Target::RelativeSquaredError(error) => format!("--max-rel-mse {error}"),
        };
        let mut add = |text: String| arguments.push_str(&text);
        add(format!(" --effort {}", name_of(&self.effort)));
        for rule in &self.keep {
            add(format!(" --keep '{rule}'"));
        }
        if self.force_requantize {
            add(" --force-requantize".to_owned());
        }
        // The rest says how weights are quantized: nothing of it matters where none are.
        if self.target.is_lossy() || self.keep.iter().any(KeepRule::is_lossy) {
            add(format!(
                " --keyframe-interval {} --alignment {} --predictor {} --steps {} --column-scales {} --quantization {} \
                 --entropy-model {} --embedding-refinement {}",
                self.keyframe_interval,
                name_of(&self.alignment),
                name_of(&self.predictor),
                name_of(&self.steps),
                name_of(&self.column_scales),
                name_of(&self.quantization),
                name_of(&self.entropy_model),
                self.embedding_refinement
            ));
            // What is rarely chosen is named where it is.
            if self.assignment != Assignment::Auto {
                add(format!(" --assignment {}", name_of(&self.assignment)));
            }
            if let Some(seed) = self.alignment_seed {
                add(format!(" --alignment-seed {seed}"));
            }
            if self.permutations != Permutations::Auto {
                add(format!(" --permutations {}", name_of(&self.permutations)));
            }
            if self.force_prediction {
                add(" --force-prediction".to_owned());
            }
            if let Some(states) = self.trellis_states {
                add(format!(" --trellis-states {states}"));
            }
            if self.bit_allocation != BitAllocation::default() {
                add(format!(" --bit-allocation {}", name_of(&self.bit_allocation)));
            }
            if !self.rate_aware_rounding {
                add(" --no-rate-aware-rounding".to_owned());
            }
        }
        arguments
    }
}
