//! `mcwcfs doctor`: whether this machine can mount, and what it could do better.
//!
//! Exit codes: 0 can mount, 1 cannot.

use std::fs::{self, File};
use std::io::{self, Write as _};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::Args;
use indicatif::HumanBytes;
use serde::Serialize;

use crate::daemon;
use crate::decode::cuda::CudaDevice;
use crate::decode::cuda::device::{Device, DeviceError};
use crate::decode::select::cpu_engines;

/// Say whether this machine can mount archives, and what it could do better.
#[derive(Args, Clone, Debug)]
pub struct DoctorArgs {
    /// The findings as JSON
    #[arg(long)]
    json: bool,
}

/// How much a finding matters.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
enum Verdict {
    /// As it should be.
    Good,
    /// Works, with less speed or comfort.
    Limited,
    /// No mount without it.
    Missing,
}

/// One thing that was looked at.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
struct Finding {
    subject: &'static str,
    verdict: Verdict,
    /// What is so, and where it could be better what to do.
    text: String,
}

/// Looks, and says what it saw.
pub fn run(args: &DoctorArgs) -> ExitCode {
    let findings = examine();
    let text = if args.json {
        serde_json::to_string_pretty(&findings).expect("findings are JSON") + "\n"
    } else {
        let line = |finding: &Finding| {
            let verdict = format!("{:?}", finding.verdict).to_lowercase();
            format!("{verdict:<8} {:<12} {}\n", finding.subject, finding.text)
        };
        findings.iter().map(line).collect()
    };
    let _ = io::stdout().write_all(text.as_bytes()); // a reader that has seen enough is no failure
    let can_mount = findings.iter().all(|finding| finding.verdict != Verdict::Missing);
    if can_mount { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

fn examine() -> Vec<Finding> {
    // SAFETY: the call has no preconditions and cannot fail.
    let is_root = unsafe { libc::geteuid() } == 0;
    let kernel = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    let kernel = kernel.trim();
    let conf = fs::read_to_string("/etc/fuse.conf").unwrap_or_default();
    let may_read_ahead = readahead_files().iter().any(|path| File::options().write(true).open(path).is_ok());
    vec![
        device(File::options().read(true).write(true).open("/dev/fuse").map(drop)),
        helper(is_root, &find_on_path(&["fusermount3", "fusermount"])),
        other_users(is_root, &conf),
        supervisor(kernel),
        readahead(may_read_ahead),
        passthrough(kernel, is_root),
        descriptors(),
        memory(),
        engines(),
        cuda(CudaDevice::new(0).and_then(|device| Ok((device.name().to_owned(), device.free_bytes()?)))),
    ]
}

fn finding(subject: &'static str, verdict: Verdict, text: String) -> Finding {
    Finding { subject, verdict, text }
}

fn device(opened: io::Result<()>) -> Finding {
    let (verdict, text) = match opened {
        Ok(()) => (Verdict::Good, "/dev/fuse can be opened".to_owned()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => (
            Verdict::Missing,
            "/dev/fuse is missing: modprobe fuse, or start the container with --device /dev/fuse".into(),
        ),
        Err(error) => (Verdict::Missing, format!("/dev/fuse: {error}: expected mode 0666, or root")),
    };
    finding("device", verdict, text)
}

fn helper(is_root: bool, path: &Option<PathBuf>) -> Finding {
    let is_setuid = |path: &Path| fs::metadata(path).is_ok_and(|metadata| metadata.permissions().mode() & 0o4000 != 0);
    let (verdict, text) = match path {
        Some(path) if is_setuid(path) => (Verdict::Good, format!("{}, so users can mount", path.display())),
        _ if is_root => (Verdict::Limited, "no setuid fusermount3 (package fuse3): only root can mount".to_owned()),
        Some(path) => (Verdict::Missing, format!("{} is not setuid root, and root is needed to mount", path.display())),
        None => (Verdict::Missing, "fusermount3 (package fuse3) is missing, and it is needed without root".to_owned()),
    };
    finding("helper", verdict, text)
}

fn other_users(is_root: bool, conf: &str) -> Finding {
    let is_allowed = conf.lines().any(|line| line.trim() == "user_allow_other");
    let (verdict, text) = match (is_allowed, is_root) {
        (true, _) => (Verdict::Good, "--allow-other works for everyone: user_allow_other is in /etc/fuse.conf"),
        (false, true) => {
            (Verdict::Good, "--allow-other works for root; for others add user_allow_other to /etc/fuse.conf")
        }
        (false, false) => {
            (Verdict::Limited, "--allow-other is refused: add the line user_allow_other to /etc/fuse.conf")
        }
    };
    finding("other users", verdict, text.to_owned())
}

fn supervisor(kernel: &str) -> Finding {
    let (verdict, text) = if is_at_least(kernel, (6, 9)) {
        (Verdict::Good, "a mount survives the death of the process that serves it".to_owned())
    } else {
        (
            Verdict::Limited,
            format!("Linux {kernel}: from 6.9 on a mount survives the death of the process that serves it"),
        )
    };
    finding("supervisor", verdict, text)
}

fn readahead(is_writable: bool) -> Finding {
    let (verdict, text) = if is_writable {
        (Verdict::Good, "can be set in /sys/class/bdi")
    } else {
        (
            Verdict::Limited,
            "/sys/class/bdi is not writable: 128 KiB, about half the speed of cold loads; root can set it",
        )
    };
    finding("readahead", verdict, text.to_owned())
}

fn passthrough(kernel: &str, is_root: bool) -> Finding {
    let (verdict, text) = match (is_at_least(kernel, (6, 9)), is_root) {
        (true, true) => (Verdict::Good, "the kernel can read decoded files without the daemon".to_owned()),
        (true, false) => {
            (Verdict::Limited, "needs root; without it decoded files are read through the daemon".to_owned())
        }
        (false, _) => (
            Verdict::Limited,
            format!("Linux {kernel}: needs 6.9; without it decoded files are read through the daemon"),
        ),
    };
    finding("passthrough", verdict, text)
}

fn descriptors() -> Finding {
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: `limit` is a valid `rlimit` during the call.
    unsafe { libc::getrlimit(libc::RLIMIT_NOFILE, &raw mut limit) };
    let verdict = if limit.rlim_max < 4096 { Verdict::Limited } else { Verdict::Good };
    finding("descriptors", verdict, format!("{}; each archive keeps one open", limit.rlim_max))
}

fn memory() -> Finding {
    let limit = HumanBytes(daemon::default_limit_bytes());
    finding("memory", Verdict::Good, format!("decoding may take {limit} unless --memory-limit says otherwise"))
}

fn engines() -> Finding {
    let engines = cpu_engines();
    let names: Vec<_> = engines.iter().map(crate::decode::Engine::name).collect();
    let is_fast = names[0] != "portable" || cfg!(not(target_arch = "x86_64"));
    let verdict = if is_fast { Verdict::Good } else { Verdict::Limited };
    let advice = if is_fast { "" } else { ": a CPU with AVX2 decodes several times as fast" };
    let cores = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    finding("decoder", verdict, format!("{} on {cores} cores{advice}", names[0]))
}

/// `device` is the first one's name and free memory.
fn cuda(device: Result<(String, u64), DeviceError>) -> Finding {
    match device {
        Ok((name, free)) => {
            let text = format!("{name} with {} free: --engine cuda decodes there", HumanBytes(free));
            finding("cuda", Verdict::Good, text)
        }
        Err(error) => finding("cuda", Verdict::Limited, format!("{error}: the CPU decodes")),
    }
}

fn readahead_files() -> Vec<PathBuf> {
    let entries = fs::read_dir("/sys/class/bdi").into_iter().flatten();
    entries.filter_map(|entry| Some(entry.ok()?.path().join("read_ahead_kb"))).collect()
}

fn find_on_path(names: &[&str]) -> Option<PathBuf> {
    let path = std::env::var_os("PATH")?;
    let in_directory = |directory: PathBuf| names.iter().map(move |name| directory.join(name));
    std::env::split_paths(&path).flat_map(in_directory).find(|candidate| candidate.is_file())
}

/// Whether a release such as `6.18.44-custom` is of this version or a later one.
fn is_at_least(release: &str, version: (u32, u32)) -> bool {
    let mut numbers = release.split(|c: char| !c.is_ascii_digit()).map(|number| number.parse().unwrap_or(0));
    (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0)) >= version
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn releases_are_compared_by_number() {
        for (release, expected) in
            [("6.9", true), ("6.18.44-fc", true), ("7.0-rc1", true), ("6.8.12", false), ("", false)]
        {
            assert_eq!(is_at_least(release, (6, 9)), expected, "{release}");
        }
    }

    #[test]
    fn what_stands_in_the_way_of_a_mount_is_missing_and_the_rest_limits_it() {
        assert_eq!(device(Ok(())).verdict, Verdict::Good);
        for kind in [io::ErrorKind::NotFound, io::ErrorKind::PermissionDenied] {
            assert_eq!(device(Err(kind.into())).verdict, Verdict::Missing);
        }
        assert_eq!(helper(true, &None).verdict, Verdict::Limited);
        assert_eq!(helper(false, &None).verdict, Verdict::Missing);
        assert_eq!(helper(false, &Some("/etc/passwd".into())).verdict, Verdict::Missing);
        assert_eq!(cuda(Ok(("a device".into(), 1 << 30))).verdict, Verdict::Good);
        assert_eq!(cuda(Err(DeviceError::Absent("no driver".into()))).verdict, Verdict::Limited);
    }

    #[test]
    fn other_users_need_their_line_and_a_comment_is_none() {
        assert_eq!(other_users(false, "# user_allow_other\n").verdict, Verdict::Limited);
        assert_eq!(other_users(false, "mount_max = 10\n user_allow_other \n").verdict, Verdict::Good);
        assert!(other_users(false, "").text.contains("add the line user_allow_other to /etc/fuse.conf"));
    }

    #[test]
    fn every_subject_is_looked_at_once() {
        let subjects: Vec<_> = examine().iter().map(|finding| finding.subject).collect();
        for subject in
            ["device", "helper", "other users", "supervisor", "readahead", "passthrough", "memory", "decoder", "cuda"]
        {
            assert_eq!(subjects.iter().filter(|found| **found == subject).count(), 1, "{subject}");
        }
    }
}
