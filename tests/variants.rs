//! Variants and their bases: the same bytes on every engine, no base but the right one, and nothing without it.

mod common;

use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread;

use clap::ValueEnum;
use common::archives::{VARIANTS, decode, open_with_bases};
use common::random_archives::write_random_variant;
use common::{Random, mcwcfs, mcwcfs_ok};
use mcwcfs::materialize::{EngineChoice, Keeper, MaterializeOptions, Materializer};

/// Runs `mcwcfs`, which must fail with one line, and gives that.
fn mcwcfs_fails(arguments: Vec<OsString>) -> String {
    let output = mcwcfs(&arguments);
    assert!(!output.status.success(), "mcwcfs {arguments:?}");
    String::from_utf8([output.stderr, output.stdout].concat()).expect("text")
}

/// A packed variant, its base, and the variant as it was.
struct Packed {
    scratch: tempfile::TempDir,
    variant: PathBuf,
    base: PathBuf,
    original: Vec<u8>,
}

impl Packed {
    fn new() -> Self {
        let scratch = tempfile::tempdir().expect("a directory");
        let recipe = &VARIANTS[0];
        let variant = recipe.pack(scratch.path());
        let base = scratch.path().join(format!("{}.mcwc", recipe.base.name));
        Self { variant, base, original: recipe.variant.checkpoint(), scratch }
    }

    fn unpack(&self, options: &[&Path]) -> Vec<u8> {
        let out = self.scratch.path().join("unpacked.safetensors");
        let mut arguments = arguments!["unpack", "--force", &self.variant, &out].to_vec();
        for path in options {
            arguments.extend(arguments!["--base-path", path]);
        }
        mcwcfs_ok(arguments);
        fs::read(out).expect("the file")
    }
}

#[test]
fn a_variant_decodes_to_its_own_bytes_on_every_engine() {
    let packed = Packed::new();
    for engine in EngineChoice::value_variants() {
        assert!(decode(&packed.variant, *engine)[0].1 == packed.original, "{engine:?}");
    }
}

#[test]
fn every_engine_decodes_random_variants_alike() {
    let scratch = tempfile::tempdir().expect("a directory");
    for seed in 0..40 {
        let path = write_random_variant(seed, scratch.path());
        let expected = decode(&path, EngineChoice::Reference);
        for engine in EngineChoice::value_variants() {
            assert!(decode(&path, *engine) == expected, "seed {seed}: {engine:?}");
        }
    }
}

#[test]
fn a_base_is_found_beside_the_variant_in_the_directory_next_to_it_and_where_it_is_said_to_be() {
    let packed = Packed::new();
    assert!(packed.unpack(&[]) == packed.original, "in the same directory");
    let next = packed.scratch.path().join("elsewhere");
    fs::create_dir(&next).expect("a directory");
    fs::rename(&packed.base, next.join("any name.mcwc")).expect("a move");
    let own = packed.scratch.path().join("own");
    fs::create_dir(&own).expect("a directory");
    let moved = Packed { variant: own.join("variant.mcwc"), ..packed };
    fs::rename(moved.scratch.path().join("variant.mcwc"), &moved.variant).expect("a move");
    assert!(moved.unpack(&[]) == moved.original, "in the directory next to it");
    let far = tempfile::tempdir().expect("a directory");
    fs::create_dir(far.path().join("deep")).expect("a directory");
    fs::copy(next.join("any name.mcwc"), far.path().join("deep/base.mcwc")).expect("a copy");
    fs::remove_dir_all(&next).expect("a directory");
    assert!(moved.unpack(&[far.path()]) == moved.original, "below --base-path");
    assert!(moved.unpack(&[&far.path().join("deep/base.mcwc")]) == moved.original, "as a file");
}

#[test]
fn without_its_base_a_variant_is_refused_and_the_error_names_what_is_missing() {
    let packed = Packed::new();
    fs::remove_file(&packed.base).expect("the base");
    let out = packed.scratch.path().join("unpacked.safetensors");
    for command in
        [arguments!["unpack", &packed.variant, &out].to_vec(), arguments!["verify", &packed.variant].to_vec()]
    {
        let message = mcwcfs_fails(command);
        assert!(
            message.contains("needs the base base-of-variant.mcwc") && message.contains("--base-path"),
            "{message}"
        );
    }
    assert!(!out.exists());
}

#[test]
fn a_base_with_other_content_is_not_taken_for_it() {
    let packed = Packed::new();
    // The variant's own weights, packed alone under the name of the base.
    let original = packed.scratch.path().join("original.safetensors");
    fs::write(&original, &packed.original).expect("a file");
    mcwcfs_ok(arguments!["pack", "--force", &original, &packed.base].to_vec());
    let message = mcwcfs_fails(arguments!["verify", &packed.variant].to_vec());
    assert!(message.contains("needs the base"), "{message}");
}

#[test]
fn another_archive_of_the_same_weights_is_as_good_a_base() {
    let packed = Packed::new();
    let checkpoint = packed.scratch.path().join("base.safetensors");
    fs::write(&checkpoint, VARIANTS[0].base.checkpoint()).expect("a file");
    mcwcfs_ok(
        arguments!["pack", "--force", "--effort", "fast", "--keyframe-interval", "2", &checkpoint, &packed.base]
            .to_vec(),
    );
    assert!(packed.unpack(&[]) == packed.original);
}

