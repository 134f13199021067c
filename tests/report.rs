//! What a packing run says of its result: the evaluation of the decoded model, gates and their exit code, sweeps, the report as
//! a page and as JSON, the card, and what `inspect` makes of all that.

mod common;

use std::fs;
use std::path::{Path, PathBuf};

use common::{Bert, Random, Tensor, files_below, mcwcfs, mcwcfs_ok, safetensors};
use serde_json::Value;

const VOCABULARY: usize = 48;
const HIDDEN: usize = 64;
const LAYERS: usize = 3;

/// A Llama that can be run, and token ids for it.
struct Work {
    directory: tempfile::TempDir,
    checkpoint: PathBuf,
}

impl Work {
    fn new() -> Self {
        let directory = tempfile::tempdir().expect("a directory");
        let checkpoint = directory.path().join("tiny-llama");
        fs::create_dir(&checkpoint).expect("a directory");
        fs::write(checkpoint.join("model.safetensors"), safetensors(&llama())).expect("model.safetensors");
        let config = format!(
            r#"{{"model_type":"llama","hidden_size":{HIDDEN},"num_attention_heads":4,"num_key_value_heads":2,
               "num_hidden_layers":{LAYERS},"rms_norm_eps":1e-6,"hidden_act":"silu"}}"#
        );
        fs::write(checkpoint.join("config.json"), config).expect("config.json");
        let work = Self { directory, checkpoint };
        work.write_ids("evaluation", 2);
        work.write_ids("calibration", 3);
        work
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    fn ids(&self, name: &str) -> String {
        self.path(&format!("{name}.safetensors")).to_str().expect("UTF-8").to_owned()
    }

    /// 20 sequences of 24 tokens.
    fn write_ids(&self, name: &str, seed: u64) {
        let mut random = Random::new(seed);
        let ids = (0..20 * 24).flat_map(|_| (random.below(VOCABULARY) as u16).to_le_bytes()).collect();
        let tensor = Tensor::raw("input_ids", "U16", &[20, 24], ids);
        fs::write(self.ids(name), safetensors(&[tensor])).expect("ids");
    }

    /// Packs with these options; the exit code, standard output and what was said.
    fn pack(&self, out: &str, options: &[&str]) -> (Option<i32>, String, String) {
        let mut arguments = arguments!["pack", &self.checkpoint, self.path(out)].to_vec();
        if !options.contains(&"--effort") {
            arguments.extend(["--effort", "fast"].map(Into::into));
        }
        arguments.extend(options.iter().map(Into::into));
        let output = mcwcfs(arguments);
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        (output.status.code(), text(&output.stdout), text(&output.stderr))
    }

    /// The same, which must succeed, as JSON.
    fn packed(&self, out: &str, options: &[&str]) -> Value {
        let (code, said, errors) = self.pack(out, &[options, &["--json"]].concat());
        assert_eq!(code, Some(0), "{errors}");
        json(&said)
    }
}

fn llama() -> Vec<Tensor> {
    let mut random = Random::new(1);
    let mut tensors = Vec::new();
    let mut matrix = |name: String, rows: usize, columns: usize, deviation: f32| {
        tensors.push(Tensor::floats(&name, "F32", &[rows, columns], &random.normals(rows * columns, deviation)));
    };
    matrix("model.embed_tokens.weight".into(), VOCABULARY, HIDDEN, 1.0);
    matrix("lm_head.weight".into(), VOCABULARY, HIDDEN, 0.3);
    for layer in 0..LAYERS {
        let name = |part: &str| format!("model.layers.{layer}.{part}_proj.weight");
        matrix(name("self_attn.q"), HIDDEN, HIDDEN, 0.1);
        matrix(name("self_attn.k"), HIDDEN / 2, HIDDEN, 0.1);
        matrix(name("self_attn.v"), HIDDEN / 2, HIDDEN, 0.1);
        matrix(name("self_attn.o"), HIDDEN, HIDDEN, 0.1);
        matrix(name("mlp.gate"), 96, HIDDEN, 0.1);
        matrix(name("mlp.up"), 96, HIDDEN, 0.1);
        matrix(name("mlp.down"), HIDDEN, 96, 0.1);
    }
    let norms = (0..LAYERS).flat_map(|layer| {
        ["input_layernorm", "post_attention_layernorm"].map(|norm| format!("model.layers.{layer}.{norm}.weight"))
    });
    for name in norms.chain(["model.norm.weight".into()]) {
        tensors.push(Tensor::floats(&name, "F32", &[HIDDEN], &[1.0; HIDDEN]));
    }
    tensors
}

