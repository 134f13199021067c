//! The mount beside plain files: the same bytes read from tmpfs and, cold and warm, through the mount, all in one run.
//!
//! ```sh
//! cargo bench --bench read_path                         # as root, for readahead
//! cargo bench --bench read_path -- --readahead 4MiB     # options of `mcwcfs mount`
//! ```
//!
//! A synthetic bfloat16 checkpoint is packed losslessly and at 4.2 bits per parameter, mounted, and read by one thread:
//! with `read`, a mebibyte at a time, and by copying out of a map. Cold is the first read after a mount, warm the second;
//! the kept file is one of `--decoded-cache`, on tmpfs too. Bytes that cannot be compressed are stored as they are: what
//! reading them costs is what the mount and the kernel take for themselves.
//!
//! Each speed is the best of several rounds, in which the lines take turns, because on a shared machine everything may be
//! half as fast a minute later. `CPU` is the mean of the rounds and counts daemon, reader and system together. Compared with:
//!
//! - `x tmpfs`: the same bytes from a plain file.
//! - `x decoder`: all processors decoding into memory and doing nothing else.
//! - `x target`: 0.95 of tmpfs where nothing is decoded; cold 0.9 of the slower of the decoder and of the best that was ever
//!   measured with FUSE and bytes that need no decoding, [`BEST_COLD_READ`] and [`BEST_COLD_MAP`] of tmpfs.
//! - `x bound`: all processors busy from the first byte to the last with what decoding costs alone and what reading stored
//!   bytes costs beside copying them. Who reads faster than that has found something to leave out.

use std::fs::{self, File};
use std::hint::black_box;
use std::io::Read;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::Instant;

use mcwcfs::archive::Archive;
use mcwcfs::materialize::{MaterializeOptions, Materializer};
use mcwcfs::numerics::bf16_from_f32;
use mcwcfs::pack::encode::{Encoder, Silent};
use mcwcfs::pack::options::{PackOptions, Quantization, Target};
use mcwcfs::pack::source::Checkpoint;
use memmap2::MmapOptions;

/// Tensors of the large checkpoint, of 16 MiB each; the small one has one.
const TENSORS: usize = 16;
const ROWS: usize = 4096;
const COLUMNS: usize = 2048;
/// What is read or copied at once.
const PIECE_BYTES: usize = 1 << 20;
const ROUNDS: usize = 5;
/// Cold reads of bytes that need no decoding, by FUSE with every setting right, beside tmpfs.
const BEST_COLD_READ: f64 = 0.52;
/// The same, copied out of a map.
const BEST_COLD_MAP: f64 = 0.42;
const MODEL: &str = "model.safetensors";

fn main() {
    // `cargo bench` says that it is a benchmark.
    let options: Vec<String> = std::env::args().skip(1).filter(|argument| argument != "--bench").collect();
    let scratch = tempfile::Builder::new().prefix("read_path-").tempdir_in("/dev/shm").expect("a tmpfs at /dev/shm");
    let path = |name: &str| scratch.path().join(name);
    for directory in ["small", "large", "mnt"] {
        fs::create_dir(path(directory)).expect("a directory");
    }
    fs::write(path("small").join(MODEL), weights(1)).expect("room for the checkpoint");
    fs::write(path("large").join(MODEL), weights(TENSORS)).expect("room for the checkpoint");
    fs::create_dir(path("noise")).expect("a directory");
    fs::write(path("noise").join(MODEL), noise()).expect("room for the checkpoint");

    let lossless = PackOptions::default();
    let lossy = PackOptions {
        quantization: Quantization::Scalar,
        target: Target::BitsPerParameter(4.2),
        ..PackOptions::default()
    };
    let columns = ["GB/s", "x tmpfs", "x decoder", "CPU s/GB", "x target", "x bound"];
    println!("{:<28} {}", "", columns.map(|column| format!("{column:>9}")).join(" "));
    let mut beside_decoding = None;
    for (name, of, pack_options) in
        [("stored", "noise", &lossless), ("lossless", "large", &lossless), ("4.2 bits", "large", &lossy)]
    {
        let source = path(name);
        let sizes = if of == "noise" { &["noise"][..] } else { &["small", "large"] };
        for size in sizes {
            fs::create_dir_all(source.join(size)).expect("a directory");
            pack(&path(size), &source.join(size), pack_options);
        }
        let decoder = decoder(&source.join(of).join("model.mcwc"));
        let lines = Lines::measure(name, &source, of, &path("mnt"), &path(of).join(MODEL), &options);
        // The first says what the others cost beside decoding.
        let beside =
            *beside_decoding.get_or_insert([COLD_READ, COLD_MAP].map(|line| lines.0[line].cpu() - decoder.cpu()));
        lines.print(name, &decoder, beside);
        for size in sizes {
            let milliseconds = (0..ROUNDS).map(|_| {
                let mount = Mount::new(&source, &path("mnt"), &options);
                milliseconds_to_keys(&mount.path.join(size).join(MODEL))
            });
            let best = milliseconds.fold(f64::INFINITY, f64::min);
            let bytes = fs::metadata(path(size).join(MODEL)).expect("a checkpoint").len();
            println!("{:<28} {best:>9.2} ms to the names of all tensors", format!("{name}, {} MB", bytes / 1_000_000));
        }
    }
}

