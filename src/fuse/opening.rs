//! Opens and closes of files, where the kernel may be able to read them by itself and where not.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;

use fuser::{BackingId, FileHandle, FopenFlags, OpenFlags, ReplyEmpty, ReplyOpen};
use log::debug;

use super::passthrough::{Backings, Opening, Passthrough};
use crate::metrics::METRICS;
use crate::vfs::{Inode, Vfs};

/// Answers an open of a file that is read through the page cache. Without KEEP_CACHE the second open of a file, which
/// safetensors does, drops what the first one read.
pub(super) fn reply_cached(reply: ReplyOpen, handle: FileHandle) {
    reply.opened(handle, FopenFlags::FOPEN_KEEP_CACHE | FopenFlags::FOPEN_NOFLUSH);
}

/// Answers an open of a file that the kernel may be able to read by itself.
pub(super) fn open_passed(
    vfs: Arc<Vfs>,
    passthrough: Arc<Passthrough>,
    inode: Inode,
    handle: FileHandle,
    flags: OpenFlags,
    reply: ReplyOpen,
) {
    match passthrough.open(inode, handle.0, || vfs.decoded_file(inode)) {
        Opening::Cached => reply_cached(reply, handle),
        Opening::Passed { backing, is_first } => {
            METRICS.passed_opens.add(1);
            if is_first {
                vfs.note_passed(inode);
            }
            // The file system below may insist on aligned buffers where the page cache is passed by; here any will do, so
            // such reads come to us.
            let is_direct = flags.0 & libc::O_DIRECT != 0;
            let direct = if is_direct { FopenFlags::FOPEN_DIRECT_IO } else { FopenFlags::empty() };
            // SAFETY: the kernel gave that name for this mount. The table gives it up, nobody before.
            let named = unsafe { reply.wrap_backing(backing) };
            reply.opened_passthrough(handle, FopenFlags::FOPEN_NOFLUSH | direct, &named);
            named.into_raw();
        }
        Opening::Held => {
            let held = Arc::clone(&passthrough);
            held.after_release(move || open_passed(vfs, passthrough, inode, handle, flags, reply));
        }
    }
}

/// Answers a close of a file that the kernel may be reading by itself.
pub(super) fn close_passed(passthrough: &Arc<Passthrough>, inode: Inode, handle: FileHandle, reply: ReplyEmpty) {
    if passthrough.close(inode, handle.0) {
        return reply.ok();
    }
    let held = Arc::clone(passthrough);
    passthrough.after_release(move || close_passed(&held, inode, handle, reply));
}

impl Backings for Arc<File> {
    fn name(&self, file: &File) -> io::Result<u32> {
        BackingId::create_raw(&**self, file)
    }

    fn give_up(&self, name: u32) {
        /// `_IOW(229, 2, uint32_t)`: FUSE_DEV_IOC_BACKING_CLOSE.
        const BACKING_CLOSE: libc::Ioctl = 0x4004_e502_u32 as libc::Ioctl;
        // SAFETY: the device is open, and the call reads the number it is given the address of.
        if unsafe { libc::ioctl(self.as_raw_fd(), BACKING_CLOSE, &raw const name) } < 0 {
            debug!("file {name} not given up: {}", io::Error::last_os_error());
        }
    }
}
