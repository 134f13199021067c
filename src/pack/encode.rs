//! The encoding of a whole checkpoint: Algorithm 1's upper half, around it rate control, and at the end a full decode that
//! is compared with the source before anything is called done.
//!
//! A checkpoint is read three times: surveyed, encoded, compared. Encoding steers the step as it goes (`steering`), so that one
//! encoding is enough.

mod compare;
mod error;
mod finished;
mod network;
mod records;
mod steering;
mod target;
mod training;
mod vectors;

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::{Arc, OnceLock};

use self::compare::Compared;
pub use self::error::PackError;
pub use self::finished::{Finished, hidden_file};
use self::training::Settled;
use super::base::{Base, BaseError};
use super::calibration::{Calibration, CalibrationError};
use super::evaluation::Evaluation;
use super::keep::{Keep, kept};
use super::low_rank::add_product;
use super::network::FittedNetwork;
use super::options::{AlignmentChoice, BitAllocation, PackOptions, PredictorChoice, Quantization};
use super::profile::Profile;
use super::report::{PackReport, TensorReport};
use super::source::Checkpoint;
use super::survey::{ProbedPart, Survey};
use super::symbols::RunLayout;
use super::treatment::{Decision, ExactStart, Fineness, Start, Treatment, is_already_quantized, is_near, may_lose};
use super::{sensitivity, statistics};
use crate::archive::{Archive, content_id};
use crate::codec::architecture::{BlockType, CheckpointPlan, RecordPlan};
use crate::decode::{Engine, EngineChoice};
use crate::format::difference::BaseTensor;
use crate::tensor::TensorInfo;

/// Told how far packing has come.
pub trait Progress: Sync {
    /// A phase begins that will go through this many bytes of the checkpoint.
    fn phase(&self, name: &str, bytes: u64);
    /// So many bytes of the phase are done.
    fn advance(&self, bytes: u64);
    /// Whether to stop as soon as possible; asked after every tensor.
    fn is_interrupted(&self) -> bool {
        false
    }
}

/// Nobody listens.
pub struct Silent;

impl Progress for Silent {
    fn phase(&self, _: &str, _: u64) {}
    fn advance(&self, _: u64) {}
}

/// How a tensor starts from one of the base.
#[derive(Debug)]
struct BasedTensor {
    reference: BaseTensor,
    /// Bit-exact, where that is shorter than bit-exact and alone.
    exact: Option<ExactStart>,
    /// Whether it is so near that what changed is quantized where the tensor is to be.
    is_near: bool,
}

/// A checkpoint on its way into an archive.
pub struct Encoder<'a> {
    checkpoint: &'a Checkpoint,
    options: &'a PackOptions,
    progress: &'a dyn Progress,
    base: Option<&'a Base>,
    profile: Option<&'a Profile>,
    plan: CheckpointPlan,
    /// Per record, per part.
    treatments: Vec<Vec<Treatment>>,
    /// The tensors that start from the base, or may, by file and tensor.
    based: BTreeMap<(usize, usize), BasedTensor>,
    /// Decodes what later records are predicted from.
    engine: Arc<dyn Engine>,
    calibration: Option<Calibration<'a>>,
    /// What parts may be predicted with, fitted when first asked for.
    network: OnceLock<Option<FittedNetwork>>,
    evaluation: Option<Evaluation<'a>>,
    /// Samples of every tensor, where they are needed again.
    surveyed: Option<Survey<'a>>,
}

impl<'a> Encoder<'a> {
    /// Plans the records and chooses every tensor's treatment.
    pub fn new(checkpoint: &'a Checkpoint, options: &'a PackOptions, progress: &'a dyn Progress) -> Self {
        Self::with_base(checkpoint, options, None, progress).expect("no base that might not be read")
    }

    /// The same for a variant: tensors may start from those of a base.
    ///
    /// # Errors
    /// When the base does not decode.
    pub fn with_base(
        checkpoint: &'a Checkpoint,
        options: &'a PackOptions,
        base: Option<&'a Base>,
        progress: &'a dyn Progress,
    ) -> Result<Self, PackError> {
        Self::with_profile(checkpoint, options, base, None, progress)
    }

