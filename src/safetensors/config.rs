//! The model description beside a checkpoint (`config.json`): hints for alignment, never needed to decode.

use super::{MAX_HEADER_BYTES, SafetensorsError};

/// What alignment wants to know of a model, as far as its `config.json` says it.
///
/// A field of the wrong type counts as absent: the description is a hint, and a checkpoint packs without it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ModelConfig {
    /// `model_type` of Hugging Face, for example `gpt_neox`.
    pub model_type: Option<String>,
    /// `architecture` of timm, for example `vit_tiny_patch16_224`.
    pub timm_architecture: Option<String>,
    /// Attention heads per layer: `num_attention_heads`, `n_head` (GPT-2) or `num_heads` (timm).
    pub attention_heads: Option<u32>,
    /// Heads that keys and values have, where fewer than the queries' (GQA, MQA): `num_key_value_heads`.
    pub key_value_heads: Option<u32>,
    /// Width of a head where it is not the hidden width over the heads: `head_dim`.
    pub head_width: Option<u32>,
}

impl ModelConfig {
    /// Reads a `config.json`.
    ///
    /// # Errors
    /// When it is not a JSON object.
    pub fn parse(bytes: &[u8]) -> Result<Self, SafetensorsError> {
        if bytes.len() as u64 > MAX_HEADER_BYTES {
            let length = bytes.len() as u64;
            return Err(SafetensorsError::TooLong { field: "config.json", length, limit: MAX_HEADER_BYTES });
        }
        let object: serde_json::Map<String, serde_json::Value> =
            serde_json::from_slice(bytes).map_err(|source| SafetensorsError::Json { what: "config.json", source })?;
        let text = |key: &str| object.get(key)?.as_str().map(str::to_owned);
        let count = |key: &str| object.get(key)?.as_u64().and_then(|value| u32::try_from(value).ok());
        Ok(Self {
            model_type: text("model_type"),
            timm_architecture: text("architecture"),
            attention_heads: count("num_attention_heads").or_else(|| count("n_head")).or_else(|| count("num_heads")),
            key_value_heads: count("num_key_value_heads"),
            head_width: count("head_dim"),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_of_the_wrong_type_count_as_absent() {
        let json = br#"{"model_type":7,"num_attention_heads":"8","num_key_value_heads":-1,"n_head":12,"head_dim":1e3}"#;
        let config = ModelConfig::parse(json).unwrap();
        assert_eq!(config, ModelConfig { attention_heads: Some(12), ..ModelConfig::default() });
        ModelConfig::parse(b"[]").unwrap_err();
    }
}
