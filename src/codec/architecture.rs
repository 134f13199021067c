//! Which tensors of a checkpoint form which blocks, and which permutations of them keep the function (Appendices D, M).
//!
//! A family's rules are data, one file each. [`plan`] applies them to a checkpoint and gives its records in the order of
//! the archive (Eq. 49). A rule that does not fit a layer, a missing sibling, a shape that does not divide, a tensor that
//! the rule does not know, takes the symmetry away from that block type there and never fails: every checkpoint packs.
//!
//! Not here: choosing a permutation (`pack::align`), and what a record is coded with.

mod bert;
mod cait;
mod convnext;
mod gpt2;
mod gpt_neox;
mod llama;
mod mixtral;
mod mlp_mixer;
mod opt;
mod phi;
mod planner;
mod rules;
mod swin;
mod switch_transformers;
mod t5;
mod vit;

use super::blocks::{Placement, Symmetry};
use crate::tensor::TensorInfo;

pub use planner::plan;

/// What the blocks of a record are (t in the paper).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum BlockType {
    /// Heads of self-attention, or key/value groups with their query heads.
    Attention,
    /// Heads of the attention from a decoder to its encoder.
    CrossAttention,
    /// Hidden units of the feed-forward network; of the one that mixes channels where another mixes tokens.
    Ffn,
    /// Hidden units of the feed-forward network that mixes tokens.
    TokenFfn,
    /// Hidden units of one expert, by its number: an expert is predicted from the one of its number in the layer below.
    Expert(u16),
    /// The rest of a layer: norms, biases that no permutation moves; all of it where the architecture is unknown.
    Layer,
    /// Token, position and patch embeddings.
    Embedding,
    /// Output heads: classifiers and language-model heads.
    Head,
    /// Everything else.
    Global,
}

impl BlockType {
    /// The names in reports and archives, by [`BlockType::number`].
    pub const NAMES: [&'static str; 9] =
        ["attention", "cross-attention", "ffn", "token-ffn", "expert", "layer", "embedding", "head", "global"];

    /// The number in archives: experts share one.
    pub fn number(self) -> u8 {
        match self {
            Self::Attention => 0,
            Self::CrossAttention => 1,
            Self::Ffn => 2,
            Self::TokenFfn => 3,
            Self::Expert(_) => 4,
            Self::Layer => 5,
            Self::Embedding => 6,
            Self::Head => 7,
            Self::Global => 8,
        }
    }

    /// The name in reports and archives.
    pub fn name(self) -> &'static str {
        Self::NAMES[usize::from(self.number())]
    }

    /// Whether the blocks are heads.
    pub fn is_attention(self) -> bool {
        matches!(self, Self::Attention | Self::CrossAttention)
    }
}

/// One file of a checkpoint, as [`plan`] sees it.
#[derive(Clone, Copy, Debug)]
pub struct PlanFile<'a> {
    /// Files that are shards of one model have the same number; a layer may lie in several of them.
    pub model: usize,
    /// The tensors of the file.
    pub tensors: &'a [TensorInfo],
}

/// A checkpoint as records.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CheckpointPlan {
    /// The family whose rules were applied, or `None` for an unknown architecture.
    pub family: Option<&'static str>,
    /// The records in the order of the archive (Eq. 49): every tensor is a part of exactly one.
    pub records: Vec<RecordPlan>,
}

/// One record: the tensors of one block type in one layer (Eq. 50).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RecordPlan {
    /// Layers of one stack may follow one another: a model with an encoder and a decoder has two.
    pub stack: u32,
    /// Layers are counted through all stacks, from 0; `None` outside the layers.
    pub layer: Option<u32>,
    /// What the blocks are.
    pub block_type: BlockType,
    /// Which permutations keep the layer's function; `None` if none but the identity is known to.
    pub symmetry: Option<Symmetry>,
    /// The tensors. Those of one block type come in the same order in every layer.
    pub parts: Vec<PartPlan>,
}

/// One tensor of a record.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PartPlan {
    /// Which file, as given to [`plan`].
    pub file: usize,
    /// Which tensor of the file.
    pub tensor: usize,
    /// What it is in the block, for example `query`; where no rule says it, its name after the layer's number.
    pub role: String,
    /// Where the blocks lie in it; `None` if no permutation moves it, or it lies on two axes.
    pub placement: Option<Placement>,
    /// Where the blocks lie on both axes of a matrix that mixes them: a permutation conjugates it (Appendix M). It is
    /// never predicted in another order: a few elements for each head.
    pub conjugated: Option<[Placement; 2]>,
}

impl RecordPlan {
    /// Makes one block of each two neighbours, where blocks move freely and there is an even number of them: the paper's
    /// coarse blocks.
    pub fn merge_pairs(&mut self) {
        let Some(symmetry) = self.symmetry.filter(|symmetry| symmetry.members == 1 && symmetry.groups % 2 == 0) else {
            return;
        };
        if self.parts.iter().any(|part| part.conjugated.is_some()) {
            return;
        }
        self.symmetry = Some(Symmetry { groups: symmetry.groups / 2, ..symmetry });
        for placement in self.parts.iter_mut().filter_map(|part| part.placement.as_mut()) {
            placement.unit *= 2;
        }
    }

    /// Whether this record can be predicted from `previous`: the same block type one layer below, tensor for tensor of
    /// the same shape and dtype, under the same symmetry. Stages of different width do not follow one another (Eq. 133).
    pub fn follows(&self, previous: &Self, files: &[PlanFile<'_>]) -> bool {
        let tensor = |part: &PartPlan| &files[part.file].tensors[part.tensor];
        let alike = |(part, below): (&PartPlan, &PartPlan)| {
            part.role == below.role
                && part.placement == below.placement
                && tensor(part).shape == tensor(below).shape
                && tensor(part).dtype == tensor(below).dtype
        };
        let (Some(layer), Some(below)) = (self.layer, previous.layer) else { return false };
        layer == below + 1
            && self.stack == previous.stack
            && self.block_type == previous.block_type
            && self.symmetry == previous.symmetry
            && self.parts.len() == previous.parts.len()
            && self.parts.iter().zip(&previous.parts).all(alike)
    }
}
