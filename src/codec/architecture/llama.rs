//! Llama, Mistral and the decoders that name their tensors alike: grouped queries (Eq. 129) and gated FFN units.

use super::BlockType;
use super::rules::{BlockRule, Family, PLAIN, bias, columns, rows};

pub(super) const LLAMA: Family = Family {
    name: "llama",
    model_types: &["llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text"],
    layers: "layers.",
    grouped_queries: true,
    blocks: &[
        ATTENTION,
        BlockRule {
            block_type: BlockType::Ffn,
            modules: &["mlp."],
            parts: &[
                rows("gate", "mlp.gate_proj.weight"),
                rows("up", "mlp.up_proj.weight"),
                columns("down", "mlp.down_proj.weight"),
                bias("gate_bias", "mlp.gate_proj.bias"),
                bias("up_bias", "mlp.up_proj.bias"),
            ],
            unmoved: &["mlp.down_proj.bias"],
        },
    ],
    ..PLAIN
};

/// Query heads in groups, each with its key and value.
pub(super) const ATTENTION: BlockRule = BlockRule {
    block_type: BlockType::Attention,
    modules: &["self_attn."],
    parts: &[
        rows("query", "self_attn.q_proj.weight").per_member(),
        rows("key", "self_attn.k_proj.weight"),
        rows("value", "self_attn.v_proj.weight"),
        columns("output", "self_attn.o_proj.weight").per_member(),
        bias("query_bias", "self_attn.q_proj.bias").per_member(),
        bias("key_bias", "self_attn.k_proj.bias"),
        bias("value_bias", "self_attn.v_proj.bias"),
    ],
    // Qwen3's norms run over one head's width, with the same weights for every head.
    unmoved: &[
        "self_attn.o_proj.bias",
        "self_attn.q_norm.weight",
        "self_attn.k_norm.weight",
        "self_attn.rotary_emb.inv_freq",
    ],
};
