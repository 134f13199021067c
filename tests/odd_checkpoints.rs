//! Checkpoints that no textbook shows: each comes back byte for byte, unpacked and mounted, or is refused in one line.

mod common;

use std::fs;
use std::path::Path;

use common::{Bert, Mount, Random, Tensor, assert_same_directories, mcwcfs, mcwcfs_ok, safetensors, safetensors_with};
use proptest::prelude::*;

/// Packs `checkpoint` without loss, and compares what `unpack` writes and what a mount shows with it.
fn assert_comes_back(checkpoint: &Path) {
    let work = tempfile::tempdir().expect("a directory");
    let (packed, unpacked) = (work.path().join("packed"), work.path().join("unpacked"));
    mcwcfs_ok(arguments!["pack", "--lossless", checkpoint, &packed]);
    mcwcfs_ok(arguments!["verify", &packed, "--against", checkpoint]);
    mcwcfs_ok(arguments!["unpack", &packed, &unpacked]);
    assert_same_directories(checkpoint, &unpacked);
    let mount = Mount::new(&packed, &[]);
    assert_same_directories(checkpoint, &mount.path);
}

/// A directory that holds `model.safetensors` with these bytes.
fn checkpoint_of(bytes: &[u8]) -> tempfile::TempDir {
    let directory = tempfile::tempdir().expect("a directory");
    fs::write(directory.path().join("model.safetensors"), bytes).expect("model.safetensors");
    directory
}

fn assert_file_comes_back(bytes: &[u8]) {
    assert_comes_back(checkpoint_of(bytes).path());
}

/// Packing these bytes must fail with one line that names the file and contains every one of `parts`.
fn assert_refused(bytes: &[u8], parts: &[&str]) {
    let checkpoint = checkpoint_of(bytes);
    let work = tempfile::tempdir().expect("a directory");
    let packed = work.path().join("packed");
    let output = mcwcfs(arguments!["pack", checkpoint.path(), &packed]);
    let message = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{message}");
    assert_eq!(message.trim_end().lines().count(), 1, "one line: {message}");
    for part in [&["model.safetensors"], parts].concat() {
        assert!(message.contains(part), "{part:?} is not in: {message}");
    }
    let left: Vec<_> = common::files_below(work.path());
    assert!(left.is_empty(), "nothing is left behind: {left:?}");
}

