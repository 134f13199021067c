//! What `mcwc-pack` wrote, mounted by `mcwcfs mount`: the original's bytes, or for a lossy archive those of `unpack`.

use std::fs::{self, OpenOptions};
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::Path;

use sha2::{Digest, Sha256};

use crate::common::{Bert, Random, assert_same_directories, safetensors};
use crate::packed::{MODEL, Packed};
use crate::support::{errno, extended_attribute, require_fuse};

const INDEX: &str = "model.safetensors.index.json";

fn hexadecimal_sha256(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect()
}

#[test]
fn a_lossless_checkpoint_is_mounted_as_it_was_to_the_byte() {
    require_fuse!();
    let packed = Packed::bert(&[]);
    packed.mount(&[]);
    assert_same_directories(&packed.original(), &packed.mounted());
    let bytes = fs::read(packed.original().join(MODEL)).unwrap();
    let attribute = |name| extended_attribute(&packed.mounted().join(MODEL), name).unwrap();
    assert_eq!(attribute("user.mcwc.sha256"), hexadecimal_sha256(&bytes));
    assert_eq!(attribute("user.mcwc.source_sha256"), hexadecimal_sha256(&bytes));
    assert_eq!(attribute("user.mcwc.lossy"), "false");
    assert_eq!(attribute("user.mcwc.stored_bytes"), fs::metadata(packed.archive()).unwrap().len().to_string());
    packed.umount();
}

#[test]
fn a_lossy_checkpoint_mounts_as_it_unpacks() {
    require_fuse!();
    let packed = Packed::bert(&["--bpp", "6"]);
    let (expected, original) = (packed.expected(true), packed.expected(false));
    packed.mount(&[]);
    let shown = fs::read(packed.mounted().join(MODEL)).unwrap();
    assert!(shown == expected);
    assert!(shown != original && shown.len() == original.len());
    let attribute = |name| extended_attribute(&packed.mounted().join(MODEL), name).unwrap();
    assert_eq!(attribute("user.mcwc.sha256"), hexadecimal_sha256(&shown));
    assert_eq!(attribute("user.mcwc.source_sha256"), hexadecimal_sha256(&original));
    assert_eq!(attribute("user.mcwc.lossy"), "true");
}

#[test]
fn every_range_reads_the_same_however_small_the_cache() {
    require_fuse!();
    for (options, is_lossy) in [(&[][..], false), (&["--bpp", "6"][..], true)] {
        let packed = Packed::bert(options);
        let expected = packed.expected(is_lossy);
        for cache in ["0", "100K", "1G"] {
            packed.mount(&["--cache-size", cache]);
            let path = packed.mounted().join(MODEL);
            let file = OpenOptions::new().read(true).custom_flags(libc::O_DIRECT).open(path).unwrap();
            let mut random = Random::new(3);
            for _ in 0..200 {
                let from = random.below(expected.len());
                let length = random.below(expected.len() - from) + 1;
                let mut out = vec![0; length];
                file.read_exact_at(&mut out, from as u64).unwrap();
                assert!(out == expected[from..][..length], "bytes {from}..{} with a cache of {cache}", from + length);
            }
            drop(file);
            packed.umount();
        }
    }
}

#[test]
fn shards_are_shown_with_their_index_and_a_remount_changes_no_inode() {
    require_fuse!();
    let packed = Packed::empty();
    let tensors = Bert::default().tensors();
    let (first, second) = tensors.split_at(tensors.len() / 2);
    let mut entries = Vec::new();
    for (shard, tensors) in [("model-00001-of-00002.safetensors", first), ("model-00002-of-00002.safetensors", second)]
    {
        fs::write(packed.original().join(shard), safetensors(tensors)).unwrap();
        entries.extend(tensors.iter().map(|tensor| format!("{:?}: {shard:?}", tensor.name)));
    }
    fs::write(packed.original().join(INDEX), format!("{{\"weight_map\": {{{}}}}}", entries.join(", "))).unwrap();
    packed.pack(&[]);
    let identities = |directory: &Path| -> Vec<_> {
        let files = crate::common::files_below(directory);
        let metadata = files.iter().map(|file| fs::metadata(directory.join(file)).unwrap());
        metadata.map(|metadata| (metadata.ino(), metadata.mtime(), metadata.mtime_nsec(), metadata.len())).collect()
    };
    packed.mount(&[]);
    assert_same_directories(&packed.original(), &packed.mounted());
    let before = identities(&packed.mounted());
    packed.umount();
    packed.mount(&[]);
    assert_eq!(identities(&packed.mounted()), before);
}

#[test]
fn a_damaged_archive_gives_errors_or_the_right_bytes_and_one_line_in_the_log() {
    require_fuse!();
    let packed = Packed::bert(&[]);
    let expected = packed.expected(false);
    fs::copy(packed.archive(), packed.path("packed/sound.mcwc")).unwrap();
    let mut stored = fs::read(packed.archive()).unwrap();
    let middle = stored.len() / 2;
    stored[middle] ^= 0x10;
    fs::write(packed.archive(), stored).unwrap();
    packed.mount(&[]);
    assert!(fs::read(packed.path("mnt").join(MODEL)).unwrap() == expected, "the sound copy is not affected");
    let path = packed.mounted().join(MODEL);
    let file = OpenOptions::new().read(true).custom_flags(libc::O_DIRECT).open(&path).unwrap();
    let mut failures = 0;
    for from in (0..expected.len()).step_by(4096) {
        let mut out = vec![0; 4096.min(expected.len() - from)];
        for _ in 0..2 {
            match file.read_exact_at(&mut out, from as u64) {
                Ok(()) => assert!(out == expected[from..][..out.len()], "wrong bytes from {from}"),
                Err(error) => {
                    assert_eq!(error.raw_os_error(), Some(libc::EIO));
                    failures += 1;
                }
            }
        }
    }
    assert!(failures > 0);
    let log = packed.log();
    let lines: Vec<&str> = log.lines().filter(|line| line.contains("read failed")).collect();
    assert_eq!(lines.len(), 1, "{log}");
    for part in ["bert/model.safetensors", "model.mcwc", "record", "CRC"] {
        assert!(lines[0].contains(part), "{part} in: {}", lines[0]);
    }
}

#[test]
fn a_truncated_archive_is_left_out_with_a_line_that_names_it() {
    require_fuse!();
    let packed = Packed::bert(&[]);
    let stored = fs::read(packed.archive()).unwrap();
    fs::write(packed.archive(), &stored[..stored.len() - 1]).unwrap();
    packed.mount(&[]);
    assert_eq!(errno(fs::metadata(packed.mounted().join(MODEL))), libc::ENOENT);
    assert!(packed.mounted().join("config.json").exists());
    let log = packed.log();
    let line = log.lines().find(|line| line.contains("archive refused: bert/model.mcwc")).expect("a line names it");
    assert!(line.contains("expected"), "{line}");
}
