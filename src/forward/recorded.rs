//! One run of a model that gradients can be taken of.

use ndarray::Array2;

use super::inputs::Inputs;
use super::model::Transformer;
use super::pass::Pass;
pub use super::tape::Gradients;
use super::tape::{Rows, Tape};
use super::{ForwardError, Weights};

/// A model's run: what its layers and the whole of it gave, and how.
pub struct Recorded {
    tape: Tape,
    layers: Vec<Rows>,
    outputs: Rows,
}

impl Recorded {
    /// Runs a model. What the gradients of the tensors that `is_trained` names need is kept.
    ///
    /// # Errors
    /// When the model does not take such inputs, or a tensor is missing or has a wrong shape.
    pub fn run(
        model: &Transformer,
        weights: &dyn Weights,
        inputs: &Inputs,
        is_trained: &(dyn Fn(&str) -> bool + Sync),
    ) -> Result<Self, ForwardError> {
        let watch = &mut |_: &[String], _: &Array2<f32>| ();
        let mut pass = Pass::kept(model, weights, inputs, is_trained, watch)?;
        let mut layers = Vec::with_capacity(model.layers);
        for _ in 0..model.layers {
            pass.layer(watch)?;
            layers.push(pass.hidden_rows().clone());
        }
        let outputs = pass.kept_outputs(watch)?;
        Ok(Self { tape: pass.into_tape(), layers, outputs })
    }

    /// What each layer gave, `[tokens, hidden]`.
    pub fn layers(&self) -> impl ExactSizeIterator<Item = &Array2<f32>> {
        self.layers.iter().map(|rows| &**rows)
    }

    /// What the model says, as `Pass::finish` has it.
    pub fn outputs(&self) -> &Array2<f32> {
        &self.outputs
    }

