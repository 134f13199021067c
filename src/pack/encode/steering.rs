//! One-pass rate control: while records are written, the step of those to come is corrected by what those before them took.
//!
//! The survey says what every part takes at the step; what a record really took, prediction included, says how far to
//! believe it. The corrections are a few thousandths of an octave, so that the step is in effect the same everywhere.

use super::super::options::Target;
use super::super::survey::ProbedPart;

/// The estimate is believed as if this share of the whole had been as estimated.
const PRIOR: f64 = 0.02;
/// Greatest correction, in octaves.
const MOST_OCTAVES: f64 = 0.3;

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
#[derive(Clone, Copy)]
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pack::treatment::Decision;

    fn part(bits: f64) -> ProbedPart {
        ProbedPart { decision: Decision::Raw, follows_step: true, elements: 1000, bits, squared_error: 1.0 }
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
        for excess in [0.97, 1.0, 1.03] {
            assert!((total(excess) / 40_000.0 - 1.0).abs() < 0.003, "{excess}: {}", total(excess));
        }
    }

    #[test]
    fn an_error_budget_moves_the_step_by_half_as_many_octaves() {
        let planned = vec![vec![part(1.0)]; 2];
        let steering = Steering::new(Target::RelativeSquaredError(1.0), 2.0 * 1.1, 1.0, &planned);
        assert!((f64::from(steering.step_factor()) - 1.1_f64.sqrt()).abs() < 1e-6);
    }
}
