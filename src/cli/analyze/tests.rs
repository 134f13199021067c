use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use clap::Parser;

use super::*;
use crate::safetensors::{Header, NewTensor, write_file};
use crate::tensor::Dtype;

#[derive(Parser)]
struct Arguments {
    #[command(flatten)]
    analyze: AnalyzeArgs,
}

const LAYERS: usize = 3;
const HIDDEN: usize = 12;
const HEAD: usize = 4;
const QUERY_HEADS: usize = 6;
const GROUPS: usize = 3;
const UNITS: usize = 10;

/// A random Llama with grouped queries and attention biases, as a directory.
fn llama() -> tempfile::TempDir {
    let mut chance = fastrand::Rng::with_seed(29);
    let mut tensors: Vec<(String, Vec<usize>, Vec<u8>)> = Vec::new();
    let mut add = |name: String, shape: &[usize]| {
        let values = (0..shape.iter().product()).flat_map(|_| (chance.f32() - 0.5).to_le_bytes());
        tensors.push((name, shape.to_vec(), values.collect()));
    };
    add("model.embed_tokens.weight".to_owned(), &[20, HIDDEN]);
    for layer in 0..LAYERS {
        let mut add = |name: &str, shape: &[usize]| add(format!("model.layers.{layer}.{name}"), shape);
        add("self_attn.q_proj.weight", &[QUERY_HEADS * HEAD, HIDDEN]);
        add("self_attn.q_proj.bias", &[QUERY_HEADS * HEAD]);
        add("self_attn.k_proj.weight", &[GROUPS * HEAD, HIDDEN]);
        add("self_attn.k_proj.bias", &[GROUPS * HEAD]);
        add("self_attn.v_proj.weight", &[GROUPS * HEAD, HIDDEN]);
        add("self_attn.o_proj.weight", &[HIDDEN, QUERY_HEADS * HEAD]);
        add("mlp.gate_proj.weight", &[UNITS, HIDDEN]);
        add("mlp.up_proj.weight", &[UNITS, HIDDEN]);
        add("mlp.down_proj.weight", &[HIDDEN, UNITS]);
        add("input_layernorm.weight", &[HIDDEN]);
    }
    let views: Vec<NewTensor<'_>> =
        tensors.iter().map(|(name, shape, bytes)| NewTensor { name, dtype: Dtype::F32, shape, bytes }).collect();
    let directory = tempfile::tempdir().unwrap();
    fs::write(directory.path().join("model.safetensors"), write_file(&views, &[("format", "pt")]).unwrap()).unwrap();
    let config = format!(
        r#"{{"model_type":"llama","num_attention_heads":{QUERY_HEADS},"num_key_value_heads":{GROUPS},"head_dim":{HEAD}}}"#
    );
    fs::write(directory.path().join("config.json"), config).unwrap();
    fs::create_dir(directory.path().join("extra")).unwrap();
    fs::write(directory.path().join("extra/notes.txt"), "as it is").unwrap();
    directory
}

/// A tensor's numbers with its width.
struct Matrix {
    width: usize,
    values: Vec<u32>,
}

impl Matrix {
    fn rows(&self, rows: std::ops::Range<usize>) -> Vec<u32> {
        self.values[rows.start * self.width..rows.end * self.width].to_vec()
    }

    fn columns(&self, columns: std::ops::Range<usize>) -> Vec<u32> {
        self.values.chunks(self.width).flat_map(|row| row[columns.clone()].to_vec()).collect()
    }
}

fn read(directory: &Path) -> (Header, BTreeMap<String, Matrix>) {
    let file = fs::read(directory.join("model.safetensors")).unwrap();
    let header = Header::read_from(&file[..], file.len() as u64).unwrap();
    let matrices = header.tensors.iter().map(|info| {
        let start = header.bytes.len() + info.offset_bytes as usize;
        let (values, _) = file[start..start + info.length_bytes as usize].as_chunks();
        let width = if info.shape.len() == 2 { info.shape[1] as usize } else { 1 };
        (info.name.clone(), Matrix { width, values: values.iter().map(|&bits| u32::from_le_bytes(bits)).collect() })
    });
    let matrices = matrices.collect();
    (header, matrices)
}

/// All that a query head computes with: attention is the sum of these over heads, in whatever order.
fn heads(matrices: &BTreeMap<String, Matrix>, layer: usize) -> Vec<Vec<Vec<u32>>> {
    let of = |name: &str| &matrices[&format!("model.layers.{layer}.self_attn.{name}")];
    let head = |head: usize| {
        let own = head * HEAD..(head + 1) * HEAD;
        let group = head / (QUERY_HEADS / GROUPS);
        let shared = group * HEAD..(group + 1) * HEAD;
        vec![
            of("q_proj.weight").rows(own.clone()),
            of("q_proj.bias").rows(own.clone()),
            of("k_proj.weight").rows(shared.clone()),
            of("k_proj.bias").rows(shared.clone()),
            of("v_proj.weight").rows(shared),
            of("o_proj.weight").columns(own),
        ]
    };
    (0..QUERY_HEADS).map(head).collect()
}

