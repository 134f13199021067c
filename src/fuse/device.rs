//! The kernel's side of a mount: the open device, and what the kernel said first.
//!
//! A mount's device can outlive the process that answers on it. The kernel greets once, right after the mount; the
//! greeting is answered and kept, and whoever serves the device later, in this process or another, repeats the exchange
//! with itself: `fuser` will not start without it, and needs no patch this way. What a process took from the device and
//! did not answer before it died, the kernel hands out again on request ([`Device::resend`], Linux 6.9).

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::path::{Path, PathBuf};

use fuser::{Filesystem, InitFlags, KernelConfig, Request, Session};

use super::adapter::configure;
use super::{FuseError, MountOptions, kernel_mount, mount_table};

/// More than a greeting takes, and as much as the kernel insists on for a first read.
const GREETING_BYTES: usize = 64 << 10;

/// The open device of a mount.
#[derive(Debug)]
pub struct Device {
    file: File,
    mountpoint: PathBuf,
    greeting: Vec<u8>,
    can_resend: bool,
}

impl Device {
    /// Mounts at `mountpoint` and greets the kernel. Nothing is answered yet: see [`super::serve`].
    ///
    /// # Errors
    /// When the mount point cannot be used or the system refuses. Nothing is left mounted then.
    pub fn mount(mountpoint: &Path, options: &MountOptions) -> Result<Self, FuseError> {
        if mount_table::is_dead(mountpoint) {
            return Err(FuseError::DeadMount { path: mountpoint.to_owned() });
        }
        let wrap = |source| FuseError::MountPoint { path: mountpoint.to_owned(), source };
        let mountpoint = mountpoint.canonicalize().map_err(wrap)?;
        if !mountpoint.is_dir() {
            return Err(FuseError::MountPoint { path: mountpoint, source: io::ErrorKind::NotADirectory.into() });
        }
        let file = File::from(kernel_mount::mount(&mountpoint, options)?);
        let greeted = greet(&file, options);
        let (greeting, can_resend) = greeted.map_err(|source| {
            let _ = kernel_mount::unmount(&mountpoint, true); // nobody will answer there
            FuseError::Session { path: mountpoint.clone(), source }
        })?;
        Ok(Self { file, mountpoint, greeting, can_resend })
    }

    /// The device of a mount that another process made, from the descriptor and the greeting it handed over.
    pub fn from_parts(descriptor: OwnedFd, mountpoint: PathBuf, greeting: Vec<u8>) -> Self {
        // Whoever hands a device over can have it resent; who got it leaves that to them.
        Self { file: File::from(descriptor), mountpoint, greeting, can_resend: false }
    }

    /// Where it is mounted, absolute.
    pub fn mountpoint(&self) -> &Path {
        &self.mountpoint
    }

    /// The kernel's greeting, for a process that is to serve this device.
    pub fn greeting(&self) -> &[u8] {
        &self.greeting
    }

    /// Whether the kernel hands unanswered requests out again: [`Self::resend`].
    pub fn can_resend(&self) -> bool {
        self.can_resend
    }

    /// Whether the mount is still there: false once it has been unmounted and its last user is gone.
    pub fn is_connected(&self) -> bool {
        is_connected(&self.file)
    }

    /// Has the kernel hand out again every request that was taken from the device and not answered.
    pub fn resend(&self) -> io::Result<()> {
        const NOTIFY_RESEND: i32 = 7;
        notify(&self.file, NOTIFY_RESEND, &[]).map(drop)
    }

    pub(super) fn into_parts(self) -> (File, PathBuf, Vec<u8>) {
        (self.file, self.mountpoint, self.greeting)
    }
}