fn json(text: &str) -> Value {
    serde_json::from_str(text).unwrap_or_else(|error| panic!("{error}: {text}"))
}

fn number(value: &Value) -> f64 {
    value.as_f64().unwrap_or_else(|| panic!("{value}: no number"))
}

#[test]
fn a_decoded_model_is_judged_beside_the_original() {
    let work = Work::new();
    let evaluation = work.ids("evaluation");
    let coarse = work.packed("coarse", &["--bpp", "6", "--eval", &evaluation]);
    let fine = work.packed("fine", &["--bpp", "11", "--eval", &evaluation]);
    let exact = work.packed("exact", &["--eval", &evaluation]);
    let of = |packed: &Value, what: &str| number(&packed["evaluation"][what]["mean"]);
    assert!(
        of(&coarse, "divergence") > 10.0 * of(&fine, "divergence"),
        "{} {}",
        coarse["evaluation"],
        fine["evaluation"]
    );
    assert!(of(&fine, "divergence") > 0.0);
    let judged = &exact["evaluation"];
    assert_eq!((number(&judged["divergence"]["largest"]), number(&judged["top1_agreement"])), (0.0, 1.0));
    assert_eq!(judged["perplexity"]["before"], judged["perplexity"]["after"]);
    assert_eq!(judged["layers"], serde_json::json!([0.0, 0.0, 0.0, 0.0]));
    // Random tokens are foretold no better than by chance, and the same original is run each time.
    assert!(number(&judged["perplexity"]["before"]) > VOCABULARY as f64);
    assert_eq!(judged["perplexity"]["before"], coarse["evaluation"]["perplexity"]["before"]);
    assert_eq!(judged["outputs"], 480);
    // The archive keeps what was measured.
    let inspected = json(&mcwcfs_ok(arguments!["inspect", "--json", work.path("coarse/model.mcwc")]));
    let kept = inspected["provenance"]["evaluation"].as_str().expect("it is kept");
    assert!(kept.contains("480 tokens in 20 sequences: perplexity") && kept.contains("top-1 agreement"), "{kept}");
}

#[test]
fn a_model_without_a_head_is_judged_by_its_embeddings() {
    let work = Work::new();
    let bert = work.path("bert");
    let shape = Bert { layers: 2, hidden: 64, ffn_units: 128, ..Bert::default() };
    shape.write(&bert);
    let mut random = Random::new(5);
    let mut tensors = shape.tensors();
    for (name, rows) in [("position_embeddings.weight", 24), ("token_type_embeddings.weight", 2)] {
        let values = random.normals(rows * 64, 0.02);
        tensors.push(Tensor::floats(&format!("embeddings.{name}"), "F32", &[rows, 64], &values));
    }
    tensors.push(Tensor::floats("embeddings.LayerNorm.weight", "F32", &[64], &[1.0; 64]));
    tensors.push(Tensor::floats("embeddings.LayerNorm.bias", "F32", &[64], &[0.0; 64]));
    fs::write(bert.join("model.safetensors"), safetensors(&tensors)).expect("model.safetensors");
    let ids = Tensor::raw("input_ids", "U16", &[3, 4], (0..12_u16).flat_map(u16::to_le_bytes).collect());
    fs::write(work.path("ids.safetensors"), safetensors(&[ids])).expect("ids");
    let out = work.path("packed");
    let data = work.path("ids.safetensors");
    let packed = json(&mcwcfs_ok(arguments!["pack", &bert, out, "--bpp", "5", "--eval", data, "--json"]));
    let judged = &packed["evaluation"];
    assert!((1e-9..0.1).contains(&number(&judged["embedding_distance"]["mean"])), "{judged}");
    assert_eq!((judged["outputs"].as_u64(), &judged["divergence"]), (Some(3), &Value::Null));
}

