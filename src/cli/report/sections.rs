//! The sections of the page, each a function of the report; an empty text where there is nothing to say.

use std::collections::BTreeMap;

use super::ModelReport;
use super::charts::{Axes, Bar, Line, bars, legend, lines};
use super::html::{Cell, bytes, escape, grouped, section, small, table};
use crate::cli::analyze::{Comparison, ResidualMagnitudes, TypeReport};
use crate::pack::align::MAGNITUDES_PER_DEVIATION;
use crate::pack::evaluation::{BeforeAfter, Distribution};

/// What the model says with the decoded weights, on which data.
pub(super) fn worth(report: &ModelReport<'_>) -> String {
    let packed = &report.point().report;
    let calibration = match &packed.calibration {
        Some(calibration) => format!("It was calibrated with another set: {calibration}."),
        None => "It was not calibrated.".to_owned(),
    };
    let Some(evaluation) = &packed.evaluation else {
        let lead = match packed.lossless {
            true => "The weights are the original's to the last bit, so there is nothing to measure.",
            false => "Nobody ran the model: --eval FILE measures what the decoded weights do to its answers.",
        };
        return section("What the model is worth", lead, "");
    };
    let mut rows = Vec::new();
    let mut both = |name: &str, BeforeAfter { before, after }: BeforeAfter, decimals: usize| {
        rows.push(vec![
            Cell::Text(name.into()),
            Cell::decimals(before, decimals),
            Cell::decimals(after, decimals),
            Cell::Number(after - before, format!("{:+.decimals$}", after - before)),
        ]);
    };
    if let Some(perplexity) = evaluation.perplexity {
        both("perplexity of the next token", perplexity, 4);
    }
    if let Some(accuracy) = evaluation.accuracy {
        both("accuracy", accuracy, 4);
    }
    let mut body = String::new();
    if !rows.is_empty() {
        body.push_str(&table(&["", "original", "decoded", "change"], rows));
    }
    let spread = |name: &str, found: Distribution| {
        let Distribution { mean, median, percentile_99_9, largest } = found;
        let values = [mean, median, percentile_99_9, largest].map(Cell::small);
        std::iter::once(Cell::Text(name.into())).chain(values).collect::<Vec<_>>()
    };
    let divergence = evaluation.divergence.map(|found| spread("KL divergence, nats", found));
    let distance = evaluation.embedding_distance.map(|found| spread("1 − cosine of embeddings", found));
    body.push_str(&table(&["", "mean", "median", "99.9 %", "greatest"], divergence.into_iter().chain(distance)));
    if let Some(agreement) = evaluation.top1_agreement {
        body.push_str(&table(
            &["", "share"],
            [vec![Cell::Text("the likeliest answer is the original's".into()), Cell::decimals(agreement, 5)]],
        ));
    }
    let overlap = match evaluation.inputs_calibrated_on {
        0 => String::new(),
        shared => format!(" {shared} of its inputs were calibrated on, too."),
    };
    let lead = format!(
        "Run with the original's weights and with the decoded ones, on {}. {calibration}{overlap}",
        evaluation.data
    );
    section("What the model is worth", &lead, &body)
}

/// The curve and the table of a sweep.
pub(super) fn rate_distortion(report: &ModelReport<'_>) -> String {
    if report.points.len() < 2 {
        return String::new();
    }
    let mut points: Vec<_> = report.points.iter().map(|point| &point.report).collect();
    points.sort_by(|a, b| a.bits_per_parameter.total_cmp(&b.bits_per_parameter));
    let mut drawn = vec![Line {
        name: "relative squared error of the weights".into(),
        colour: "s1",
        points: points.iter().map(|point| (point.bits_per_parameter, point.relative_squared_error)).collect(),
        has_marks: true,
    }];
    let distances = points.iter().filter_map(|point| {
        let evaluation = point.evaluation.as_ref()?;
        Some((point.bits_per_parameter, evaluation.divergence.or(evaluation.embedding_distance)?.mean))
    });
    let distances: Vec<(f64, f64)> = distances.collect();
    if !distances.is_empty() {
        let has_head =
            points.iter().any(|point| point.evaluation.as_ref().is_some_and(|found| found.divergence.is_some()));
        let name = if has_head { "mean KL divergence, nats" } else { "mean 1 − cosine of embeddings" };
        drawn.push(Line { name: name.into(), colour: "s2", points: distances, has_marks: true });
    }
    let axes = Axes { x: "bits per parameter, whole file", y: "distortion, logarithmic", is_logarithmic: true };
    let rows = report.points.iter().enumerate().map(|(number, point)| {
        let packed = &point.report;
        let evaluation = packed.evaluation.as_ref();
        let metric = evaluation.and_then(|found| found.perplexity.or(found.accuracy)).map(|found| found.after);
        let distance = evaluation.and_then(|found| found.divergence.or(found.embedding_distance));
        let verdict = match (point.passes(), number == report.chosen) {
            (false, _) => "fails",
            (true, true) => "this report",
            (true, false) => "",
        };
        vec![
            Cell::decimals(packed.bits_per_parameter, 3),
            Cell::Number(packed.archive_bytes as f64, bytes(packed.archive_bytes)),
            Cell::small(packed.relative_squared_error),
            Cell::small_or_absent(distance.map(|distance| distance.mean)),
            Cell::small_or_absent(metric),
            evaluation.and_then(|found| found.top1_agreement).map_or(Cell::Absent, |share| Cell::decimals(share, 4)),
            Cell::decimals(point.encode_seconds, 1),
            Cell::Text(verdict.into()),
        ]
    });
    let headings = [
        "bits/parameter",
        "size",
        "rel. squared error",
        "distance",
        "perplexity or accuracy",
        "top-1",
        "encode, s",
        "",
    ];
    let body = lines(&axes, &drawn) + &table(&headings, rows);
    let lead = "Each point is an archive that lies on disk: its rate is that of the whole file, its distortion that of what it \
                decodes to.";
    section("Rate and distortion", lead, &body)
}

