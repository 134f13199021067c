//! OPT: separate projections with biases, ReLU between `fc1` and `fc2`.

use super::BlockType;
use super::rules::{BlockRule, Family, PLAIN, bias, columns, rows};

pub(super) const OPT: Family = Family {
    name: "opt",
    model_types: &["opt"],
    layers: "decoder.layers.",
    blocks: &[
        BlockRule {
            block_type: BlockType::Attention,
            modules: &["self_attn."],
            parts: &[
                rows("query", "self_attn.q_proj.weight"),
                rows("key", "self_attn.k_proj.weight"),
                rows("value", "self_attn.v_proj.weight"),
                columns("output", "self_attn.out_proj.weight"),
                bias("query_bias", "self_attn.q_proj.bias"),
                bias("key_bias", "self_attn.k_proj.bias"),
                bias("value_bias", "self_attn.v_proj.bias"),
            ],
            unmoved: &["self_attn.out_proj.bias"],
        },
        BlockRule {
            block_type: BlockType::Ffn,
            modules: &["fc1.", "fc2."],
            parts: &[rows("up", "fc1.weight"), columns("down", "fc2.weight"), bias("up_bias", "fc1.bias")],
            unmoved: &["fc2.bias"],
        },
    ],
    ..PLAIN
};
