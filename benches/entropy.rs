//! Decoding speed of every engine, beside a copy of the same output and constriction's own decoder, all in one run.
//!
//! ```sh
//! cargo bench --bench entropy
//! ```
//!
//! A synthetic bfloat16 checkpoint is packed in each way; its largest tensor is then decoded in memory on one thread.
//! Times are medians; the machine decides how much they mean, the ratios within one run mean more.

use std::fs;
use std::hint::black_box;
use std::path::Path;
use std::time::Instant;

use constriction::stream::Decode;
use constriction::stream::model::{ContiguousLookupDecoderModel, IterableEntropyModel};
use constriction::stream::stack::SmallAnsCoder;
use mcwcfs::archive::{Archive, PartAddress};
use mcwcfs::decode::cpu::WORDS_PADDING;
use mcwcfs::decode::reference::ReferenceEngine;
use mcwcfs::decode::select::cpu_engines;
use mcwcfs::decode::{Engine, PreparedPart, StripJob};
use mcwcfs::materialize::prepare_record;
use mcwcfs::numerics::bf16_from_f32;
use mcwcfs::pack::encode::{Encoder, Silent};
use mcwcfs::pack::options::{PackOptions, Quantization, Steps, Target};
use mcwcfs::pack::source::Checkpoint;

const ROWS: usize = 4096;
const COLUMNS: usize = 2048;
/// Times the tensor is decoded.
const REPEATS: usize = 12;
/// Strips decoded in one call.
const GROUP: usize = 4;
/// Bytes of such a group.
const PIECE_BYTES: usize = GROUP << 17;

fn main() {
    let directory = tempfile::tempdir().expect("a directory");
    let checkpoint = directory.path().join("model.safetensors");
    fs::write(&checkpoint, gaussian_checkpoint()).expect("the checkpoint");

    let bytes = 2 * ROWS * COLUMNS;
    println!("{:<38} {:>9} {:>10} {:>9}", "", "ns/symbol", "GB/s out", "x copy");
    // The copy is measured anew for every line: on a shared machine it may be half as fast a minute later.
    let print = |name: &str, seconds: f64| {
        let (symbols, copy) = ((ROWS * COLUMNS) as f64, copy_seconds(bytes));
        let (nanoseconds, rate) = (1e9 * seconds / symbols, bytes as f64 / seconds / 1e9);
        println!("{name:<38} {nanoseconds:>9.3} {rate:>10.2} {:>9.2}", seconds / copy);
    };
    print("copy of the output", copy_seconds(bytes));

    let scalar = PackOptions { quantization: Quantization::Scalar, ..PackOptions::default() };
    let shared = PackOptions { quantization: Quantization::TrellisShared, ..PackOptions::default() };
    let rate = Target::BitsPerParameter;
    for (name, options) in [
        ("lossless", PackOptions::default()),
        ("scalar 4.2", PackOptions { target: rate(4.2), ..scalar.clone() }),
        ("scalar 2.1", PackOptions { target: rate(2.1), ..scalar.clone() }),
        ("scalar 4.2, a step per row", PackOptions { target: rate(4.2), steps: Steps::PerRun, ..scalar }),
        ("trellis 4.2", PackOptions { target: rate(4.2), ..shared }),
        ("trellis 2.1", PackOptions { target: rate(2.1), ..PackOptions::default() }),
        ("trellis 8", PackOptions { target: rate(8.0), ..PackOptions::default() }),
    ] {
        let packed = Packed::new(&checkpoint, &directory.path().join("packed.mcwc"), &options);
        for engine in cpu_engines() {
            let engine: &dyn Engine = &engine;
            print(&format!("{name}, {}", engine.name()), packed.seconds(engine, REPEATS));
        }
        print(&format!("{name}, reference"), packed.seconds(&ReferenceEngine, 1));
    }
    print("constriction, symbols only", constriction_seconds());
}

