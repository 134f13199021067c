//! What tensors are multiplied with, one record after another, with one layer's inputs in memory at a time.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

use ndarray::{Array2, Axis};

use super::Calibration;
use super::feedback::ColumnFeedback;
use super::hessian::hessian;
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
    /// The model before the stage.
    pass: Option<Pass<'a>>,
    stage: Option<Stage>,
    /// Of the stage, by tensor; tensors with the same inputs share them.
    inputs: BTreeMap<String, Arc<StageInputs>>,
}

/// What some tensors are multiplied with, and what was made of it.
struct StageInputs {
    /// `[tokens, inputs]`.
    rows: Array2<f32>,
    hessian: Array2<f32>,
    /// By the number of lanes.
    feedback: Mutex<BTreeMap<usize, Arc<ColumnFeedback>>>,
}

impl<'a> InputStatistics<'a> {
    /// Before the first record.
    pub(super) fn new(calibration: &'a Calibration<'a>) -> Self {
        Self { calibration, pass: None, stage: None, inputs: BTreeMap::new() }
    }

    /// The feedback of every tensor of a record that has a layout of runs, where its inputs are known and its runs are its
    /// rows. Records come in the archive's order: the model is run up to theirs.
    ///
    /// # Errors
    /// When the model cannot be run that far, or multiplies with what is not finite.
    pub fn of_record(
        &mut self,
        record: &RecordPlan,
        tensors: &[(&TensorInfo, Option<RunLayout>)],
    ) -> Result<Vec<Option<Arc<ColumnFeedback>>>, ForwardError> {
        let stage = Stage::of(record).filter(|_| tensors.iter().any(|(_, layout)| layout.is_some()));
        let Some(stage) = stage else { return Ok(vec![None; tensors.len()]) };
        self.run_to(stage)?;
        Ok(tensors.iter().map(|&(tensor, layout)| self.feedback(tensor, layout?)).collect())
    }

    fn feedback(&self, tensor: &TensorInfo, layout: RunLayout) -> Option<Arc<ColumnFeedback>> {
        let inputs = self.inputs.get(&tensor.name)?;
        let columns = inputs.hessian.ncols();
        if layout.run_elements != columns || !layout.elements.is_multiple_of(columns) {
            return None;
        }
        let mut known = inputs.feedback.lock().expect("making feedback does not panic");
        let made = known.entry(layout.lanes);
        Some(Arc::clone(made.or_insert_with(|| Arc::new(ColumnFeedback::new(&inputs.hessian, layout.lanes)))))
    }

    /// What the blocks of a record do on the inputs (section 4.2), `[groups, summary]`: what the map behind them is multiplied
    /// with in the original model. The paper's mean over all inputs is one number for an FFN unit, whose cosine is 1 or -1: here
    /// it is the means over 64 spans of the inputs. `None` where that map is not known, or blocks are members of groups.
    /// The record is the one last asked for with [`Self::of_record`].
    pub fn activations(&self, record: &RecordPlan, tensors: &[(&TensorInfo, &[u8])]) -> Option<Array2<f32>> {
        let symmetry = record.symmetry.filter(|symmetry| symmetry.members == 1)?;
        record.parts.iter().zip(tensors).find_map(|(part, (tensor, _))| {
            let placement = part.placement.filter(|placement| placement.axis == 1 && tensor.shape.len() == 2)?;
            let inputs = &self.inputs.get(&tensor.name)?.rows;
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

    /// Runs the model until the stage's inputs have been seen.
    fn run_to(&mut self, stage: Stage) -> Result<(), ForwardError> {
        if self.stage == Some(stage) {
            return Ok(());
        }
        let Calibration { model, weights, data } = self.calibration;
        self.inputs.clear();
        let mut ignore = |_: &[String], _: &Array2<f32>| ();
        let inputs = &mut self.inputs;
        let mut keep = |names: &[String], rows: &Array2<f32>| {
            let (hessian, feedback) = (hessian(rows), Mutex::default());
            let shared = Arc::new(StageInputs { rows: rows.clone(), hessian, feedback });
            inputs.extend(names.iter().map(|name| (name.clone(), Arc::clone(&shared))));
        };
        let is_past = self.stage.is_none_or(|before| before > stage) || self.pass.is_none();
        if is_past || stage == Stage::Embedding {
            self.stage = None;
            self.pass = Some(match stage {
                Stage::Embedding => Pass::new(model, weights, &data.inputs, &mut keep)?,
                Stage::Layer(_) | Stage::Head => Pass::new(model, weights, &data.inputs, &mut ignore)?,
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
        let is_finite = |inputs: &StageInputs| inputs.hessian.iter().all(|value| value.is_finite());
        if let Some((tensor, _)) = self.inputs.iter().find(|(_, inputs)| !is_finite(inputs)) {
            return Err(ForwardError::NotFinite { tensor: tensor.clone() });
        }
        self.stage = Some(stage);
        Ok(())
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
