//! What a supervisor hands to the worker that serves its mount: descriptors that stay open across exec, and facts, in the
//! worker's environment. The worker's options are those of the command line, which it is given again.
//!
//! The form is kept from version to version: an upgrade starts a worker from another binary than the supervisor's.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::io;
use std::net::TcpListener;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use super::DaemonError;
use super::launch::{ROLE, WORKER};
use crate::fuse::{Device, Handles};
use crate::hexadecimal::hex;

/// What the worker reads first, so that it can refuse what it would not understand.
const VERSION: &str = "2";
/// Stands behind the last handles where there are more.
const AND_MORE: &str = "more,";
const FACTS: &str = "MCWCFS_HANDOVER";
const SOURCE: &str = "MCWCFS_SOURCE";
const MOUNTPOINT: &str = "MCWCFS_MOUNTPOINT";

/// What a worker is told of the mount that it serves, beside its descriptors.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Facts {
    /// The process that owns the mount: the supervisor, or the only one.
    pub(super) daemon: u32,
    /// Workers that died and were replaced since the mount.
    pub(super) restarts: u64,
    /// Workers that were replaced on request since the mount.
    pub(super) upgrades: u64,
    /// Who has which files open, by inode, where files may be passed through.
    pub(super) handles: BTreeMap<u64, Handles>,
    /// Whether `handles` lacks some that are read through the page cache.
    pub(super) lacks_handles: bool,
    /// Whether so many workers died that a request must be suspected of killing them.
    pub(super) is_suspicious: bool,
}

impl Facts {
    /// Whether another process has answered for this mount before.
    pub(super) fn is_successor(&self) -> bool {
        self.restarts + self.upgrades > 0
    }
}

/// `inode:cached:passed:backing`, the last of which may be empty.
pub(super) fn line_of_handles(inode: u64, handles: &Handles) -> String {
    let Handles { cached, passed, backing } = handles;
    let backing = backing.map_or(String::new(), |name| name.to_string());
    format!("{inode}:{cached}:{passed}:{backing}")
}

/// What [`line_of_handles`] wrote.
pub(super) fn parse_handles(line: &str) -> Option<(u64, Handles)> {
    let fields: Vec<&str> = line.split(':').collect();
    let [inode, cached, passed, backing] = fields[..] else { return None };
    let backing = if backing.is_empty() { None } else { Some(backing.parse().ok()?) };
    let handles = Handles { cached: cached.parse().ok()?, passed: passed.parse().ok()?, backing };
    Some((inode.parse().ok()?, handles))
}

/// Everything a worker gets.
#[derive(Debug)]
pub(super) struct Handover {
    pub(super) source: PathBuf,
    pub(super) device: Device,
    /// Commands come from here; its end is the supervisor's.
    pub(super) control: UnixStream,
    /// Where metrics are served.
    pub(super) listener: Option<TcpListener>,
    pub(super) facts: Facts,
}

/// Puts into `command` what [`receive`] takes out in the new process. The descriptors must stay open until it has been
/// spawned.
pub(super) fn prepare(
    command: &mut Command,
    source: &Path,
    device: &Device,
    control: BorrowedFd<'_>,
    listener: Option<&TcpListener>,
    facts: &Facts,
) {
    let Facts { daemon, restarts, upgrades, handles, lacks_handles, is_suspicious } = facts;
    let mut descriptors = vec![device.as_fd().as_raw_fd(), control.as_raw_fd()];
    descriptors.extend(listener.map(AsRawFd::as_raw_fd));
    let listener = listener.map_or("none".to_owned(), |listener| listener.as_raw_fd().to_string());
    let (device_number, control_number, suspicious) = (descriptors[0], descriptors[1], u8::from(*is_suspicious));
    let mut text =
        format!("{VERSION} {device_number} {control_number} {listener} {daemon} {restarts} {upgrades} {suspicious} ");
    text.push_str(&hex(device.greeting()));
    text.push(' ');
    for (inode, handles) in handles {
        text.push_str(&line_of_handles(*inode, handles));
        text.push(',');
    }
    if *lacks_handles {
        text.push_str(AND_MORE);
    }
    command.env(ROLE, WORKER).env(FACTS, text).env(SOURCE, source).env(MOUNTPOINT, device.mountpoint());
    // SAFETY: between fork and exec only `fcntl` and `signal` are called, which are async-signal-safe.
    unsafe { command.pre_exec(move || become_worker(&descriptors)) };
}

/// In the new process, before it runs the program: descriptors stay open, and signals are left to the supervisor. They
/// reach both where a terminal or a service manager sends them to a whole group.
fn become_worker(descriptors: &[RawFd]) -> io::Result<()> {
    for &descriptor in descriptors {
        // SAFETY: `fcntl` with F_SETFD touches no memory of ours.
        if unsafe { libc::fcntl(descriptor, libc::F_SETFD, 0) } < 0 {
            return Err(io::Error::last_os_error());
        }
    }
    for signal in [libc::SIGTERM, libc::SIGINT, libc::SIGHUP, libc::SIGUSR2] {
        // SAFETY: ignoring a signal installs no handler.
        unsafe { libc::signal(signal, libc::SIG_IGN) };
    }
    Ok(())
}

