//! The contract, line by line.

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt, PermissionsExt, symlink};
use std::path::Path;
use std::sync::atomic::Ordering;

use mcwcfs::fuse::MountOptions;
use memmap2::{Advice, MmapOptions};

use crate::support::{InMemory, TestMount, c_path, checked, errno, extended_attribute, names, require_fuse, seek};

const MODEL: &str = "model.safetensors";
/// Some pages, and not a whole number of them.
const DATA_BYTES: usize = 3 * 1024 * 1024 + 1234;

fn model() -> InMemory {
    InMemory::new(&[MODEL], DATA_BYTES)
}

#[test]
fn line_01_sizes_are_exact_before_any_decode() {
    require_fuse!();
    let checkpoint = model();
    let decodes = checkpoint.decodes.clone();
    let mount = TestMount::of(checkpoint);
    let metadata = fs::metadata(mount.path(MODEL)).unwrap();
    assert_eq!(metadata.len(), 24 + DATA_BYTES as u64);
    assert_eq!(metadata.blocks(), metadata.len().div_ceil(512));
    assert_eq!(fs::metadata(mount.path("config.json")).unwrap().blocks(), 1);
    assert_eq!(extended_attribute(&mount.path(MODEL), "user.mcwc.stored_bytes").unwrap(), "1000");
    assert_eq!(decodes.load(Ordering::Relaxed), 0);
}

#[test]
fn line_02_inodes_and_times_are_stable_across_remounts() {
    require_fuse!();
    let identity = |path: &Path| {
        let metadata = fs::metadata(path).unwrap();
        (metadata.ino(), metadata.mtime(), metadata.mtime_nsec(), metadata.ctime(), metadata.ctime_nsec())
    };
    let packed_at = std::time::SystemTime::UNIX_EPOCH + std::time::Duration::from_secs(1_700_000_000);
    let observe = || {
        let archives = BTreeMap::from([("a/model.mcwc", model())]);
        let mount = TestMount::with(archives, &MountOptions::default(), |source| {
            fs::write(source.join("a/config.json"), "{}").unwrap();
            for name in ["a/config.json", "a/model.mcwc"] {
                File::options().write(true).open(source.join(name)).unwrap().set_modified(packed_at).unwrap();
            }
        });
        let path = mount.path("a").join(MODEL);
        assert_eq!(fs::metadata(&path).unwrap().nlink(), 1);
        assert_eq!(fs::metadata(&path).unwrap().modified().unwrap(), packed_at);
        (identity(&path), identity(&mount.path("a/config.json")), fs::metadata(mount.path("a")).unwrap().ino())
    };
    assert_eq!(observe(), observe());
}

#[test]
fn line_03_modes_and_owners_are_the_mounts() {
    require_fuse!();
    let make_private = |source: &Path| {
        fs::write(source.join("config.json"), "{}").unwrap();
        for name in ["config.json", "model.mcwc"] {
            fs::set_permissions(source.join(name), fs::Permissions::from_mode(0o600)).unwrap();
        }
    };
    let archives = || BTreeMap::from([("model.mcwc", model())]);
    let mode = |mount: &TestMount, name: &str| fs::metadata(mount.path(name)).unwrap().mode() & 0o7777;

    let mount = TestMount::with(archives(), &MountOptions::default(), make_private);
    assert_eq!((mode(&mount, MODEL), mode(&mount, "config.json"), mode(&mount, "")), (0o444, 0o444, 0o555));

    let options = MountOptions { uid: 12, gid: 34, file_mode: 0o440, directory_mode: 0o550, ..MountOptions::default() };
    let mount = TestMount::with(archives(), &options, make_private);
    assert_eq!((mode(&mount, MODEL), mode(&mount, "")), (0o440, 0o550));
    let metadata = fs::metadata(mount.path(MODEL)).unwrap();
    assert_eq!((metadata.uid(), metadata.gid()), (12, 34));
}

#[test]
fn line_04_a_second_open_finds_the_pages_of_the_first() {
    require_fuse!();
    let checkpoint = model();
    let (decodes, bytes) = (checkpoint.decodes.clone(), checkpoint.bytes(0));
    let mount = TestMount::of(checkpoint);
    assert!(fs::read(mount.path(MODEL)).unwrap() == bytes);
    let after_first = decodes.load(Ordering::Relaxed);
    assert!(after_first > 0);
    assert!(fs::read(mount.path(MODEL)).unwrap() == bytes);
    assert_eq!(decodes.load(Ordering::Relaxed), after_first);
}

