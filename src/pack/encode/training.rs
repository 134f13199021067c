//! Encoding with training, without, or both to keep the better.

use std::path::Path;

use sha2::{Digest, Sha256};
use tempfile::NamedTempFile;

use super::super::report::TrainingReport;
use super::super::survey::{Probe, ProbedPart};
use super::super::train::state::StateFile;
use super::super::train::{Schedule, Trainer, Training};
use super::compare::Compared;
use super::records::Written;
use super::target::StepPlan;
use super::{Encoder, PackError, finished};

/// An archive that met its target, or came as near as it can.
pub(super) struct Settled {
    pub(super) file: NamedTempFile,
    pub(super) written: Written,
    pub(super) compared: Compared,
    pub(super) target_missed: Option<String>,
    pub(super) training: Option<TrainingReport>,
}

impl<'a> Encoder<'a> {
    /// How to train; `None` where it is not to be, or cannot.
    fn schedule(&self) -> Option<Schedule> {
        let calibration = self.calibration.as_ref().filter(|_| self.base.is_none() && self.has_quantized())?;
        self.options.schedule(self.checkpoint.parameters(), calibration.takes_images())
    }

    /// Trains what `plan` quantizes, in the encoding of this number.
    pub(super) fn trainer(&self, plan: &Probe, schedule: Schedule, encoding: usize) -> Option<Trainer<'_>> {
        let calibration = self.calibration.as_ref()?;
        let is_quantized = |parts: &[ProbedPart], part: usize| parts[part].decision.is_quantized();
        let records = || self.plan.records.iter().zip(&plan.parts);
        let tensors: Vec<&str> = records()
            .flat_map(|(record, parts)| record.parts.iter().enumerate().filter(|(part, _)| is_quantized(parts, *part)))
            .map(|(_, part)| self.tensor(part.file, part.tensor).0.name.as_str())
            .collect();
        let stages = records().filter(|(record, parts)| (0..record.parts.len()).any(|part| is_quantized(parts, part)));
        let trainer = Trainer::new(calibration, &tensors, stages.count(), schedule);
        Some(match &self.options.training_state {
            Some(directory) if schedule.steps > 0 => {
                let fingerprint = self.fingerprint(plan, &calibration.data().origin.to_string(), &schedule, &tensors);
                trainer.kept_in(StateFile::new(directory, encoding, fingerprint))
            }
            _ => trainer,
        })
    }

    /// Of everything that a state of training comes from.
    fn fingerprint(&self, plan: &Probe, calibration: &str, schedule: &Schedule, tensors: &[&str]) -> [u8; 32] {
        let mut hash = Sha256::new();
        hash.update(calibration);
        hash.update(schedule.description());
        for (field, value) in self.options.provenance() {
            hash.update(field);
            hash.update(value);
        }
        tensors.iter().for_each(|tensor| hash.update(tensor));
        for part in plan.parts.iter().flatten() {
            hash.update(part.bits.to_le_bytes());
            hash.update(part.squared_error.to_le_bytes());
        }
        for file in &self.checkpoint.files {
            hash.update(&file.header.bytes);
            (0..file.header.tensors.len()).for_each(|tensor| hash.update(file.tensor_bytes(tensor)));
        }
        hash.finalize().into()
    }

    /// Encodes until the target is met, into `file` or, where training is tried and turns out better, into another beside `out`.
    pub(super) fn settle_trained(&self, file: NamedTempFile, out: &Path, plan: StepPlan) -> Result<Settled, PackError> {
        let Some(schedule) = self.schedule() else { return self.settled(file, out, plan, None) };
        if self.options.training == Training::On {
            return self.settled(file, out, plan, Some(schedule));
        }
        let untrained = self.settled(file, out, plan.clone(), Some(Schedule { steps: 0, ..schedule }))?;
        self.check_interrupted(out)?;
        let trained = self.settled(finished::create(out)?, out, plan, Some(schedule))?;
        let (before, after) = (untrained.held_out_distance(), trained.held_out_distance());
        log::info!("held-out distance {before:.5}, {after:.5} with training");
        let is_better = after < before && (trained.target_missed.is_none() || untrained.target_missed.is_some());
        let report = TrainingReport {
            steps: schedule.steps,
            seed: schedule.seed,
            held_out_distance: Some(after),
            held_out_distance_without: Some(before),
            is_kept: is_better,
        };
        let better = if is_better { trained } else { untrained };
        Ok(Settled { training: Some(report), ..better })
    }

    fn settled(
        &self,
        mut file: NamedTempFile,
        out: &Path,
        plan: StepPlan,
        schedule: Option<Schedule>,
    ) -> Result<Settled, PackError> {
        let (written, compared, target_missed) = self.settle(file.as_file_mut(), out, plan, schedule)?;
        let training = schedule.map(|schedule| TrainingReport {
            steps: schedule.steps,
            seed: schedule.seed,
            held_out_distance: written.held_out_distance,
            held_out_distance_without: None,
            is_kept: true,
        });
        Ok(Settled { file, written, compared, target_missed, training })
    }
}

impl Settled {
    /// Of what decodes; infinite where it is no number, so that nothing is kept for that.
    fn held_out_distance(&self) -> f64 {
        self.written.held_out_distance.filter(|distance| distance.is_finite()).unwrap_or(f64::INFINITY)
    }
}
