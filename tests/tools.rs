//! `mcwc-pack`, `inspect`, `verify` and `unpack` as a user meets them: what they print, what they write, and how they fail.

mod common;

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use common::archives::RECIPES;
use common::{Bert, Random, Tensor, assert_same_directories, files_below, mcwcfs, mcwcfs_ok, safetensors};
use mcwcfs::archive::content_id;
use mcwcfs::format::index::Index;
use mcwcfs::format::preamble::Preamble;
use serde_json::Value;

/// A checkpoint directory and the directory it was packed into.
struct Packed {
    work: tempfile::TempDir,
    checkpoint: PathBuf,
    packed: PathBuf,
}

impl Packed {
    fn new(options: &[&str]) -> Self {
        let work = tempfile::tempdir().expect("a directory");
        let (checkpoint, packed) = (work.path().join("checkpoint"), work.path().join("packed"));
        Bert { hidden: 64, ffn_units: 64, ..Bert::default() }.write(&checkpoint);
        fs::create_dir(checkpoint.join("1_Pooling")).expect("a subdirectory");
        fs::write(checkpoint.join("1_Pooling/run.sh"), "#!/bin/sh\n").expect("a sidecar");
        fs::set_permissions(checkpoint.join("1_Pooling/run.sh"), fs::Permissions::from_mode(0o755)).expect("a mode");
        let mut pack = arguments!["pack", &checkpoint, &packed].to_vec();
        pack.extend(options.iter().map(Into::into));
        mcwcfs_ok(pack);
        Self { work, checkpoint, packed }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.work.path().join(name)
    }

    fn archive(&self) -> PathBuf {
        self.packed.join("model.mcwc")
    }

    /// Flips a bit in the middle of the archive, where strips are.
    fn damage(&self) {
        let mut bytes = fs::read(self.archive()).expect("the archive");
        let middle = bytes.len() / 2;
        bytes[middle] ^= 4;
        fs::write(self.archive(), bytes).expect("the archive");
    }
}

fn json(text: &str) -> Value {
    serde_json::from_str(text).unwrap_or_else(|error| panic!("{error}: {text}"))
}

/// Runs the command, which must fail with this exit code, and gives all it said.
fn fails(code: i32, arguments: &[std::ffi::OsString]) -> String {
    let output = mcwcfs(arguments);
    let said = format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert_eq!(output.status.code(), Some(code), "{arguments:?}: {said}");
    said
}

#[test]
fn the_streams_of_an_archive_add_up_to_its_length_to_the_byte() {
    for recipe in RECIPES {
        let directory = tempfile::tempdir().expect("a directory");
        let archive = recipe.pack(directory.path());
        let length = fs::metadata(&archive).expect("the archive").len();
        let report = json(&mcwcfs_ok(arguments!["inspect", "--json", "--parts", &archive]));
        let streams = report["stream_bytes"].as_object().expect("streams");
        let sum: u64 = streams.values().map(|bytes| bytes.as_u64().expect("bytes")).sum();
        assert_eq!((sum, report["stored_bytes"].as_u64()), (length, Some(length)), "{}", recipe.name);
        let rate = 8.0 * length as f64 / report["parameters"].as_f64().expect("parameters");
        let printed = report["bits_per_parameter"].as_f64().expect("a rate");
        assert!((printed / rate - 1.0).abs() < 1e-12, "{}: {printed} for {rate}", recipe.name);

        let parts = report["parts"].as_array().expect("parts");
        let tensors: u64 = report["files"][0]["tensors"].as_u64().expect("tensors");
        assert_eq!(parts.len() as u64, tensors, "{}: every tensor is one part", recipe.name);
        let coded: u64 = parts.iter().map(|part| part["bytes"].as_u64().expect("bytes")).sum();
        let of = |stream: &str| streams[stream].as_u64().expect("bytes");
        assert_eq!(coded, of("keyframe_codes") + of("residual_codes") + of("verbatim"), "{}", recipe.name);
    }
}

#[test]
fn inspect_says_for_people_what_it_says_as_json() {
    let packed = Packed::new(&["--max-rel-mse", "0.01"]);
    let text = mcwcfs_ok(arguments!["inspect", "--parts", packed.archive()]);
    let report = json(&mcwcfs_ok(arguments!["inspect", "--json", packed.archive()]));
    for field in ["stored_bytes", "decoded_bytes", "parameters"] {
        assert!(text.contains(&report[field].to_string()), "{field}: {text}");
    }
    for part in ["lossy", "encoder.layer.3.output.dense.weight", "keyframe", "entropy model", "provenance"] {
        assert!(text.contains(part), "{part}: {text}");
    }
}

