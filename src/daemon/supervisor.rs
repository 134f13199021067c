//! The supervisor: owns a mount and keeps a worker serving it.
//!
//! It opens no archive and decodes nothing, so there is little that could bring it down. The mount's device stays open
//! here; when the worker dies, the kernel hands its unanswered requests out again, the next worker answers them, and
//! readers notice nothing but time. Handles and inodes need no memory of who died: see [`crate::vfs`].
//!
//! An upgrade is the same with the order changed: the successor serves before the old worker is told to end. Both answer
//! meanwhile, each what it took.

use std::ffi::{OsString, c_int};
use std::io::{self, BufRead, BufReader, Write};
use std::net::TcpListener;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::{self, ExitStatus, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender};
use std::thread;
use std::time::Instant;

use log::{debug, error, info, warn};
use signal_hook::consts::{SIGHUP, SIGUSR2};

use super::handover::{self, Facts};
use super::restarts::Restarts;
use super::worker::{Command, Message};
use super::{DaemonError, Event, end, service_manager};
use crate::fuse::{Device, OpenFiles};

/// What a worker is started with.
#[derive(Debug)]
pub(super) struct Recipe {
    /// The program, as it is on disk when a worker starts.
    pub(super) program: PathBuf,
    /// The command line without the program's name.
    pub(super) arguments: Vec<OsString>,
    /// The source, absolute.
    pub(super) source: PathBuf,
    /// Where metrics are served, by whichever worker serves.
    pub(super) listener: Option<TcpListener>,
}

/// News of one worker.
#[derive(Debug)]
pub(super) enum News {
    Said(Message),
    Died(io::Result<ExitStatus>),
}

/// A mount and who serves it.
struct Supervisor {
    device: Device,
    recipe: Recipe,
    events: Sender<Event>,
    workers: Vec<Worker>,
    /// How many workers there have been.
    started: u64,
    restart_at: Option<Instant>,
    restarts: Restarts,
    upgrades: u64,
    /// Who has which files open, where files may be passed through.
    open_files: OpenFiles,
    is_ending: bool,
}

#[derive(Debug)]
struct Worker {
    number: u64,
    pid: u32,
    role: Role,
    /// Why it says that it ends: exit code and message.
    failure: Option<(u8, String)>,
    /// Its end tells the worker to end at once.
    control: UnixStream,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Role {
    /// Serves, or is about to. There is at most one.
    Serving,
    /// Takes over once it is ready. There is at most one.
    Successor,
    /// Was told to end.
    Retiring,
}

/// Keeps `device` served until it is unmounted or a signal says to end; calls `ready` once the mount answers.
///
/// # Errors
/// When the first worker does not start, workers keep dying, or `ready` fails. The mount is taken back.
pub(super) fn supervise(
    device: Device,
    recipe: Recipe,
    events: Sender<Event>,
    arrived: &Receiver<Event>,
    ready: impl FnOnce() -> io::Result<()>,
) -> Result<(), DaemonError> {
    let mut supervisor = Supervisor {
        device,
        recipe,
        events,
        workers: Vec::new(),
        started: 0,
        restart_at: Some(Instant::now()),
        restarts: Restarts::default(),
        upgrades: 0,
        open_files: OpenFiles::default(),
        is_ending: false,
    };
    let result = supervisor.run(arrived, ready);
    if result.is_err() && supervisor.device.is_connected() {
        end(supervisor.device.mountpoint());
    }
    result
}

impl Supervisor {
    fn run(&mut self, arrived: &Receiver<Event>, ready: impl FnOnce() -> io::Result<()>) -> Result<(), DaemonError> {
        let mut ready = Some(ready);
        loop {
            if self.restart_at.is_some_and(|at| at <= Instant::now()) {
                self.restart_at = None;
                match self.start_worker(Role::Serving) {
                    Ok(_) => {}
                    Err(source) if ready.is_some() => {
                        return Err(DaemonError::System { what: "starting a worker", source });
                    }
                    // No memory, no processes, the program just being replaced: all of these pass.
                    Err(error) => self.restart(&format!("no worker could be started: {error}"))?,
                }
            }
            let event = match self.restart_at {
                Some(at) => arrived.recv_timeout(at.saturating_duration_since(Instant::now())),
                None => arrived.recv().map_err(RecvTimeoutError::from),
            };
            match event {
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) | Ok(Event::Ended(_)) => {
                    unreachable!("this process holds a sender and serves no mount")
                }
                Ok(Event::Signal(signal)) => {
                    if self.signalled(signal) {
                        return Ok(());
                    }
                }
                Ok(Event::Worker(_, News::Said(Message::Handle(change)))) => {
                    self.open_files.apply(change); // what the kernel names files by is the worker's business
                }
                Ok(Event::Worker(_, News::Said(Message::Held))) => self.start_successor(),
                Ok(Event::Worker(number, News::Said(Message::Failed(code, message)))) => {
                    if let Some(worker) = self.workers.iter_mut().find(|worker| worker.number == number) {
                        worker.failure = Some((code, message));
                    }
                }
                Ok(Event::Worker(number, News::Said(Message::Ready(status)))) => {
                    self.is_ready(number);
                    if let Some(ready) = ready.take() {
                        info!("mounted: {}", self.device.mountpoint().display());
                        service_manager::ready(&status);
                        ready().map_err(|source| DaemonError::System { what: "reporting readiness", source })?;
                    } else {
                        service_manager::status(&format!("{status}; {}", self.history()));
                    }
                }
                Ok(Event::Worker(number, News::Died(status))) => {
                    if self.died(number, &status, ready.is_some())? {
                        info!("unmounted: {}", self.device.mountpoint().display());
                        return Ok(());
                    }
                }
            }
        }
    }

