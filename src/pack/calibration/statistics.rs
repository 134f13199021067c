//! What tensors are multiplied with, one record after another: in the model as it was, and in the model as it will be deployed,
//! with everything quantized before as it decodes (as GPTQ does it, and GPTAQ's correction in closed form).
//!
//! With inputs X of the original and X' of the deployed model, a row w of weights is best replaced by the w' that minimizes
//! |X w - X' w'|^2: w' = w + (X'^T X')^-1 X'^T (X - X') w. What the quantizer then adds to that costs as always, with the
//! Hessian of X'.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, OnceLock};

use ndarray::{Array2, ArrayView2, Axis};

use super::Calibration;
use super::cholesky::Factor;
use super::feedback::{ColumnFeedback, damped};
use super::hessian::{cross_moments, hessian};
use crate::codec::architecture::{BlockType, RecordPlan};
use crate::forward::ForwardError;
use crate::forward::pass::Pass;
use crate::pack::symbols::RunLayout;
use crate::tensor::TensorInfo;

/// Spans of tokens that activations are averaged over.
const SPANS: usize = 64;

/// Which part of a model's way a record's inputs come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Stage {
    Embedding,
    Layer(usize),
    Head,
}

impl Stage {
    fn of(record: &RecordPlan) -> Option<Self> {
        match (record.block_type, record.layer) {
            (BlockType::Embedding, _) => Some(Self::Embedding),
            (BlockType::Head, _) => Some(Self::Head),
            (_, Some(layer)) => Some(Self::Layer(layer as usize)),
            (_, None) => None,
        }
    }
}

/// The inputs of one stage after another.
pub struct InputStatistics<'a> {
    calibration: &'a Calibration<'a>,
    /// The model as it was, and as it will be deployed, both before the stage.
    original: Option<Pass<'a>>,
    deployed: Option<Pass<'a>>,
    stage: Option<Stage>,
    /// Of the stage, what the original model multiplies each tensor with; tensors with the same inputs share them.
    inputs: BTreeMap<String, Arc<Array2<f32>>>,
    /// The tensors before the first layer that were deployed: a head may share them.
    embeddings: BTreeSet<String>,
    /// Whether anything that comes before the stage, or in it, was deployed.
    has_deployed: bool,
}

/// What is known of the inputs that a tensor is multiplied with.
#[derive(Clone)]
pub struct ColumnInputs {
    /// How errors of columns move others.
    pub feedback: Arc<ColumnFeedback>,
    shared: Arc<Shared>,
}

/// What tensors with the same inputs share.
struct Shared {
    matrix: Array2<f32>,
    /// Of the deployed model's inputs with how far the original's are from them; absent where they are the same.
    moments: Option<Array2<f32>>,
    /// By the number of lanes.
    feedback: Mutex<BTreeMap<usize, Arc<ColumnFeedback>>>,
    factor: OnceLock<Factor>,
}

impl ColumnInputs {
    /// How far the weights of a tensor are to be moved, row after row, to make up for what is wrong with their inputs; `None`
    /// where nothing is.
    pub fn correction(&self, weights: &[f32]) -> Option<Vec<f32>> {
        let moments = self.shared.moments.as_ref()?;
        let columns = moments.nrows();
        let weights = ArrayView2::from_shape((weights.len() / columns, columns), weights).expect("whole rows");
        let factor = self.shared.factor.get_or_init(|| Factor::new(damped(&self.shared.matrix)));
        Some(factor.solve_rows(weights.dot(&moments.t())).into_raw_vec_and_offset().0)
    }
}

impl<'a> InputStatistics<'a> {
    /// Before the first record.
    pub(super) fn new(calibration: &'a Calibration<'a>) -> Self {
        calibration.deployed.retain(|_| false);
        Self {
            calibration,
            original: None,
            deployed: None,
            stage: None,
            inputs: BTreeMap::new(),
            embeddings: BTreeSet::new(),
            has_deployed: false,
        }
    }