/// In a worker: what its supervisor prepared. To be called once.
pub(super) fn receive() -> Result<Handover, DaemonError> {
    let variable = |name| std::env::var_os(name).ok_or_else(|| problem(format!("{name} is not set")));
    let text = variable(FACTS)?;
    let fields = parse(&text).map_err(problem)?;
    let adopt = |descriptor: RawFd| {
        // SAFETY: `fcntl` with F_SETFD touches no memory of ours; on a closed descriptor it fails.
        if unsafe { libc::fcntl(descriptor, libc::F_SETFD, libc::FD_CLOEXEC) } < 0 {
            return Err(problem(format!("descriptor {descriptor}: {}", io::Error::last_os_error())));
        }
        // SAFETY: it is open, it was inherited for this purpose, and nobody else adopts it.
        Ok(unsafe { OwnedFd::from_raw_fd(descriptor) })
    };
    let (device, control) = (adopt(fields.device)?, adopt(fields.control)?);
    let listener = fields.listener.map(adopt).transpose()?;
    Ok(Handover {
        source: variable(SOURCE)?.into(),
        device: Device::from_parts(device, variable(MOUNTPOINT)?.into(), fields.greeting),
        control: control.into(),
        listener: listener.map(TcpListener::from),
        facts: fields.facts,
    })
}

fn problem(problem: String) -> DaemonError {
    DaemonError::Handover { problem }
}

#[derive(Debug, PartialEq, Eq)]
struct Fields {
    device: RawFd,
    control: RawFd,
    listener: Option<RawFd>,
    facts: Facts,
    greeting: Vec<u8>,
}

fn parse(text: &OsString) -> Result<Fields, String> {
    let text = text.to_str().ok_or("not UTF-8")?;
    let fields: Vec<&str> = text.split(' ').collect();
    if fields[0] != VERSION {
        return Err(format!("version {:?}, expected {VERSION}: the supervisor is of another version", fields[0]));
    }
    let [_, device, control, listener, daemon, restarts, upgrades, suspicious, greeting, handles] = fields[..] else {
        return Err(format!("{} fields, expected 10", fields.len()));
    };
    let bad = |field: &str| format!("{field:?}: expected a number");
    let number = |field: &str| field.parse::<u64>().map_err(|_| bad(field));
    let descriptor = |field: &str| field.parse().map_err(|_| bad(field));
    let digits = greeting.as_bytes().chunks(2).map(|pair| std::str::from_utf8(pair).unwrap_or_default());
    let greeting: Result<_, _> = digits.map(|pair| u8::from_str_radix(pair, 16).map_err(|_| bad(pair))).collect();
    let (handles, lacks_handles) = handles.strip_suffix(AND_MORE).map_or((handles, false), |handles| (handles, true));
    let handles = handles.split_terminator(',').map(|line| parse_handles(line).ok_or_else(|| bad(line)));
    Ok(Fields {
        device: descriptor(device)?,
        control: descriptor(control)?,
        listener: if listener == "none" { None } else { Some(descriptor(listener)?) },
        facts: Facts {
            daemon: daemon.parse().map_err(|_| bad(daemon))?,
            restarts: number(restarts)?,
            upgrades: number(upgrades)?,
            handles: handles.collect::<Result<_, _>>()?,
            lacks_handles,
            is_suspicious: number(suspicious)? != 0,
        },
        greeting: greeting?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn facts_are_read_as_they_were_written_and_other_versions_are_refused() {
        let handles = [
            (7, Handles { cached: 0, passed: 1, backing: Some(4) }),
            (u64::MAX, Handles { cached: 2, ..Handles::default() }),
        ];
        let facts = Facts {
            daemon: 12,
            restarts: 3,
            upgrades: 4,
            handles: handles.into(),
            lacks_handles: false,
            is_suspicious: true,
        };
        let mut expected = Fields { device: 5, control: 6, listener: Some(7), facts, greeting: vec![0, 0xab, 0xff] };
        let text = "2 5 6 7 12 3 4 1 00abff 7:0:1:4,18446744073709551615:2:0:,";
        assert_eq!(parse(&text.into()).as_ref(), Ok(&expected));
        expected.facts.lacks_handles = true;
        assert_eq!(parse(&format!("{text}more,").into()), Ok(expected));
        assert_eq!(parse(&"2 5 6 none 12 3 4 0  ".into()).unwrap().listener, None);
        assert!(parse(&"1 5 6".into()).unwrap_err().contains("another version"));
        for text in
            ["", "2", "2 5 6 x 12 3 4 0 00 ", "2 5 6 7 12 3 4 0 0g ", "2 5 6 7 12 3 4 0 é ", "2 5 6 7 12 3 4 0 00 1"]
        {
            assert!(parse(&text.into()).is_err(), "{text}");
        }
    }
}
