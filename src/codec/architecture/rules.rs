//! What a family's rules are made of.

use super::BlockType;

/// The rules of one family of architectures.
#[derive(Debug)]
pub(super) struct Family {
    /// Name in reports.
    pub name: &'static str,
    /// The `model_type`s of `config.json` that have these tensors.
    pub model_types: &'static [&'static str],
    /// What stands before a layer's number, for example `encoder.layer.`; anything may stand before that.
    pub layers: &'static str,
    /// Groups of query heads may share a key/value head.
    pub grouped_queries: bool,
    /// Head width by the prefix of timm's `architecture`, for configurations that do not count heads.
    pub head_widths: &'static [(&'static str, u32)],
    /// Block types that no permutation may move, because layers share what tells their blocks apart.
    pub fixed: &'static [BlockType],
    /// The block types.
    pub blocks: &'static [BlockRule],
}

/// What most families have in common: the rest of a family whose own traits are named.
pub(super) const PLAIN: Family = Family {
    name: "",
    model_types: &[],
    layers: "",
    grouped_queries: false,
    head_widths: &[],
    fixed: &[],
    blocks: &[],
};

/// One block type of a family. The rule of [`BlockType::Expert`] is that of every expert: `{}` in names is its number.
#[derive(Debug)]
pub(super) struct BlockRule {
    pub block_type: BlockType,
    /// How tensors of these modules begin, after the layer's number. The symmetry holds only if each of them is known.
    pub modules: &'static [&'static str],
    /// The tensors that a permutation moves.
    pub parts: &'static [PartRule],
    /// Tensors of the modules that it does not concern: output biases, norms over what heads share, buffers.
    pub unmoved: &'static [&'static str],
}

/// One tensor that a permutation moves.
#[derive(Clone, Copy, Debug)]
pub(super) struct PartRule {
    /// What it is in the block.
    pub role: &'static str,
    /// Name after the layer's number.
    pub tensor: &'static str,
    /// Dimensions it must have.
    pub dimensions: usize,
    /// Axis of the blocks.
    pub axis: u8,
    /// How often the row of all blocks comes along the axis.
    pub repeat: u32,
    /// Widths of one block that lie together: 3 where query, key and value of a head do.
    pub fused: u32,
    /// One element for each block, whatever its width: its extent is the number of blocks.
    pub single: bool,
    /// Blocks lie on both axes: the tensor mixes them.
    pub conjugated: bool,
    /// Query heads, where those of keys and values may be fewer.
    pub per_member: bool,
    /// Biases may be absent.
    pub optional: bool,
}

/// A weight whose rows belong to blocks: `[blocks, inputs]`.
pub(super) const fn rows(role: &'static str, tensor: &'static str) -> PartRule {
    PartRule {
        role,
        tensor,
        dimensions: 2,
        axis: 0,
        repeat: 1,
        fused: 1,
        single: false,
        conjugated: false,
        per_member: false,
        optional: false,
    }
}

/// A weight whose columns belong to blocks: `[outputs, blocks]`.
pub(super) const fn columns(role: &'static str, tensor: &'static str) -> PartRule {
    PartRule { axis: 1, ..rows(role, tensor) }
}

/// A bias whose elements belong to blocks. Models without biases have none.
pub(super) const fn bias(role: &'static str, tensor: &'static str) -> PartRule {
    PartRule { dimensions: 1, optional: true, ..rows(role, tensor) }
}

/// A table with a column for each block: `[entries, blocks]`.
pub(super) const fn column_per_block(role: &'static str, tensor: &'static str) -> PartRule {
    PartRule { single: true, ..columns(role, tensor) }
}

/// A matrix that mixes the blocks: `[blocks, blocks]`.
pub(super) const fn mixing(role: &'static str, tensor: &'static str) -> PartRule {
    PartRule { single: true, conjugated: true, ..rows(role, tensor) }
}

/// A bias with an element for each block.
pub(super) const fn element_per_block(role: &'static str, tensor: &'static str) -> PartRule {
    PartRule { single: true, ..bias(role, tensor) }
}

impl PartRule {
    /// All blocks come `repeat` times: all queries, then all keys, then all values.
    pub(super) const fn repeated(self, repeat: u32) -> Self {
        Self { repeat, ..self }
    }

    /// One block is `fused` widths long: its query, its key and its value lie together.
    pub(super) const fn fused(self, fused: u32) -> Self {
        Self { fused, ..self }
    }

    /// The blocks are query heads.
    pub(super) const fn per_member(self) -> Self {
        Self { per_member: true, ..self }
    }
}
