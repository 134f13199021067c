//! The file system on real directories, with checkpoints in memory in place of archives.

mod rescan;

use std::fs;
use std::os::unix::fs::symlink;
use std::path::PathBuf;
use std::sync::Arc;

use super::*;
use crate::archive::ArchivedFile;
use crate::tensor::{Dtype, TensorInfo};

/// An "archive" whose bytes say which files it holds: `name=bytes` separated by blanks, or `broken`.
#[derive(Debug)]
struct Fake {
    files: Vec<ArchivedFile>,
    data: Vec<Vec<u8>>,
    stored_bytes: u64,
}

impl Fake {
    fn open(path: &Path) -> Result<Self, BoxError> {
        let text = fs::read_to_string(path)?;
        if text == "panic" {
            panic!("a bug in the parser");
        }
        let mut fake = Self { files: Vec::new(), data: Vec::new(), stored_bytes: text.len() as u64 };
        for word in text.split_whitespace() {
            let (name, data) = word.split_once('=').ok_or("index: expected `=`")?;
            let header = b"HEADER".to_vec();
            let tensors = vec![TensorInfo {
                name: "only".to_owned(),
                dtype: Dtype::U8,
                shape: vec![data.len() as u64],
                offset_bytes: 0,
                length_bytes: data.len() as u64,
            }];
            let length_bytes = (header.len() + data.len()) as u64;
            let digest = [data.len() as u8; 32];
            let (decoded_sha256, source_sha256) = (digest, digest);
            let name = name.to_owned();
            fake.files.push(ArchivedFile { name, header, tensors, length_bytes, decoded_sha256, source_sha256 });
            fake.data.push(data.as_bytes().to_vec());
        }
        Ok(fake)
    }
}

impl Checkpoint for Fake {
    fn content_id(&self) -> [u8; 32] {
        [self.data.iter().flatten().fold(0, |sum: u8, byte| sum.wrapping_mul(31).wrapping_add(*byte)); 32]
    }

    fn stored_bytes(&self) -> u64 {
        self.stored_bytes
    }

    fn parameters(&self) -> u64 {
        self.data.iter().map(|data| data.len() as u64).sum()
    }

    fn is_lossy(&self) -> bool {
        false
    }

    fn files(&self) -> &[ArchivedFile] {
        &self.files
    }

    fn decode_ahead(&self, _: usize, _: u64, _: u64, _: Keeper) {}

    /// `bad` fails as a damaged record does, `short` as a decoder does that loses bytes.
    fn read(&self, file: usize, offset_bytes: u64, _: Keeper, out: &mut [u8]) -> Result<usize, BoxError> {
        match self.data[file].as_slice() {
            b"bad" => Err("record 3: CRC-32C".into()),
            b"short" => Ok(out.len() - 1),
            data => {
                let whole = [b"HEADER", data].concat();
                out.copy_from_slice(&whole[offset_bytes as usize..][..out.len()]);
                Ok(out.len())
            }
        }
    }
}

/// A source directory with the given files, and the tree shown for it.
fn tree(files: &[(&str, &str)]) -> (tempfile::TempDir, Vfs) {
    let directory = tempfile::tempdir().unwrap();
    for (path, content) in files {
        let path = directory.path().join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, content).unwrap();
    }
    let vfs = Vfs::open(directory.path(), Fake::open).unwrap();
    (directory, vfs)
}

fn find(vfs: &Vfs, path: &str) -> Result<Attributes, VfsError> {
    let mut attributes = vfs.attributes(Inode::ROOT)?;
    for name in Path::new(path) {
        attributes = vfs.lookup(attributes.inode, name)?;
    }
    Ok(attributes)
}

fn names(vfs: &Vfs, path: &str) -> Vec<String> {
    let entries = vfs.directory(find(vfs, path).unwrap().inode).unwrap();
    entries.iter().map(|entry| entry.name.to_str().unwrap().to_owned()).collect()
}

/// Fills `out` as far as the file goes.
fn fill(vfs: &Vfs, inode: Inode, offset_bytes: u64, out: &mut [u8]) -> Result<usize, VfsError> {
    let bytes = vfs.read(inode, offset_bytes, out.len(), Keeper::Reader, |length| vec![0xaa; length])?;
    out[..bytes.len()].copy_from_slice(&bytes);
    Ok(bytes.len())
}

