//! What goes wrong, and what must go on: many archives, strange names, few descriptors, archives that change under us.

use std::collections::BTreeMap;
use std::ffi::{OsStr, OsString};
use std::fs::{self, File};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::Command;
use std::thread;

use mcwcfs::fuse::MountOptions;

use crate::common::{Random, Tensor, mcwcfs_ok};
use crate::packed::{MODEL, Packed};
use crate::support::{InMemory, TestMount, errno, require_fuse};

/// A checkpoint of one small tensor.
fn small() -> Packed {
    Packed::tensors(&[Tensor::raw("bytes", "U8", &[1000], Random::new(1).bytes(1000))], &[])
}

/// `count` directories `0000/`, `0001/`, ... with an archive each, beside `packed/bert/`.
fn multiply(packed: &Packed, count: usize) {
    for number in 0..count {
        let directory = packed.path(&format!("packed/{number:04}"));
        fs::create_dir(&directory).unwrap();
        fs::copy(packed.archive(), directory.join("model.mcwc")).unwrap(); // no link: one file is opened once
    }
}

fn hard_descriptor_limit() -> u64 {
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: `limit` is a valid `rlimit` during the call.
    assert_eq!(unsafe { libc::getrlimit(libc::RLIMIT_NOFILE, &raw mut limit) }, 0);
    limit.rlim_max
}

#[test]
fn ten_thousand_archives_are_shown_without_decoding_and_stand_a_storm_of_stats() {
    require_fuse!();
    const ARCHIVES: usize = 10_000;
    if hard_descriptor_limit() < ARCHIVES as u64 + 500 {
        eprintln!("not tested: the limit of open files is too low here");
        return;
    }
    let packed = small();
    let expected = packed.expected(false);
    multiply(&packed, ARCHIVES);
    packed.mount(&[]);
    let model = |number: usize| packed.path(&format!("mnt/{number:04}")).join(MODEL);
    thread::scope(|scope| {
        for first in 0..8 {
            let (model, expected) = (&model, &expected);
            scope.spawn(move || {
                for number in (first..ARCHIVES).step_by(8) {
                    assert_eq!(fs::metadata(model(number)).unwrap().len(), expected.len() as u64);
                    let missing = model(number).with_file_name("missing.json");
                    assert_eq!(errno(fs::metadata(missing)), libc::ENOENT);
                }
            });
        }
    });
    let found = Command::new("find").arg(packed.path("mnt")).args(["-name", "*.safetensors"]).output().unwrap();
    assert_eq!(found.stdout.split(|&byte| byte == b'\n').filter(|line| !line.is_empty()).count(), ARCHIVES + 1);
    let status = mcwcfs_ok(["status".into(), "--json".into(), packed.path("mnt").into_os_string()]);
    let status: serde_json::Value = serde_json::from_str(&status).unwrap();
    assert_eq!(status["metrics"]["mcwcfs_decoded_bytes_total"], 0, "looking decodes nothing");
    assert_eq!(status["metrics"]["mcwcfs_archives"], ARCHIVES + 1);
    assert!(fs::read(model(ARCHIVES - 1)).unwrap() == expected);
}

#[test]
fn archives_for_which_there_is_no_descriptor_are_refused_and_the_others_served() {
    require_fuse!();
    let packed = small();
    let expected = packed.expected(false);
    multiply(&packed, 200);
    fs::write(packed.path("packed/config.json"), "{}").unwrap();
    let output = Command::new("prlimit")
        .args(["--nofile=100:100", env!("CARGO_BIN_EXE_mcwcfs"), "mount"])
        .args([packed.path("packed"), packed.path("mnt")])
        .arg("--log-file")
        .arg(packed.path("log"))
        .output()
        .unwrap();
    assert!(output.status.success(), "{output:?}");
    let shown: Vec<_> = (0..200)
        .map(|number| packed.path(&format!("mnt/{number:04}")).join(MODEL))
        .filter(|path| path.exists())
        .collect();
    assert!((10..100).contains(&shown.len()), "{}", shown.len());
    for path in shown {
        assert!(fs::read(path).unwrap() == expected);
    }
    let log = packed.log();
    assert!(log.contains("archive refused") && log.contains("Too many open files"), "{log}");
}

