//! `mcwcfs inspect`: what is inside an archive, and where its bits went. Reads side information, decodes no weight.

mod report;
mod streams;

use std::fmt;
use std::io::{self, Write};
use std::path::PathBuf;

use clap::Args;

use crate::archive::{Archive, ArchiveError};

pub use report::{BlockTypeReport, FileReport, PartReport, Report};
pub use streams::StreamBytes;

/// Say what is inside an archive and where its bits went.
#[derive(Debug, Args)]
pub struct InspectArgs {
    /// The archive (.mcwc)
    pub archive: PathBuf,
    /// List every part of every record
    #[arg(long)]
    pub parts: bool,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

/// Why an archive cannot be inspected.
#[derive(Debug, thiserror::Error)]
pub enum InspectError {
    /// It cannot be read, or it is not a sound archive.
    #[error(transparent)]
    Archive(#[from] ArchiveError),
    /// Standard output does not take the report.
    #[error("standard output: {0}")]
    Output(#[from] io::Error),
}

/// Prints the report on standard output.
pub fn run(args: &InspectArgs) -> Result<(), InspectError> {
    let archive = Archive::open(&args.archive)?;
    let report = Report::new(&archive, args.parts)?;
    let mut output = io::stdout().lock();
    if args.json {
        serde_json::to_writer_pretty(&mut output, &report).map_err(io::Error::from)?;
        writeln!(output)?;
    } else {
        write!(output, "{}", printable(&report.to_string()))?;
    }
    Ok(output.flush()?)
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
