//! Running a model layer by layer, watched.

use std::ops::Range;
use std::sync::Arc;

use ndarray::{Array1, Array2, s};

use super::families::{Arrangement, Embedding};
use super::inputs::Inputs;
use super::model::Transformer;
use super::operations::{Norm, WeightLayout, linear};
use super::tape::{Rows, Tape};
use super::{ForwardError, Weights};

/// Told what linear maps are multiplied with: the names of the tensors that share these inputs, and the inputs,
/// `[tokens, inputs]`. Of weights that lie `[inputs, outputs]` nothing is told: their rows are not what an output sums.
pub type Watch<'a> = dyn FnMut(&[String], &Array2<f32>) + 'a;

/// A model on its way through its layers.
#[derive(Clone)]
pub struct Pass<'a> {
    model: &'a Transformer,
    weights: &'a dyn Weights,
    /// Which tensors gradients are wanted of.
    is_trained: &'a (dyn Fn(&str) -> bool + Sync),
    tape: Tape,
    /// `[tokens, hidden]` of all sequences, one after another.
    hidden: Rows,
    sequences: Arc<[Range<usize>]>,
    next_layer: usize,
}

impl<'a> Pass<'a> {
    /// Embeds the inputs.
    ///
    /// # Errors
    /// When the model does not take such inputs, or a tensor is missing.
    pub fn new(
        model: &'a Transformer,
        weights: &'a dyn Weights,
        inputs: &Inputs,
        watch: &mut Watch<'_>,
    ) -> Result<Self, ForwardError> {
        Self::kept(model, weights, inputs, &|_| false, watch)
    }

    /// The same, with what the gradients of trained tensors need kept on a tape.
    pub(super) fn kept(
        model: &'a Transformer,
        weights: &'a dyn Weights,
        inputs: &Inputs,
        is_trained: &'a (dyn Fn(&str) -> bool + Sync),
        watch: &mut Watch<'_>,
    ) -> Result<Self, ForwardError> {
        let mut pass = Self {
            model,
            weights,
            is_trained,
            tape: Tape::default(),
            hidden: Rows::constant(Array2::zeros((0, 0))),
            sequences: Arc::new([]),
            next_layer: 0,
        };
        match (model.family.embedding, inputs) {
            (Embedding::Tokens { tokens, positions, types, norm }, Inputs::Tokens(sequences)) => {
                pass.embed_tokens(sequences, tokens, positions, types)?;
                if let Some(norm) = norm {
                    pass.hidden = pass.normed(&pass.hidden.clone(), &pass.full(norm))?;
                }
            }
            (Embedding::Patches { projection, class_token, positions }, Inputs::Images(_)) => {
                let names = [projection, class_token, positions].map(|name| pass.full(name));
                pass.embed_patches(inputs, &names, watch)?;
            }
            _ => return Err(pass.wrong_inputs(inputs)),
        }
        Ok(pass)
    }

    /// The layer that comes next.
    pub fn next_layer(&self) -> usize {
        self.next_layer
    }

    /// What the last layer gave, or the embedding.
    pub(super) fn hidden_rows(&self) -> &Rows {
        &self.hidden
    }

    /// Runs the next layer.
    ///
    /// # Errors
    /// When a tensor is missing or has a wrong shape.
    ///
    /// # Panics
    /// When all layers have run.
    pub fn layer(&mut self, watch: &mut Watch<'_>) -> Result<(), ForwardError> {
        assert!(self.next_layer < self.model.layers, "there is a layer left");
        let (model, layer) = (self.model, self.next_layer);
        let attention_norm = model.in_layer(layer, model.family.attention_norm);
        let ffn_norm = model.in_layer(layer, model.family.ffn_norm);
        let inputs = self.take_hidden();
        self.hidden = match model.arrangement {
            Arrangement::NormBefore => {
                let normed = self.normed(&inputs, &attention_norm)?;
                let attended = self.attend(&normed, watch)?;
                let between = self.tape.sum(attended, &inputs);
                drop(inputs);
                let normed = self.normed(&between, &ffn_norm)?;
                let fed = self.feed_forward(&normed, watch)?;
                self.tape.sum(fed, &between)
            }
            Arrangement::NormAfter => {
                let attended = self.attend(&inputs, watch)?;
                let sum = self.tape.sum(attended, &inputs);
                drop(inputs);
                let between = self.normed(&sum, &attention_norm)?;
                let fed = self.feed_forward(&between, watch)?;
                let sum = self.tape.sum(fed, &between);
                self.normed(&sum, &ffn_norm)?
            }
            Arrangement::Parallel => {
                let normed = self.normed(&inputs, &attention_norm)?;
                let attended = self.attend(&normed, watch)?;
                let normed = self.normed(&inputs, &ffn_norm)?;
                let fed = self.feed_forward(&normed, watch)?;
                let sum = self.tape.sum(attended, &inputs);
                self.tape.sum(sum, &fed)
            }
        };
        self.next_layer += 1;
        Ok(())
    }