    /// Gradients of the trained tensors, from those of what the layers and the whole model gave.
    pub fn gradients(self, of_layers: Vec<Array2<f32>>, of_outputs: Array2<f32>) -> Gradients {
        let layers = self.layers.iter().zip(of_layers);
        self.tape.gradients(layers.chain([(&self.outputs, of_outputs)]).collect())
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use ndarray::Array4;

    use super::*;

    /// A model of random weights in memory.
    struct Model {
        config: &'static str,
        tensors: BTreeMap<String, (Vec<usize>, Vec<f32>)>,
    }

    impl Weights for Model {
        fn shape(&self, name: &str) -> Option<Vec<usize>> {
            self.tensors.get(name).map(|(shape, _)| shape.clone())
        }

        fn values(&self, name: &str) -> Option<Vec<f32>> {
            self.tensors.get(name).map(|(_, values)| values.clone())
        }

        fn names(&self) -> Vec<String> {
            self.tensors.keys().cloned().collect()
        }
    }

    const HIDDEN: usize = 8;
    const UNITS: usize = 12;
    const TOKENS: usize = 11;

    impl Model {
        /// Two layers. `N` in a name stands for a layer's number; `:module` for a weight and a bias.
        fn new(config: &'static str, shapes: &[(&str, &[usize])]) -> Self {
            let random = &mut fastrand::Rng::with_seed(1);
            let mut tensors = BTreeMap::new();
            for (name, shape) in shapes {
                for layer in 0..if name.contains(".N.") { 2 } else { 1 } {
                    let name = name.replace(".N.", &format!(".{layer}."));
                    let mut add = |name: String, shape: Vec<usize>| {
                        let around = if shape.len() == 1 { 1.0 } else { 0.0 };
                        let values = (0..shape.iter().product()).map(|_| around + 0.8 * (random.f32() - 0.5)).collect();
                        tensors.insert(name, (shape, values));
                    };
                    match name.strip_suffix(":module") {
                        Some(module) => {
                            add(format!("{module}.weight"), shape.to_vec());
                            add(format!("{module}.bias"), vec![shape[0]]);
                        }
                        None => add(name, shape.to_vec()),
                    }
                }
            }
            Self { config, tensors }
        }
    }

    fn tokens() -> Inputs {
        Inputs::Tokens(vec![vec![3, 1, 4, 1, 5], vec![9, 2, 6]])
    }

    /// Whether the gradient of every matrix says what moving it along a random direction does.
    fn assert_gradients(model: &Model, inputs: &Inputs) {
        let transformer = Transformer::new(model.config.as_bytes(), model).expect("a family runs it");
        let run = |weights: &Model, is_trained: &(dyn Fn(&str) -> bool + Sync)| {
            Recorded::run(&transformer, weights, inputs, is_trained).expect("it runs")
        };
        let is_matrix = |name: &str| model.tensors[name].0.len() > 1;
        let recorded = run(model, &is_matrix);
        let random = &mut fastrand::Rng::with_seed(2);
        let mut like = |rows: &Array2<f32>| Array2::from_shape_fn(rows.raw_dim(), |_| random.f32() - 0.5);
        let of_layers: Vec<Array2<f32>> = recorded.layers().map(&mut like).collect();
        let of_outputs = like(recorded.outputs());
        let value = |weights: &Model| -> f64 {
            let run = run(weights, &|_| false);
            let rows = run.layers().zip(&of_layers).chain([(run.outputs(), &of_outputs)]);
            rows.flat_map(|(rows, weights)| rows.iter().zip(weights)).map(|(&a, &b)| f64::from(a) * f64::from(b)).sum()
        };
        let gradients = recorded.gradients(of_layers.clone(), of_outputs.clone());
        for (name, gradient) in &gradients {
            let random = &mut fastrand::Rng::with_seed(3);
            let direction: Vec<f32> = gradient.iter().map(|_| random.f32() - 0.5).collect();
            let along: f64 = gradient.iter().zip(&direction).map(|(&a, &b)| f64::from(a) * f64::from(b)).sum();
            let moved = |by: f32| {
                let mut tensors = model.tensors.clone();
                let values = &mut tensors.get_mut(name).expect("it is trained").1;
                values.iter_mut().zip(&direction).for_each(|(value, direction)| *value += by * direction);
                value(&Model { config: model.config, tensors })
            };
            const STEP: f32 = 1.0 / 256.0;
            let expected = (moved(STEP) - moved(-STEP)) / f64::from(2.0 * STEP);
            assert!((along - expected).abs() < 0.02 * expected.abs() + 5e-3, "{name}: {along} and {expected}");
        }
        let matrices = model.tensors.keys().filter(|name| is_matrix(name));
        assert!(matrices.into_iter().all(|name| gradients.contains_key(name)), "{:?}", gradients.keys());
    }

    #[test]
    fn gradients_go_through_norms_before_gates_and_shared_keys() {
        let config = r#"{"model_type":"llama","hidden_size":8,"num_attention_heads":4,"num_key_value_heads":2,
            "num_hidden_layers":2}"#;
        let model = Model::new(
            config,
            &[
                ("model.embed_tokens.weight", &[TOKENS, HIDDEN]),
                ("model.layers.N.input_layernorm.weight", &[HIDDEN]),
                ("model.layers.N.self_attn.q_proj.weight", &[HIDDEN, HIDDEN]),
                ("model.layers.N.self_attn.k_proj.weight", &[HIDDEN / 2, HIDDEN]),
                ("model.layers.N.self_attn.v_proj.weight", &[HIDDEN / 2, HIDDEN]),
                ("model.layers.N.self_attn.o_proj.weight", &[HIDDEN, HIDDEN]),
                ("model.layers.N.post_attention_layernorm.weight", &[HIDDEN]),
                ("model.layers.N.mlp.gate_proj.weight", &[UNITS, HIDDEN]),
                ("model.layers.N.mlp.up_proj.weight", &[UNITS, HIDDEN]),
                ("model.layers.N.mlp.down_proj.weight", &[HIDDEN, UNITS]),
                ("model.norm.weight", &[HIDDEN]),
            ],
        );
        assert_gradients(&model, &tokens());
    }

