//! The worker is killed, the supervisor is killed, the program is upgraded, and readers see the right bytes or an error.

use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::sync::Barrier;
use std::thread;
use std::time::{Duration, Instant};

use memmap2::MmapOptions;

use crate::common::{Bert, Random};
use crate::place::{GENEROUS, Place, assert_fails, is_running, kill};
use crate::support::{names, require_fuse};

const KILLS: usize = 10;
const MODEL: &str = "bert/model.safetensors";

/// Large enough that a load takes a while: about 25 MB.
fn large() -> Bert {
    Bert { layers: 4, hidden: 384, heads: 4, ffn_units: 1536, ..Bert::default() }
}

/// Decoding as slowly as can be, and forgetting it all, keeps requests waiting when the worker dies.
const SLOWLY: [&str; 4] = ["--engine", "reference", "--cache-size", "0"];

/// The processes that a supervisor has started and that still run.
fn workers(supervisor: i32) -> Vec<i32> {
    let tasks = fs::read_dir(format!("/proc/{supervisor}/task")).unwrap();
    let children = tasks.flat_map(|task| {
        let children = fs::read_to_string(task.unwrap().path().join("children")).unwrap_or_default();
        children.split_whitespace().map(|pid| pid.parse().unwrap()).collect::<Vec<i32>>()
    });
    children.filter(|pid| is_running(*pid)).collect()
}

/// Kills the worker, once there is one that has not been killed before.
fn kill_worker(supervisor: i32, killed: &mut Vec<i32>) {
    let started = Instant::now();
    loop {
        if let Some(worker) = workers(supervisor).into_iter().find(|worker| !killed.contains(worker)) {
            kill(worker, libc::SIGKILL);
            killed.push(worker);
            return;
        }
        assert!(started.elapsed() < GENEROUS, "no worker took over");
        thread::sleep(Duration::from_millis(1));
    }
}

/// Runs `read` in as many threads as `threads` says, each phase by phase, and kills the worker once in each phase.
fn read_and_kill(supervisor: i32, threads: usize, read: impl Fn(usize, usize) + Sync) {
    let phase = Barrier::new(threads + 1);
    thread::scope(|scope| {
        for thread in 0..threads {
            let (phase, read) = (&phase, &read);
            scope.spawn(move || {
                for number in 0..KILLS {
                    phase.wait();
                    read(thread, number);
                }
            });
        }
        let (mut random, mut killed) = (Random::new(7), Vec::new());
        for _ in 0..KILLS {
            phase.wait();
            thread::sleep(Duration::from_millis(random.below(40) as u64));
            kill_worker(supervisor, &mut killed);
        }
    });
}

#[test]
fn ten_killed_workers_during_one_load_by_pread_are_not_noticed() {
    require_fuse!();
    let place = Place::new();
    let expected = place.pack("bert", &large());
    assert!(place.mount(&SLOWLY).status.success());
    let file = OpenOptions::new().read(true).custom_flags(libc::O_DIRECT).open(place.mounted(MODEL)).unwrap();
    let part = expected.len().div_ceil(KILLS);
    read_and_kill(place.daemon(), 1, |_, phase| {
        let range = phase * part..((phase + 1) * part).min(expected.len());
        for from in range.clone().step_by(64 << 10) {
            let mut out = vec![0; (range.end - from).min(64 << 10)];
            file.read_exact_at(&mut out, from as u64).unwrap();
            assert!(out == expected[from..][..out.len()], "bytes from {from}");
        }
    });
    let log = fs::read_to_string(place.log()).unwrap();
    let restarts = log.lines().filter(|line| line.contains("a new one takes over")).count();
    assert_eq!(restarts, KILLS, "{log}");
    assert_eq!(place.status().metrics["mcwcfs_worker_restarts"], KILLS);
    assert!(!log.contains("read failed"), "{log}");
}

