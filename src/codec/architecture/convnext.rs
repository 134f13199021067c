//! ConvNeXt, as Hugging Face and as timm name their tensors. Each stage is a stack of its own (Eq. 133). The channels between
//! the two pointwise convolutions are hidden units; those that the stage carries through are not free.

use super::BlockType;
use super::rules::{BlockRule, Family, PLAIN, bias, columns, rows};

/// `convnext.encoder.stages.STAGE.layers.N.pwconv1.weight`
pub(super) const HUGGING_FACE: Family = Family {
    name: "convnext",
    model_types: &["convnext"],
    layers: "layers.",
    blocks: &[BlockRule {
        block_type: BlockType::Ffn,
        modules: &["pwconv1.", "pwconv2.", "grn."],
        parts: &[rows("up", "pwconv1.weight"), columns("down", "pwconv2.weight"), bias("up_bias", "pwconv1.bias")],
        unmoved: &["pwconv2.bias"],
    }],
    ..PLAIN
};

/// `stages.STAGE.blocks.N.mlp.fc1.weight`
pub(super) const TIMM: Family = Family {
    name: "convnext-timm",
    model_types: &["convnext"],
    layers: "blocks.",
    blocks: &[BlockRule {
        unmoved: &["mlp.fc2.bias", "conv_dw.weight", "conv_dw.bias", "gamma"],
        ..super::vit::TIMM_FFN
    }],
    ..PLAIN
};
