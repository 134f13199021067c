//! Mounting and unmounting: the system call where we may, the setuid helper `fusermount3` where we may not.
//!
//! Our own, and not `fuser`'s, for three reasons: the type reads `fuse.mcwcfs` on this path too; a session that ends
//! never unmounts what somebody else has mounted at the same path since; and whoever holds the device can outlive a
//! session.

use std::ffi::{CString, OsString};
use std::fs::File;
use std::io;
use std::mem::{size_of, zeroed};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};

use super::{FuseError, MountOptions, SUBTYPE};

const DEVICE: &str = "/dev/fuse";
/// The helper of libfuse 3, then that of libfuse 2, which speaks the same way.
const HELPERS: [&str; 2] = ["fusermount3", "fusermount"];

/// Mounts at `mountpoint`, a canonical path, and returns the device on which the kernel asks.
pub(super) fn mount(mountpoint: &Path, options: &MountOptions) -> Result<OwnedFd, FuseError> {
    let wrap = |problem| FuseError::Mount { path: mountpoint.to_owned(), problem };
    match mount_directly(mountpoint, options) {
        Ok(device) => Ok(device),
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
            mount_by_helper(mountpoint, options).map_err(|helper| wrap(format!("{error}; {helper}")))
        }
        Err(error) => Err(wrap(error.to_string())),
    }
}

fn mount_directly(mountpoint: &Path, options: &MountOptions) -> io::Result<OwnedFd> {
    let device = File::options().read(true).write(true).open(DEVICE).map_err(|error| {
        let hint = if error.kind() == io::ErrorKind::NotFound { " (is the fuse module loaded?)" } else { "" };
        io::Error::new(error.kind(), format!("{DEVICE}: {error}{hint}"))
    })?;
    // SAFETY: these calls have no preconditions and cannot fail.
    let (uid, gid) = unsafe { (libc::getuid(), libc::getgid()) };
    let mut data = format!("fd={},rootmode=40000,user_id={uid},group_id={gid},default_permissions", device.as_raw_fd());
    if options.allow_other {
        data.push_str(",allow_other");
    }
    let source = CString::new(options.fsname.as_str())?;
    let target = CString::new(mountpoint.as_os_str().as_bytes())?;
    let kind = CString::new(format!("fuse.{SUBTYPE}"))?;
    let data = CString::new(data)?;
    let mut flags = libc::MS_RDONLY | libc::MS_NOSUID | libc::MS_NODEV | libc::MS_NOATIME;
    if options.no_exec {
        flags |= libc::MS_NOEXEC;
    }
    // SAFETY: all pointers are to C strings that outlive the call.
    let result = unsafe { libc::mount(source.as_ptr(), target.as_ptr(), kind.as_ptr(), flags, data.as_ptr().cast()) };
    if result == 0 { Ok(device.into()) } else { Err(annotate("mount(2)")) }
}

/// Asks the helper to mount. It opens the device, mounts, and sends the descriptor over a socket.
fn mount_by_helper(mountpoint: &Path, options: &MountOptions) -> io::Result<OwnedFd> {
    let fsname = options.fsname.replace('\\', r"\\").replace(',', r"\,");
    let mut list = format!("ro,nosuid,nodev,noatime,default_permissions,fsname={fsname},subtype={SUBTYPE}");
    if options.allow_other {
        list.push_str(",allow_other");
    }
    if options.no_exec {
        list.push_str(",noexec");
    }
    let (ours, theirs) = UnixStream::pair()?;
    let theirs_number = theirs.as_raw_fd();
    let arguments = [OsString::from("-o"), list.into(), "--".into(), mountpoint.into()];
    let (helper, mut child) = spawn_helper(&arguments, |command| {
        command.env("_FUSE_COMMFD", theirs_number.to_string());
        // SAFETY: between fork and exec only `fcntl` is called, which is async-signal-safe.
        unsafe { command.pre_exec(move || keep_open(theirs_number)) };
    })?;
    drop(theirs);
    let device = receive_descriptor(&ours);
    let mut complaint = String::new();
    if let Some(mut stderr) = child.stderr.take() {
        let _ = io::Read::read_to_string(&mut stderr, &mut complaint); // what it said before it failed is enough
    }
    child.wait()?;
    device.map_err(|error| {
        let complaint = complaint.trim();
        io::Error::other(if complaint.is_empty() { format!("{helper}: {error}") } else { complaint.to_owned() })
    })
}