#[test]
fn an_archive_that_is_cut_while_it_is_mounted_gives_errors_and_takes_no_other_away() {
    require_fuse!();
    let packed = Packed::bert(&[]);
    let expected = packed.expected(false);
    fs::copy(packed.archive(), packed.path("packed/sound.mcwc")).unwrap();
    packed.mount(&["--no-supervisor", "--rescan", "0"]);
    let file = File::open(packed.model()).unwrap();
    let length = fs::metadata(packed.archive()).unwrap().len();
    File::options().write(true).open(packed.archive()).unwrap().set_len(length / 2).unwrap();
    let mut failures = 0;
    for from in (0..expected.len()).step_by(64 << 10) {
        let mut out = vec![0; (64 << 10).min(expected.len() - from)];
        match file.read_exact_at(&mut out, from as u64) {
            Ok(()) => assert!(out == expected[from..][..out.len()], "wrong bytes from {from}"),
            Err(error) => {
                assert_eq!(error.raw_os_error(), Some(libc::EIO));
                failures += 1;
            }
        }
    }
    assert!(failures > 0);
    assert!(fs::read(packed.path("mnt").join(MODEL)).unwrap() == expected);
    let log = packed.log();
    assert!(log.lines().any(|line| line.contains("read failed") && line.contains("bert/model.mcwc")), "{log}");
}

#[test]
fn names_of_any_bytes_and_any_length_are_shown_as_they_are() {
    require_fuse!();
    let mut long = OsString::from("l".repeat(255 - ".safetensors".len()));
    long.push(".safetensors");
    let names: Vec<OsString> = vec![
        long,
        OsString::from("ü".repeat(127)),
        OsString::from("模型 🦀 \n\t\\ \" '"),
        OsString::from_vec(vec![b'x', 0xff, 0xfe, b'y']),
        OsString::from(" "),
        OsString::from("-rf"),
        OsString::from("e\u{301}"), // not the same name as the next
        OsString::from("\u{e9}"),
    ];
    let mount = TestMount::with(BTreeMap::new(), &MountOptions::default(), |source| {
        for name in &names {
            fs::create_dir(source.join(name)).unwrap();
            fs::write(source.join(name).join(name), name.as_bytes()).unwrap();
        }
    });
    let list = |directory: &Path| {
        let mut names: Vec<_> = fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        names.sort();
        names
    };
    let mut sorted = names.clone();
    sorted.sort();
    assert_eq!(list(&mount.path("")), sorted);
    for name in &names {
        let directory = mount.path("").join(name);
        assert_eq!(list(&directory), [name.as_os_str()]);
        assert_eq!(OsStr::from_bytes(&fs::read(directory.join(name)).unwrap()), name);
    }
    assert_eq!(errno(fs::metadata(mount.path(&"n".repeat(256)))), libc::ENAMETOOLONG);
}

#[test]
fn archived_files_keep_their_names_whatever_they_are() {
    require_fuse!();
    let long = format!("{}.safetensors", "l".repeat(255 - ".safetensors".len()));
    let names = [long.as_str(), "模型 🦀.safetensors", "a b'c\".safetensors"];
    let checkpoint = InMemory::new(&names, 100_000);
    let expected: Vec<_> = (0..names.len()).map(|index| checkpoint.bytes(index)).collect();
    let mount = TestMount::with(BTreeMap::from([("dé/x.mcwc", checkpoint)]), &MountOptions::default(), |_| {});
    for (name, bytes) in names.iter().zip(expected) {
        assert!(fs::read(mount.path("dé").join(name)).unwrap() == bytes, "{name}");
    }
}
