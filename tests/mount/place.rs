//! A source, a mount point, the program that serves it, and signals for it.

use std::fs;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStderr, Command, Output, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use mcwcfs::daemon::Report;

use crate::arguments;
use crate::common::{Bert, Random, files_below, mcwcfs_ok};
use crate::support::{checked, extended_attribute};

/// How long something may take before the test gives it up. Nothing is asserted about shorter times.
pub const GENEROUS: Duration = Duration::from_secs(60);

/// A source with sidecars, a mount point, and whatever is mounted there, which comes down with the value.
pub struct Place {
    directory: tempfile::TempDir,
}

impl Place {
    pub fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        fs::create_dir_all(directory.path().join("source/bert")).unwrap();
        fs::create_dir(directory.path().join("mnt")).unwrap();
        let place = Self { directory };
        fs::write(place.source().join("bert/config.json"), "{}").unwrap();
        fs::write(place.source().join("weights.bin"), Random::new(1).bytes(1 << 20)).unwrap();
        place
    }

    pub fn source(&self) -> PathBuf {
        self.directory.path().join("source")
    }

    pub fn mountpoint(&self) -> PathBuf {
        self.directory.path().join("mnt")
    }

    pub fn log(&self) -> PathBuf {
        self.directory.path().join("daemon.log")
    }

    pub fn command(&self, options: &[&str]) -> Command {
        self.command_of(env!("CARGO_BIN_EXE_mcwcfs").as_ref(), options)
    }

    fn command_of(&self, program: &Path, options: &[&str]) -> Command {
        let mut command = Command::new(program);
        command.arg("mount").args([self.source(), self.mountpoint()]).args(options);
        command.arg("--log-file").arg(self.log()).stdin(Stdio::null());
        command
    }

    /// Mounts in the background.
    pub fn mount(&self, options: &[&str]) -> Output {
        self.command(options).output().unwrap()
    }

    /// Mounts in the background, by a copy of the program.
    pub fn mount_with(&self, program: &Path, options: &[&str]) -> Output {
        self.command_of(program, options).output().unwrap()
    }

    /// Mounts in the foreground, and returns when the log says that it is mounted.
    pub fn foreground(&self, options: &[&str]) -> (Child, BufReader<ChildStderr>) {
        let mut child = self.command(options).arg("--foreground").stderr(Stdio::piped()).spawn().unwrap();
        let mut log = BufReader::new(child.stderr.take().unwrap());
        let mut line = String::new();
        while !line.contains("mounted: ") {
            line.clear();
            assert!(log.read_line(&mut line).unwrap() > 0, "ended before it was mounted");
        }
        (child, log)
    }

    /// Runs a subcommand on the mount point.
    pub fn mcwcfs(&self, subcommand: &str) -> Output {
        self.mcwcfs_with(subcommand, &[])
    }

    pub fn mcwcfs_with(&self, subcommand: &str, options: &[&str]) -> Output {
        let mut command = Command::new(env!("CARGO_BIN_EXE_mcwcfs"));
        command.arg(subcommand).args(options).arg(self.mountpoint()).output().unwrap()
    }

    pub fn umount(&self, options: &[&str]) -> Output {
        Command::new(env!("CARGO_BIN_EXE_mcwcfs")).arg("umount").args(options).arg(self.mountpoint()).output().unwrap()
    }

    /// Packs a checkpoint into `source/NAME`, in place of what is there; returns the bytes of its model.
    pub fn pack(&self, name: &str, bert: &Bert) -> Vec<u8> {
        let path = |directory: &str| self.directory.path().join(directory).join(name);
        bert.write(&path("original"));
        mcwcfs_ok(arguments!["pack", path("original"), path("packed")]);
        fs::create_dir_all(path("source")).unwrap();
        for file in files_below(&path("packed")) {
            fs::rename(path("packed").join(&file), path("source").join(&file)).unwrap();
        }
        fs::remove_dir_all(path("packed")).unwrap();
        fs::read(path("original").join("model.safetensors")).unwrap()
    }

    pub fn path(&self) -> &Path {
        self.directory.path()
    }

    pub fn mounted(&self, name: &str) -> PathBuf {
        self.mountpoint().join(name)
    }

    /// What the mount says of itself.
    pub fn status(&self) -> Report {
        mcwcfs::daemon::status(&self.mountpoint()).unwrap()
    }

    /// Waits until the log has a line that contains `text`, and gives it.
    pub fn until_logged(&self, text: &str) -> String {
        let started = Instant::now();
        loop {
            let log = fs::read_to_string(self.log()).unwrap_or_default();
            if let Some(line) = log.lines().find(|line| line.contains(text)) {
                return line.to_owned();
            }
            assert!(started.elapsed() < GENEROUS, "no {text:?} in:\n{log}");
            thread::sleep(Duration::from_millis(5));
        }
    }

    pub fn is_mounted(&self) -> bool {
        mcwcfs::fuse::mount_at(&self.mountpoint()).is_some()
    }

    pub fn daemon(&self) -> i32 {
        extended_attribute(&self.mountpoint(), "user.mcwc.daemon_pid").unwrap().parse().unwrap()
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        while self.is_mounted() && mcwcfs::fuse::unmount(&self.mountpoint(), true).is_ok() {}
    }
}

pub fn kill(pid: i32, signal: i32) {
    // SAFETY: the call takes two integers, and the process is one that this test started.
    checked(unsafe { libc::kill(pid, signal) }).unwrap();
}

/// Whether a process still runs; one that ended and that nobody has waited for does not.
pub fn is_running(pid: i32) -> bool {
    let status = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    status.rsplit(')').next().is_some_and(|rest| !rest.is_empty() && !rest.trim_start().starts_with(['Z', 'X']))
}

#[track_caller]
pub fn assert_fails(output: &Output, code: i32, parts: &[&str]) {
    let message = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(code), "{message}");
    assert_eq!(message.lines().count(), 1, "{message}");
    for part in parts {
        assert!(message.contains(part), "{part:?} in: {message}");
    }
}
