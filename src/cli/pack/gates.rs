//! `--fail-if`: when an archive is not good enough. The archive is written all the same, for people to look at; the exit code
//! says that it failed.

use std::fmt;
use std::str::FromStr;

use serde::Serialize;

use crate::pack::evaluation::Distribution;
use crate::pack::report::PackReport;

/// What can be judged.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Measure {
    BitsPerParameter,
    RelativeSquaredError,
    DivergenceMean,
    DivergenceMedian,
    DivergencePercentile,
    PerplexityRatio,
    Top1Agreement,
    AccuracyDrop,
    EmbeddingDistance,
}

/// Every measure by its name on the command line.
const MEASURES: [(&str, Measure); 9] = [
    ("bpp", Measure::BitsPerParameter),
    ("rel-mse", Measure::RelativeSquaredError),
    ("kld", Measure::DivergenceMean),
    ("kld-median", Measure::DivergenceMedian),
    ("kld-p99.9", Measure::DivergencePercentile),
    ("ppl-ratio", Measure::PerplexityRatio),
    ("top1", Measure::Top1Agreement),
    ("accuracy-drop", Measure::AccuracyDrop),
    ("cosine-distance", Measure::EmbeddingDistance),
];

impl Measure {
    /// Whether it takes data to judge the model by.
    fn needs_evaluation(self) -> bool {
        !matches!(self, Self::BitsPerParameter | Self::RelativeSquaredError)
    }

    /// Its value; `None` where the model has no such thing.
    fn of(self, report: &PackReport) -> Option<f64> {
        let evaluation = report.evaluation.as_ref();
        let divergence = |of: fn(&Distribution) -> f64| Some(of(&evaluation?.divergence?));
        match self {
            Self::BitsPerParameter => Some(report.bits_per_parameter),
            Self::RelativeSquaredError => Some(report.relative_squared_error),
            Self::DivergenceMean => divergence(|values| values.mean),
            Self::DivergenceMedian => divergence(|values| values.median),
            Self::DivergencePercentile => divergence(|values| values.percentile_99_9),
            Self::PerplexityRatio => evaluation?.perplexity.map(|perplexity| perplexity.after / perplexity.before),
            Self::Top1Agreement => evaluation?.top1_agreement,
            Self::AccuracyDrop => evaluation?.accuracy.map(|accuracy| accuracy.before - accuracy.after),
            Self::EmbeddingDistance => Some(evaluation?.embedding_distance?.mean),
        }
    }
}

/// How a value is compared with the bound.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Comparison {
    Above,
    AtLeast,
    Below,
    AtMost,
}

/// Longer signs first: `>` begins `>=`.
const COMPARISONS: [(&str, Comparison); 4] =
    [(">=", Comparison::AtLeast), ("<=", Comparison::AtMost), (">", Comparison::Above), ("<", Comparison::Below)];

/// One condition under which an archive fails, for example `kld>0.01`.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Gate {
    /// As it was given.
    text: String,
    measure: Measure,
    comparison: Comparison,
    bound: f64,
}

/// What a gate found.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub(in crate::cli) struct GateResult {
    /// The condition as it was given.
    pub(in crate::cli) fail_if: String,
    /// What was measured; absent where this model has no such thing.
    pub(in crate::cli) value: Option<f64>,
    /// Whether the condition does not hold. What was not measured does not pass.
    pub(in crate::cli) passed: bool,
}

impl FromStr for Gate {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let names = || MEASURES.map(|(name, _)| name).join(", ");
        let expected = || format!("expected MEASURE>BOUND, >=, < or <=, where MEASURE is one of {}", names());
        let split = COMPARISONS.iter().find_map(|&(sign, comparison)| Some((comparison, text.split_once(sign)?)));
        let (comparison, (name, bound)) = split.ok_or_else(expected)?;
        let found = MEASURES.iter().find(|(known, _)| *known == name.trim());
        let &(_, measure) = found.ok_or_else(|| format!("{:?}: {}", name.trim(), expected()))?;
        let bound = bound.trim().parse().ok().filter(|bound: &f64| bound.is_finite());
        Ok(Self { text: text.to_owned(), measure, comparison, bound: bound.ok_or_else(expected)? })
    }
}

impl fmt::Display for Gate {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(&self.text)
    }
}

impl Gate {
    /// Whether it takes data to judge the model by.
    pub(super) fn needs_evaluation(&self) -> bool {
        self.measure.needs_evaluation()
    }

    /// Judges an archive.
    pub(super) fn judge(&self, report: &PackReport) -> GateResult {
        let value = self.measure.of(report);
        let holds = |value: f64| match self.comparison {
            Comparison::Above => value > self.bound,
            Comparison::AtLeast => value >= self.bound,
            Comparison::Below => value < self.bound,
            Comparison::AtMost => value <= self.bound,
        };
        GateResult { fail_if: self.text.clone(), value, passed: value.is_some_and(|value| !holds(value)) }
    }
}

impl fmt::Display for GateResult {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let verdict = if self.passed { "passed" } else { "FAILED" };
        match self.value {
            Some(value) => write!(formatter, "{verdict}: fail if {}, found {value:.6}", self.fail_if),
            None => write!(formatter, "{verdict}: fail if {}, which this model does not have", self.fail_if),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pack::report::StageTotals;

    fn report() -> PackReport {
        PackReport {
            archive: String::new(),
            architecture: String::new(),
            source_bytes: 0,
            archive_bytes: 0,
            parameters: 0,
            bits_per_parameter: 4.2,
            lossless: false,
            relative_squared_error: 0.003,
            training: None,
            calibration: None,
            evaluation: None,
            relative_squared_error_of_changes: None,
            target_missed: None,
            keyframe_records: 0,
            predicted_records: 0,
            residual_entropy: None,
            permutation_percent: 0.0,
            stages: StageTotals::default(),
            stats: None,
            tensors: Vec::new(),
        }
    }

    #[test]
    fn a_condition_that_holds_fails_the_archive() {
        let passes = |text: &str| text.parse::<Gate>().expect("a gate").judge(&report()).passed;
        assert!(passes("bpp>4.2") && passes("bpp<4.2") && passes("rel-mse >= 0.0031"));
        assert!(!passes("bpp>=4.2") && !passes("bpp<=4.2") && !passes(" rel-mse>1e-3"));
    }

    #[test]
    fn what_was_not_measured_does_not_pass() {
        let gate: Gate = "kld>0.01".parse().expect("a gate");
        assert!(gate.needs_evaluation());
        let judged = gate.judge(&report());
        assert_eq!((judged.passed, judged.value), (false, None));
    }

    #[test]
    fn conditions_that_make_no_sense_are_errors() {
        for text in ["", "kld", "kld>", "kld>x", "kld>inf", "klb>1", "kld=1", ">1"] {
            assert!(text.parse::<Gate>().is_err(), "{text}");
        }
    }
}
