//! A transformer as its family and its `config.json` describe it.

use serde_json::{Map, Value};

use super::attention::Attention;
use super::families::{Arrangement, Embedding, FAMILIES, Family, NormKind, Projections};
use super::operations::{Activation, Rotary};
use super::{ForwardError, Weights};

/// A transformer that can be run.
#[derive(Debug)]
pub struct Transformer {
    pub(super) family: &'static Family,
    /// Before every name: `bert.`, `model.`, nothing.
    pub(super) prefix: String,
    pub(super) arrangement: Arrangement,
    pub(super) attention: Attention,
    pub(super) activation: Activation,
    pub(super) epsilon: f32,
    pub(super) patch: usize,
    /// Layers.
    pub layers: usize,
    /// Most tokens of a sequence, where positions are learned.
    pub positions: Option<usize>,
}

impl Transformer {
    /// Reads `config_json`, the `config.json` of a checkpoint with these weights.
    ///
    /// # Errors
    /// When no family has this `model_type`, or the model has what its family does not know: another kind of rotary
    /// scaling, norms on queries, projected embeddings.
    pub fn new(config_json: &[u8], weights: &dyn Weights) -> Result<Self, ForwardError> {
        let config = Config::parse(config_json)?;
        let model_type = config.text("model_type").unwrap_or("");
        let family = FAMILIES.iter().find(|family| family.model_types.contains(&model_type)).ok_or_else(|| {
            let known: Vec<&str> = FAMILIES.iter().flat_map(|family| family.model_types).copied().collect();
            ForwardError::Unsupported { what: format!("model_type {model_type:?}"), expected: known.join(", ") }
        })?;
        let names = weights.names();
        let first_output = format!("{}0.{}.weight", family.layers, family.attention_output);
        let missing = || ForwardError::Tensor {
            tensor: first_output.clone(),
            found: "no tensor of this name".into(),
            expected: format!("one, as in every {model_type} model"),
        };
        let prefix = names.iter().find_map(|name| name.strip_suffix(&first_output)).ok_or_else(missing)?.to_owned();
        for unknown in ["q_norm.weight", "project_in.weight", "g_idx", "qweight"] {
            if let Some(name) = names.iter().find(|name| name.ends_with(unknown)) {
                let expected = "a model without such a tensor".into();
                return Err(ForwardError::Unsupported { what: name.clone(), expected });
            }
        }
        if config.flag("do_layer_norm_before") == Some(false) {
            let expected = "norms before".into();
            return Err(ForwardError::Unsupported { what: "do_layer_norm_before false".into(), expected });
        }
        let heads = config.count(&["num_attention_heads"])?;
        let hidden = config.count(&["hidden_size"])?;
        let width = config.optional_count("head_dim").unwrap_or(hidden / heads);
        let key_value_heads = config.optional_count("num_key_value_heads").unwrap_or(heads);
        if !heads.is_multiple_of(key_value_heads) || width == 0 {
            let problem = format!("{key_value_heads} for {heads} heads of {width}, expected a divisor");
            return Err(ForwardError::Config { field: "num_key_value_heads", problem });
        }
        let name = family.activation.0.iter().find_map(|key| config.text(key)).unwrap_or(family.activation.1);
        let activation = Activation::from_name(name).ok_or_else(|| ForwardError::Unsupported {
            what: format!("activation {name:?}"),
            expected: "gelu, gelu_new, silu or relu".into(),
        })?;
        let is_parallel = config.flag("use_parallel_residual").unwrap_or(true);
        let arrangement = match family.arrangement {
            Arrangement::Parallel if !is_parallel => Arrangement::NormBefore,
            arrangement => arrangement,
        };
        let window =
            config.optional_count("sliding_window").filter(|_| config.flag("use_sliding_window") != Some(false));
        let positions = match family.embedding {
            Embedding::Tokens { positions: Some((name, first)), .. } => {
                let shape = weights.shape(&format!("{prefix}{name}.weight"));
                shape.and_then(|shape| shape.first()?.checked_sub(first))
            }
            _ => None,
        };
        Ok(Self {
            family,
            arrangement,
            attention: Attention {
                heads,
                key_value_heads,
                width,
                rotary: config.rotary(family, width)?,
                is_causal: family.is_causal,
                window,
            },
            activation,
            epsilon: config.number(family.epsilon.0).unwrap_or(family.epsilon.1) as f32,
            patch: config.optional_count("patch_size").unwrap_or(0),
            layers: config.count(&["num_hidden_layers"])?,
            positions,
            prefix,
        })
    }

