//! One-pass rate control: while records are written, the step of those to come is corrected by what those before them took.
//!
//! The survey says what every part takes at the step; what a record really took, prediction included, says how far to
//! believe it. The corrections are a few hundredths of an octave, so that the step is in effect the same everywhere.

use super::super::options::Target;
use super::super::quantize::QuantizerChoice;
use super::super::survey::ProbedPart;
use super::super::treatment::Decision;

/// The estimate is believed as if this share of the whole had been as estimated.
const PRIOR: f64 = 0.02;
/// Greatest correction, in octaves. Where more would be needed, because prediction saves much of what the survey expected, an
/// encoding with one step for all is worth more than the time that it takes.
const MOST_OCTAVES: f64 = 0.05;

/// How far the archive has come towards its target.
pub(super) struct Steering {
    aim: Aim,
    /// Bits per octave of step that a weight saves.
    slope: f64,
    /// Of records not yet written.
    left: Sums,
    /// Of records written, as planned and as they are; only of parts that follow the step.
    planned: f64,
    actual: f64,
}

/// What is held to a budget, and what is left of it.
#[derive(Clone, Copy, Debug)]
enum Aim {
    Bits(f64),
    SquaredError(f64),
    Nothing,
}

#[derive(Clone, Copy, Default)]
struct Sums {
    /// Of parts that follow the step.
    following: f64,
    /// Of all others.
    fixed: f64,
    /// Elements that follow the step.
    elements: f64,
}

impl Steering {
    /// Starts with `parts` as planned, record by record. `budget` is what the records may take: bits, or squared error.
    pub(super) fn new(target: Target, budget: f64, slope: f64, parts: &[Vec<ProbedPart>]) -> Self {
        let aim = match target {
            Target::BitsPerParameter(_) => Aim::Bits(budget),
            Target::RelativeSquaredError(_) => Aim::SquaredError(budget),
            Target::Lossless => Aim::Nothing,
        };
        let mut steering = Self { aim, slope, left: Sums::default(), planned: 0.0, actual: 0.0 };
        for part in parts.iter().flatten() {
            steering.left.add(part, steering.aim.value(part), 1.0);
        }
        let prior = PRIOR * steering.left.following;
        (steering.planned, steering.actual) = (prior, prior);
        steering
    }

    /// What the step of the next record is to be multiplied by.
    pub(super) fn step_factor(&self) -> f32 {
        if self.left.following <= 0.0 || self.planned <= 0.0 {
            return 1.0;
        }
        let expected = self.left.following * self.actual / self.planned;
        let octaves = match self.aim {
            Aim::Bits(left) => (expected - (left - self.left.fixed)) / (self.slope * self.left.elements),
            // The error goes with the square of the step.
            Aim::SquaredError(left) => 0.5 * ((left - self.left.fixed).max(f64::MIN_POSITIVE) / expected).log2(),
            Aim::Nothing => 0.0,
        };
        octaves.clamp(-MOST_OCTAVES, MOST_OCTAVES).exp2() as f32
    }

    /// Takes account of a record: its parts as planned, and as they are.
    pub(super) fn account(&mut self, planned: &[ProbedPart], written: &[ProbedPart]) {
        for (planned, written) in planned.iter().zip(written) {
            let (expected, actual) = (self.aim.value(planned), self.aim.value(written));
            self.left.add(planned, expected, -1.0);
            if planned.follows_step {
                self.planned += expected;
                self.actual += actual;
            }
            match &mut self.aim {
                Aim::Bits(left) | Aim::SquaredError(left) => *left -= actual,
                Aim::Nothing => (),
            }
        }
    }
}

impl Aim {
    fn value(self, part: &ProbedPart) -> f64 {
        match self {
            Self::Bits(_) => part.bits,
            Self::SquaredError(_) => part.squared_error,
            Self::Nothing => 0.0,
        }
    }
}

impl Sums {
    fn add(&mut self, part: &ProbedPart, value: f64, sign: f64) {
        if part.follows_step {
            self.following += sign * value;
            self.elements += sign * part.elements as f64;
        } else {
            self.fixed += sign * value;
        }
    }
}

/// The encodings nearest to the target on both sides of it.
#[derive(Debug, Default)]
pub(super) struct Bracket {
    last: Option<Point>,
    above: Option<Point>,
    below: Option<Point>,
}