#[test]
fn unpacking_with_one_thread_and_with_many_gives_the_same_bytes() {
    for options in [&["--lossless"][..], &["--max-rel-mse", "0.01"]] {
        let packed = Packed::new(options);
        let (one, many) = (packed.path("one"), packed.path("many"));
        mcwcfs_ok(arguments!["unpack", "--threads", "1", &packed.packed, &one]);
        mcwcfs_ok(arguments!["unpack", "--threads", "7", &packed.packed, &many]);
        assert_same_directories(&one, &many);
    }
}

#[test]
fn a_long_file_unpacks_to_its_bytes_on_any_number_of_threads_checked_or_not() {
    let work = tempfile::tempdir().expect("a directory");
    let [original, archive, out] = ["o.safetensors", "o.mcwc", "out.safetensors"].map(|name| work.path().join(name));
    let bytes = Random::new(5).bytes(9 << 20); // more than two of the windows that a thread decodes at a time
    fs::write(&original, safetensors(&[Tensor::raw("bytes", "U8", &[bytes.len()], bytes)])).expect("a checkpoint");
    mcwcfs_ok(arguments!["pack", &original, &archive]);
    for threads in ["1", "2", "3", "8"] {
        for (unchecked, digests) in [(&[][..], 1), (&["--skip-digests"][..], 0)] {
            let mut unpack = arguments!["unpack", "--json", "--force", "--threads", threads, &archive, &out].to_vec();
            unpack.extend(unchecked.iter().map(Into::into));
            let written = json(&mcwcfs_ok(unpack));
            assert_eq!(written.to_string().matches("blake3").count(), digests, "{written}");
            assert!(fs::read(&out).expect("the file") == fs::read(&original).expect("it"), "{threads} threads");
        }
    }

    // Damage in the last window is found whoever decodes it.
    let mut bytes = fs::read(&archive).expect("the archive");
    let late = bytes.len() - (1 << 20);
    bytes[late] ^= 1;
    fs::write(&archive, bytes).expect("the archive");
    fs::remove_file(&out).expect("it is there");
    for threads in ["1", "2", "3"] {
        let said = fails(1, &arguments!["unpack", "--skip-digests", "--threads", threads, &archive, &out]);
        assert!(said.contains("CRC-32C"), "{said}");
        assert_eq!(files_below(work.path()).len(), 2, "nothing but the original and the archive");
    }
}

#[test]
fn an_unpacked_directory_is_the_original_with_executables_and_readable_by_others() {
    let packed = Packed::new(&[]);
    let out = packed.path("new/deep/out");
    let written = json(&mcwcfs_ok(arguments!["unpack", "--json", &packed.packed, &out]));
    assert_same_directories(&packed.checkpoint, &out);
    assert_eq!(written.as_array().map(Vec::len), Some(files_below(&packed.checkpoint).len()));
    let mode = |file: &str| fs::metadata(out.join(file)).expect("a file").permissions().mode() & 0o777;
    let ordinary = packed.path("ordinary");
    fs::write(&ordinary, "").expect("a file");
    let ordinary = fs::metadata(ordinary).expect("a file").permissions().mode() & 0o777;
    assert_eq!(mode("model.safetensors"), ordinary, "as any new file");
    assert_eq!(mode("1_Pooling/run.sh") & 0o100, 0o100);
}

#[test]
fn one_archive_unpacks_into_a_directory_or_to_a_file_of_that_name() {
    let packed = Packed::new(&[]);
    let original = fs::read(packed.checkpoint.join("model.safetensors")).expect("the original");
    mcwcfs_ok(arguments!["unpack", packed.archive(), packed.path("here")]);
    assert_eq!(files_below(&packed.path("here")), [Path::new("model.safetensors")]);
    mcwcfs_ok(arguments!["unpack", packed.archive(), packed.path("other.safetensors")]);
    assert!(fs::read(packed.path("other.safetensors")).expect("the file") == original);
}

#[test]
fn a_damaged_archive_is_reported_by_verify_and_leaves_nothing_when_unpacked() {
    let packed = Packed::new(&[]);
    packed.damage();
    let said = fails(3, &arguments!["verify", &packed.packed]);
    assert!(said.contains("model.mcwc") && said.contains("CRC-32C"), "{said}");
    let report = json(&String::from_utf8_lossy(&mcwcfs(arguments!["verify", "--json", &packed.packed]).stdout));
    assert_eq!(report["sound"], Value::Bool(false));

    let out = packed.path("out");
    let said = fails(1, &arguments!["unpack", packed.archive(), &out]);
    assert!(said.contains("model.mcwc") && said.trim_end().lines().count() == 1, "{said}");
    assert!(!out.exists(), "{:?}", files_below(&out));
}