    /// The same, where an earlier variant of the same base says how tensors that change alike are coded. It does not for
    /// tensors that may lose something.
    ///
    /// # Errors
    /// When the base does not decode, or the profile cannot be read any more.
    pub fn with_profile(
        checkpoint: &'a Checkpoint,
        options: &'a PackOptions,
        base: Option<&'a Base>,
        profile: Option<&'a Profile>,
        progress: &'a dyn Progress,
    ) -> Result<Self, PackError> {
        let counterparts = base.map(|base| base.counterparts(checkpoint)).transpose()?;
        let mut encoder = Self {
            checkpoint,
            options,
            progress,
            base,
            profile,
            based: BTreeMap::new(),
            plan: checkpoint.plan(),
            treatments: Vec::new(),
            engine: EngineChoice::Auto.engine(),
            calibration: None,
            network: OnceLock::new(),
            evaluation: None,
            surveyed: None,
        };
        if options.alignment == AlignmentChoice::Coarse {
            encoder.plan.records.iter_mut().for_each(RecordPlan::merge_pairs);
        }
        encoder.progress.phase("reading", encoder.source_bytes());
        for record in &encoder.plan.records {
            let mut treatments = Vec::with_capacity(record.parts.len());
            for part in &record.parts {
                let (tensor, bytes) = encoder.tensor(part.file, part.tensor);
                let reference = counterparts.as_ref().and_then(|found| found[part.file][part.tensor]);
                let (treatment, based) = encoder.treat(record.block_type, (tensor, bytes), reference)?;
                if let Some(based) = based {
                    encoder.based.insert((part.file, part.tensor), based);
                }
                treatments.push(treatment);
                encoder.finish_part(part.file, part.tensor);
            }
            encoder.treatments.push(treatments);
        }
        Ok(encoder)
    }

    /// What is done with a tensor, and how it starts from `reference`, a tensor of the base, where it does or may.
    fn treat(
        &self,
        block_type: BlockType,
        (tensor, bytes): (&TensorInfo, &[u8]),
        reference: Option<BaseTensor>,
    ) -> Result<(Treatment, Option<BasedTensor>), PackError> {
        let keep = kept(&self.options.keep, &tensor.name);
        let choose = || Treatment::choose(block_type, tensor, bytes, keep, self.options);
        let Some((base, reference)) = self.base.zip(reference) else { return Ok((choose(), None)) };
        let decoded = base.decoded(reference, tensor.length_bytes).map_err(BaseError::from)?;
        if !may_lose(keep, self.options) {
            let exact = match base.tensor(reference).shape == tensor.shape && bytes == decoded {
                true => Some(ExactStart::equal(reference)),
                false => self.start_as_known((tensor, bytes), reference, &decoded)?,
            };
            if let Some(exact) = exact {
                let treatment = Treatment::Based(exact.choice);
                return Ok((treatment, Some(BasedTensor { reference, exact: Some(exact), is_near: false })));
            }
        }
        let mut treatment = choose();
        let mut based = BasedTensor::choose(base, reference, treatment, tensor, bytes, &decoded);
        based.is_near &= self.options.quantization != Quantization::ResidualVector;
        if let (false, Some(exact)) = (matches!(treatment, Treatment::Quantized(_)), &based.exact) {
            treatment = Treatment::Based(exact.choice);
        }
        let may_start = based.exact.is_some() || based.is_near;
        Ok((treatment, may_start.then_some(based)))
    }

    /// How a tensor starts from one of the base, `decoded` as many bytes, as it does in the profile.
    fn start_as_known(
        &self,
        source: (&TensorInfo, &[u8]),
        reference: BaseTensor,
        decoded: &[u8],
    ) -> Result<Option<ExactStart>, PackError> {
        let Some(profile) = self.profile else { return Ok(None) };
        let Some(known) = profile.part(source.0, reference)? else { return Ok(None) };
        Ok(ExactStart::as_known(&known, profile.tables(), reference, source, decoded))
    }

    /// What a tensor starts from where it is quantized or, the other way, bit-exact, decoded; `None` where it stands alone.
    fn start(&self, file: usize, tensor: usize, is_quantized: bool) -> Result<Option<Start>, PackError> {
        let (Some(base), Some(based)) = (self.base, self.based.get(&(file, tensor))) else { return Ok(None) };
        let exact = match &based.exact {
            _ if is_quantized && based.is_near => None,
            Some(exact) if !is_quantized => Some(exact),
            _ => return Ok(None),
        };
        let info = self.tensor(file, tensor).0;
        let mut predicted = base.decoded(based.reference, info.length_bytes).map_err(BaseError::from)?;
        let product = exact.and_then(|exact| exact.product.as_ref());
        if let Some(found) = product {
            add_product(&found.product, &info.dtype, &mut predicted);
        }
        let low_rank = product.map(|found| found.stored.clone());
        let known = match self.profile.filter(|_| exact.is_some_and(|exact| exact.bytes_as_known.is_some())) {
            Some(profile) => profile.part(info, based.reference)?.map(Box::new),
            None => None,
        };
        Ok(Some(Start { reference: based.reference, predicted, low_rank, known }))
    }

