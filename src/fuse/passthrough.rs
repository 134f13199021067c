//! Files that the kernel reads by itself, from a file on disk that we name to it.
//!
//! The kernel allows one way at a time for a file: while somebody has it open through its page cache, nobody gets it by
//! passthrough, and the other way round. So the first open decides for all that overlap with it.
//!
//! That outlives this process: a file that a predecessor passed stays passed while somebody has it open, and opens meanwhile
//! only under the name that the predecessor gave it. So each name is told to a [`Registry`] before it is used. A successor
//! that is given the names opens those files under them as long as it lives, and passes no others: it does not know what
//! its predecessor's readers have open through the page cache.

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

/// More files at once are not passed, so that a successor can be told of all of them.
const MAX_NAMES: usize = 2048;

/// Remembers the kernel's names of files beyond the life of this process.
pub trait Registry: Send + Sync {
    /// From now on `inode` may be open under the name `backing`.
    fn passed(&self, inode: Inode, backing: u32);

    /// The name of `inode` is about to be given up: nobody has it open.
    fn given_up(&self, inode: Inode);
}

/// Which files are open, and how.
pub(super) struct Passthrough {
    registry: Option<Arc<dyn Registry>>,
    /// The names that predecessors gave.
    inherited: HashMap<Inode, u32>,
    is_wanted: bool,
    /// A successor is about to be told the names: from now on none is made or given up.
    is_held: AtomicBool,
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
    pub(super) fn new(is_wanted: bool, inherited: HashMap<Inode, u32>, registry: Option<Arc<dyn Registry>>) -> Self {
        let (is_held, is_allowed) = (AtomicBool::new(false), AtomicBool::new(true));
        Self { registry, inherited, is_wanted, is_held, is_allowed, open: Mutex::default() }
    }

    /// From now on no name is made and none is given up. What was, has been told to the registry.
    pub(super) fn hold(&self) {
        let _open = self.open.lock().unwrap_or_else(PoisonError::into_inner); // who is at it comes first
        self.is_held.store(true, Ordering::Relaxed);
    }

    /// The successor did not come: names are made and given up again.
    pub(super) fn release(&self) {
        self.is_held.store(false, Ordering::Relaxed);
    }

    /// Notes an open of `inode`; returns the kernel's name of the file to read where the kernel is to read by itself.
    /// `find` gives the file, if there is one, `register` names it to the kernel, and `adopt` takes a name that the kernel
    /// knows already.
    pub(super) fn open(
        &self,
        inode: Inode,
        find: impl FnOnce() -> Option<Arc<File>>,
        register: impl FnOnce(&File) -> io::Result<BackingId>,
        adopt: impl FnOnce(u32) -> BackingId,
    ) -> Option<Arc<BackingId>> {
        let inherited = self.inherited.get(&inode);
        if !self.is_wanted && inherited.is_none() {
            return None;
        }
        let mut all = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        let count = all.len();
        let open = all.entry(inode).or_default();
        let is_open = open.backing.is_some() || open.cached > 0;
        if let (Some(name), None) = (inherited, &open.backing) {
            open.backing = Some(Arc::new(adopt(*name)));
        } else if !is_open
            && self.inherited.len() + count < MAX_NAMES
            && !self.is_held.load(Ordering::Relaxed)
            && self.is_allowed.load(Ordering::Relaxed)
        {
            open.backing = find().and_then(|file| match register(&file) {
                Ok(backing) => {
                    let name = backing.into_raw();
                    if let Some(registry) = &self.registry {
                        registry.passed(inode, name);
                    }
                    Some(Arc::new(adopt(name)))
                }
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
        if self.inherited.contains_key(&inode) {
            return; // how many a predecessor's readers have open is not known, so the name stays
        }
        let Some(open) = all.get_mut(&inode) else { return };
        let count = if handle == PASSED { &mut open.passed } else { &mut open.cached };
        *count = count.saturating_sub(1);
        if open.passed == 0 && !self.is_held.load(Ordering::Relaxed) {
            // Told before it happens: a name too many does no harm, a name too few does.
            if let (Some(registry), Some(_)) = (&self.registry, &open.backing) {
                registry.given_up(inode);
            }
            open.backing = None;
            if open.cached == 0 {
                all.remove(&inode);
            }
        }
    }
}
