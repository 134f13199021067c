//! GPT-2: `Conv1D` weights are `[inputs, outputs]`, and one projection holds all queries, then all keys, then all values.

use super::BlockType;
use super::rules::{BlockRule, Family, PLAIN, bias, columns, rows};

pub(super) const GPT2: Family = Family {
    name: "gpt2",
    model_types: &["gpt2"],
    layers: "h.",
    blocks: &[
        BlockRule {
            block_type: BlockType::Attention,
            modules: &["attn."],
            parts: &[
                columns("query_key_value", "attn.c_attn.weight").repeated(3),
                rows("output", "attn.c_proj.weight"),
                bias("query_key_value_bias", "attn.c_attn.bias").repeated(3),
            ],
            unmoved: &["attn.c_proj.bias", "attn.bias", "attn.masked_bias"], // the last two are the causal mask
        },
        BlockRule {
            block_type: BlockType::Ffn,
            modules: &["mlp."],
            parts: &[
                columns("up", "mlp.c_fc.weight"),
                rows("down", "mlp.c_proj.weight"),
                bias("up_bias", "mlp.c_fc.bias"),
            ],
            unmoved: &["mlp.c_proj.bias"],
        },
    ],
    ..PLAIN
};