/// What is measured of one archive, by line.
struct Lines([Sample; 8]);

const COLD_READ: usize = 1;
const COLD_MAP: usize = 5;

impl Lines {
    /// Reads the file `of` an archive in every way, and the `plain` one that it was made from.
    fn measure(name: &str, source: &Path, of: &str, mountpoint: &Path, plain: &Path, options: &[String]) -> Self {
        let mut samples = [const { Sample::NONE }; 8];
        let kept = mountpoint.with_file_name(format!("{name}, kept"));
        let keeping = [&[format!("--decoded-cache={}", kept.display())], options].concat();
        keep_decoded(source, of, mountpoint, &kept, &keeping);
        let file = mountpoint.join(of).join(MODEL);
        for _ in 0..ROUNDS {
            for (way, read) in [read_all as fn(&Path), copy_map as fn(&Path)].into_iter().enumerate() {
                samples[4 * way].add(plain, None, read);
                let mount = Mount::new(source, mountpoint, options);
                samples[4 * way + 1].add(&file, Some(mount.workers()), read);
                samples[4 * way + 2].add(&file, Some(mount.workers()), read);
                drop(mount);
                let mount = Mount::new(source, mountpoint, &keeping);
                samples[4 * way + 3].add(&file, Some(mount.workers()), read);
            }
        }
        Self(samples)
    }

    /// Prints a line for each; `beside_decoding` is what cold reads and maps cost beside it.
    fn print(&self, name: &str, decoder: &Sample, beside_decoding: [f64; 2]) {
        let processors = thread::available_parallelism().map_or(1, usize::from) as f64;
        print_line(&format!("{name}, decoder alone"), &[decoder.rate, f64::NAN, 1.0, decoder.cpu()]);
        for (way, (name_of_way, of_kept)) in
            [("read", "read of the kept file"), ("map copied", "map of the kept file")].into_iter().enumerate()
        {
            let [plain, cold, warm, kept] = &self.0[4 * way..][..4] else { unreachable!("four lines each") };
            let best = [BEST_COLD_READ, BEST_COLD_MAP][way];
            let bound = processors / (decoder.cpu() + beside_decoding[way]);
            let cold_target = 0.9 * decoder.rate.min(best * plain.rate);
            let target = 0.95 * plain.rate;
            let print = |line: String, sample: &Sample, target: f64, bound: f64| {
                let rate = sample.rate;
                let of = [rate, rate / plain.rate, rate / decoder.rate, sample.cpu(), rate / target, rate / bound];
                print_line(&format!("{name}, {line}"), &of);
            };
            print(format!("{name_of_way} from tmpfs"), plain, f64::NAN, f64::NAN);
            print(format!("cold {name_of_way}"), cold, cold_target, bound);
            print(format!("warm {name_of_way}"), warm, target, f64::NAN);
            print(of_kept.to_owned(), kept, target, f64::NAN);
        }
    }
}

/// Prints numbers under their columns; what has no meaning for a line is left out.
fn print_line(line: &str, numbers: &[f64]) {
    let cell = |number: &f64| if number.is_nan() { " ".repeat(9) } else { format!("{number:>9.2}") };
    println!("{}", format!("{line:<28} {}", numbers.iter().map(cell).collect::<Vec<_>>().join(" ")).trim_end());
}