/// Where every byte went.
pub(super) fn streams(report: &ModelReport<'_>) -> String {
    let streams = report.archive.stream_bytes;
    let total = streams.total().max(1) as f64;
    let drawn: Vec<Bar> = (streams.named().into_iter())
        .map(|(name, bytes)| Bar {
            label: name.into(),
            value: bytes as f64 / total,
            shown: format!("{:.2} %", 100.0 * bytes as f64 / total),
            colour: "s1",
        })
        .collect();
    let parameters = report.archive.parameters.max(1) as f64;
    let named = streams.named().into_iter().chain([("total", streams.total())]);
    let rows = named.map(|(name, bytes)| {
        let rate = 8.0 * bytes as f64 / parameters;
        vec![
            Cell::Text(name.into()),
            Cell::count(bytes),
            Cell::decimals(100.0 * bytes as f64 / total, 2),
            Cell::decimals(rate, 4),
        ]
    });
    let body = bars(&drawn, Some(1.0)) + &table(&["stream", "bytes", "%", "bits/parameter"], rows);
    section(
        "Where the bits went",
        "Headers, checksums and the index are counted; the streams add up to the file's length.",
        &body,
    )
}

/// What every stage is worth.
pub(super) fn stages(report: &ModelReport<'_>) -> String {
    let stats = report.point().report.stats.as_deref().unwrap_or_default();
    if stats.is_empty() {
        return String::new();
    }
    let drawn: Vec<Bar> = (stats.iter())
        .map(|stage| Bar {
            label: format!("{}{}", stage.stage, if stage.is_used { "" } else { " (not used)" }),
            value: stage.bits_per_parameter,
            shown: format!("{:+.4}", stage.bits_per_parameter),
            colour: if stage.is_used { "s1" } else { "s4" },
        })
        .collect();
    let rows = stats.iter().map(|stage| {
        vec![
            Cell::Text(stage.stage.into()),
            Cell::Text(stage.instead.into()),
            Cell::Number(stage.bits_saved, format!("{:.0}", stage.bits_saved)),
            Cell::decimals(stage.bits_per_parameter, 4),
            Cell::Text(if stage.is_used { "used" } else { "left out" }.into()),
        ]
    });
    let body = bars(&drawn, None) + &table(&["stage", "instead of", "bits saved", "bits/parameter", ""], rows);
    let lead = "Bits per parameter that the archive would take more, at the same squared error, were that stage alone left out. \
                A stage that would cost bits is left out.";
    section("What every stage saves", lead, &body)
}

/// The error profile.
pub(super) fn layers(report: &ModelReport<'_>) -> String {
    if report.layers.is_empty() {
        return String::new();
    }
    let of = |value: &dyn Fn(&super::LayerProfile) -> Option<f64>| -> Vec<(f64, f64)> {
        report.layers.iter().filter_map(|layer| Some((f64::from(layer.layer), value(layer)?))).collect()
    };
    let mut drawn = vec![Line {
        name: "weights".into(),
        colour: "s1",
        points: of(&|layer| Some(layer.relative_squared_error)),
        has_marks: true,
    }];
    let hidden = of(&|layer| layer.hidden_relative_squared_error);
    if !hidden.is_empty() {
        drawn.push(Line {
            name: "hidden states after the layer".into(),
            colour: "s2",
            points: hidden,
            has_marks: true,
        });
    }
    let axes = Axes { x: "layer", y: "relative squared error, logarithmic", is_logarithmic: true };
    let rows = report.layers.iter().map(|layer| {
        vec![
            Cell::count(layer.layer.into()),
            Cell::count(layer.elements),
            Cell::decimals(layer.bits_per_element, 3),
            Cell::small(layer.relative_squared_error),
            Cell::small_or_absent(layer.hidden_relative_squared_error),
        ]
    });
    let headings = ["layer", "elements", "bits/element", "error of weights", "error of hidden states"];
    let body = lines(&axes, &drawn) + &table(&headings, rows);
    section(
        "Layer by layer",
        "Squared error over squares: of the quantized weights of each layer, and of what comes out of it where the model was \
         run.",
        &body,
    )
}

