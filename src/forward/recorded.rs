//! One run of a model that gradients can be taken of.

use ndarray::Array2;

use super::inputs::Inputs;
use super::model::Transformer;
use super::pass::Pass;
use super::tape::{Rows, Tape};
pub use super::tape::Gradients;
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
            layers.push(pass.hidden().clone());
        }
        let outputs = pass.outputs(watch)?;
        Ok(Self { tape: pass.into_tape(), layers, outputs })
    }

    /// What each layer gave, `[tokens, hidden]`.
    pub fn layers(&self) -> impl ExactSizeIterator<Item = &Array2<f32>> {
        self.layers.iter().map(|rows| &**rows)
    }

    /// What the model says, as [`Pass::finish`] has it.
    pub fn outputs(&self) -> &Array2<f32> {
        &self.outputs
    }

    /// Gradients of the trained tensors, from those of what the layers and the whole model gave.
    pub fn gradients(self, of_layers: Vec<Array2<f32>>, of_outputs: Array2<f32>) -> Gradients {
        let layers = self.layers.iter().zip(of_layers);
        self.tape.gradients(layers.chain([(&self.outputs, of_outputs)]).collect())
    }
}