#[test]
fn ten_killed_workers_while_eight_threads_fault_one_mapping_are_not_noticed() {
    require_fuse!();
    let place = Place::new();
    let expected = place.pack("bert", &large());
    assert!(place.mount(&SLOWLY).status.success());
    let file = File::open(place.mounted(MODEL)).unwrap();
    // SAFETY: nobody can change a file of a read-only mount.
    let map = unsafe { MmapOptions::new().map(&file) }.unwrap();
    let (part, share) = (expected.len() / KILLS, expected.len() / KILLS / 8);
    read_and_kill(place.daemon(), 8, |thread, phase| {
        let from = phase * part + thread * share;
        assert!(map[from..][..share] == expected[from..][..share], "bytes from {from}");
    });
    assert!(map[..] == expected);
    assert_eq!(place.status().metrics["mcwcfs_worker_restarts"], KILLS);
}

#[test]
fn a_worker_that_dies_idle_is_replaced_and_open_files_go_on() {
    require_fuse!();
    let place = Place::new();
    let expected = place.pack("bert", &Bert::default());
    assert!(place.mount(&[]).status.success());
    let file = OpenOptions::new().read(true).custom_flags(libc::O_DIRECT).open(place.mounted(MODEL)).unwrap();
    let directory = File::open(place.mounted("bert")).unwrap();
    kill(place.status().worker_pid as i32, libc::SIGABRT);
    let mut out = vec![0; expected.len()];
    file.read_exact_at(&mut out, 0).unwrap();
    assert!(out == expected);
    assert!(directory.metadata().unwrap().is_dir());
    assert_eq!(fs::read_dir(place.mounted("bert")).unwrap().count(), 3);
    let line = place.until_logged("a new one takes over");
    assert!(line.contains("signal: 6"), "{line}");
}

#[test]
fn a_file_whose_archive_changed_while_there_was_no_worker_is_an_error_and_never_other_bytes() {
    require_fuse!();
    let place = Place::new();
    let expected = place.pack("bert", &Bert::default());
    assert!(place.mount(&["--rescan", "0"]).status.success());
    let file = OpenOptions::new().read(true).custom_flags(libc::O_DIRECT).open(place.mounted(MODEL)).unwrap();
    let changed = place.pack("bert", &Bert { seed: 2, ..Bert::default() });
    let mut out = vec![0; expected.len()];
    file.read_exact_at(&mut out, 0).unwrap();
    assert!(out == expected, "the worker has the old archive open");
    kill(place.status().worker_pid as i32, libc::SIGKILL);
    let error = file.read_exact_at(&mut out, 0).unwrap_err();
    assert!(matches!(error.raw_os_error(), Some(libc::ESTALE | libc::EIO)), "{error}");
    assert!(fs::read(place.mounted(MODEL)).unwrap() == changed);
}