    /// The hidden states as they are now, `[tokens, hidden]`.
    pub fn hidden(&self) -> &Array2<f32> {
        &self.hidden
    }

    /// The rows of each sequence in the hidden states.
    pub fn sequences(&self) -> &[Range<usize>] {
        &self.sequences
    }

    /// What the model says once all layers have run: what its head gives, of every token, or of the class token where it
    /// classifies images; without a head the last hidden states.
    ///
    /// # Errors
    /// When a tensor is missing or has a wrong shape.
    pub fn finish(self, watch: &mut Watch<'_>) -> Result<Array2<f32>, ForwardError> {
        self.outputs(watch).map(|outputs| outputs.rows(0..outputs.count()))
    }

    /// The same, row by row when they are asked for: all at once may be more than memory holds.
    ///
    /// # Errors
    /// When a tensor is missing or has a wrong shape.
    pub fn outputs(mut self, watch: &mut Watch<'_>) -> Result<Outputs, ForwardError> {
        let (hidden, head) = self.last(watch)?;
        Ok(Outputs { hidden, head })
    }

    /// The same on the tape, which stays.
    pub(super) fn kept_outputs(&mut self, watch: &mut Watch<'_>) -> Result<Rows, ForwardError> {
        Ok(match self.last(watch)? {
            (hidden, Some(head)) => self.tape.linear(&hidden, &head.weight, head.layout, head.bias.as_ref()),
            (hidden, None) => hidden,
        })
    }

    /// The last hidden states, and the head that they go through.
    fn last(&mut self, watch: &mut Watch<'_>) -> Result<(Rows, Option<Linear>), ForwardError> {
        let mut hidden = self.take_hidden();
        if let Some(norm) = self.model.family.final_norm {
            hidden = self.normed(&hidden, &self.full(norm))?;
        }
        if self.model.takes_images() {
            let class_tokens = self.sequences.iter().map(|sequence| Some(sequence.start)).collect();
            hidden = self.tape.picked(&hidden, class_tokens);
        }
        let Some(head) = self.model.head(self.weights) else { return Ok((hidden, None)) };
        if self.model.has_own_head(&head) {
            watch(&[format!("{head}.weight")], &hidden);
        }
        let head = self.map(&head, WeightLayout::OutputsFirst, &hidden, None)?;
        Ok((hidden, Some(head)))
    }

    /// The tape, once nothing more is to run.
    pub(super) fn into_tape(self) -> Tape {
        self.tape
    }

    fn take_hidden(&mut self) -> Rows {
        std::mem::replace(&mut self.hidden, Rows::constant(Array2::zeros((0, 0))))
    }

    fn attend(&mut self, inputs: &Rows, watch: &mut Watch<'_>) -> Result<Rows, ForwardError> {
        let (model, layer) = (self.model, self.next_layer);
        let names = model.projections(layer);
        self.tell(watch, &names, inputs);
        let projected = (names.iter().zip(model.attention.projected_columns()))
            .map(|(name, columns)| self.linear(name, model.family.weights, inputs, Some(columns)))
            .collect::<Result<Vec<Rows>, ForwardError>>()?;
        let gathered = self.tape.attention(model.attention, projected, &self.sequences);
        let output = model.in_layer(layer, model.family.attention_output);
        self.tell(watch, std::slice::from_ref(&output), &gathered);
        self.linear(&output, model.family.weights, &gathered, Some(inputs.ncols()))
    }

