//! Opens and closes of files, where the kernel may be able to read them by itself and where not.

use std::fs::File;
use std::sync::Arc;

use fuser::{FileHandle, FopenFlags, OpenFlags, ReplyEmpty, ReplyOpen};

use super::passthrough::{CACHED, Opening, PASSED, Passthrough};
use crate::metrics::METRICS;
use crate::vfs::{Inode, Vfs};

/// Answers an open of a file that is read through the page cache. Without KEEP_CACHE the second open of a file, which
/// safetensors does, drops what the first one read.
pub(super) fn reply_cached(reply: ReplyOpen) {
    reply.opened(CACHED, FopenFlags::FOPEN_KEEP_CACHE | FopenFlags::FOPEN_NOFLUSH);
}

/// Answers an open of a file that the kernel may be able to read by itself.
pub(super) fn open_passed(
    vfs: Arc<Vfs>,
    passthrough: Arc<Passthrough>,
    inode: Inode,
    flags: OpenFlags,
    reply: ReplyOpen,
) {
    let find = || vfs.decoded_file(inode);
    let register = |file: &File| reply.open_backing(file);
    // SAFETY: the name is one that the kernel gave for this mount and that nobody has closed; only the passthrough table
    // does, once.
    let adopt = |name| unsafe { reply.wrap_backing(name) };
    match passthrough.open(inode, find, register, adopt) {
        Opening::Cached => reply_cached(reply),
        Opening::Passed(backing, is_first) => {
            METRICS.passed_opens.add(1);
            if is_first {
                vfs.note_passed(inode);
            }
            // The file system below may insist on aligned buffers where the page cache is passed by; here any will do, so
            // such reads come to us.
            let is_direct = flags.0 & libc::O_DIRECT != 0;
            let direct = if is_direct { FopenFlags::FOPEN_DIRECT_IO } else { FopenFlags::empty() };
            reply.opened_passthrough(PASSED, FopenFlags::FOPEN_NOFLUSH | direct, &backing);
        }
        Opening::Held => {
            let held = Arc::clone(&passthrough);
            held.after_release(move || open_passed(vfs, passthrough, inode, flags, reply));
        }
    }
}

/// Answers a close of a file that the kernel may be reading by itself.
pub(super) fn close_passed(passthrough: &Arc<Passthrough>, inode: Inode, handle: FileHandle, reply: ReplyEmpty) {
    let mut reply = Some(reply);
    let answer = || reply.take().expect("answered once").ok();
    if passthrough.close(inode, handle, answer).is_some() {
        let held = Arc::clone(passthrough);
        let reply = reply.expect("it was not answered");
        passthrough.after_release(move || close_passed(&held, inode, handle, reply));
    }
}
