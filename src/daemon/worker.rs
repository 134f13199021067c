//! The worker: serves a mount that its supervisor owns, and does what that says.
//!
//! It may be killed at any moment. Whatever it knows it has from the command line and the source, and what it took from
//! the kernel and did not answer goes to its successor.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use log::{debug, error, info};

use super::handover::{self, Handover};
use super::service::{Before, Prepared, Service};
use super::{DaemonError, ServeOptions, answers, process};
use crate::fuse::{HandleChange, Registry};

/// How long a worker that is replaced may take to answer what it has taken. What is left then goes to its successor.
const DRAIN_WITHIN: Duration = Duration::from_secs(10);

/// What a supervisor tells its worker, one word a line.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Command {
    /// List the source again.
    Rescan,
    /// A successor is about to be started: hold still what it will be told, and say so.
    Hold,
    /// A successor serves: answer what you have and end.
    Drain,
    /// A successor was asked for and did not start.
    CountFailedUpgrade,
}

/// What a worker tells its supervisor, one line each.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Message {
    /// The mount answers; the text says what it shows.
    Ready(String),
    /// It ends, and why: an exit code and a message.
    Failed(u8, String),
    /// A file is opened or was closed.
    Handle(HandleChange),
    /// It holds still, as it was told.
    Held,
}

impl Command {
    const WORDS: [(Self, &'static str); 4] = [
        (Self::Rescan, "rescan"),
        (Self::Hold, "hold"),
        (Self::Drain, "drain"),
        (Self::CountFailedUpgrade, "failed-upgrade"),
    ];

    pub(super) fn word(self) -> &'static str {
        Self::WORDS.into_iter().find(|(command, _)| *command == self).expect("each has one").1
    }

    fn parse(word: &str) -> Option<Self> {
        Self::WORDS.into_iter().find(|(_, known)| *known == word).map(|(command, _)| command)
    }
}

impl Message {
    fn line(&self) -> String {
        let line = match self {
            Self::Ready(status) => format!("ready {status}"),
            Self::Failed(code, message) => format!("failed {code} {message}"),
            Self::Handle(change) => change.to_string(),
            Self::Held => "held yes".to_owned(),
        };
        line.replace('\n', " ") + "\n"
    }

    pub(super) fn parse(line: &str) -> Option<Self> {
        match line.split_once(' ')? {
            ("ready", status) => Some(Self::Ready(status.to_owned())),
            ("opened" | "closed", _) => Some(Self::Handle(line.parse().ok()?)),
            ("held", _) => Some(Self::Held),
            ("failed", rest) => {
                let (code, message) = rest.split_once(' ')?;
                Some(Self::Failed(code.parse().ok()?, message.to_owned()))
            }
            _ => None,
        }
    }
}

/// The whole life of a worker. `exit_code` says which code a failure ends the program with.
///
/// # Errors
/// When what the supervisor prepared is not there, the source cannot be listed, or the conversation with the kernel
/// breaks. The supervisor has been told.
pub fn run(options: ServeOptions, exit_code: impl Fn(&DaemonError) -> u8) -> Result<(), DaemonError> {
    let Handover { source, device, control, listener, open_files, facts } = handover::receive()?;
    let options = ServeOptions { source, mountpoint: device.mountpoint().to_owned(), ..options };
    let wrap = |source| DaemonError::System { what: "sharing a connection", source };
    let said = control.try_clone().map_err(wrap)?;
    let serve = || {
        process::raise_descriptor_limit();
        let registry = Arc::new(ToSupervisor(said.try_clone().map_err(wrap)?));
        let before = Before { open_files, facts };
        let service = Prepared::new(&options)?.serve(&options, device, listener, before, Some(registry))?;
        let mountpoint = service.mounted.mountpoint();
        answers(mountpoint)
            .map_err(|problem| DaemonError::NotAnswering { mountpoint: mountpoint.to_owned(), problem })?;
        Ok(service)
    };
    let service = serve().inspect_err(|error| tell(&control, &Message::Failed(exit_code(error), error.to_string())))?;
    let Service { mounted, rescans, status } = service;
    tell(&control, &Message::Ready(status.summary()));
    info!("serving: {}", mounted.mountpoint().display());
    let mounted = Arc::new(mounted);
    let has_ended = Arc::new(AtomicBool::new(false));
    let listen = {
        let (mounted, has_ended) = (Arc::clone(&mounted), Arc::clone(&has_ended));
        move || {
            for line in BufReader::new(control).lines().map_while(Result::ok) {
                match Command::parse(&line) {
                    Some(Command::Rescan) => rescans.request(),
                    Some(Command::CountFailedUpgrade) => {
                        status.count_failed_upgrade();
                        mounted.release_passthrough();
                    }
                    Some(Command::Hold) => {
                        mounted.hold_passthrough();
                        tell(&said, &Message::Held);
                    }
                    Some(Command::Drain) => {
                        let all = mounted.drain(DRAIN_WITHIN);
                        debug!("drained: {}", if all { "every request answered" } else { "the rest is resent" });
                        std::process::exit(0);
                    }
                    None => debug!("command not understood: {line:?}"),
                }
            }
            if !has_ended.load(Ordering::Relaxed) {
                error!("the supervisor is gone: ending, so that readers get an error and not silence");
                std::process::exit(1);
            }
        }
    };
    let start = thread::Builder::new().name("control".to_owned()).spawn(listen);
    start.map_err(|source| DaemonError::System { what: "starting a thread", source })?;
    let mountpoint = mounted.mountpoint().to_owned();
    let result = mounted.wait();
    has_ended.store(true, Ordering::Relaxed);
    result.map_err(|source| DaemonError::Ended { mountpoint, source })
}

/// Tells the supervisor who has which files open.
struct ToSupervisor(UnixStream);

impl Registry for ToSupervisor {
    fn note(&self, change: HandleChange) {
        tell(&self.0, &Message::Handle(change));
    }
}

fn tell(mut control: &UnixStream, message: &Message) {
    // Without a supervisor there is nobody to tell, and the end of the connection ends this process.
    let _ = control.write_all(message.line().as_bytes());
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vfs::Inode;

    #[test]
    fn what_is_said_is_understood() {
        for command in [Command::Rescan, Command::Hold, Command::Drain, Command::CountFailedUpgrade] {
            assert_eq!(Command::parse(command.word()), Some(command));
        }
        assert_eq!(Command::parse("self-destruct"), None);
        let ready = Message::Ready("7 archives".into());
        let failed = Message::Failed(32, "source /x: gone".into());
        let opened = Message::Handle(HandleChange::Opened { inode: Inode(u64::MAX), handle: 4, backing: Some(3) });
        let closed = Message::Handle(HandleChange::Closed { inode: Inode(5), handle: 4 });
        for message in [ready, failed, opened, closed, Message::Held] {
            assert_eq!(Message::parse(message.line().trim_end()), Some(message));
        }
        for line in ["", "ready", "failed", "failed x y", "failed 999 y", "opened 1", "closed x 2", "hello world"] {
            assert_eq!(Message::parse(line), None, "{line:?}");
        }
    }
}