    fn feed_forward(&mut self, inputs: &Rows, watch: &mut Watch<'_>) -> Result<Rows, ForwardError> {
        let (model, layer) = (self.model, self.next_layer);
        let (layout, activation) = (model.family.weights, model.activation);
        let name = |name| model.in_layer(layer, name);
        let (up, gate, down) = (name(model.family.up), model.family.gate.map(name), name(model.family.down));
        let sharing: Vec<String> = gate.iter().chain([&up]).cloned().collect();
        self.tell(watch, &sharing, inputs);
        let mut units = self.linear(&up, layout, inputs, None)?;
        units = match &gate {
            Some(gate) => {
                let gates = self.linear(gate, layout, inputs, Some(units.ncols()))?;
                let gates = self.tape.activation(gates, activation);
                self.tape.product(units, &gates)
            }
            None => self.tape.activation(units, activation),
        };
        self.tell(watch, std::slice::from_ref(&down), &units);
        self.linear(&down, layout, &units, Some(inputs.ncols()))
    }

    /// Tells of a layer's inputs.
    fn tell(&self, watch: &mut Watch<'_>, names: &[String], inputs: &Array2<f32>) {
        if self.model.family.weights == WeightLayout::OutputsFirst {
            let names: Vec<String> = names.iter().map(|name| format!("{name}.weight")).collect();
            watch(&names, inputs);
        }
    }

    fn embed_tokens(
        &mut self,
        sequences: &[Vec<u32>],
        tokens: &str,
        positions: Option<(&str, usize)>,
        types: Option<&str>,
    ) -> Result<(), ForwardError> {
        let table = self.matrix(&format!("{}.weight", self.full(tokens)))?;
        let mut ends = 0..0;
        self.sequences = (sequences.iter())
            .map(|sequence| {
                ends = ends.end..ends.end + sequence.len();
                ends.clone()
            })
            .collect();
        let all = || sequences.iter().flat_map(|sequence| sequence.iter().copied().enumerate());
        let refused = |position: usize, token: u32, expected: String| ForwardError::Inputs {
            found: format!("token {token} at position {position}"),
            expected,
        };
        if let Some((position, token)) = all().find(|&(_, token)| token as usize >= table.nrows()) {
            return Err(refused(position, token, format!("one of {} tokens", table.nrows())));
        }
        self.hidden = self.tape.picked(&table, all().map(|(_, token)| Some(token as usize)).collect());
        let beside = |pass: &mut Self, name: &str| {
            let name = format!("{}.weight", pass.full(name));
            let matrix = pass.matrix(&name)?;
            let fits = matrix.ncols() == table.ncols() && matrix.nrows() > 0;
            let expected = || format!("{} columns", table.ncols());
            if fits { Ok(matrix) } else { Err(wrong_shape(&name, matrix.shape(), expected())) }
        };
        if let Some((name, first)) = positions {
            let positions = beside(self, name)?;
            if let Some((position, token)) = all().find(|&(position, _)| position + first >= positions.nrows()) {
                let most = positions.nrows().saturating_sub(first);
                return Err(refused(position, token, format!("at most {most} tokens a sequence")));
            }
            let picked = self.tape.picked(&positions, all().map(|(position, _)| Some(position + first)).collect());
            self.hidden = self.tape.sum(picked, &self.hidden);
        }
        if let Some(name) = types {
            let types = beside(self, name)?;
            let picked = self.tape.picked(&types, all().map(|_| Some(0)).collect());
            self.hidden = self.tape.sum(picked, &self.hidden);
        }
        Ok(())
    }