#[test]
fn data_that_the_model_was_calibrated_on_is_refused() {
    let work = Work::new();
    let (calibration, evaluation) = (work.ids("calibration"), work.ids("evaluation"));
    let refused = |eval: &str| {
        let (code, _, said) = work.pack("out", &["--bpp", "6", "--calibration", &calibration, "--eval", eval]);
        assert_eq!(code, Some(1));
        assert!(said.contains("the model was calibrated on it") && !work.path("out").exists(), "{said}");
    };
    refused(&calibration);
    // The same sequences in other bytes.
    let sequences = fs::read(&calibration).expect("ids");
    let data = sequences[sequences.len() - 2 * 480..].as_chunks::<2>().0;
    let wide = data.iter().flat_map(|&id| i64::from(u16::from_le_bytes(id)).to_le_bytes()).collect();
    fs::write(work.ids("wide"), safetensors(&[Tensor::raw("input_ids", "I64", &[20, 24], wide)])).expect("ids");
    refused(&work.ids("wide"));
    let packed = work.packed("out", &["--bpp", "6", "--calibration", &calibration, "--eval", &evaluation]);
    assert_eq!(packed["evaluation"]["inputs_calibrated_on"], 0);
}

#[test]
fn a_gate_that_holds_fails_the_run_and_leaves_the_archive() {
    let work = Work::new();
    let evaluation = work.ids("evaluation");
    let judged = |out: &str, gates: &[&str]| {
        let gates = gates.iter().flat_map(|gate| ["--fail-if", gate]);
        let options: Vec<&str> = ["--bpp", "6", "--eval", &evaluation].into_iter().chain(gates).collect();
        work.pack(out, &options)
    };
    let (code, said, _) = judged("good", &["kld>100", "bpp>6.1", "top1<0.01"]);
    assert_eq!((code, said.matches("passed: ").count()), (Some(0), 3), "{said}");
    let (code, said, _) = judged("bad", &["bpp>6.1", "kld>1e-12"]);
    assert_eq!(code, Some(4), "{said}");
    assert!(said.contains("FAILED: fail if kld>1e-12, found ") && work.path("bad/model.mcwc").exists(), "{said}");
    let (code, ..) = judged("absent", &["cosine-distance>1"]);
    assert_eq!(code, Some(4), "what a model does not have does not pass");
    let (code, _, said) = work.pack("blind", &["--bpp", "6", "--fail-if", "kld>1"]);
    assert!(code == Some(1) && said.contains("expected --eval") && !work.path("blind").exists(), "{said}");
    assert_eq!(work.pack("odd", &["--fail-if", "klb>1"]).0, Some(2));
}

#[test]
fn a_sweep_makes_an_archive_for_each_rate_and_reports_the_smallest_that_passes() {
    let work = Work::new();
    let (page, card) = (work.path("sweep.html"), work.path("card.md"));
    let options = ["--sweep", "11,8,6", "--eval", &work.ids("evaluation"), "--fail-if", "bpp<7"];
    let paths = ["--report", page.to_str().expect("UTF-8"), "--card", card.to_str().expect("UTF-8")];
    let swept = work.packed("out", &[&options[..], &paths[..]].concat());
    let points = swept["points"].as_array().expect("points");
    assert_eq!((points.len(), swept["chosen"].as_u64()), (3, Some(1)), "6 bits fail");
    for (point, rate) in points.iter().zip([11.0, 8.0, 6.0]) {
        let directory = work.path(&format!("out/{rate}bpp"));
        let bytes = fs::metadata(directory.join("model.mcwc")).expect("an archive").len();
        let bits = number(&point["bits_per_parameter"]);
        assert!((bits / rate - 1.0).abs() < 0.03 && point["archive_bytes"] == bytes, "{bits} for {rate}");
        assert!(directory.join("config.json").exists(), "it can be loaded where it is mounted");
    }
    let errors: Vec<f64> = points.iter().map(|point| number(&point["relative_squared_error"])).collect();
    assert!(errors[0] < errors[1] && errors[1] < errors[2], "{errors:?}");
    assert_eq!(json(&fs::read_to_string(work.path("out/sweep.json")).expect("the table"))["points"], swept["points"]);
    let report = json(&fs::read_to_string(page.with_extension("json")).expect("the report"));
    assert_eq!((&report["points"], &report["chosen"]), (&swept["points"], &swept["chosen"]));
    let chosen = work.path("out/8bpp/model.mcwc");
    let content_id = &json(&mcwcfs_ok(arguments!["inspect", "--json", &chosen]))["content_id"];
    assert_eq!(&report["archive"]["content_id"], content_id);
    assert_eq!(fs::read_to_string(card).expect("the card"), mcwcfs_ok(arguments!["inspect", "--card", &chosen]));

    // The same rate alone gives the same archive, and a sweep does not mix its output with another's.
    work.packed("alone", &["--bpp", "8", "--eval", &work.ids("evaluation")]);
    assert!(fs::read(work.path("alone/model.mcwc")).expect("an archive") == fs::read(&chosen).expect("an archive"));
    let (code, _, said) = work.pack("out", &["--sweep", "11,8,6"]);
    assert!(code == Some(1) && said.contains("exists already"), "{said}");
    assert!(work.pack("twice", &["--sweep", "8,8"]).2.contains("8 twice"));
}

