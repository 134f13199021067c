//! Decoding speed of whole checkpoints and of every kind of record in them, on one thread and on two, beside copies of as
//! many bytes, all in one run.
//!
//! ```sh
//! cargo bench --bench checkpoint [-- ARCHIVE...]
//! ```
//!
//! Without an archive, a made-up BERT whose layers resemble one another is packed in several ways, so that every mode
//! occurs. Everything is in memory. Of each group of strips the fastest time counts, and of two threads beside one the
//! fastest run: on a busy machine the others say how busy it is.

use std::collections::{BTreeSet, HashMap, HashSet};
use std::hint::black_box;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::Instant;

use mcwcfs::archive::{Archive, PartAddress};
use mcwcfs::decode::cpu::{CpuEngine, WORDS_PADDING};
use mcwcfs::decode::prepared::PartKind;
use mcwcfs::decode::select::cpu_engines;
use mcwcfs::decode::{Engine, PreparedPart, StripJob};
use mcwcfs::materialize::prepare_record;
use mcwcfs::pack::encode::{Encoder, Silent};
use mcwcfs::pack::options::{PackOptions, Target};
use mcwcfs::pack::source::Checkpoint;

#[path = "../tests/common/mod.rs"]
mod common;

/// Times everything is decoded.
const REPEATS: usize = 9;
/// Bytes copied at a time, as many as are decoded at a time.
const COPIED_BYTES: usize = 512 << 10;

fn main() {
    let given: Vec<PathBuf> =
        std::env::args_os().skip(1).filter(|argument| argument != "--bench").map(Into::into).collect();
    let directory = tempfile::tempdir().expect("a directory");
    let archives = if given.is_empty() { packed_bert(directory.path()) } else { given };
    println!("{:<62} {:>8} {:>9} {:>7} {:>10}", "", "MB out", "GB/s out", "x copy", "2 threads");
    for path in archives {
        let checkpoint = InMemory::load(&path);
        for engine in cpu_engines() {
            checkpoint.measure(&path.file_stem().unwrap_or_default().to_string_lossy(), engine);
        }
    }
}

fn packed_bert(directory: &Path) -> Vec<PathBuf> {
    let checkpoint = directory.join("checkpoint");
    let bert = common::Bert { hidden: 768, heads: 12, ffn_units: 3072, dtype: "BF16", ..common::Bert::default() };
    bert.write(&checkpoint);
    let options =
        |target| PackOptions { target, trellis_states: Some("8".parse().expect("eight")), ..PackOptions::default() };
    let packed = [
        ("lossless", PackOptions::default()),
        ("4.2 bits", options(Target::BitsPerParameter(4.2))),
        ("8 bits", options(Target::BitsPerParameter(8.0))),
    ];
    let pack = |(name, options): (&str, PackOptions)| {
        let path = directory.join(format!("{name}.mcwc"));
        let source = Checkpoint::open(&checkpoint.join("model.safetensors")).expect("the checkpoint");
        Encoder::new(&source, &options, &Silent).pack(&path, true).expect("an archive");
        path
    };
    packed.map(pack).to_vec()
}

/// One part, and what it takes to decode it.
struct Part {
    address: PartAddress,
    kind: String,
    prepared: PreparedPart,
    stored: Vec<u8>,
    reference: Option<PartAddress>,
}

/// All parts of an archive.
struct InMemory {
    parts: Vec<Part>,
    /// Seconds to prepare all records from their side information.
    prepare_seconds: f64,
}