/// How alike neighbouring layers are, and what is left of them.
pub(super) fn similarity(report: &ModelReport<'_>) -> String {
    let similarity = &report.similarity;
    let alignable = 100.0 * similarity.alignable_fraction;
    if similarity.block_types.is_empty() {
        return section(
            "How alike layers are",
            "No two layers of this model have blocks that are known to be permutable.",
            "",
        );
    }
    let mut body = legend(&[("s4", "as they are"), ("s1", "aligned"), ("s3", "Gaussian numbers, aligned")]);
    let mut rows = Vec::new();
    for TypeReport { block_type, weights_found, gaussian_control, .. } in &similarity.block_types {
        let energy = |label: &str, value: f64, colour| Bar {
            label: format!("{block_type}, {label}"),
            value,
            shown: format!("{value:.3}"),
            colour,
        };
        body.push_str(&bars(
            &[
                energy("as they are", weights_found.nre_before.mean, "s4"),
                energy("aligned", weights_found.nre_after.mean, "s1"),
                energy("control", gaussian_control.nre_after.mean, "s3"),
            ],
            Some(1.0),
        ));
        for (name, found) in
            [((*block_type).to_owned(), weights_found), (format!("{block_type}, Gaussian control"), gaussian_control)]
        {
            rows.push(comparison_row(name, found));
        }
    }
    let headings = [
        "blocks",
        "cosine before",
        "after",
        "R² before",
        "after",
        "held out",
        "residual energy before",
        "after",
        "permutation bits",
        "net bits/weight",
    ];
    body.push_str(&table(&headings, rows));
    body.push_str("<h3>How large residuals are</h3>\n");
    for TypeReport { block_type, magnitudes, .. } in &similarity.block_types {
        body.push_str(&residuals(block_type, magnitudes));
    }
    let lead = format!(
        "Energy that is left of a layer once it is predicted from the one below, 1 being all of it. {alignable:.1} % of the \
         parameters may be aligned. Alignment finds likenesses in noise, too: what it is worth is the distance to the control, \
         and R² held out, judged where nothing was fitted."
    );
    section("How alike layers are", &lead, &body)
}

fn comparison_row(name: String, found: &Comparison) -> Vec<Cell> {
    let spreads = [
        found.cosine_before,
        found.cosine_after,
        found.r2_before,
        found.r2_after,
        found.r2_held_out,
        found.nre_before,
        found.nre_after,
    ];
    let numbers =
        spreads.map(|spread| Cell::Number(spread.mean, format!("{:.3} ± {:.3}", spread.mean, spread.deviation)));
    let bits = [Cell::count(found.permutation_bits), Cell::decimals(found.estimated_net_bits_per_weight, 4)];
    std::iter::once(Cell::Text(name)).chain(numbers).chain(bits).collect()
}

fn residuals(block_type: &str, magnitudes: &ResidualMagnitudes) -> String {
    let line = |name: &str, colour, shares: &[f64]| Line {
        name: name.into(),
        colour,
        points: (shares.iter().enumerate())
            .map(|(bin, &share)| ((bin as f64 + 0.5) / MAGNITUDES_PER_DEVIATION as f64, share))
            .collect(),
        has_marks: false,
    };
    let axes = Axes {
        x: "magnitude, in root mean squares of the weights",
        y: &format!("{block_type}: share of residuals"),
        is_logarithmic: false,
    };
    let ResidualMagnitudes { weights, unaligned, aligned, predicted } = magnitudes;
    lines(
        &axes,
        &[
            line("the weights themselves", "s4", weights),
            line("less the layer below", "s2", unaligned),
            line("less the layer below, aligned", "s3", aligned),
            line("less its prediction, aligned", "s1", predicted),
        ],
    )
}