#[test]
fn a_report_is_one_page_that_fetches_nothing_and_shows_the_numbers_of_its_json() {
    let work = Work::new();
    let page_path = work.path("report.html");
    let page_name = page_path.to_str().expect("UTF-8");
    work.packed("out", &["--bpp", "6", "--eval", &work.ids("evaluation"), "--report", page_name]);
    let page = fs::read_to_string(&page_path).expect("the page");
    let report = json(&fs::read_to_string(page_path.with_extension("json")).expect("the JSON"));

    // Nothing outside it is named where a browser would fetch it.
    for reference in ["src=", "href=", "url(", "@import", "<link", "<img", "<iframe", "<object", "http://", "https://"]
    {
        assert!(!page.contains(reference), "{reference}");
    }
    assert!(page.contains("default-src 'none'") && page.contains("prefers-color-scheme: dark"));
    let (_, inside) = page.split_once("<script type=\"application/json\" id=\"report\">").expect("the JSON inside");
    assert_eq!(page.matches("<script").count(), 1, "data, and no program");
    assert_eq!(json(inside.split_once("</script>").expect("its end").0), report);

    // Every number that is shown carries its value.
    let shown: Vec<f64> = page
        .split("data-value=\"")
        .skip(1)
        .map(|rest| rest.split_once('"').expect("a value").0.parse().expect("a number"))
        .collect();
    let is_shown = |value: &Value| {
        let value = number(value); // as near as serde_json reads it
        shown.iter().any(|shown| (shown - value).abs() <= 1e-12 * value.abs())
    };
    let point = &report["points"][0];
    for value in report["archive"]["stream_bytes"].as_object().expect("streams").values() {
        assert!(is_shown(value), "{value} bytes");
    }
    for tensor in point["tensors"].as_array().expect("tensors") {
        assert!(is_shown(&tensor["bits_per_element"]) && is_shown(&tensor["relative_squared_error"]), "{tensor}");
        assert!(page.contains(&format!("<code>{}</code>", tensor["name"].as_str().expect("a name"))));
    }
    for stage in point["stats"].as_array().expect("stages") {
        assert!(is_shown(&stage["bits_saved"]) && is_shown(&stage["bits_per_parameter"]), "{stage}");
    }
    for layer in report["layers"].as_array().expect("layers") {
        assert!(
            is_shown(&layer["relative_squared_error"]) && is_shown(&layer["hidden_relative_squared_error"]),
            "{layer}"
        );
    }
    for key in ["mean", "median", "percentile_99_9", "largest"] {
        assert!(is_shown(&point["evaluation"]["divergence"][key]), "{key}");
    }
    for block_type in report["similarity"]["block_types"].as_array().expect("block types") {
        for found in ["weights_found", "gaussian_control"] {
            assert!(
                is_shown(&block_type[found]["nre_after"]["mean"])
                    && is_shown(&block_type[found]["r2_held_out"]["mean"])
            );
        }
    }
    for loading in report["loading"].as_array().expect("bandwidths") {
        assert!(is_shown(&loading["original_seconds"]) && is_shown(&loading["serial_seconds"]));
    }
    let streams = report["archive"]["stream_bytes"].as_object().expect("streams");
    let total: f64 = streams.values().map(number).sum();
    assert_eq!(total, number(&point["archive_bytes"]), "the streams add up");
}