    /// Does what a signal says; returns whether to end at once.
    fn signalled(&mut self, signal: c_int) -> bool {
        match signal {
            SIGHUP => self.tell(Role::Serving, Command::Rescan),
            SIGUSR2 => self.upgrade(),
            _ if self.is_ending => {
                warn!("signal {signal} again: ending with files in use");
                return true;
            }
            _ => {
                let mountpoint = self.device.mountpoint();
                info!("signal {signal}: unmounting {}", mountpoint.display());
                service_manager::stopping("unmounting; files that are open are served until they are closed");
                self.is_ending = true;
                end(mountpoint);
            }
        }
        false
    }

    /// Has the worker hold still what its successor will be told: who has which files open. Where there is none, the next one is new anyway.
    fn upgrade(&self) {
        if self.workers.iter().any(|worker| worker.role == Role::Successor) {
            info!("upgrade: one is under way already");
        } else {
            self.tell(Role::Serving, Command::Hold);
        }
    }

    /// The worker holds still: all that it said of who has which files open has been heard.
    fn start_successor(&mut self) {
        if self.workers.iter().any(|worker| worker.role == Role::Successor) {
            return; // asked for twice
        }
        match self.start_worker(Role::Successor) {
            Ok(pid) => info!("upgrade: worker {pid} is starting from {}", self.recipe.program.display()),
            Err(error) => self.upgrade_failed(&error.to_string()),
        }
    }

    fn upgrade_failed(&self, reason: &str) {
        error!("upgrade failed, the old worker stays: {reason}");
        self.tell(Role::Serving, Command::CountFailedUpgrade);
    }

    /// A worker serves. If it is the successor, the old one is told to end.
    fn is_ready(&mut self, number: u64) {
        let is_successor = |worker: &Worker| worker.number == number && worker.role == Role::Successor;
        let Some(successor) = self.workers.iter().position(is_successor) else { return };
        self.restart_at = None; // the old one may have died meanwhile
        self.tell(Role::Serving, Command::Drain);
        for worker in self.workers.iter_mut().filter(|worker| worker.role == Role::Serving) {
            worker.role = Role::Retiring;
        }
        self.workers[successor].role = Role::Serving;
        self.upgrades += 1;
        info!("upgrade: worker {} serves", self.workers[successor].pid);
    }