/// One encoding: its mean step, and the bits by which it missed.
#[derive(Clone, Copy, Debug)]
struct Point {
    octaves: f64,
    excess: f64,
}

impl Bracket {
    /// Bits that a weight saves per octave of step from the last encoding to the target, which was missed by `excess`: by the
    /// encodings on both sides of it, or the last two where all were on one. `None` where that says nothing.
    pub(super) fn slope_after(&mut self, written: &[Vec<ProbedPart>], excess: f64) -> Option<f64> {
        let steps = written.iter().flatten().filter(|part| part.follows_step).filter_map(|part| match part.decision {
            Decision::Quantized(choice) => Some((part.elements as f64, f64::from(choice.step).log2())),
            _ => None,
        });
        let (elements, octaves) =
            steps.fold((0.0, 0.0), |(sum, mean), (elements, step)| (sum + elements, mean + elements * step));
        if elements == 0.0 {
            return None;
        }
        let now = Point { octaves: octaves / elements, excess };
        let side = if excess > 0.0 { &mut self.above } else { &mut self.below };
        *side = Some(now);
        let pair = self.above.zip(self.below).or_else(|| self.last.map(|last| (last, now)));
        self.last = Some(now);
        let (one, other) = pair?;
        let slope = (one.excess - other.excess) / ((other.octaves - one.octaves) * elements);
        (slope.is_finite() && slope > 0.0).then_some(slope.clamp(0.1, 16.0))
    }
}

