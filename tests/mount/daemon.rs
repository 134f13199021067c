//! The program: `mcwcfs mount` and `mcwcfs umount`, readiness, signals, exit codes.

use std::fs;
use std::io::BufRead;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::Command;

use memmap2::MmapOptions;

use crate::common::Random;
use crate::place::{Place, assert_fails, is_running, kill};
use crate::support::require_fuse;

#[test]
fn mount_returns_when_the_mount_answers_and_umount_when_the_daemon_is_gone() {
    require_fuse!();
    let place = Place::new();
    let output = place.mount(&[]);
    assert!(output.status.success(), "{output:?}");
    assert!(output.stdout.is_empty() && output.stderr.is_empty(), "{output:?}");
    assert_eq!(fs::read(place.mountpoint().join("bert/config.json")).unwrap(), b"{}");
    assert_eq!(fs::metadata(place.mountpoint()).unwrap().ino(), 1);
    let daemon = place.daemon();
    assert!(is_running(daemon));
    let output = place.umount(&[]);
    assert!(output.status.success(), "{output:?}");
    assert!(!is_running(daemon));
    assert!(!place.is_mounted());
    let log = fs::read_to_string(place.log()).unwrap();
    assert!(log.contains("mounted: ") && log.contains("unmounted: "), "{log}");
}

#[test]
fn a_daemon_keeps_no_file_of_its_caller_open() {
    require_fuse!();
    let place = Place::new();
    // The shell opens a pipe on descriptor 9, and `cat` ends when nobody has its other end open.
    let script = "{ \"$@\" 9>&1 >/dev/null; } | cat";
    let mut command = Command::new("sh");
    command.args(["-c", script, "sh"]).arg(env!("CARGO_BIN_EXE_mcwcfs")).arg("mount");
    command.args([place.source(), place.mountpoint()]).arg("--log-file").arg(place.log());
    assert!(command.output().unwrap().status.success());
    assert!(place.is_mounted());
    for pid in [place.daemon(), place.status().worker_pid as i32] {
        let descriptors = fs::read_dir(format!("/proc/{pid}/fd")).unwrap();
        let targets: Vec<_> = descriptors.filter_map(|entry| fs::read_link(entry.unwrap().path()).ok()).collect();
        assert!(!targets.iter().any(|target| target.to_string_lossy().starts_with("pipe:")), "{targets:?}");
    }
}

#[test]
fn options_reach_the_mount_by_flag_and_by_o() {
    require_fuse!();
    let place = Place::new();
    let output = place.mount(&["-o", "ro,nofail,noexec,file_mode=0400,uid=7,fsname=zoo", "--gid", "8", "--uid", "9"]);
    assert!(output.status.success(), "{output:?}");
    let metadata = fs::metadata(place.mountpoint().join("weights.bin")).unwrap();
    assert_eq!((metadata.mode() & 0o7777, metadata.uid(), metadata.gid()), (0o400, 9, 8));
    assert_eq!(mcwcfs::fuse::mount_at(&place.mountpoint()).unwrap().source, "zoo");
    let table = fs::read_to_string("/proc/mounts").unwrap();
    assert!(table.lines().any(|line| line.starts_with("zoo ") && line.contains("noexec")), "{table}");
}

#[test]
fn readahead_is_set_where_permitted() {
    require_fuse!();
    let place = Place::new();
    assert!(place.mount(&["--readahead", "2MiB"]).status.success());
    let device = mcwcfs::fuse::mount_at(&place.mountpoint()).unwrap().device;
    let readahead = fs::read_to_string(format!("/sys/class/bdi/{device}/read_ahead_kb")).unwrap_or_default();
    let log = fs::read_to_string(place.log()).unwrap();
    assert!(readahead.trim() == "2048" || log.contains("readahead left at"), "{readahead} {log}");
}

#[test]
fn line_18_a_signal_unmounts_cleanly() {
    require_fuse!();
    for (signal, options) in [(libc::SIGTERM, &[][..]), (libc::SIGINT, &[]), (libc::SIGTERM, &["--no-supervisor"])] {
        let place = Place::new();
        let (mut child, _log) = place.foreground(options);
        kill(child.id() as i32, signal);
        assert_eq!(child.wait().unwrap().code(), Some(0));
        assert!(!place.is_mounted());
    }
}

#[test]
fn line_18_a_signal_lets_the_last_user_finish() {
    require_fuse!();
    let place = Place::new();
    let (mut child, mut log) = place.foreground(&[]);
    let file = fs::File::open(place.mountpoint().join("weights.bin")).unwrap();
    kill(child.id() as i32, libc::SIGTERM);
    let mut line = String::new();
    while !line.contains("in use") {
        line.clear();
        assert!(log.read_line(&mut line).unwrap() > 0, "ended with a file open");
    }
    let mut out = vec![0; 1 << 20];
    std::os::unix::fs::FileExt::read_exact_at(&file, &mut out, 0).unwrap();
    assert!(out == Random::new(1).bytes(1 << 20));
    drop(file);
    assert_eq!(child.wait().unwrap().code(), Some(0));
    assert!(!place.is_mounted());
}

