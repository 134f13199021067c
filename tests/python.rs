//! What Python readers, as they come from PyPI, see in a mount; that permutations leave a model's function alone; and that
//! a decoder written from `SPEC.md` alone decodes archives to the bytes that this program does.
//!
//! The checks themselves are in `tests/python`. They run in the virtual environment that `tests/setup` makes, and on the
//! real checkpoint that it fetches; without them these tests fail, for a test that is skipped proves nothing.

mod common;

use std::ffi::OsStr;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use mcwcfs::pack::calibration::{Calibration, CalibrationSource};
use mcwcfs::pack::source::Checkpoint;

use common::archives::{RECIPES, Recipe, VARIANTS};
use common::random_archives::{write_random_archive, write_random_variant};
use common::{Bert, Mount, Random, Tensor, assert_same_directories, mcwcfs_ok};

fn repository() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn python_command(script: &str, arguments: &[&OsStr]) -> Command {
    let python = repository().join(".venv/bin/python");
    assert!(python.exists(), "{} is missing: run tests/setup first", python.display());
    let mut command = Command::new(python);
    command.arg(repository().join("tests/python").join(script)).args(arguments);
    command.env("PYTHONDONTWRITEBYTECODE", "1").env("HF_HUB_OFFLINE", "1");
    command
}

/// Runs a script of `tests/python`, which must succeed, and gives what it said.
fn python(script: &str, arguments: &[&OsStr]) -> String {
    let output = python_command(script, arguments).output().expect("Python starts");
    let (said, errors) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{script}: {}\n{said}\n{errors}", output.status);
    said.into_owned()
}

/// The real checkpoint, in the user's cache directory.
fn all_minilm() -> PathBuf {
    let cache = std::env::var_os("XDG_CACHE_HOME").map(PathBuf::from);
    let cache = cache.or_else(|| std::env::home_dir().map(|home| home.join(".cache"))).expect("a home directory");
    let checkpoint = cache.join("mcwcfs/all-MiniLM-L6-v2");
    assert!(checkpoint.exists(), "{} is missing: run tests/setup first", checkpoint.display());
    checkpoint
}

/// Packs, mounts, and has every reader compare the mount with `checkpoint`; for a lossy archive with what `unpack` wrote.
fn assert_readers_agree(checkpoint: &Path, options: &[&str]) {
    let work = tempfile::tempdir().expect("a directory");
    let (packed, unpacked) = (work.path().join("packed"), work.path().join("unpacked"));
    let mut pack = arguments!["pack", checkpoint, &packed].to_vec();
    pack.extend(options.iter().map(Into::into));
    mcwcfs_ok(pack);
    let expected = if options.is_empty() {
        checkpoint
    } else {
        mcwcfs_ok(arguments!["unpack", &packed, &unpacked]);
        &unpacked
    };
    let mount = Mount::new(&packed, &[]);
    let said = python("readers.py", &[expected.as_os_str(), mount.path.as_os_str()]);
    for check in ["listing", "slices", "mmap", "pread", "threads", "transformers", "mlx", "gguf", "digests"] {
        assert!(said.contains(&format!("{check}: ")), "{check} did not run:\n{said}");
    }
}

#[test]
fn readers_see_a_real_lossless_checkpoint_as_it_was() {
    assert_readers_agree(&all_minilm(), &[]);
}

#[test]
fn readers_see_a_real_lossy_checkpoint_as_it_unpacks() {
    assert_readers_agree(&all_minilm(), &["--bpp", "4.2"]);
}

