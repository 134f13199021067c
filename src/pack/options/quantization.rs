//! How weights become codes, and codes bits (Table 15).

use std::fmt;
use std::str::FromStr;

use crate::format::limits::TRELLIS_STATE_BITS;

/// Where quantizer steps are set.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum Steps {
    /// One step per tensor, tables follow the scale of each row.
    #[default]
    Shared,
    /// A step per row in proportion to its scale, as in the paper.
    PerRun,
    /// A step per 128 columns of a row, as in most 4-bit formats.
    PerGroup,
}

/// Columns that share a step where steps are set per group.
const GROUP_COLUMNS: usize = 128;

impl Steps {
    /// Columns of a run, where runs are groups of columns.
    pub fn group(self) -> Option<usize> {
        (self == Self::PerGroup).then_some(GROUP_COLUMNS)
    }
}

/// Which columns of a tensor have steps of their own.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum ColumnScales {
    /// None.
    None,
    /// Those of tensors whose inputs calibration knows, where by an estimate a finer step for what is multiplied with strong
    /// inputs makes up for more than its bits.
    #[default]
    Auto,
    /// All, in proportion to the root mean square of the column: an ablation. At equal squared error it costs bits, as steps
    /// per row do.
    Energy,
}

/// What bits are spent for where calibration says what each tensor is worth.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum BitAllocation {
    /// The least distance of the model's outputs: tensors that these hang on have finer steps.
    #[default]
    Outputs,
    /// The least squared error of the weights: all have one step, but for embeddings and output heads.
    Weights,
}

/// What the symbols are coded with (Table 15 of the paper).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum EntropyModel {
    /// Each row has the table that suits it best, of a family fitted to the checkpoint.
    #[default]
    Contextual,
    /// One table per tensor, fitted to it.
    Iid,
    /// All codes of a tensor take the same number of bits.
    FixedLength,
}

/// How values become codes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum Quantization {
    /// Trellis-coded; at the lowest rates an entropy table for each of the two quantizers.
    #[default]
    Trellis,
    /// Trellis-coded, both quantizers with the same entropy table at every rate.
    TrellisShared,
    /// One quantizer, as in the paper.
    Scalar,
    /// Residual vector quantization in two stages, indices of fixed length: the paper's ablation. Vectors of 2 to 16 elements
    /// and two codebooks of 1024 reach 1.25 to 10 bits per weight, fewer codewords in small checkpoints less. Needs `--bpp`,
    /// which is met from below as near as vectors of two lengths allow.
    ResidualVector,
}

/// Number of states of the trellis: more take longer to search, not to decode.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TrellisStates(pub(super) u16);

impl TrellisStates {
    /// Two to this power are so many.
    pub fn state_bits(self) -> u8 {
        self.0.ilog2() as u8
    }
}

impl FromStr for TrellisStates {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let is_one = |states: &u16| states.is_power_of_two() && TRELLIS_STATE_BITS.contains(&(states.ilog2() as u8));
        let states = text.parse().ok().filter(is_one).map(Self);
        states.ok_or_else(|| format!("{text:?} is not 8, 16, 32, 64, 128 or 256"))
    }
}

impl fmt::Display for TrellisStates {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(formatter)
    }
}