fn content(vfs: &Vfs, path: &str) -> Result<Vec<u8>, VfsError> {
    let attributes = find(vfs, path)?;
    let mut out = vec![0xaa; attributes.length_bytes as usize + 10];
    let length = fill(vfs, attributes.inode, 0, &mut out)?;
    out.truncate(length);
    Ok(out)
}

#[test]
fn an_archive_shows_its_files_where_it_lies_and_hides_itself() {
    let (_source, vfs) = tree(&[
        ("model/weights.mcwc", "model-1.safetensors=abc model-2.safetensors=defg"),
        ("model/config.json", "{}"),
        ("README.md", "hello"),
        (".mcwc-pack-a1b2c3.partial", "being written"),
    ]);
    assert_eq!(names(&vfs, ""), ["README.md", "model"]);
    assert_eq!(names(&vfs, "model"), ["config.json", "model-1.safetensors", "model-2.safetensors"]);
    assert_eq!(content(&vfs, "model/model-2.safetensors").unwrap(), b"HEADERdefg");
    assert_eq!(content(&vfs, "model/config.json").unwrap(), b"{}");
    assert_eq!(vfs.totals(), Totals { inodes: 6, bytes: 9 + 10 + 2 + 5, archives: 1, refused_archives: 0 });
}

#[test]
fn a_broken_archive_takes_nothing_else_away() {
    let (_source, vfs) = tree(&[
        ("a.mcwc", "broken"),
        ("b.mcwc", "b.safetensors=x"),
        ("c.mcwc", "panic"),
        ("d.mcwc", "../d.safetensors=x"),
        ("e.mcwc", "e.safetensors=x e.safetensors=y"),
    ]);
    assert_eq!(names(&vfs, ""), ["b.safetensors"]);
    assert_eq!(vfs.totals().refused_archives, 4);
}

#[test]
fn two_archives_with_a_file_of_one_name_are_never_mixed() {
    let (_source, vfs) = tree(&[
        ("a.mcwc", "m-1.safetensors=a1 m-2.safetensors=a2"),
        ("b.mcwc", "m-2.safetensors=b2 m-3.safetensors=b3"),
    ]);
    assert_eq!(names(&vfs, ""), ["m-1.safetensors", "m-2.safetensors"]);
    assert_eq!(content(&vfs, "m-2.safetensors").unwrap(), b"HEADERa2");
    assert_eq!((vfs.totals().archives, vfs.totals().refused_archives), (1, 1));
}

#[test]
fn an_archived_file_wins_over_a_sidecar_of_its_name() {
    let (_source, vfs) = tree(&[("m.mcwc", "m.safetensors=packed"), ("m.safetensors", "original")]);
    assert_eq!(content(&vfs, "m.safetensors").unwrap(), b"HEADERpacked");
}

#[test]
fn a_shard_index_is_shown_only_with_all_its_shards() {
    let index = r#"{"weight_map":{"x":"m-1.safetensors","y":"m-2.safetensors"}}"#;
    let (_source, vfs) = tree(&[
        ("whole/m.safetensors.index.json", index),
        ("whole/m.mcwc", "m-1.safetensors=a m-2.safetensors=b"),
        ("mixed/m.safetensors.index.json", index),
        ("mixed/m.mcwc", "m-1.safetensors=a"),
        ("mixed/m-2.safetensors", "kept as it was"),
        ("lacking/m.safetensors.index.json", index),
        ("lacking/m.mcwc", "m-1.safetensors=a"),
        ("refused/m.safetensors.index.json", index),
        ("refused/m.mcwc", "broken"),
        ("unreadable/m.safetensors.index.json", "{"),
        ("directory/m.safetensors.index.json", index),
        ("directory/m.mcwc", "m-1.safetensors=a"),
        ("directory/m-2.safetensors/file", ""),
    ]);
    for (path, is_shown) in [
        ("whole", true),
        ("mixed", true),
        ("lacking", false),
        ("refused", false),
        ("unreadable", false),
        ("directory", false),
    ] {
        assert_eq!(find(&vfs, &format!("{path}/m.safetensors.index.json")).is_ok(), is_shown, "{path}");
    }
}

