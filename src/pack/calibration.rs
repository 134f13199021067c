//! What a model's weights are multiplied with, learned from a few inputs; and how an error in one weight is made up for by
//! the weights beside it.
//!
//! With inputs X of a linear map and an error E in a row of its weights, the error of the output is E H E^T, where H = X^T X is
//! the Hessian ([`mod@hessian`]). Factorised it is a sum over columns in which the errors of earlier columns move the targets of
//! later ones ([`mod@feedback`]), and the search of the trellis goes through them in that order: closed-loop quantization, as in
//! GPTQ and LDLQ.
//!
//! [`Calibration`] has the inputs ([`inputs`]) and runs the model ([`crate::forward`]); [`InputStatistics`] gives the feedback
//! of one tensor after another, with one layer's Hessians in memory at a time.

pub mod cholesky;
pub mod feedback;
pub mod hessian;
pub mod inputs;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use ndarray::{Array2, Axis};
use sha2::{Digest, Sha256};

use self::feedback::ColumnFeedback;
use self::hessian::hessian;
use super::quantize::values_of;
use super::source::Checkpoint;
use super::symbols::RunLayout;
use crate::codec::architecture::{BlockType, RecordPlan};
use crate::forward::inputs::Inputs;
use crate::forward::model::Transformer;
use crate::forward::pass::Pass;
use crate::forward::{ForwardError, Weights};
use crate::tensor::{Dtype, TensorInfo};

/// Where calibration inputs come from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum CalibrationSource {
    /// The text that comes with the program.
    BuiltIn,
    /// A file of text, token ids or pixels.
    File(PathBuf),
}

/// Why there is no calibration.
#[derive(Debug, thiserror::Error)]
pub enum CalibrationError {
    /// A file cannot be read.
    #[error("{path}: {source}")]
    Io {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// A file is not what it should be.
    #[error("{path}: {problem}")]
    Format {
        /// The file.
        path: PathBuf,
        /// What is wrong in it.
        problem: String,
    },
    /// The model cannot be run.
    #[error(transparent)]
    Forward(#[from] ForwardError),
    /// Two models in one checkpoint.
    #[error("{0}: several models, calibration expects one")]
    SeveralModels(PathBuf),
}

/// A model and inputs to run it on.
pub struct Calibration<'a> {
    model: Transformer,
    weights: CheckpointWeights<'a>,
    inputs: Inputs,
    description: String,
}

impl<'a> Calibration<'a> {
    /// Reads the inputs and finds how the model runs.
    ///
    /// # Errors
    /// When the inputs or `config.json` and, for text, `tokenizer.json` beside the checkpoint cannot be read, or no family
    /// runs this model on such inputs.
    pub fn load(checkpoint: &'a Checkpoint, source: &CalibrationSource) -> Result<Self, CalibrationError> {
        if checkpoint.files.iter().any(|file| file.model != checkpoint.files[0].model) {
            return Err(CalibrationError::SeveralModels(checkpoint.path.clone()));
        }
        let directory = match checkpoint.path.is_dir() {
            true => checkpoint.path.as_path(),
            false => checkpoint.path.parent().unwrap_or(Path::new(".")),
        };
        let config_path = directory.join("config.json");
        let config = inputs::read_file(&config_path)?;
        let weights = CheckpointWeights::new(checkpoint);
        let model = Transformer::new(&config, &weights)?;
        let (inputs, bytes) = inputs::load(source, &model, &directory.join("tokenizer.json"))?;
        let digest: String = Sha256::digest(&bytes).iter().map(|byte| format!("{byte:02x}")).collect();
        let amount = match &inputs {
            Inputs::Tokens(sequences) => {
                format!("{} tokens in {} sequences", sequences.iter().map(Vec::len).sum::<usize>(), sequences.len())
            }
            Inputs::Images(images) => format!("{} images", images.dim().0),
        };
        let from = match source {
            CalibrationSource::BuiltIn => "built-in text",
            CalibrationSource::File(_) => "file",
        };
        Ok(Self { model, weights, inputs, description: format!("{from}, sha256 {digest}, {amount}") })
    }

    /// What was used, for reports and the archive's provenance.
    pub fn description(&self) -> &str {
        &self.description
    }

    /// What the model's linear maps are multiplied with, from the first layer on.
    pub fn statistics(&self) -> InputStatistics<'_> {
        InputStatistics { calibration: self, pass: None, stage: None, hessians: BTreeMap::new() }
    }