    /// A worker is gone. Returns whether the mount is, too.
    fn died(&mut self, number: u64, status: &io::Result<ExitStatus>, is_first: bool) -> Result<bool, DaemonError> {
        let position = self.workers.iter().position(|worker| worker.number == number);
        let Worker { pid, role, failure, .. } = self.workers.swap_remove(position.expect("each dies once"));
        let how = match status {
            Ok(status) => status.to_string(),
            Err(error) => error.to_string(),
        };
        if !self.device.is_connected() {
            debug!("worker {pid} ended with the mount: {how}");
            return Ok(true);
        }
        // Before anybody else is started: what it did not answer comes first.
        if let Err(error) = self.device.resend() {
            warn!("unanswered requests are not handed out again, their readers may hang: {error}");
        }
        let (exit_code, reason) = failure.unwrap_or((super::CRASHED, format!("worker {pid} ended: {how}")));
        match role {
            Role::Retiring => debug!("worker {pid} ended as it was told: {how}"),
            Role::Successor => self.upgrade_failed(&reason),
            Role::Serving if is_first => return Err(DaemonError::Worker { exit_code, message: reason }),
            Role::Serving => self.restart(&reason)?,
        }
        Ok(false)
    }

    fn restart(&mut self, reason: &str) -> Result<(), DaemonError> {
        let Some(wait) = self.restarts.count(Instant::now()) else {
            let mountpoint = self.device.mountpoint().to_owned();
            return Err(DaemonError::KeepsDying { mountpoint, reason: reason.to_owned() });
        };
        warn!("{reason}; a new one takes over ({})", self.history());
        self.restart_at = Some(Instant::now() + wait);
        Ok(())
    }

    fn history(&self) -> String {
        format!("{} restarts, {} upgrades", self.restarts.total(), self.upgrades)
    }

    /// Says `command` to whoever has that role. One that cannot be reached is about to be seen dead.
    fn tell(&self, role: Role, command: Command) {
        for worker in self.workers.iter().filter(|worker| worker.role == role) {
            let line = format!("{}\n", command.word());
            if let Err(error) = (&worker.control).write_all(line.as_bytes()) {
                debug!("worker {} not told to {}: {error}", worker.pid, command.word());
            }
        }
    }

    /// Starts a worker, and threads that bring its news; returns its process.
    fn start_worker(&mut self, role: Role) -> io::Result<u32> {
        let (control, theirs) = UnixStream::pair()?;
        let open_files = handover::write_down(&self.open_files)?;
        let facts = Facts {
            daemon: process::id(),
            restarts: self.restarts.total(),
            upgrades: self.upgrades + u64::from(role == Role::Successor),
            is_suspicious: self.restarts.are_suspicious(),
        };
        let Recipe { program, arguments, source, listener } = &self.recipe;
        let mut command = process::Command::new(program);
        command.args(arguments).stdin(Stdio::null()).stdout(Stdio::null());
        let listener = listener.as_ref();
        handover::prepare(&mut command, source, &self.device, theirs.as_fd(), listener, open_files.as_fd(), &facts);
        let mut child = command.spawn()?;
        drop((theirs, open_files));
        let (number, pid) = (self.started, child.id());
        self.started += 1;
        let (events, lines) = (self.events.clone(), BufReader::new(control.try_clone()?));
        thread::Builder::new().name("worker-news".to_owned()).spawn(move || {
            // All that it says comes before its death: the connection ends with its process.
            for message in lines.lines().map_while(Result::ok).filter_map(|line| Message::parse(&line)) {
                let _ = events.send(Event::Worker(number, News::Said(message))); // the receiver lives as long
            }
            let _ = events.send(Event::Worker(number, News::Died(child.wait())));
        })?;
        debug!("worker {pid} started");
        self.workers.push(Worker { number, pid, role, failure: None, control });
        Ok(pid)
    }
}
