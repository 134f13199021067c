//! How layers are aligned and predicted from one another (Tables 14 and 15).

use crate::pack::align::{Alignment, Solver};
use crate::pack::network::{Embeddings, NetworkShape};

/// How blocks are matched between layers (Tables 14 and 15 of the paper).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum AlignmentChoice {
    /// Wherever it pays, by weight similarity.
    #[default]
    Weights,
    /// Nowhere.
    None,
    /// FFN units only.
    Ffn,
    /// Attention heads only.
    Heads,
    /// At random: the ablation's control, kept like any other only where it pays.
    Random,
    /// By what blocks do on the calibration inputs. Needs `--calibration` or `--calibrate`.
    Activations,
    /// By both, weights counting 0.7. Needs `--calibration` or `--calibrate`.
    Hybrid,
    /// For the least energy of what a scaled copy leaves.
    ResidualEnergy,
    /// By weights, two neighbouring blocks moved together.
    Coarse,
}

/// How the assignment of blocks is solved (Table 15 of the paper).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum Assignment {
    /// Exactly up to 256 blocks, screened above.
    #[default]
    Auto,
    /// Exactly: cubic in the number of blocks.
    Exact,
    /// Greedily among 16 candidates of each block, with one pass of swaps.
    Screened,
    /// Greedily among 8 candidates of each block.
    ScreenedUnrefined,
}

impl Assignment {
    pub(super) fn solver(self) -> Solver {
        match self {
            Self::Auto => Solver::Auto,
            Self::Exact => Solver::Exact,
            Self::Screened => Solver::SCREENED,
            Self::ScreenedUnrefined => Solver::Screened { candidates: 8, is_refined: false },
        }
    }
}

/// How permutations are written (Table 15 of the paper).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum Permutations {
    /// Whichever is shortest, record by record.
    #[default]
    Auto,
    /// Entries of fixed width.
    Raw,
    /// Lehmer digits.
    Lehmer,
    /// Differences of Lehmer digits across depth.
    Delta,
}

/// Seed of the random permutations where none is given: the ablation is the same every time.
const RANDOM_SEED: u64 = 1;
/// What weights count in the hybrid similarity (alpha in section 4.2).
const HYBRID_WEIGHT: f32 = 0.7;

impl AlignmentChoice {
    /// How permutations are found.
    pub(super) fn alignment(self, seed: Option<u64>) -> Alignment {
        match self {
            Self::Weights | Self::Activations | Self::Hybrid | Self::ResidualEnergy | Self::Coarse => {
                Alignment::Similarity
            }
            Self::None => Alignment::None,
            Self::Ffn => Alignment::FfnOnly,
            Self::Heads => Alignment::HeadsOnly,
            Self::Random => Alignment::Random { seed: seed.unwrap_or(RANDOM_SEED) },
        }
    }

    /// What weights count beside activations; `None` where activations do not count.
    pub fn weight_of_weights(self) -> Option<f32> {
        match self {
            Self::Activations => Some(0.0),
            Self::Hybrid => Some(HYBRID_WEIGHT),
            _ => None,
        }
    }
}

/// Which predictors may be chosen.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum PredictorChoice {
    /// The cheapest by measured bits, none included.
    #[default]
    Auto,
    /// None: every record is a keyframe.
    None,
    /// The scaled copy, where it pays.
    ScaledCopy,
    /// The affine map per row, where it pays.
    RowAffine,
    /// Up to four vectors for each unit, where they pay.
    MotionVectors,
    /// The paper's network of width 256, where it pays for its parameters.
    Network,
    /// The same of width 128.
    NetworkNarrow,
    /// A linear one of width 256: no hidden layer.
    NetworkLinear,
    /// The one of width 256 without embeddings.
    NetworkBare,
    /// The one of width 256 with an embedding of the kind of tensor alone.
    NetworkTypeOnly,
    /// The one of width 256, which looks at two layers.
    NetworkTwoStep,
}

impl PredictorChoice {
    /// The network's shape, where it is one.
    pub fn network(self) -> Option<NetworkShape> {
        let full = NetworkShape { width: 256, has_hidden: true, embeddings: Embeddings::LayerAndKind, contexts: 1 };
        match self {
            Self::Auto | Self::None | Self::ScaledCopy | Self::RowAffine | Self::MotionVectors => None,
            Self::Network => Some(full),
            Self::NetworkNarrow => Some(NetworkShape { width: 128, ..full }),
            Self::NetworkLinear => Some(NetworkShape { has_hidden: false, ..full }),
            Self::NetworkBare => Some(NetworkShape { embeddings: Embeddings::None, ..full }),
            Self::NetworkTypeOnly => Some(NetworkShape { embeddings: Embeddings::Kind, ..full }),
            Self::NetworkTwoStep => Some(NetworkShape { contexts: 2, ..full }),
        }
    }
}
