//! The mount beside plain files: the same bytes read from tmpfs and, cold and warm, through the mount, all in one run.
//!
//! ```sh
//! cargo bench --bench read_path                         # as root, for readahead
//! cargo bench --bench read_path -- --readahead 4MiB     # options of `mcwcfs mount`
//! ```
//!
//! A synthetic bfloat16 checkpoint is packed losslessly and at 4.2 bits per parameter, mounted, and read by one thread:
//! with `read`, a mebibyte at a time, and by copying out of a map. Cold is the first read after a mount, warm the second;
//! the kept file is one of `--decoded-cache`, on tmpfs too.
//! Each figure is the best of several rounds, in which the lines take turns, because on a shared machine everything may be
//! half as fast a minute later. `x decoder` compares with all cores decoding into memory and doing nothing else. `CPU` counts
//! daemon, reader and system together, and says more than the speed where cores are few or others use them too.

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
const MODEL: &str = "model.safetensors";

fn main() {
    // `cargo bench` says that it is a benchmark.
    let options: Vec<String> = std::env::args().skip(1).filter(|argument| argument != "--bench").collect();
    let scratch = tempfile::Builder::new().prefix("read_path-").tempdir_in("/dev/shm").expect("a tmpfs at /dev/shm");
    let path = |name: &str| scratch.path().join(name);
    for directory in ["small", "large", "mnt"] {
        fs::create_dir(path(directory)).expect("a directory");
    }
    fs::write(path("small").join(MODEL), checkpoint(1)).expect("room for the checkpoint");
    fs::write(path("large").join(MODEL), checkpoint(TENSORS)).expect("room for the checkpoint");

    let lossless = PackOptions::default();
    let lossy = PackOptions {
        quantization: Quantization::Scalar,
        target: Target::BitsPerParameter(4.2),
        ..PackOptions::default()
    };
    println!("{:<28} {:>8} {:>8} {:>10} {:>10}", "", "GB/s", "x tmpfs", "x decoder", "CPU s/GB");
    for (name, options_of_pack) in [("lossless", lossless), ("4.2 bits", lossy)] {
        let source = path(name);
        for size in ["small", "large"] {
            fs::create_dir_all(source.join(size)).expect("a directory");
            pack(&path(size), &source.join(size), &options_of_pack);
        }
        let decoder = decoder_rate(&source.join("large/model.mcwc"));
        println!("{:<28} {decoder:>8.2}", format!("{name}, decoder alone"));
        measure(name, &source, &path("mnt"), &path("large").join(MODEL), decoder, &options);
        for size in ["small", "large"] {
            let milliseconds = (0..ROUNDS).map(|_| {
                let mount = Mount::new(&source, &path("mnt"), &options);
                milliseconds_to_keys(&mount.path.join(size).join(MODEL))
            });
            let best = milliseconds.fold(f64::INFINITY, f64::min);
            let bytes = fs::metadata(path(size).join(MODEL)).expect("a checkpoint").len();
            println!("{:<28} {best:>8.2} ms to the names of all tensors", format!("{name}, {} MB", bytes / 1_000_000));
        }
    }
}

/// Prints the lines of one archive.
fn measure(name: &str, source: &Path, mountpoint: &Path, plain: &Path, decoder: f64, options: &[String]) {
    let mut best = [const { Sample::SLOWEST }; 8];
    let kept = mountpoint.with_file_name(format!("{name}, kept"));
    let keeping = [&[format!("--decoded-cache={}", kept.display())], options].concat();
    keep_decoded(source, mountpoint, &kept, &keeping);
    for _ in 0..ROUNDS {
        let mut keep = |line: usize, sample: Sample| {
            if sample.rate > best[line].rate {
                best[line] = sample;
            }
        };
        for (way, read) in [read_all as fn(&Path), copy_map as fn(&Path)].into_iter().enumerate() {
            keep(4 * way, Sample::of(plain, None, read));
            let file = mountpoint.join("large").join(MODEL);
            let mount = Mount::new(source, mountpoint, options);
            keep(4 * way + 1, Sample::of(&file, Some(mount.workers()), read));
            keep(4 * way + 2, Sample::of(&file, Some(mount.workers()), read));
            drop(mount);
            let mount = Mount::new(source, mountpoint, &keeping);
            keep(4 * way + 3, Sample::of(&file, Some(mount.workers()), read));
        }
    }
    let [read, cold_read, warm_read, kept_read, map, cold_map, warm_map, kept_map] = best;
    for (line, sample, plain) in [
        ("read from tmpfs", &read, &read),
        ("cold read", &cold_read, &read),
        ("warm read", &warm_read, &read),
        ("read of the kept file", &kept_read, &read),
        ("map copied from tmpfs", &map, &map),
        ("cold map copied", &cold_map, &map),
        ("warm map copied", &warm_map, &map),
        ("map of the kept file", &kept_map, &map),
    ] {
        let Sample { rate, cpu } = *sample;
        let line = format!("{name}, {line}");
        println!("{line:<28} {rate:>8.2} {:>8.2} {:>10.2} {cpu:>10.2}", rate / plain.rate, rate / decoder);
    }
}