#[test]
fn ten_killed_workers_during_loads_by_transformers_are_not_noticed() {
    let (checkpoint, work) = (all_minilm(), tempfile::tempdir().expect("a directory"));
    mcwcfs_ok(arguments!["pack", &checkpoint, work.path().join("packed")]);
    let mount = Mount::new(&work.path().join("packed"), &["--cache-size", "0"]);
    let mut command = python_command("cold_loads.py", &[checkpoint.as_os_str(), mount.path.as_os_str()]);
    let mut reader = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().expect("Python starts");
    let mut said = BufReader::new(reader.stdout.take().expect("it was piped")).lines();
    assert_eq!(said.next().expect("a line").expect("text"), "ready");
    let (mut random, mut killed) = (Random::new(5), Vec::new());
    while killed.len() < 10 {
        std::thread::sleep(Duration::from_millis(random.below(300) as u64));
        // Answers only once there is a worker.
        let worker = mcwcfs::daemon::status(&mount.path).expect("a status").worker_pid;
        if killed.contains(&worker) {
            continue; // it answered and was gone
        }
        let status = Command::new("kill").args(["-KILL", &worker.to_string()]).status().expect("kill starts");
        assert!(status.success());
        killed.push(worker);
    }
    drop(reader.stdin.take()); // enough
    let last = said.next().expect("a line").expect("text");
    assert!(reader.wait().expect("Python ends").success() && last.ends_with(" loads"), "{last}");
    let restarts = &mcwcfs::daemon::status(&mount.path).expect("a status").metrics["mcwcfs_worker_restarts"];
    assert_eq!(restarts, killed.len());
}

/// How many small checkpoints `checkpoints.py` makes: each row of the paper's Table 17, and variants of their names.
const FAMILIES: usize = 23;

#[test]
fn readers_see_checkpoints_of_every_architecture_as_they_were() {
    let made = tempfile::tempdir().expect("a directory");
    python("checkpoints.py", &[made.path().as_os_str()]);
    let work = tempfile::tempdir().expect("a directory");
    for family in std::fs::read_dir(made.path()).expect("checkpoints") {
        let name = family.expect("a directory entry").file_name();
        mcwcfs_ok(arguments!["pack", made.path().join(&name), work.path().join(&name)]);
    }
    let mount = Mount::new(work.path(), &[]);
    let mut directories: Vec<PathBuf> = Vec::new();
    for family in std::fs::read_dir(&mount.path).expect("the mount") {
        let name = family.expect("a directory entry").file_name();
        directories.extend([made.path().join(&name), mount.path.join(&name)]);
    }
    assert_eq!(directories.len(), 2 * FAMILIES);
    python("readers.py", &directories.iter().map(|path| path.as_os_str()).collect::<Vec<_>>());
}

#[test]
fn lossy_checkpoints_of_every_architecture_are_within_the_error_asked_for() {
    let made = tempfile::tempdir().expect("a directory");
    python("checkpoints.py", &[made.path().as_os_str()]);
    let work = tempfile::tempdir().expect("a directory");
    let mut families = 0;
    for family in std::fs::read_dir(made.path()).expect("checkpoints") {
        let name = family.expect("a directory entry").file_name();
        let (checkpoint, packed) = (made.path().join(&name), work.path().join(&name));
        mcwcfs_ok(arguments!["pack", &checkpoint, &packed, "--max-rel-mse", "1e-3", "--effort", "fast"]);
        mcwcfs_ok(arguments!["verify", &packed, "--against", &checkpoint, "--max-rel-mse", "1e-3"]);
        let bytes = |directory: &Path, suffix: &str| -> u64 {
            let files = std::fs::read_dir(directory).expect("a directory").map(|entry| entry.expect("an entry").path());
            let files = files.filter(|path| path.to_string_lossy().ends_with(suffix));
            files.map(|path| path.metadata().expect("a file").len()).sum()
        };
        let (before, after) = (bytes(&checkpoint, ".safetensors"), bytes(&packed, ".mcwc"));
        assert!(2 * after < before, "{}: {after} bytes of {before}", name.display());
        families += 1;
    }
    assert_eq!(families, FAMILIES);
}

#[test]
fn the_chosen_permutations_preserve_the_function_of_every_architecture() {
    let work = tempfile::tempdir().expect("a directory");
    let program = OsStr::new(env!("CARGO_BIN_EXE_mcwcfs"));
    let said = python("function_preserved.py", &[program, work.path().as_os_str()]);
    assert_eq!(said.lines().filter(|line| line.contains(" tensors moved, output within ")).count(), FAMILIES, "{said}");
}

/// Normal numbers in an F32 tensor, every one of which `dtype` holds exactly.
fn widened(name: &str, dtype: &str, shape: &[usize], random: &mut Random) -> Tensor {
    let values = random.normals(shape.iter().product(), 0.02);
    let rounded = values.iter().map(|&value| match dtype {
        "BF16" => half::bf16::from_f32(value).to_f32(),
        _ => half::f16::from_f32(value).to_f32(),
    });
    Tensor::floats(name, "F32", shape, &rounded.collect::<Vec<_>>())
}

