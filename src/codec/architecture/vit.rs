//! Vision Transformers and DeiT, as Hugging Face and as timm name their tensors.

use super::BlockType;
use super::rules::{BlockRule, Family, PLAIN, bias, columns, rows};

/// `vit.encoder.layer.N.attention.attention.query.weight`
pub(super) const HUGGING_FACE: Family = Family {
    name: "vit",
    model_types: &["vit", "deit", "vit_mae", "vit_msn"],
    layers: "encoder.layer.",
    blocks: &[
        BlockRule {
            block_type: BlockType::Attention,
            modules: &["attention."],
            parts: &[
                rows("query", "attention.attention.query.weight"),
                rows("key", "attention.attention.key.weight"),
                rows("value", "attention.attention.value.weight"),
                columns("output", "attention.output.dense.weight"),
                bias("query_bias", "attention.attention.query.bias"),
                bias("key_bias", "attention.attention.key.bias"),
                bias("value_bias", "attention.attention.value.bias"),
            ],
            unmoved: &["attention.output.dense.bias"],
        },
        BlockRule {
            block_type: BlockType::Ffn,
            modules: &["intermediate.", "output."],
            parts: &[
                rows("up", "intermediate.dense.weight"),
                columns("down", "output.dense.weight"),
                bias("up_bias", "intermediate.dense.bias"),
            ],
            unmoved: &["output.dense.bias"],
        },
    ],
    ..PLAIN
};

/// `blocks.N.attn.qkv.weight`: all queries, then all keys, then all values.
pub(super) const TIMM: Family = Family {
    name: "vit-timm",
    model_types: &["vit", "deit"],
    layers: "blocks.",
    head_widths: &[
        ("vit_tiny_", 64),
        ("vit_small_", 64),
        ("vit_base_", 64),
        ("vit_large_", 64),
        ("deit_tiny_", 64),
        ("deit_small_", 64),
        ("deit_base_", 64),
        ("deit3_small_", 64),
        ("deit3_base_", 64),
        ("deit3_large_", 64),
    ],
    blocks: &[
        BlockRule {
            block_type: BlockType::Attention,
            modules: &["attn."],
            parts: &[
                rows("query_key_value", "attn.qkv.weight").repeated(3),
                columns("output", "attn.proj.weight"),
                bias("query_key_value_bias", "attn.qkv.bias").repeated(3),
            ],
            unmoved: &["attn.proj.bias"],
        },
        TIMM_FFN,
    ],
    ..PLAIN
};

/// The FFN that timm's vision models share.
pub(super) const TIMM_FFN: BlockRule = BlockRule {
    block_type: BlockType::Ffn,
    modules: &["mlp."],
    parts: &[rows("up", "mlp.fc1.weight"), columns("down", "mlp.fc2.weight"), bias("up_bias", "mlp.fc1.bias")],
    unmoved: &["mlp.fc2.bias"],
};
