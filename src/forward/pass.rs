//! Running a model layer by layer, watched.

use std::ops::Range;

use ndarray::{Array1, Array2, Axis, s};

use super::attention::Projected;
use super::families::{Arrangement, Embedding, Projections};
use super::inputs::Inputs;
use super::model::Transformer;
use super::operations::{Linear, Norm};
use super::{ForwardError, Weights};

/// Told what linear maps are multiplied with: the names of the tensors that share these inputs, and the inputs,
/// `[tokens, inputs]`.
pub type Watch<'a> = dyn FnMut(&[String], &Array2<f32>) + 'a;

/// A model on its way through its layers.
#[derive(Clone)]
pub struct Pass<'a> {
    model: &'a Transformer,
    weights: &'a dyn Weights,
    /// `[tokens, hidden]` of all sequences, one after another.
    hidden: Array2<f32>,
    sequences: Vec<Range<usize>>,
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
        let mut pass = Self { model, weights, hidden: Array2::zeros((0, 0)), sequences: Vec::new(), next_layer: 0 };
        match (model.family.embedding, inputs) {
            (Embedding::Tokens { tokens, positions, types, norm }, Inputs::Tokens(sequences)) => {
                pass.embed_tokens(sequences, tokens, positions, types)?;
                if let Some(norm) = norm {
                    pass.hidden = pass.norm(&pass.full(norm))?.apply(&pass.hidden);
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
        let attention_norm = self.norm(&model.in_layer(layer, model.family.attention_norm))?;
        let ffn_norm = self.norm(&model.in_layer(layer, model.family.ffn_norm))?;
        match model.arrangement {
            Arrangement::NormBefore => {
                let attended = self.attend(&attention_norm.apply(&self.hidden), watch)?;
                self.hidden += &attended;
                let fed = self.feed_forward(&ffn_norm.apply(&self.hidden), watch)?;
                self.hidden += &fed;
            }
            Arrangement::NormAfter => {
                let attended = self.attend(&self.hidden, watch)?;
                self.hidden = attention_norm.apply(&(attended + &self.hidden));
                let fed = self.feed_forward(&self.hidden, watch)?;
                self.hidden = ffn_norm.apply(&(fed + &self.hidden));
            }
            Arrangement::Parallel => {
                let attended = self.attend(&attention_norm.apply(&self.hidden), watch)?;
                let fed = self.feed_forward(&ffn_norm.apply(&self.hidden), watch)?;
                self.hidden += &attended;
                self.hidden += &fed;
            }
        }
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
    pub fn outputs(self, watch: &mut Watch<'_>) -> Result<Outputs, ForwardError> {
        let mut hidden = match self.model.family.final_norm {
            Some(norm) => self.norm(&self.full(norm))?.apply(&self.hidden),
            None => self.hidden.clone(),
        };
        if self.model.takes_images() {
            let class_tokens: Vec<usize> = self.sequences.iter().map(|sequence| sequence.start).collect();
            hidden = hidden.select(Axis(0), &class_tokens);
        }
        let exists = |name: &&&str| self.weights.shape(&format!("{name}.weight")).is_some();
        if let Some(head) = self.model.family.heads.iter().find(exists) {
            watch(&[format!("{head}.weight")], &hidden);
            return Ok(Outputs { head: Some(self.map(head, &hidden, None)?), hidden });
        }
        let head = match self.model.family.embedding {
            // A language model without a head of its own uses its embedding.
            Embedding::Tokens { tokens, .. } if self.model.is_causal() => {
                Some(self.map(&self.full(tokens), &hidden, None)?)
            }
            _ => None,
        };
        Ok(Outputs { head, hidden })
    }

    fn attend(&self, inputs: &Array2<f32>, watch: &mut Watch<'_>) -> Result<Array2<f32>, ForwardError> {
        let (model, layer) = (self.model, self.next_layer);
        let names = model.projections(layer);
        watch(&weights_of(&names), inputs);
        let attention = &model.attention;
        let outputs = |which: usize| match model.family.projections {
            Projections::PerHead(_) => 3 * attention.heads * attention.width,
            Projections::Split(_) if which == 0 => attention.heads * attention.width,
            Projections::Split(_) => attention.key_value_heads * attention.width,
        };
        let projected: Vec<Array2<f32>> = (names.iter().enumerate())
            .map(|(which, name)| self.linear(name, inputs, Some(outputs(which))))
            .collect::<Result<_, ForwardError>>()?;
        let projected = match <[Array2<f32>; 3]>::try_from(projected) {
            Ok(projected) => Projected::Split(projected),
            Err(mut projected) => Projected::PerHead(projected.pop().expect("one map at least")),
        };
        let gathered = attention.apply(&projected, &self.sequences);
        drop(projected);
        let output = model.in_layer(layer, model.family.attention_output);
        watch(&weights_of(std::slice::from_ref(&output)), &gathered);
        self.linear(&output, &gathered, Some(inputs.ncols()))
    }

    fn feed_forward(&self, inputs: &Array2<f32>, watch: &mut Watch<'_>) -> Result<Array2<f32>, ForwardError> {
        let (model, layer) = (self.model, self.next_layer);
        let name = |name| model.in_layer(layer, name);
        let (up, gate, down) = (name(model.family.up), model.family.gate.map(name), name(model.family.down));
        let sharing: Vec<String> = gate.iter().chain([&up]).cloned().collect();
        watch(&weights_of(&sharing), inputs);
        let mut units = self.linear(&up, inputs, None)?;
        match &gate {
            Some(gate) => {
                let mut gates = self.linear(gate, inputs, Some(units.ncols()))?;
                model.activation.apply(&mut gates);
                units *= &gates;
            }
            None => model.activation.apply(&mut units),
        }
        watch(&weights_of(std::slice::from_ref(&down)), &units);
        self.linear(&down, &units, Some(inputs.ncols()))
    }

    fn embed_tokens(
        &mut self,
        sequences: &[Vec<u32>],
        tokens: &str,
        positions: Option<(&str, usize)>,
        types: Option<&str>,
    ) -> Result<(), ForwardError> {
        let table = self.matrix(&format!("{}.weight", self.full(tokens)))?;
        let beside = |name: &str| {
            let name = format!("{}.weight", self.full(name));
            let matrix = self.matrix(&name)?;
            let fits = matrix.ncols() == table.ncols() && matrix.nrows() > 0;
            if fits {
                Ok(matrix)
            } else {
                Err(wrong_shape(&name, matrix.shape(), format!("{} columns", table.ncols())))
            }
        };
        let positions = match positions {
            Some((name, first)) => Some((beside(name)?, first)),
            None => None,
        };
        let types = types.map(beside).transpose()?;
        let count: usize = sequences.iter().map(Vec::len).sum();
        self.hidden = Array2::zeros((count, table.ncols()));
        let mut rows = self.hidden.rows_mut().into_iter();
        for sequence in sequences {
            let start = self.sequences.last().map_or(0, |before| before.end);
            self.sequences.push(start..start + sequence.len());
            for (position, &token) in sequence.iter().enumerate() {
                let mut row = rows.next().expect("a row per token");
                let found = || format!("token {token} at position {position}");
                let expected = || format!("one of {} tokens", table.nrows());
                if token as usize >= table.nrows() {
                    return Err(ForwardError::Inputs { found: found(), expected: expected() });
                }
                row += &table.row(token as usize);
                if let Some((positions, first)) = &positions {
                    if position + first >= positions.nrows() {
                        let most = positions.nrows().saturating_sub(*first);
                        let expected = format!("at most {most} tokens a sequence");
                        return Err(ForwardError::Inputs { found: found(), expected });
                    }
                    row += &positions.row(position + first);
                }
                if let Some(types) = &types {
                    row += &types.row(0);
                }
            }
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
        let projected = Linear { weight, bias }.apply(&patches);
        self.hidden = Array2::zeros((count * tokens, projected.ncols()));
        for image in 0..count {
            let mut rows = self.hidden.slice_mut(s![image * tokens..(image + 1) * tokens, ..]);
            rows.assign(&positions);
            rows.slice_mut(s![..1, ..]).scaled_add(1.0, &class_token);
            let patches = projected.slice(s![image * (tokens - 1)..(image + 1) * (tokens - 1), ..]);
            rows.slice_mut(s![1.., ..]).scaled_add(1.0, &patches);
            self.sequences.push(image * tokens..(image + 1) * tokens);
        }
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
    fn linear(&self, name: &str, inputs: &Array2<f32>, outputs: Option<usize>) -> Result<Array2<f32>, ForwardError> {
        Ok(self.map(name, inputs, outputs)?.apply(inputs))
    }

    /// A linear map, which must take such inputs and give so many outputs.
    fn map(&self, name: &str, inputs: &Array2<f32>, outputs: Option<usize>) -> Result<Linear, ForwardError> {
        let tensor = format!("{name}.weight");
        let linear = Linear { weight: self.matrix(&tensor)?, bias: self.vector(&format!("{name}.bias")) };
        let outputs = outputs.unwrap_or(linear.weight.nrows());
        let expected = [outputs, inputs.ncols()];
        let fits = linear.weight.shape() == expected && linear.bias.as_ref().is_none_or(|bias| bias.len() == outputs);
        if !fits {
            return Err(wrong_shape(&tensor, linear.weight.shape(), format!("{expected:?} and a bias to match")));
        }
        Ok(linear)
    }

    fn norm(&self, name: &str) -> Result<Norm, ForwardError> {
        let width = self.hidden.ncols();
        let vector = |part: &str| {
            let tensor = format!("{name}.{part}");
            let vector = self.vector(&tensor).filter(|vector| vector.len() == width);
            vector.ok_or_else(|| {
                let shape = self.weights.shape(&tensor).unwrap_or_default();
                wrong_shape(&tensor, &shape, format!("{width} float numbers"))
            })
        };
        let bias = if self.model.has_norm_bias() { Some(vector("bias")?) } else { None };
        Ok(Norm { weight: vector("weight")?, bias, epsilon: self.model.epsilon })
    }

    fn vector(&self, name: &str) -> Option<Array1<f32>> {
        self.weights.values(name).map(Array1::from)
    }

    /// A matrix.
    fn matrix(&self, name: &str) -> Result<Array2<f32>, ForwardError> {
        let shape = self.weights.shape(name).unwrap_or_default();
        let wrong = || wrong_shape(name, &shape, "a float matrix".into());
        let &[rows, columns] = shape.as_slice() else { return Err(wrong()) };
        let values = self.weights.values(name).ok_or_else(wrong)?;
        Array2::from_shape_vec((rows, columns), values).map_err(|_| wrong())
    }

    /// Weights of more than two dimensions, all but the first joined.
    fn joined(&self, name: &str) -> Result<Array2<f32>, ForwardError> {
        let name = format!("{name}.weight");
        let shape = self.weights.shape(&name).unwrap_or_default();
        let wrong = || wrong_shape(&name, &shape, "a float tensor".into());
        let values = self.weights.values(&name).ok_or_else(wrong)?;
        let rows = shape.first().copied().unwrap_or(0);
        Array2::from_shape_vec((rows, values.len() / rows.max(1)), values).map_err(|_| wrong())
    }

    /// A tensor as rows of its last axis.
    fn rows_of(&self, name: &str) -> Result<Array2<f32>, ForwardError> {
        let shape = self.weights.shape(name).unwrap_or_default();
        let wrong = || wrong_shape(name, &shape, "a float tensor".into());
        let values = self.weights.values(name).ok_or_else(wrong)?;
        let columns = shape.last().copied().unwrap_or(0);
        Array2::from_shape_vec((values.len() / columns.max(1), columns), values).map_err(|_| wrong())
    }
}

/// What a model says, and what that is made of.
pub struct Outputs {
    hidden: Array2<f32>,
    head: Option<Linear>,
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
        self.head.as_ref().map_or(self.hidden.ncols(), |head| head.weight.nrows())
    }

    /// Some of the rows, `[rows, width]`.
    pub fn rows(&self, rows: Range<usize>) -> Array2<f32> {
        let hidden = self.hidden.slice(s![rows, ..]);
        match &self.head {
            Some(head) => head.apply(&hidden),
            None => hidden.to_owned(),
        }
    }
}

fn weights_of(names: &[String]) -> Vec<String> {
    names.iter().map(|name| format!("{name}.weight")).collect()
}

fn wrong_shape(tensor: &str, shape: &[usize], expected: String) -> ForwardError {
    let found = if shape.is_empty() { "not there or of no float type".into() } else { format!("shape {shape:?}") };
    ForwardError::Tensor { tensor: tensor.to_owned(), found, expected }
}
