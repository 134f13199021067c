//! What a user can ask of `mcwc-pack`: targets, efforts, rules for single tensors, the paper's ablations; and what it does when
//! it is told to stop.

mod common;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use common::{Bert, Random, Tensor, mcwcfs, mcwcfs_ok, safetensors};
use serde_json::Value;
use signal_hook::consts::{SIGINT, SIGTERM};

/// A checkpoint and a place for archives.
struct Work {
    directory: tempfile::TempDir,
    checkpoint: PathBuf,
}

impl Work {
    fn new(bert: Bert) -> Self {
        let directory = tempfile::tempdir().expect("a directory");
        let checkpoint = directory.path().join("checkpoint");
        bert.write(&checkpoint);
        Self { directory, checkpoint }
    }

    fn archive(&self, name: &str) -> PathBuf {
        self.directory.path().join(format!("{name}.mcwc"))
    }

    /// Packs, and gives the report.
    fn pack(&self, name: &str, options: &[&str]) -> Value {
        let mut arguments = arguments!["pack", "--json", &self.checkpoint, self.archive(name)].to_vec();
        arguments.extend(options.iter().map(Into::into));
        serde_json::from_str(&mcwcfs_ok(arguments)).expect("JSON")
    }

    /// What `verify` finds between an archive and its original: the relative squared error.
    fn verified_error(&self, name: &str) -> f64 {
        let found = mcwcfs_ok(arguments!["verify", "--json", self.archive(name), "--against", &self.checkpoint]);
        let found: Value = serde_json::from_str(&found).expect("JSON");
        found["archives"][0]["relative_squared_error"].as_f64().expect("a number")
    }
}

fn medium() -> Work {
    Work::new(Bert { hidden: 128, ffn_units: 256, ..Bert::default() })
}

fn number(value: &Value) -> f64 {
    value.as_f64().unwrap_or_else(|| panic!("{value} is no number"))
}

#[test]
fn every_effort_meets_the_rate_and_more_effort_has_less_error() {
    let work = medium();
    let error = |effort: &str| {
        let report = work.pack(effort, &["--bpp", "4", "--trellis-states", "8", "--effort", effort]);
        let bits = number(&report["bits_per_parameter"]);
        assert!((bits / 4.0 - 1.0).abs() < 0.005, "{effort}: {bits} bits per parameter");
        number(&report["relative_squared_error"])
    };
    let (fast, max) = (error("fast"), error("max"));
    // Prediction pays much on this checkpoint, and only fast does without.
    assert!(max < 0.8 * fast, "{max} and {fast}");
}

/// Weights of two scales, and a mask between them as GPT-2 has it, whose entries are far larger than any weight.
fn masked(value: f32) -> Work {
    let mut random = Random::new(21);
    let mask: Vec<f32> = (0..128 * 128).map(|at| if at % 128 > at / 128 { value } else { 0.0 }).collect();
    let work = Work::new(Bert::default());
    let tensors = [
        Tensor::floats("h.0.attn.bias", "F32", &[1, 1, 128, 128], &mask),
        Tensor::floats("h.0.attn.c_attn.weight", "F32", &[256, 256], &random.normals(256 * 256, 0.02)),
        Tensor::floats("h.0.small.weight", "F32", &[128, 128], &random.normals(128 * 128, 0.0002)),
    ];
    for entry in fs::read_dir(&work.checkpoint).expect("the checkpoint") {
        fs::remove_file(entry.expect("an entry").path()).expect("removed");
    }
    fs::write(work.checkpoint.join("model.safetensors"), safetensors(&tensors)).expect("the checkpoint");
    work
}

#[test]
fn a_mask_between_the_weights_stays_bit_exact_and_spoils_no_weight() {
    for value in [1.0, -1e4, f32::MIN] {
        let work = masked(value);
        for options in [["--bpp", "9"], ["--max-rel-mse", "0.001"]] {
            let report = work.pack("packed", &[options[0], options[1], "--trellis-states", "8", "--force"]);
            for tensor in report["tensors"].as_array().expect("tensors") {
                let error = number(&tensor["relative_squared_error"]);
                let most = match tensor["name"].as_str().expect("a name") {
                    "h.0.attn.bias" => 0.0,
                    "h.0.small.weight" => 0.3,
                    _ => 0.002,
                };
                assert!(error <= most, "{value}, {options:?}: {tensor}");
            }
        }
    }
}

