//! Files that the kernel reads by itself, from a file on disk that we name to it.
//!
//! The kernel allows one way at a time for a file: while somebody has it open through its page cache, nobody gets it by
//! passthrough, and the other way round. So the first open decides for all that overlap with it. A process that succeeds
//! another on a mount does not know what that one's readers have open, and passes nothing.

use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use fuser::{BackingId, FileHandle};
use log::info;

use crate::vfs::Inode;

/// Handle of a file that is read through the kernel's page cache.
pub(super) const CACHED: FileHandle = FileHandle(0);
/// Handle of a file that the kernel reads by itself.
pub(super) const PASSED: FileHandle = FileHandle(1);

/// Which files are open, and how.
#[derive(Debug)]
pub(super) struct Passthrough {
    is_wanted: bool,
    /// Until the kernel has refused once.
    is_allowed: AtomicBool,
    open: Mutex<HashMap<Inode, Open>>,
}

#[derive(Debug, Default)]
struct Open {
    cached: u64,
    passed: u64,
    /// The kernel's name of the file on disk, the same for all who have it open.
    backing: Option<Arc<BackingId>>,
}

impl Passthrough {
    /// Nothing is open yet.
    pub(super) fn new(is_wanted: bool) -> Self {
        Self { is_wanted, is_allowed: AtomicBool::new(true), open: Mutex::default() }
    }

    /// Notes an open of `inode`; returns the kernel's name of the file to read where the kernel is to read by itself.
    /// `find` gives the file, if there is one, and `register` names it to the kernel.
    pub(super) fn open(
        &self,
        inode: Inode,
        find: impl FnOnce() -> Option<Arc<File>>,
        register: impl FnOnce(&File) -> io::Result<BackingId>,
    ) -> Option<Arc<BackingId>> {
        if !self.is_wanted {
            return None;
        }
        let mut all = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        let open = all.entry(inode).or_default();
        if open.backing.is_none() && open.cached == 0 && self.is_allowed.load(Ordering::Relaxed) {
            open.backing = find().and_then(|file| match register(&file) {
                Ok(backing) => Some(Arc::new(backing)),
                Err(error) => {
                    info!("no passthrough, decoded files are read here: {error}");
                    self.is_allowed.store(false, Ordering::Relaxed);
                    None
                }
            });
        }
        let backing = open.backing.clone();
        *(if backing.is_some() { &mut open.passed } else { &mut open.cached }) += 1;
        backing
    }

    /// Notes that a handle was closed.
    pub(super) fn close(&self, inode: Inode, handle: FileHandle) {
        let mut all = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        // A handle that a predecessor of this process gave out is not counted here.
        let Some(open) = all.get_mut(&inode) else { return };
        let count = if handle == PASSED { &mut open.passed } else { &mut open.cached };
        *count = count.saturating_sub(1);
        if open.passed == 0 {
            open.backing = None;
            if open.cached == 0 {
                all.remove(&inode);
            }
        }
    }
}
