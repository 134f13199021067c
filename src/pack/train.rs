//! Training through the decoded model (section 6.2, Appendix G): while a checkpoint is encoded record by record, the weights
//! that are still to be quantized are trained to make up for what those before them lost.
//!
//! The teacher is the checkpoint. The student is the model as it will be deployed: tensors that are encoded already are as they
//! decode, those ahead are latent weights, which start as the checkpoint's. Before each record the latents of all that is
//! ahead take some steps down the gradient of the distillation [`loss`]; then the record's are quantized in a closed loop like
//! any other weights, and their decoded values take their place. So every decision of the quantizer is one that the rest of
//! the model has seen when it is trained: no rounding is simulated, and what decodes is what was trained. The archive is an
//! ordinary one. Norms, biases and whatever else is bit-exact stay as they are.
//!
//! The gradients are those of [`crate::forward::recorded`]: a tape of our own, bit-equal on any number of threads. With the same
//! seed and options the archive has the same bytes.
//!
//! Calibration inputs are few, so that training can fit them and nothing else. The last eighth of them ([`batches`]) is not
//! trained on: what the student's outputs are away from the teacher's there says whether training is kept.

pub mod batches;
pub mod loss;
pub mod optimizer;
pub mod state;
pub mod student;

use std::collections::BTreeMap;

use self::batches::Batches;
use self::loss::{Target, distance, distillation};
use self::optimizer::Optimizer;
use self::state::{State, StateError, StateFile};
use self::student::Student;
use super::calibration::Calibration;
use super::encode::Progress;
use crate::forward::ForwardError;
use crate::forward::recorded::Recorded;

/// Whether to train.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum Training {
    /// Never.
    #[default]
    Off,
    /// At low rates with calibration, and kept only where held-out calibration inputs say that it helped.
    Auto,
    /// Always, and kept.
    On,
}

/// How long to train, and on what.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Schedule {
    /// Steps of the optimizer, over the whole encoding.
    pub steps: usize,
    /// Of the order in which inputs are seen.
    pub seed: u64,
}

/// Tokens of a batch, about.
const BATCH_TOKENS: usize = 1024;
/// Most steps of an encoding at the default effort.
const MOST_STEPS: usize = 400;
/// Parameters times tokens that the default effort trains: minutes for a model of 100 M parameters on two cores.
const PARAMETER_TOKENS: f64 = 4e12;
/// Steps of the paper for language and for vision.
const PAPER_STEPS: [usize; 2] = [20_000, 10_000];

impl Schedule {
    /// Steps at the default effort, for a model of so many parameters.
    pub fn default_steps(parameters: u64) -> usize {
        let steps = PARAMETER_TOKENS / (parameters.max(1) as f64 * BATCH_TOKENS as f64);
        (steps as usize).clamp(1, MOST_STEPS)
    }

    /// The paper's steps (G.3); its batches of 262,144 tokens are not for processors.
    pub fn paper_steps(takes_images: bool) -> usize {
        PAPER_STEPS[usize::from(takes_images)]
    }

    /// For the archive's provenance.
    pub fn description(&self) -> String {
        format!("distillation, {} steps of {BATCH_TOKENS} tokens, seed {}", self.steps, self.seed)
    }
}

/// A model that is trained while it is encoded.
pub struct Trainer<'a> {
    calibration: &'a Calibration<'a>,
    schedule: Schedule,
    target: Target,
    student: Student<'a>,
    optimizer: Optimizer,
    batches: Batches,
    /// Stages of the encoding: as many as records with something to be quantized.
    stages: usize,
    stage: usize,
    step: usize,
    kept: Option<Kept>,
}

/// What is kept on disk.
struct Kept {
    file: StateFile,
    /// Latent weights of what was quantized.
    settled: BTreeMap<String, Vec<f32>>,
    /// A state to go on from, until its stage is reached.
    before: Option<State>,
}

