//! `--decoded-cache`: files that were decoded once are read from disk, by the kernel itself where it can.

use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use memmap2::MmapOptions;

use crate::common::mcwcfs_ok;
use crate::packed::Packed;
use crate::place::kill;
use crate::support::require_fuse;

/// A packed checkpoint, and a directory for its decoded files.
struct Kept {
    packed: Packed,
    /// What the mount must show.
    expected: Vec<u8>,
}

impl Kept {
    fn new() -> Self {
        let packed = Packed::bert(&["--bpp", "6"]);
        let expected = packed.expected(true);
        Self { packed, expected }
    }

    fn mount(&self, more: &[&str]) {
        let option = format!("--decoded-cache={}", self.packed.path("kept").display());
        self.packed.mount(&[&[option.as_str()], more].concat());
    }

    /// The file on disk, if it is complete.
    fn file(&self) -> Option<PathBuf> {
        let entries = fs::read_dir(self.packed.path("kept")).ok()?;
        let mut paths = entries.map(|entry| entry.unwrap().path());
        paths.find(|path| path.extension().is_some_and(|extension| extension == "safetensors"))
    }

    /// Reads the model and waits until it is kept on disk.
    fn load(&self) {
        assert!(fs::read(self.packed.model()).unwrap() == self.expected);
        while self.file().is_none_or(|file| !file.with_extension("seen").exists()) {
            thread::sleep(Duration::from_millis(20));
        }
    }

    fn counted(&self, name: &str) -> u64 {
        let status = mcwcfs_ok(["status".into(), "--json".into(), self.packed.path("mnt").into_os_string()]);
        let status: serde_json::Value = serde_json::from_str(&status).unwrap();
        status["metrics"][name].as_f64().unwrap_or_else(|| panic!("no {name} in: {status}")) as u64
    }

    /// Whether the file, opened and closed, is read by the kernel itself.
    fn is_passed(&self) -> bool {
        let before = self.counted("mcwcfs_passthrough_opens_total");
        drop(File::open(self.packed.model()).unwrap());
        self.counted("mcwcfs_passthrough_opens_total") > before
    }

    /// Returns when another worker serves.
    fn replace_worker(&self, is_killed: bool) {
        let mountpoint = self.packed.path("mnt");
        let worker = || mcwcfs::daemon::status(&mountpoint).unwrap().worker_pid;
        let before = worker();
        if is_killed {
            kill(before as i32, libc::SIGKILL);
        } else {
            mcwcfs_ok(["upgrade".into(), mountpoint.clone().into_os_string()]);
        }
        while worker() == before {
            thread::sleep(Duration::from_millis(5));
        }
    }

    fn assert_all_ways_of_reading_agree(&self) {
        let expected = &self.expected;
        assert!(fs::read(self.packed.model()).unwrap() == *expected);
        let file = File::open(self.packed.model()).unwrap();
        // SAFETY: nobody can change a file of a read-only mount.
        let (shared, private) = unsafe { (MmapOptions::new().map(&file), MmapOptions::new().map_copy(&file)) };
        assert!(shared.unwrap()[..] == *expected);
        let mut private = private.unwrap();
        assert!(private[..] == *expected);
        private[0] ^= 1; // stays private
        let direct = OpenOptions::new().read(true).custom_flags(libc::O_DIRECT).open(self.packed.model()).unwrap();
        for (file, from) in [(&file, 12_345), (&direct, 4096), (&direct, 12_345)] {
            let mut out = vec![0; 8193];
            file.read_exact_at(&mut out[1..], from as u64).unwrap(); // aligned to nothing
            assert!(out[1..] == expected[from..][..8192]);
        }
        assert_eq!(file.read_at(&mut [0; 10], expected.len() as u64).unwrap(), 0);
    }
}

#[test]
fn a_load_after_a_restart_decodes_nothing() {
    require_fuse!();
    let kept = Kept::new();
    kept.mount(&[]);
    kept.load();
    assert!(fs::read(kept.file().unwrap()).unwrap() == kept.expected);
    kept.packed.umount();
    kept.mount(&[]);
    kept.assert_all_ways_of_reading_agree();
    assert_eq!(kept.counted("mcwcfs_decoded_bytes_total"), 0);
    if kept.packed.log().contains("no passthrough") {
        eprintln!("not tested: the kernel does not read files by itself here");
    } else {
        assert_eq!(
            kept.counted("mcwcfs_read_requests_total"),
            2,
            "the direct ones: the others the kernel reads itself"
        );
        assert!(kept.counted("mcwcfs_passthrough_opens_total") > 0);
    }
}

#[test]
fn who_has_the_file_open_meanwhile_and_who_opens_it_then_both_read_on() {
    require_fuse!();
    let kept = Kept::new();
    kept.mount(&[]);
    let before = File::open(kept.packed.model()).unwrap();
    kept.load();
    kept.assert_all_ways_of_reading_agree();
    let mut out = vec![0; kept.expected.len()];
    before.read_exact_at(&mut out, 0).unwrap();
    assert!(out == kept.expected);
    drop(before);
    // Once nobody has it open, it may be opened the other way; who opens it first decides for all.
    thread::scope(|scope| {
        for _ in 0..8 {
            scope.spawn(|| {
                for _ in 0..20 {
                    assert!(fs::read(kept.packed.model()).unwrap() == kept.expected);
                }
            });
        }
    });
}