/// Decoding, and when packing pays.
pub(super) fn loading(report: &ModelReport<'_>) -> String {
    let all: f64 = report.decode.stages.iter().map(|stage| stage.seconds).sum::<f64>().max(1e-9);
    let drawn: Vec<Bar> = (report.decode.stages.iter())
        .map(|stage| Bar {
            label: stage.stage.into(),
            value: stage.seconds / all,
            shown: format!("{:.1} ms, {:.1} %", 1e3 * stage.seconds, 100.0 * stage.seconds / all),
            colour: "s1",
        })
        .collect();
    let rows = report.loading.iter().map(|loading| {
        let loads = |loads: Option<Option<u64>>| match loads {
            Some(Some(loads)) => Cell::count(loads),
            Some(None) => Cell::Text("never".into()),
            None => Cell::Absent,
        };
        vec![
            Cell::Number(loading.bandwidth as f64, format!("{}/s", bytes(loading.bandwidth))),
            Cell::decimals(loading.original_seconds, 3),
            Cell::decimals(loading.serial_seconds, 3),
            Cell::decimals(loading.overlapped_seconds, 3),
            loads(loading.packing.map(|packing| packing.serial_break_even_loads)),
            loads(loading.packing.map(|packing| packing.overlapped_break_even_loads)),
        ]
    });
    let headings = [
        "arriving at",
        "original, s",
        "archive, s",
        "decoded as it arrives, s",
        "loads to break even",
        "as it arrives",
    ];
    let parallelism = &report.parallelism;
    let point = report.point();
    let phases =
        (point.phases.iter()).map(|phase| vec![Cell::Text(phase.phase.clone()), Cell::decimals(phase.seconds, 2)]);
    let body = bars(&drawn, None)
        + &table(&headings, rows)
        + &format!(
            "<p>The archive loads faster below {} a second, or {} decoded as it arrives. {} records are in {} chains that \
             decode at once; the longest has {}. Within records {} strips decode in any order.</p>\n",
            bytes(report.decode.loading.serial_break_even as u64),
            bytes(report.decode.loading.overlapped_break_even as u64),
            grouped(parallelism.records),
            grouped(parallelism.chains),
            parallelism.longest_chain,
            grouped(parallelism.strips),
        )
        + "<h3>Seconds of packing</h3>\n"
        + &table(&["phase", "s"], phases);
    let lead = format!(
        "Measured on the machine that packed it, one thread: {:.1} ms for {} of weights, {:.2} times a copy of them.",
        1e3 * report.decode.decode_seconds,
        bytes(report.decode.decoded_bytes),
        report.decode.decode_seconds / report.decode.copy_seconds.max(1e-9),
    );
    section("Decoding, and when packing pays", &lead, &body)
}

/// Every tensor.
pub(super) fn tensors(report: &ModelReport<'_>) -> String {
    let modes: BTreeMap<&str, &str> =
        report.archive.parts.iter().map(|part| (part.tensor.as_str(), part.mode.as_str())).collect();
    let tensors = &report.point().report.tensors;
    let rows = tensors.iter().map(|tensor| {
        vec![
            Cell::Code(tensor.name.clone()),
            Cell::Text(format!("{} {:?}", tensor.dtype, tensor.shape)),
            Cell::Text(modes.get(tensor.name.as_str()).copied().unwrap_or(tensor.treatment).into()),
            Cell::decimals(tensor.bits_per_element, 3),
            Cell::small_or_absent(tensor.relative_squared_error),
        ]
    });
    let listing = table(&["tensor", "type", "mode", "bits/element", "rel. squared error"], rows);
    let body =
        format!("<details>\n<summary>{} tensors</summary>\n{listing}</details>\n", grouped(tensors.len() as u64));
    section(
        "Every tensor",
        "How each is coded, what it takes and what it lost; an error of 0 is a tensor that is bit-exact.",
        &body,
    )
}

/// What was packed, and how.
pub(super) fn provenance(report: &ModelReport<'_>) -> String {
    let files = report.archive.files.iter().map(|file| {
        vec![
            Cell::Code(file.name.clone()),
            Cell::count(file.bytes),
            Cell::Code(file.source_sha256.clone()),
            Cell::Code(file.decoded_sha256.clone()),
        ]
    });
    let facts =
        (report.archive.provenance.iter()).map(|(key, value)| vec![Cell::Text(key.clone()), Cell::Text(value.clone())]);
    let identity = [
        vec![Cell::Text("content id".into()), Cell::Code(report.archive.content_id.clone())],
        vec![Cell::Text("architecture".into()), Cell::Text(report.archive.architecture.clone())],
    ];
    let bases = report.archive.bases.iter().map(|base| {
        vec![Cell::Text("base".into()), Cell::Text(format!("{}, content id {}", base.name, base.content_id))]
    });
    let body = table(&["file", "bytes", "SHA-256 packed", "SHA-256 decoded"], files)
        + &table(&["", ""], identity.into_iter().chain(bases).chain(facts))
        + &format!("<h3>For the model card</h3>\n<pre>{}</pre>\n", escape(&report.card));
    let error = small(report.point().report.relative_squared_error);
    section(
        "What was packed, and how",
        &format!("The archive carries these lines, too; its relative squared error is {error}."),
        &body,
    )
}
