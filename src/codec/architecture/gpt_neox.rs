//! GPT-NeoX and Pythia: one projection holds, head by head, its query, its key and its value.

use super::BlockType;
use super::rules::{BlockRule, Family, PLAIN, bias, columns, rows};

pub(super) const GPT_NEOX: Family = Family {
    name: "gpt_neox",
    model_types: &["gpt_neox"],
    layers: "layers.",
    blocks: &[
        BlockRule {
            block_type: BlockType::Attention,
            modules: &["attention."],
            parts: &[
                rows("query_key_value", "attention.query_key_value.weight").fused(3),
                columns("output", "attention.dense.weight"),
                bias("query_key_value_bias", "attention.query_key_value.bias").fused(3),
            ],
            // Rotary frequencies and the causal mask are the same for all heads.
            unmoved: &[
                "attention.dense.bias",
                "attention.rotary_emb.inv_freq",
                "attention.bias",
                "attention.masked_bias",
            ],
        },
        BlockRule {
            block_type: BlockType::Ffn,
            modules: &["mlp."],
            parts: &[
                rows("up", "mlp.dense_h_to_4h.weight"),
                columns("down", "mlp.dense_4h_to_h.weight"),
                bias("up_bias", "mlp.dense_h_to_4h.bias"),
            ],
            unmoved: &["mlp.dense_4h_to_h.bias"],
        },
    ],
    ..PLAIN
};
