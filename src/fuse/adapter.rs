//! Requests of the kernel, one method each.

use std::ffi::OsStr;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use fuser::{
    AccessFlags, BsdFileFlags, Errno, FileAttr, FileHandle, FileType, Filesystem, FopenFlags, Generation, INodeNo,
    InitFlags, KernelConfig, LockOwner, OpenAccMode, OpenFlags, RenameFlags, ReplyAttr, ReplyCreate, ReplyData,
    ReplyDirectory, ReplyDirectoryPlus, ReplyEmpty, ReplyEntry, ReplyLseek, ReplyOpen, ReplyStatfs, ReplyWrite,
    ReplyXattr, Request, TimeOrNow, WriteFlags,
};
use log::{debug, warn};

use super::errno::errno;
use super::opening::{close_passed, open_passed, reply_cached};
use super::passthrough::Passthrough;
use super::replies::Replies;
use super::workers::Workers;
use super::{MountOptions, RootAttributes};
use crate::metrics::METRICS;
use crate::vfs::{Attributes, Inode, Keeper, Kind, Vfs, VfsError};

/// The tree is a snapshot, so the kernel need not ask again. After a rescan it is told what changed.
const TIME_TO_LIVE: Duration = Duration::from_secs(24 * 60 * 60);
/// Inode numbers are never used for other content: see `vfs/inode.rs`.
const GENERATION: Generation = Generation(0);
/// One page: what `stat` calls the best size for I/O, and the unit of `statfs`.
const BLOCK_BYTES: u32 = 4096;
/// As on the file systems that sources lie on; FUSE itself would let longer ones through.
const MAX_NAME_BYTES: usize = 255;
/// Requests the kernel may have in flight that nobody waits for, such as readahead. The default of 12 throttles it.
const MAX_BACKGROUND: u16 = 1024;

/// Bit of a request's number by which the kernel marks what it hands out again.
const RESENT: u64 = 1 << 63;

/// A tree, and who reads for it.
pub(super) struct Adapter {
    vfs: Arc<Vfs>,
    workers: Arc<Workers>,
    replies: Arc<Replies>,
    passthrough: Arc<Passthrough>,
    options: MountOptions,
    root_attributes: Arc<RootAttributes>,
}

impl Adapter {
    pub(super) fn new(
        vfs: Arc<Vfs>,
        workers: Arc<Workers>,
        passthrough: Arc<Passthrough>,
        options: &MountOptions,
        root_attributes: Arc<RootAttributes>,
    ) -> Self {
        let replies = Arc::new(Replies::new(options.reply_bytes));
        Self { vfs, workers, replies, passthrough, options: options.clone(), root_attributes }
    }

    fn file_attributes(&self, attributes: &Attributes) -> FileAttr {
        let Attributes { inode, kind, length_bytes, modified, links } = *attributes;
        let (kind, perm) = match kind {
            Kind::Directory => (FileType::Directory, self.options.directory_mode),
            Kind::File => (FileType::RegularFile, self.options.file_mode),
            Kind::Link => (FileType::Symlink, 0o777),
        };
        FileAttr {
            ino: INodeNo(inode.0),
            size: length_bytes,
            blocks: length_bytes.div_ceil(512),
            atime: modified,
            mtime: modified,
            ctime: modified,
            crtime: modified,
            kind,
            perm,
            nlink: links,
            uid: self.options.uid,
            gid: self.options.gid,
            rdev: 0,
            blksize: BLOCK_BYTES,
            flags: 0,
        }
    }

    /// `.`, `..` and the entries of a directory from number `offset` on, each with the offset that follows it, until
    /// `add` says that the reply is full.
    fn list(
        &self,
        directory: INodeNo,
        offset: u64,
        mut add: impl FnMut(u64, &OsStr, &Attributes) -> bool,
    ) -> Result<(), VfsError> {
        let directory = Inode(directory.0);
        let entries = self.vfs.directory(directory)?;
        let dots = [(OsStr::new("."), directory), (OsStr::new(".."), self.vfs.parent(directory)?)];
        let names = entries.iter().map(|entry| (entry.name.as_os_str(), entry.inode));
        let all = dots.into_iter().chain(names).zip(1..);
        for ((name, inode), next_offset) in all.skip(usize::try_from(offset).unwrap_or(usize::MAX)) {
            if add(next_offset, name, &self.vfs.attributes(inode)?) {
                break;
            }
        }
        Ok(())
    }
}

/// A read request that has no answer yet, for the metrics. Dropped without an answer, it is one that failed.
struct PendingRead {
    arrived: Instant,
    length: Option<usize>,
}