    /// Whether it takes images, tokens otherwise.
    pub fn takes_images(&self) -> bool {
        matches!(self.family.embedding, Embedding::Patches { .. })
    }

    /// Whether tokens see those before them only.
    pub fn is_causal(&self) -> bool {
        self.family.is_causal
    }

    /// Whether it has root-mean-square norms.
    pub(super) fn has_norm_bias(&self) -> bool {
        self.family.norm == NormKind::Layer
    }

    /// A tensor of a layer, by its name after the layer's number.
    pub(super) fn in_layer(&self, layer: usize, name: &str) -> String {
        format!("{}{}{layer}.{name}", self.prefix, self.family.layers)
    }

    /// Names of the projections, without `.weight`.
    pub(super) fn projections(&self, layer: usize) -> Vec<String> {
        let names: &[&str] = match &self.family.projections {
            Projections::Split(names) => names,
            Projections::PerHead(name) => std::slice::from_ref(name),
        };
        names.iter().map(|name| self.in_layer(layer, name)).collect()
    }
}

/// A `config.json`.
struct Config(Map<String, Value>);

impl Config {
    fn parse(bytes: &[u8]) -> Result<Self, ForwardError> {
        let parsed = serde_json::from_slice(bytes);
        parsed.map(Self).map_err(|error| ForwardError::Config { field: "the file", problem: error.to_string() })
    }

    fn text(&self, key: &str) -> Option<&str> {
        self.0.get(key)?.as_str()
    }

    fn flag(&self, key: &str) -> Option<bool> {
        self.0.get(key)?.as_bool()
    }

    fn number(&self, key: &str) -> Option<f64> {
        self.0.get(key)?.as_f64()
    }

    fn optional_count(&self, key: &str) -> Option<usize> {
        usize::try_from(self.0.get(key)?.as_u64()?).ok().filter(|&count| count > 0)
    }

    fn count(&self, keys: &[&'static str]) -> Result<usize, ForwardError> {
        let found = keys.iter().find_map(|key| self.optional_count(key));
        found.ok_or_else(|| {
            let given = keys.iter().find_map(|key| self.0.get(*key));
            let given = given.map_or("absent".into(), Value::to_string);
            ForwardError::Config { field: keys[0], problem: format!("{given}, expected a positive number") }
        })
    }

    /// Rotary positions. Since version 5 transformers writes them into an object of their own.
    fn rotary(&self, family: &Family, width: usize) -> Result<Option<Rotary>, ForwardError> {
        let Some(default_share) = family.rotary_share else { return Ok(None) };
        let empty = Map::new();
        let object = |key: &str| self.0.get(key).and_then(Value::as_object);
        let parameters = object("rope_parameters").or_else(|| object("rope_scaling")).unwrap_or(&empty);
        let kind = parameters.get("rope_type").or_else(|| parameters.get("type")).and_then(Value::as_str);
        if let Some(kind) = kind.filter(|&kind| kind != "default") {
            let expected = "unscaled ones".into();
            return Err(ForwardError::Unsupported { what: format!("rotary positions of type {kind:?}"), expected });
        }
        let number = |key: &str| parameters.get(key).and_then(Value::as_f64).or_else(|| self.number(key));
        let share = number("partial_rotary_factor").or_else(|| number("rotary_pct")).unwrap_or(default_share);
        let base = number("rope_theta").or_else(|| number("rotary_emb_base")).unwrap_or(10_000.0);
        let rotated = (width as f64 * share) as usize;
        if !rotated.is_multiple_of(2) || rotated > width {
            let problem = format!("{rotated} of {width} elements, expected an even number of them");
            return Err(ForwardError::Config { field: "partial_rotary_factor", problem });
        }
        Ok(Some(Rotary { width: rotated, base }))
    }
}
