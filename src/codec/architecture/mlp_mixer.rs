//! MLP-Mixer, as timm names its tensors: one network mixes tokens, another one channels.

use super::BlockType;
use super::rules::{BlockRule, Family, PLAIN, bias, columns, rows};

pub(super) const MLP_MIXER: Family = Family {
    name: "mlp_mixer",
    model_types: &["mlp_mixer"],
    layers: "blocks.",
    blocks: &[
        BlockRule {
            block_type: BlockType::TokenFfn,
            modules: &["mlp_tokens."],
            parts: &[
                rows("up", "mlp_tokens.fc1.weight"),
                columns("down", "mlp_tokens.fc2.weight"),
                bias("up_bias", "mlp_tokens.fc1.bias"),
            ],
            unmoved: &["mlp_tokens.fc2.bias"],
        },
        BlockRule {
            block_type: BlockType::Ffn,
            modules: &["mlp_channels."],
            parts: &[
                rows("up", "mlp_channels.fc1.weight"),
                columns("down", "mlp_channels.fc2.weight"),
                bias("up_bias", "mlp_channels.fc1.bias"),
            ],
            unmoved: &["mlp_channels.fc2.bias"],
        },
    ],
    ..PLAIN
};