impl PendingRead {
    fn new() -> Self {
        METRICS.waiting_requests.add(1);
        Self { arrived: Instant::now(), length: None }
    }

    /// It is about to be answered, with that many bytes or an error.
    fn answered(mut self, length: Option<usize>) {
        self.length = length;
    }
}

impl Drop for PendingRead {
    fn drop(&mut self) {
        METRICS.waiting_requests.sub(1);
        METRICS.reads.add(1);
        METRICS.read_seconds.record(self.arrived.elapsed());
        match self.length {
            Some(length) => METRICS.read_bytes.add(length as u64),
            None => METRICS.read_errors.add(1),
        }
    }
}

/// What is asked of the kernel when it greets. The same for every process that serves a mount: the kernel hears it once.
pub(super) fn configure(config: &mut KernelConfig, options: &MountOptions) {
    let wanted = [
        InitFlags::FUSE_DO_READDIRPLUS,
        InitFlags::FUSE_READDIRPLUS_AUTO,
        InitFlags::FUSE_PARALLEL_DIROPS,
        InitFlags::FUSE_CACHE_SYMLINKS,
        InitFlags::FUSE_ASYNC_DIO,
        InitFlags::FUSE_DIRECT_IO_ALLOW_MMAP,
    ];
    for capability in wanted {
        if config.add_capabilities(capability).is_err() {
            debug!("kernel without {capability:?}");
        }
    }
    if options.passthrough && config.add_capabilities(InitFlags::FUSE_PASSTHROUGH).is_ok() {
        // The files that are passed lie on a file system that is not itself stacked on another.
        let _ = config.set_max_stack_depth(1);
    }
    // Neither can fail: both are above zero. `max_write` is left alone, because it caps reads too.
    let _ = config.set_max_background(MAX_BACKGROUND);
    let _ = config.set_congestion_threshold(MAX_BACKGROUND);
}

/// Who keeps what a handle with these flags reads: the kernel keeps what it is given, but for readers that pass it by.
fn keeper(flags: OpenFlags) -> Keeper {
    if flags.0 & libc::O_DIRECT == 0 { Keeper::Reader } else { Keeper::Cache }
}

/// Answers a query whose length the caller may not know: size 0 asks for it.
fn reply_value(reply: ReplyXattr, size: u32, value: &[u8]) {
    match u32::try_from(value.len()) {
        Ok(length) if size == 0 => reply.size(length),
        Ok(length) if length <= size => reply.data(value),
        _ => reply.error(Errno::ERANGE),
    }
}

impl Filesystem for Adapter {
    fn init(&mut self, _request: &Request, config: &mut KernelConfig) -> io::Result<()> {
        configure(config, &self.options);
        Ok(())
    }

    fn lookup(&self, _request: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        if name.len() > MAX_NAME_BYTES {
            return reply.error(Errno::ENAMETOOLONG);
        }
        match self.vfs.lookup(Inode(parent.0), name) {
            Ok(attributes) => reply.entry(&TIME_TO_LIVE, &self.file_attributes(&attributes), GENERATION),
            // Inode 0 with a time to live: the kernel remembers that the name is missing. Loaders probe for many.
            Err(VfsError::NoSuchName) => {
                let missing = Attributes {
                    inode: Inode(0),
                    kind: Kind::File,
                    length_bytes: 0,
                    modified: SystemTime::UNIX_EPOCH,
                    links: 0,
                };
                reply.entry(&TIME_TO_LIVE, &self.file_attributes(&missing), GENERATION);
            }
            Err(error) => reply.error(errno(&error)),
        }
    }

    fn getattr(&self, _request: &Request, inode: INodeNo, _handle: Option<FileHandle>, reply: ReplyAttr) {
        match self.vfs.attributes(Inode(inode.0)) {
            Ok(attributes) => reply.attr(&TIME_TO_LIVE, &self.file_attributes(&attributes)),
            Err(error) => reply.error(errno(&error)),
        }
    }

    fn readlink(&self, _request: &Request, inode: INodeNo, reply: ReplyData) {
        match self.vfs.link_target(Inode(inode.0)) {
            Ok(target) => reply.data(target.as_os_str().as_bytes()),
            Err(error) => reply.error(errno(&error)),
        }
    }