impl InMemory {
    fn load(path: &Path) -> Self {
        let archive = Archive::open(path).unwrap_or_else(|error| panic!("{error}"));
        let records = 0..archive.index().records.len() as u32;
        let start = Instant::now();
        let prepared: Vec<_> =
            records.map(|record| prepare_record(&archive, record).unwrap_or_else(|error| panic!("{error}"))).collect();
        let prepare_seconds = start.elapsed().as_secs_f64();
        let mut parts = Vec::new();
        for (record, prepared) in (0..).zip(prepared) {
            for (part, prepared) in (0..).zip(prepared) {
                let address = PartAddress { record, part };
                let mut stored = vec![0; prepared.body_bytes() as usize + WORDS_PADDING];
                let length = stored.len() - WORDS_PADDING;
                archive.read_body(address, 0, &mut stored[..length]).unwrap_or_else(|error| panic!("{error}"));
                let reference = prepared.prediction().map(|prediction| {
                    let record = archive.record(record).reference.expect("a predicted record has one");
                    PartAddress { record, part: prediction.reference_part }
                });
                parts.push(Part { address, kind: kind_of(&prepared), prepared, stored, reference });
            }
        }
        Self { parts, prepare_seconds }
    }

    /// Prints a line for everything, one for each kind of part, and one for a copy.
    fn measure(&self, name: &str, engine: CpuEngine) {
        let references = self.references(engine);
        let mut outputs: Vec<Vec<u8>> =
            self.parts.iter().map(|part| vec![1; part.prepared.length_bytes() as usize]).collect();
        let sources = outputs.clone();
        let kinds: BTreeSet<&str> = self.parts.iter().map(|part| &*part.kind).collect();
        let mut lines = vec![Line::new("copy", 2, |_| true), Line::new("all tensors", 2, |_| true)];
        lines.extend(kinds.iter().map(|kind| Line::new(kind, 1, move |part| part.kind == *kind)));
        for _ in 0..REPEATS {
            for (number, line) in lines.iter_mut().enumerate() {
                for threads in 1..=line.threads {
                    let times = if number == 0 {
                        let pieces = sources
                            .iter()
                            .zip(&mut outputs)
                            .flat_map(|(source, out)| source.chunks(COPIED_BYTES).zip(out.chunks_mut(COPIED_BYTES)));
                        on_threads(threads, pieces.collect(), |(source, out)| {
                            black_box(out).copy_from_slice(black_box(source));
                        })
                    } else {
                        let parts = self.parts.iter().zip(&mut outputs).filter(|(part, _)| (line.is_part)(part));
                        let groups = parts.flat_map(|(part, out)| part.groups(engine, &references, out));
                        on_threads(threads, groups.collect(), |(part, reference, mut jobs)| {
                            engine.decode_strips(&part.prepared, reference, &mut jobs).expect("sound strips");
                        })
                    };
                    line.add(threads, &times);
                }
            }
        }
        let copy: f64 = lines[0].each.iter().sum();
        for line in &lines {
            let parts = self.parts.iter().filter(|part| (line.is_part)(part));
            let bytes: u64 = parts.map(|part| part.prepared.length_bytes()).sum();
            let seconds: f64 = line.each.iter().sum();
            let share = bytes as f64 / sources.iter().map(Vec::len).sum::<usize>() as f64;
            let [one, two] = line.together;
            let title = format!("{name}, {}, {}", engine.name(), line.name);
            let scaling = if line.threads > 1 { format!("{:.2}", one / two) } else { String::new() };
            println!(
                "{title:<62} {:>8.1} {:>9.2} {:>7.2} {scaling:>10}",
                bytes as f64 / 1e6,
                bytes as f64 / seconds / 1e9,
                seconds / (copy * share),
            );
        }
        println!("{:<62} {:>8.1} ms", format!("{name}, side information"), 1e3 * self.prepare_seconds);
    }

    /// Decoded parts that others are predicted from.
    fn references(&self, engine: CpuEngine) -> HashMap<PartAddress, Vec<u8>> {
        let needed: HashSet<PartAddress> = self.parts.iter().filter_map(|part| part.reference).collect();
        let mut references = HashMap::new();
        for part in self.parts.iter().filter(|part| needed.contains(&part.address)) {
            let mut out = vec![0; part.prepared.length_bytes() as usize];
            for (part, reference, mut jobs) in part.groups(engine, &references, &mut out) {
                engine.decode_strips(&part.prepared, reference, &mut jobs).expect("sound strips");
            }
            references.insert(part.address, out);
        }
        references
    }
}

