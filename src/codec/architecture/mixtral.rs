//! Decoders with Llama's attention and a mixture of experts. The units of an expert move within it; its place is the
//! router's.

use super::BlockType;
use super::llama::ATTENTION;
use super::rules::{BlockRule, Family, PLAIN, columns, rows};

/// `block_sparse_moe.experts.N.w1.weight`
pub(super) const MIXTRAL: Family = Family {
    name: "mixtral",
    model_types: &["mixtral"],
    layers: "layers.",
    grouped_queries: true,
    blocks: &[
        ATTENTION,
        BlockRule {
            block_type: BlockType::Expert(0),
            modules: &["block_sparse_moe.experts.{}."],
            parts: &[
                rows("gate", "block_sparse_moe.experts.{}.w1.weight"),
                rows("up", "block_sparse_moe.experts.{}.w3.weight"),
                columns("down", "block_sparse_moe.experts.{}.w2.weight"),
            ],
            unmoved: &[],
        },
    ],
    ..PLAIN
};

/// `mlp.experts.N.gate_proj.weight`, beside an expert that every token takes.
pub(super) const QWEN_MOE: Family = Family {
    name: "qwen_moe",
    model_types: &["qwen2_moe", "qwen3_moe"],
    layers: "layers.",
    grouped_queries: true,
    blocks: &[
        ATTENTION,
        BlockRule {
            block_type: BlockType::Ffn,
            modules: &["mlp.shared_expert."],
            parts: &[
                rows("gate", "mlp.shared_expert.gate_proj.weight"),
                rows("up", "mlp.shared_expert.up_proj.weight"),
                columns("down", "mlp.shared_expert.down_proj.weight"),
            ],
            unmoved: &[],
        },
        BlockRule {
            block_type: BlockType::Expert(0),
            modules: &["mlp.experts.{}."],
            parts: &[
                rows("gate", "mlp.experts.{}.gate_proj.weight"),
                rows("up", "mlp.experts.{}.up_proj.weight"),
                columns("down", "mlp.experts.{}.down_proj.weight"),
            ],
            unmoved: &[],
        },
    ],
    ..PLAIN
};
