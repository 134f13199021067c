//! `mcwcfs bench`: how fast an archive decodes on this machine, where the time goes (the paper's Table 9), and from which
//! bandwidth on the original would load faster (Appendix J).
//!
//! Everything is decoded on one thread from memory; only the stage `read` touches the file.

use std::collections::HashMap;
use std::hint::black_box;
use std::io::{self, Write};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;

use clap::Args;
use serde::Serialize;

use super::base_places;
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
struct Report {
    engine: &'static str,
    /// Bytes of the archive.
    stored_bytes: u64,
    /// Bytes of all decoded tensors.
    decoded_bytes: u64,
    stages: Vec<StageReport>,
    /// Seconds to decode everything, clocks off, on one thread.
    decode_seconds: f64,
    /// Seconds to copy as many bytes, at the speed of memory.
    copy_seconds: f64,
    loading: Loading,
}

#[derive(Debug, Serialize)]
struct StageReport {
    stage: &'static str,
    seconds: f64,
}

/// Load times at a bandwidth (Eqs. 109-110), and the bandwidths at which both ways take equally long: where Eq. 115 is 0,
/// serially, and where the transfer of the original takes as long as decoding alone, overlapped. Making weights of the
/// original's bytes is taken to cost nothing, as where they are mapped, so the break-even is the least that can be claimed.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
struct Loading {
    bandwidth: u64,
    /// The original's bytes fetched.
    original_seconds: f64,
    /// The archive fetched, then decoded.
    serial_seconds: f64,
    /// The archive decoded while it is fetched.
    overlapped_seconds: f64,
    /// Below so many bytes per second the archive loads faster, serially.
    serial_break_even: f64,
    /// The same where decoding overlaps.
    overlapped_break_even: f64,
    /// What packing costs, where it was said.
    #[serde(skip_serializing_if = "Option::is_none")]
    packing: Option<Packing>,
}

/// After how many loads the seconds of packing are saved (Eq. 113), having the original for nothing; `None` where loads save
/// none.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
struct Packing {
    encode_seconds: f64,
    serial_break_even_loads: Option<u64>,
    overlapped_break_even_loads: Option<u64>,
}

impl Loading {
    fn new(
        bandwidth: u64,
        original_bytes: u64,
        stored_bytes: u64,
        decode_seconds: f64,
        encode_seconds: Option<f64>,
    ) -> Self {
        let [original, stored] = [original_bytes, stored_bytes].map(|bytes| bytes as f64);
        let fetch = stored / bandwidth as f64;
        let original_seconds = original / bandwidth as f64;
        let (serial_seconds, overlapped_seconds) = (fetch + decode_seconds, fetch.max(decode_seconds));
        let packing = encode_seconds.map(|encode_seconds| {
            let loads = |seconds: f64| {
                let saved = original_seconds - seconds;
                (saved > 0.0).then(|| (encode_seconds / saved).ceil() as u64)
            };
            Packing {
                encode_seconds,
                serial_break_even_loads: loads(serial_seconds),
                overlapped_break_even_loads: loads(overlapped_seconds),
            }
        });
        Self {
            bandwidth,
            original_seconds,
            serial_seconds,
            overlapped_seconds,
            packing,
            serial_break_even: (original - stored).max(0.0) / decode_seconds,
            overlapped_break_even: if stored < original { original / decode_seconds } else { 0.0 },
        }
    }
}

/// Measures and prints.
pub fn run(args: &BenchArgs) -> Result<(), BenchError> {
    let (engine, staged) = match args.engine.cpu_engine() {
        Some(engine) => (Arc::new(engine) as Arc<dyn Engine>, Some(engine)),
        None => (args.engine.engine_within(args.gpu_memory.unwrap_or(DEFAULT_GPU_MEMORY_BYTES)), None),
    };
    let tree = PackedTree::read(&args.archive)?;
    let archive = Bases::new(base_places(&tree, false, &args.base_path)).open(&args.archive)?;
    let report = Report::measure(&archive, &*engine, staged, args)?;
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
    /// The fastest of both. A busy machine disturbs a run over everything, but not every part in every run.
    fn fastest(self, other: Self) -> Self {
        let decode = self.decode.into_iter().zip(other.decode).map(|(a, b)| a.min(b)).collect();
        let (read, prepare) = (self.read.min(other.read), self.prepare.min(other.prepare));
        Self { read, prepare, allocate: self.allocate.min(other.allocate), decode }
    }
}

