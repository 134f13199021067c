//! `mcwcfs inspect`: what is inside an archive, and where its bits went. Reads side information; decodes weights only where
//! `--cost` is to measure how long that takes.

mod parallelism;
mod report;
mod streams;

use std::fmt;
use std::io::{self, Write};
use std::path::PathBuf;

use clap::Args;
use serde::Serialize;

use super::base_places;
use super::bench::{BenchError, decode_seconds};
use super::card::card;
use super::cost::{Loading, parse_seconds};
use super::packed_tree::{PackedTree, PackedTreeError};
use super::size::parse_size;
use crate::archive::{Archive, ArchiveError, Bases};
use crate::materialize::EngineChoice;

pub use parallelism::{BlockTypeChains, Parallelism};
pub use report::{BaseReport, BlockTypeReport, FileReport, PartReport, Report};
pub use streams::StreamBytes;

/// Say what is inside an archive and where its bits went.
#[derive(Debug, Args)]
pub struct InspectArgs {
    /// The archive (.mcwc)
    pub archive: PathBuf,
    /// List every part of every record
    #[arg(long)]
    pub parts: bool,
    /// Print what can be decoded at once, and from which bandwidth and number of loads on the archive pays
    #[arg(long)]
    pub cost: bool,
    /// Bytes per second that files arrive with, for the load times [default: a gigabyte]
    #[arg(long, value_name = "SIZE", value_parser = parse_size, default_value = "1GB", requires = "cost")]
    pub bandwidth: u64,
    /// Seconds that decoding takes; measured here, once on one thread, where it is not said
    #[arg(long, value_name = "SECONDS", value_parser = parse_seconds, requires = "cost")]
    pub decode_seconds: Option<f64>,
    /// Seconds that packing took: says after how many loads they are made up for
    #[arg(long, value_name = "SECONDS", value_parser = parse_seconds, requires = "cost")]
    pub encode_seconds: Option<f64>,
    /// Where to look for the base of a variant that is decoded to be timed
    #[arg(long, value_name = "PATH", requires = "cost")]
    pub base_path: Vec<PathBuf>,
    /// Print the section of a model card that is about the archive, in Markdown, and nothing else
    #[arg(long, conflicts_with_all = ["cost", "parts", "json"])]
    pub card: bool,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

/// What `--cost` prints.
#[derive(Debug, Serialize)]
struct Cost {
    parallelism: Parallelism,
    loading: Loading,
}

impl Cost {
    fn of(archive: &Archive, args: &InspectArgs) -> Result<Self, InspectError> {
        let parallelism = Parallelism::of_archive(archive)?;
        let decode_seconds = match args.decode_seconds {
            Some(seconds) => seconds,
            None => {
                let tree = PackedTree::read(&args.archive)?;
                let archive = Bases::new(base_places(&tree, false, &args.base_path)).open(&args.archive)?;
                let engine = EngineChoice::Auto.cpu_engine().expect("the reference decoder was not asked for");
                decode_seconds(&archive, &engine)?
            }
        };
        let (original, stored) = (parallelism.decoded_bytes, archive.stored_bytes());
        let loading = Loading::new(args.bandwidth, original, stored, decode_seconds, args.encode_seconds);
        Ok(Self { parallelism, loading })
    }
}

impl fmt::Display for Cost {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Parallelism { layers, keyframe_interval, scheduled_segments, records, chains, longest_chain, .. } =
            &self.parallelism;
        writeln!(
            out,
            "{layers} layers, keyframe interval {keyframe_interval}: {scheduled_segments} segments by schedule"
        )?;
        writeln!(
            out,
            "{records} records in {chains} chains, all of which can be decoded at once; the longest has {longest_chain}"
        )?;
        let Parallelism { strips, decoded_bytes, critical_path_bytes, greatest_speedup, block_types, .. } =
            &self.parallelism;
        writeln!(
            out,
            "the chain with most decodes to {critical_path_bytes} of {decoded_bytes} bytes: whole records decode \
             {greatest_speedup:.1} times as fast in parallel at most"
        )?;
        writeln!(out, "within records {strips} strips can be decoded in any order")?;
        writeln!(
            out,
            "\n{:<14} {:>8} {:>8} {:>14} {:>20}",
            "block type", "records", "chains", "longest chain", "critical path, bytes"
        )?;
        for of_type in block_types {
            let BlockTypeChains { block_type, records, chains, longest_chain, critical_path_bytes } = of_type;
            writeln!(out, "{block_type:<14} {records:>8} {chains:>8} {longest_chain:>14} {critical_path_bytes:>20}")?;
        }
        writeln!(out)?;
        self.loading.fmt(out)
    }
}