#[test]
fn line_05_private_and_shared_maps_show_the_file() {
    require_fuse!();
    let checkpoint = model();
    let bytes = checkpoint.bytes(0);
    let mount = TestMount::of(checkpoint);
    let file = mount.open(MODEL);
    // SAFETY: nobody can change a file of a read-only mount.
    let (private, shared) = unsafe { (MmapOptions::new().map_copy_read_only(&file), MmapOptions::new().map(&file)) };
    assert!(private.unwrap()[..] == bytes);
    assert!(shared.unwrap()[..] == bytes);
    // One map per tensor at offsets of all kinds, as converters do.
    for offset in [0, 1, 24, 4095, 4096, 1_000_001] {
        // SAFETY: as above.
        let map = unsafe { MmapOptions::new().offset(offset).len(5000).map(&file) }.unwrap();
        assert!(map[..] == bytes[offset as usize..][..5000]);
    }
}

#[test]
fn line_06_direct_reads_work_aligned_or_not() {
    require_fuse!();
    let checkpoint = model();
    let bytes = checkpoint.bytes(0);
    let mount = TestMount::of(checkpoint);
    let file = OpenOptions::new().read(true).custom_flags(libc::O_DIRECT).open(mount.path(MODEL)).unwrap();
    for (offset, length) in [(0, 4096), (4096, 1 << 20), (1, 17), (12_345, 2 << 20), (DATA_BYTES, 24)] {
        let mut out = vec![0; length];
        assert_eq!(file.read_at(&mut out, offset as u64).unwrap(), length, "{offset}");
        assert!(out == bytes[offset..][..length], "{offset}");
    }
    let mut out = vec![0; 4 << 20];
    assert_eq!(file.read_at(&mut out, 0).unwrap(), bytes.len(), "the whole file in one read");
    assert!(out[..bytes.len()] == bytes);
}

#[test]
fn line_07_no_read_is_short_before_the_end_and_none_goes_past_it() {
    require_fuse!();
    let checkpoint = model();
    let bytes = checkpoint.bytes(0);
    let mount = TestMount::of(checkpoint);
    let file = mount.open(MODEL);
    let mut out = vec![0; bytes.len() + 100];
    for offset in [0, 1, 23, 24, 25, 4095, 131_071, 131_073, 1 << 20, bytes.len() - 1] {
        let length = file.read_at(&mut out, offset as u64).unwrap();
        assert_eq!(length, bytes.len() - offset, "{offset}");
        assert!(out[..length] == bytes[offset..], "{offset}");
    }
    for past in [bytes.len() as u64, bytes.len() as u64 + 1, 1 << 40] {
        assert_eq!(file.read_at(&mut out, past).unwrap(), 0);
    }
}

#[test]
fn line_08_a_failing_decode_is_an_io_error_there_and_nowhere_else() {
    require_fuse!();
    let damaged = InMemory::new(&["damaged.safetensors"], DATA_BYTES)
        .before_decode(|_, offset| if offset >= 1 << 20 { Err("record 7: CRC-32C".into()) } else { Ok(()) });
    let panicking = InMemory::new(&["panicking.safetensors"], 1000).before_decode(|_, _| panic!("a bug"));
    let (whole, bytes) = (model(), model().bytes(0));
    let archives = BTreeMap::from([("d.mcwc", damaged), ("p.mcwc", panicking), ("w.mcwc", whole)]);
    let mount = TestMount::with(archives, &MountOptions::default(), |source| {
        fs::write(source.join("refused.mcwc"), "no archive").unwrap();
    });
    assert_eq!(names(&mount.path("")), ["damaged.safetensors", MODEL, "panicking.safetensors"]);
    let file = mount.open("damaged.safetensors");
    let mut out = [0; 4096];
    assert_eq!(errno(file.read_at(&mut out, 2 << 20)), libc::EIO);
    assert_eq!(errno(fs::read(mount.path("panicking.safetensors"))), libc::EIO);
    assert_eq!(file.read_at(&mut out, 0).unwrap(), 4096, "what is sound is still served");
    assert!(fs::read(mount.path(MODEL)).unwrap() == bytes);
}

