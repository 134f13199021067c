//! The report of a packing run: what was made, what it lost and what it saves, for people who decide and for programs.
//!
//! `ModelReport` is all that is known, gathered from the archive as it lies there; `page` draws it, and the page carries the
//! same as JSON.

mod charts;
mod html;
mod page;
mod sections;

use std::collections::BTreeMap;
use std::path::Path;

use indicatif::ProgressBar;
use serde::Serialize;

use super::analyze;
use super::bench::{self, Measurement};
use super::card::card;
use super::cost::Loading;
use super::inspect;
use super::pack::{PackCommandError, Point, write_whole};
use crate::archive::Archive;
use crate::materialize::EngineChoice;
use crate::pack::encode::PackError;
use crate::pack::report::TensorReport;
use crate::pack::source::Checkpoint;

/// Bandwidths that loading is compared at, in bytes per second: a wide-area link, a network disk, a local one.
const BANDWIDTHS: [u64; 3] = [100_000_000, 1_000_000_000, 5_000_000_000];
/// Times everything is decoded to be timed.
const REPEAT: usize = 3;
/// Seed of the Gaussian control.
const SEED: u64 = 0;

/// What a report is about.
pub(super) struct Subject<'a> {
    /// What was packed.
    pub(super) checkpoint: &'a Checkpoint,
    /// The archive that matters, with its bases.
    pub(super) archive: &'a Archive,
    /// All archives of the run.
    pub(super) points: &'a [Point],
    /// Which of them `archive` is.
    pub(super) chosen: usize,
}

/// Everything that the page shows, as its JSON has it.
#[derive(Serialize)]
struct ModelReport<'a> {
    /// Program and version.
    tool: &'static str,
    /// The checkpoint's name.
    checkpoint: String,
    /// Every archive of the run.
    points: &'a [Point],
    /// Which of them the rest is about.
    chosen: usize,
    /// What is inside, and where the bits went (Table 1).
    archive: inspect::Report,
    /// Layer by layer.
    layers: Vec<LayerProfile>,
    /// How alike layers are (Figures 2, 4 and 5, Eqs. 134-136).
    similarity: analyze::Report,
    /// Decoding time by stage (Table 9).
    decode: bench::Report,
    /// What can be decoded at once (Table 4).
    parallelism: inspect::Parallelism,
    /// When packing pays (Appendix J).
    loading: Vec<Loading>,
    /// The section for a model card, Markdown.
    card: String,
}

/// One layer.
#[derive(Debug, PartialEq, Serialize)]
struct LayerProfile {
    /// Layer, counted from 0.
    layer: u32,
    /// Elements of its tensors.
    elements: u64,
    /// Bits of its parts over its elements.
    bits_per_element: f64,
    /// Squared error over squares of its quantized tensors; 0 where there are none.
    relative_squared_error: f64,
    /// The same of the hidden states after it, where the model was run.
    hidden_relative_squared_error: Option<f64>,
}

/// Gathers a report and writes it as `page`, and as JSON beside it.
///
/// # Errors
/// When the archive does not decode, or a file cannot be written.
pub(super) fn write_report(page: &Path, subject: &Subject<'_>) -> Result<(), PackCommandError> {
    let report = ModelReport::gather(subject)?;
    let json = serde_json::to_string_pretty(&report).expect("plain data");
    write_whole(&page.with_extension("json"), &json)?;
    write_whole(page, &page::page(&report))
}

