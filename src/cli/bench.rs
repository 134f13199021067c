//! `mcwcfs bench`: how fast an archive decodes on this machine, where the time goes (the paper's Table 9), and from which
//! bandwidth on the original would load faster (Appendix J).
//!
//! Everything is decoded on one thread from memory; only the stage `read` touches the file.

use std::borrow::Cow;
use std::collections::HashMap;
use std::hint::black_box;
use std::io::{self, Write};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;

use clap::Args;
use serde::Serialize;

use super::base_places;
use super::cost::{Loading, parse_seconds};
use super::packed_tree::{PackedTree, PackedTreeError};
use super::size::parse_size;
use crate::archive::{Archive, ArchiveError, Bases, PartAddress};
use crate::decode::cpu::{CpuEngine, Stage, StageClock, WORDS_PADDING};
use crate::decode::cuda::DEFAULT_GPU_MEMORY_BYTES;
use crate::decode::{DecodeError, Engine, PreparedPart, StripJob};
use crate::materialize::{
    EngineChoice, MaterializeError, MaterializeOptions, Materializer, decode_error, prepare_record,
};

/// Bytes copied for comparison: more than caches hold, as a checkpoint is.
const COPIED_BYTES: usize = 256 << 20;

/// Say how fast an archive decodes here, stage by stage, and when that pays.
#[derive(Debug, Args)]
pub struct BenchArgs {
    /// The archive (.mcwc)
    pub archive: PathBuf,
    /// Which engine decodes; those of the CPU say how long each stage takes
    #[arg(long, value_enum, default_value_t)]
    pub engine: EngineChoice,
    /// What decoding may take of a CUDA device, where that is the engine [default: 1G]
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    pub gpu_memory: Option<u64>,
    /// Bytes per second that files arrive with, for the load times [default: a gigabyte]
    #[arg(long, value_name = "SIZE", value_parser = parse_size, default_value = "1GB")]
    pub bandwidth: u64,
    /// Seconds that packing took: says after how many loads they are made up for
    #[arg(long, value_name = "SECONDS", value_parser = parse_seconds)]
    pub encode_seconds: Option<f64>,
    /// Times everything is decoded; of each tensor the fastest counts
    #[arg(long, value_name = "N", default_value_t = 3)]
    pub repeat: usize,
    /// Where to look for the base of a variant, beside the same tree: a directory with all below it, or an archive
    #[arg(long, value_name = "PATH")]
    pub base_path: Vec<PathBuf>,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

/// Why there is nothing to report.
#[derive(Debug, thiserror::Error)]
pub enum BenchError {
    /// There is no such archive.
    #[error(transparent)]
    Source(#[from] PackedTreeError),
    /// The archive does not open.
    #[error(transparent)]
    Archive(#[from] ArchiveError),
    /// The archive does not decode.
    #[error(transparent)]
    Decode(#[from] MaterializeError),
    /// Standard output does not take the report.
    #[error("standard output: {0}")]
    Output(#[from] io::Error),
}

/// What was measured, as `--json` prints it.
#[derive(Debug, Serialize)]
pub(super) struct Report {
    pub(super) engine: &'static str,
    /// Bytes of the archive.
    pub(super) stored_bytes: u64,
    /// Bytes of all decoded tensors.
    pub(super) decoded_bytes: u64,
    pub(super) stages: Vec<StageReport>,
    /// Seconds to decode everything, clocks off, on one thread.
    pub(super) decode_seconds: f64,
    /// Seconds to copy as many bytes, at the speed of memory.
    pub(super) copy_seconds: f64,
    pub(super) loading: Loading,
}

#[derive(Debug, Serialize)]
pub(super) struct StageReport {
    pub(super) stage: &'static str,
    pub(super) seconds: f64,
}

/// What is measured, and what for.
pub(super) struct Measurement {
    /// Times everything is decoded.
    pub(super) repeat: usize,
    /// Bytes per second that files arrive with.
    pub(super) bandwidth: u64,
    /// Seconds that packing took.
    pub(super) encode_seconds: Option<f64>,
}

/// Measures and prints.
pub fn run(args: &BenchArgs) -> Result<(), BenchError> {
    let (engine, staged) = match args.engine.cpu_engine() {
        Some(engine) => (Arc::new(engine) as Arc<dyn Engine>, Some(engine)),
        None => (args.engine.engine_within(args.gpu_memory.unwrap_or(DEFAULT_GPU_MEMORY_BYTES)), None),
    };
    let tree = PackedTree::read(&args.archive)?;
    let archive = Bases::new(base_places(&tree, false, &args.base_path)).open(&args.archive)?;
    let BenchArgs { repeat, bandwidth, encode_seconds, .. } = *args;
    let report = Report::measure(&archive, &*engine, staged, &Measurement { repeat, bandwidth, encode_seconds })?;
    let mut output = io::stdout().lock();
    if args.json {
        serde_json::to_writer_pretty(&mut output, &report).map_err(io::Error::from)?;
        writeln!(output)?;
    } else {
        report.print(&mut output)?;
    }
    Ok(output.flush()?)
}

/// Seconds of the stages around decoding.
#[derive(Clone, Debug, Default)]
struct Around {
    read: f64,
    prepare: f64,
    allocate: f64,
    /// Of each part, in the order of the records.
    decode: Vec<f64>,
}

impl Around {
    /// To decode everything, reading aside.
    fn decode_seconds(&self) -> f64 {
        self.prepare + self.decode.iter().sum::<f64>()
    }

    /// The fastest of both. A busy machine disturbs a run over everything, but not every part in every run.
    fn fastest(self, other: Self) -> Self {
        let decode = self.decode.into_iter().zip(other.decode).map(|(a, b)| a.min(b)).collect();
        let (read, prepare) = (self.read.min(other.read), self.prepare.min(other.prepare));
        Self { read, prepare, allocate: self.allocate.min(other.allocate), decode }
    }
}

impl Report {
    pub(super) fn measure(
        archive: &Archive,
        engine: &dyn Engine,
        staged: Option<CpuEngine>,
        wanted: &Measurement,
    ) -> Result<Self, BenchError> {
        let decoded_bytes = archive.files().iter().flat_map(|file| &file.tensors).map(|t| t.length_bytes).sum();
        let mut around = decode_all(archive, engine, None)?;
        for _ in 1..wanted.repeat {
            around = around.fastest(decode_all(archive, engine, None)?);
        }
        let mut stages = vec![
            StageReport { stage: "read", seconds: around.read },
            StageReport { stage: "side information", seconds: around.prepare },
            StageReport { stage: "room for tensors", seconds: around.allocate },
        ];
        if let Some(staged) = staged {
            let clock = StageClock::default();
            decode_all(archive, engine, Some((&staged, &clock)))?;
            let spent = |stage: Stage| StageReport { stage: stage.name(), seconds: clock.spent(stage).as_secs_f64() };
            stages.extend(Stage::ALL.map(spent));
        } else {
            stages.push(StageReport { stage: "decoding", seconds: around.decode.iter().sum() });
        }
        let decode_seconds = around.decode_seconds();
        Ok(Self {
            engine: engine.name(),
            stored_bytes: archive.stored_bytes(),
            decoded_bytes,
            stages,
            decode_seconds,
            copy_seconds: copy_seconds() * decoded_bytes as f64 / COPIED_BYTES as f64,
            loading: Loading::new(
                wanted.bandwidth,
                decoded_bytes,
                archive.stored_bytes(),
                decode_seconds,
                wanted.encode_seconds,
            ),
        })
    }

    fn print(&self, output: &mut impl Write) -> io::Result<()> {
        let rate = |bytes: u64, seconds: f64| bytes as f64 / seconds.max(1e-9) / 1e9;
        writeln!(output, "engine {}, one thread", self.engine)?;
        let all: f64 = self.stages.iter().map(|stage| stage.seconds).sum();
        for StageReport { stage, seconds } in &self.stages {
            writeln!(output, "  {stage:<38} {seconds:>9.4} s {:>5.1} %", 100.0 * seconds / all.max(1e-9))?;
        }
        let Self { decoded_bytes, stored_bytes, decode_seconds, copy_seconds, loading, .. } = self;
        writeln!(
            output,
            "decoding {stored_bytes} bytes to {decoded_bytes}: {decode_seconds:.4} s, {:.2} GB/s of weights, {:.2} times a copy's time",
            rate(*decoded_bytes, *decode_seconds),
            decode_seconds / copy_seconds.max(1e-9),
        )?;
        write!(output, "{loading}")
    }
}

/// Seconds to copy [`COPIED_BYTES`], the fastest of five.
fn copy_seconds() -> f64 {
    let (source, mut out) = (vec![1_u8; COPIED_BYTES], vec![0_u8; COPIED_BYTES]);
    let mut copy = || {
        let start = Instant::now();
        black_box(&mut out).copy_from_slice(black_box(&source));
        start.elapsed().as_secs_f64()
    };
    (0..5).map(|_| copy()).fold(f64::INFINITY, f64::min)
}

/// Seconds to decode an archive once, on one thread, from memory.
///
/// # Errors
/// When it does not decode.
pub(super) fn decode_seconds(archive: &Archive, engine: &dyn Engine) -> Result<f64, BenchError> {
    Ok(decode_all(archive, engine, None)?.decode_seconds())
}

/// Decodes every part once, in the order of the records, keeping what later ones are predicted from.
fn decode_all(
    archive: &Archive,
    engine: &dyn Engine,
    clock: Option<(&CpuEngine, &StageClock)>,
) -> Result<Around, BenchError> {
    let mut around = Around::default();
    let base = Materializer::new(MaterializeOptions { cache_bytes: 64 << 20, ..MaterializeOptions::default() });
    let mut references: HashMap<PartAddress, Vec<u8>> = HashMap::new();
    let records = archive.index().records.len();
    let mut last_use = vec![0; records];
    let looks_at_two_layers = archive.networks().iter().any(|network| network.contexts() == 2);
    for number in 0..records as u32 {
        if let Some(reference) = archive.record(number).reference {
            last_use[reference as usize] = number; // references come first
            if looks_at_two_layers && let Some(second) = archive.record(reference).reference {
                last_use[second as usize] = number;
            }
        }
    }
    for number in 0..records as u32 {
        let start = Instant::now();
        let parts = prepare_record(archive, number)?;
        around.prepare += start.elapsed().as_secs_f64();
        let below = archive.record(number).reference;
        for (ordinal, part) in parts.iter().enumerate() {
            let address = PartAddress { record: number, part: ordinal as u32 };
            let start = Instant::now();
            let mut stored = vec![0; part.body_bytes() as usize + WORDS_PADDING];
            let unpadded = stored.len() - WORDS_PADDING;
            archive.read_body(address, 0, &mut stored[..unpadded])?;
            around.read += start.elapsed().as_secs_f64();

            let decoded = |record, part| references.get(&PartAddress { record, part }).map(Vec::as_slice);
            let reference = part.prediction().and_then(|prediction| {
                let nearest = decoded(below?, prediction.reference_part)?;
                let Some(part) = prediction.second_part else { return Some(Cow::Borrowed(nearest)) };
                Some(Cow::Owned([nearest, decoded(archive.record(below?).reference?, part)?].concat()))
            });
            // The base's decoding is the base's.
            let of_base = match part.base() {
                Some(reference) => Some(base.base_bytes(archive, reference, 0..part.length_bytes())?),
                None => None,
            };
            let reference = of_base.as_deref().or(reference.as_deref());
            // Touched before decoding is timed: what the system does for fresh memory is a stage of its own.
            let start = Instant::now();
            let mut out = vec![1; part.length_bytes() as usize];
            around.allocate += start.elapsed().as_secs_f64();
            let start = Instant::now();
            decode_part(engine, part, &stored, reference, &mut out, clock)
                .map_err(|error| decode_error(archive, address, error))?;
            around.decode.push(start.elapsed().as_secs_f64());
            if archive.is_referenced(number) {
                references.insert(address, out);
            }
        }
        references.retain(|address, _| last_use[address.record as usize] > number);
    }
    Ok(around)
}

fn decode_part(
    engine: &dyn Engine,
    part: &PreparedPart,
    stored: &[u8],
    reference: Option<&[u8]>,
    out: &mut [u8],
    clock: Option<(&CpuEngine, &StageClock)>,
) -> Result<(), DecodeError> {
    let mut jobs: Vec<StripJob<'_>> = out
        .chunks_mut(part.full_strip_output_bytes() as usize)
        .enumerate()
        .map(|(strip, out)| StripJob { strip, stored: &stored[part.strip_range(strip).start as usize..], out })
        .collect();
    let at_once = engine.strips_at_once();
    jobs.chunks_mut(at_once).try_for_each(|jobs| {
        let reference = part.reference_of(jobs[0].strip, 0, reference);
        match clock {
            Some((staged, clock)) => staged.decode_timed(part, reference, jobs, Some(clock)),
            None => engine.decode_strips(part, reference, jobs),
        }
    })
}
