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
use common::{Bert, Random, Tensor, assert_same_directories, mcwcfs, mcwcfs_ok, safetensors};
use mcwcfs::materialize::{EngineChoice, Keeper, MaterializeOptions, Materializer};

/// Runs `mcwcfs`, which must fail with one line, and gives that.
fn mcwcfs_fails(arguments: &[OsString]) -> String {
    let output = mcwcfs(arguments);
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
        // Not beside what other tests have packed: bases are looked for in the directories next to a variant's.
        let scratch = tempfile::tempdir().expect("a directory");
        let directory = scratch.path().join("zoo/packed");
        fs::create_dir_all(&directory).expect("a directory");
        let recipe = &VARIANTS[0];
        let variant = recipe.pack(&directory);
        let base = directory.join(format!("{}.mcwc", recipe.base.name));
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
    let next = packed.scratch.path().join("zoo/elsewhere");
    fs::create_dir(&next).expect("a directory");
    fs::rename(&packed.base, next.join("any name.mcwc")).expect("a move");
    let moved = packed;
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
        let message = mcwcfs_fails(&command);
        assert!(
            message.contains("needs the base base-of-variant.mcwc") && message.contains("--base-path"),
            "{message}"
        );
    }
    assert!(!out.exists());
}

#[test]
fn a_base_that_was_missing_is_found_when_it_is_looked_for_again() {
    let packed = Packed::new();
    let bases = mcwcfs::archive::Bases::new(vec![mcwcfs::archive::Place::tree(packed.scratch.path())]);
    let aside = packed.scratch.path().join("aside");
    fs::rename(&packed.base, &aside).expect("a move");
    assert!(bases.open(&packed.variant).is_err());
    fs::rename(&aside, &packed.base).expect("a move");
    bases.look_again();
    assert!(bases.open(&packed.variant).is_ok());
}

#[test]
fn a_base_with_other_content_is_not_taken_for_it() {
    let packed = Packed::new();
    // The variant's own weights, packed alone under the name of the base.
    let original = packed.scratch.path().join("original.safetensors");
    fs::write(&original, &packed.original).expect("a file");
    mcwcfs_ok(arguments!["pack", "--force", &original, &packed.base].to_vec());
    let message = mcwcfs_fails(&arguments!["verify", &packed.variant]);
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
    let again = packed.scratch.path().join("zoo/packed/again.mcwc");
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
    let message = mcwcfs_fails(&arguments!["pack", "--base", &packed.variant, &original, &out]);
    assert!(message.contains("expected one that stands alone"), "{message}");
}