/// All that an FFN unit computes with.
fn units(matrices: &BTreeMap<String, Matrix>, layer: usize) -> Vec<Vec<Vec<u32>>> {
    let of = |name: &str| &matrices[&format!("model.layers.{layer}.mlp.{name}_proj.weight")];
    let unit = |unit: usize| {
        vec![of("gate").rows(unit..unit + 1), of("up").rows(unit..unit + 1), of("down").columns(unit..unit + 1)]
    };
    (0..UNITS).map(unit).collect()
}

fn report(path: &Path) -> Report {
    let checkpoint = Checkpoint::open(path).unwrap();
    Report::of(&checkpoint, &checkpoint.plan(), 0, &ProgressBar::hidden())
}

#[test]
fn the_aligned_checkpoint_has_the_same_heads_and_units_in_another_order() {
    let source = llama();
    let target = tempfile::tempdir().unwrap();
    let aligned = target.path().join("aligned");
    let arguments = Arguments::parse_from([
        "analyze".as_ref(),
        source.path().as_os_str(),
        "--json".as_ref(),
        "--write-aligned".as_ref(),
        aligned.as_os_str(),
    ]);
    run_to(&arguments.analyze, &mut Vec::new()).unwrap();

    let ((header, before), (header_after, after)) = (read(source.path()), read(&aligned));
    assert_eq!(header.bytes, header_after.bytes);
    let mut moved = 0;
    for layer in 0..LAYERS {
        for parts in [heads, units] {
            let (mut before, mut after) = (parts(&before, layer), parts(&after, layer));
            moved += usize::from(before != after);
            before.sort();
            after.sort();
            assert_eq!(before, after, "layer {layer}");
        }
        let norm = format!("model.layers.{layer}.input_layernorm.weight");
        assert_eq!(before[&norm].values, after[&norm].values);
    }
    assert!(moved >= 2, "random layers are not aligned already");
    assert_eq!(fs::read(aligned.join("extra/notes.txt")).unwrap(), b"as it is");
    assert_eq!(fs::read_dir(target.path()).unwrap().count(), 1, "nothing unfinished is left");

    // In the new coordinates nothing is left to be moved: the chain was followed to its first layer.
    let (of_source, of_aligned) = (report(source.path()), report(&aligned));
    for (found, again) in of_source.block_types.iter().zip(&of_aligned.block_types) {
        let after = found.weights_found.cosine_after.mean;
        assert!((again.weights_found.cosine_before.mean - after).abs() < 1e-6);
        assert!(again.weights_found.cosine_gain.abs() < 1e-6);
        assert!(found.weights_found.cosine_gain > 0.01);
    }
}

#[test]
fn a_report_counts_what_it_says() {
    let source = llama();
    let report = report(source.path());
    let attention = LAYERS * HEAD * (2 * QUERY_HEADS * HIDDEN + 2 * GROUPS * HIDDEN);
    let biases = LAYERS * HEAD * (QUERY_HEADS + GROUPS);
    let ffn = LAYERS * 3 * UNITS * HIDDEN;
    assert_eq!(report.alignable_parameters as usize, attention + biases + ffn);
    assert_eq!(report.parameters as usize, attention + biases + ffn + 20 * HIDDEN + LAYERS * HIDDEN);
    let types: Vec<_> = report.block_types.iter().map(|t| (t.block_type, t.groups, t.members, t.pairs)).collect();
    assert_eq!(types, [("attention", 3, 2, 2), ("ffn", 10, 1, 2)]);
    assert_eq!(report.block_types[0].weights as usize, attention / LAYERS * (LAYERS - 1));
    let text = report.to_string();
    assert!(text.contains("attention: 2 pairs of layers, 3 groups of 2 blocks each"), "{text}");
    assert!(text.contains("Gaussian control"));
    let json = serde_json::to_value(&report).unwrap();
    assert_eq!(json["block_types"][1]["weights_found"]["permutation_bits"].as_u64(), Some(2 * 8 * 4)); // 10! is 22 bits
}

#[test]
fn a_directory_that_holds_something_is_not_written_to() {
    let source = llama();
    let arguments = |target: &Path| AnalyzeArgs {
        checkpoint: source.path().to_owned(),
        json: true,
        write_aligned: Some(target.to_owned()),
        seed: 0,
    };
    let message = run_to(&arguments(source.path()), &mut Vec::new()).unwrap_err().to_string();
    assert!(message.ends_with("not empty, expected a directory that does not exist or is empty"), "{message}");
    let empty = tempfile::tempdir().unwrap();
    let mut output = Vec::new();
    run_to(&arguments(empty.path()), &mut output).unwrap();
    let json: serde_json::Value = serde_json::from_slice(&output).unwrap();
    assert_eq!(json["family"], "llama");
    assert!(empty.path().join("config.json").exists());
}

#[test]
fn a_checkpoint_without_layers_has_an_empty_report() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("x.safetensors");
    fs::write(&path, write_file(&[], &[]).unwrap()).unwrap();
    let report = report(&path);
    assert_eq!((report.parameters, report.block_types.len()), (0, 0));
    assert!(report.to_string().contains("No two layers have blocks"));
}
