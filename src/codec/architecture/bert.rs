//! BERT and the encoders that name their tensors alike. `Linear` weights are `[outputs, inputs]`.

use super::BlockType;
use super::rules::{BlockRule, Family, PLAIN, bias, columns, rows};

pub(super) const BERT: Family = Family {
    name: "bert",
    model_types: &["bert", "roberta", "xlm-roberta", "camembert", "electra"],
    layers: "encoder.layer.",
    blocks: &[
        BlockRule {
            block_type: BlockType::Attention,
            modules: &["attention."],
            parts: &[
                rows("query", "attention.self.query.weight"),
                rows("key", "attention.self.key.weight"),
                rows("value", "attention.self.value.weight"),
                columns("output", "attention.output.dense.weight"),
                bias("query_bias", "attention.self.query.bias"),
                bias("key_bias", "attention.self.key.bias"),
                bias("value_bias", "attention.self.value.bias"),
            ],
            unmoved: &[
                "attention.output.dense.bias",
                "attention.output.LayerNorm.weight",
                "attention.output.LayerNorm.bias",
                "attention.output.LayerNorm.gamma", // older checkpoints
                "attention.output.LayerNorm.beta",
                "attention.self.distance_embedding.weight", // relative positions, one table for all heads
            ],
        },
        BlockRule {
            block_type: BlockType::Ffn,
            modules: &["intermediate.", "output."],
            parts: &[
                rows("up", "intermediate.dense.weight"),
                columns("down", "output.dense.weight"),
                bias("up_bias", "intermediate.dense.bias"),
            ],
            unmoved: &[
                "output.dense.bias",
                "output.LayerNorm.weight",
                "output.LayerNorm.bias",
                "output.LayerNorm.gamma",
                "output.LayerNorm.beta",
            ],
        },
    ],
    ..PLAIN
};