/// Loads the checkpoint `of` once with a directory for decoded files, and waits until it is kept there.
fn keep_decoded(source: &Path, of: &str, mountpoint: &Path, kept: &Path, options: &[String]) {
    let mount = Mount::new(source, mountpoint, options);
    read_all(&mount.path.join(of).join(MODEL));
    let is_seen = |entry: std::io::Result<fs::DirEntry>| {
        entry.is_ok_and(|entry| entry.path().extension().is_some_and(|extension| extension == "seen"))
    };
    while !fs::read_dir(kept).is_ok_and(|mut entries| entries.any(is_seen)) {
        thread::sleep(std::time::Duration::from_millis(100));
    }
}

/// How fast bytes came, and at what cost.
struct Sample {
    /// The best of all rounds, in 10^9 bytes per second.
    rate: f64,
    /// Of all rounds together.
    processor_seconds: f64,
    /// Likewise, in 10^9 bytes.
    gigabytes: f64,
}

impl Sample {
    const NONE: Self = Self { rate: 0.0, processor_seconds: 0.0, gigabytes: 0.0 };

    /// Adds a round in which `read` reads a file that other processes may work for.
    fn add(&mut self, file: &Path, workers: Option<Vec<u32>>, read: fn(&Path)) {
        let bytes = fs::metadata(file).expect("a file").len();
        self.add_round(bytes, &workers.unwrap_or_default(), || read(file));
    }

    fn add_round(&mut self, bytes: u64, others: &[u32], work: impl FnOnce()) {
        let gigabytes = bytes as f64 / 1e9;
        let used = || others.iter().copied().map(process_seconds).sum::<f64>() + process_seconds(std::process::id());
        let (start, used_at_start) = (Instant::now(), used());
        work();
        self.rate = self.rate.max(gigabytes / start.elapsed().as_secs_f64());
        self.processor_seconds += used() - used_at_start;
        self.gigabytes += gigabytes;
    }

    /// Seconds of all processors for 10^9 bytes.
    fn cpu(&self) -> f64 {
        self.processor_seconds / self.gigabytes
    }
}

/// Reads a file to its end into one buffer.
fn read_all(path: &Path) {
    let mut file = File::open(path).expect("a file");
    let mut buffer = vec![0; PIECE_BYTES];
    while file.read(&mut buffer).expect("readable bytes") > 0 {
        black_box(&mut buffer);
    }
}

/// Copies a file out of a map of it.
fn copy_map(path: &Path) {
    let file = File::open(path).expect("a file");
    // SAFETY: nobody changes the file: the mount is read-only, and the one on tmpfs is ours.
    let map = unsafe { MmapOptions::new().map(&file) }.expect("a map");
    let mut buffer = vec![0; PIECE_BYTES];
    for piece in map.chunks(PIECE_BYTES) {
        buffer[..piece.len()].copy_from_slice(piece);
        black_box(&mut buffer);
    }
}

/// What `safe_open(...).keys()` does: map the file, parse its header.
fn milliseconds_to_keys(path: &Path) -> f64 {
    let start = Instant::now();
    let file = File::open(path).expect("a file");
    // SAFETY: nobody can change a file of a read-only mount.
    let map = unsafe { MmapOptions::new().map(&file) }.expect("a map");
    let (_, metadata) = safetensors::SafeTensors::read_metadata(&map).expect("a header");
    black_box(metadata.tensors());
    start.elapsed().as_secs_f64() * 1e3
}

/// Decodes everything on all processors and keeps nothing.
fn decoder(archive: &Path) -> Sample {
    let archive = Arc::new(Archive::open(archive).expect("the archive"));
    let materializer = Materializer::new(MaterializeOptions { cache_bytes: 0, ..MaterializeOptions::default() });
    let mut sample = Sample::NONE;
    let decode = || {
        let next = AtomicU64::new(0);
        thread::scope(|scope| {
            for _ in 0..thread::available_parallelism().map_or(1, usize::from) {
                scope.spawn(|| {
                    let mut out = vec![0; PIECE_BYTES];
                    loop {
                        let offset = next.fetch_add(out.len() as u64, Ordering::Relaxed);
                        if materializer.read_once(&archive, 0, offset, &mut out).expect("sound records") == 0 {
                            return;
                        }
                        black_box(&mut out);
                    }
                });
            }
        });
    };
    for _ in 0..ROUNDS {
        sample.add_round(archive.files()[0].length_bytes, &[], decode);
    }
    sample
}

/// A mount that comes down with the value.
struct Mount {
    path: PathBuf,
}