    /// What is known of every tensor of a record that has a layout of runs, where its inputs are known and its runs are its
    /// rows. Records come in the archive's order: the model is run up to theirs.
    ///
    /// # Errors
    /// When the model cannot be run that far.
    pub fn of_record(
        &mut self,
        record: &RecordPlan,
        tensors: &[(&TensorInfo, Option<RunLayout>)],
    ) -> Result<Vec<Option<ColumnInputs>>, ForwardError> {
        let unknown = || vec![None; tensors.len()];
        let Some(stage) = Stage::of(record) else { return Ok(unknown()) };
        if tensors.iter().all(|(_, layout)| layout.is_none()) {
            return Ok(unknown());
        }
        self.run_to(stage)?;
        let has_deployed = self.has_deployed && stage != Stage::Embedding;
        if has_deployed {
            self.run_deployed(stage)?;
        }
        let wanted: BTreeSet<&str> = (tensors.iter())
            .filter(|(tensor, layout)| layout.is_some() && self.inputs.contains_key(&tensor.name))
            .map(|(tensor, _)| tensor.name.as_str())
            .collect();
        if wanted.is_empty() {
            return Ok(unknown());
        }
        let mut shared: BTreeMap<String, Arc<Shared>> = BTreeMap::new();
        let mut failed = None;
        let inputs = &self.inputs;
        let mut keep = |names: &[String], found: &Array2<f32>| {
            if !names.iter().any(|name| wanted.contains(name.as_str())) {
                return;
            }
            let original = &inputs[&names[0]];
            let moments = (has_deployed && **original != *found).then(|| cross_moments(found, &(&**original - found)));
            let matrix = hessian(found);
            let is_finite = |matrix: &Array2<f32>| matrix.iter().all(|value| value.is_finite());
            if !is_finite(&matrix) || !moments.as_ref().is_none_or(is_finite) {
                failed.get_or_insert(names[0].clone());
            }
            let of_names = Arc::new(Shared { matrix, moments, feedback: Mutex::default(), factor: OnceLock::new() });
            shared.extend(names.iter().map(|name| (name.clone(), Arc::clone(&of_names))));
        };
        match (&self.deployed, stage) {
            // Nothing was deployed before: its inputs are the original's.
            _ if !has_deployed => {
                let mut groups: Vec<(Vec<String>, &Array2<f32>)> = Vec::new();
                for (name, inputs) in &self.inputs {
                    match groups.iter_mut().find(|(_, of_group)| std::ptr::eq(*of_group, &**inputs)) {
                        Some((names, _)) => names.push(name.clone()),
                        None => groups.push((vec![name.clone()], &**inputs)),
                    }
                }
                groups.iter().for_each(|(names, inputs)| keep(names, inputs));
            }
            (Some(deployed), Stage::Layer(_)) => deployed.clone().layer(&mut keep)?,
            (Some(deployed), _) => drop(deployed.clone().finish(&mut keep)?),
            (None, _) => unreachable!("the deployed model has been run to the stage"),
        }
        if let Some(tensor) = failed {
            return Err(ForwardError::NotFinite { tensor });
        }
        let known = |&(tensor, layout): &(&TensorInfo, Option<RunLayout>)| {
            let (shared, layout) = (shared.get(&tensor.name)?, layout?);
            let columns = shared.matrix.ncols();
            if layout.run_elements != columns || !layout.elements.is_multiple_of(columns) {
                return None;
            }
            let mut feedback = shared.feedback.lock().expect("making feedback does not panic");
            let made = feedback.entry(layout.lanes);
            let made = made.or_insert_with(|| Arc::new(ColumnFeedback::new(&shared.matrix, layout.lanes)));
            Some(ColumnInputs { feedback: Arc::clone(made), shared: Arc::clone(shared) })
        };
        Ok(tensors.iter().map(known).collect())
    }

    /// What the blocks of a record do on the inputs (section 4.2), `[groups, summary]`: what the map behind them is multiplied
    /// with in the original model. The paper's mean over all inputs is one number for an FFN unit, whose cosine is 1 or -1: here
    /// it is the means over 64 spans of the inputs. `None` where that map is not known, or blocks are members of groups.
    /// The record is the one last asked for with [`Self::of_record`].
    pub fn activations(&self, record: &RecordPlan, tensors: &[(&TensorInfo, &[u8])]) -> Option<Array2<f32>> {
        let symmetry = record.symmetry.filter(|symmetry| symmetry.members == 1)?;
        record.parts.iter().zip(tensors).find_map(|(part, (tensor, _))| {
            let placement = part.placement.filter(|placement| placement.axis == 1 && tensor.shape.len() == 2)?;
            let inputs = self.inputs.get(&tensor.name)?;
            if inputs.ncols() as u64 != tensor.shape[1] {
                return None;
            }
            let means = span_means(inputs);
            let (blocks, unit) = (symmetry.groups as usize, placement.unit as usize);
            let per_span = placement.repeat as usize * unit;
            Some(Array2::from_shape_fn((blocks, means.nrows() * per_span), |(block, at)| {
                let (span, within) = (at / per_span, at % per_span);
                let (repetition, element) = (within / unit, within % unit);
                means[(span, (repetition * blocks + block) * unit + element)]
            }))
        })
    }