#[test]
fn a_file_with_another_digest_than_the_index_states_gets_no_name() {
    let packed = Packed::new(&[]);
    let bytes = fs::read(packed.archive()).expect("the archive");
    let preamble = Preamble::parse(&bytes[..64], bytes.len() as u64).expect("a sound preamble");
    let (records, stored) = bytes.split_at(preamble.index_offset as usize);
    let mut index = Index::parse(stored, &preamble).expect("a sound index");
    let digest = index.files[0].decoded_blake3.expect("archives have one");
    for (stated, name) in [(None, "SHA-256"), (Some(digest.map(|byte| !byte)), "BLAKE3")] {
        index.files[0].decoded_blake3 = stated;
        index.files[0].decoded_sha256[0] ^= 1; // wrong, then right again
        index.content_id = content_id(std::iter::once(index.files[0].decoded_sha256));
        let (preamble, stored) = index.write(records.len() as u64);
        let other = packed.path("other.mcwc");
        fs::write(&other, [&preamble.write(), &records[64..], &stored].concat()).expect("the archive");
        assert!(fails(3, &arguments!["verify", &other]).contains(name));
        let out = packed.path("out");
        let said = fails(1, &arguments!["unpack", &other, &out]);
        assert!(said.contains(&format!("the decoded file has {name} ")), "{said}");
        assert!(!out.exists(), "{:?}", files_below(&out));
        mcwcfs_ok(arguments!["unpack", "--skip-digests", &other, &packed.path(name)]);
    }
}

#[test]
fn verify_finds_what_differs_from_the_original() {
    let packed = Packed::new(&[]);
    let verify = arguments!["verify", &packed.packed, "--against", &packed.checkpoint];
    mcwcfs_ok(&verify);

    fs::write(packed.checkpoint.join("README.md"), "changed").expect("a sidecar");
    assert!(fails(3, &verify).contains("README.md"));
    fs::copy(packed.packed.join("README.md"), packed.checkpoint.join("README.md")).expect("a sidecar");
    fs::write(packed.checkpoint.join("forgotten.json"), "{}").expect("a file");
    assert!(fails(3, &verify).contains("forgotten.json: has no packed counterpart"));
    fs::remove_file(packed.checkpoint.join("forgotten.json")).expect("a file");
    mcwcfs_ok(&verify);

    let original = packed.checkpoint.join("model.safetensors");
    let mut bytes = fs::read(&original).expect("the original");
    *bytes.last_mut().expect("not empty") ^= 1;
    fs::write(&original, &bytes).expect("the original");
    let said = fails(3, &verify);
    assert!(said.contains("must be the file that was packed"), "{said}");
    fs::write(&original, &bytes[..bytes.len() - 1]).expect("the original");
    let said = fails(3, &verify);
    assert!(said.contains(&format!("{} bytes, expected {}", bytes.len() - 1, bytes.len())), "{said}");
}

#[test]
fn verify_holds_a_lossy_archive_to_the_error_it_is_given() {
    let packed = Packed::new(&["--max-rel-mse", "0.01"]);
    let against =
        |limit: &str| arguments!["verify", &packed.packed, "--against", &packed.checkpoint, "--max-rel-mse", limit];
    assert!(mcwcfs_ok(against("0.01")).contains("relative squared error"));
    assert!(fails(3, &against("0.0001")).contains("expected at most 1.000e-4"));
}

#[test]
fn unpack_refuses_to_mix_its_output_with_its_source_or_two_files_in_one() {
    let packed = Packed::new(&[]);
    let said = fails(1, &arguments!["unpack", &packed.packed, packed.packed.join("out")]);
    assert!(said.contains("lies inside the directory"), "{said}");
    fails(1, &arguments!["unpack", "--force", &packed.packed, &packed.packed]);
    fs::copy(packed.archive(), packed.packed.join("again.mcwc")).expect("a second archive");
    let said = fails(1, &arguments!["unpack", &packed.packed, packed.path("out")]);
    assert!(said.contains("again.mcwc") && said.contains("model.mcwc"), "{said}");
}

#[test]
fn exit_codes_tell_wrong_usage_from_failure() {
    for usage in [arguments!["inspect"].to_vec(), arguments!["unpack", "one"].to_vec(), arguments!["nonsense"].to_vec()]
    {
        fails(2, &usage);
    }
    for missing in ["inspect", "verify"] {
        let said = fails(1, &arguments![missing, "/no/such/archive.mcwc"]);
        assert!(said.contains("/no/such/archive.mcwc"), "{said}");
    }
    fails(1, &arguments!["unpack", "/no/such/archive.mcwc", "/no/such/out"]);
    let empty = tempfile::tempdir().expect("a directory");
    for command in [arguments!["verify", empty.path()].to_vec(), arguments!["unpack", empty.path(), "out"].to_vec()] {
        assert!(fails(1, &command).contains("no .mcwc file found"));
    }
    for threads in ["0", "100000"] {
        let said = fails(2, &arguments!["pack", "--threads", threads, "in", "out"]);
        assert!(said.contains("expected 1 to 1024"), "{said}");
    }
}

