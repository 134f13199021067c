//! A transformer as its family and its `config.json` describe it.

use serde_json::{Map, Value};

use super::attention::Attention;
use super::families::{Arrangement, Embedding, FAMILIES, Family, NormKind, Projections};
use super::operations::Activation;
use super::rotary::{Rotary, RotaryScaling};
use super::{ForwardError, Weights};

/// Endings of tensors that change what a model computes in ways that no family here knows.
const UNKNOWN_TENSORS: [&str; 11] = [
    "q_norm.weight",
    "project_in.weight",
    "g_idx",
    "qweight",
    "norm_pre.weight",
    "fc_norm.weight",
    "reg_token",
    "dist_token",
    "distillation_token",
    "ls1.gamma",
    "attn_pool.latent",
];

/// Fields of `config.json` that change what a model computes, and the value that is known.
const KNOWN_FLAGS: [(&str, bool); 4] = [
    ("do_layer_norm_before", true),
    ("scale_attn_weights", true),
    ("scale_attn_by_inverse_layer_idx", false),
    ("add_cross_attention", false),
];

/// Layers that tensors have the numbers of.
fn count_layers(names: &[String], prefix: &str) -> usize {
    let number = |name: &String| name.strip_prefix(prefix)?.split_once('.')?.0.parse::<usize>().ok();
    let numbers: std::collections::BTreeSet<usize> = names.iter().filter_map(number).collect();
    (0..).take_while(|layer| numbers.contains(layer)).count()
}

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
    /// Side of a patch in pixels, as its projection has it; 0 where there is none.
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
    /// scaling, norms on queries, projected embeddings, class tokens for distillation.
    pub fn new(config_json: &[u8], weights: &dyn Weights) -> Result<Self, ForwardError> {
        let config = Config::parse(config_json)?;
        let (family, head_width) = config.family()?;
        let names = weights.names();
        let first_output = format!("{}0.{}.weight", family.layers, family.attention_output);
        let missing = || ForwardError::Tensor {
            tensor: first_output.clone(),
            found: "no tensor of this name".into(),
            expected: "one, as in every model of this family".into(),
        };
        let prefix = names.iter().find_map(|name| name.strip_suffix(&first_output)).ok_or_else(missing)?.to_owned();
        if let Some(name) = names.iter().find(|name| UNKNOWN_TENSORS.iter().any(|unknown| name.ends_with(unknown))) {
            let expected = "a model without such a tensor".into();
            return Err(ForwardError::Unsupported { what: name.clone(), expected });
        }
        for (field, known) in KNOWN_FLAGS {
            if config.flag(field) == Some(!known) {
                let what = format!("{field} {}", !known);
                return Err(ForwardError::Unsupported { what, expected: known.to_string() });
            }
        }
        let layer_prefix = format!("{prefix}{}", family.layers);
        let output = weights.shape(&format!("{prefix}{first_output}")).unwrap_or_default();
        let (hidden, heads, layers) = match head_width {
            None => (
                config.count(&["hidden_size", "n_embd"])?,
                config.count(&["num_attention_heads", "n_head"])?,
                config.count(&["num_hidden_layers", "n_layer"])?,
            ),
            // The shapes say the rest.
            Some(width) => {
                let hidden = output.first().copied().unwrap_or(0);
                (hidden, (hidden / width).max(1), count_layers(&names, &layer_prefix))
            }
        };
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
                layout: family.projections.layout(),
            },
            activation,
            epsilon: config.number(family.epsilon.0).unwrap_or(family.epsilon.1) as f32,
            patch: match family.embedding {
                Embedding::Patches { projection, .. } => {
                    let shape = weights.shape(&format!("{prefix}{projection}.weight")).unwrap_or_default();
                    shape.get(2).copied().unwrap_or(0)
                }
                Embedding::Tokens { .. } => 0,
            },
            layers,
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

    /// The output head, without `.weight`: its own, or the embedding of a language model that has none; `None` where the model
    /// says hidden states.
    pub fn head(&self, weights: &dyn Weights) -> Option<String> {
        let exists = |name: &&&str| weights.shape(&format!("{name}.weight")).is_some();
        match (self.family.heads.iter().find(exists), self.family.embedding) {
            (Some(head), _) => Some((*head).to_owned()),
            (None, Embedding::Tokens { tokens, .. }) if self.is_causal() => Some(format!("{}{tokens}", self.prefix)),
            _ => None,
        }
    }

    /// Whether it has an output head that is not its embedding.
    pub(super) fn has_own_head(&self, head: &str) -> bool {
        self.family.heads.contains(&head)
    }

    /// Names of the projections, without `.weight`.
    pub(super) fn projections(&self, layer: usize) -> Vec<String> {
        let names: &[&str] = match &self.family.projections {
            Projections::Split(names) => names,
            Projections::PerHead(name) | Projections::Joined(name) => std::slice::from_ref(name),
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

    /// The family, and the width of its heads where this file does not tell their number.
    fn family(&self) -> Result<(&'static Family, Option<usize>), ForwardError> {
        if let Some(architecture) = self.text("architecture") {
            let known =
                FAMILIES.iter().flat_map(|family| family.architectures.iter().map(move |known| (family, known)));
            let known: Vec<_> = known.collect();
            let found = known.iter().find(|(_, (beginning, _))| architecture.starts_with(beginning));
            return found.map(|&(family, &(_, width))| (family, Some(width))).ok_or_else(|| {
                let known: Vec<&str> = known.iter().map(|&(_, &(beginning, _))| beginning).collect();
                let what = format!("architecture {architecture:?}");
                ForwardError::Unsupported { what, expected: format!("one that begins with {}", known.join(", ")) }
            });
        }
        let model_type = self.text("model_type").unwrap_or("");
        let found = FAMILIES.iter().find(|family| family.model_types.contains(&model_type));
        found.map(|family| (family, None)).ok_or_else(|| {
            let known: Vec<&str> = FAMILIES.iter().flat_map(|family| family.model_types).copied().collect();
            ForwardError::Unsupported { what: format!("model_type {model_type:?}"), expected: known.join(", ") }
        })
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
        let number = |key: &str| parameters.get(key).and_then(Value::as_f64).or_else(|| self.number(key));
        let scaling = |key: &'static str| {
            let found = parameters.get(key).and_then(Value::as_f64).filter(|value| *value > 0.0);
            found.ok_or(ForwardError::Config { field: key, problem: "absent, expected a positive number".into() })
        };
        let kind = parameters.get("rope_type").or_else(|| parameters.get("type")).and_then(Value::as_str);
        let scaling = match kind {
            None | Some("default") => RotaryScaling::None,
            Some("linear") => RotaryScaling::Linear(scaling("factor")?),
            Some("llama3") => RotaryScaling::Llama3 {
                factor: scaling("factor")?,
                slow: scaling("low_freq_factor")?,
                fast: scaling("high_freq_factor")?,
                positions: scaling("original_max_position_embeddings")?,
            },
            Some(kind) => {
                let expected = "default, linear or llama3".into();
                return Err(ForwardError::Unsupported { what: format!("rotary positions of type {kind:?}"), expected });
            }
        };
        let share = number("partial_rotary_factor").or_else(|| number("rotary_pct")).unwrap_or(default_share);
        let base = number("rope_theta").or_else(|| number("rotary_emb_base")).unwrap_or(10_000.0);
        let rotated = (width as f64 * share) as usize;
        if !rotated.is_multiple_of(2) || rotated > width {
            let problem = format!("{rotated} of {width} elements, expected an even number of them");
            return Err(ForwardError::Config { field: "partial_rotary_factor", problem });
        }
        Ok(Some(Rotary { width: rotated, base, scaling }))
    }
}