#[test]
fn line_09_writes_are_refused_and_locks_granted() {
    require_fuse!();
    let mount = TestMount::of(model());
    let path = mount.path(MODEL);
    assert_eq!(errno(OpenOptions::new().write(true).open(&path)), libc::EROFS);
    assert_eq!(errno(OpenOptions::new().read(true).write(true).open(&path)), libc::EROFS);
    assert_eq!(errno(File::create(mount.path("new"))), libc::EROFS);
    assert_eq!(errno(fs::remove_file(&path)), libc::EROFS);
    assert_eq!(errno(fs::rename(&path, mount.path("new"))), libc::EROFS);
    assert_eq!(errno(fs::hard_link(&path, mount.path("new"))), libc::EROFS);
    assert_eq!(errno(fs::create_dir(mount.path("new"))), libc::EROFS);
    assert_eq!(errno(symlink("x", mount.path("new"))), libc::EROFS);
    assert_eq!(errno(fs::set_permissions(&path, fs::Permissions::from_mode(0o666))), libc::EROFS);
    let name = c_path(&path);
    // SAFETY: the path is a C string.
    let (may_read, may_write) =
        unsafe { (libc::access(name.as_ptr(), libc::R_OK), libc::access(name.as_ptr(), libc::W_OK)) };
    assert_eq!((may_read, may_write), (0, -1));

    let file = mount.open(MODEL);
    for operation in [libc::LOCK_SH, libc::LOCK_EX, libc::LOCK_UN] {
        // SAFETY: the descriptor is open.
        checked(unsafe { libc::flock(file.as_raw_fd(), operation) }).unwrap();
    }
    let shared =
        libc::flock { l_type: libc::F_RDLCK as i16, l_whence: libc::SEEK_SET as i16, l_start: 0, l_len: 0, l_pid: 0 };
    // SAFETY: the descriptor is open and `shared` a valid lock description.
    checked(unsafe { libc::fcntl(file.as_raw_fd(), libc::F_SETLK, &raw const shared) }).unwrap();
}

#[test]
fn line_10_seeking_copying_and_advising_behave_as_on_a_plain_file() {
    require_fuse!();
    let checkpoint = model();
    let bytes = checkpoint.bytes(0);
    let length = bytes.len();
    let mount = TestMount::of(checkpoint);
    let mut file = mount.open(MODEL);
    assert_eq!(seek(&file, 0, libc::SEEK_DATA).unwrap(), 0);
    assert_eq!(seek(&file, 5, libc::SEEK_HOLE).unwrap(), length as i64);
    assert_eq!(errno(seek(&file, length as i64, libc::SEEK_DATA)), libc::ENXIO);
    file.seek(SeekFrom::Start(0)).unwrap();

    let copy_with = |copy: &dyn Fn(i32, i32, usize) -> i64| {
        let mut copied = tempfile::tempfile().unwrap();
        let mut left = length;
        while left > 0 {
            let count = checked(copy(file.as_raw_fd(), copied.as_raw_fd(), left))? as usize;
            assert!(count > 0, "ended {left} bytes early");
            left -= count;
        }
        copied.seek(SeekFrom::Start(0))?;
        let mut content = Vec::new();
        copied.read_to_end(&mut content)?;
        (&file).seek(SeekFrom::Start(0))?;
        Ok::<_, io::Error>(content)
    };
    // SAFETY: the descriptors are open; null offsets mean the files' own positions.
    let sent = copy_with(&|from, to, count| unsafe { libc::sendfile(to, from, std::ptr::null_mut(), count) as i64 });
    assert!(sent.unwrap() == bytes);
    // SAFETY: as above.
    let copied = copy_with(&|from, to, count| unsafe {
        libc::copy_file_range(from, std::ptr::null_mut(), to, std::ptr::null_mut(), count, 0) as i64
    });
    match copied {
        Ok(copied) => assert!(copied == bytes),
        Err(error) => assert!([libc::EXDEV, libc::EOPNOTSUPP].contains(&error.raw_os_error().unwrap()), "{error}"),
    }
    assert_eq!(fs::copy(mount.path(MODEL), mount.source("copy")).unwrap(), length as u64);
    assert!(fs::read(mount.source("copy")).unwrap() == bytes);

    let (mut reader, writer) = io::pipe().unwrap();
    // SAFETY: the descriptors are open.
    let spliced = checked(unsafe {
        libc::splice(file.as_raw_fd(), std::ptr::null_mut(), writer.as_raw_fd(), std::ptr::null_mut(), 4096, 0) as i64
    });
    let mut page = vec![0; spliced.unwrap() as usize];
    reader.read_exact(&mut page).unwrap();
    assert!(!page.is_empty() && page == bytes[..page.len()]);

    for advice in [libc::POSIX_FADV_SEQUENTIAL, libc::POSIX_FADV_WILLNEED, libc::POSIX_FADV_DONTNEED] {
        // SAFETY: the descriptor is open.
        assert_eq!(unsafe { libc::posix_fadvise(file.as_raw_fd(), 0, 0, advice) }, 0);
    }
    // SAFETY: nobody can change a file of a read-only mount.
    let map = unsafe { MmapOptions::new().map(&file) }.unwrap();
    map.advise(Advice::PopulateRead).unwrap();
    map.advise_range(Advice::WillNeed, 0, 1 << 20).unwrap();
    // SAFETY: the range is mapped.
    checked(unsafe { libc::mlock(map.as_ptr().cast(), 64 * 1024) }).unwrap();
    assert!(map[..] == bytes);
}