/// Why an archive cannot be inspected.
#[derive(Debug, thiserror::Error)]
pub enum InspectError {
    /// It cannot be read, or it is not a sound archive.
    #[error(transparent)]
    Archive(#[from] ArchiveError),
    /// It cannot be timed.
    #[error("{0}; --decode-seconds says how long decoding takes without measuring it")]
    Decode(#[from] BenchError),
    /// There is no such archive.
    #[error(transparent)]
    Source(#[from] PackedTreeError),
    /// Standard output does not take the report.
    #[error("standard output: {0}")]
    Output(#[from] io::Error),
}

/// Prints the report on standard output.
pub fn run(args: &InspectArgs) -> Result<(), InspectError> {
    let archive = Archive::open(&args.archive)?;
    let mut output = io::stdout().lock();
    if args.card {
        write!(output, "{}", card(&archive))?;
    } else if args.cost {
        print(&mut output, &Cost::of(&archive, args)?, args.json)?;
    } else {
        print(&mut output, &Report::new(&archive, args.parts)?, args.json)?;
    }
    Ok(output.flush()?)
}

fn print(output: &mut impl Write, report: &(impl Serialize + fmt::Display), json: bool) -> io::Result<()> {
    if json {
        serde_json::to_writer_pretty(&mut *output, report)?;
        writeln!(output)
    } else {
        write!(output, "{}", printable(&report.to_string()))
    }
}

/// An archive's names and values may come from anywhere: what could steer a terminal is shown escaped.
fn printable(text: &str) -> String {
    let escaped = |character: char| match character {
        '\n' => "\n".to_owned(),
        control if control.is_control() => control.escape_default().to_string(),
        other => other.to_string(),
    };
    text.chars().map(escaped).collect()
}

/// Bits per parameter, or a dash where there is no parameter.
fn rate(bytes: u64, parameters: u64) -> String {
    if parameters == 0 { "-".into() } else { format!("{:.4}", 8.0 * bytes as f64 / parameters as f64) }
}

fn percent(part: u64, whole: u64) -> f64 {
    100.0 * part as f64 / whole.max(1) as f64
}

/// The report for people.
impl fmt::Display for Report {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        let exactness = if self.lossy { "lossy" } else { "bit-exact" };
        writeln!(out, "{}: .mcwc version {}, {exactness}", self.archive, self.format_version)?;
        let Self { architecture, layers, keyframe_interval, .. } = self;
        writeln!(out, "architecture {architecture}, {layers} layers, keyframe interval {keyframe_interval}")?;
        writeln!(out, "content id {}", self.content_id)?;
        let Self { stored_bytes, decoded_bytes, parameters, .. } = self;
        let share = percent(*stored_bytes, *decoded_bytes);
        writeln!(out, "{stored_bytes} bytes, decoded {decoded_bytes} ({share:.1} %)")?;
        writeln!(out, "{parameters} parameters, {} bits per parameter", rate(*stored_bytes, *parameters))?;

        writeln!(out, "\nfiles")?;
        for file in &self.files {
            let FileReport { name, bytes, tensors, .. } = file;
            writeln!(out, "  {name}: {tensors} tensors, {bytes} bytes")?;
            writeln!(out, "    decoded SHA-256 {}", file.decoded_sha256)?;
            writeln!(out, "    source SHA-256  {}", file.source_sha256)?;
            if let Some(digest) = &file.decoded_blake3 {
                writeln!(out, "    decoded BLAKE3  {digest}")?;
            }
        }
        if !self.bases.is_empty() {
            writeln!(out, "\nbases")?;
        }
        for BaseReport { name, content_id } in &self.bases {
            writeln!(out, "  {name}: content id {content_id}")?;
        }

        writeln!(out, "\n{:<24} {:>14} {:>8} {:>16}", "stream", "bytes", "%", "bits/parameter")?;
        let total = self.stream_bytes.total();
        for (name, bytes) in self.stream_bytes.named().into_iter().chain([("total", total)]) {
            writeln!(out, "{name:<24} {bytes:>14} {:>8.2} {:>16}", percent(bytes, total), rate(bytes, *parameters))?;
        }

        writeln!(
            out,
            "\n{:<14} {:>8} {:>9} {:>14} {:>15}  parts by mode",
            "block type", "records", "permuted", "bytes", "bits/parameter"
        )?;
        for kind in &self.block_types {
            let modes: Vec<_> = kind.parts.iter().map(|(mode, count)| format!("{count} {mode}")).collect();
            let BlockTypeReport { block_type, records, permuted_records, bytes, parameters, .. } = kind;
            let rate = rate(*bytes, *parameters);
            let modes = modes.join("; ");
            writeln!(out, "{block_type:<14} {records:>8} {permuted_records:>9} {bytes:>14} {rate:>15}  {modes}")?;
        }

        if !self.parts.is_empty() {
            writeln!(out, "\nrecord layer  block type     bits/element  mode, type, shape, tensor")?;
        }
        for part in &self.parts {
            let layer = part.layer.map_or("-".into(), |layer| layer.to_string());
            let rate = rate(part.bytes, part.shape.iter().product());
            let PartReport { record, block_type, mode, dtype, shape, tensor, .. } = part;
            writeln!(out, "{record:>6} {layer:>5}  {block_type:<14} {rate:>12}  {mode}, {dtype}, {shape:?}, {tensor}")?;
        }

        writeln!(out, "\nprovenance")?;
        self.provenance.iter().try_for_each(|(key, value)| writeln!(out, "  {key}: {value}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_cannot_steer_the_terminal() {
        assert_eq!(printable("  tool: \u{1b}[2Jmcwcfs é\n"), "  tool: \\u{1b}[2Jmcwcfs é\n");
    }

    #[test]
    fn an_archive_without_parameters_has_no_rate() {
        assert_eq!((rate(100, 0), rate(100, 200)), ("-".into(), "4.0000".into()));
    }
}