#[test]
fn mcwc_pack_is_the_same_as_the_subcommand() {
    let packed = Packed::new(&[]);
    let other = packed.path("other");
    let output = Command::new(env!("CARGO_BIN_EXE_mcwc-pack")).arg(&packed.checkpoint).arg(&other).output();
    assert!(output.expect("mcwc-pack starts").status.success());
    assert_same_directories(&packed.packed, &other);
}

#[test]
fn packing_that_fails_leaves_nothing_and_can_be_tried_again() {
    let packed = Packed::new(&[]);
    let out = packed.path("out");
    let said = fails(1, &arguments!["pack", "--bpp", "100", &packed.checkpoint, &out]);
    assert!(said.contains("--bpp 100"), "{said}");
    assert!(!out.exists());
    mcwcfs_ok(arguments!["pack", &packed.checkpoint, &out]);
    fails(1, &arguments!["pack", "--force", "--bpp", "100", &packed.checkpoint, &out]);
    assert_same_directories(&packed.packed, &out);
}

#[test]
fn output_inside_the_input_is_refused_however_it_is_named() {
    let packed = Packed::new(&[]);
    std::os::unix::fs::symlink(&packed.checkpoint, packed.path("link")).expect("a link");
    for out in [packed.checkpoint.clone(), packed.checkpoint.join("new/out"), packed.path("link").join("out")] {
        let said = fails(1, &arguments!["pack", &packed.checkpoint, &out]);
        assert!(said.contains("lies inside the input"), "{said}");
    }
    assert!(!packed.checkpoint.join("new").exists());
    mcwcfs_ok(arguments!["pack", &packed.checkpoint, packed.checkpoint.join("model.mcwc")]);
}

#[test]
fn paths_of_the_wrong_kind_are_named_with_what_was_expected() {
    let packed = Packed::new(&[]);
    let file = packed.checkpoint.join("model.safetensors");
    let out = packed.path("other.safetensors");
    let said = fails(1, &arguments!["pack", &file, &out]);
    assert!(said.contains("expected a .mcwc file or a directory") && !out.exists(), "{said}");
    fs::write(&out, "a file").expect("a file");
    fails(1, &arguments!["pack", &file, &out, "--force"]);
    assert_eq!(fs::read(&out).expect("the file"), b"a file");
    for command in ["inspect", "bench"] {
        let said = fails(1, &arguments![command, &packed.packed]);
        assert!(said.contains("is a directory, expected an archive"), "{said}");
    }
}

#[test]
fn what_a_killed_packing_leaves_is_part_of_nothing() {
    let packed = Packed::new(&[]);
    for directory in [&packed.checkpoint, &packed.packed] {
        fs::write(directory.join(".mcwc-pack-a1b2c3.partial"), "half an archive").expect("a file");
    }
    let (again, out) = (packed.path("again"), packed.path("out"));
    mcwcfs_ok(arguments!["pack", &packed.checkpoint, &again]);
    mcwcfs_ok(arguments!["verify", &packed.packed]);
    mcwcfs_ok(arguments!["unpack", &packed.packed, &out]);
    for directory in [&packed.checkpoint, &packed.packed] {
        fs::remove_file(directory.join(".mcwc-pack-a1b2c3.partial")).expect("a file");
    }
    assert_same_directories(&packed.packed, &again);
    assert_same_directories(&packed.checkpoint, &out);
}

#[test]
fn an_archive_is_as_private_as_the_umask_says() {
    let packed = Packed::new(&[]);
    let archive = packed.path("private.mcwc");
    let mut shell = Command::new("sh");
    shell.args(["-c", "umask 077; exec \"$0\" pack \"$1\" \"$2\"", env!("CARGO_BIN_EXE_mcwcfs")]);
    assert!(shell.arg(&packed.checkpoint).arg(&archive).status().expect("a shell").success());
    assert_eq!(fs::metadata(archive).expect("the archive").permissions().mode() & 0o777, 0o600);
}

#[test]
fn a_result_that_cannot_be_printed_is_an_error_in_one_line() {
    let packed = Packed::new(&[]);
    let pack = arguments!["pack", "--dry-run", &packed.checkpoint, packed.path("out")];
    for command in [&pack[..], &arguments!["inspect", packed.archive()], &arguments!["verify", packed.archive()]] {
        let full = fs::OpenOptions::new().write(true).open("/dev/full").expect("/dev/full");
        let output = Command::new(env!("CARGO_BIN_EXE_mcwcfs")).args(command).stdout(full).output().expect("mcwcfs");
        let said = String::from_utf8_lossy(&output.stderr);
        assert_eq!((output.status.code(), said.trim_end().lines().count()), (Some(1), 1), "{said}");
        assert!(said.contains("standard output"), "{said}");
    }
}