/// A BERT large enough that some of its tensors are quantized, with layers that resemble one another.
fn resembling(dtype: &'static str, seed: u64) -> Vec<Tensor> {
    let bert = Bert { layers: 3, hidden: 64, heads: 4, ffn_units: 128, drift: 0.1, dtype, seed };
    bert.tensors()
}

/// Archives beside `RECIPES`, and what the decoder must say that it met in them: what the format can do and writers do.
const SPECIFIED: &[(Recipe, &[&str])] = &[
    (
        Recipe { name: "lossless-f32", must_contain: &[], options: &["--lossless"], tensors: || resembling("F32", 21) },
        &["split", "carrier 0"],
    ),
    (
        Recipe { name: "lossless-f16", must_contain: &[], options: &["--lossless"], tensors: || resembling("F16", 22) },
        &["split", "carrier 0"],
    ),
    (
        Recipe {
            name: "lossless-f32-of-narrower-values",
            must_contain: &[],
            options: &["--lossless"],
            tensors: || {
                let mut random = Random::new(23);
                vec![
                    widened("from bfloat16", "BF16", &[90, 70], &mut random),
                    widened("from binary16", "F16", &[90, 70], &mut random),
                ]
            },
        },
        &["carrier 1", "carrier 2"],
    ),
    (
        Recipe {
            name: "lossy-trellis",
            must_contain: &[],
            options: &["--bpp", "4.2"],
            tensors: || resembling("BF16", 24),
        },
        &["quantized", "trellis", "predicted", "moved", "permutation coding"],
    ),
    (
        Recipe {
            name: "lossy-scalar",
            must_contain: &[],
            options: &["--bpp", "4.2", "--quantization", "scalar"],
            tensors: || resembling("F16", 25),
        },
        &["quantized", "points", "predicted", "moved", "permutation coding"],
    ),
    (
        Recipe {
            name: "lossy-affine",
            must_contain: &[],
            options: &["--bpp", "4.2", "--predictor", "row-affine"],
            tensors: || resembling("F32", 26),
        },
        &["predicted", "row affine"],
    ),
    (
        Recipe {
            name: "lossy-steps-per-run",
            must_contain: &[],
            options: &["--bpp", "4.2", "--steps", "per-run"],
            tensors: || resembling("BF16", 27),
        },
        &["quantized", "scales"],
    ),
    (
        Recipe {
            name: "lossy-fine-scalar",
            must_contain: &[],
            options: &["--bpp", "8", "--quantization", "scalar"],
            tensors: || resembling("F32", 28),
        },
        &["quantized", "raw bits"],
    ),
    (
        Recipe {
            name: "lossy-fine-trellis",
            must_contain: &[],
            options: &["--bpp", "8"],
            tensors: || resembling("F32", 29),
        },
        &["quantized", "trellis", "raw bits"],
    ),
];

/// Has the decoder of `tests/python` decode an archive, and compares with what `unpack` writes. Gives what it met.
fn decode_by_specification(archive: &Path) -> String {
    let work = tempfile::tempdir().expect("a directory");
    let (decoded, unpacked) = (work.path().join("decoded"), work.path().join("unpacked"));
    std::fs::create_dir(&decoded).expect("a directory");
    // Beside an archive lie its bases, among others.
    let beside = std::fs::read_dir(archive.parent().expect("a directory")).expect("a directory");
    let others = beside.map(|entry| entry.expect("a directory entry").path());
    let others: Vec<PathBuf> = others.filter(|path| path.extension().is_some_and(|end| end == "mcwc")).collect();
    let is_variant = !mcwcfs::archive::Archive::open(archive).expect("an archive").index().bases.is_empty();
    let mut arguments = vec![archive.as_os_str(), decoded.as_os_str()];
    arguments.extend(others.iter().filter(|_| is_variant).map(|path| path.as_os_str()));
    let said = python("spec_decoder.py", &arguments);
    println!("{}: {said}", archive.display());
    mcwcfs_ok(arguments!["unpack", archive, &unpacked]);
    assert_same_directories(&decoded, &unpacked);
    said
}