#[test]
fn residual_vectors_meet_a_rate_from_below_and_refuse_what_they_cannot() {
    let work = medium();
    let error = |bits: f64| {
        let report =
            work.pack("vectors", &["--bpp", &bits.to_string(), "--quantization", "residual-vector", "--force"]);
        let found = number(&report["bits_per_parameter"]);
        assert!(found <= bits && found > 0.85 * bits, "{bits}: {found}");
        number(&report["relative_squared_error"])
    };
    let (coarse, fine) = (error(4.0), error(6.0));
    assert!(fine < 0.2 * coarse, "{fine} and {coarse}");
    for (options, says) in [
        (["--max-rel-mse", "0.01"], "expected --bpp"),
        (["--bpp", "1"], "or more: there are no longer vectors"),
        (["--bpp", "11"], "or less: there are no shorter vectors"),
    ] {
        let mut arguments = arguments!["pack", &work.checkpoint, work.archive("refused")].to_vec();
        arguments.extend(options.iter().chain(&["--quantization", "residual-vector"]).map(Into::into));
        let output = mcwcfs(arguments);
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(!output.status.success() && said.contains(says), "{options:?}: {said}");
    }
}

#[test]
fn what_cannot_be_meant_is_refused() {
    let work = Work::new(Bert::default());
    let refused = |options: &[&str], says: &str| {
        let mut arguments = arguments!["pack", &work.checkpoint, work.archive("refused")].to_vec();
        arguments.extend(options.iter().map(Into::into));
        let output = mcwcfs(arguments);
        assert!(!output.status.success(), "{options:?}");
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(said.contains(says), "{options:?}: {said}");
        assert!(!work.archive("refused").exists());
    };
    refused(&["--bpp", "4", "--keep", "lm_haed*=lossless"], "no tensor of this checkpoint has such a name");
    refused(&["--max-rel-mse", "1"], "less than 1");
}

#[test]
fn an_error_bound_is_met_from_below_and_nearly() {
    let work = medium();
    for bound in ["0.02", "0.0005"] {
        work.pack(bound, &["--max-rel-mse", bound, "--trellis-states", "8"]);
        let (found, bound) = (work.verified_error(bound), bound.parse::<f64>().expect("a number"));
        assert!(found <= bound && found > 0.99 * bound, "{found} for {bound}");
    }
}

#[test]
fn a_bound_that_quantizing_meets_only_with_more_bits_gives_the_original_back() {
    let work = medium();
    let lossless = work.pack("lossless", &[]);
    let bounded = work.pack("bounded", &["--max-rel-mse", "1e-12"]);
    assert_eq!(bounded["lossless"], true);
    assert!(number(&bounded["archive_bytes"]) < 1.001 * number(&lossless["archive_bytes"]));
}

#[test]
fn a_kept_tensor_is_bit_exact_or_has_its_own_rate_and_plan_and_archive_say_so() {
    let work = medium();
    let rules =
        ["--trellis-states", "8", "--bpp", "4", "--keep", "*.query.weight=2.5", "--keep", "*layer.1.*query*=lossless"];
    let report = work.pack("kept", &rules);
    let tensor = |name: &str| {
        let tensors = report["tensors"].as_array().expect("tensors");
        tensors.iter().find(|tensor| tensor["name"] == name).unwrap_or_else(|| panic!("{name} is not in {report}"))
    };
    let exact = tensor("encoder.layer.1.attention.self.query.weight");
    assert_eq!((number(&exact["relative_squared_error"]), &exact["keep"]), (0.0, &Value::from("lossless")));
    let rated = tensor("encoder.layer.2.attention.self.query.weight");
    assert!((number(&rated["bits_per_element"]) - 2.5).abs() < 0.2, "{rated}");
    assert_eq!(rated["keep"], "2.5");
    assert_eq!(tensor("encoder.layer.2.attention.self.key.weight")["keep"], Value::Null);

    let mut plan = arguments!["pack", "--dry-run", &work.checkpoint, work.archive("none")].to_vec();
    plan.extend(rules.iter().map(Into::into));
    let plan = mcwcfs_ok(plan);
    let line = plan.lines().find(|line| line.contains("layer.2.attention.self.query.weight")).expect("in the plan");
    assert!(line.ends_with("(--keep 2.5)"), "{line}");
    let inspected = mcwcfs_ok(arguments!["inspect", work.archive("kept")]);
    assert!(inspected.contains("--keep '*.query.weight=2.5' --keep '*layer.1.*query*=lossless'"), "{inspected}");
}

#[test]
fn a_rate_for_one_tensor_leaves_the_others_bit_exact() {
    let work = medium();
    let report = work.pack("kept", &["--keep", "*intermediate*weight=3"]);
    for tensor in report["tensors"].as_array().expect("tensors") {
        let name = tensor["name"].as_str().expect("a name");
        let is_exact = number(&tensor["relative_squared_error"]) == 0.0;
        assert_eq!(is_exact, !name.ends_with("intermediate.dense.weight"), "{name}");
    }
}