    /// Cuts images into patches, `[images * patches, channels * side * side]`, and projects them; the class token first.
    fn embed_patches(
        &mut self,
        inputs: &Inputs,
        [projection, class_token, positions]: &[String; 3],
        watch: &mut Watch<'_>,
    ) -> Result<(), ForwardError> {
        let Inputs::Images(images) = inputs else { return Err(self.wrong_inputs(inputs)) };
        let (count, channels, height, width) = images.dim();
        let side = self.model.patch;
        let (rows, columns) = match side {
            0 => return Err(ForwardError::Config { field: "patch_size", problem: "absent".into() }),
            side if side > height || side > width => {
                let expected = format!("at least one patch of {side} by {side}");
                return Err(ForwardError::Inputs { found: format!("images of {width} by {height}"), expected });
            }
            side => (height / side, width / side),
        };
        let mut patches = Array2::zeros((count * rows * columns, channels * side * side));
        for (number, mut patch) in patches.rows_mut().into_iter().enumerate() {
            let (image, place) = (number / (rows * columns), number % (rows * columns));
            let (top, left) = (place / columns * side, place % columns * side);
            let pixels = images.slice(s![image, .., top..top + side, left..left + side]);
            patch.iter_mut().zip(pixels.iter()).for_each(|(element, pixel)| *element = *pixel);
        }
        watch(&[format!("{projection}.weight")], &patches);
        let weight = self.joined(projection)?;
        if weight.ncols() != patches.ncols() {
            let found = format!("images of {channels} channels");
            return Err(ForwardError::Inputs { found, expected: format!("{} values a patch", weight.ncols()) });
        }
        let (class_token, positions) = (self.rows_of(class_token)?, self.rows_of(positions)?);
        let tokens = rows * columns + 1;
        let bias = self.vector(&format!("{projection}.bias")).filter(|bias| bias.len() == weight.nrows());
        let fits = class_token.shape() == [1, weight.nrows()] && positions.shape() == [tokens, weight.nrows()];
        if !fits {
            let found = format!("images of {height} x {width}");
            let expected = format!("as many patches as there are positions ({})", positions.nrows());
            return Err(ForwardError::Inputs { found, expected });
        }
        let projected = self.tape.linear(&Rows::constant(patches), &weight, WeightLayout::OutputsFirst, bias.as_ref());
        // Place 0 of an image is its class token's, the others are its patches'.
        let places = || (0..count).flat_map(|image| (0..tokens).map(move |place| (image, place)));
        let patch_of = |(image, place): (usize, usize)| place.checked_sub(1).map(|patch| image * (tokens - 1) + patch);
        let patches = self.tape.picked(&projected, places().map(patch_of).collect());
        let classes = self.tape.picked(&class_token, places().map(|(_, place)| (place == 0).then_some(0)).collect());
        let positions = self.tape.picked(&positions, places().map(|(_, place)| Some(place)).collect());
        let tokens_of_images = self.tape.sum(positions, &classes);
        self.hidden = self.tape.sum(tokens_of_images, &patches);
        self.sequences = (0..count).map(|image| image * tokens..(image + 1) * tokens).collect();
        Ok(())
    }

    fn wrong_inputs(&self, inputs: &Inputs) -> ForwardError {
        let (images, tokens) = ("images (pixel_values)", "token ids (input_ids) or text");
        let (found, expected) = match inputs {
            Inputs::Images(_) => (images, tokens),
            Inputs::Tokens(_) => (tokens, images),
        };
        ForwardError::Inputs { found: found.into(), expected: expected.into() }
    }

    fn full(&self, name: &str) -> String {
        format!("{}{name}", self.model.prefix)
    }

    /// Applies a linear map, which must take such inputs and give so many outputs.
    fn linear(
        &mut self,
        name: &str,
        layout: WeightLayout,
        inputs: &Rows,
        outputs: Option<usize>,
    ) -> Result<Rows, ForwardError> {
        let Linear { weight, layout, bias } = self.map(name, layout, inputs, outputs)?;
        Ok(self.tape.linear(inputs, &weight, layout, bias.as_ref()))
    }

    /// A linear map, which must take such inputs and give so many outputs.
    fn map(
        &mut self,
        name: &str,
        layout: WeightLayout,
        inputs: &Rows,
        outputs: Option<usize>,
    ) -> Result<Linear, ForwardError> {
        let tensor = format!("{name}.weight");
        let weight = self.matrix(&tensor)?;
        let bias = self.vector(&format!("{name}.bias"));
        let found = layout.turned(&weight);
        let outputs = outputs.unwrap_or(found.nrows());
        let fits = found.shape() == [outputs, inputs.ncols()] && bias.as_ref().is_none_or(|bias| bias.len() == outputs);
        if !fits {
            let expected = format!("{:?} and a bias to match", layout.shape(outputs, inputs.ncols()));
            return Err(wrong_shape(&tensor, weight.shape(), expected));
        }
        Ok(Linear { weight, layout, bias })
    }