/// What was written, as a plan for another encoding: with one step for all that follow it, chosen so that `budget` is met.
/// `slope` is as in [`Steering::new`].
pub(super) fn replan(
    target: Target,
    budget: f64,
    slope: f64,
    planned: &[Vec<ProbedPart>],
    written: &[Vec<ProbedPart>],
) -> Vec<Vec<ProbedPart>> {
    let steps = |planned: &ProbedPart, written: &ProbedPart| match (planned.decision, written.decision) {
        (Decision::Quantized(planned), Decision::Quantized(written)) => f64::from(written.step / planned.step).log2(),
        _ => 0.0,
    };
    let pairs = || planned.iter().flatten().zip(written.iter().flatten());
    let following = || pairs().filter(|(planned, _)| planned.follows_step);
    let fixed = |value: fn(&ProbedPart) -> f64| {
        let fixed = pairs().filter(|(planned, _)| !planned.follows_step);
        fixed.map(|(_, written)| value(written)).sum::<f64>()
    };
    // Everything as it would be with the planned step, then the step that takes it to the budget.
    let bits_at = |octaves: f64, planned: &ProbedPart, written: &ProbedPart| {
        written.bits + slope * written.elements as f64 * (steps(planned, written) - octaves)
    };
    let error_at = |octaves: f64, planned: &ProbedPart, written: &ProbedPart| {
        written.squared_error * (2.0 * (octaves - steps(planned, written))).exp2()
    };
    let octaves = match target {
        Target::BitsPerParameter(_) => {
            let bits: f64 = following().map(|(planned, written)| bits_at(0.0, planned, written)).sum();
            let elements: f64 = following().map(|(_, written)| written.elements as f64).sum();
            (bits + fixed(|part| part.bits) - budget) / (slope * elements.max(1.0))
        }
        Target::RelativeSquaredError(_) => {
            let error: f64 = following().map(|(planned, written)| error_at(0.0, planned, written)).sum();
            0.5 * ((budget - fixed(|part| part.squared_error)).max(f64::MIN_POSITIVE) / error).log2()
        }
        Target::Lossless => 0.0,
    };
    let octaves = if octaves.is_finite() { octaves.clamp(-4.0, 4.0) } else { 0.0 };
    let part = |planned: &ProbedPart, written: &ProbedPart| match (planned.follows_step, planned.decision) {
        (true, Decision::Quantized(choice)) => ProbedPart {
            decision: Decision::Quantized(QuantizerChoice { step: choice.step * octaves.exp2() as f32, ..choice }),
            bits: bits_at(octaves, planned, written),
            squared_error: error_at(octaves, planned, written),
            ..*written
        },
        _ => *written,
    };
    let record = |(planned, written): (&Vec<ProbedPart>, &Vec<ProbedPart>)| {
        planned.iter().zip(written).map(|(planned, written)| part(planned, written)).collect()
    };
    planned.iter().zip(written).map(record).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pack::quantized_symbols::Rounding;

    fn part(bits: f64) -> ProbedPart {
        ProbedPart { decision: Decision::Raw, follows_step: true, elements: 1000, bits, squared_error: 1.0 }
    }

    fn quantized(step: f32, bits: f64, squared_error: f64) -> ProbedPart {
        let rounding = Rounding { trellis: None, lambda: 0.0, own_table: None };
        let choice = QuantizerChoice { step, raw_bits: 0, rounding, root_mean_square: 1.0, vectors: None };
        ProbedPart { decision: Decision::Quantized(choice), bits, squared_error, ..part(0.0) }
    }

    #[test]
    fn a_bracket_closes_on_a_bent_curve_that_the_survey_knew_nothing_of() {
        // Bits fall slowly, then all at once, as where a prediction begins to pay.
        let bits_at = |octaves: f64| 1000.0 * (4.0 - octaves - 3.0 / (1.0 + (-20.0 * (octaves - 0.5)).exp()));
        let (wanted, mut octaves, mut slope) = (2000.0, 0.0, 1.0);
        let mut bracket = Bracket::default();
        for _ in 0..8 {
            let excess = bits_at(octaves) - wanted;
            let written = quantized(octaves.exp2() as f32, bits_at(octaves), 1.0);
            slope = bracket.slope_after(&[vec![written]], excess).unwrap_or(slope);
            octaves += excess / (slope * 1000.0);
        }
        assert!((bits_at(octaves) / wanted - 1.0).abs() < 0.01, "{}", bits_at(octaves));
    }

    /// Ten records that each take so much more than planned; every octave of step saves them a thousand bits.
    fn total(excess: f64) -> f64 {
        let planned: Vec<Vec<ProbedPart>> = (0..10).map(|_| vec![part(4000.0)]).collect();
        let mut steering = Steering::new(Target::BitsPerParameter(4.0), 40_000.0, 1.0, &planned);
        let mut total = 0.0;
        for record in &planned {
            let octaves = f64::from(steering.step_factor()).log2();
            let written = [part(4000.0 * excess - 1000.0 * octaves)];
            steering.account(record, &written);
            total += written[0].bits;
        }
        total
    }

    #[test]
    fn records_that_take_more_or_less_than_planned_still_meet_the_budget() {
        for excess in [0.99, 1.0, 1.01] {
            assert!((total(excess) / 40_000.0 - 1.0).abs() < 0.003, "{excess}: {}", total(excess));
        }
    }

    #[test]
    fn an_error_budget_moves_the_step_by_half_as_many_octaves() {
        let planned = vec![vec![part(1.0)]; 2];
        let steering = Steering::new(Target::RelativeSquaredError(1.0), 2.0 * 1.02, 1.0, &planned);
        assert!((f64::from(steering.step_factor()) - 1.02_f64.sqrt()).abs() < 1e-6);
    }

    #[test]
    fn another_encoding_has_one_step_for_all_that_meets_the_budget() {
        let planned = [vec![quantized(1.0, 5000.0, 1.0), quantized(0.5, 5000.0, 0.25)]];
        // The first with twice its step, the second with its own.
        let written = [vec![quantized(2.0, 3000.0, 4.0), quantized(0.5, 4000.0, 0.25)]];
        let steps = |target, budget| {
            let replanned = replan(target, budget, 1.0, &planned, &written);
            let step = |part: &ProbedPart| match part.decision {
                Decision::Quantized(choice) => choice.step,
                _ => panic!("quantized"),
            };
            replanned[0].iter().map(step).collect::<Vec<f32>>()
        };
        // With the planned steps: 4000 + 4000 bits, and an error of 1 + 0.25.
        assert_eq!(steps(Target::BitsPerParameter(1.0), 8000.0), [1.0, 0.5]);
        assert_eq!(steps(Target::BitsPerParameter(1.0), 6000.0), [2.0, 1.0]);
        assert_eq!(steps(Target::RelativeSquaredError(1.0), 5.0), [2.0, 1.0]);
    }
}
