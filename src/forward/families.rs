//! The families as data: which tensors play which part, and how a layer is put together.

use super::attention::ProjectionLayout;
use super::operations::WeightLayout;

/// How a layer's two halves and their norms follow one another.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Arrangement {
    /// `x + f(norm(x))`, attention then feed-forward network.
    NormBefore,
    /// `norm(x + f(x))`, as in the first Transformer.
    NormAfter,
    /// `x + attention(norm(x)) + ffn(norm(x))`.
    Parallel,
}

/// Which norm.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum NormKind {
    /// Mean and variance, with a bias.
    Layer,
    /// Root mean square.
    RootMeanSquare,
}

/// Where queries, keys and values come from. Names are without `.weight`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Projections {
    /// A map for each.
    Split([&'static str; 3]),
    /// One map: of each head its query, key and value.
    PerHead(&'static str),
    /// One map: all queries, all keys, all values.
    Joined(&'static str),
}

impl Projections {
    /// Where they lie in what the maps give.
    pub(super) fn layout(self) -> ProjectionLayout {
        match self {
            Self::Split(_) => ProjectionLayout::Split,
            Self::PerHead(_) => ProjectionLayout::PerHead,
            Self::Joined(_) => ProjectionLayout::Joined,
        }
    }
}

/// What comes before the first layer. Names follow the model's prefix.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Embedding {
    /// Tokens.
    Tokens {
        tokens: &'static str,
        /// Learned positions, and the row of the first.
        positions: Option<(&'static str, usize)>,
        /// Its first row is added to every token.
        types: Option<&'static str>,
        norm: Option<&'static str>,
    },
    /// Patches of an image, a class token before them.
    Patches { projection: &'static str, class_token: &'static str, positions: &'static str },
}

/// One family.
#[derive(Clone, Copy, Debug)]
pub(super) struct Family {
    /// The `model_type`s of `config.json`.
    pub model_types: &'static [&'static str],
    /// How its `architecture` begins, where `config.json` is timm's; and the width of its heads, which no file says.
    pub architectures: &'static [(&'static str, usize)],
    /// Before a layer's number, after the model's prefix.
    pub layers: &'static str,
    pub arrangement: Arrangement,
    /// Tokens see those before them only.
    pub is_causal: bool,
    pub norm: NormKind,
    /// Key of the norm's epsilon, and the value where `config.json` leaves it out.
    pub epsilon: (&'static str, f64),
    pub attention_norm: &'static str,
    pub ffn_norm: &'static str,
    /// How the weights of a layer's linear maps lie.
    pub weights: WeightLayout,
    pub projections: Projections,
    pub attention_output: &'static str,
    pub gate: Option<&'static str>,
    pub up: &'static str,
    pub down: &'static str,
    /// Keys of the activation, the first that is there; and the value where none is.
    pub activation: (&'static [&'static str], &'static str),
    /// Share of a head that is rotated where `config.json` does not say; `None` without rotary positions.
    pub rotary_share: Option<f64>,
    pub embedding: Embedding,
    pub final_norm: Option<&'static str>,
    /// Output heads by their full names without `.weight`, the first that is there.
    pub heads: &'static [&'static str],
}

/// Every family.
pub(super) const FAMILIES: [Family; 7] = [BERT, GPT2, GPT_NEOX, LLAMA, OPT, VIT, VIT_TIMM];

const BERT: Family = Family {
    model_types: &["bert"],
    architectures: &[],
    layers: "encoder.layer.",
    arrangement: Arrangement::NormAfter,
    is_causal: false,
    norm: NormKind::Layer,
    epsilon: ("layer_norm_eps", 1e-12),
    attention_norm: "attention.output.LayerNorm",
    ffn_norm: "output.LayerNorm",
    weights: WeightLayout::OutputsFirst,
    projections: Projections::Split(["attention.self.query", "attention.self.key", "attention.self.value"]),
    attention_output: "attention.output.dense",
    gate: None,
    up: "intermediate.dense",
    down: "output.dense",
    activation: (&["hidden_act"], "gelu"),
    rotary_share: None,
    embedding: Embedding::Tokens {
        tokens: "embeddings.word_embeddings",
        positions: Some(("embeddings.position_embeddings", 0)),
        types: Some("embeddings.token_type_embeddings"),
        norm: Some("embeddings.LayerNorm"),
    },
    final_norm: None,
    heads: &[],
};

const GPT2: Family = Family {
    model_types: &["gpt2"],
    architectures: &[],
    layers: "h.",
    arrangement: Arrangement::NormBefore,
    is_causal: true,
    norm: NormKind::Layer,
    epsilon: ("layer_norm_epsilon", 1e-5),
    attention_norm: "ln_1",
    ffn_norm: "ln_2",
    weights: WeightLayout::InputsFirst,
    projections: Projections::Joined("attn.c_attn"),
    attention_output: "attn.c_proj",
    gate: None,
    up: "mlp.c_fc",
    down: "mlp.c_proj",
    activation: (&["activation_function"], "gelu_new"),
    rotary_share: None,
    embedding: Embedding::Tokens { tokens: "wte", positions: Some(("wpe", 0)), types: None, norm: None },
    final_norm: Some("ln_f"),
    heads: &["lm_head"],
};

const GPT_NEOX: Family = Family {
    model_types: &["gpt_neox"],
    architectures: &[],
    layers: "layers.",
    arrangement: Arrangement::Parallel,
    is_causal: true,
    norm: NormKind::Layer,
    epsilon: ("layer_norm_eps", 1e-5),
    attention_norm: "input_layernorm",
    ffn_norm: "post_attention_layernorm",
    weights: WeightLayout::OutputsFirst,
    projections: Projections::PerHead("attention.query_key_value"),
    attention_output: "attention.dense",
    gate: None,
    up: "mlp.dense_h_to_4h",
    down: "mlp.dense_4h_to_h",
    activation: (&["hidden_act"], "gelu"),
    rotary_share: Some(0.25),
    embedding: Embedding::Tokens { tokens: "embed_in", positions: None, types: None, norm: None },
    final_norm: Some("final_layer_norm"),
    heads: &["embed_out"],
};

const LLAMA: Family = Family {
    model_types: &["llama", "mistral", "qwen2"],
    architectures: &[],
    layers: "layers.",
    arrangement: Arrangement::NormBefore,
    is_causal: true,
    norm: NormKind::RootMeanSquare,
    epsilon: ("rms_norm_eps", 1e-6),
    attention_norm: "input_layernorm",
    ffn_norm: "post_attention_layernorm",
    weights: WeightLayout::OutputsFirst,
    projections: Projections::Split(["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"]),
    attention_output: "self_attn.o_proj",
    gate: Some("mlp.gate_proj"),
    up: "mlp.up_proj",
    down: "mlp.down_proj",
    activation: (&["hidden_act"], "silu"),
    rotary_share: Some(1.0),
    embedding: Embedding::Tokens { tokens: "embed_tokens", positions: None, types: None, norm: None },
    final_norm: Some("norm"),
    heads: &["lm_head"],
};

const OPT: Family = Family {
    model_types: &["opt"],
    architectures: &[],
    layers: "layers.",
    arrangement: Arrangement::NormBefore,
    is_causal: true,
    norm: NormKind::Layer,
    epsilon: ("layer_norm_eps", 1e-5),
    attention_norm: "self_attn_layer_norm",
    ffn_norm: "final_layer_norm",
    weights: WeightLayout::OutputsFirst,
    projections: Projections::Split(["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"]),
    attention_output: "self_attn.out_proj",
    gate: None,
    up: "fc1",
    down: "fc2",
    activation: (&["activation_function"], "relu"),
    rotary_share: None,
    // Positions are counted from 2 on.
    embedding: Embedding::Tokens {
        tokens: "embed_tokens",
        positions: Some(("embed_positions", 2)),
        types: None,
        norm: None,
    },
    final_norm: Some("final_layer_norm"),
    heads: &["lm_head"],
};

const VIT: Family = Family {
    model_types: &["vit", "deit"],
    architectures: &[],
    layers: "encoder.layer.",
    arrangement: Arrangement::NormBefore,
    is_causal: false,
    norm: NormKind::Layer,
    epsilon: ("layer_norm_eps", 1e-12),
    attention_norm: "layernorm_before",
    ffn_norm: "layernorm_after",
    weights: WeightLayout::OutputsFirst,
    projections: Projections::Split([
        "attention.attention.query",
        "attention.attention.key",
        "attention.attention.value",
    ]),
    attention_output: "attention.output.dense",
    gate: None,
    up: "intermediate.dense",
    down: "output.dense",
    activation: (&["hidden_act"], "gelu"),
    rotary_share: None,
    embedding: Embedding::Patches {
        projection: "embeddings.patch_embeddings.projection",
        class_token: "embeddings.cls_token",
        positions: "embeddings.position_embeddings",
    },
    final_norm: Some("layernorm"),
    heads: &["classifier"],
};

const VIT_TIMM: Family = Family {
    model_types: &[],
    architectures: &[
        ("vit_tiny_", 64),
        ("vit_small_", 64),
        ("vit_base_", 64),
        ("vit_large_", 64),
        ("deit_tiny_", 64),
        ("deit_small_", 64),
        ("deit_base_", 64),
    ],
    layers: "blocks.",
    arrangement: Arrangement::NormBefore,
    is_causal: false,
    norm: NormKind::Layer,
    epsilon: ("layer_norm_eps", 1e-6),
    attention_norm: "norm1",
    ffn_norm: "norm2",
    weights: WeightLayout::OutputsFirst,
    projections: Projections::Joined("attn.qkv"),
    attention_output: "attn.proj",
    gate: None,
    up: "mlp.fc1",
    down: "mlp.fc2",
    activation: (&["hidden_act"], "gelu"),
    rotary_share: None,
    embedding: Embedding::Patches { projection: "patch_embed.proj", class_token: "cls_token", positions: "pos_embed" },
    final_norm: Some("norm"),
    heads: &["head"],
};
