//! File systems under the source that fail, hang, are full or run out of anything else.
//!
//! A source that fails is another mount of ours: its one file is an archive, and what reading it gives is decided here.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use crate::common::{Random, Tensor, mcwcfs_ok};
use crate::concurrency::Door;
use crate::packed::{MODEL, Packed};
use crate::support::{InMemory, TestMount, checked, errno, require_fuse};
use mcwcfs::vfs::BoxError;

/// A checkpoint of 4 MiB that does not compress, so that most of its archive is behind what is read to open it.
fn noise() -> Packed {
    const BYTES: usize = 4 << 20;
    Packed::tensors(&[Tensor::raw("bytes", "U8", &[BYTES], Random::new(1).bytes(BYTES))], &[])
}

/// A mount whose source is a mount. The upper one comes down first: it has files of the lower one open.
struct Nested {
    packed: Packed,
    lower: TestMount,
}

impl Nested {
    /// Mounts a file system that has the archive of a checkpoint, before each read of which `before` is called.
    fn new(options: &[&str], before: impl Fn() -> Result<(), BoxError> + Send + Sync + 'static) -> Self {
        let packed = noise();
        let archive = InMemory::file("model.mcwc", fs::read(packed.archive()).unwrap());
        let nested = Self { packed, lower: TestMount::of(archive.before_decode(move |_, _| before())) };
        let mut command = Command::new(env!("CARGO_BIN_EXE_mcwcfs"));
        command.arg("mount").args([nested.lower.path(""), nested.packed.path("mnt")]).args(options);
        let output = command.arg("--log-file").arg(nested.packed.path("log")).output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        nested
    }

    fn shown(&self, name: &str) -> PathBuf {
        self.packed.path("mnt").join(name)
    }
}

#[test]
fn a_source_whose_file_system_fails_gives_errors_until_it_recovers() {
    require_fuse!();
    let is_failing = Arc::new(AtomicBool::new(false));
    let nested = Nested::new(&[], {
        let is_failing = Arc::clone(&is_failing);
        move || if is_failing.load(Ordering::SeqCst) { Err("the disk is gone".into()) } else { Ok(()) }
    });
    is_failing.store(true, Ordering::SeqCst);
    let file = File::open(nested.shown(MODEL)).unwrap();
    for _ in 0..3 {
        assert_eq!(errno(file.read_at(&mut [0; 4096], 2 << 20)), libc::EIO);
    }
    assert!(fs::read(nested.shown("config.json")).unwrap().starts_with(b"{"));
    let log = nested.packed.log();
    let lines: Vec<_> = log.lines().filter(|line| line.contains("read failed")).collect();
    assert!(lines.len() == 1 && lines[0].contains("model.mcwc") && lines[0].contains("os error 5"), "{log}");
    is_failing.store(false, Ordering::SeqCst);
    assert!(fs::read(nested.shown(MODEL)).unwrap() == nested.packed.expected(false));
}

#[test]
fn a_source_that_hangs_holds_up_only_who_reads_from_it() {
    require_fuse!();
    let (door, is_hanging) = (Arc::new(Door::default()), Arc::new(AtomicBool::new(false)));
    let nested = Nested::new(&["--threads", "1"], {
        let (door, is_hanging) = (Arc::clone(&door), Arc::clone(&is_hanging));
        move || {
            if is_hanging.load(Ordering::SeqCst) {
                door.pass();
            }
            Ok(())
        }
    });
    is_hanging.store(true, Ordering::SeqCst);
    let expected = nested.packed.expected(false);
    thread::scope(|scope| {
        let reader = scope.spawn(|| fs::read(nested.shown(MODEL)).unwrap());
        door.until_waiting(1);
        assert_eq!(fs::metadata(nested.shown(MODEL)).unwrap().len(), expected.len() as u64);
        assert!(fs::read(nested.shown("config.json")).unwrap().starts_with(b"{"));
        let status = mcwcfs_ok(["status".into(), nested.packed.path("mnt").into_os_string()]);
        assert!(status.contains("model.mcwc"), "{status}");
        assert!(!reader.is_finished());
        door.open();
        assert!(reader.join().unwrap() == expected);
    });
}

/// A file system in memory of a given size, which comes down with the value.
struct SmallDisk(PathBuf);

impl SmallDisk {
    /// `None` where we may not mount.
    fn new(path: PathBuf, bytes: usize) -> Option<Self> {
        fs::create_dir(&path).unwrap();
        let mut mount = Command::new("mount");
        mount.args(["-t", "tmpfs", "-o", &format!("size={bytes}"), "tmpfs"]).arg(&path).stderr(Stdio::null());
        mount.status().is_ok_and(|status| status.success()).then_some(Self(path))
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let _ = mcwcfs::fuse::unmount(&self.0, true); // the test has failed or passed by now
    }
}