#[test]
fn line_18_a_second_signal_does_not_wait() {
    require_fuse!();
    let place = Place::new();
    let (mut child, mut log) = place.foreground(&[]);
    let _file = fs::File::open(place.mountpoint().join("weights.bin")).unwrap();
    kill(child.id() as i32, libc::SIGTERM);
    let mut line = String::new();
    while !line.contains("in use") {
        line.clear();
        assert!(log.read_line(&mut line).unwrap() > 0, "ended at the first signal");
    }
    kill(child.id() as i32, libc::SIGTERM);
    assert_eq!(child.wait().unwrap().code(), Some(0));
}

#[test]
fn line_18_a_killed_daemon_leaves_cached_pages_readable_and_a_mount_that_the_next_one_clears() {
    require_fuse!();
    let place = Place::new();
    let (mut child, _log) = place.foreground(&[]);
    let file = fs::File::open(place.mountpoint().join("weights.bin")).unwrap();
    // SAFETY: nobody can change a file of a read-only mount.
    let map = unsafe { MmapOptions::new().populate().map(&file) }.unwrap();
    assert!(map[..] == Random::new(1).bytes(1 << 20));
    child.kill().unwrap();
    child.wait().unwrap();
    assert!(map[..] == Random::new(1).bytes(1 << 20));
    let output = place.mount(&[]);
    assert!(output.status.success(), "{output:?}");
    assert!(fs::read(place.mountpoint().join("weights.bin")).unwrap() == Random::new(1).bytes(1 << 20));
    assert!(fs::read_to_string(place.log()).unwrap().contains("dead mount cleared"));
    assert!(place.umount(&[]).status.success());
    assert!(!place.is_mounted(), "the dead mount is not below");
}

#[test]
fn umount_refuses_a_mount_in_use_unless_lazily() {
    require_fuse!();
    let place = Place::new();
    assert!(place.mount(&[]).status.success());
    let file = fs::File::open(place.mountpoint().join("weights.bin")).unwrap();
    assert_fails(&place.umount(&[]), 32, &["busy"]);
    assert!(place.is_mounted());
    assert!(place.umount(&["--lazy"]).status.success());
    assert!(!place.is_mounted());
    std::os::unix::fs::FileExt::read_exact_at(&file, &mut [0; 100], 1000).unwrap();
}

#[test]
fn line_19_overlapping_source_and_mount_point_are_refused() {
    require_fuse!();
    let place = Place::new();
    let mount = |source: &Path, mountpoint: &Path| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_mcwcfs"));
        command.arg("mount").args([source, mountpoint]).arg("--log-file").arg(place.log()).output().unwrap()
    };
    let source = place.source();
    for (source, mountpoint) in [(&source, &source), (&source, &source.join("bert")), (&source.join("bert"), &source)] {
        assert_fails(&mount(source, mountpoint), 1, &["neither inside nor around"]);
    }
    assert_fails(&mount(&source.join("missing"), &place.mountpoint()), 32, &["source", "missing"]);
    assert_fails(&mount(&source, &source.join("missing")), 32, &["mount point", "missing"]);
    assert_fails(&mount(&source, &source.join("weights.bin")), 1, &["neither inside nor around"]);
}

#[test]
fn a_mount_point_is_used_once() {
    require_fuse!();
    let place = Place::new();
    assert!(place.mount(&[]).status.success());
    assert_fails(&place.mount(&[]), 32, &["already"]);
    assert!(place.umount(&[]).status.success());
    assert_fails(&place.umount(&[]), 32, &["not a mount of mcwcfs"]);
}

/// Run by root in a mount namespace of its own, where the device is open to all, as it is on a desktop.
const AS_NOBODY: &str = r#"
mount -t tmpfs -o dev,mode=755 tmpfs "$PLACE/dev"
mknod -m 666 "$PLACE/dev/fuse" c 10 229
mount --bind "$PLACE/dev/fuse" /dev/fuse
cp "$PROGRAM" "$PLACE/mcwcfs"
chown -R 65534:65534 "$PLACE"
exec setpriv --reuid=65534 --regid=65534 --clear-groups sh -eu -c '
    cd "$PLACE"
    ./mcwcfs mount source mnt --log-file log
    cmp source/weights.bin mnt/weights.bin
    grep -q " $PLACE/mnt fuse.mcwcfs ro," /proc/mounts
    pid() { ./mcwcfs status --json mnt | sed -n "s/.*\"$1\": \([0-9]*\),/\1/p"; }
    kill -9 $(pid worker_pid)
    dd if=mnt/weights.bin iflag=direct bs=64k | cmp - source/weights.bin
    kill -9 $(pid daemon_pid)
    ./mcwcfs mount source mnt --log-file log
    cmp source/weights.bin mnt/weights.bin
    ./mcwcfs umount mnt
    test -z "$(ls mnt)"
    if ./mcwcfs mount source mnt --allow-other --log-file log; then exit 1; fi
    ./mcwcfs doctor | grep "limited *other users .*add the line user_allow_other to /etc/fuse.conf"