/// Training failed.
#[derive(Debug, thiserror::Error)]
pub enum TrainError {
    /// The model cannot be run.
    #[error(transparent)]
    Forward(#[from] ForwardError),
    /// Its state cannot be kept.
    #[error(transparent)]
    State(#[from] StateError),
}

impl<'a> Trainer<'a> {
    /// Before the first record. `tensors` will be quantized, in so many `stages`.
    pub fn new(calibration: &'a Calibration<'a>, tensors: &[&str], stages: usize, schedule: Schedule) -> Self {
        let teacher = calibration.weights();
        Self {
            calibration,
            schedule,
            target: Target::of(calibration.model(), teacher),
            student: Student::new(teacher, tensors),
            optimizer: Optimizer::new(schedule.steps),
            batches: Batches::new(calibration.inputs(), calibration.model().is_causal(), BATCH_TOKENS, schedule.seed),
            stages,
            stage: 0,
            step: 0,
            kept: None,
        }
    }

    /// Keeps the state after every stage in a file, and goes on from one that is there.
    #[must_use]
    pub fn kept_in(mut self, file: StateFile) -> Self {
        let before = file.load();
        for (name, latents) in before.iter().flat_map(|state| &state.latents) {
            self.student.change(name, |values, _| {
                if values.len() == latents.len() {
                    values.copy_from_slice(latents);
                }
            });
        }
        self.kept = Some(Kept { file, settled: BTreeMap::new(), before });
        self
    }

    /// How far the weights of a tensor that is still to be quantized are from the checkpoint's, where it has latent ones.
    pub fn moves(&self, tensor: &str) -> Option<Vec<f32>> {
        let original = self.calibration.weights().values(tensor)?;
        let latents = self.student.latents(tensor)?;
        Some(latents.iter().zip(original).map(|(latent, original)| latent - original).collect())
    }

    /// How long it trains.
    pub fn schedule(&self) -> Schedule {
        self.schedule
    }

    /// From now on a tensor is as it decodes, or as the checkpoint has it where it turned out to be bit-exact.
    pub fn settle(&mut self, tensor: &str, decoded: Option<Vec<f32>>) {
        if let (Some(kept), Some(latents)) = (&mut self.kept, self.student.latents(tensor)) {
            kept.settled.insert(tensor.to_owned(), latents.to_vec());
        }
        self.student.settle(tensor, decoded);
        self.optimizer.forget(tensor);
    }

    /// Trains before the next stage: its share of the steps. The first has none, for nothing is lost yet.
    ///
    /// # Errors
    /// When the model cannot be run, or the state cannot be kept.
    pub fn train(&mut self, progress: &dyn Progress, bytes_per_step: u64) -> Result<(), TrainError> {
        let until = (self.schedule.steps * self.stage).div_ceil(self.stages.saturating_sub(1).max(1));
        self.stage += 1;
        if self.goes_on() {
            progress.advance(bytes_per_step * (until.saturating_sub(self.step)) as u64);
            return Ok(());
        }
        let mut sum = 0.0;
        let first = self.step;
        while self.step < until.min(self.schedule.steps) && self.student.has_latents() && !progress.is_interrupted() {
            sum += self.train_once()?;
            progress.advance(bytes_per_step);
        }
        if self.step > first {
            let loss = sum / (self.step - first) as f64;
            log::debug!("trained: stage {}, steps {first} to {}, loss {loss:.5}", self.stage, self.step);
            self.keep(until)?;
        }
        Ok(())
    }

    /// Whether this stage was trained before; the last of such stages puts back what the state says.
    fn goes_on(&mut self) -> bool {
        let Some(kept) = &mut self.kept else { return false };
        let Some(state) = kept.before.take_if(|state| state.stage <= self.stage) else { return kept.before.is_some() };
        self.step = state.step;
        (0..state.step).for_each(|_| self.batches.skip());
        self.optimizer.restore(state.step, state.moments);
        true
    }

    /// Keeps the state of a stage that came to its end.
    fn keep(&self, until: usize) -> Result<(), TrainError> {
        let Some(kept) = self.kept.as_ref().filter(|_| self.step >= until) else { return Ok(()) };
        let settled = kept.settled.iter().map(|(name, latents)| (name.as_str(), latents.as_slice()));
        let latents = settled.chain(self.student.all_latents());
        Ok(kept.file.save(self.stage, self.step, latents, self.optimizer.moments())?)
    }

    /// One step; returns the loss before it.
    fn train_once(&mut self) -> Result<f64, ForwardError> {
        let (model, inputs) = (self.calibration.model(), self.batches.next_batch());
        let teacher = Recorded::run(model, self.calibration.weights(), &inputs, &|_| false)?;
        let student = Recorded::run(model, &self.student, &inputs, &|name| self.student.latents(name).is_some())?;
        let loss = distillation(self.target, &teacher, &student);
        drop(teacher);
        let gradients = student.gradients(loss.of_layers, loss.of_outputs);
        self.optimizer.step(&mut self.student, &gradients);
        self.step += 1;
        Ok(loss.value)
    }

    /// How far what the student says to held-out inputs is from what the teacher says, see [`distance`].
    ///
    /// # Errors
    /// When the model cannot be run.
    pub fn held_out_distance(&self) -> Result<f64, ForwardError> {
        let (mut sum, mut rows) = (0.0, 0);
        let model = self.calibration.model();
        for inputs in self.batches.held_out() {
            let run = |weights| Recorded::run(model, weights, &inputs, &|_| false);
            let (teacher, student) = (run(self.calibration.weights())?, run(&self.student)?);
            sum += distance(self.target, &teacher, &student) * teacher.outputs().nrows() as f64;
            rows += teacher.outputs().nrows();
        }
        Ok(sum / rows.max(1) as f64)
    }
}