#[test]
fn a_full_disk_under_source_log_and_decoded_files_stops_no_reader() {
    require_fuse!();
    let packed = noise();
    let expected = packed.expected(false);
    let Some(disk) = SmallDisk::new(packed.path("disk"), 6 << 20) else {
        eprintln!("not tested: needs root to mount a small disk");
        return;
    };
    fs::create_dir(disk.0.join("source")).unwrap();
    fs::copy(packed.archive(), disk.0.join("source/model.mcwc")).unwrap();
    let kept = format!("--decoded-cache={}:1G", disk.0.join("kept").display());
    let mut command = Command::new(env!("CARGO_BIN_EXE_mcwcfs"));
    command.arg("mount").args([disk.0.join("source"), packed.path("mnt")]).arg(kept);
    assert!(command.arg("--log-file").arg(disk.0.join("log")).status().unwrap().success());
    // What is left is taken, to the last page of the log.
    let filled = File::create(disk.0.join("filler")).unwrap();
    let mut at = 0;
    while filled.write_at(&[0; 4096], at).is_ok_and(|written| written > 0) {
        at += 4096;
    }
    let model = packed.path("mnt").join(MODEL);
    for _ in 0..2 {
        assert!(fs::read(&model).unwrap() == expected);
        // Time for it to be tried to be kept.
        thread::sleep(Duration::from_millis(1500));
        // SAFETY: the descriptor is open.
        checked(unsafe {
            libc::posix_fadvise(
                std::os::fd::AsRawFd::as_raw_fd(&File::open(&model).unwrap()),
                0,
                0,
                libc::POSIX_FADV_DONTNEED,
            )
        })
        .unwrap();
    }
    let kept = fs::read_dir(disk.0.join("kept")).unwrap().map(|entry| entry.unwrap().file_name());
    let kept: Vec<_> = kept.filter(|name| name.to_string_lossy().contains("safetensors")).collect();
    assert!(kept.is_empty(), "{kept:?}");
    mcwcfs_ok(["verify".into(), disk.0.join("source/model.mcwc").into_os_string()]);
    packed.umount();
}

/// A memory control group of version 1 for one test.
struct ControlGroup(PathBuf);

impl ControlGroup {
    /// `None` where there are none, or we may not make one.
    fn new(name: &str, limit_bytes: u64) -> Option<Self> {
        let path = Path::new("/sys/fs/cgroup/memory").join(format!("{name}-{}", std::process::id()));
        fs::create_dir(&path).ok()?;
        let group = Self(path);
        fs::write(group.0.join("memory.limit_in_bytes"), limit_bytes.to_string()).ok()?;
        Some(group)
    }
}

impl Drop for ControlGroup {
    fn drop(&mut self) {
        for _ in 0..1000 {
            // Its processes have been told to end.
            if fs::remove_dir(&self.0).is_ok() {
                return;
            }
            thread::sleep(Duration::from_millis(5));
        }
    }
}

#[test]
fn line_22_a_daemon_in_a_control_group_keeps_to_what_that_allows() {
    require_fuse!();
    const LIMIT: u64 = 64 << 20;
    let Some(group) = ControlGroup::new("mcwcfs-line-22", LIMIT) else {
        eprintln!("not tested: needs root and a memory control group");
        return;
    };
    let bytes = Random::new(9).bytes(100 << 20);
    let packed = Packed::tensors(&[Tensor::raw("bytes", "U8", &[bytes.len()], bytes)], &[]);
    let expected = packed.expected(false);
    let script = "echo $$ >\"$GROUP/cgroup.procs\" && exec \"$@\"";
    let mut command = Command::new("sh");
    command.env("GROUP", &group.0).args(["-c", script, "sh", env!("CARGO_BIN_EXE_mcwcfs"), "mount"]);
    command.args([packed.path("packed"), packed.path("mnt")]).arg("--log-file").arg(packed.path("log"));
    assert!(command.status().unwrap().success());
    thread::scope(|scope| {
        for reader in 0..4_usize {
            let (packed, expected) = (&packed, &expected);
            scope.spawn(move || {
                let file = File::open(packed.model()).unwrap();
                let part = expected.len().div_ceil(4);
                let mut out = vec![0; part.min(expected.len() - reader * part)];
                file.read_exact_at(&mut out, (reader * part) as u64).unwrap();
                assert!(out == expected[reader * part..][..out.len()]);
            });
        }
    });
    let status = mcwcfs::daemon::status(&packed.path("mnt")).unwrap();
    assert_eq!(status.metrics["mcwcfs_worker_restarts"], 0, "nobody was killed for want of memory");
    let budget = status.metrics["mcwcfs_cache_budget_bytes"].as_u64().unwrap();
    assert!(budget <= LIMIT / 4 * 3 / 2, "{budget}");
    packed.umount();
}