    fn open(&self, request: &Request, inode: INodeNo, flags: OpenFlags, reply: ReplyOpen) {
        if flags.acc_mode() != OpenAccMode::O_RDONLY {
            return reply.error(Errno::EROFS);
        }
        // A request that the kernel hands out again names the same handle: see `open_files`.
        let (inode, handle) = (Inode(inode.0), FileHandle(request.unique().0 & !RESENT));
        match self.vfs.open_file(inode, keeper(flags)) {
            Ok(path) => {
                debug!("open: {}", path.display());
                METRICS.opens.add(1);
            }
            Err(error) => return reply.error(errno(&error)),
        }
        if !self.passthrough.is_wanted() {
            return reply_cached(reply, handle);
        }
        // Somebody has to look on disk.
        let (vfs, passthrough) = (Arc::clone(&self.vfs), Arc::clone(&self.passthrough));
        self.workers.submit(move || open_passed(vfs, passthrough, inode, handle, flags, reply));
        self.workers.hold_while_draining();
    }

    fn read(
        &self,
        request: &Request,
        inode: INodeNo,
        _handle: FileHandle,
        offset: u64,
        size: u32,
        flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        reply: ReplyData,
    ) {
        let (inode, pending) = (Inode(inode.0), PendingRead::new());
        if self.options.refuse_resent && request.unique().0 & RESENT != 0 {
            warn!("read refused: inode {inode}, byte {offset}: a process died while it had this request");
            return reply.error(Errno::EIO);
        }
        let keeper = keeper(flags);
        if let Some(bytes) = self.vfs.resident(inode, offset, size as usize, keeper) {
            pending.answered(Some(bytes.len()));
            return reply.data(&bytes);
        }
        let vfs = Arc::clone(&self.vfs);
        let replies = Arc::clone(&self.replies);
        self.workers.submit(move || {
            match vfs.read(inode, offset, size as usize, keeper, |length| replies.take(length)) {
                Ok(bytes) => {
                    pending.answered(Some(bytes.len()));
                    reply.data(&bytes);
                }
                Err(error) => {
                    pending.answered(None);
                    reply.error(errno(&error));
                }
            }
        });
        self.workers.hold_while_draining();
    }

    fn release(
        &self,
        _request: &Request,
        inode: INodeNo,
        handle: FileHandle,
        _flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        _flush: bool,
        reply: ReplyEmpty,
    ) {
        let inode = Inode(inode.0);
        self.vfs.close_file(inode);
        if self.passthrough.is_wanted() {
            close_passed(&self.passthrough, inode, handle, reply);
        } else {
            reply.ok();
        }
    }

    fn opendir(&self, _request: &Request, inode: INodeNo, _flags: OpenFlags, reply: ReplyOpen) {
        match self.vfs.directory(Inode(inode.0)) {
            Ok(_) => reply.opened(FileHandle(0), FopenFlags::FOPEN_CACHE_DIR | FopenFlags::FOPEN_KEEP_CACHE),
            Err(error) => reply.error(errno(&error)),
        }
    }

    fn readdir(&self, _request: &Request, inode: INodeNo, _handle: FileHandle, offset: u64, mut reply: ReplyDirectory) {
        let result = self.list(inode, offset, |next_offset, name, attributes| {
            let attributes = self.file_attributes(attributes);
            reply.add(attributes.ino, next_offset, attributes.kind, name)
        });
        match result {
            Ok(()) => reply.ok(),
            Err(error) => reply.error(errno(&error)),
        }
    }

    fn readdirplus(
        &self,
        _request: &Request,
        inode: INodeNo,
        _handle: FileHandle,
        offset: u64,
        mut reply: ReplyDirectoryPlus,
    ) {
        let result = self.list(inode, offset, |next_offset, name, attributes| {
            let attributes = self.file_attributes(attributes);
            reply.add(attributes.ino, next_offset, name, &TIME_TO_LIVE, &attributes, GENERATION)
        });
        match result {
            Ok(()) => reply.ok(),
            Err(error) => reply.error(errno(&error)),
        }
    }

    fn statfs(&self, _request: &Request, _inode: INodeNo, reply: ReplyStatfs) {
        let totals = self.vfs.totals();
        let blocks = totals.bytes.div_ceil(BLOCK_BYTES.into());
        reply.statfs(blocks, 0, 0, totals.inodes, 0, BLOCK_BYTES, MAX_NAME_BYTES as u32, BLOCK_BYTES);
    }

    fn getxattr(&self, _request: &Request, inode: INodeNo, name: &OsStr, size: u32, reply: ReplyXattr) {
        let inode = Inode(inode.0);
        if inode == Inode::ROOT {
            let (attributes, name) = (Arc::clone(&self.root_attributes), name.to_owned());
            // They are made on request, and that may take longer than an event loop should.
            self.workers.submit(move || match attributes(&name) {
                Some(value) => reply_value(reply, size, value.as_bytes()),
                None => reply.error(errno(&VfsError::NoSuchAttribute)),
            });
            return;
        }
        match self.vfs.extended_attribute(inode, name) {
            Ok(value) => reply_value(reply, size, value.as_bytes()),
            Err(error) => reply.error(errno(&error)),
        }
    }