#[test]
fn reads_end_where_the_file_ends() {
    let (_source, vfs) = tree(&[("m.mcwc", "m.safetensors=0123456789"), ("sidecar", "0123456789")]);
    for (path, length) in [("m.safetensors", 16), ("sidecar", 10)] {
        let inode = find(&vfs, path).unwrap().inode;
        let mut out = [0; 8];
        assert_eq!(fill(&vfs, inode, length - 3, &mut out).unwrap(), 3, "{path}");
        assert_eq!(&out[..3], b"789");
        for past in [length, length + 1, u64::MAX] {
            assert_eq!(fill(&vfs, inode, past, &mut out).unwrap(), 0, "{path}");
        }
        assert_eq!(fill(&vfs, inode, 0, &mut []).unwrap(), 0);
    }
}

#[test]
fn the_header_is_resident_and_nothing_past_it() {
    let (_source, vfs) = tree(&[("m.mcwc", "m.safetensors=bad"), ("sidecar", "HEADER")]);
    let inode = find(&vfs, "m.safetensors").unwrap().inode;
    assert_eq!(vfs.resident(inode, 0, 6, Keeper::Reader).as_deref(), Some(&b"HEADER"[..]));
    assert_eq!(vfs.resident(inode, 2, 3, Keeper::Reader).as_deref(), Some(&b"ADE"[..]));
    assert!(vfs.resident(inode, 2, 5, Keeper::Reader).is_none());
    assert!(vfs.resident(inode, u64::MAX, 1, Keeper::Reader).is_none());
    assert!(vfs.resident(find(&vfs, "sidecar").unwrap().inode, 0, 1, Keeper::Reader).is_none());
    assert!(vfs.resident(Inode::ROOT, 0, 1, Keeper::Reader).is_none());
}

#[test]
fn a_decoder_that_fails_or_loses_bytes_is_an_error_that_names_the_file() {
    let (_source, vfs) = tree(&[("d/a.mcwc", "a.safetensors=bad"), ("d/b.mcwc", "b.safetensors=short")]);
    let message = content(&vfs, "d/a.safetensors").unwrap_err().to_string();
    assert_eq!(message, "d/a.safetensors: record 3: CRC-32C");
    let message = content(&vfs, "d/b.safetensors").unwrap_err().to_string();
    assert_eq!(message, "d/b.safetensors: 10 bytes decoded at byte 0, expected 11");
}

#[test]
fn inodes_are_the_same_after_every_listing() {
    let files = [("a/m.mcwc", "m.safetensors=x"), ("a/b/config.json", "{}"), ("a/b/c/d", "")];
    let (source, vfs) = tree(&files);
    let again = Vfs::open(source.path(), Fake::open).unwrap();
    for path in ["a", "a/m.safetensors", "a/b", "a/b/config.json", "a/b/c", "a/b/c/d"] {
        assert_eq!(find(&vfs, path).unwrap(), find(&again, path).unwrap(), "{path}");
    }
    let (_elsewhere, other_host) = tree(&files);
    let inode = |vfs: &Vfs| find(vfs, "a/m.safetensors").unwrap().inode;
    assert_eq!(inode(&vfs), inode(&other_host));
}

#[test]
fn another_content_is_another_inode() {
    let (_one, one) = tree(&[("m.mcwc", "m.safetensors=x")]);
    let (_two, two) = tree(&[("m.mcwc", "m.safetensors=y")]);
    assert_ne!(find(&one, "m.safetensors").unwrap().inode, find(&two, "m.safetensors").unwrap().inode);
}

#[test]
fn archived_files_carry_the_time_of_their_archive() {
    let (source, vfs) = tree(&[("m.mcwc", "m.safetensors=x")]);
    let archive = fs::metadata(source.path().join("m.mcwc")).unwrap().modified().unwrap();
    assert_eq!(find(&vfs, "m.safetensors").unwrap().modified, archive);
}