    /// Quantizes in a closed loop, with the inputs that the weights are multiplied with, and most finely what the model's
    /// outputs hang on.
    ///
    /// # Errors
    /// When the model cannot be run.
    pub fn with_calibration(mut self, calibration: Calibration<'a>) -> Result<Self, CalibrationError> {
        if self.options.bit_allocation == BitAllocation::Outputs && self.has_quantized() {
            self.allocate(&calibration)?;
        }
        Ok(Self { calibration: Some(calibration), ..self })
    }

    /// Gives every tensor that follows the checkpoint's step the fineness that the outputs ask for.
    fn allocate(&mut self, calibration: &Calibration<'a>) -> Result<(), CalibrationError> {
        self.progress.phase("weighing", 0);
        let follows = |treatment: &Treatment| matches!(treatment, Treatment::Quantized(Fineness::Times(_)));
        let tensors = |record: &RecordPlan, treatments: &[Treatment]| {
            let parts = record.parts.iter().zip(treatments).map(|(part, treatment)| {
                let tensor = self.tensor(part.file, part.tensor).0;
                let layout = || RunLayout::of_shape(&tensor.shape, self.options.steps.group());
                (tensor, follows(treatment).then(layout))
            });
            parts.collect()
        };
        let records: Vec<sensitivity::RecordTensors<'_>> = (self.plan.records.iter().zip(&self.treatments))
            .map(|(record, treatments)| (record, tensors(record, treatments)))
            .collect();
        let finenesses = sensitivity::finenesses(calibration, &records, self.options.seed)?;
        for (treatments, (_, tensors)) in self.treatments.iter_mut().zip(&records) {
            for (treatment, (tensor, layout)) in treatments.iter_mut().zip(tensors) {
                if let (Some(_), Some(&fineness)) = (layout, finenesses.get(&tensor.name)) {
                    *treatment = Treatment::Quantized(Fineness::Times(fineness));
                }
            }
        }
        Ok(())
    }

    /// Compares what the decoded model says with the original.
    #[must_use]
    pub fn with_evaluation(self, evaluation: Evaluation<'a>) -> Self {
        Self { evaluation: Some(evaluation), ..self }
    }

    /// Keeps what is learned of the checkpoint: it will be packed again, with [`Encoder::retarget`].
    ///
    /// # Errors
    /// When the base does not decode, or the profile cannot be read.
    pub fn remember(&mut self) -> Result<(), PackError> {
        self.surveyed = Some(self.survey()?);
        Ok(())
    }

    /// Packs for another lossy target from here on; all other options must be those that it was made with.
    pub fn retarget(&mut self, options: &'a PackOptions) {
        assert!(self.options.target.is_lossy() && options.target.is_lossy(), "treatments were chosen for losses");
        self.options = options;
    }

    fn tensor(&self, file: usize, tensor: usize) -> (&'a TensorInfo, &'a [u8]) {
        let file = &self.checkpoint.files[file];
        (&file.header.tensors[tensor], file.tensor_bytes(tensor))
    }

    fn finish_part(&self, file: usize, tensor: usize) {
        let file = &self.checkpoint.files[file];
        file.release(tensor);
        self.progress.advance(file.header.tensors[tensor].length_bytes);
    }

    /// An error once somebody asked to stop.
    fn check_interrupted(&self, out: &Path) -> Result<(), PackError> {
        if self.progress.is_interrupted() { Err(PackError::Interrupted(out.to_owned())) } else { Ok(()) }
    }

    fn source_bytes(&self) -> u64 {
        self.checkpoint.files.iter().map(|file| file.header.file_bytes()).sum()
    }

    /// An error where a checkpoint that was quantized before is to lose anything.
    fn check_not_quantized(&self) -> Result<(), PackError> {
        if !self.has_quantized() || self.options.force_requantize {
            return Ok(());
        }
        let tensors = self.checkpoint.files.iter().flat_map(|file| &file.header.tensors);
        match tensors.into_iter().find(|tensor| is_already_quantized(tensor)) {
            Some(tensor) => Err(PackError::AlreadyQuantized { tensor: tensor.name.clone() }),
            None => Ok(()),
        }
    }

