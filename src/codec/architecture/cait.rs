//! CaiT, as timm names its tensors: a Vision Transformer with talking heads. Scores of all heads are mixed before the softmax
//! and after it, so heads change places only if both matrices are conjugated (Appendix M).

use super::BlockType;
use super::rules::{BlockRule, Family, PLAIN, bias, columns, element_per_block, mixing, rows};

pub(super) const CAIT: Family = Family {
    name: "cait",
    model_types: &["cait"],
    layers: "blocks.",
    blocks: &[
        BlockRule {
            block_type: BlockType::Attention,
            modules: &["attn."],
            parts: &[
                rows("query_key_value", "attn.qkv.weight").repeated(3),
                columns("output", "attn.proj.weight"),
                mixing("mix_logits", "attn.proj_l.weight"),
                mixing("mix_weights", "attn.proj_w.weight"),
                bias("query_key_value_bias", "attn.qkv.bias").repeated(3),
                element_per_block("mix_logits_bias", "attn.proj_l.bias"),
                element_per_block("mix_weights_bias", "attn.proj_w.bias"),
            ],
            unmoved: &["attn.proj.bias"],
        },
        super::vit::TIMM_FFN,
    ],
    ..PLAIN
};