/// Loads the large checkpoint once with a directory for decoded files, and waits until it is kept there.
fn keep_decoded(source: &Path, mountpoint: &Path, kept: &Path, options: &[String]) {
    let mount = Mount::new(source, mountpoint, options);
    read_all(&mount.path.join("large").join(MODEL));
    let is_seen = |entry: std::io::Result<fs::DirEntry>| {
        entry.is_ok_and(|entry| entry.path().extension().is_some_and(|extension| extension == "seen"))
    };
    while !fs::read_dir(kept).is_ok_and(|mut entries| entries.any(is_seen)) {
        thread::sleep(std::time::Duration::from_millis(100));
    }
}

/// How fast a file was read, and at what cost.
struct Sample {
    /// In 10^9 bytes per second.
    rate: f64,
    /// Seconds of all processors for 10^9 bytes.
    cpu: f64,
}

impl Sample {
    const SLOWEST: Self = Self { rate: 0.0, cpu: f64::INFINITY };

    fn of(file: &Path, workers: Option<Vec<u32>>, read: fn(&Path)) -> Self {
        let gigabytes = fs::metadata(file).expect("a file").len() as f64 / 1e9;
        let others = workers.unwrap_or_default();
        let cpu = || others.iter().copied().map(process_seconds).sum::<f64>() + process_seconds(std::process::id());
        let (start, cpu_at_start) = (Instant::now(), cpu());
        read(file);
        let seconds = start.elapsed().as_secs_f64();
        Self { rate: gigabytes / seconds, cpu: (cpu() - cpu_at_start) / gigabytes }
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

/// Decodes everything on all cores and keeps nothing; 10^9 bytes per second, the best of several times.
fn decoder_rate(archive: &Path) -> f64 {
    let archive = Arc::new(Archive::open(archive).expect("the archive"));
    let materializer = Materializer::new(MaterializeOptions { cache_bytes: 0, ..MaterializeOptions::default() });
    let file_bytes = archive.files()[0].length_bytes;
    let seconds = (0..ROUNDS).map(|_| {
        let next = AtomicU64::new(0);
        let start = Instant::now();
        thread::scope(|scope| {
            for _ in 0..thread::available_parallelism().map_or(1, usize::from) {
                scope.spawn(|| {
                    let mut out = vec![0; 4 * PIECE_BYTES];
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
        start.elapsed().as_secs_f64()
    });
    file_bytes as f64 / seconds.fold(f64::INFINITY, f64::min) / 1e9
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
fn checkpoint(tensors: usize) -> Vec<u8> {
    let mut random = fastrand::Rng::with_seed(7);
    let length = 2 * ROWS * COLUMNS;
    let entries: Vec<String> = (0..tensors)
        .map(|tensor| {
            let offsets = format!("[{},{}]", tensor * length, (tensor + 1) * length);
            format!(r#""weight.{tensor}":{{"dtype":"BF16","shape":[{ROWS},{COLUMNS}],"data_offsets":{offsets}}}"#)
        })
        .collect();
    let header = format!("{{{}}}", entries.join(","));
    let mut data = Vec::with_capacity(length);
    for _ in 0..ROWS {
        let scale = 0.02 * (0.3 * normal(&mut random)).exp();
        data.extend((0..COLUMNS).flat_map(|_| bf16_from_f32(scale * normal(&mut random)).to_le_bytes()));
    }
    [(header.len() as u64).to_le_bytes().as_slice(), header.as_bytes(), &data.repeat(tensors)].concat()
}

fn normal(random: &mut fastrand::Rng) -> f32 {
    let (a, b) = (1.0 - random.f32(), random.f32());
    (-2.0 * a.ln()).sqrt() * (std::f32::consts::TAU * b).cos()
}
