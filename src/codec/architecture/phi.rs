//! Phi: as Phi-2 names its tensors, and as Phi-3 fuses them.

use super::BlockType;
use super::rules::{BlockRule, Family, PLAIN, bias, columns, rows};

/// Phi and Phi-2.
pub(super) const PHI: Family = Family {
    name: "phi",
    model_types: &["phi"],
    layers: "layers.",
    grouped_queries: true,
    blocks: &[
        BlockRule {
            block_type: BlockType::Attention,
            modules: &["self_attn."],
            parts: &[
                rows("query", "self_attn.q_proj.weight").per_member(),
                rows("key", "self_attn.k_proj.weight"),
                rows("value", "self_attn.v_proj.weight"),
                columns("output", "self_attn.dense.weight").per_member(),
                bias("query_bias", "self_attn.q_proj.bias").per_member(),
                bias("key_bias", "self_attn.k_proj.bias"),
                bias("value_bias", "self_attn.v_proj.bias"),
            ],
            unmoved: &["self_attn.dense.bias"],
        },
        BlockRule {
            block_type: BlockType::Ffn,
            modules: &["mlp."],
            parts: &[rows("up", "mlp.fc1.weight"), columns("down", "mlp.fc2.weight"), bias("up_bias", "mlp.fc1.bias")],
            unmoved: &["mlp.fc2.bias"],
        },
    ],
    ..PLAIN
};

/// Phi-3 and Phi-4: one projection holds all gates, then all units. Heads of grouped queries do not repeat evenly in the
/// fused projection and stay; without groups they do.
pub(super) const PHI3: Family = Family {
    name: "phi3",
    model_types: &["phi3"],
    layers: "layers.",
    blocks: &[
        BlockRule {
            block_type: BlockType::Attention,
            modules: &["self_attn."],
            parts: &[
                rows("query_key_value", "self_attn.qkv_proj.weight").repeated(3),
                columns("output", "self_attn.o_proj.weight"),
            ],
            unmoved: &[],
        },
        BlockRule {
            block_type: BlockType::Ffn,
            modules: &["mlp."],
            parts: &[rows("gate_up", "mlp.gate_up_proj.weight").repeated(2), columns("down", "mlp.down_proj.weight")],
            unmoved: &[],
        },
    ],
    ..PLAIN
};