impl Mount {
    fn new(source: &Path, mountpoint: &Path, options: &[String]) -> Self {
        let mut command = Command::new(env!("CARGO_BIN_EXE_mcwcfs"));
        command.arg("mount").args([source, mountpoint]).args(options).args(["--log-file", "/dev/null"]);
        assert!(command.status().expect("mcwcfs starts").success(), "{command:?}");
        assert_eq!(fs::metadata(mountpoint).expect("a mount").ino(), 1);
        Self { path: mountpoint.to_owned() }
    }

    /// The processes that serve it: the supervisor and its worker.
    fn workers(&self) -> Vec<u32> {
        let daemon = self.daemon();
        let children = fs::read_to_string(format!("/proc/{daemon}/task/{daemon}/children")).unwrap_or_default();
        let children = children.split_whitespace().map(|pid| pid.parse().expect("a number"));
        children.chain([daemon]).collect()
    }

    fn daemon(&self) -> u32 {
        let mut value = [0_u8; 16];
        let path = std::ffi::CString::new(self.path.to_str().expect("a name of ours")).expect("no zero in it");
        // SAFETY: both names are C strings and `value` has the length stated.
        let length = unsafe {
            libc::getxattr(path.as_ptr(), c"user.mcwc.daemon_pid".as_ptr(), value.as_mut_ptr().cast(), value.len())
        };
        let value = &value[..usize::try_from(length).expect("the attribute")];
        std::str::from_utf8(value).expect("digits").parse().expect("a number")
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        let status = Command::new(env!("CARGO_BIN_EXE_mcwcfs")).arg("umount").arg(&self.path).status();
        assert!(status.is_ok_and(|status| status.success()) || thread::panicking(), "umount failed");
    }
}

/// Processor seconds that a process has used, its ended threads included.
fn process_seconds(pid: u32) -> f64 {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).expect("a running process");
    let fields: Vec<&str> = stat.rsplit(')').next().expect("a name").split_whitespace().collect();
    let ticks = |field: usize| fields[field].parse::<f64>().expect("a number");
    // SAFETY: the call takes an integer.
    let per_second = unsafe { libc::sysconf(libc::_SC_CLK_TCK) } as f64;
    (ticks(11) + ticks(12)) / per_second
}

fn pack(checkpoint: &Path, directory: &Path, options: &PackOptions) {
    let checkpoint = Checkpoint::open(&checkpoint.join(MODEL)).expect("the checkpoint");
    Encoder::new(&checkpoint, options, &Silent).pack(&directory.join("model.mcwc"), true).expect("an archive");
}

/// Rows of different scales, as in trained weights. All tensors are alike, which no stage of the codec looks at here.
fn weights(tensors: usize) -> Vec<u8> {
    let mut random = fastrand::Rng::with_seed(7);
    let mut data = Vec::with_capacity(2 * ROWS * COLUMNS);
    for _ in 0..ROWS {
        let scale = 0.02 * (0.3 * normal(&mut random)).exp();
        data.extend((0..COLUMNS).flat_map(|_| bf16_from_f32(scale * normal(&mut random)).to_le_bytes()));
    }
    checkpoint("BF16", &format!("{ROWS},{COLUMNS}"), tensors, &data)
}

/// As many bytes as the large checkpoint has, which nothing can compress.
fn noise() -> Vec<u8> {
    let mut data = vec![0; 2 * ROWS * COLUMNS];
    fastrand::Rng::with_seed(8).fill(&mut data);
    checkpoint("U8", &data.len().to_string(), TENSORS, &data)
}

/// A file of so many tensors, each with the same bytes.
fn checkpoint(dtype: &str, shape: &str, tensors: usize, data: &[u8]) -> Vec<u8> {
    let entries: Vec<String> = (0..tensors)
        .map(|tensor| {
            let offsets = format!("[{},{}]", tensor * data.len(), (tensor + 1) * data.len());
            format!(r#""weight.{tensor}":{{"dtype":"{dtype}","shape":[{shape}],"data_offsets":{offsets}}}"#)
        })
        .collect();
    let header = format!("{{{}}}", entries.join(","));
    [(header.len() as u64).to_le_bytes().as_slice(), header.as_bytes(), &data.repeat(tensors)].concat()
}

fn normal(random: &mut fastrand::Rng) -> f32 {
    let (a, b) = (1.0 - random.f32(), random.f32());
    (-2.0 * a.ln()).sqrt() * (std::f32::consts::TAU * b).cos()
}