'
"#;

#[test]
fn a_user_without_privileges_mounts_through_the_setuid_helper() {
    require_fuse!();
    // SAFETY: the call has no preconditions and cannot fail.
    let is_root = unsafe { libc::geteuid() } == 0;
    let has_helper = Command::new("fusermount3").arg("-V").output().is_ok();
    if !is_root || !has_helper {
        eprintln!("not tested: needs root to prepare a device, and fusermount3");
        return;
    }
    let place = Place::new();
    let path = place.path();
    fs::create_dir(path.join("dev")).unwrap();
    let mut command = Command::new("unshare");
    command.args(["--mount", "sh", "-eu", "-c", AS_NOBODY]).env("PLACE", path);
    let output = command.env("PROGRAM", env!("CARGO_BIN_EXE_mcwcfs")).env("HOME", path).output().unwrap();
    let message = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{message}");
    assert!(message.contains("user_allow_other"), "{message}");
}

#[test]
fn line_09_a_remount_cannot_make_it_writable() {
    require_fuse!();
    let place = Place::new();
    assert!(place.mount(&[]).status.success());
    // Root may take the kernel's own refusal away; ours stays.
    let remounted = Command::new("mount").args(["-i", "-o", "remount,rw"]).arg(place.mountpoint()).output().unwrap();
    let table = fs::read_to_string("/proc/mounts").unwrap();
    let is_writable = format!("{} fuse.mcwcfs rw,", place.mountpoint().display());
    assert!(table.contains(&is_writable) || !remounted.status.success(), "{table}");
    let refused = |result: std::io::Result<()>| assert_eq!(result.unwrap_err().raw_os_error(), Some(libc::EROFS));
    let file = place.mounted("weights.bin");
    refused(fs::write(&file, "x"));
    refused(fs::write(place.mounted("new"), "x"));
    refused(fs::remove_file(&file));
    refused(fs::rename(&file, place.mounted("other")));
    refused(fs::create_dir(place.mounted("new")));
    refused(fs::File::options().append(true).open(&file).map(drop));
    assert!(fs::read(&file).unwrap() == Random::new(1).bytes(1 << 20));
}

#[test]
fn a_source_and_a_mount_point_without_a_command_are_mounted() {
    require_fuse!();
    let place = Place::new();
    let mut command = Command::new(env!("CARGO_BIN_EXE_mcwcfs"));
    command.args([place.source(), place.mountpoint()]).args(["-o", "ro,file_mode=0400", "--log-file"]).arg(place.log());
    let output = command.output().unwrap();
    assert!(output.status.success(), "{output:?}");
    assert_eq!(fs::metadata(place.mountpoint().join("weights.bin")).unwrap().mode() & 0o7777, 0o400);
    assert!(place.umount(&[]).status.success());
    let mut command = Command::new(env!("CARGO_BIN_EXE_mcwcfs"));
    let wrong = command.args([place.source(), place.mountpoint()]).args(["-o", "frobnicate"]).output().unwrap();
    assert_fails(&wrong, 1, &["-o frobnicate"]);
}

#[test]
fn a_mount_point_that_is_not_empty_shows_what_it_had_when_it_is_free_again() {
    require_fuse!();
    let place = Place::new();
    fs::write(place.mountpoint().join("before"), "here").unwrap();
    assert!(place.mount(&[]).status.success());
    assert!(!place.mountpoint().join("before").exists());
    assert!(place.umount(&[]).status.success());
    assert_eq!(fs::read(place.mountpoint().join("before")).unwrap(), b"here");
}

#[test]
fn a_memory_limit_that_is_too_low_is_refused() {
    let place = Place::new();
    assert_fails(&place.mount(&["-o", "memory_limit=1M"]), 1, &["-o memory_limit=1M"]);
    let output = place.mount(&["--memory-limit", "31M"]);
    assert_eq!(output.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&output.stderr).contains("32MiB or more"));
}

#[test]
fn a_wrong_option_is_named_in_one_line() {
    let place = Place::new();
    assert_fails(&place.mount(&["-o", "frobnicate=1"]), 1, &["-o frobnicate=1"]);
    assert_fails(&place.mount(&["-o", "rw"]), 1, &["read-only"]);
}