/// Unmounts what is at `mountpoint`; `lazily` also where it is in use: it vanishes from the path now and ends with its
/// last user.
///
/// # Errors
/// [`FuseError::Unmount`], with `is_busy` where something below the mount point is in use.
pub fn unmount(mountpoint: &Path, lazily: bool) -> Result<(), FuseError> {
    let wrap = |is_busy, problem| FuseError::Unmount { path: mountpoint.to_owned(), is_busy, problem };
    let target = CString::new(mountpoint.as_os_str().as_bytes()).map_err(|error| wrap(false, error.to_string()))?;
    let flags = libc::UMOUNT_NOFOLLOW | if lazily { libc::MNT_DETACH } else { 0 };
    // SAFETY: `target` is a C string that outlives the call.
    if unsafe { libc::umount2(target.as_ptr(), flags) } == 0 {
        return Ok(());
    }
    let error = io::Error::last_os_error();
    match error.raw_os_error() {
        Some(libc::EPERM) => unmount_by_helper(mountpoint, lazily).map_err(|error| {
            let problem = error.to_string();
            wrap(problem.contains("busy"), problem)
        }),
        Some(libc::EINVAL) => Err(wrap(false, "not a mount point".to_owned())),
        code => Err(wrap(code == Some(libc::EBUSY), error.to_string())),
    }
}

fn unmount_by_helper(mountpoint: &Path, lazily: bool) -> io::Result<()> {
    let mut arguments = vec![OsString::from("-u")];
    if lazily {
        arguments.push("-z".into());
    }
    arguments.extend(["--".into(), mountpoint.into()]);
    let (helper, child) = spawn_helper(&arguments, |_| {})?;
    let output = child.wait_with_output()?;
    if output.status.success() {
        return Ok(());
    }
    let complaint = String::from_utf8_lossy(&output.stderr).trim().to_owned();
    Err(io::Error::other(if complaint.is_empty() { format!("{helper}: {}", output.status) } else { complaint }))
}

fn spawn_helper(
    arguments: &[OsString],
    prepare: impl Fn(&mut Command),
) -> io::Result<(&'static str, std::process::Child)> {
    for helper in HELPERS {
        let mut command = Command::new(helper);
        command.args(arguments).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
        prepare(&mut command);
        match command.spawn() {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            spawned => return spawned.map(|child| (helper, child)),
        }
    }
    Err(io::Error::new(
        io::ErrorKind::NotFound,
        "fusermount3 is not installed (package fuse3), and it is needed without root",
    ))
}