/// One line of the report.
struct Line<'a> {
    name: &'a str,
    /// It is measured on one thread, and on as many as this.
    threads: usize,
    is_part: Box<dyn Fn(&Part) -> bool + 'a>,
    /// Seconds of each piece of work on one thread: the fastest time of each.
    each: Vec<f64>,
    /// Seconds of all of it on one thread and on two: the fastest times.
    together: [f64; 2],
}

impl<'a> Line<'a> {
    fn new(name: &'a str, threads: usize, is_part: impl Fn(&Part) -> bool + 'a) -> Self {
        Self { name, threads, is_part: Box::new(is_part), each: Vec::new(), together: [f64::INFINITY; 2] }
    }

    fn add(&mut self, threads: usize, (together, each): &(f64, Vec<f64>)) {
        self.together[threads - 1] = self.together[threads - 1].min(*together);
        if threads == 1 {
            self.each.resize(each.len(), f64::INFINITY);
            for (fastest, seconds) in self.each.iter_mut().zip(each) {
                *fastest = fastest.min(*seconds);
            }
        }
    }
}

/// Strips that are decoded in one call.
type Group<'a> = (&'a Part, Option<&'a [u8]>, Vec<StripJob<'a>>);

impl Part {
    fn groups<'a>(
        &'a self,
        engine: CpuEngine,
        references: &'a HashMap<PartAddress, Vec<u8>>,
        out: &'a mut [u8],
    ) -> Vec<Group<'a>> {
        let reference = self.reference.map(|address| &*references[&address]);
        let strips =
            out.chunks_mut(self.prepared.full_strip_output_bytes() as usize).enumerate().map(|(strip, out)| StripJob {
                strip,
                stored: &self.stored[self.prepared.strip_range(strip).start as usize..],
                out,
            });
        let mut groups: Vec<Group<'a>> = Vec::new();
        for job in strips {
            match groups.last_mut() {
                Some((_, _, jobs)) if jobs.len() < engine.strips_at_once() => jobs.push(job),
                _ => groups.push((self, reference, vec![job])),
            }
        }
        groups
    }
}

/// Does all the work on so many threads, which take turns. Gives the seconds of all of it and of each piece of the share of
/// the calling thread: of all pieces, if it is alone.
fn on_threads<T: Send>(threads: usize, work: Vec<T>, run: impl Fn(T) + Sync) -> (f64, Vec<f64>) {
    let mut shares: Vec<Vec<T>> = (0..threads).map(|_| Vec::new()).collect();
    for (number, piece) in work.into_iter().enumerate() {
        shares[number % threads].push(piece);
    }
    let run = &run;
    let start = Instant::now();
    let each = thread::scope(|scope| {
        let own = shares.pop().expect("one thread at least");
        for share in shares {
            scope.spawn(move || share.into_iter().for_each(run));
        }
        let timed = own.into_iter().map(|piece| {
            let start = Instant::now();
            run(piece);
            start.elapsed().as_secs_f64()
        });
        timed.collect()
    });
    (start.elapsed().as_secs_f64(), each)
}

fn kind_of(part: &PreparedPart) -> String {
    match part.kind() {
        PartKind::Raw => "raw".into(),
        PartKind::Split { .. } => "split".into(),
        PartKind::Units { units, .. } => format!("units of {} bits", units.unit_bits()),
        PartKind::Based(_) => "based".into(),
        PartKind::Quantized { symbols, quantizer, prediction } => {
            let trellis = match (&quantizer.vectors, quantizer.trellis) {
                (Some(_), _) => "vectors",
                (None, Some(_)) => "trellis",
                (None, None) => "scalar",
            };
            let raw = if symbols.raw_bits > 0 { ", raw bits" } else { "" };
            let predicted = match prediction {
                None => "",
                Some(prediction) if prediction.motion.is_none() => ", predicted",
                Some(_) => ", predicted from elsewhere",
            };
            format!("{trellis}{raw}{predicted}")
        }
    }
}