    #[test]
    fn gradients_go_through_parallel_residuals_and_heads_that_lie_together() {
        let config = r#"{"model_type":"gpt_neox","hidden_size":8,"num_attention_heads":2,"num_hidden_layers":2,
            "rotary_pct":0.5}"#;
        let model = Model::new(
            config,
            &[
                ("gpt_neox.embed_in.weight", &[TOKENS, HIDDEN]),
                ("gpt_neox.layers.N.input_layernorm:module", &[HIDDEN]),
                ("gpt_neox.layers.N.post_attention_layernorm:module", &[HIDDEN]),
                ("gpt_neox.layers.N.attention.query_key_value:module", &[3 * HIDDEN, HIDDEN]),
                ("gpt_neox.layers.N.attention.dense:module", &[HIDDEN, HIDDEN]),
                ("gpt_neox.layers.N.mlp.dense_h_to_4h:module", &[UNITS, HIDDEN]),
                ("gpt_neox.layers.N.mlp.dense_4h_to_h:module", &[HIDDEN, UNITS]),
                ("gpt_neox.final_layer_norm:module", &[HIDDEN]),
                ("embed_out.weight", &[TOKENS, HIDDEN]),
            ],
        );
        assert_gradients(&model, &tokens());
    }

    #[test]
    fn gradients_go_through_norms_after_and_what_is_added_to_tokens() {
        let config = r#"{"model_type":"bert","hidden_size":8,"num_attention_heads":2,"num_hidden_layers":2}"#;
        let model = Model::new(
            config,
            &[
                ("embeddings.word_embeddings.weight", &[TOKENS, HIDDEN]),
                ("embeddings.position_embeddings.weight", &[6, HIDDEN]),
                ("embeddings.token_type_embeddings.weight", &[2, HIDDEN]),
                ("embeddings.LayerNorm:module", &[HIDDEN]),
                ("encoder.layer.N.attention.self.query:module", &[HIDDEN, HIDDEN]),
                ("encoder.layer.N.attention.self.key:module", &[HIDDEN, HIDDEN]),
                ("encoder.layer.N.attention.self.value:module", &[HIDDEN, HIDDEN]),
                ("encoder.layer.N.attention.output.dense:module", &[HIDDEN, HIDDEN]),
                ("encoder.layer.N.attention.output.LayerNorm:module", &[HIDDEN]),
                ("encoder.layer.N.intermediate.dense:module", &[UNITS, HIDDEN]),
                ("encoder.layer.N.output.dense:module", &[HIDDEN, UNITS]),
                ("encoder.layer.N.output.LayerNorm:module", &[HIDDEN]),
            ],
        );
        assert_gradients(&model, &tokens());
    }

    #[test]
    fn gradients_go_through_weights_that_lie_inputs_first() {
        let config = r#"{"model_type":"gpt2","n_embd":8,"n_head":2,"n_layer":2}"#;
        let model = Model::new(
            config,
            &[
                ("transformer.wte.weight", &[TOKENS, HIDDEN]),
                ("transformer.wpe.weight", &[6, HIDDEN]),
                ("transformer.h.N.ln_1:module", &[HIDDEN]),
                ("transformer.h.N.attn.c_attn.weight", &[HIDDEN, 3 * HIDDEN]),
                ("transformer.h.N.attn.c_attn.bias", &[3 * HIDDEN]),
                ("transformer.h.N.attn.c_proj:module", &[HIDDEN, HIDDEN]),
                ("transformer.h.N.ln_2:module", &[HIDDEN]),
                ("transformer.h.N.mlp.c_fc.weight", &[HIDDEN, UNITS]),
                ("transformer.h.N.mlp.c_fc.bias", &[UNITS]),
                ("transformer.h.N.mlp.c_proj.weight", &[UNITS, HIDDEN]),
                ("transformer.h.N.mlp.c_proj.bias", &[HIDDEN]),
                ("transformer.ln_f:module", &[HIDDEN]),
            ],
        );
        assert_gradients(&model, &tokens());
    }

    #[test]
    fn gradients_go_through_patches_and_class_tokens() {
        let config = r#"{"model_type":"vit","hidden_size":8,"num_attention_heads":2,"num_hidden_layers":2}"#;
        let model = Model::new(
            config,
            &[
                ("vit.embeddings.cls_token", &[1, 1, HIDDEN]),
                ("vit.embeddings.position_embeddings", &[1, 5, HIDDEN]),
                ("vit.embeddings.patch_embeddings.projection:module", &[HIDDEN, 3, 2, 2]),
                ("vit.encoder.layer.N.layernorm_before:module", &[HIDDEN]),
                ("vit.encoder.layer.N.attention.attention.query:module", &[HIDDEN, HIDDEN]),
                ("vit.encoder.layer.N.attention.attention.key:module", &[HIDDEN, HIDDEN]),
                ("vit.encoder.layer.N.attention.attention.value:module", &[HIDDEN, HIDDEN]),
                ("vit.encoder.layer.N.attention.output.dense:module", &[HIDDEN, HIDDEN]),
                ("vit.encoder.layer.N.layernorm_after:module", &[HIDDEN]),
                ("vit.encoder.layer.N.intermediate.dense:module", &[UNITS, HIDDEN]),
                ("vit.encoder.layer.N.output.dense:module", &[HIDDEN, UNITS]),
                ("vit.layernorm:module", &[HIDDEN]),
                ("classifier:module", &[10, HIDDEN]),
            ],
        );
        let random = &mut fastrand::Rng::with_seed(4);
        assert_gradients(&model, &Inputs::Images(Array4::from_shape_fn((2, 3, 4, 4), |_| random.f32() - 0.5)));
    }
}