fn keep_open(descriptor: RawFd) -> io::Result<()> {
    // SAFETY: `fcntl` with F_SETFD touches no memory of ours.
    if unsafe { libc::fcntl(descriptor, libc::F_SETFD, 0) } == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Takes one descriptor from a socket.
fn receive_descriptor(socket: &UnixStream) -> io::Result<OwnedFd> {
    const DESCRIPTOR_BYTES: u32 = size_of::<RawFd>() as u32;
    let mut byte = 0_u8;
    let mut part = libc::iovec { iov_base: (&raw mut byte).cast(), iov_len: 1 };
    let mut control = [0_u64; 8]; // room for one descriptor, aligned for its header
    // SAFETY: a `msghdr` of zeros is a valid value; the fields that matter are set below.
    let mut message: libc::msghdr = unsafe { zeroed() };
    message.msg_iov = &raw mut part;
    message.msg_iovlen = 1;
    message.msg_control = control.as_mut_ptr().cast();
    message.msg_controllen = size_of_val(&control) as _;
    let received = loop {
        // SAFETY: `message` points to buffers of the lengths it states, alive during the call.
        let result = unsafe { libc::recvmsg(socket.as_raw_fd(), &raw mut message, libc::MSG_CMSG_CLOEXEC) };
        let error = io::Error::last_os_error();
        if result >= 0 || error.kind() != io::ErrorKind::Interrupted {
            break if result >= 0 { Ok(result) } else { Err(error) };
        }
    }?;
    if received == 0 {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    // SAFETY: `recvmsg` has filled `message`, so the macros walk initialised headers inside `control`.
    unsafe {
        let header = libc::CMSG_FIRSTHDR(&raw const message);
        if header.is_null()
            || (*header).cmsg_level != libc::SOL_SOCKET
            || (*header).cmsg_type != libc::SCM_RIGHTS
            || (*header).cmsg_len < libc::CMSG_LEN(DESCRIPTOR_BYTES) as _
        {
            return Err(io::Error::other("no descriptor came with the message"));
        }
        Ok(OwnedFd::from_raw_fd(libc::CMSG_DATA(header).cast::<RawFd>().read_unaligned()))
    }
}

/// The last system error, with what failed.
fn annotate(what: &str) -> io::Error {
    let error = io::Error::last_os_error();
    io::Error::new(error.kind(), format!("{what}: {error}"))
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};

    use super::*;

    fn send_descriptor(socket: &UnixStream, descriptor: RawFd) {
        let mut byte = 0_u8;
        let mut part = libc::iovec { iov_base: (&raw mut byte).cast(), iov_len: 1 };
        let mut control = [0_u64; 8];
        // SAFETY: the buffers have the lengths stated and live during the call; one header fits into `control`.
        unsafe {
            let mut message: libc::msghdr = zeroed();
            message.msg_iov = &raw mut part;
            message.msg_iovlen = 1;
            message.msg_control = control.as_mut_ptr().cast();
            message.msg_controllen = libc::CMSG_SPACE(4) as _;
            let header = libc::CMSG_FIRSTHDR(&raw const message);
            (*header).cmsg_level = libc::SOL_SOCKET;
            (*header).cmsg_type = libc::SCM_RIGHTS;
            (*header).cmsg_len = libc::CMSG_LEN(4) as _;
            libc::CMSG_DATA(header).cast::<RawFd>().write_unaligned(descriptor);
            assert_eq!(libc::sendmsg(socket.as_raw_fd(), &raw const message, 0), 1);
        }
    }

    #[test]
    fn a_descriptor_passes_through_a_socket() {
        let (here, there) = UnixStream::pair().unwrap();
        let (reader, mut writer) = io::pipe().unwrap();
        send_descriptor(&there, reader.as_raw_fd());
        drop(reader);
        let mut received = File::from(receive_descriptor(&here).unwrap());
        writer.write_all(b"hello").unwrap();
        drop(writer);
        let mut text = String::new();
        received.read_to_string(&mut text).unwrap();
        assert_eq!(text, "hello");
    }

    #[test]
    fn a_helper_that_says_nothing_or_sends_no_descriptor_is_an_error() {
        let (here, mut there) = UnixStream::pair().unwrap();
        there.write_all(b"x").unwrap();
        assert!(receive_descriptor(&here).is_err());
        drop(there);
        assert_eq!(receive_descriptor(&here).unwrap_err().kind(), io::ErrorKind::UnexpectedEof);
    }

    #[test]
    fn unmounting_what_is_not_mounted_says_so() {
        let directory = tempfile::tempdir().unwrap();
        let error = unmount(directory.path(), false).unwrap_err();
        assert!(matches!(error, FuseError::Unmount { is_busy: false, .. }), "{error}");
    }
}