    /// From now on a tensor of this record has these values, those that it decodes to.
    pub fn deploy(&mut self, record: &RecordPlan, tensor: &TensorInfo, values: Vec<f32>) {
        match Stage::of(record) {
            Some(Stage::Embedding) => drop(self.embeddings.insert(tensor.name.clone())),
            Some(Stage::Layer(_)) => (),
            _ => return,
        }
        self.calibration.deployed.deploy(&tensor.name, values);
        self.has_deployed = true;
    }

    /// Runs both models until they are before the stage, and keeps the original's inputs in it.
    fn run_to(&mut self, stage: Stage) -> Result<(), ForwardError> {
        if self.stage == Some(stage) {
            return Ok(());
        }
        let Calibration { model, weights, deployed, data } = self.calibration;
        let inputs = &data.inputs;
        let mut kept: BTreeMap<String, Arc<Array2<f32>>> = BTreeMap::new();
        let mut ignore = |_: &[String], _: &Array2<f32>| ();
        let mut keep = |names: &[String], inputs: &Array2<f32>| {
            let inputs = Arc::new(inputs.clone());
            kept.extend(names.iter().map(|name| (name.clone(), Arc::clone(&inputs))));
        };
        self.inputs.clear();
        if stage == Stage::Embedding {
            (self.original, self.deployed) = (None, None);
            drop(Pass::new(model, weights, inputs, &mut keep)?);
        } else {
            if self.stage.is_none_or(|before| before > stage) {
                (self.original, self.deployed) = (None, None);
            }
            if self.has_deployed {
                self.run_deployed(stage)?;
            }
            let mut original = match self.original.take() {
                Some(pass) => pass,
                None => Pass::new(model, weights, inputs, &mut ignore)?,
            };
            while original.next_layer() < self.layers_before(stage) {
                original.layer(&mut ignore)?;
            }
            match stage {
                // Another stack than the model's has none.
                Stage::Layer(layer) if layer < model.layers => {
                    original.layer(&mut keep)?;
                }
                Stage::Head => drop(original.clone().finish(&mut keep)?),
                _ => (),
            }
            self.original = Some(original);
            let embeddings = &self.embeddings;
            deployed.retain(|name| embeddings.contains(name)); // the layers before have been run
        }
        self.inputs = kept;
        self.stage = Some(stage);
        Ok(())
    }

    /// Runs the deployed model until it is before the stage.
    fn run_deployed(&mut self, stage: Stage) -> Result<(), ForwardError> {
        let Calibration { model, deployed, data, .. } = self.calibration;
        let inputs = &data.inputs;
        let mut ignore = |_: &[String], _: &Array2<f32>| ();
        let mut pass = match self.deployed.take() {
            Some(pass) => pass,
            None => Pass::new(model, deployed, inputs, &mut ignore)?,
        };
        while pass.next_layer() < self.layers_before(stage) {
            pass.layer(&mut ignore)?;
        }
        self.deployed = Some(pass);
        Ok(())
    }

    fn layers_before(&self, stage: Stage) -> usize {
        match stage {
            Stage::Embedding => 0,
            Stage::Layer(layer) => layer.min(self.calibration.model.layers),
            Stage::Head => self.calibration.model.layers,
        }
    }
}

/// Means over spans of the rows, all as long but for the last.
fn span_means(inputs: &Array2<f32>) -> Array2<f32> {
    let length = inputs.nrows().div_ceil(SPANS).max(1);
    let mut means = Array2::zeros((inputs.nrows().div_ceil(length), inputs.ncols()));
    for (mut mean, rows) in means.rows_mut().into_iter().zip(inputs.axis_chunks_iter(Axis(0), length)) {
        mean.assign(&(rows.sum_axis(Axis(0)) / rows.nrows() as f32));
    }
    means
}