#[test]
fn links_stay_inside_the_tree_or_are_left_out() {
    let outside = tempfile::tempdir().unwrap();
    fs::write(outside.path().join("secret"), "not ours").unwrap();
    let source = tempfile::tempdir().unwrap();
    let root = source.path();
    fs::create_dir_all(root.join("snapshots/main")).unwrap();
    fs::create_dir_all(root.join("blobs")).unwrap();
    fs::write(root.join("blobs/1"), "{}").unwrap();
    fs::write(root.join("blobs/2"), "m.safetensors=x").unwrap();
    let link = |target: &str, name: &str| symlink(target, root.join("snapshots/main").join(name)).unwrap();
    link("../../blobs/1", "config.json");
    link("../../blobs/2", "m.mcwc");
    link("../../blobs", "directory");
    link("../..", "cycle");
    link(root.join("blobs/1").to_str().unwrap(), "absolute");
    link(outside.path().to_str().unwrap(), "escape-directory");
    link(outside.path().join("secret").to_str().unwrap(), "escape-file");
    link("../../../../../../../../../../etc/hostname", "escape-dots");
    link("nothing", "dangling");
    link("loop", "loop");

    let vfs = Vfs::open(root, Fake::open).unwrap();
    assert_eq!(names(&vfs, "snapshots/main"), ["absolute", "config.json", "cycle", "directory", "m.safetensors"]);
    assert_eq!(content(&vfs, "snapshots/main/config.json").unwrap(), b"{}");
    assert_eq!(content(&vfs, "snapshots/main/absolute").unwrap(), b"{}");
    assert_eq!(content(&vfs, "snapshots/main/m.safetensors").unwrap(), b"HEADERx");
    for (name, target) in [("directory", "../../blobs"), ("cycle", "../..")] {
        let attributes = find(&vfs, &format!("snapshots/main/{name}")).unwrap();
        assert_eq!(attributes.kind, Kind::Link);
        assert_eq!(vfs.link_target(attributes.inode).unwrap(), Path::new(target));
        assert_eq!(attributes.length_bytes, target.len() as u64);
    }
}

#[test]
fn what_is_neither_file_nor_directory_is_left_out() {
    let source = tempfile::tempdir().unwrap();
    let _socket = std::os::unix::net::UnixListener::bind(source.path().join("socket")).unwrap();
    fs::write(source.path().join("file"), "").unwrap();
    let vfs = Vfs::open(source.path(), Fake::open).unwrap();
    assert_eq!(names(&vfs, ""), ["file"]);
}

#[test]
fn names_that_are_no_unicode_pass_through() {
    use std::os::unix::ffi::OsStringExt;
    let source = tempfile::tempdir().unwrap();
    let name = OsString::from_vec(b"\xff\xfe.bin".to_vec());
    fs::write(source.path().join(&name), "bytes").unwrap();
    let vfs = Vfs::open(source.path(), Fake::open).unwrap();
    let inode = vfs.lookup(Inode::ROOT, &name).unwrap().inode;
    let mut out = [0; 5];
    assert_eq!(fill(&vfs, inode, 0, &mut out).unwrap(), 5);
}

#[test]
fn attributes_tell_what_a_checkpoint_is_without_decoding() {
    let (_source, vfs) = tree(&[("m.mcwc", "m.safetensors=bad"), ("sidecar", "")]);
    let inode = find(&vfs, "m.safetensors").unwrap().inode;
    let value = |name: &str| vfs.extended_attribute(inode, OsStr::new(name));
    assert_eq!(value("user.mcwc.sha256").unwrap(), "03".repeat(32));
    assert_eq!(value("user.mcwc.lossy").unwrap(), "false");
    assert_eq!(value("user.mcwc.stored_bytes").unwrap(), "17");
    assert_eq!(value("user.mcwc.bpp").unwrap(), "45.3333");
    assert!(matches!(value("security.capability"), Err(VfsError::NoSuchAttribute)));
    assert_eq!(vfs.extended_attribute_names(inode).unwrap().len(), 5);
    let sidecar = find(&vfs, "sidecar").unwrap().inode;
    assert!(vfs.extended_attribute_names(sidecar).unwrap().is_empty());
    assert!(vfs.extended_attribute(sidecar, OsStr::new("user.mcwc.sha256")).is_err());
}

#[test]
fn a_source_that_is_no_directory_is_refused_by_name() {
    let source = tempfile::tempdir().unwrap();
    let file = source.path().join("file");
    fs::write(&file, "").unwrap();
    for path in [file, source.path().join("missing"), PathBuf::from("")] {
        let message = Vfs::open(&path, Fake::open).unwrap_err().to_string();
        assert!(message.starts_with("source "), "{message}");
    }
}

#[test]
fn many_readers_share_one_tree() {
    let (_source, vfs) = tree(&[("m.mcwc", "m.safetensors=0123456789")]);
    let vfs = Arc::new(vfs);
    let inode = find(&vfs, "m.safetensors").unwrap().inode;
    std::thread::scope(|scope| {
        for from in 0..16_usize {
            let vfs = Arc::clone(&vfs);
            scope.spawn(move || {
                let mut out = [0; 16];
                let length = fill(&vfs, inode, from as u64, &mut out).unwrap();
                assert_eq!(&out[..length], &b"HEADER0123456789"[from..]);
            });
        }
    });
}