#[test]
fn names_from_a_checkpoint_cannot_write_the_page() {
    let work = Work::new();
    let (hostile, page) = (work.path("hostile.safetensors"), work.path("hostile.html"));
    let name = "</script><script>alert(1)</script><img src=x>";
    fs::write(&hostile, safetensors(&[Tensor::floats(name, "F32", &[2], &[1.0, 2.0])])).expect("a checkpoint");
    mcwcfs_ok(arguments!["pack", &hostile, work.path("hostile.mcwc"), "--report", &page]);
    let page = fs::read_to_string(&page).expect("the page");
    assert_eq!(page.matches("<script").count(), 1);
    assert!(!page.contains("<img") && page.contains("&lt;img src=x&gt;"));
}

#[test]
fn a_card_and_inspect_say_what_was_packed_how_and_what_it_lost() {
    let work = Work::new();
    work.packed("out", &["--bpp", "6", "--calibration", &work.ids("calibration")]);
    let archive = work.path("out/model.mcwc");
    let card = mcwcfs_ok(arguments!["inspect", "--card", &archive]);
    let inspected = json(&mcwcfs_ok(arguments!["inspect", "--json", &archive]));
    let file = &inspected["files"][0];
    for fact in [&file["source_sha256"], &inspected["content_id"], &inspected["provenance"]["measured"]] {
        assert!(card.contains(fact.as_str().expect("text")), "{fact}: {card}");
    }
    assert!(card.contains("`mcwc-pack CHECKPOINT OUT --calibration FILE --bpp 6 --effort fast "), "{card}");
    let blake3 = blake3::hash(&unpacked(&work, &archive)).to_hex();
    assert_eq!(file["decoded_blake3"].as_str(), Some(blake3.as_str()));
    let text = mcwcfs_ok(arguments!["inspect", &archive]);
    assert!(text.contains(blake3.as_str()) && text.contains("measured: relative squared error"), "{text}");
}

fn unpacked(work: &Work, archive: &Path) -> Vec<u8> {
    let out = work.path("unpacked.safetensors");
    mcwcfs_ok(arguments!["unpack", archive, &out]);
    fs::read(out).expect("the file")
}

#[test]
fn options_of_the_provenance_pack_the_same_archive_again() {
    let work = Work::new();
    let asked = ["--max-rel-mse", "0.001", "--quantization", "trellis-shared", "--no-rate-aware-rounding"];
    work.packed("out", &[&asked[..], &["--keep", "*.q_proj.weight=lossless", "--keyframe-interval", "2"]].concat());
    let archive = work.path("out/model.mcwc");
    let inspected = json(&mcwcfs_ok(arguments!["inspect", "--json", &archive]));
    let options = inspected["provenance"]["options"].as_str().expect("options").replace('\'', "");
    work.packed("again", &options.split(' ').collect::<Vec<_>>());
    assert!(fs::read(&archive).expect("an archive") == fs::read(work.path("again/model.mcwc")).expect("an archive"));
}

#[test]
fn inspect_tells_what_decodes_at_once_and_when_packing_pays() {
    let work = Work::new();
    let bert = work.path("bert");
    Bert { hidden: 64, ffn_units: 64, layers: 5, ..Bert::default() }.write(&bert);
    let out = work.path("packed");
    mcwcfs_ok(arguments!["pack", &bert, &out, "--max-rel-mse", "0.001", "--keyframe-interval", "3"]);
    let archive = out.join("model.mcwc");
    let given = ["--bandwidth", "1MB", "--decode-seconds", "0.01", "--encode-seconds", "60"].map(Into::into);
    let arguments = [&arguments!["inspect", "--cost", &archive][..], &given].concat();
    let cost = json(&mcwcfs_ok([&arguments[..], &arguments!["--json"]].concat()));
    let parallelism = &cost["parallelism"];
    assert_eq!((&parallelism["scheduled_segments"], &parallelism["longest_chain"]), (&2.into(), &3.into()));
    let chains: u64 =
        parallelism["block_types"].as_array().expect("types").iter().map(|t| t["chains"].as_u64().expect("n")).sum();
    assert_eq!(parallelism["chains"].as_u64(), Some(chains));
    let saved = number(&cost["loading"]["original_seconds"]) - number(&cost["loading"]["serial_seconds"]);
    assert_eq!(cost["loading"]["packing"]["serial_break_even_loads"].as_f64(), Some((60.0 / saved).ceil()));
    let text = mcwcfs_ok(&arguments);
    assert!(text.contains("5 layers, keyframe interval 3: 2 segments") && text.contains("made up for after"), "{text}");
    assert!(
        mcwcfs_ok(arguments!["inspect", "--cost", &archive]).contains("the archive loads faster below"),
        "measured here"
    );
    assert_eq!(mcwcfs(arguments!["inspect", "--decode-seconds", "1", &archive]).status.code(), Some(2));
}