/// Rows of different scales, as in trained weights.
fn gaussian_checkpoint() -> Vec<u8> {
    let mut random = fastrand::Rng::with_seed(7);
    let length = 2 * ROWS * COLUMNS;
    let header = format!(r#"{{"weight":{{"dtype":"BF16","shape":[{ROWS},{COLUMNS}],"data_offsets":[0,{length}]}}}}"#);
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend(header.bytes());
    for _ in 0..ROWS {
        let scale = 0.02 * (0.3 * normal(&mut random)).exp();
        bytes.extend((0..COLUMNS).flat_map(|_| bf16_from_f32(scale * normal(&mut random)).to_le_bytes()));
    }
    bytes
}

fn normal(random: &mut fastrand::Rng) -> f32 {
    let (a, b) = (1.0 - random.f32(), random.f32());
    (-2.0 * a.ln()).sqrt() * (std::f32::consts::TAU * b).cos()
}

/// One tensor's stored bytes in memory.
struct Packed {
    part: PreparedPart,
    body: Vec<u8>,
}

impl Packed {
    fn new(checkpoint: &Path, archive: &Path, options: &PackOptions) -> Self {
        let checkpoint = Checkpoint::open(checkpoint).expect("the checkpoint");
        Encoder::new(&checkpoint, options, &Silent).pack(archive, true).expect("an archive");
        let archive = Archive::open(archive).expect("the archive");
        let address = archive.address(0, 0);
        let PartAddress { record, part } = address;
        let part = prepare_record(&archive, record).expect("a sound record").swap_remove(part as usize);
        let mut body = vec![0; part.body_bytes() as usize + WORDS_PADDING];
        let length = body.len() - WORDS_PADDING;
        archive.read_body(address, 0, &mut body[..length]).expect("the body");
        Self { part, body }
    }

    /// Seconds for the whole tensor: the median of a group of strips, times the groups there are. A group takes less time
    /// than a scheduler lets a process run, so that a busy machine disturbs few samples.
    fn seconds(&self, engine: &dyn Engine, repeats: usize) -> f64 {
        let mut outputs = Outputs::new(self.part.length_bytes() as usize);
        let group_bytes = GROUP * self.part.full_strip_output_bytes() as usize;
        let mut samples = Vec::new();
        for _ in 0..repeats {
            for (group, out) in outputs.next().chunks_exact_mut(group_bytes).enumerate() {
                let strips = GROUP * group..;
                let mut jobs: Vec<StripJob<'_>> = (strips.zip(out.chunks_mut(group_bytes / GROUP)))
                    .map(|(strip, out)| {
                        let stored = &self.body[self.part.strip_range(strip).start as usize..];
                        StripJob { strip, stored, out }
                    })
                    .collect();
                let start = Instant::now();
                engine.decode_strips(&self.part, None, &mut jobs).expect("sound strips");
                samples.push(start.elapsed().as_secs_f64());
            }
        }
        median(samples) * self.part.length_bytes() as f64 / group_bytes as f64
    }
}

/// Several outputs in turn, so that neither a decoder nor a copy finds its output in a cache.
struct Outputs {
    outputs: Vec<Vec<u8>>,
    next: usize,
}

impl Outputs {
    fn new(bytes: usize) -> Self {
        Self { outputs: vec![vec![1; bytes]; 8], next: 0 }
    }

    fn next(&mut self) -> &mut [u8] {
        self.next += 1;
        let count = self.outputs.len();
        &mut self.outputs[self.next % count]
    }
}

/// As for strips: the median of copying half a mebibyte, elsewhere each time.
fn copy_seconds(bytes: usize) -> f64 {
    let (mut sources, mut outputs) = (Outputs::new(bytes), Outputs::new(bytes));
    let mut samples = Vec::new();
    for _ in 0..REPEATS {
        let pieces = sources.next().chunks_exact(PIECE_BYTES).zip(outputs.next().chunks_exact_mut(PIECE_BYTES));
        for (source, out) in pieces {
            let start = Instant::now();
            black_box(out).copy_from_slice(black_box(source));
            samples.push(start.elapsed().as_secs_f64());
        }
    }
    median(samples) * bytes as f64 / PIECE_BYTES as f64
}

/// constriction's fastest decoder: one coder, a lookup table, one distribution for all symbols.
fn constriction_seconds() -> f64 {
    let weights: Vec<f64> = (-20..=20).map(|code| (-0.5 * (f64::from(code) / 4.0).powi(2)).exp()).collect();
    let total: f64 = weights.iter().sum();
    let mut frequencies: Vec<u16> = weights.iter().map(|weight| (weight / total * 4000.0) as u16 + 1).collect();
    frequencies[20] += 4096 - frequencies.iter().sum::<u16>();
    let model = ContiguousLookupDecoderModel::<u16, Vec<u16>, Box<[u16]>, 12>::from_nonzero_fixed_point_probabilities(
        &frequencies,
        false,
    )
    .expect("frequencies that sum to 4096");
    assert_eq!(model.symbol_table().count(), frequencies.len());
    let mut random = fastrand::Rng::with_seed(3);
    // Random words are what some symbols of this distribution are coded as.
    let words: Vec<u16> = (0..ROWS * COLUMNS / 2).map(|_| random.u16(1..)).collect();
    let mut out = vec![0_u16; ROWS * COLUMNS];
    let mut coder = SmallAnsCoder::from_compressed(words).expect("no zero word at the end");
    let mut samples = Vec::new();
    for out in out.chunks_mut(PIECE_BYTES / 2) {
        let start = Instant::now();
        for out in &mut *out {
            *out = coder.decode_symbol(model.as_view()).expect("an asymmetric numeral system does not fail") as u16;
        }
        black_box(out);
        samples.push(start.elapsed().as_secs_f64());
    }
    median(samples) * (ROWS * COLUMNS) as f64 / (PIECE_BYTES / 2) as f64
}

fn median(mut samples: Vec<f64>) -> f64 {
    samples.sort_by(f64::total_cmp);
    samples[samples.len() / 2]
}