#[test]
fn an_unknown_architecture_comes_back() {
    let mut random = Random::new(2);
    let tensors: Vec<_> = (0..3)
        .flat_map(|layer| {
            [("mixer.in", vec![24, 40]), ("mixer.gate", vec![40]), ("kernel", vec![4, 3, 3, 5])].map(|(name, shape)| {
                let values = random.normals(shape.iter().product(), 0.3);
                Tensor::floats(&format!("stages.{layer}.{name}"), "F32", &shape, &values)
            })
        })
        .collect();
    let checkpoint = checkpoint_of(&safetensors(&tensors));
    fs::write(checkpoint.path().join("config.json"), r#"{"model_type":"never-heard-of"}"#).expect("config.json");
    assert_comes_back(checkpoint.path());
}

#[test]
fn a_file_without_tensors_comes_back() {
    assert_file_comes_back(&safetensors(&[]));
    assert_file_comes_back(&safetensors_with(&[], &[], &[]));
}

#[test]
fn a_tensor_with_zero_elements_comes_back() {
    let full = |name: &str| Tensor::floats(name, "F32", &[2], &[1.0, 2.0]);
    let empty = |name: &str, shape: &[usize]| Tensor::raw(name, "F32", shape, vec![]);
    assert_file_comes_back(&safetensors(&[
        empty("first", &[0]),
        full("a"),
        empty("b", &[3, 0, 2]),
        full("c"),
        empty("z", &[0]),
    ]));
    assert_file_comes_back(&safetensors(&[empty("alone", &[7, 0])]));
}

#[test]
fn a_scalar_comes_back() {
    assert_file_comes_back(&safetensors(&[
        Tensor::floats("temperature", "F32", &[], &[0.07]),
        Tensor::raw("step", "I64", &[], 123_456_789_i64.to_le_bytes().to_vec()),
    ]));
}

#[test]
fn every_element_type_comes_back() {
    let mut random = Random::new(3);
    let mut tensors = Vec::new();
    for (dtype, bits) in [
        ("BOOL", 8),
        ("U8", 8),
        ("I8", 8),
        ("F8_E5M2", 8),
        ("F8_E4M3", 8),
        ("F8_E8M0", 8),
        ("I16", 16),
        ("U16", 16),
        ("I32", 32),
        ("U32", 32),
        ("I64", 64),
        ("U64", 64),
        ("C64", 64),
        ("F4", 4),
        ("F6_E2M3", 6),
        ("F6_E3M2", 6),
    ] {
        let mut data = random.bytes(300 * 16 * bits / 8);
        if dtype == "BOOL" {
            data.iter_mut().for_each(|byte| *byte &= 1);
        }
        tensors.push(Tensor::raw(&format!("tensor_{dtype}"), dtype, &[300, 16], data));
    }
    for dtype in ["F64", "F32", "F16", "BF16"] {
        tensors.push(Tensor::floats(&format!("tensor_{dtype}"), dtype, &[300, 16], &random.normals(4800, 0.02)));
    }
    assert_file_comes_back(&safetensors(&tensors));
}

#[test]
fn f32_that_was_widened_from_half_precision_comes_back() {
    let mut random = Random::new(4);
    let values = random.normals(64 * 48, 0.02);
    let from_bf16: Vec<f32> = values.iter().map(|&value| half::bf16::from_f32(value).to_f32()).collect();
    let from_f16: Vec<f32> = values.iter().map(|&value| half::f16::from_f32(value).to_f32()).collect();
    assert_file_comes_back(&safetensors(&[
        Tensor::floats("bf16", "F32", &[64, 48], &from_bf16),
        Tensor::floats("f16", "F32", &[64, 48], &from_f16),
    ]));
}

#[test]
fn values_that_are_not_finite_come_back_with_their_payloads() {
    let mut random = Random::new(5);
    let mut single = random.normals(64 * 64, 0.02);
    for (position, bits) in
        [0x7f80_0000, 0xff80_0000, 0x7fc0_0001, 0xffff_ffff, 0x7f80_0001, 0x8000_0000, 1].into_iter().enumerate()
    {
        single[position * 97] = f32::from_bits(bits);
    }
    let mut halves: Vec<u8> =
        random.normals(4096, 0.02).iter().flat_map(|&v| half::bf16::from_f32(v).to_le_bytes()).collect();
    for (position, bits) in [0x7f80_u16, 0xff80, 0x7fc1, 0xffff, 0x8000, 1].into_iter().enumerate() {
        halves[position * 202..][..2].copy_from_slice(&bits.to_le_bytes());
    }
    let every_half: Vec<u8> = (0..=u16::MAX).flat_map(u16::to_le_bytes).collect();
    assert_file_comes_back(&safetensors(&[
        Tensor::floats("f32", "F32", &[64, 64], &single),
        Tensor::raw("bf16", "BF16", &[64, 64], halves),
        Tensor::raw("every_bf16", "BF16", &[256, 256], every_half.clone()),
        Tensor::raw("every_f16", "F16", &[256, 256], every_half),
    ]));
}

#[test]
fn metadata_and_odd_names_come_back() {
    let metadata = [("format", "pt"), ("note", "spaces  and \"quotes\""), ("empty", "")];
    let names =
        ["", "a.b.c", "ünïcödé", "with space", "layers.0.weight", "layers.00.weight", "layers.99999999999.weight"];
    let tensors: Vec<_> = names.iter().map(|name| Tensor::floats(name, "F32", &[3], &[1.0, 2.0, 3.0])).collect();
    let order: Vec<usize> = (0..names.len()).collect();
    assert_file_comes_back(&safetensors_with(&tensors, &order, &metadata));
}

#[test]
fn a_header_in_another_order_than_its_data_comes_back() {
    let tensors = Bert { layers: 2, ..Bert::default() }.tensors();
    let order = Random::new(6).permutation(tensors.len());
    assert_file_comes_back(&safetensors_with(&tensors, &order, &[("format", "pt")]));
}

#[test]
fn a_header_padded_with_spaces_comes_back() {
    let mut bytes = safetensors(&[Tensor::floats("a", "F32", &[2], &[1.0, 2.0])]);
    let length = u64::from_le_bytes(bytes[..8].try_into().expect("8 bytes"));
    bytes.splice(8 + length as usize..8 + length as usize, [b' '; 4096]);
    bytes[..8].copy_from_slice(&(length + 4096).to_le_bytes());
    assert_file_comes_back(&bytes);
}

#[test]
fn shards_and_their_index_come_back() {
    let directory = tempfile::tempdir().expect("a directory");
    let tensors = Bert { layers: 3, dtype: "BF16", ..Bert::default() }.tensors();
    // A layer that is spread over two shards, as sharding by size leaves it.
    let (first, second) = tensors.split_at(tensors.len() / 2 + 3);
    let mut weight_map = Vec::new();
    for (number, shard) in [first, second].into_iter().enumerate() {
        let name = format!("model-{:05}-of-00002.safetensors", number + 1);
        fs::write(directory.path().join(&name), safetensors(shard)).expect("a shard");
        weight_map.extend(shard.iter().map(|tensor| format!("{:?}:{name:?}", tensor.name)));
    }
    let bytes: usize = tensors.iter().map(|tensor| tensor.data.len()).sum();
    let index = format!("{{\"metadata\":{{\"total_size\":{bytes}}},\"weight_map\":{{{}}}}}", weight_map.join(","));
    fs::write(directory.path().join("model.safetensors.index.json"), index).expect("the index");
    Bert { layers: 3, ..Bert::default() }.write(&directory.path().join("config only"));
    fs::rename(directory.path().join("config only/config.json"), directory.path().join("config.json")).expect("config");
    fs::remove_dir_all(directory.path().join("config only")).expect("the rest");
    assert_comes_back(directory.path());
}

#[test]
fn sidecars_of_any_kind_come_back() {
    let directory = tempfile::tempdir().expect("a directory");
    Bert::default().write(directory.path());
    fs::create_dir_all(directory.path().join("1_Pooling/deep")).expect("a subdirectory");
    fs::write(directory.path().join("1_Pooling/deep/config.json"), "{}").expect("a sidecar");
    fs::write(directory.path().join("empty"), "").expect("a sidecar");
    fs::write(directory.path().join(".hidden"), "dot").expect("a sidecar");
    fs::write(directory.path().join("modeling_custom.py"), Random::new(7).bytes(200_000)).expect("a sidecar");
    assert_comes_back(directory.path());
}

#[test]
fn a_lossy_archive_keeps_what_cannot_be_quantized_and_says_so() {
    let mut random = Random::new(8);
    let mut with_nan = random.normals(64 * 64, 0.02);
    with_nan[100] = f32::NAN;
    let mut tensors = Bert { hidden: 64, ffn_units: 128, ..Bert::default() }.tensors();
    tensors.push(Tensor::floats("with_nan.weight", "F32", &[64, 64], &with_nan));
    tensors.push(Tensor::raw("ids", "I64", &[64, 64], random.bytes(64 * 64 * 8)));
    tensors.push(Tensor::raw("fp8", "F8_E4M3", &[64, 64], random.bytes(64 * 64)));
    tensors.push(Tensor::floats("f64", "F64", &[64, 64], &random.normals(64 * 64, 0.02)));
    tensors.push(Tensor::floats("zeros.weight", "F32", &[64, 64], &[0.0; 4096]));
    tensors.push(Tensor::floats("one_value.weight", "F32", &[64, 64], &[0.125; 4096]));
    let checkpoint = checkpoint_of(&safetensors(&tensors));
    let work = tempfile::tempdir().expect("a directory");
    let (packed, unpacked) = (work.path().join("packed"), work.path().join("unpacked"));
    mcwcfs_ok(arguments!["pack", "--max-rel-mse", "0.01", "--force-requantize", checkpoint.path(), &packed]);
    let report =
        mcwcfs_ok(arguments!["verify", &packed, "--against", checkpoint.path(), "--max-rel-mse", "0.01", "--json"]);
    let report: serde_json::Value = serde_json::from_str(&report).expect("JSON");
    let differences = report["archives"][0]["files"][0]["differences"].as_array().expect("differences");
    assert!(!differences.is_empty(), "it is lossy: {report}");
    for exact in ["with_nan.weight", "ids", "fp8", "zeros.weight"] {
        let differs = differences.iter().any(|difference| difference["tensor"] == exact);
        assert!(!differs, "{exact} is bit-exact: {report}");
    }
    mcwcfs_ok(arguments!["unpack", &packed, &unpacked]);
    let mount = Mount::new(&packed, &[]);
    assert_same_directories(&unpacked, &mount.path);
}

#[test]
fn what_is_not_a_safetensors_file_is_refused_in_one_line() {
    let good = safetensors(&[Tensor::floats("a", "F32", &[2], &[1.0, 2.0])]);
    assert_refused(b"", &[]);
    assert_refused(b"PK\x03\x04 a zip file, which torch.save makes", &["header"]);
    assert_refused(&good[..good.len() - 1], &[]);
    assert_refused(&[&good, &b"trailing"[..]].concat(), &[]);
    assert_refused(&(1_u64 << 40).to_le_bytes(), &["header"]);
    assert_refused(&[&3_u64.to_le_bytes()[..], b"{]}"].concat(), &["header"]);
}

/// A file with this JSON header and `data_bytes` zeros.
fn with_header(json: &str, data_bytes: usize) -> Vec<u8> {
    [&(json.len() as u64).to_le_bytes(), json.as_bytes(), &vec![0; data_bytes]].concat()
}

#[test]
fn a_header_that_contradicts_itself_is_refused_with_the_tensor_and_the_field() {
    for (json, data_bytes) in [
        (r#"{"bad":{"dtype":"F32","shape":[2],"data_offsets":[0,4]}}"#, 4),
        (r#"{"bad":{"dtype":"F32","shape":[2],"data_offsets":[8,0]}}"#, 8),
        (r#"{"bad":{"dtype":"F32","shape":[2],"data_offsets":[4,12]}}"#, 12),
        (r#"{"bad":{"dtype":"F32","shape":[18446744073709551615,2],"data_offsets":[0,8]}}"#, 8),
        (
            r#"{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"bad":{"dtype":"F32","shape":[2],"data_offsets":[4,12]}}"#,
            12,
        ),
        (r#"{"bad":{"dtype":"F32","shape":[2]}}"#, 8),
        (r#"{"bad":{"dtype":"F32","shape":[-2],"data_offsets":[0,8]}}"#, 8),
    ] {
        assert_refused(&with_header(json, data_bytes), &["bad"]);
    }
    let twice = r#"{"bad":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"bad":{"dtype":"U8","shape":[1],"data_offsets":[1,2]}}"#;
    assert_refused(&with_header(twice, 2), &["bad"]);
    let nested = format!("{{\"bad\":{}1{}}}", "[".repeat(100_000), "]".repeat(100_000));
    assert_refused(&with_header(&nested, 0), &[]);
}

#[test]
fn nothing_that_exists_is_overwritten_without_force() {
    let checkpoint = tempfile::tempdir().expect("a directory");
    Bert::default().write(checkpoint.path());
    let work = tempfile::tempdir().expect("a directory");
    let (packed, unpacked) = (work.path().join("packed"), work.path().join("unpacked"));
    mcwcfs_ok(arguments!["pack", checkpoint.path(), &packed]);
    mcwcfs_ok(arguments!["unpack", &packed, &unpacked]);
    fs::write(unpacked.join("README.md"), "mine").expect("a changed file");
    for again in [arguments!["pack", checkpoint.path(), &packed], arguments!["unpack", &packed, &unpacked]] {
        let output = mcwcfs(&again);
        let message = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "{message}");
        assert!(message.contains("--force") && message.trim_end().lines().count() == 1, "{message}");
    }
    assert_eq!(fs::read(unpacked.join("README.md")).expect("still there"), b"mine");
    mcwcfs_ok(arguments!["unpack", "--force", &packed, &unpacked]);
    mcwcfs_ok(arguments!["pack", "--force", checkpoint.path(), &packed]);
    assert_same_directories(checkpoint.path(), &unpacked);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    /// Shapes, types and values drawn at random; unpacked only, a mount for each would take long.
    #[test]
    fn any_checkpoint_comes_back(seed: u64, tensors in 0_usize..6, layers in 1_usize..4) {
        let mut random = Random::new(seed);
        let mut made = Vec::new();
        for layer in 0..layers {
            for number in 0..tensors {
                let shape: Vec<usize> = (0..random.below(4)).map(|_| random.below(40)).collect();
                let elements = shape.iter().product();
                let name = format!("model.layers.{layer}.part{number}.weight");
                made.push(match random.below(6) {
                    0 => Tensor::raw(&name, "U8", &shape, random.bytes(elements)),
                    1 => Tensor::raw(&name, "BF16", &shape, random.bytes(2 * elements)),
                    2 => Tensor::floats(&name, "F16", &shape, &random.normals(elements, 0.1)),
                    3 => Tensor::floats(&name, "F64", &shape, &random.normals(elements, 3.0)),
                    4 => Tensor::floats(&name, "BF16", &shape, &random.normals(elements, 0.02)),
                    _ => Tensor::floats(&name, "F32", &shape, &random.normals(elements, 0.02)),
                });
            }
        }
        let checkpoint = checkpoint_of(&safetensors(&made));
        let work = tempfile::tempdir().expect("a directory");
        let (packed, unpacked) = (work.path().join("packed"), work.path().join("unpacked"));
        mcwcfs_ok(arguments!["pack", checkpoint.path(), &packed]);
        mcwcfs_ok(arguments!["unpack", &packed, &unpacked]);
        assert_same_directories(checkpoint.path(), &unpacked);
    }
}