    fn listxattr(&self, _request: &Request, inode: INodeNo, size: u32, reply: ReplyXattr) {
        match self.vfs.extended_attribute_names(Inode(inode.0)) {
            Ok(names) => {
                let list: String = names.into_iter().flat_map(|name| [name, "\0"]).collect();
                reply_value(reply, size, list.as_bytes());
            }
            Err(error) => reply.error(errno(&error)),
        }
    }

    /// Asked only where the kernel does not check permissions itself, which it is told to.
    fn access(&self, _request: &Request, _inode: INodeNo, mask: AccessFlags, reply: ReplyEmpty) {
        if mask.contains(AccessFlags::W_OK) { reply.error(Errno::EROFS) } else { reply.ok() }
    }

    // Answered "unknown request" once, after which the kernel does it alone: there is nothing to flush, no hole to
    // report, and a copy between file systems is a read and a write.

    fn flush(&self, _: &Request, _: INodeNo, _: FileHandle, _: LockOwner, reply: ReplyEmpty) {
        reply.error(Errno::ENOSYS);
    }

    fn fsync(&self, _: &Request, _: INodeNo, _: FileHandle, _: bool, reply: ReplyEmpty) {
        reply.error(Errno::ENOSYS);
    }

    fn fsyncdir(&self, _: &Request, _: INodeNo, _: FileHandle, _: bool, reply: ReplyEmpty) {
        reply.error(Errno::ENOSYS);
    }

    fn lseek(&self, _: &Request, _: INodeNo, _: FileHandle, _: i64, _: i32, reply: ReplyLseek) {
        reply.error(Errno::ENOSYS);
    }

    // The mount is read-only, so the kernel refuses these before it asks. `mount -o remount,rw` may take that away:
    // then we do.

    fn setattr(
        &self,
        _: &Request,
        _: INodeNo,
        _: Option<u32>,
        _: Option<u32>,
        _: Option<u32>,
        _: Option<u64>,
        _: Option<TimeOrNow>,
        _: Option<TimeOrNow>,
        _: Option<SystemTime>,
        _: Option<FileHandle>,
        _: Option<SystemTime>,
        _: Option<SystemTime>,
        _: Option<SystemTime>,
        _: Option<BsdFileFlags>,
        reply: ReplyAttr,
    ) {
        reply.error(Errno::EROFS);
    }

    fn mknod(&self, _: &Request, _: INodeNo, _: &OsStr, _: u32, _: u32, _: u32, reply: ReplyEntry) {
        reply.error(Errno::EROFS);
    }

    fn mkdir(&self, _: &Request, _: INodeNo, _: &OsStr, _: u32, _: u32, reply: ReplyEntry) {
        reply.error(Errno::EROFS);
    }

    fn unlink(&self, _: &Request, _: INodeNo, _: &OsStr, reply: ReplyEmpty) {
        reply.error(Errno::EROFS);
    }

    fn rmdir(&self, _: &Request, _: INodeNo, _: &OsStr, reply: ReplyEmpty) {
        reply.error(Errno::EROFS);
    }

    fn symlink(&self, _: &Request, _: INodeNo, _: &OsStr, _: &Path, reply: ReplyEntry) {
        reply.error(Errno::EROFS);
    }

    fn rename(&self, _: &Request, _: INodeNo, _: &OsStr, _: INodeNo, _: &OsStr, _: RenameFlags, reply: ReplyEmpty) {
        reply.error(Errno::EROFS);
    }

    fn link(&self, _: &Request, _: INodeNo, _: INodeNo, _: &OsStr, reply: ReplyEntry) {
        reply.error(Errno::EROFS);
    }

    fn create(&self, _: &Request, _: INodeNo, _: &OsStr, _: u32, _: u32, _: i32, reply: ReplyCreate) {
        reply.error(Errno::EROFS);
    }

    fn write(
        &self,
        _: &Request,
        _: INodeNo,
        _: FileHandle,
        _: u64,
        _: &[u8],
        _: WriteFlags,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        reply.error(Errno::EROFS);
    }

    fn fallocate(&self, _: &Request, _: INodeNo, _: FileHandle, _: u64, _: u64, _: i32, reply: ReplyEmpty) {
        reply.error(Errno::EROFS);
    }

    fn setxattr(&self, _: &Request, _: INodeNo, _: &OsStr, _: &[u8], _: i32, _: u32, reply: ReplyEmpty) {
        reply.error(Errno::EROFS);
    }

    fn removexattr(&self, _: &Request, _: INodeNo, _: &OsStr, reply: ReplyEmpty) {
        reply.error(Errno::EROFS);
    }
}