impl Report {
    /// `staged` is the engine where it is the CPU's.
    fn measure(
        archive: &Archive,
        engine: &dyn Engine,
        staged: Option<CpuEngine>,
        args: &BenchArgs,
    ) -> Result<Self, BenchError> {
        let decoded_bytes = archive.files().iter().flat_map(|file| &file.tensors).map(|t| t.length_bytes).sum();
        let mut decode_strips = |part: &PreparedPart, reference: Option<&[u8]>, jobs: &mut [StripJob<'_>]| {
            engine.decode_strips(part, reference, jobs)
        };
        let at_once = engine.strips_at_once();
        let mut around = decode_all(archive, at_once, &mut decode_strips)?;
        for _ in 1..args.repeat {
            around = around.fastest(decode_all(archive, at_once, &mut decode_strips)?);
        }
        let mut stages = vec![
            StageReport { stage: "read", seconds: around.read },
            StageReport { stage: "side information", seconds: around.prepare },
            StageReport { stage: "room for tensors", seconds: around.allocate },
        ];
        if let Some(staged) = staged {
            let clock = StageClock::default();
            decode_all(archive, at_once, &mut |part, reference, jobs| {
                staged.decode_timed(part, reference, jobs, Some(&clock))
            })?;
            let spent = |stage: Stage| StageReport { stage: stage.name(), seconds: clock.spent(stage).as_secs_f64() };
            stages.extend(Stage::ALL.map(spent));
        } else {
            stages.push(StageReport { stage: "decoding", seconds: around.decode.iter().sum() });
        }
        let decode_seconds = around.prepare + around.decode.iter().sum::<f64>();
        Ok(Self {
            engine: engine.name(),
            stored_bytes: archive.stored_bytes(),
            decoded_bytes,
            stages,
            decode_seconds,
            copy_seconds: copy_seconds() * decoded_bytes as f64 / COPIED_BYTES as f64,
            loading: Loading::new(
                args.bandwidth,
                decoded_bytes,
                archive.stored_bytes(),
                decode_seconds,
                args.encode_seconds,
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
        writeln!(
            output,
            "at {:.3} GB/s: the original loads in {:.3} s, the archive in {:.3} s, or {:.3} s decoded while it arrives",
            loading.bandwidth as f64 / 1e9,
            loading.original_seconds,
            loading.serial_seconds,
            loading.overlapped_seconds,
        )?;
        writeln!(
            output,
            "the archive loads faster below {:.3} GB/s, or below {:.3} GB/s decoded while it arrives",
            loading.serial_break_even / 1e9,
            loading.overlapped_break_even / 1e9,
        )?;
        let Some(packing) = loading.packing else { return Ok(()) };
        let [serial, overlapped] = [packing.serial_break_even_loads, packing.overlapped_break_even_loads]
            .map(|loads| loads.map_or("never".into(), |loads| format!("after {loads} loads")));
        writeln!(
            output,
            "{:.3} s of packing are made up for {serial}, or {overlapped} decoded while it arrives",
            packing.encode_seconds,
        )
    }
}

fn parse_seconds(text: &str) -> Result<f64, String> {
    let seconds = text.parse().ok().filter(|seconds: &f64| seconds.is_finite() && *seconds >= 0.0);
    seconds.ok_or_else(|| "expected a number of seconds, 0 or more".into())
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

/// Decodes every part once, in the order of the records, keeping what later ones are predicted from.
fn decode_all(archive: &Archive, at_once: usize, decode_strips: &mut DecodeStrips<'_>) -> Result<Around, BenchError> {
    let mut around = Around::default();
    let base = Materializer::new(MaterializeOptions { cache_bytes: 64 << 20, ..MaterializeOptions::default() });
    let mut references: HashMap<PartAddress, Vec<u8>> = HashMap::new();
    let records = archive.index().records.len();
    let mut last_use = vec![0; records];
    for number in 0..records as u32 {
        if let Some(reference) = archive.record(number).reference {
            last_use[reference as usize] = number; // references come first
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

            let reference = part.prediction().and_then(|prediction| {
                references.get(&PartAddress { record: below?, part: prediction.reference_part }).map(Vec::as_slice)
            });
            // The base's decoding is the base's.
            let of_base = match part.base() {
                Some(reference) => Some(base.base_bytes(archive, reference, 0..part.length_bytes())?),
                None => None,
            };
            let reference = of_base.as_deref().or(reference);
            // Touched before decoding is timed: what the system does for fresh memory is a stage of its own.
            let start = Instant::now();
            let mut out = vec![1; part.length_bytes() as usize];
            around.allocate += start.elapsed().as_secs_f64();
            let start = Instant::now();
            decode_part(at_once, decode_strips, part, &stored, reference, &mut out)
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

/// An engine's [`Engine::decode_strips`], or the same with a clock.
type DecodeStrips<'a> = dyn FnMut(&PreparedPart, Option<&[u8]>, &mut [StripJob<'_>]) -> Result<(), DecodeError> + 'a;

fn decode_part(
    at_once: usize,
    decode_strips: &mut DecodeStrips<'_>,
    part: &PreparedPart,
    stored: &[u8],
    reference: Option<&[u8]>,
    out: &mut [u8],
) -> Result<(), DecodeError> {
    let mut jobs: Vec<StripJob<'_>> = out
        .chunks_mut(part.full_strip_output_bytes() as usize)
        .enumerate()
        .map(|(strip, out)| StripJob { strip, stored: &stored[part.strip_range(strip).start as usize..], out })
        .collect();
    jobs.chunks_mut(at_once).try_for_each(|jobs| {
        let reference = part.reference_of(jobs[0].strip, 0, reference);
        decode_strips(part, reference, jobs)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn at_the_break_even_bandwidth_both_ways_take_equally_long() {
        let at = |bandwidth| Loading::new(bandwidth, 10_000, 4_000, 0.5, None);
        let serial = at(at(1).serial_break_even as u64);
        assert!((serial.original_seconds - serial.serial_seconds).abs() < 1e-9);
        let overlapped = at(at(1).overlapped_break_even as u64);
        assert!((overlapped.original_seconds - overlapped.overlapped_seconds).abs() < 1e-9);
    }

    #[test]
    fn an_archive_larger_than_the_original_never_loads_faster() {
        let loading = Loading::new(1, 100, 101, 0.5, Some(1.0));
        assert_eq!((loading.serial_break_even, loading.overlapped_break_even), (0.0, 0.0));
        let Packing { serial_break_even_loads, overlapped_break_even_loads, .. } = loading.packing.expect("asked for");
        assert_eq!((serial_break_even_loads, overlapped_break_even_loads), (None, None));
    }

    /// With the figures of the paper's Table 12, second line: it says about 400 loads.
    #[test]
    fn packing_pays_off_when_the_loads_have_saved_its_seconds() {
        let of = |encode_seconds| {
            let loading = Loading::new(100_000_000, 2_800_000_000, 740_000_000, 2.5, Some(encode_seconds));
            loading.packing.expect("asked for")
        };
        let loads = of(2.3 * 3600.0);
        assert_eq!(loads.serial_break_even_loads, Some(458), "8280 s, of which a load saves 28 - 7.4 - 2.5");
        assert_eq!(loads.overlapped_break_even_loads, Some(402), "a load saves 28 - 7.4");
        assert_eq!((of(0.0).serial_break_even_loads, of(18.0).serial_break_even_loads), (Some(0), Some(1)));
    }

    #[test]
    fn seconds_are_a_number_that_is_not_negative() {
        assert_eq!(parse_seconds("2.5"), Ok(2.5));
        for wrong in ["", "-1", "inf", "nan", "2 s"] {
            assert!(parse_seconds(wrong).is_err(), "{wrong}");
        }
    }
}