#[test]
fn every_ablation_makes_an_archive_that_decodes_and_takes_more_bits() {
    let work = medium();
    let error_with = |name: &str, options: &[&str]| {
        // Without prediction, which pays far more on this checkpoint than anything else.
        work.pack(name, &[&["--bpp", "4", "--trellis-states", "8", "--predictor", "none"], options].concat());
        work.verified_error(name)
    };
    let everything = error_with("everything", &[]);
    for (name, options) in [
        ("scalar", ["--quantization", "scalar"].as_slice()),
        ("iid", &["--entropy-model", "iid"]),
        ("fixed-length", &["--entropy-model", "fixed-length"]),
        ("fixed-length-scalar", &["--entropy-model", "fixed-length", "--quantization", "scalar"]),
        ("steps-per-run", &["--steps", "per-run"]),
        ("steps-per-group", &["--steps", "per-group"]),
    ] {
        let without = error_with(name, options);
        assert!(without > everything, "{name}: {without} and {everything} with everything");
    }
}

#[test]
fn statistics_name_every_stage_and_change_nothing() {
    let work = medium();
    let plain = work.pack("plain", &["--bpp", "3", "--trellis-states", "8"]);
    let measured = work.pack("measured", &["--bpp", "3", "--trellis-states", "8", "--stats"]);
    assert_eq!(plain["stats"], Value::Null);
    assert!(fs::read(work.archive("plain")).expect("an archive") == fs::read(work.archive("measured")).expect("one"));
    let saved = |stage: &str| {
        let stages = measured["stats"].as_array().expect("stages");
        let found = stages.iter().find(|found| found["stage"] == stage);
        number(&found.unwrap_or_else(|| panic!("{stage} is not in {measured}"))["bits_per_parameter"])
    };
    // Layers of this checkpoint are alike once their blocks are put in order.
    for (stage, least) in [
        ("trellis-coded quantization", 0.05),
        ("entropy coding", 0.3),
        ("motion vectors", 3.0),
        ("alignment, where it pays", 0.05),
        ("permutation coding", 0.0),
    ] {
        assert!(saved(stage) > least, "{stage}: {}", saved(stage));
    }
}

#[test]
fn the_archive_is_the_same_for_any_number_of_threads() {
    let work = medium();
    for threads in ["1", "2", "7"] {
        work.pack(threads, &["--bpp", "3.3", "--trellis-states", "8", "--threads", threads]);
    }
    let bytes = |name: &str| fs::read(work.archive(name)).expect("an archive");
    assert!(bytes("1") == bytes("2") && bytes("1") == bytes("7"));
}

#[test]
fn rules_that_make_no_sense_are_refused() {
    let work = medium();
    let output = mcwcfs(arguments!["pack", "--keep", "*=13", &work.checkpoint, work.archive("none")]);
    assert_eq!(output.status.code(), Some(2));
    assert!(String::from_utf8_lossy(&output.stderr).contains("bits per element from 0.1 to 12"));
}

/// Names of hidden files in a directory.
fn hidden(directory: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(directory).into_iter().flatten().flatten();
    entries.map(|entry| entry.path()).filter(|path| path.to_string_lossy().contains("/.mcwc-pack-")).collect()
}

#[test]
fn an_interrupted_run_leaves_nothing_behind() {
    // Long enough that the signal comes before the end.
    let work = Work::new(Bert { layers: 6, hidden: 512, ffn_units: 2048, ..Bert::default() });
    for (name, signal) in [("interrupted", SIGINT), ("terminated", SIGTERM)] {
        let out = work.directory.path().join(name);
        let child = Command::new(env!("CARGO_BIN_EXE_mcwcfs"))
            .args(arguments!["pack", "--effort", "max", "--bpp", "4", &work.checkpoint, &out])
            .stderr(Stdio::piped())
            .spawn()
            .expect("mcwcfs starts");
        while hidden(&out).is_empty() {
            std::thread::sleep(Duration::from_millis(5));
        }
        // SAFETY: the child has not been waited for, so the number is its own.
        assert_eq!(unsafe { libc::kill(child.id() as i32, signal) }, 0);
        let output = child.wait_with_output().expect("the child");
        let said = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "{said}");
        assert!(said.contains("interrupted"), "{said}");
        assert!(!out.exists(), "{:?}", fs::read_dir(&out).map(Iterator::collect::<Vec<_>>));
    }
}

#[test]
fn what_a_run_left_behind_is_named() {
    let work = medium();
    let left = work.directory.path().join(".mcwc-pack-a1b2c3.partial");
    fs::write(&left, "half an archive").expect("a file");
    let output = mcwcfs(arguments!["pack", "--effort", "fast", "--bpp", "4", &work.checkpoint, work.archive("new")]);
    assert!(output.status.success());
    assert!(String::from_utf8_lossy(&output.stderr).contains(&*left.to_string_lossy()));
}
