//! Closed-loop quantization through the command line: nearer outputs at the same rate, the same bytes on any number of
//! threads, and one line of error where a model or its inputs cannot be run.

mod common;

use std::fs;
use std::path::{Path, PathBuf};

use common::{Bert, Random, Tensor, mcwcfs, mcwcfs_ok, safetensors};
use mcwcfs::pack::calibration::{Calibration, CalibrationSource};
use mcwcfs::pack::source::Checkpoint;
use ndarray::Array2;

const HIDDEN: usize = 64;
const POSITIONS: usize = 24;

/// A BERT that can be run, and inputs for it.
struct Work {
    directory: tempfile::TempDir,
    checkpoint: PathBuf,
}

impl Work {
    fn new() -> Self {
        let directory = tempfile::tempdir().expect("a directory");
        let checkpoint = directory.path().join("checkpoint");
        let bert = Bert { layers: 2, hidden: HIDDEN, ffn_units: 128, ..Bert::default() };
        bert.write(&checkpoint);
        let mut random = Random::new(11);
        let mut tensors = bert.tensors();
        let mut push = |name: &str, shape: &[usize], values: &[f32]| {
            tensors.push(Tensor::floats(&format!("embeddings.{name}"), "F32", shape, values));
        };
        push("position_embeddings.weight", &[POSITIONS, HIDDEN], &random.normals(POSITIONS * HIDDEN, 0.02));
        push("token_type_embeddings.weight", &[2, HIDDEN], &random.normals(2 * HIDDEN, 0.02));
        push("LayerNorm.weight", &[HIDDEN], &[1.0; HIDDEN]);
        push("LayerNorm.bias", &[HIDDEN], &[0.0; HIDDEN]);
        fs::write(checkpoint.join("model.safetensors"), safetensors(&tensors)).expect("model.safetensors");
        let work = Self { directory, checkpoint };
        work.write_ids("calibration", 1);
        work.write_ids("evaluation", 2);
        work
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// 40 sequences of the 16 tokens there are.
    fn write_ids(&self, name: &str, seed: u64) {
        let mut random = Random::new(seed);
        let ids: Vec<u8> = (0..40 * POSITIONS).flat_map(|_| (random.below(16) as u16).to_le_bytes()).collect();
        let tensor = Tensor::raw("input_ids", "U16", &[40, POSITIONS], ids);
        fs::write(self.path(&format!("{name}.safetensors")), safetensors(&[tensor])).expect("ids");
    }

    /// Packs at a rate, unpacks, and gives the unpacked checkpoint.
    fn packed(&self, name: &str, options: &[&str]) -> PathBuf {
        self.packed_at("4", name, options)
    }

    fn packed_at(&self, rate: &str, name: &str, options: &[&str]) -> PathBuf {
        let (packed, unpacked) = (self.path(&format!("{name}.packed")), self.path(name));
        let mut arguments =
            arguments!["pack", &self.checkpoint, &packed, "--bpp", rate, "--keep", "embeddings.*=lossless"].to_vec();
        arguments.extend(options.iter().map(Into::into));
        mcwcfs_ok(arguments);
        mcwcfs_ok(arguments!["unpack", &packed, &unpacked, "--base-path", self.directory.path()]);
        unpacked
    }

    /// What a checkpoint says to the inputs for evaluation.
    fn outputs(&self, checkpoint: &Path) -> Array2<f32> {
        let checkpoint = Checkpoint::open(checkpoint).expect("a checkpoint");
        let inputs = CalibrationSource::File(self.path("evaluation.safetensors"));
        Calibration::load(&checkpoint, &inputs).expect("it can be run").outputs().expect("it runs")
    }

    /// Packs, which must fail, and gives what it said.
    fn refusal(&self, options: &[&str]) -> String {
        let mut arguments = arguments!["pack", &self.checkpoint, self.path("refused"), "--bpp", "3"].to_vec();
        arguments.extend(options.iter().map(Into::into));
        let output = mcwcfs(arguments);
        assert_eq!(output.status.code(), Some(1));
        assert!(!self.path("refused").exists());
        String::from_utf8_lossy(&output.stderr).into_owned()
    }
}

#[test]
fn outputs_are_nearer_with_calibration_at_the_same_rate() {
    let work = Work::new();
    let calibration = work.path("calibration.safetensors");
    let calibration = calibration.to_str().expect("UTF-8");
    let original = work.outputs(&work.checkpoint);
    let error = |name: &str, options: &[&str]| {
        let difference = work.outputs(&work.packed(name, options)) - &original;
        difference.iter().map(|value| value * value).sum::<f32>()
    };
    let (plain, calibrated) = (error("plain", &[]), error("calibrated", &["--calibration", calibration]));
    assert!(calibrated < 0.5 * plain, "{calibrated} and {plain}");
    let alike = error("alike", &["--calibration", calibration, "--bit-allocation", "weights"]);
    assert!(calibrated < 0.97 * alike, "{calibrated} with bits where outputs need them, {alike} with one step for all");
    let sizes = ["plain", "calibrated", "alike"]
        .map(|name| fs::metadata(work.path(&format!("{name}.packed/model.mcwc"))).expect("an archive").len() as f64);
    assert!((sizes[0] / sizes[1] - 1.0).abs() < 0.01, "{sizes:?}");
}

#[test]
fn an_archive_says_what_it_was_calibrated_with_and_is_the_same_on_any_number_of_threads() {
    let work = Work::new();
    let calibration = work.path("calibration.safetensors");
    let archive = |threads: &str| {
        let path = work.path(&format!("{threads}.mcwc"));
        mcwcfs_ok(arguments![
            "pack",
            &work.checkpoint.join("model.safetensors"),
            &path,
            "--bpp",
            "3",
            "--threads",
            threads,
            "--calibration",
            &calibration
        ]);
        path
    };
    let (one, three) = (archive("1"), archive("3"));
    assert!(fs::read(&one).expect("an archive") == fs::read(three).expect("an archive"));
    let inspected = mcwcfs_ok(arguments!["inspect", &one]);
    assert!(inspected.contains("calibration: file, sha256"), "{inspected}");
}

#[test]
fn a_variant_of_a_base_is_not_calibrated_and_says_so() {
    let work = Work::new();
    let base = work.path("base.mcwc");
    mcwcfs_ok(arguments!["pack", &work.checkpoint.join("model.safetensors"), &base, "--lossless"]);
    let calibration = work.path("calibration.safetensors");
    let (base, calibration) = (base.to_str().expect("UTF-8"), calibration.to_str().expect("UTF-8"));
    let said = work.refusal(&["--base", base, "--calibration", calibration]);
    assert!(said.contains("--calibration with --base"), "{said}");
}

#[test]
fn training_gives_the_same_bytes_on_any_number_of_threads_and_from_a_state_that_was_kept() {
    let work = Work::new();
    let calibration = work.path("calibration.safetensors");
    let state = work.path("state");
    let archive = |name: &str, options: &[&str]| {
        let path = work.path(name);
        let mut arguments =
            arguments!["pack", &work.checkpoint.join("model.safetensors"), &path, "--bpp", "2.5"].to_vec();
        arguments.extend(arguments!["--calibration", &calibration, "--train", "on", "--train-steps", "6"]);
        arguments.extend(options.iter().map(Into::into));
        mcwcfs_ok(arguments);
        (fs::read(&path).expect("an archive"), path)
    };
    let state_directory = state.to_str().expect("UTF-8");
    let (one, path) = archive("one.mcwc", &["--threads", "1"]);
    assert!(mcwcfs_ok(arguments!["inspect", &path]).contains("training: distillation, 6 steps"), "provenance");
    assert!(one == archive("three.mcwc", &["--threads", "3", "--train-state", state_directory]).0);
    assert!(state.join("training-1.safetensors").exists());
    assert!(one == archive("again.mcwc", &["--train-state", state_directory]).0, "from the state");
    assert!(one != archive("other.mcwc", &["--seed", "1", "--train-state", state_directory]).0, "another seed");
}

#[test]
fn training_is_kept_only_where_held_out_inputs_say_so() {
    let work = Work::new();
    let calibration = work.path("calibration.safetensors");
    let arguments = |name: &str| {
        let path = work.path(name);
        let mut arguments =
            arguments!["pack", &work.checkpoint.join("model.safetensors"), &path, "--bpp", "2.5"].to_vec();
        arguments.extend(arguments!["--calibration", &calibration, "--train-steps", "4", "--json"]);
        (arguments, path)
    };
    let (mut auto, path) = arguments("auto.mcwc");
    auto.extend(arguments!["--train", "auto"]);
    let report: serde_json::Value = serde_json::from_str(&mcwcfs_ok(auto)).expect("JSON");
    let number = |key: &str| report["training"][key].as_f64().unwrap_or_else(|| panic!("{report}"));
    let is_kept = report["training"]["is_kept"].as_bool().expect("a verdict");
    assert_eq!(is_kept, number("held_out_distance") < number("held_out_distance_without"));
    let (mut other, expected) = arguments("expected.mcwc");
    other.extend(arguments!["--train", if is_kept { "on" } else { "off" }]);
    mcwcfs_ok(other);
    assert!(fs::read(path).expect("an archive") == fs::read(expected).expect("an archive"));
}

#[test]
fn models_and_inputs_that_cannot_be_run_are_refused_before_anything_is_written() {
    let work = Work::new();
    assert!(work.refusal(&["--calibrate"]).contains("tokenizer.json"), "text needs a tokenizer");
    assert!(work.refusal(&["--calibrate", "--quantization", "scalar"]).contains("changes nothing"));
    assert!(work.refusal(&["--train", "on"]).contains("--train on: expected --bpp, --calibration"));
    let ids = Tensor::raw("input_ids", "U16", &[2], vec![3, 0, 16, 0]);
    fs::write(work.path("beyond.safetensors"), safetensors(&[ids])).expect("ids");
    let beyond = work.path("beyond.safetensors");
    let said = work.refusal(&["--calibration", beyond.to_str().expect("UTF-8")]);
    assert!(said.contains("token 16 at position 1, expected one of 16 tokens"), "{said}");
    let weights = work.checkpoint.join("model.safetensors");
    let sound = fs::read(&weights).expect("a checkpoint");
    let calibration = work.path("calibration.safetensors");
    // The last element is the embeddings' norm's: every input after it is no number.
    fs::write(&weights, [&sound[..sound.len() - 4], &f32::NAN.to_le_bytes()].concat()).expect("a checkpoint");
    let said = work.refusal(&["--calibration", calibration.to_str().expect("UTF-8")]);
    assert!(said.contains("not finite"), "{said}");
    fs::write(&weights, sound).expect("a checkpoint");
    let config = fs::read_to_string(work.checkpoint.join("config.json")).expect("config.json");
    let headless = config.replace("\"num_attention_heads\":4", "\"num_attention_heads\":0");
    fs::write(work.checkpoint.join("config.json"), headless).expect("config.json");
    let said = work.refusal(&["--calibration", calibration.to_str().expect("UTF-8")]);
    assert!(said.contains("num_attention_heads: 0, expected a positive number"), "{said}");
    fs::write(work.checkpoint.join("config.json"), r#"{"model_type":"mamba"}"#).expect("config.json");
    let said = work.refusal(&["--calibration", calibration.to_str().expect("UTF-8")]);
    assert!(said.contains("no forward pass for model_type \"mamba\""), "{said}");
}