#[test]
fn a_variant_equal_to_its_base_stores_nothing_of_its_tensors() {
    let packed = Packed::new();
    let checkpoint = packed.scratch.path().join("base.safetensors");
    fs::write(&checkpoint, VARIANTS[0].base.checkpoint()).expect("a file");
    let twin = packed.scratch.path().join("zoo/packed/twin.mcwc");
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
    let second = packed.scratch.path().join("zoo/packed/second.mcwc");
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

/// Weights near to those of the base: what training with a small step leaves.
fn tuned(base: &Bert) -> Vec<Tensor> {
    let mut random = Random::new(77);
    let mut tensors = base.tensors();
    for tensor in &mut tensors {
        for bytes in tensor.data.as_chunks_mut::<4>().0 {
            let value = f32::from_le_bytes(*bytes);
            *bytes = (value + 0.02 * value.abs().max(1e-3) * random.normal()).to_le_bytes();
        }
    }
    tensors
}

#[test]
fn a_lossy_variant_of_a_lossy_base_spends_its_bits_on_what_changed() {
    let scratch = tempfile::tempdir().expect("a directory");
    let path = |name: &str| scratch.path().join(name);
    let base = Bert { layers: 2, hidden: 64, ffn_units: 128, dtype: "F32", seed: 8, ..Bert::default() };
    fs::write(path("base.safetensors"), safetensors(&base.tensors())).expect("a file");
    let variant = safetensors(&tuned(&base));
    fs::write(path("variant.safetensors"), &variant).expect("a file");
    let pack = |options: &[OsString]| -> serde_json::Value {
        let arguments =
            arguments!["pack", "--json", "--force", "--effort", "fast"].into_iter().chain(options.iter().cloned());
        serde_json::from_str(&mcwcfs_ok(arguments)).expect("JSON")
    };
    pack(&arguments!["--bpp", "8", path("base.safetensors"), path("base.mcwc")]);
    let alone = pack(&arguments!["--bpp", "4", path("variant.safetensors"), path("alone.mcwc")]);
    let rate = ["--bpp", "4", "--base"].map(OsString::from);
    let files = arguments![path("base.mcwc"), path("variant.safetensors"), path("variant.mcwc")];
    let based = pack(&[&rate[..], &files[..]].concat());
    let error = |report: &serde_json::Value, name: &str| report[name].as_f64().expect("a number");
    let name = "relative_squared_error";
    assert!(error(&based, name) < 0.1 * error(&alone, name), "{based} {alone}");
    let of_changes = error(&based, "relative_squared_error_of_changes");
    assert!(of_changes > error(&based, name) && of_changes < 0.1, "{of_changes}");
    // Every engine gives the bytes that were compared, and they are not the variant's own.
    let decoded = decode(&path("variant.mcwc"), EngineChoice::Reference);
    assert!(decoded[0].1 != variant);
    for engine in EngineChoice::value_variants() {
        assert!(decode(&path("variant.mcwc"), *engine) == decoded, "{engine:?}");
    }
    let inspected = mcwcfs_ok(arguments!["inspect", "--json", "--parts", path("variant.mcwc")]);
    assert!(inspected.contains("\"from the base"), "{inspected}");
}

/// A matrix, and the same with a product of two thin ones added, as a merged LoRA leaves it.
fn merged() -> [Vec<Tensor>; 2] {
    let (rows, columns, rank) = (160, 192, 4);
    let mut random = Random::new(78);
    let base = random.normals(rows * columns, 0.02);
    let (left, right) = (random.normals(rows * rank, 1.0), random.normals(rank * columns, 2e-4));
    let rounded = |value: f32| half::bf16::from_f32(value).to_f32();
    let sum = |(element, &value): (usize, &f32)| {
        let (row, column) = (element / columns, element % columns);
        rounded(value) + (0..rank).map(|k| left[row * rank + k] * right[k * columns + column]).sum::<f32>()
    };
    let sums: Vec<f32> = base.iter().enumerate().map(sum).collect();
    [base, sums].map(|values| vec![Tensor::floats("weight", "BF16", &[rows, columns], &values)])
}

#[test]
fn a_merged_product_is_found_and_decodes_to_the_variant_s_bytes_on_every_engine() {
    let scratch = tempfile::tempdir().expect("a directory");
    let path = |name: &str| scratch.path().join(name);
    let [base, variant] = merged().map(|tensors| safetensors(&tensors));
    fs::write(path("base.safetensors"), base).expect("a file");
    fs::write(path("variant.safetensors"), &variant).expect("a file");
    mcwcfs_ok(arguments!["pack", path("base.safetensors"), path("base.mcwc")]);
    mcwcfs_ok(arguments!["pack", "--base", path("base.mcwc"), path("variant.safetensors"), path("variant.mcwc")]);
    let inspected = mcwcfs_ok(arguments!["inspect", "--json", "--parts", path("variant.mcwc")]);
    assert!(inspected.contains("\"low rank"), "{inspected}");
    for engine in EngineChoice::value_variants() {
        assert!(decode(&path("variant.mcwc"), *engine)[0].1 == variant, "{engine:?}");
    }
}

#[test]
fn a_merged_product_is_never_longer_with_losses_than_without() {
    let scratch = tempfile::tempdir().expect("a directory");
    let path = |name: &str| scratch.path().join(name);
    for (name, tensors) in ["base", "variant"].iter().zip(merged()) {
        fs::write(path(&format!("{name}.safetensors")), safetensors(&tensors)).expect("a file");
    }
    mcwcfs_ok(arguments!["pack", path("base.safetensors"), path("base.mcwc")]);
    let pack = |options: &[&str]| -> serde_json::Value {
        let arguments =
            arguments!["pack", "--json", "--force", "--effort", "fast", "--base", path("base.mcwc")].into_iter();
        let files = arguments![path("variant.safetensors"), path("variant.mcwc")];
        let said = mcwcfs_ok(arguments.chain(options.iter().map(OsString::from)).chain(files));
        serde_json::from_str(&said).expect("JSON")
    };
    let bytes = |report: &serde_json::Value| report["archive_bytes"].as_u64().expect("a number");
    let lossless = pack(&[]);
    let hardly_more = lossless["bits_per_parameter"].as_f64().expect("a number") + 0.06;
    for target in [["--bpp", "8"], ["--max-rel-mse", "1e-9"], ["--bpp", &format!("{hardly_more:.3}")]] {
        let lossy = bytes(&pack(&target));
        // More options have a value, and all of them are written down.
        assert!(lossy <= bytes(&lossless) + 200, "{target:?}: {lossy} bytes, {} without losses", bytes(&lossless));
    }
}

#[test]
fn a_zoo_is_packed_against_the_bases_that_were_found_and_not_packed_twice() {
    let scratch = tempfile::tempdir().expect("a directory");
    let path = |name: &str| scratch.path().join(name);
    let bert = |seed| Bert { layers: 1, hidden: 64, ffn_units: 128, dtype: "F32", seed, ..Bert::default() };
    bert(1).write(&path("zoo/family/base"));
    bert(2).write(&path("zoo/stranger"));
    for number in 0..2 {
        let directory = path(&format!("zoo/family/tuned-{number}"));
        bert(1).write(&directory);
        let mut tensors = tuned(&bert(1));
        tensors[number].data[0] ^= 1;
        fs::write(directory.join("model.safetensors"), safetensors(&tensors)).expect("a file");
    }
    let zoo = |options: &[&str]| -> Vec<serde_json::Value> {
        let arguments = arguments!["zoo", "--json", path("zoo"), path("packed")].into_iter();
        let said = mcwcfs_ok(arguments.chain(options.iter().map(OsString::from)));
        serde_json::from_str(&said).expect("JSON")
    };
    let plan = zoo(&["--dry-run"]);
    assert!(!path("packed").exists());
    let variants = plan.iter().filter(|entry| !entry["base"].is_null()).count();
    assert_eq!((plan.len(), variants), (4, 2), "{plan:?}");
    let packed = zoo(&[]);
    let bits = |entry: &serde_json::Value| entry["packed"]["bits_per_parameter"].as_f64().expect("a number");
    let (variants, alone): (Vec<_>, Vec<_>) = packed.iter().partition(|entry| !entry["base"].is_null());
    assert!(variants.iter().all(|variant| alone.iter().all(|alone| bits(variant) < 0.9 * bits(alone))), "{packed:?}");
    let with_profile = |entry: &&&serde_json::Value| {
        let archive = path("packed").join(entry["packed"]["archive"].as_str().expect("a path"));
        mcwcfs_ok(arguments!["inspect", archive]).contains("--profile")
    };
    assert_eq!(variants.iter().filter(with_profile).count(), 1, "the second is packed as the first was");
    let manifest = fs::read_to_string(path("packed/zoo.json")).expect("the manifest");
    assert_eq!(serde_json::from_str::<Vec<serde_json::Value>>(&manifest).expect("JSON"), packed);
    let modified = || -> Vec<_> {
        let archives =
            packed.iter().map(|entry| path("packed").join(entry["packed"]["archive"].as_str().expect("a path")));
        archives
            .map(|archive| fs::metadata(archive).and_then(|metadata| metadata.modified()).expect("a time"))
            .collect()
    };
    let before = modified();
    assert_eq!(zoo(&[]), packed);
    assert_eq!(modified(), before, "nothing was packed again");
    let (config, weights) = (path("zoo/stranger/config.json"), path("zoo/stranger/model.safetensors"));
    fs::write(&config, [fs::read(&config).expect("a file"), b"\n".to_vec()].concat()).expect("a file");
    zoo(&[]);
    assert_eq!(modified(), before, "a sidecar is copied, and nothing packed for it");
    // Other weights, and a time that says they are old.
    let mut other = fs::read(&weights).expect("a file");
    *other.last_mut().expect("weights") ^= 1;
    fs::write(&weights, other).expect("a file");
    let file = fs::File::options().append(true).open(&weights).expect("a file");
    file.set_modified(std::time::SystemTime::UNIX_EPOCH).expect("a time");
    zoo(&[]);
    assert_eq!(modified().iter().zip(&before).filter(|(now, before)| now != before).count(), 1, "one was packed again");
    mcwcfs_ok(arguments!["unpack", path("packed"), path("unpacked")]);
    fs::remove_file(path("unpacked/zoo.json")).expect("the manifest is a sidecar");
    assert_same_directories(&path("zoo"), &path("unpacked"));
}

#[test]
fn a_twin_of_the_base_is_not_taken_for_the_base_and_a_pipe_is_not_opened() {
    let packed = Packed::new();
    let checkpoint = packed.scratch.path().join("base.safetensors");
    fs::write(&checkpoint, VARIANTS[0].base.checkpoint()).expect("a file");
    let directory = packed.base.parent().expect("a directory");
    // Found before the base by name, and of the same content: neither a base for itself nor for the other variant.
    let twin = directory.join("a-twin.mcwc");
    mcwcfs_ok(arguments!["pack", "--base", &packed.base, &checkpoint, &twin].to_vec());
    let pipe = std::process::Command::new("mkfifo").arg(directory.join("a-pipe.mcwc")).status();
    assert!(pipe.expect("mkfifo starts").success());
    let out = packed.scratch.path().join("twin.safetensors");
    mcwcfs_ok(arguments!["unpack", &twin, &out].to_vec());
    assert!(fs::read(out).expect("the file") == VARIANTS[0].base.checkpoint());
    assert!(packed.unpack(&[]) == packed.original);
    fs::remove_file(&packed.base).expect("the base");
    assert!(mcwcfs_fails(&arguments!["verify", &twin]).contains("needs the base"));
}

#[test]
fn a_variant_does_not_take_the_place_of_its_base_and_names_none_that_it_does_not_need() {
    let packed = Packed::new();
    let checkpoint = packed.scratch.path().join("other.safetensors");
    fs::write(&checkpoint, &packed.original).expect("a file");
    let said = mcwcfs_fails(&arguments!["pack", "--force", "--base", &packed.base, &checkpoint, &packed.base]);
    assert!(said.contains("is the base"), "{said}");
    assert!(packed.unpack(&[]) == packed.original);
    let unlike = Tensor::floats("unlike", "F32", &[40, 40], &Random::new(3).normals(1600, 1.0));
    fs::write(&checkpoint, safetensors(&[unlike])).expect("a file");
    let alone = packed.scratch.path().join("alone.mcwc");
    mcwcfs_ok(arguments!["pack", "--base", &packed.base, &checkpoint, &alone].to_vec());
    mcwcfs_ok(arguments!["verify", &alone].to_vec());
}