impl<'a> ModelReport<'a> {
    fn gather(subject: &Subject<'a>) -> Result<Self, PackCommandError> {
        let Subject { checkpoint, archive, points, chosen } = *subject;
        let point = &points[chosen];
        let engine = EngineChoice::Auto.cpu_engine().expect("the reference decoder was not asked for");
        let encode_seconds = Some(point.encode_seconds);
        let measurement = Measurement { repeat: REPEAT, bandwidth: BANDWIDTHS[1], encode_seconds };
        let decode = bench::Report::measure(archive, &engine, Some(engine), &measurement)?;
        let loading = BANDWIDTHS.map(|bandwidth| {
            let (original, stored) = (decode.decoded_bytes, decode.stored_bytes);
            Loading::new(bandwidth, original, stored, decode.decode_seconds, encode_seconds)
        });
        let name = checkpoint.path.canonicalize().ok().and_then(|path| Some(path.file_name()?.to_owned()));
        let hidden = point.report.evaluation.as_ref().map(|evaluation| evaluation.layers.as_slice());
        Ok(Self {
            tool: concat!("mcwc-pack ", env!("CARGO_PKG_VERSION")),
            checkpoint: name.unwrap_or_default().to_string_lossy().into_owned(),
            points,
            chosen,
            archive: inspect::Report::new(archive, true).map_err(PackError::from)?,
            layers: layer_profiles(&point.report.tensors, hidden.unwrap_or_default()),
            similarity: analyze::Report::of(checkpoint, &checkpoint.plan(), SEED, &ProgressBar::hidden()),
            decode,
            parallelism: inspect::Parallelism::of_archive(archive).map_err(PackError::from)?,
            loading: loading.to_vec(),
            card: card(archive),
        })
    }

    /// The archive that the report is about.
    fn point(&self) -> &Point {
        &self.points[self.chosen]
    }
}

/// Sums up the tensors of each layer. `hidden` is the error of the embedding and after each layer, where the model was run.
fn layer_profiles(tensors: &[TensorReport], hidden: &[f64]) -> Vec<LayerProfile> {
    #[derive(Default)]
    struct Sums {
        elements: u64,
        bits: f64,
        squared_error: f64,
        energy: f64,
    }
    let mut layers: BTreeMap<u32, Sums> = BTreeMap::new();
    for tensor in tensors {
        let Some(layer) = tensor.layer else { continue };
        let sums = layers.entry(layer).or_default();
        let elements: u64 = tensor.shape.iter().product();
        sums.elements += elements;
        sums.bits += tensor.bits_per_element * elements as f64;
        if let (Some(error), Some(energy)) = (tensor.relative_squared_error, tensor.energy) {
            sums.squared_error += error * energy;
            sums.energy += energy;
        }
    }
    // Another stack of layers than the one that was run, such as an encoder's beside its decoder's, has no such error.
    let is_the_one_run = hidden.len() == layers.len() + 1;
    let profile = |(layer, sums): (u32, Sums)| LayerProfile {
        layer,
        elements: sums.elements,
        bits_per_element: sums.bits / sums.elements.max(1) as f64,
        relative_squared_error: if sums.energy > 0.0 { sums.squared_error / sums.energy } else { 0.0 },
        hidden_relative_squared_error: hidden.get(layer as usize + 1).copied().filter(|_| is_the_one_run),
    };
    layers.into_iter().map(profile).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_error_of_a_layer_is_that_of_its_tensors_by_their_energy() {
        let tensor = |layer, elements, bits, error, energy| TensorReport {
            file: "model.safetensors".into(),
            name: "w".into(),
            dtype: "F32".into(),
            shape: vec![elements],
            layer,
            block_type: "ffn",
            treatment: "quantized",
            keep: None,
            bits_per_element: bits,
            relative_squared_error: Some(error),
            energy,
        };
        let tensors = [
            tensor(None, 1000, 8.0, 0.5, Some(1e6)),
            tensor(Some(0), 30, 2.0, 0.1, Some(1.0)),
            tensor(Some(0), 10, 6.0, 0.5, Some(3.0)),
            tensor(Some(0), 40, 32.0, 0.0, None),
            tensor(Some(1), 10, 4.0, 0.0, None),
        ];
        let profiles = layer_profiles(&tensors, &[0.0, 0.25, 0.5]);
        assert_eq!((profiles[0].elements, profiles[0].bits_per_element), (80, 17.5));
        assert!((profiles[0].relative_squared_error - 0.4).abs() < 1e-12);
        assert_eq!(profiles[0].hidden_relative_squared_error, Some(0.25));
        assert_eq!((profiles[1].layer, profiles[1].relative_squared_error), (1, 0.0));
        let without = layer_profiles(&tensors, &[]);
        assert_eq!(without[1].hidden_relative_squared_error, None);
    }
}
