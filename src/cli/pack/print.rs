//! What packing prints.

use std::io::{StdoutLock, Write};

use super::points::{Sweep, choose};
use super::{PackArgs, PackCommandError, Point};
use crate::pack::evaluation::BeforeAfter;
use crate::pack::report::{PackReport, TensorReport, TrainingReport};

/// Writes to standard output; a reader that went away is an error, not a panic.
pub(in crate::cli) fn print(
    write: impl FnOnce(&mut StdoutLock<'_>) -> std::io::Result<()>,
) -> Result<(), PackCommandError> {
    let mut output = std::io::stdout().lock();
    write(&mut output).and_then(|()| output.flush()).map_err(PackCommandError::Print)
}

pub(super) fn print_plan(output: &mut impl Write, plan: &[TensorReport], json: bool) -> std::io::Result<()> {
    if json {
        return writeln!(output, "{}", serde_json::to_string_pretty(plan).expect("plain data"));
    }
    writeln!(output, "{:>10}  {:<10} {:<10} {:<6} tensor", "bits/elem", "treatment", "record", "dtype")?;
    for tensor in plan {
        let kept = tensor.keep.as_ref().map_or(String::new(), |keep| format!(" (--keep {keep})"));
        writeln!(
            output,
            "{:>10.3}  {:<10} {:<10} {:<6} {} {:?}{kept}",
            tensor.bits_per_element, tensor.treatment, tensor.block_type, tensor.dtype, tensor.name, tensor.shape
        )?;
    }
    Ok(())
}

/// The result of a run: one archive in full, the archives of a sweep as a table.
pub(super) fn print_points(
    output: &mut impl Write,
    points: &[Point],
    sidecars: Option<usize>,
    args: &PackArgs,
) -> std::io::Result<()> {
    let is_sweep = args.target.sweep.is_some();
    if args.json {
        let json = match points {
            [point] if !is_sweep => serde_json::to_string_pretty(point),
            _ => serde_json::to_string_pretty(&Sweep { points, chosen: choose(points) }),
        };
        return writeln!(output, "{}", json.expect("plain data"));
    }
    if is_sweep {
        print_sweep(output, points)?;
    } else {
        for point in points {
            print_report(output, &point.report, sidecars)?;
        }
    }
    for point in points.iter().filter(|point| !point.gates.is_empty()) {
        if is_sweep {
            writeln!(output, "{}", point.report.archive)?;
        }
        point.gates.iter().try_for_each(|gate| writeln!(output, "  {gate}"))?;
    }
    Ok(())
}

/// Rate and distortion of every archive (Tables 2 and 6).
fn print_sweep(output: &mut impl Write, points: &[Point]) -> std::io::Result<()> {
    writeln!(
        output,
        "{:>10} {:>10} {:>8} {:>10} {:>22} {:>10} {:>10} {:>9}  archive",
        "bits/param", "MB", "smaller", "rel. MSE", "metric", "distance", "top-1", "encode, s"
    )?;
    for point in points {
        let report = &point.report;
        let evaluation = report.evaluation.as_ref();
        let change = |value: BeforeAfter, name: &str| format!("{name} {:.4} -> {:.4}", value.before, value.after);
        let metric = evaluation.and_then(|found| {
            let perplexity = found.perplexity.map(|value| change(value, "ppl"));
            perplexity.or(found.accuracy.map(|value| change(value, "acc")))
        });
        let distance = evaluation.and_then(|found| found.divergence.or(found.embedding_distance));
        let agreement = evaluation.and_then(|found| found.top1_agreement);
        let or_dash = |text: Option<String>| text.unwrap_or_else(|| "-".into());
        writeln!(
            output,
            "{:>10.3} {:>10.3} {:>7.2}x {:>10.3e} {:>22} {:>10} {:>10} {:>9.2}  {}",
            report.bits_per_parameter,
            report.archive_bytes as f64 / 1e6,
            report.source_bytes as f64 / report.archive_bytes.max(1) as f64,
            report.relative_squared_error,
            or_dash(metric),
            or_dash(distance.map(|distance| format!("{:.3e}", distance.mean))),
            or_dash(agreement.map(|agreement| format!("{agreement:.4}"))),
            point.encode_seconds,
            report.archive,
        )?;
    }
    if points.iter().any(|point| point.report.evaluation.is_some()) {
        writeln!(
            output,
            "distance: mean KL divergence in nats, or 1 - cosine of embeddings where the model has no head"
        )?;
    }
    Ok(())
}

fn print_training(output: &mut impl Write, training: &TrainingReport) -> std::io::Result<()> {
    let after = training.held_out_distance.unwrap_or(f64::NAN);
    match training.held_out_distance_without {
        Some(before) => {
            let verdict = if training.is_kept { "kept" } else { "not kept" };
            let steps = training.steps;
            writeln!(
                output,
                "  trained {steps} steps, {verdict}: held-out distance {before:.4e} without, {after:.4e} with"
            )
        }
        None => writeln!(output, "  trained {} steps: held-out distance {after:.4e}", training.steps),
    }
}

fn print_report(output: &mut impl Write, report: &PackReport, sidecars: Option<usize>) -> std::io::Result<()> {
    writeln!(output, "{}", report.archive)?;
    writeln!(
        output,
        "  {} -> {} bytes ({:.1} %), {:.3} bits per parameter",
        report.source_bytes,
        report.archive_bytes,
        100.0 * report.archive_bytes as f64 / report.source_bytes.max(1) as f64,
        report.bits_per_parameter
    )?;
    if report.lossless {
        writeln!(output, "  decoded and compared: every byte is the original's")?;
    } else {
        writeln!(output, "  decoded and compared: relative squared error {:.3e}", report.relative_squared_error)?;
        if let Some(error) = report.relative_squared_error_of_changes {
            writeln!(output, "  of what changed from the base: relative squared error {error:.3e}")?;
        }
    }
    writeln!(
        output,
        "  {} architecture, {} records as keyframes, {} predicted",
        report.architecture, report.keyframe_records, report.predicted_records
    )?;
    if let Some(sidecars) = sidecars {
        writeln!(output, "  {sidecars} other files copied")?;
    }
    if let Some(calibration) = &report.calibration {
        writeln!(output, "  calibrated with {calibration}")?;
    }
    if let Some(evaluation) = &report.evaluation {
        writeln!(output, "  evaluated with {evaluation}")?;
    }
    if let Some(training) = &report.training {
        print_training(output, training)?;
    }
    if let Some(missed) = &report.target_missed {
        writeln!(output, "  target missed: {missed}")?;
    }
    if let Some(stats) = &report.stats {
        writeln!(output, "\n{:>10}  {:<26} instead", "bits/param", "stage saves")?;
        for stage in stats {
            let not_used = if stage.is_used { "" } else { " (not used)" };
            let (bits, name) = (stage.bits_per_parameter, stage.stage);
            writeln!(output, "{bits:>10.4}  {name:<26} {}{not_used}", stage.instead)?;
        }
    }
    Ok(())
}