    /// Samples every tensor.
    fn survey(&self) -> Result<Survey<'a>, PackError> {
        if let Some(surveyed) = &self.surveyed {
            return Ok(surveyed.with_options(self.options));
        }
        self.progress.phase("measuring", self.source_bytes());
        let quantizable: u64 = (self.plan.records.iter().zip(&self.treatments))
            .flat_map(|(record, treatments)| record.parts.iter().zip(treatments))
            .filter(|(_, treatment)| matches!(treatment, Treatment::Quantized(_)))
            .map(|(part, _)| self.tensor(part.file, part.tensor).0.elements())
            .sum();
        let share = self.options.effort.surveyed_elements() as f64 / quantizable.max(1) as f64;
        let known = self.profile.map(|profile| profile.tables().clone()).unwrap_or_default();
        let mut survey = Survey::new(self.options).with_tables(known);
        for (record, treatments) in self.plan.records.iter().zip(&self.treatments) {
            survey.begin_record();
            for (part, &treatment) in record.parts.iter().zip(treatments) {
                let (tensor, bytes) = self.tensor(part.file, part.tensor);
                let is_quantized = matches!(treatment, Treatment::Quantized(_));
                let start = if is_quantized { self.start(part.file, part.tensor, true)? } else { None };
                let exact = self.based.get(&(part.file, part.tensor)).and_then(|based| based.exact.as_ref());
                survey.add(treatment, (tensor, bytes), start.as_ref(), exact, share);
                self.finish_part(part.file, part.tensor);
            }
        }
        Ok(survey)
    }

    /// Whether anything is to be quantized.
    fn has_quantized(&self) -> bool {
        self.treatments.iter().flatten().any(|treatment| matches!(treatment, Treatment::Quantized(_)))
    }

    /// The periodic keyframe schedule (Eq. 19), layers counted from 0.
    fn is_keyframe(&self, record: &RecordPlan) -> bool {
        record.layer.is_none_or(|layer| layer % self.options.keyframe_interval == 0)
    }

    /// Whether the next layer's record could be predicted from this one.
    fn may_be_a_reference(&self, record: &RecordPlan) -> bool {
        self.has_quantized()
            && self.options.predictor() != PredictorChoice::None
            && record.layer.is_some_and(|layer| (layer + 1) % self.options.keyframe_interval != 0)
    }

    /// What would be done to every tensor, with estimated sizes.
    ///
    /// # Errors
    /// [`PackError::Rate`] where the target cannot be met.
    pub fn dry_run(&self) -> Result<Vec<TensorReport>, PackError> {
        self.check_not_quantized()?;
        let plan = self.find_step(&mut self.survey()?)?;
        let mut reports = Vec::new();
        for (record, parts) in self.plan.records.iter().zip(&plan.probe.parts) {
            for (part, probed) in record.parts.iter().zip(parts) {
                reports.push(self.tensor_report(record, (part.file, part.tensor), probed, None));
            }
        }
        Ok(reports)
    }

    fn tensor_report(
        &self,
        record: &RecordPlan,
        (file, tensor): (usize, usize),
        part: &ProbedPart,
        errors: Option<(f64, f64)>,
    ) -> TensorReport {
        let file = &self.checkpoint.files[file];
        let info = &file.header.tensors[tensor];
        TensorReport {
            file: file.name.clone(),
            name: info.name.clone(),
            dtype: info.dtype.to_string(),
            shape: info.shape.clone(),
            layer: record.layer,
            block_type: record.block_type.name(),
            treatment: part.decision.name(),
            keep: (kept(&self.options.keep, &info.name))
                .filter(|&keep| keep == Keep::Lossless || part.decision.is_quantized())
                .map(|keep| keep.to_string()),
            bits_per_element: part.bits / info.elements().max(1) as f64,
            relative_squared_error: errors.map(|(error, energy)| if energy > 0.0 { error / energy } else { 0.0 }),
            energy: errors.map(|(_, energy)| energy).filter(|_| part.decision.is_quantized()),
        }
    }

    /// Packs into `out`, which must not exist unless `replace` is set.
    ///
    /// # Errors
    /// See [`PackError`]; after one, nothing is at `out` that was not there before.
    pub fn pack(&self, out: &Path, replace: bool) -> Result<PackReport, PackError> {
        self.write(out)?.publish(replace)
    }

    /// Packs into a hidden file beside `out`, to which [`Finished::publish`] gives that name.
    ///
    /// # Errors
    /// See [`PackError`]; the hidden file is gone then.
    pub fn write(&self, out: &Path) -> Result<Finished, PackError> {
        self.check_not_quantized()?;
        // Before the work, in case it cannot be made.
        let unfinished = finished::create(out)?;
        let output = |source| PackError::Output { path: out.to_owned(), source };
        let mut survey = self.survey()?;
        self.check_interrupted(out)?;
        let plan = self.find_step(&mut survey)?;
        self.check_interrupted(out)?;
        // A survey holds samples of everything: it goes before the encoding unless it is asked once more.
        let asked = self.options.stats.then(|| (survey, plan.probe.clone()));
        let Settled { file: mut unfinished, written, compared, target_missed, training } =
            self.settle_trained(unfinished, out, plan)?;
        let parameters = self.checkpoint.parameters();
        let stats = asked.map(|(mut survey, probe)| {
            statistics::measure(&mut survey, self.options, &probe, &written.stages, parameters)
        });

        let mut index = written.index;
        for (number, file) in index.files.iter_mut().enumerate() {
            file.decoded_sha256 = compared.decoded[number];
            file.source_sha256 = compared.sources[number];
            file.decoded_blake3 = Some(compared.decoded_blake3[number]);
        }
        index.content_id = content_id(compared.decoded.iter().copied());
        let evaluation = match &self.evaluation {
            Some(evaluation) => {
                self.progress.phase("evaluating", 0);
                Some(evaluation.of_archive(&self.reopened(unfinished.as_file())?)?)
            }
            None => None,
        };
        let (squared_error, energy) = compared.error_of(&quantized_tensors(&self.plan, &written.parts));
        let relative_squared_error = if energy > 0.0 { squared_error / energy } else { 0.0 };
        let of_training = index.provenance.into_iter().filter(|(key, _)| key == records::TRAINING);
        index.provenance =
            self.provenance(relative_squared_error, evaluation.as_ref()).into_iter().chain(of_training).collect();
        let archive_bytes = records::write_index(unfinished.as_file_mut(), &index, written.bytes).map_err(output)?;
        unfinished.as_file().sync_all().map_err(output)?;
        Archive::open(unfinished.path())?;

        let report = PackReport {
            archive: out.display().to_string(),
            architecture: index.architecture,
            source_bytes: self.source_bytes(),
            archive_bytes,
            parameters,
            bits_per_parameter: 8.0 * archive_bytes as f64 / parameters.max(1) as f64,
            lossless: compared.decoded == compared.sources,
            relative_squared_error,
            calibration: self.calibration.as_ref().map(|calibration| calibration.data().origin.to_string()),
            evaluation,
            training,
            relative_squared_error_of_changes: compared.error_of_changes(),
            target_missed,
            keyframe_records: written.keyframe_records,
            predicted_records: written.predicted_records,
            residual_entropy: (written.residual_elements > 0)
                .then(|| written.residual_bits / written.residual_elements as f64),
            permutation_percent: 100.0 * written.stages.chosen_permutation / (8.0 * archive_bytes as f64),
            stages: written.stages,
            stats,
            tensors: self.tensor_reports(&written.parts, &compared),
        };
        Ok(Finished::new(unfinished, out, report))
    }

    fn tensor_reports(&self, parts: &[Vec<ProbedPart>], compared: &Compared) -> Vec<TensorReport> {
        let mut reports = Vec::new();
        for (record, parts) in self.plan.records.iter().zip(parts) {
            for (part, written) in record.parts.iter().zip(parts) {
                let errors = compared.errors[part.file][part.tensor];
                reports.push(self.tensor_report(record, (part.file, part.tensor), written, Some(errors)));
            }
        }
        reports
    }
}

impl BasedTensor {
    /// How a tensor may start from one of the base, `decoded` as many bytes. `treatment` is what would be done with it alone.
    fn choose(
        base: &Base,
        reference: BaseTensor,
        treatment: Treatment,
        tensor: &TensorInfo,
        bytes: &[u8],
        decoded: &[u8],
    ) -> Self {
        let alone = match treatment {
            Treatment::Quantized(_) => Treatment::exact(tensor, bytes),
            other => other,
        };
        let is_whole = base.tensor(reference).shape == tensor.shape;
        let exact = ExactStart::choose(alone, reference, is_whole, tensor, bytes, decoded);
        Self { reference, exact, is_near: is_near(treatment, tensor, bytes, decoded) }
    }
}

/// File and tensor of every quantized part.
fn quantized_tensors(plan: &CheckpointPlan, parts: &[Vec<ProbedPart>]) -> BTreeSet<(usize, usize)> {
    let planned = plan.records.iter().flat_map(|record| &record.parts);
    (planned.zip(parts.iter().flatten()))
        .filter(|(_, part)| matches!(part.decision, Decision::Quantized(_)))
        .map(|(part, _)| (part.file, part.tensor))
        .collect()
}