#[test]
fn line_11_unknown_attributes_are_absent_and_ours_are_there() {
    require_fuse!();
    let mount = TestMount::of(model());
    let path = mount.path(MODEL);
    for (name, value) in [
        ("user.mcwc.sha256", "ab".repeat(32)),
        ("user.mcwc.source_sha256", "cd".repeat(32)),
        ("user.mcwc.bpp", "4.0000".to_owned()),
        ("user.mcwc.lossy", "true".to_owned()),
    ] {
        assert_eq!(extended_attribute(&path, name).unwrap(), value);
    }
    for name in ["user.other", "security.capability", "user.mcwc.daemon_pid"] {
        assert_eq!(errno(extended_attribute(&path, name)), libc::ENODATA, "{name}");
    }
    assert_eq!(errno(extended_attribute(&mount.path("config.json"), "user.mcwc.sha256")), libc::ENODATA);

    let (path, mut list) = (c_path(&path), [0_u8; 512]);
    // SAFETY: the path is a C string and `list` has the length stated.
    let needed = unsafe { libc::listxattr(path.as_ptr(), std::ptr::null_mut(), 0) };
    // SAFETY: as above.
    let length = unsafe { libc::listxattr(path.as_ptr(), list.as_mut_ptr().cast(), list.len()) };
    assert!(length > 0 && length == needed);
    assert_eq!(list[..length as usize].split(|&byte| byte == 0).filter(|name| !name.is_empty()).count(), 5);
    // SAFETY: as above.
    let too_small = unsafe { libc::getxattr(path.as_ptr(), c"user.mcwc.sha256".as_ptr(), list.as_mut_ptr().cast(), 3) };
    assert_eq!(errno(checked(too_small as i64)), libc::ERANGE);
}

#[test]
fn line_12_archives_are_hidden() {
    require_fuse!();
    let archives = BTreeMap::from([("bert/model.mcwc", model())]);
    let mount = TestMount::with(archives, &MountOptions::default(), |source| {
        for name in ["bert/config.json", "bert/tokenizer.json", "broken.mcwc", "README.md"] {
            fs::write(source.join(name), name).unwrap();
        }
    });
    assert_eq!(names(&mount.path("")), ["README.md", "bert"]);
    assert_eq!(names(&mount.path("bert")), ["config.json", MODEL, "tokenizer.json"]);
    for name in ["bert/model.mcwc", "broken.mcwc", "bert/absent"] {
        for _ in 0..2 {
            assert_eq!(errno(fs::metadata(mount.path(name))), libc::ENOENT, "{name}"); // asked, then remembered
        }
    }
}

#[test]
fn line_13_sidecars_pass_through_and_links_stay_inside() {
    require_fuse!();
    let outside = tempfile::tempdir().unwrap();
    fs::write(outside.path().join("secret"), "not ours").unwrap();
    let large = crate::common::Random::new(5).bytes(5_000_011);
    let mount = TestMount::with(BTreeMap::new(), &MountOptions::default(), |source| {
        fs::create_dir(source.join("blobs")).unwrap();
        fs::write(source.join("blobs/large"), &large).unwrap();
        fs::write(source.join("empty"), "").unwrap();
        symlink("blobs/large", source.join("tokenizer.bin")).unwrap();
        symlink("blobs", source.join("directory")).unwrap();
        symlink(outside.path(), source.join("escape")).unwrap();
        symlink(outside.path().join("secret"), source.join("secret")).unwrap();
    });
    assert_eq!(names(&mount.path("")), ["blobs", "directory", "empty", "tokenizer.bin"]);
    for name in ["blobs/large", "tokenizer.bin", "directory/large"] {
        assert!(fs::read(mount.path(name)).unwrap() == large, "{name}");
    }
    assert_eq!(fs::read(mount.path("empty")).unwrap(), b"");
    assert_eq!(fs::read_link(mount.path("directory")).unwrap(), Path::new("blobs"));
    assert!(mount.path("directory").is_dir());
    assert_eq!(errno(fs::read(mount.path("escape/secret"))), libc::ENOENT);
}

