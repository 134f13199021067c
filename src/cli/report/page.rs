//! The page: one file, no script, nothing fetched. Its verdict comes first; what that rests on follows, the detail last.

use super::ModelReport;
use super::html::{bytes, escape, grouped, small};
use super::sections;
use crate::pack::evaluation::BeforeAfter;

const STYLE: &str = include_str!("style.css");

/// Draws a report.
pub(super) fn page(report: &ModelReport<'_>) -> String {
    let sections = [
        sections::worth(report),
        sections::rate_distortion(report),
        sections::streams(report),
        sections::stages(report),
        sections::layers(report),
        sections::similarity(report),
        sections::loading(report),
        sections::tensors(report),
        sections::provenance(report),
    ];
    format!(
        "<!DOCTYPE html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n\
         <meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">\n\
         <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n\
         <meta name=\"color-scheme\" content=\"light dark\">\n\
         <title>{name}, packed</title>\n<style>\n{STYLE}</style>\n</head>\n<body>\n<main>\n\
         <header>\n<p class=\"kicker\">Packed weights</p>\n<h1>{name}</h1>\n{verdict}{tiles}</header>\n{sections}</main>\n\
         <footer>{tool}. The numbers of this page, in full: the JSON beside it, which is also inside it.</footer>\n\
         <script type=\"application/json\" id=\"report\">{json}</script>\n</body>\n</html>\n",
        name = escape(&report.checkpoint),
        verdict = verdict(report),
        tiles = tiles(report),
        sections = sections.concat(),
        tool = escape(report.tool),
        json = embedded_json(report),
    )
}

/// The report as JSON that no parser of HTML takes for the end of its element.
fn embedded_json(report: &ModelReport<'_>) -> String {
    serde_json::to_string(report).expect("plain data").replace('<', "\\u003c")
}

/// One paragraph for who reads nothing else.
fn verdict(report: &ModelReport<'_>) -> String {
    let packed = &report.point().report;
    let times = packed.source_bytes as f64 / packed.archive_bytes.max(1) as f64;
    let mut text =
        format!("{} became {}, {times:.2} times smaller. ", bytes(packed.source_bytes), bytes(packed.archive_bytes));
    text.push_str(&match (packed.lossless, &packed.evaluation) {
        (true, _) => "Every byte decodes to the original's, so the model is the same model.".to_owned(),
        (false, None) => format!(
            "The decoded weights are not the original's: their squared error is {} of their energy. What that does to the \
             model's answers was not measured.",
            small(packed.relative_squared_error)
        ),
        (false, Some(evaluation)) => {
            let mut facts = Vec::new();
            if let Some(BeforeAfter { before, after }) = evaluation.perplexity {
                facts.push(format!("perplexity goes from {before:.3} to {after:.3}"));
            }
            if let Some(BeforeAfter { before, after }) = evaluation.accuracy {
                facts.push(format!("accuracy goes from {:.1} % to {:.1} %", 100.0 * before, 100.0 * after));
            }
            if let Some(agreement) = evaluation.top1_agreement {
                let (percent, places) = (100.0 * agreement, grouped(evaluation.outputs as u64));
                facts.push(format!("the likeliest answer stays the same in {percent:.2} % of {places} places"));
            }
            if let Some(distance) = evaluation.embedding_distance {
                let cosine = 1.0 - distance.mean;
                facts.push(format!("embeddings are at a cosine of {cosine:.5} to the original's on average"));
            }
            format!("On data that it was not tuned on, {}.", facts.join(", and "))
        }
    });
    let missed = packed
        .target_missed
        .iter()
        .map(|missed| format!("<p class=\"failed\">Target missed: {}</p>\n", escape(missed)));
    let mut html = format!("<p class=\"verdict\">{}</p>\n{}", escape(&text), missed.collect::<String>());
    let gates = &report.point().gates;
    if !gates.is_empty() {
        let rows: String = (gates.iter())
            .map(|gate| {
                let class = if gate.passed { "passed" } else { "failed" };
                format!("<li class=\"{class}\">{}</li>", escape(&gate.to_string()))
            })
            .collect();
        html.push_str(&format!("<ul class=\"gates\">{rows}</ul>\n"));
    }
    html
}

/// The numbers that are asked for first.
fn tiles(report: &ModelReport<'_>) -> String {
    let packed = &report.point().report;
    let mut tiles = vec![
        ("size", bytes(packed.archive_bytes), format!("of {}", bytes(packed.source_bytes))),
        (
            "bits per parameter",
            format!("{:.3}", packed.bits_per_parameter),
            format!("{} parameters, everything counted", grouped(packed.parameters)),
        ),
        (
            "weights",
            if packed.lossless { "bit-exact".into() } else { small(packed.relative_squared_error) },
            if packed.lossless { "SHA-256 compared".into() } else { "relative squared error".into() },
        ),
    ];
    if let Some(evaluation) = &packed.evaluation {
        if let Some(divergence) = evaluation.divergence {
            tiles.push(("KL divergence", small(divergence.mean), "nats, mean over answers".into()));
        } else if let Some(distance) = evaluation.embedding_distance {
            tiles.push(("1 − cosine", small(distance.mean), "mean over embeddings".into()));
        }
    }
    let decode = &report.decode;
    let speed = decode.decoded_bytes as f64 / decode.decode_seconds.max(1e-9) / 1e9;
    tiles.push(("decoding", format!("{speed:.2} GB/s"), format!("of weights, one thread, {}", decode.engine)));
    let tiles = tiles.into_iter().map(|(name, value, note)| {
        let note = escape(&note);
        format!(
            "<div class=\"tile\"><span class=\"name\">{name}</span><strong>{value}</strong>\
             <span class=\"note\">{note}</span></div>\n"
        )
    });
    format!("<div class=\"tiles\">\n{}</div>\n", tiles.collect::<String>())
}