    /// What the model says to the inputs.
    ///
    /// # Errors
    /// When a tensor is missing or has a wrong shape.
    pub fn outputs(&self) -> Result<Array2<f32>, ForwardError> {
        let watch = &mut |_: &[String], _: &Array2<f32>| ();
        let mut pass = Pass::new(&self.model, &self.weights, &self.inputs, watch)?;
        while pass.next_layer() < self.model.layers {
            pass.layer(watch)?;
        }
        pass.finish(watch)
    }
}

/// Which part of a model's way a record's inputs come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Stage {
    Embedding,
    Layer(usize),
    Head,
}

/// The Hessians of one stage after another.
pub struct InputStatistics<'a> {
    calibration: &'a Calibration<'a>,
    pass: Option<Pass<'a>>,
    stage: Option<Stage>,
    /// By tensor; tensors with the same inputs share one.
    hessians: BTreeMap<String, Arc<Hessian>>,
}

/// A Hessian, and the feedback that was made of it.
struct Hessian {
    matrix: Array2<f32>,
    /// Means of the inputs over [`SPANS`] spans of tokens, `[spans, inputs]`.
    means: Array2<f32>,
    /// By the number of lanes.
    feedback: std::sync::Mutex<BTreeMap<usize, Arc<ColumnFeedback>>>,
}

impl InputStatistics<'_> {
    /// The feedback of every tensor of a record that has a layout of runs, where its inputs are known and its runs are its
    /// rows. Records come in the archive's order: the model is run up to theirs.
    ///
    /// # Errors
    /// When the model cannot be run that far.
    pub fn of_record(
        &mut self,
        record: &RecordPlan,
        tensors: &[(&TensorInfo, Option<RunLayout>)],
    ) -> Result<Vec<Option<Arc<ColumnFeedback>>>, ForwardError> {
        if tensors.iter().all(|(_, layout)| layout.is_none()) {
            return Ok(vec![None; tensors.len()]);
        }
        let stage = match (record.block_type, record.layer) {
            (BlockType::Embedding, _) => Stage::Embedding,
            (BlockType::Head, _) => Stage::Head,
            (_, Some(layer)) => Stage::Layer(layer as usize),
            (_, None) => return Ok(vec![None; tensors.len()]),
        };
        self.run_to(stage)?;
        Ok(tensors.iter().map(|&(tensor, layout)| self.feedback(tensor, layout?)).collect())
    }

    fn feedback(&self, tensor: &TensorInfo, layout: RunLayout) -> Option<Arc<ColumnFeedback>> {
        let hessian = self.hessians.get(&tensor.name)?;
        let columns = hessian.matrix.ncols();
        if layout.run_elements != columns || !layout.elements.is_multiple_of(columns) {
            return None;
        }
        let mut known = hessian.feedback.lock().expect("making feedback does not panic");
        let made = known.entry(layout.lanes);
        Some(Arc::clone(made.or_insert_with(|| Arc::new(ColumnFeedback::new(&hessian.matrix, layout.lanes)))))
    }

    /// What the blocks of a record do on the inputs (section 4.2), `[groups, summary]`: what the map behind them is multiplied
    /// with. The paper's mean over all inputs is one number for an FFN unit, whose cosine is 1 or -1: here it is the means over
    /// spans of the inputs. `None` where that map is not known, or blocks are members of groups. The record is the one last
    /// asked for with [`Self::of_record`].
    pub fn activations(&self, record: &RecordPlan, tensors: &[(&TensorInfo, &[u8])]) -> Option<Array2<f32>> {
        let symmetry = record.symmetry.filter(|symmetry| symmetry.members == 1)?;
        record.parts.iter().zip(tensors).find_map(|(part, (tensor, _))| {
            let placement = part.placement.filter(|placement| placement.axis == 1 && tensor.shape.len() == 2)?;
            let means = &self.hessians.get(&tensor.name)?.means;
            if means.ncols() as u64 != tensor.shape[1] {
                return None;
            }
            let (blocks, unit) = (symmetry.groups as usize, placement.unit as usize);
            let per_span = placement.repeat as usize * unit;
            Some(Array2::from_shape_fn((blocks, means.nrows() * per_span), |(block, at)| {
                let (span, within) = (at / per_span, at % per_span);
                let (repetition, element) = (within / unit, within % unit);
                means[(span, (repetition * blocks + block) * unit + element)]
            }))
        })
    }

    /// Runs the model until the stage's inputs have been seen.
    fn run_to(&mut self, stage: Stage) -> Result<(), ForwardError> {
        if self.stage == Some(stage) {
            return Ok(());
        }
        let Calibration { model, weights, inputs, .. } = self.calibration;
        self.hessians.clear();
        let mut ignore = |_: &[String], _: &Array2<f32>| ();
        let hessians = &mut self.hessians;
        let mut keep = |names: &[String], inputs: &Array2<f32>| {
            let feedback = std::sync::Mutex::default();
            let shared = Arc::new(Hessian { matrix: hessian(inputs), means: span_means(inputs), feedback });
            hessians.extend(names.iter().map(|name| (name.clone(), Arc::clone(&shared))));
        };
        let is_past = self.stage.is_none_or(|before| before > stage) || self.pass.is_none();
        if is_past || stage == Stage::Embedding {
            self.stage = None;
            self.pass = Some(match stage {
                Stage::Embedding => Pass::new(model, weights, inputs, &mut keep)?,
                Stage::Layer(_) | Stage::Head => Pass::new(model, weights, inputs, &mut ignore)?,
            });
        }
        let pass = self.pass.as_mut().expect("it was started");
        let before = match stage {
            Stage::Embedding => 0,
            Stage::Layer(layer) => layer.min(model.layers),
            Stage::Head => model.layers,
        };
        while pass.next_layer() < before {
            pass.layer(&mut ignore)?;
        }
        match stage {
            Stage::Embedding => (),
            Stage::Layer(layer) if layer < model.layers => pass.layer(&mut keep)?,
            Stage::Layer(_) => (), // another stack than the model's
            Stage::Head => drop(self.pass.take().expect("it was started").finish(&mut keep)?),
        }
        let is_finite = |hessian: &Hessian| hessian.matrix.iter().all(|value| value.is_finite());
        if let Some((tensor, _)) = self.hessians.iter().find(|(_, hessian)| !is_finite(hessian)) {
            return Err(ForwardError::NotFinite { tensor: tensor.clone() });
        }
        self.stage = Some(stage);
        Ok(())
    }
}

