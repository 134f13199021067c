use std::os::unix::fs::symlink;

use super::*;
use crate::safetensors::{NewTensor, write_file};
use crate::tensor::Dtype;

fn safetensors(names: &[&str]) -> Vec<u8> {
    let tensor = |name| NewTensor { name, dtype: Dtype::U8, shape: &[3], bytes: &[1, 2, 3] };
    let tensors: Vec<_> = names.iter().copied().map(tensor).collect();
    write_file(&tensors, &[]).unwrap()
}

fn directory(files: &[(&str, &[u8])]) -> tempfile::TempDir {
    let directory = tempfile::tempdir().unwrap();
    for (name, bytes) in files {
        let path = directory.path().join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, bytes).unwrap();
    }
    directory
}

fn refusal(directory: &tempfile::TempDir) -> String {
    let message = Checkpoint::open(directory.path()).unwrap_err().to_string();
    message.replace(&format!("{}/", directory.path().display()), "")
}

#[test]
fn a_directory_is_tensor_files_and_sidecars() {
    let (first, second, own) = (safetensors(&["a"]), safetensors(&["b"]), safetensors(&["a"]));
    let index = br#"{"weight_map":{"a":"m-1.safetensors","b":"m-2.safetensors"}}"#;
    let directory = directory(&[
        ("m-2.safetensors", &second),
        ("m-1.safetensors", &first),
        ("adapter.safetensors", &own),
        ("model.safetensors.index.json", index),
        ("config.json", br#"{"model_type":"bert","num_attention_heads":2}"#),
        ("1_Pooling/config.json", b"{}"),
        ("vae/x.safetensors", b"carried as it is"),
        (".git/HEAD", b"ref"),
        ("old.mcwc", b"archive"),
        ("README.md", b"words"),
    ]);
    symlink("README.md", directory.path().join("LICENSE")).unwrap();
    symlink("nowhere", directory.path().join("dangling")).unwrap();
    symlink("..", directory.path().join("1_Pooling/circle")).unwrap();
    symlink("/", directory.path().join("outside")).unwrap();

    let checkpoint = Checkpoint::open(directory.path()).unwrap();
    let files: Vec<_> = checkpoint.files.iter().map(|file| (file.name.as_str(), file.model)).collect();
    assert_eq!(files, [("adapter.safetensors", 1), ("m-1.safetensors", 0), ("m-2.safetensors", 0)]);
    let sidecars: Vec<_> = checkpoint.sidecars.iter().map(|sidecar| sidecar.name.to_str().unwrap()).collect();
    assert_eq!(
        sidecars,
        [
            "1_Pooling/config.json",
            "LICENSE",
            "README.md",
            "config.json",
            "model.safetensors.index.json",
            "vae/x.safetensors"
        ]
    );
    assert_eq!(checkpoint.config.as_ref().unwrap().attention_heads, Some(2));
    assert_eq!(checkpoint.parameters(), 9);
    assert_eq!(checkpoint.files[1].tensor_bytes(0), [1, 2, 3]);
    checkpoint.files[1].release(0);
    assert_eq!(checkpoint.files[1].tensor_bytes(0), [1, 2, 3]);
    let expected: [u8; 32] = Sha256::digest(&first).into();
    assert_eq!(checkpoint.files[1].sha256().unwrap(), expected);
}

#[test]
fn a_single_file_takes_the_description_beside_it_and_no_sidecars() {
    let directory = directory(&[("m.safetensors", &safetensors(&["a"])), ("config.json", br#"{"model_type":"vit"}"#)]);
    let checkpoint = Checkpoint::open(&directory.path().join("m.safetensors")).unwrap();
    assert!(checkpoint.sidecars.is_empty());
    assert_eq!(checkpoint.config.unwrap().model_type.as_deref(), Some("vit"));
}

#[test]
fn a_description_that_cannot_be_read_is_no_obstacle() {
    let directory = directory(&[("m.safetensors", &safetensors(&["a"])), ("config.json", b"{")]);
    assert_eq!(Checkpoint::open(directory.path()).unwrap().config, None);
}

#[test]
fn errors_name_file_field_and_expectation() {
    let whole = safetensors(&["a"]);
    let index = br#"{"weight_map":{"a":"m.safetensors","b":"m.safetensors"}}"#;
    assert!(refusal(&directory(&[("README.md", b"")])).contains("no .safetensors file in this directory"));
    assert_eq!(
        refusal(&directory(&[("x.safetensors.index.json", index)])),
        "x.safetensors.index.json: weight_map: shard `m.safetensors` of tensor `a` is not in the directory"
    );
    assert_eq!(
        refusal(&directory(&[("x.safetensors.index.json", index), ("m.safetensors", &whole)])),
        "x.safetensors.index.json: weight_map: tensor `b` is not in shard `m.safetensors`"
    );
    assert_eq!(
        refusal(&directory(&[("x.safetensors.index.json", b"[]"), ("m.safetensors", &whole)])).split(" at ").next(),
        Some("x.safetensors.index.json: index: invalid length 0, expected an object with a weight_map")
    );
    let cut = &whole[..whole.len() - 1];
    let message = refusal(&directory(&[("m.safetensors", cut)]));
    assert!(message.starts_with("m.safetensors: file length: "), "{message}");
    let message = refusal(&directory(&[("m.safetensors", b"")]));
    assert_eq!(message, "m.safetensors: header length: needs 8 bytes, the file has 0 there");
    let gone = tempfile::tempdir().unwrap().path().to_owned();
    assert!(Checkpoint::open(&gone).unwrap_err().to_string().contains("No such file"));
}