#[test]
fn what_changed_while_there_was_no_worker_is_seen() {
    require_fuse!();
    let place = Place::new();
    assert!(place.mount(&["--rescan", "0"]).status.success());
    // The kernel remembers for a day that this is not there, and what is.
    assert!(!place.mounted("new").exists() && !place.mounted("bert/model.safetensors").exists());
    assert_eq!(names(&place.mounted("bert")), ["config.json"]);
    place.pack("bert", &Bert::default());
    fs::create_dir(place.source().join("new")).unwrap();
    kill(place.status().worker_pid as i32, libc::SIGKILL);
    let started = Instant::now();
    let listing = ["README.md", "config.json", "model.safetensors"];
    while !place.mounted("new").exists() || !place.mounted(MODEL).exists() || names(&place.mounted("bert")) != listing {
        assert!(started.elapsed() < GENEROUS, "not seen");
        thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn a_mount_whose_workers_keep_dying_is_given_up_with_a_reason() {
    require_fuse!();
    let place = Place::new();
    let (mut child, _log) = place.foreground(&[]);
    let mut killed = Vec::new();
    while is_running(child.id() as i32) {
        if let Some(worker) = workers(child.id() as i32).into_iter().find(|worker| !killed.contains(worker)) {
            kill(worker, libc::SIGKILL);
            killed.push(worker);
        }
        thread::sleep(Duration::from_millis(1));
        assert!(killed.len() < 100, "never given up");
    }
    assert_eq!(child.wait().unwrap().code(), Some(32));
    assert!(!place.is_mounted());
}

#[test]
fn the_end_of_the_supervisor_is_the_end_of_the_worker_and_an_error_for_readers() {
    require_fuse!();
    let place = Place::new();
    let expected = place.pack("bert", &Bert::default());
    assert!(place.mount(&[]).status.success());
    let file = OpenOptions::new().read(true).custom_flags(libc::O_DIRECT).open(place.mounted(MODEL)).unwrap();
    let worker = place.status().worker_pid as i32;
    kill(place.daemon(), libc::SIGKILL);
    let started = Instant::now();
    while is_running(worker) {
        assert!(started.elapsed() < GENEROUS, "the worker outlives its supervisor");
        thread::sleep(Duration::from_millis(5));
    }
    let error = file.read_exact_at(&mut [0; 4096], 0).unwrap_err();
    assert!(matches!(error.raw_os_error(), Some(libc::ENOTCONN | libc::ECONNABORTED)), "{error}");
    assert!(place.mount(&[]).status.success());
    assert!(fs::read(place.mounted(MODEL)).unwrap() == expected);
}

#[test]
fn signals_to_the_whole_group_end_the_mount_once() {
    require_fuse!();
    let place = Place::new();
    let (mut child, _log) = place.foreground(&[]);
    let worker = place.status().worker_pid as i32;
    for pid in [worker, child.id() as i32] {
        kill(pid, libc::SIGTERM); // as a service manager does that knows no main process
    }
    assert_eq!(child.wait().unwrap().code(), Some(0));
    assert!(!place.is_mounted() && !is_running(worker));
}

#[test]
fn without_a_supervisor_one_process_serves() {
    require_fuse!();
    let place = Place::new();
    assert!(place.mount(&["--no-supervisor"]).status.success());
    let status = place.status();
    assert_eq!(status.daemon_pid, status.worker_pid);
    assert!(workers(place.daemon()).is_empty());
    let output = place.mcwcfs("upgrade");
    assert_fails(&output, 32, &["no supervisor"]);
}

#[test]
fn an_upgrade_during_a_load_is_not_noticed() {
    require_fuse!();
    let place = Place::new();
    let expected = place.pack("bert", &large());
    assert!(place.mount(&SLOWLY).status.success());
    let before = place.status();
    thread::scope(|scope| {
        let reader = scope.spawn(|| fs::read(place.mounted(MODEL)).unwrap());
        for _ in 0..2 {
            let output = place.mcwcfs("upgrade");
            assert!(output.status.success(), "{output:?}");
        }
        assert!(reader.join().unwrap() == expected);
    });
    let after = place.status();
    assert_eq!(after.daemon_pid, before.daemon_pid);
    assert_ne!(after.worker_pid, before.worker_pid);
    assert_eq!(after.metrics["mcwcfs_worker_upgrades"], 2);
    assert_eq!(after.metrics["mcwcfs_worker_restarts"], 0);
    let started = Instant::now();
    while workers(place.daemon()).len() > 1 {
        assert!(started.elapsed() < GENEROUS, "an old worker stays");
        thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn an_upgrade_to_a_program_that_does_not_start_leaves_the_old_worker() {
    require_fuse!();
    let place = Place::new();
    let program = place.path().join("mcwcfs");
    fs::copy(env!("CARGO_BIN_EXE_mcwcfs"), &program).unwrap();
    assert!(place.mount_with(&program, &[]).status.success());
    let before = place.status();
    fs::remove_file(&program).unwrap();
    fs::write(&program, "#!/bin/sh\nexit 7\n").unwrap();
    fs::set_permissions(&program, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    assert_fails(&place.mcwcfs("upgrade"), 32, &["old one stays"]);
    assert_eq!(place.status().worker_pid, before.worker_pid);
    assert_eq!(place.status().metrics["mcwcfs_failed_upgrades"], 1);
    fs::remove_file(&program).unwrap();
    fs::copy(env!("CARGO_BIN_EXE_mcwcfs"), &program).unwrap();
    assert!(place.mcwcfs("upgrade").status.success());
    assert_ne!(place.status().worker_pid, before.worker_pid);
}