    /// Applies a norm.
    fn normed(&mut self, inputs: &Rows, name: &str) -> Result<Rows, ForwardError> {
        let width = inputs.ncols();
        let vector = |part: &str| {
            let tensor = format!("{name}.{part}");
            let vector = self.vector(&tensor).filter(|vector| vector.len() == width);
            vector.ok_or_else(|| {
                let shape = self.weights.shape(&tensor).unwrap_or_default();
                wrong_shape(&tensor, &shape, format!("{width} float numbers"))
            })
        };
        let bias = if self.model.has_norm_bias() { Some(vector("bias")?) } else { None };
        let norm = Norm { weight: vector("weight")?, bias, epsilon: self.model.epsilon };
        Ok(self.tape.norm(inputs, norm))
    }

    fn vector(&self, name: &str) -> Option<Array1<f32>> {
        self.weights.values(name).map(Array1::from)
    }

    /// A matrix.
    fn matrix(&mut self, name: &str) -> Result<Rows, ForwardError> {
        let rows = |shape: &[usize]| if let &[rows, _] = shape { Some(rows) } else { None };
        self.parameter(name, "a float matrix", rows)
    }

    /// Weights of more than two dimensions, all but the first joined.
    fn joined(&mut self, name: &str) -> Result<Rows, ForwardError> {
        self.parameter(&format!("{name}.weight"), "a float tensor", |shape| shape.first().copied())
    }

    /// A tensor as rows of its last axis.
    fn rows_of(&mut self, name: &str) -> Result<Rows, ForwardError> {
        self.parameter(name, "a float tensor", |shape| Some(shape.split_last()?.1.iter().product()))
    }

    /// A tensor as so many rows.
    fn parameter(
        &mut self,
        name: &str,
        expected: &str,
        rows: impl Fn(&[usize]) -> Option<usize>,
    ) -> Result<Rows, ForwardError> {
        let shape = self.weights.shape(name).unwrap_or_default();
        let wrong = || wrong_shape(name, &shape, expected.into());
        let rows = rows(&shape).ok_or_else(wrong)?;
        let values = self.weights.values(name).ok_or_else(wrong)?;
        let columns = values.len() / rows.max(1);
        let values = Array2::from_shape_vec((rows, columns), values).map_err(|_| wrong())?;
        Ok(if (self.is_trained)(name) { self.tape.trained(name, values) } else { Rows::constant(values) })
    }
}

/// What a model says, and what that is made of.
pub struct Outputs {
    hidden: Rows,
    head: Option<Linear>,
}

/// A linear map whose weights lie `[outputs, inputs]` once they are turned.
struct Linear {
    weight: Rows,
    layout: WeightLayout,
    bias: Option<Array1<f32>>,
}

impl Outputs {
    /// Rows: tokens, or images.
    pub fn count(&self) -> usize {
        self.hidden.nrows()
    }

    /// Whether they are the logits of a head; the last hidden states otherwise.
    pub fn are_logits(&self) -> bool {
        self.head.is_some()
    }

    /// Numbers in a row.
    pub fn width(&self) -> usize {
        self.head.as_ref().map_or(self.hidden.ncols(), |head| head.layout.turned(&head.weight).nrows())
    }

    /// Some of the rows, `[rows, width]`.
    pub fn rows(&self, rows: Range<usize>) -> Array2<f32> {
        let hidden = self.hidden.slice(s![rows, ..]);
        match &self.head {
            Some(head) => linear(&hidden, &head.layout.turned(&head.weight), head.bias.as_ref()),
            None => hidden.to_owned(),
        }
    }
}

fn wrong_shape(tensor: &str, shape: &[usize], expected: String) -> ForwardError {
    let found = if shape.is_empty() { "not there or of no float type".into() } else { format!("shape {shape:?}") };
    ForwardError::Tensor { tensor: tensor.to_owned(), found, expected }
}