#[test]
fn a_variant_shows_its_base() {
    let work = Work::new();
    let (base, variant) = (work.path("base"), work.path("variant"));
    mcwcfs_ok(arguments!["pack", &work.checkpoint, &base]);
    let page = work.path("variant.html");
    let packed = mcwcfs(arguments!["pack", &work.checkpoint, &variant, "--base", &base, "--report", &page]);
    assert!(packed.status.success(), "{}", String::from_utf8_lossy(&packed.stderr));
    let archive = variant.join("model.mcwc");
    let of_base = json(&mcwcfs_ok(arguments!["inspect", "--json", base.join("model.mcwc")]));
    let inspected = json(&mcwcfs_ok(arguments!["inspect", "--json", &archive]));
    assert_eq!(inspected["bases"][0]["content_id"], of_base["content_id"]);
    let id = of_base["content_id"].as_str().expect("an id");
    for text in [mcwcfs_ok(arguments!["inspect", &archive]), mcwcfs_ok(arguments!["inspect", "--card", &archive])] {
        assert!(text.contains(id), "{text}");
    }
    assert!(fs::read_to_string(page).expect("the page").contains(id));

    // A checkpoint serves as a base for packing; what reads the variant says what is missing.
    let lonely = work.path("elsewhere/lonely");
    let packed = mcwcfs(arguments!["pack", &work.checkpoint, &lonely, "--base", &work.checkpoint]);
    let said = String::from_utf8_lossy(&packed.stderr).into_owned();
    assert!(packed.status.success() && said.contains("once there is a lossless archive of it"), "{said}");
    let failed = mcwcfs(arguments!["unpack", lonely.join("model.mcwc"), work.path("never")]);
    let said = String::from_utf8_lossy(&failed.stderr).into_owned();
    assert!(said.contains("a base that is a plain checkpoint must be packed too"), "{said}");
}

#[test]
fn unpacking_writes_every_file_or_none() {
    let work = Work::new();
    let (sharded, packed) = (work.path("sharded"), work.path("packed"));
    fs::create_dir(&sharded).expect("a directory");
    let mut random = Random::new(9);
    for (file, name) in [("a.safetensors", "first"), ("b.safetensors", "second")] {
        let tensor = Tensor::floats(name, "F32", &[64, 64], &random.normals(4096, 1.0));
        fs::write(sharded.join(file), safetensors(&[tensor])).expect("a file");
    }
    mcwcfs_ok(arguments!["pack", &sharded, &packed]);
    let archive = packed.join("model.mcwc");
    let sound = fs::read(&archive).expect("the archive");
    // Past the first file's records, before the index.
    let mut damaged = sound.clone();
    let position = sound.len() * 7 / 8;
    damaged[position] ^= 1;
    fs::write(&archive, damaged).expect("the archive");
    let (parent, out) = (work.path("new"), work.path("new/out"));
    let failed = mcwcfs(arguments!["unpack", &packed, &out]);
    assert_eq!(failed.status.code(), Some(1), "{}", String::from_utf8_lossy(&failed.stderr));
    assert!(!parent.exists(), "{:?}", files_below(&parent));
    fs::write(&archive, sound).expect("the archive");
    mcwcfs_ok(arguments!["unpack", &packed, &out]);
    assert_eq!(files_below(&out).len(), 2);
}