#[test]
fn a_checkpoint_is_the_base_that_its_archive_is() {
    let packed = Packed::new();
    let checkpoint = packed.scratch.path().join("base-of-variant.mcwc.safetensors");
    fs::write(&checkpoint, VARIANTS[0].base.checkpoint()).expect("a file");
    let original = packed.scratch.path().join("original.safetensors");
    fs::write(&original, &packed.original).expect("a file");
    let again = packed.scratch.path().join("again.mcwc");
    mcwcfs_ok(arguments!["pack", "--base", &checkpoint, &original, &again].to_vec());
    let again = Packed { variant: again, ..packed };
    assert!(again.unpack(&[]) == again.original);
}

#[test]
fn a_variant_is_no_base() {
    let packed = Packed::new();
    let original = packed.scratch.path().join("original.safetensors");
    fs::write(&original, &packed.original).expect("a file");
    let out = packed.scratch.path().join("of-a-variant.mcwc");
    let message = mcwcfs_fails(arguments!["pack", "--base", &packed.variant, &original, &out].to_vec());
    assert!(message.contains("expected one that stands alone"), "{message}");
}

#[test]
fn a_variant_equal_to_its_base_stores_nothing_of_its_tensors() {
    let packed = Packed::new();
    let checkpoint = packed.scratch.path().join("base.safetensors");
    fs::write(&checkpoint, VARIANTS[0].base.checkpoint()).expect("a file");
    let twin = packed.scratch.path().join("twin.mcwc");
    mcwcfs_ok(arguments!["pack", "--base", &packed.base, &checkpoint, &twin].to_vec());
    let report = mcwcfs_ok(arguments!["inspect", "--json", "--parts", &twin].to_vec());
    let report: serde_json::Value = serde_json::from_str(&report).expect("JSON");
    let parts = report["parts"].as_array().expect("parts");
    assert!(parts.iter().all(|part| part["bytes"] == 0 && part["mode"] == "the base's"), "{parts:?}");
    assert!(decode(&twin, EngineChoice::Auto)[0].1 == VARIANTS[0].base.checkpoint());
}

#[test]
fn readers_of_a_variant_and_its_base_all_end_with_the_right_bytes_in_hardly_any_memory() {
    let scratch = tempfile::tempdir().expect("a directory");
    for seed in 100..106 {
        let path = write_random_variant(seed, scratch.path());
        let expected = decode(&path, EngineChoice::Reference).remove(0).1;
        let archive = open_with_bases(&path).expect("a sound variant");
        for (cache_bytes, working_bytes, threads) in [(0, 1, 2), (10_000, 20_000, 1), (1 << 30, u64::MAX, 2)] {
            let options = MaterializeOptions { cache_bytes, working_bytes, threads, ..Default::default() };
            let materializer = Materializer::new(options);
            thread::scope(|scope| {
                for reader in 0..8 {
                    let (archive, expected, materializer) = (&archive, &expected, &materializer);
                    scope.spawn(move || {
                        let mut random = Random::new(1000 * seed + reader);
                        for _ in 0..6 {
                            let from = random.below(expected.len());
                            let mut out = vec![0; random.below(expected.len() - from) + 1];
                            if reader == 0 {
                                let keeper = if random.below(2) == 0 { Keeper::Cache } else { Keeper::Reader };
                                materializer.decode_ahead(keeper, archive, 0, from as u64, out.len() as u64);
                            }
                            let keeper = if reader % 2 == 0 { Keeper::Cache } else { Keeper::Reader };
                            materializer.read_for(keeper, archive, 0, from as u64, &mut out).expect("sound strips");
                            assert!(out == expected[from..][..out.len()], "seed {seed}: bytes from {from}");
                        }
                    });
                }
            });
        }
    }
}

#[test]
fn variants_share_what_is_decoded_of_their_base() {
    let packed = Packed::new();
    let second = packed.scratch.path().join("second.mcwc");
    fs::copy(&packed.variant, &second).expect("a copy");
    let place = mcwcfs::archive::Place::tree(packed.scratch.path());
    let bases = mcwcfs::archive::Bases::new(vec![place]);
    let archives = [&packed.variant, &second].map(|path| bases.open(path).expect("a sound variant"));
    assert!(Arc::ptr_eq(&archives[0].bases()[0], &archives[1].bases()[0]), "one base");
    let options = MaterializeOptions { cache_bytes: 1 << 30, ..Default::default() };
    let materializer = Materializer::new(options);
    let read = |archive: &mcwcfs::archive::Archive| {
        let mut bytes = vec![0; archive.files()[0].length_bytes as usize];
        materializer.read_once(archive, 0, 0, &mut bytes).expect("sound strips");
        materializer.cache_stats().misses
    };
    let first = read(&archives[0]);
    assert!(first > 0, "the base was decoded through the cache");
    // Pieces of strips of its own are the second one's only misses.
    let own = read(&archives[0]) - first;
    assert_eq!(read(&archives[1]) - own, first, "nothing of the base is decoded again");
}
