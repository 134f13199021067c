//! Meeting the target: a step found on the survey, then one encoding that is steered, and another only where the serialized
//! archive is not what was asked for (section 6.2).

use std::io::{BufWriter, Write};
use std::path::Path;

use super::super::options::{Quantization, Target};
use super::super::rate::{StepSearch, gaussian_step};
use super::super::record::FoundMotion;
use super::super::survey::{Probe, Survey};
use super::super::train::Schedule;
use super::super::treatment::{Fineness, Treatment};
use super::compare::Compared;
use super::records::{WriteError, Written, write_index};
use super::steering::{Bracket, Steering, replan};
use super::{Encoder, PackError, quantized_tensors};

/// Finest rate of the quantizer: 61 coded positions above eight raw bits, less what tails need.
const MOST_BITS: f64 = 12.0;
/// Rate of the first step tried: where bit-exact tensors take most of a file, what is left for the others is not known yet.
const MOST_FIRST_BITS: f64 = 6.0;
/// Encodings of the whole checkpoint until the target must be met.
const ENCODINGS: usize = 8;
/// Steps tried on the survey. Most targets need three.
const PROBES: usize = 7;
/// Bits that are left for a weight at least, where any is quantized.
const LEAST_BITS: f64 = 0.1;
/// Where bit-exact parts leave too little, they are tried again with coarser steps up to this many times the first.
const COARSEST: f64 = 256.0;
/// The survey's step is good enough when its estimate is this near: steering does the rest.
const PROBE_TOLERANCE: f64 = 0.002;

/// The step, and what it gives.
#[derive(Clone)]
pub(super) struct StepPlan {
    pub(super) probe: Probe,
    /// Bits that a weight saves per octave of step.
    pub(super) slope: f64,
    /// What the records may take: bits, or squared error.
    pub(super) budget: f64,
}

