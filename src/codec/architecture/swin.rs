//! Swin Transformers, as Hugging Face and as timm name their tensors. Each stage is a stack of its own: layers of different
//! width do not follow one another (Eq. 133). A head takes its column of the relative position bias along.

use super::BlockType;
use super::rules::{BlockRule, Family, PLAIN, bias, column_per_block, columns, rows};

/// `swin.encoder.layers.STAGE.blocks.N.attention.self.query.weight`
pub(super) const HUGGING_FACE: Family = Family {
    name: "swin",
    model_types: &["swin"],
    layers: "blocks.",
    blocks: &[
        BlockRule {
            block_type: BlockType::Attention,
            modules: &["attention."],
            parts: &[
                rows("query", "attention.self.query.weight"),
                rows("key", "attention.self.key.weight"),
                rows("value", "attention.self.value.weight"),
                columns("output", "attention.output.dense.weight"),
                column_per_block("position_bias", "attention.self.relative_position_bias_table"),
                bias("query_bias", "attention.self.query.bias"),
                bias("key_bias", "attention.self.key.bias"),
                bias("value_bias", "attention.self.value.bias"),
            ],
            unmoved: &["attention.output.dense.bias", "attention.self.relative_position_index"],
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

/// `layers.STAGE.blocks.N.attn.qkv.weight`
pub(super) const TIMM: Family = Family {
    name: "swin-timm",
    model_types: &["swin"],
    layers: "blocks.",
    blocks: &[
        BlockRule {
            block_type: BlockType::Attention,
            modules: &["attn."],
            parts: &[
                rows("query_key_value", "attn.qkv.weight").repeated(3),
                columns("output", "attn.proj.weight"),
                column_per_block("position_bias", "attn.relative_position_bias_table"),
                bias("query_key_value_bias", "attn.qkv.bias").repeated(3),
            ],
            unmoved: &["attn.proj.bias", "attn.relative_position_index"],
        },
        super::vit::TIMM_FFN,
    ],
    ..PLAIN
};
