//! T5 and the models that name their tensors alike. Encoder and decoder are stacks of their own.
//!
//! Every layer adds the relative position bias of the first one to its scores, a column for each head. So heads of
//! self-attention cannot change places in one layer without doing so in all. Cross-attention has no position bias.

use super::BlockType;
use super::rules::{BlockRule, Family, PLAIN, PartRule, columns, rows};

/// T5, with one projection up.
pub(super) const T5: Family = Family {
    name: "t5",
    model_types: &["t5", "mt5", "umt5", "longt5"],
    layers: "block.",
    fixed: &[BlockType::Attention],
    blocks: &[SELF_ATTENTION, CROSS_ATTENTION, ffn(&ENCODER_FFN), ffn(&DECODER_FFN)],
    ..PLAIN
};

/// T5 1.1, mT5 and Flan-T5: the FFN is gated.
pub(super) const GATED: Family = Family {
    name: "t5-gated",
    blocks: &[SELF_ATTENTION, CROSS_ATTENTION, ffn(&ENCODER_GATED), ffn(&DECODER_GATED)],
    ..T5
};

pub(super) const SELF_ATTENTION: BlockRule = BlockRule {
    block_type: BlockType::Attention,
    modules: &["layer.0.SelfAttention."],
    parts: &[
        rows("query", "layer.0.SelfAttention.q.weight"),
        rows("key", "layer.0.SelfAttention.k.weight"),
        rows("value", "layer.0.SelfAttention.v.weight"),
        columns("output", "layer.0.SelfAttention.o.weight"),
    ],
    unmoved: &["layer.0.SelfAttention.relative_attention_bias.weight"],
};

pub(super) const CROSS_ATTENTION: BlockRule = BlockRule {
    block_type: BlockType::CrossAttention,
    modules: &["layer.1.EncDecAttention."],
    parts: &[
        rows("query", "layer.1.EncDecAttention.q.weight"),
        rows("key", "layer.1.EncDecAttention.k.weight"),
        rows("value", "layer.1.EncDecAttention.v.weight"),
        columns("output", "layer.1.EncDecAttention.o.weight"),
    ],
    unmoved: &[],
};

const ENCODER_FFN: [PartRule; 2] =
    [rows("up", "layer.1.DenseReluDense.wi.weight"), columns("down", "layer.1.DenseReluDense.wo.weight")];
const DECODER_FFN: [PartRule; 2] =
    [rows("up", "layer.2.DenseReluDense.wi.weight"), columns("down", "layer.2.DenseReluDense.wo.weight")];
const ENCODER_GATED: [PartRule; 3] = [
    rows("gate", "layer.1.DenseReluDense.wi_0.weight"),
    rows("up", "layer.1.DenseReluDense.wi_1.weight"),
    columns("down", "layer.1.DenseReluDense.wo.weight"),
];
const DECODER_GATED: [PartRule; 3] = [
    rows("gate", "layer.2.DenseReluDense.wi_0.weight"),
    rows("up", "layer.2.DenseReluDense.wi_1.weight"),
    columns("down", "layer.2.DenseReluDense.wo.weight"),
];

const fn ffn(parts: &'static [PartRule]) -> BlockRule {
    BlockRule {
        block_type: BlockType::Ffn,
        modules: &["layer.1.DenseReluDense.", "layer.2.DenseReluDense."],
        parts,
        unmoved: &[],
    }
}
