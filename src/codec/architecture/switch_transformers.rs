//! Switch Transformers: T5 with experts in some layers. The units of an expert move within it; its place is the router's.

use super::BlockType;
use super::rules::{BlockRule, Family, PLAIN, PartRule, columns, rows};
use super::t5::{CROSS_ATTENTION, SELF_ATTENTION};

pub(super) const SWITCH_TRANSFORMERS: Family = Family {
    name: "switch_transformers",
    model_types: &["switch_transformers"],
    layers: "block.",
    fixed: &[BlockType::Attention],
    blocks: &[
        SELF_ATTENTION,
        CROSS_ATTENTION,
        dense(&[rows("up", "layer.1.mlp.wi.weight"), columns("down", "layer.1.mlp.wo.weight")]),
        dense(&[rows("up", "layer.2.mlp.wi.weight"), columns("down", "layer.2.mlp.wo.weight")]),
        expert(
            &["layer.1.mlp.experts.expert_{}."],
            &[
                rows("up", "layer.1.mlp.experts.expert_{}.wi.weight"),
                columns("down", "layer.1.mlp.experts.expert_{}.wo.weight"),
            ],
        ),
        expert(
            &["layer.2.mlp.experts.expert_{}."],
            &[
                rows("up", "layer.2.mlp.experts.expert_{}.wi.weight"),
                columns("down", "layer.2.mlp.experts.expert_{}.wo.weight"),
            ],
        ),
    ],
    ..PLAIN
};

const fn dense(parts: &'static [PartRule]) -> BlockRule {
    BlockRule {
        block_type: BlockType::Ffn,
        modules: &["layer.1.mlp.wi.", "layer.1.mlp.wo.", "layer.2.mlp.wi.", "layer.2.mlp.wo."],
        parts,
        unmoved: &[],
    }
}

const fn expert(modules: &'static [&'static str], parts: &'static [PartRule]) -> BlockRule {
    BlockRule { block_type: BlockType::Expert(0), modules, parts, unmoved: &[] }
}