#[test]
fn a_decoder_written_from_the_specification_decodes_to_the_same_bytes() {
    let work = tempfile::tempdir().expect("a directory");
    for recipe in RECIPES {
        decode_by_specification(&recipe.pack(work.path()));
    }
    for recipe in VARIANTS {
        let said = decode_by_specification(&recipe.pack(work.path()));
        for what in ["difference: ", "no difference: ", "exceptions: ", "other rows: "] {
            assert!(said.contains(what), "{}: met no {what}:\n{said}", recipe.variant.name);
        }
    }
    for (recipe, must_meet) in SPECIFIED {
        let said = decode_by_specification(&recipe.pack(work.path()));
        for what in *must_meet {
            assert!(
                said.contains(what),
                "{}: met no {what}, so this archive tests less than it should:\n{said}",
                recipe.name
            );
        }
    }
}

#[test]
fn a_decoder_written_from_the_specification_decodes_what_no_encoder_writes() {
    let work = tempfile::tempdir().expect("a directory");
    let mut said = String::new();
    for seed in 0..24 {
        let archive = work.path().join(format!("{seed}.mcwc"));
        write_random_archive(seed, &archive);
        said.push_str(&decode_by_specification(&archive));
        said.push_str(&decode_by_specification(&write_random_variant(seed, work.path())));
    }
    for what in [
        "carrier 0",
        "carrier 1",
        "carrier 2",
        "exceptions",
        "means",
        "column scales",
        "moved",
        "points",
        "raw",
        "raw bits",
        "row affine",
        "motion vectors",
        "network",
        "two contexts",
        "scales",
        "permutation coding 0",
        "permutation coding 1",
        "permutation coding 2",
        "trellis",
        "table pairs",
        "256 states",
        "tree digests",
        "unit differences",
        "unit values",
        "units of 4 bits",
        "units of 8 bits",
        "units of 16 bits",
        "units of 32 bits",
        "units of 64 bits",
        "vectors",
        "zero bits",
        "difference",
        "no difference",
        "low rank",
        "other rows",
        "quantized from a base",
    ] {
        assert!(said.contains(&format!("{what}: ")), "met no {what}:\n{said}");
    }
}

#[test]
fn a_decoder_written_from_the_specification_reads_every_golden_archive() {
    let golden = repository().join("tests/golden");
    let sums = std::fs::read_to_string(golden.join("SHA256SUMS")).expect("tests/golden/SHA256SUMS");
    let archives = sums.lines().map(|line| line.split_once("  ").and_then(|(_, name)| name.split_once('/')));
    for archive in archives {
        let (archive, _) = archive.expect("a digest, two spaces, an archive, a file");
        decode_by_specification(&golden.join(archive));
    }
}

#[test]
fn forward_passes_compute_what_transformers_does() {
    let made = tempfile::tempdir().expect("a directory");
    python("forward.py", &[made.path().as_os_str()]);
    let made_families =
        std::fs::read_dir(made.path()).expect("the directory").map(|entry| entry.expect("an entry").path());
    let families: Vec<PathBuf> = made_families.filter(|path| path.is_dir()).collect();
    assert!(families.len() >= 11, "{families:?}");
    for family in families.iter().map(|path| path.file_name().expect("a name").to_str().expect("UTF-8")) {
        let of = |extension: &str| made.path().join(format!("{family}.{extension}"));
        let expected: ndarray::Array2<f32> = ndarray_npy::read_npy(of("npy")).expect("an array");
        let checkpoint = Checkpoint::open(&made.path().join(family)).expect("a checkpoint");
        let inputs = CalibrationSource::File(of("safetensors"));
        let calibration = Calibration::load(&checkpoint, &inputs).unwrap_or_else(|error| panic!("{family}: {error}"));
        let found = calibration.outputs().unwrap_or_else(|error| panic!("{family}: {error}"));
        assert_eq!(found.dim(), expected.dim(), "{family}");
        let largest = expected.iter().fold(0.0, |largest: f32, value| largest.max(value.abs()));
        let farthest = found.iter().zip(&expected).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        assert!(farthest < 1e-3 * largest, "{family}: {farthest} of {largest}");
    }
}