#[test]
fn files_are_passed_through_again_after_a_worker_died_or_was_replaced() {
    require_fuse!();
    let kept = Kept::new();
    kept.mount(&[]);
    kept.load();
    kept.packed.umount();
    kept.mount(&[]);
    if !kept.is_passed() {
        eprintln!("not tested: the kernel does not read files by itself here");
        return;
    }
    for is_killed in [true, false, true] {
        kept.replace_worker(is_killed);
        assert_eq!(kept.counted("mcwcfs_passthrough_opens_total"), 0, "another process, which counts anew");
        assert!(kept.is_passed());
        kept.assert_all_ways_of_reading_agree();
    }
}

#[test]
fn a_file_that_is_open_through_the_page_cache_is_not_passed_by_a_later_worker_before_it_is_closed() {
    require_fuse!();
    let kept = Kept::new();
    kept.mount(&[]);
    let held = File::open(kept.packed.model()).unwrap();
    kept.load();
    for is_killed in [true, false] {
        kept.replace_worker(is_killed);
        kept.assert_all_ways_of_reading_agree();
        assert!(!kept.is_passed());
    }
    let mut out = vec![0; kept.expected.len()];
    held.read_exact_at(&mut out, 0).unwrap();
    assert!(out == kept.expected);
    drop(held);
    if kept.packed.log().contains("no passthrough") {
        eprintln!("not tested: the kernel does not read files by itself here");
        return;
    }
    // The kernel tells of a close when it is over.
    while !kept.is_passed() {
        thread::sleep(Duration::from_millis(20));
    }
    kept.assert_all_ways_of_reading_agree();
}

#[test]
fn workers_killed_amid_opens_and_closes_leave_no_file_that_is_never_passed_again() {
    require_fuse!();
    let kept = Kept::new();
    kept.mount(&[]);
    let is_over = AtomicBool::new(false);
    thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                while !is_over.load(Ordering::Relaxed) {
                    drop(File::open(kept.packed.model()).unwrap());
                }
            });
        }
        for _ in 0..10 {
            kept.replace_worker(true);
        }
        is_over.store(true, Ordering::Relaxed);
    });
    kept.load();
    if kept.packed.log().contains("no passthrough") {
        eprintln!("not tested: the kernel does not read files by itself here");
        return;
    }
    // All are closed, whichever worker was asked to; one handle too many in the account would go on for ever.
    while !kept.is_passed() {
        thread::sleep(Duration::from_millis(20));
    }
    kept.assert_all_ways_of_reading_agree();
}

#[test]
fn a_damaged_file_on_disk_is_not_believed() {
    require_fuse!();
    let kept = Kept::new();
    kept.mount(&[]);
    kept.load();
    kept.packed.umount();
    let path = kept.file().unwrap();
    let file = OpenOptions::new().write(true).open(&path).unwrap();
    file.write_all_at(&[0xff; 100], 5000).unwrap();
    kept.mount(&[]);
    kept.load();
    // Read through in the background, found wrong, written anew.
    while fs::read(&path).unwrap() != kept.expected {
        thread::sleep(Duration::from_millis(20));
    }
    kept.assert_all_ways_of_reading_agree();
}

#[test]
fn a_file_that_vanishes_from_disk_is_decoded_again() {
    require_fuse!();
    let kept = Kept::new();
    kept.mount(&[]);
    kept.load();
    fs::remove_dir_all(kept.packed.path("kept")).unwrap();
    kept.packed.umount();
    kept.mount(&[]);
    kept.assert_all_ways_of_reading_agree();
}

#[test]
fn a_directory_without_room_is_no_reason_to_fail() {
    require_fuse!();
    let kept = Kept::new();
    let option = format!("--decoded-cache={}:1K", kept.packed.path("kept").display());
    kept.packed.mount(&[&option]);
    kept.assert_all_ways_of_reading_agree();
    while !kept.packed.log().contains("not kept") {
        thread::sleep(Duration::from_millis(20));
    }
    kept.assert_all_ways_of_reading_agree();
    assert!(kept.file().is_none());
}

#[test]
fn a_file_that_the_kernel_reads_by_itself_opens_again_under_every_later_worker() {
    require_fuse!();
    let kept = Kept::new();
    kept.mount(&[]);
    kept.load();
    kept.packed.umount();
    kept.mount(&[]);
    let held = File::open(kept.packed.model()).unwrap();
    if kept.packed.log().contains("no passthrough") {
        eprintln!("not tested: the kernel does not read files by itself here");
        return;
    }
    assert_eq!(kept.counted("mcwcfs_passthrough_opens_total"), 1);
    let mountpoint = kept.packed.path("mnt");
    let worker = || mcwcfs::daemon::status(&mountpoint).unwrap().worker_pid;
    for is_killed in [true, true, false, false, true] {
        let before = worker();
        if is_killed {
            kill(before as i32, libc::SIGKILL);
        } else {
            mcwcfs_ok(["upgrade".into(), mountpoint.clone().into_os_string()]);
        }
        // The kernel refuses to open a file in two ways at once, and under another name too.
        kept.assert_all_ways_of_reading_agree();
        assert_ne!(worker(), before);
    }
    let mut out = vec![0; kept.expected.len()];
    held.read_exact_at(&mut out, 0).unwrap();
    assert!(out == kept.expected);
    drop(held);
    kept.assert_all_ways_of_reading_agree();
    kill(worker() as i32, libc::SIGKILL);
    kept.assert_all_ways_of_reading_agree();
}
