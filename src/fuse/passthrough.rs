//! Files that the kernel reads by itself, from a file on disk that we name to it.
//!
//! The kernel allows one way at a time for a file: while somebody has it open through its page cache, nobody gets it by
//! passthrough, and the other way round; and all who have it by passthrough must have it under one number. So the first
//! open decides for all that overlap with it.
//!
//! A process that succeeds another on a mount does not know what that one's readers have open. What they have by
//! passthrough it reads in a ledger, a small file that is written before each such open is answered; for all other files
//! it is safe to assume that they are open through the page cache.

use std::collections::HashMap;
use std::fmt::Write;
use std::fs::{self, File};
use std::io;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};

use fuser::{BackingId, FileHandle};
use log::info;

use crate::vfs::Inode;

/// Handle of a file that is read through the kernel's page cache.
pub(super) const CACHED: FileHandle = FileHandle(0);
/// Handle of a file that the kernel reads by itself.
pub(super) const PASSED: FileHandle = FileHandle(1);

/// Which files are open, and how. Nothing at all is noted where passthrough is not wanted.
#[derive(Debug, Default)]
pub(super) struct Passthrough {
    ledger: Option<PathBuf>,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    open: HashMap<Inode, Open>,
    /// Whether another process served the mount before.
    is_successor: bool,
    /// Whether the kernel has refused once: it will again.
    is_refused: bool,
}

#[derive(Debug, Default)]
struct Open {
    cached: u64,
    passed: u64,
    /// The kernel's number of the file on disk, which is closed with the last of them.
    backing: Option<(u32, Arc<BackingId>)>,
    /// Whether a predecessor has given it out: nobody knows then when the last is closed.
    is_inherited: bool,
}

impl Passthrough {
    /// Nothing is open yet, but for what is in the ledger.
    pub(super) fn new(ledger: Option<PathBuf>) -> Self {
        let is_successor = ledger.as_ref().is_some_and(|ledger| ledger.exists());
        let passthrough = Self { ledger, state: Mutex::new(State { is_successor, ..State::default() }) };
        if !is_successor {
            // Without a ledger there would be no successor that knows.
            let mut state = passthrough.state.lock().unwrap_or_else(PoisonError::into_inner);
            state.is_refused = passthrough.write_ledger(&state.open).is_err();
            drop(state);
        }
        passthrough
    }

    /// Notes an open of `inode`; returns the kernel's number of the file to read where the kernel is to read by itself.
    ///
    /// `find` gives the file, if there is one, `register` names a file to the kernel, and `adopt` makes what it got into
    /// what closes it in the end.
    pub(super) fn open(
        &self,
        inode: Inode,
        find: impl FnOnce() -> Option<Arc<File>>,
        register: impl FnOnce(&File) -> io::Result<u32>,
        adopt: impl FnOnce(u32) -> BackingId,
    ) -> Option<Arc<BackingId>> {
        self.ledger.as_ref()?;
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let State { open: all, is_successor, is_refused } = &mut *state;
        let open = all.entry(inode).or_default();
        if open.backing.is_none() && open.cached == 0 {
            if *is_successor {
                open.backing = self.inherited(inode).map(|number| (number, Arc::new(adopt(number))));
                open.is_inherited = open.backing.is_some();
            } else if !*is_refused && let Some(file) = find() {
                match register(&file) {
                    Ok(number) => open.backing = Some((number, Arc::new(adopt(number)))),
                    Err(error) => {
                        info!("no passthrough, decoded files are read here: {error}");
                        *is_refused = true;
                    }
                }
            }
        }
        let is_new = open.backing.is_some() && open.passed == 0 && !open.is_inherited;
        if is_new && let Err(error) = self.write_ledger(all) {
            info!("no passthrough, decoded files are read here: {error}");
            *is_refused = true;
            all.entry(inode).or_default().backing = None;
        }
        let open = all.entry(inode).or_default();
        let backing = open.backing.as_ref().map(|(_, backing)| Arc::clone(backing));
        *(if backing.is_some() { &mut open.passed } else { &mut open.cached }) += 1;
        backing
    }

    /// Notes that a handle was closed.
    pub(super) fn close(&self, inode: Inode, handle: FileHandle) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        // A handle that a predecessor gave out is not counted here.
        let Some(open) = state.open.get_mut(&inode) else { return };
        let count = if handle == PASSED { &mut open.passed } else { &mut open.cached };
        *count = count.saturating_sub(1);
        if open.passed > 0 || open.cached > 0 || open.is_inherited {
            return;
        }
        let was_passed = state.open.remove(&inode).is_some_and(|open| open.backing.is_some());
        if was_passed {
            // What stays in the ledger by mistake is tried by a successor, and is an error for its reader at worst.
            let _ = self.write_ledger(&state.open);
        }
    }

    /// The number under which a predecessor's readers have `inode` open.
    fn inherited(&self, inode: Inode) -> Option<u32> {
        let ledger = fs::read_to_string(self.ledger.as_ref()?).ok()?;
        let mut entries = ledger.lines().filter_map(|line| line.split_once(' '));
        entries.find(|(known, _)| known.parse() == Ok(inode.0))?.1.parse().ok()
    }

    /// In place: a successor comes when this process is gone, or finds the old or the new text, of which both are right.
    fn write_ledger(&self, open: &HashMap<Inode, Open>) -> io::Result<()> {
        let Some(ledger) = &self.ledger else { return Ok(()) };
        let mut text = String::new();
        for (inode, open) in open {
            if let Some((number, _)) = &open.backing {
                writeln!(text, "{inode} {number}").expect("a string takes it");
            }
        }
        let new = ledger.with_extension("new");
        fs::write(&new, text)?;
        fs::rename(new, ledger)
    }
}