impl Encoder<'_> {
    /// The step to encode with.
    pub(super) fn find_step(&self, survey: &mut Survey<'_>) -> Result<StepPlan, PackError> {
        if self.options.quantization == Quantization::ResidualVector && survey.samples().next().is_some() {
            return self.plan_vectors(survey);
        }
        let (following, energy) = survey.energy();
        if following == 0 || energy == 0.0 {
            if let Target::BitsPerParameter(wanted) = self.options.target
                && !survey.has_rates()
            {
                log::warn!("--bpp {wanted}: no tensor of this checkpoint may be quantized; packing it bit-exact");
            }
            let mut probe = survey.probe(1.0, None);
            for _ in 1..if survey.has_rates() { PROBES } else { 1 } {
                probe = survey.probe(1.0, Some(&probe)); // parts with a rate of their own find their steps
            }
            return Ok(StepPlan { probe, slope: 1.0, budget: f64::INFINITY });
        }
        let rms = (energy / following as f64).sqrt();
        match self.options.target {
            Target::Lossless => unreachable!("nothing follows the step of a lossless checkpoint"),
            Target::BitsPerParameter(wanted) => self.find_step_for_rate(survey, wanted, rms, following as f64),
            Target::RelativeSquaredError(wanted) => {
                let wanted = wanted * (1.0 - 0.4 * self.options.effort.tolerance()); // the bound is one not to cross
                let mut search = StepSearch::new(0.0, 2.0);
                let mut step = rms * (6.0 * wanted).sqrt();
                let mut probe = survey.probe(step, None);
                let mut following = following;
                let mut attempt = 0;
                while attempt < PROBES {
                    attempt += 1;
                    let (now_following, energy) = survey.energy();
                    if now_following != following && now_following > 0 {
                        // Parts turned out to be shorter bit-exact: the others may be of another scale.
                        following = now_following;
                        attempt = 0;
                        search = StepSearch::new(0.0, 2.0);
                        step = (energy / following as f64).sqrt() * (6.0 * wanted).sqrt();
                        probe = survey.probe(step, None);
                        continue;
                    }
                    let error: f64 = probe.parts.iter().flatten().map(|part| part.squared_error).sum();
                    let excess = error / (wanted * survey.quantized_energy());
                    let is_near = (excess - 1.0).abs() < PROBE_TOLERANCE;
                    let is_enough = attempt >= self.options.effort.least_probes();
                    if is_near && is_enough || excess.is_nan() || excess == 0.0 {
                        break;
                    }
                    step = search.next(step, excess.log2());
                    probe = survey.probe(step, Some(&probe));
                }
                // Parts that turned out to be shorter bit-exact no longer count.
                let budget = wanted * survey.quantized_energy();
                Ok(StepPlan { probe, slope: 1.0, budget })
            }
        }
    }

    fn find_step_for_rate(
        &self,
        survey: &mut Survey<'_>,
        wanted: f64,
        rms: f64,
        following: f64,
    ) -> Result<StepPlan, PackError> {
        let parameters = self.checkpoint.parameters() as f64;
        let first_step =
            |rms: f64, following: f64| gaussian_step(rms, (wanted * parameters / following).min(MOST_FIRST_BITS));
        let mut step = first_step(rms, following);
        let mut coarser = 1.0;
        let mut probe = survey.probe(step, None);
        let mut search = StepSearch::new(0.0, -following);
        let mut slope = 1.0;
        let mut following = following;
        let mut attempt = 0;
        loop {
            attempt += 1;
            let (now_following, energy) = survey.energy();
            if now_following as f64 != following && now_following > 0 {
                // Parts turned out to be shorter bit-exact: the others may be of another scale.
                following = now_following as f64;
                attempt = 0;
                step = coarser * first_step((energy / following).sqrt(), following);
                search = StepSearch::new(0.0, -following);
                probe = survey.probe(step, None);
                continue;
            }
            let budget = wanted * parameters - self.index_bits(&probe);
            let of = |follows: bool| {
                let parts = probe.parts.iter().flatten().filter(move |part| part.follows_step == follows);
                parts.map(|part| part.bits).sum::<f64>()
            };
            let (bits, fixed) = (of(true), of(false));
            let least = LEAST_BITS * now_following as f64;
            if budget - fixed < least {
                // Parts that are no longer bit-exact than quantized so finely may be longer than quantized as the budget asks.
                if coarser < COARSEST && survey.reconsider() {
                    (attempt, coarser) = (0, 4.0 * coarser);
                    let energy;
                    (following, energy) = (survey.energy().0 as f64, survey.energy().1);
                    step = coarser * first_step((energy / following).sqrt(), following);
                    search = StepSearch::new(0.0, -following);
                    probe = survey.probe(step, None);
                    continue;
                }
                let needed = (wanted * parameters - budget + fixed + least) / parameters;
                return Err(PackError::Rate { wanted, reason: self.unreachable_because(&probe, needed) });
            }
            if now_following > 0 && budget - fixed > MOST_BITS * now_following as f64 {
                let reason = format!(
                    "it leaves more than the {MOST_BITS} bits that quantization offers to a weight; pack it --lossless"
                );
                return Err(PackError::Rate { wanted, reason });
            }
            let excess = bits + fixed - budget;
            let is_enough = attempt >= self.options.effort.least_probes();
            if excess.abs() < PROBE_TOLERANCE * budget && is_enough || attempt == PROBES || bits == 0.0 {
                return Ok(StepPlan { probe, slope, budget });
            }
            let octaves = step.log2();
            step = search.next(step, excess);
            slope = (search.slope().abs() / following).clamp(0.2, 2.0);
            log::debug!("step tried: {octaves:.3} octaves, {excess:.0} bits above the budget");
            probe = survey.probe(step, Some(&probe));
        }
    }

    /// Why a rate cannot be reached.
    fn unreachable_because(&self, probe: &Probe, needed: f64) -> String {
        let treatments = self.treatments.iter().flatten().zip(probe.parts.iter().flatten());
        let mut could_be =
            treatments.filter(|(treatment, _)| matches!(treatment, Treatment::Quantized(Fineness::Times(_))));
        if could_be.clone().next().is_some() && could_be.all(|(_, part)| !part.decision.is_quantized()) {
            // The rest would have to be so fine that nothing is won by it.
            return format!(
                "what is left for the tensors that may be quantized is so much that bit-exact they are shorter, and all \
                 bit-exact takes {needed:.2}; expected --lossless, or a lower rate"
            );
        }
        let mut reason = format!("what is not quantized leaves too little: at least {needed:.2} is needed");
        if let Some(largest) = self.largest_exact(probe) {
            reason.push_str(&largest);
        }
        reason
    }

    /// The bit-exact tensor that takes most, what it takes, and why it is bit-exact where that is a matter of the rate.
    fn largest_exact(&self, probe: &Probe) -> Option<String> {
        let planned = self.plan.records.iter().flat_map(|record| &record.parts);
        let parts = planned.zip(self.treatments.iter().flatten()).zip(probe.parts.iter().flatten());
        let exact = parts.filter(|(_, probed)| !probed.decision.is_quantized());
        let ((part, treatment), probed) = exact.max_by(|(_, a), (_, b)| a.bits.total_cmp(&b.bits))?;
        let name = &self.tensor(part.file, part.tensor).0.name;
        let bits = probed.bits / probed.elements.max(1) as f64;
        let why = match treatment {
            Treatment::Quantized(_) => ", because quantizing it as finely as the rest would not be shorter",
            _ => "",
        };
        Some(format!("; of bit-exact tensors {name} takes most, {bits:.2} bits per element{why}"))
    }

    /// Encodes until the target is met on what was serialized, each time with training where there is a schedule for it.
    pub(super) fn settle(
        &self,
        file: &mut std::fs::File,
        out: &Path,
        mut plan: StepPlan,
        schedule: Option<Schedule>,
    ) -> Result<(Written, Compared, Option<String>), PackError> {
        let output = |source| PackError::Output { path: out.to_owned(), source };
        let parameters = self.checkpoint.parameters() as f64;
        let tolerance = self.options.effort.tolerance();
        let is_steered = plan.probe.parts.iter().flatten().any(|part| part.follows_step);
        let mut bracket = Bracket::default();
        let mut found: Vec<FoundMotion> = self.plan.records.iter().map(|_| FoundMotion::default()).collect();
        for attempt in 1.. {
            file.set_len(0).map_err(output)?;
            let mut buffered = BufWriter::with_capacity(1 << 20, &mut *file);
            let steering = Steering::new(self.options.target, plan.budget, plan.slope, &plan.probe.parts);
            let mut trainer = schedule.and_then(|schedule| self.trainer(&plan.probe, schedule, attempt));
            let written = self.write_records(&mut buffered, &plan.probe, steering, trainer.as_mut(), &mut found);
            let written = written.map_err(|error| match error {
                WriteError::Io(source) => output(source),
                WriteError::SelfCheck(error) => PackError::SelfCheck(error),
                WriteError::Start(error) => *error,
                WriteError::Forward(error) => PackError::Calibration(error.into()),
                WriteError::State(error) => PackError::Output { path: error.path, source: error.source },
                WriteError::Interrupted => PackError::Interrupted(out.to_owned()),
            })?;
            buffered.flush().map_err(output)?;
            drop(buffered);
            let bytes = write_index(file, &written.index, written.bytes).map_err(output)?;
            let settled = !is_steered || attempt == ENCODINGS;
            match self.options.target {
                Target::BitsPerParameter(wanted) => {
                    let bits = 8.0 * bytes as f64;
                    let off = (bits / (wanted * parameters) - 1.0).abs();
                    if off < tolerance || settled {
                        let is_of_vectors = self.options.quantization == Quantization::ResidualVector;
                        let missed = (off >= tolerance && (is_steered || is_of_vectors))
                            .then(|| format!("{:.3} bits per parameter after {attempt} encodings", bits / parameters));
                        let compared = self.compare(file, out, &written.parts)?;
                        return Ok((written, compared, missed));
                    }
                    // What is known now instead of estimated: the index, and every part.
                    plan.budget = wanted * parameters - 8.0 * (bytes - written.bytes) as f64;
                    // Where records are predicted, bits can follow the step faster than the survey says.
                    if let Some(slope) = bracket.slope_after(&written.parts, bits - wanted * parameters) {
                        plan.slope = slope;
                    }
                }
                Target::RelativeSquaredError(wanted) => {
                    let compared = self.compare(file, out, &written.parts)?;
                    let (squared_error, energy) = compared.error_of(&quantized_tensors(&self.plan, &written.parts));
                    let error = if energy > 0.0 { squared_error / energy } else { 0.0 };
                    if (error <= wanted && error > wanted * (1.0 - tolerance)) || settled {
                        if error > wanted {
                            return Err(PackError::Distortion { wanted, found: error, encodings: attempt });
                        }
                        return Ok((written, compared, None));
                    }
                    let planned: f64 = written.parts.iter().flatten().map(|part| part.squared_error).sum();
                    plan.budget *= planned / squared_error; // rounding to the element type counts too
                }
                Target::Lossless => {
                    let compared = self.compare(file, out, &written.parts)?;
                    return Ok((written, compared, None));
                }
            }
            log::debug!("target not met by encoding {attempt}: {bytes} bytes, budget {:.0} bits", plan.budget);
            plan.probe.parts = replan(self.options.target, plan.budget, plan.slope, &plan.probe.parts, &written.parts);
        }
        unreachable!("the last attempt returns")
    }
}
