//! What a supervisor hands to the worker that serves its mount: descriptors that stay open across exec, and facts, in the
//! worker's environment. The worker's options are those of the command line, which it is given again.
//!
//! The form is kept from version to version: an upgrade starts a worker from another binary than the supervisor's.

use std::ffi::OsString;
use std::fs::File;
use std::io::{self, BufRead, BufReader, BufWriter, Seek, Write};
use std::net::TcpListener;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use super::DaemonError;
use super::launch::{ROLE, WORKER};
use crate::fuse::{Device, OpenFiles};
use crate::hexadecimal::hex;

/// What the worker reads first, so that it can refuse what it would not understand.
const VERSION: &str = "3";
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
    /// Whether so many workers died that a request must be suspected of killing them.
    pub(super) is_suspicious: bool,
}

impl Facts {
    /// Whether another process has answered for this mount before.
    pub(super) fn is_successor(&self) -> bool {
        self.restarts + self.upgrades > 0
    }
}

/// An account of open files, where a process that inherits the descriptor can [read](read_account) it: however many there
/// are, they take no room in its environment.
pub(super) fn write_down(open_files: &OpenFiles) -> io::Result<File> {
    // SAFETY: the name is a C string.
    let descriptor = unsafe { libc::memfd_create(c"open-files".as_ptr(), libc::MFD_CLOEXEC) };
    if descriptor < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: it is new and nobody else's.
    let mut file = BufWriter::new(unsafe { File::from_raw_fd(descriptor) });
    for change in open_files.changes() {
        writeln!(file, "{change}")?;
    }
    let mut file = file.into_inner()?;
    file.rewind()?;
    Ok(file)
}

/// What [`write_down`] wrote.
fn read_account(file: File) -> Result<OpenFiles, DaemonError> {
    let mut open_files = OpenFiles::default();
    for line in BufReader::new(file).lines() {
        let line = line.map_err(|error| problem(format!("open files: {error}")))?;
        open_files.apply(line.parse().map_err(|_| problem(format!("open files: {line:?}: expected a handle")))?);
    }
    Ok(open_files)
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
    /// Who has which files open, where files may be passed through.
    pub(super) open_files: OpenFiles,
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
    open_files: BorrowedFd<'_>,
    facts: &Facts,
) {
    let Facts { daemon, restarts, upgrades, is_suspicious } = facts;
    let mut descriptors = vec![device.as_fd().as_raw_fd(), control.as_raw_fd(), open_files.as_raw_fd()];
    descriptors.extend(listener.map(AsRawFd::as_raw_fd));
    let listener = listener.map_or("none".to_owned(), |listener| listener.as_raw_fd().to_string());
    let [device_number, control_number, account, ..] = descriptors[..] else { unreachable!("three are always there") };
    let suspicious = u8::from(*is_suspicious);
    let greeting = hex(device.greeting());
    let text = format!(
        "{VERSION} {device_number} {control_number} {listener} {account} {daemon} {restarts} {upgrades} {suspicious} {greeting}"
    );
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
    let open_files = read_account(adopt(fields.open_files)?.into())?;
    Ok(Handover {
        source: variable(SOURCE)?.into(),
        device: Device::from_parts(device, variable(MOUNTPOINT)?.into(), fields.greeting),
        control: control.into(),
        listener: listener.map(TcpListener::from),
        open_files,
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
    open_files: RawFd,
    facts: Facts,
    greeting: Vec<u8>,
}

fn parse(text: &OsString) -> Result<Fields, String> {
    let text = text.to_str().ok_or("not UTF-8")?;
    let fields: Vec<&str> = text.split(' ').collect();
    if fields[0] != VERSION {
        return Err(format!("version {:?}, expected {VERSION}: the supervisor is of another version", fields[0]));
    }
    let [_, device, control, listener, open_files, daemon, restarts, upgrades, suspicious, greeting] = fields[..]
    else {
        return Err(format!("{} fields, expected 10", fields.len()));
    };
    let bad = |field: &str| format!("{field:?}: expected a number");
    let number = |field: &str| field.parse::<u64>().map_err(|_| bad(field));
    let descriptor = |field: &str| field.parse().map_err(|_| bad(field));
    let digits = greeting.as_bytes().chunks(2).map(|pair| std::str::from_utf8(pair).unwrap_or_default());
    let greeting: Result<_, _> = digits.map(|pair| u8::from_str_radix(pair, 16).map_err(|_| bad(pair))).collect();
    Ok(Fields {
        device: descriptor(device)?,
        control: descriptor(control)?,
        listener: if listener == "none" { None } else { Some(descriptor(listener)?) },
        open_files: descriptor(open_files)?,
        facts: Facts {
            daemon: daemon.parse().map_err(|_| bad(daemon))?,
            restarts: number(restarts)?,
            upgrades: number(upgrades)?,
            is_suspicious: number(suspicious)? != 0,
        },
        greeting: greeting?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fuse::HandleChange;
    use crate::vfs::Inode;

    #[test]
    fn facts_are_read_as_they_were_written_and_other_versions_are_refused() {
        let facts = Facts { daemon: 12, restarts: 3, upgrades: 4, is_suspicious: true };
        let greeting = vec![0, 0xab, 0xff];
        let expected = Fields { device: 5, control: 6, listener: Some(7), open_files: 8, facts, greeting };
        assert_eq!(parse(&"3 5 6 7 8 12 3 4 1 00abff".into()), Ok(expected));
        assert_eq!(parse(&"3 5 6 none 8 12 3 4 0 ".into()).unwrap().listener, None);
        assert!(parse(&"1 5 6".into()).unwrap_err().contains("another version"));
        for text in [
            "",
            "3",
            "3 5 6 x 8 12 3 4 0 00",
            "3 5 6 7 8 12 3 4 0 0g",
            "3 5 6 7 8 12 3 4 0 é",
            "3 5 6 7 8 12 3 4 0 00 1",
        ] {
            assert!(parse(&text.into()).is_err(), "{text}");
        }
    }

    #[test]
    fn an_account_of_any_length_is_read_as_it_was_written() {
        let mut open_files = OpenFiles::default();
        for number in 0..10_000 {
            let backing = (number % 3 == 0).then_some(number as u32);
            open_files.apply(HandleChange::Opened { inode: Inode(number), handle: u64::MAX - number, backing });
        }
        assert_eq!(read_account(write_down(&open_files).unwrap()).unwrap(), open_files);
        let mut damaged = write_down(&open_files).unwrap();
        damaged.write_all(b"opened x").unwrap();
        damaged.rewind().unwrap();
        assert!(read_account(damaged).unwrap_err().to_string().contains("expected a handle"));
    }
}