#[test]
fn line_13_a_sidecar_that_changed_is_refused_and_never_mixed() {
    require_fuse!();
    let mount = TestMount::of(model());
    let file = mount.open("config.json");
    fs::write(mount.source("config.json"), "{}").unwrap();
    assert_eq!(errno(file.read_at(&mut [0; 10], 0)), libc::ESTALE);
}

#[test]
fn line_14_the_bytes_are_the_originals_from_the_first_to_the_last() {
    require_fuse!();
    let checkpoint = InMemory::new(&["a.safetensors", "b.safetensors"], DATA_BYTES);
    let expected = [checkpoint.bytes(0), checkpoint.bytes(1)];
    let mount = TestMount::of(checkpoint);
    for (name, bytes) in ["a.safetensors", "b.safetensors"].into_iter().zip(expected) {
        assert!(fs::read(mount.path(name)).unwrap() == bytes, "{name}");
    }
}

#[test]
fn line_15_an_index_without_all_its_shards_is_not_listed() {
    require_fuse!();
    const INDEX: &str = "model.safetensors.index.json";
    let shards = ["m-1.safetensors", "m-2.safetensors"];
    let archives = BTreeMap::from([
        ("whole/m.mcwc", InMemory::new(&shards, 10)),
        ("half/m.mcwc", InMemory::new(&shards[..1], 10)),
    ]);
    let mount = TestMount::with(archives, &MountOptions::default(), |source| {
        for directory in ["whole", "half", "broken"] {
            fs::create_dir_all(source.join(directory)).unwrap();
            let index = r#"{"weight_map": {"a": "m-1.safetensors", "b": "m-2.safetensors"}}"#;
            fs::write(source.join(directory).join(INDEX), index).unwrap();
        }
        fs::write(source.join("broken/m.mcwc"), "no archive").unwrap();
    });
    assert_eq!(names(&mount.path("whole")), [shards[0], shards[1], INDEX]);
    assert_eq!(names(&mount.path("half")), [shards[0]]);
    assert!(names(&mount.path("broken")).is_empty());
    assert!(!mount.path("half").join(INDEX).exists());
}

#[test]
fn line_16_the_table_of_mounts_names_the_type_and_the_source() {
    require_fuse!();
    let line_of = |mount: &TestMount| {
        let table = fs::read_to_string("/proc/mounts").unwrap();
        let path = mount.path("").to_str().unwrap().trim_end_matches('/').to_owned();
        table.lines().find(|line| line.split(' ').nth(1) == Some(&path)).map(str::to_owned).expect("it is mounted")
    };
    let line = line_of(&TestMount::of(model()));
    assert!(line.starts_with("mcwcfs ") && line.contains(" fuse.mcwcfs ro,"), "{line}");
    let options = MountOptions { fsname: "zoo, the".to_owned(), ..MountOptions::default() };
    let line = line_of(&TestMount::with(BTreeMap::new(), &options, |_| {}));
    assert!(line.starts_with(r"zoo,\040the "), "{line}");
}

#[test]
fn line_17_totals_are_real_and_large_directories_complete() {
    require_fuse!();
    let mount = TestMount::with(BTreeMap::from([("model.mcwc", model())]), &MountOptions::default(), |source| {
        for number in 0..2000 {
            fs::write(source.join(format!("{number:04}-{}", "x".repeat(100))), "").unwrap();
        }
    });
    let path = c_path(&mount.path(""));
    let mut totals = std::mem::MaybeUninit::<libc::statvfs>::uninit();
    // SAFETY: the path is a C string, and the call fills `totals` where it succeeds.
    let totals = unsafe {
        checked(libc::statvfs(path.as_ptr(), totals.as_mut_ptr())).unwrap();
        totals.assume_init()
    };
    assert_eq!(totals.f_blocks * totals.f_frsize, (24 + DATA_BYTES as u64).next_multiple_of(4096));
    assert_eq!((totals.f_files, totals.f_bavail, totals.f_namemax), (2002, 0, 255));
    let listed = names(&mount.path(""));
    assert_eq!(listed.len(), 2001);
    assert!(listed.is_sorted_by(|a, b| a < b), "each name once");
    let mut inodes: Vec<u64> = fs::read_dir(mount.path(""))
        .unwrap()
        .map(|entry| {
            let entry = entry.unwrap();
            assert_eq!(std::os::unix::fs::DirEntryExt::ino(&entry), entry.metadata().unwrap().ino());
            entry.metadata().unwrap().ino()
        })
        .collect();
    inodes.sort_unstable();
    inodes.dedup();
    assert_eq!(inodes.len(), 2001);
}