/// Spans of tokens that activations are averaged over.
const SPANS: usize = 64;

/// Means over spans of the rows, as equally long as they can be.
fn span_means(inputs: &Array2<f32>) -> Array2<f32> {
    let spans = inputs.nrows().div_ceil(inputs.nrows().div_ceil(SPANS).max(1)).max(1);
    let length = inputs.nrows().div_ceil(spans).max(1);
    let mut means = Array2::zeros((spans, inputs.ncols()));
    for (mut mean, rows) in means.rows_mut().into_iter().zip(inputs.axis_chunks_iter(Axis(0), length)) {
        mean.assign(&(rows.sum_axis(Axis(0)) / rows.nrows() as f32));
    }
    means
}

/// The checkpoint's own weights.
struct CheckpointWeights<'a> {
    checkpoint: &'a Checkpoint,
    /// File and tensor.
    places: BTreeMap<&'a str, (usize, usize)>,
}

impl<'a> CheckpointWeights<'a> {
    fn new(checkpoint: &'a Checkpoint) -> Self {
        let files = checkpoint.files.iter().enumerate();
        let places = files.flat_map(|(file, source)| {
            let tensors = source.header.tensors.iter().enumerate();
            tensors.map(move |(tensor, info)| (info.name.as_str(), (file, tensor)))
        });
        Self { checkpoint, places: places.collect() }
    }
}

impl Weights for CheckpointWeights<'_> {
    fn shape(&self, name: &str) -> Option<Vec<usize>> {
        let &(file, tensor) = self.places.get(name)?;
        let shape = &self.checkpoint.files[file].header.tensors[tensor].shape;
        shape.iter().map(|&dimension| usize::try_from(dimension).ok()).collect()
    }

    fn values(&self, name: &str) -> Option<Vec<f32>> {
        let &(file, tensor) = self.places.get(name)?;
        let source = &self.checkpoint.files[file];
        let info = &source.header.tensors[tensor];
        let is_float = matches!(info.dtype, Dtype::F32 | Dtype::F16 | Dtype::BF16);
        let values = is_float.then(|| values_of(&info.dtype, source.tensor_bytes(tensor)));
        source.release(tensor);
        values
    }

    fn names(&self) -> Vec<String> {
        self.places.keys().map(|&name| name.to_owned()).collect()
    }
}