impl AsFd for Device {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

/// See [`Device::is_connected`].
pub(super) fn is_connected(device: &File) -> bool {
    let mut state = libc::pollfd { fd: device.as_raw_fd(), events: libc::POLLIN, revents: 0 };
    // SAFETY: `state` is one valid `pollfd` during the call.
    let result = unsafe { libc::poll(&raw mut state, 1, 0) };
    result < 1 || state.revents & libc::POLLERR == 0
}

/// Sends the kernel a message that is no answer: `fuse_out_header` with the message's code in place of an error, and its
/// body. Returns whether the kernel knew what it is about.
pub(super) fn notify(mut device: &File, code: i32, body: &[u8]) -> io::Result<bool> {
    const HEADER_BYTES: usize = 16;
    let length = u32::try_from(HEADER_BYTES + body.len()).expect("a body is a name at most");
    let message = [&length.to_ne_bytes()[..], &code.to_ne_bytes(), &0_u64.to_ne_bytes(), body].concat();
    match device.write(&message) {
        Ok(_) => Ok(true), // all of it: the device takes whole messages
        Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(false),
        Err(error) => Err(error),
    }
}

/// Takes the kernel's greeting and answers it. Returns it, and whether the kernel can resend.
fn greet(mut device: &File, options: &MountOptions) -> io::Result<(Vec<u8>, bool)> {
    let mut greeting = vec![0; GREETING_BYTES];
    let length = loop {
        match device.read(&mut greeting) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            result => break result?,
        }
    };
    greeting.truncate(length);
    let (sender, receiver) = std::sync::mpsc::channel();
    let (session, answer) =
        start_session(Greeter { can_resend: sender, options: options.clone() }, &greeting, options)?;
    drop(session);
    device.write_all(&answer)?;
    Ok((greeting, receiver.try_recv().unwrap_or(false)))
}

/// A session of `fuser` that took `greeting` for the kernel's, and its answer. It listens to nobody yet: see
/// [`connect`].
pub(super) fn start_session<F: Filesystem>(
    filesystem: F,
    greeting: &[u8],
    options: &MountOptions,
) -> io::Result<(Session<F>, Vec<u8>)> {
    let mut config = fuser::Config::default();
    config.acl = if options.allow_other { fuser::SessionACL::All } else { fuser::SessionACL::Owner };
    config.n_threads = Some(options.event_loops.max(1));
    // One descriptor for all loops: unanswered requests can then be repeated to a successor process.
    config.clone_fd = false;
    let (mut ours, theirs) = message_pair()?;
    ours.write_all(greeting)?;
    let session = Session::from_fd(filesystem, theirs, config.acl, config)?;
    let mut answer = vec![0; GREETING_BYTES];
    let length = ours.read(&mut answer)?;
    answer.truncate(length);
    Ok((session, answer))
}

/// Lets a session listen to the device: its descriptor becomes another one for the device.
pub(super) fn connect<F: Filesystem>(session: &Session<F>, device: &File) -> io::Result<()> {
    let number = session.as_fd().as_raw_fd();
    // SAFETY: both descriptors are open. The session's stays open and its own, with another file behind it.
    if unsafe { libc::dup3(device.as_raw_fd(), number, libc::O_CLOEXEC) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// Two ends of a connection that keeps messages apart, as the device does.
fn message_pair() -> io::Result<(File, OwnedFd)> {
    let mut ends: [RawFd; 2] = [0; 2];
    let kind = libc::SOCK_SEQPACKET | libc::SOCK_CLOEXEC;
    // SAFETY: `ends` has room for two descriptors.
    if unsafe { libc::socketpair(libc::AF_UNIX, kind, 0, ends.as_mut_ptr()) } < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: both descriptors are new and nobody else's.
    Ok(unsafe { (File::from_raw_fd(ends[0]), OwnedFd::from_raw_fd(ends[1])) })
}

/// Answers the greeting and nothing else; tells whether the kernel can resend.
struct Greeter {
    can_resend: std::sync::mpsc::Sender<bool>,
    options: MountOptions,
}

impl Filesystem for Greeter {
    fn init(&mut self, _request: &Request, config: &mut KernelConfig) -> io::Result<()> {
        configure(config, &self.options);
        let _ = self.can_resend.send(config.capabilities().contains(InitFlags::FUSE_HAS_RESEND)); // the receiver waits
        Ok(())
    }
}
