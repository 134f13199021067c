//! Files that the kernel reads by itself, from a file on disk that we name to it.
//!
//! The kernel allows one way at a time for a file: while somebody has it open through its page cache, nobody gets it by
//! passthrough, and the other way round. So the first open decides for all that overlap with it.
//!
//! That outlives this process. So whoever may succeed it is told through a [`Registry`] who has what open: of an open before
//! it is answered, of a close after. Killed in between, a process leaves a handle too many in that account, which does no
//! harm, and never one too few.

use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use fuser::{BackingId, FileHandle};
use log::info;

use crate::vfs::Inode;

/// Handle of a file that is read through the kernel's page cache.
pub(super) const CACHED: FileHandle = FileHandle(0);
/// Handle of a file that the kernel reads by itself.
pub(super) const PASSED: FileHandle = FileHandle(1);

/// More files at once are not passed, so that a successor can be told of all of them.
pub const MAX_PASSED: usize = 2048;

/// Who has a file open.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Handles {
    /// Handles that are read through the kernel's page cache.
    pub cached: u64,
    /// Handles that the kernel reads by itself.
    pub passed: u64,
    /// The kernel's name of the file on disk that it reads for them.
    pub backing: Option<u32>,
}

/// Keeps account of open files beyond the life of this process.
pub trait Registry: Send + Sync {
    /// From now on `handles` are those of `inode`.
    fn note(&self, inode: Inode, handles: Handles);
}

/// What processes before this one have left open.
#[derive(Clone, Debug, Default)]
pub struct Inherited {
    /// Handles by file.
    pub handles: HashMap<Inode, Handles>,
    /// Whether some are missing that are read through the page cache: then no other file may be passed.
    pub is_incomplete: bool,
}

/// Which files are open, and how.
pub(super) struct Passthrough {
    registry: Option<Arc<dyn Registry>>,
    is_wanted: bool,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    files: HashMap<Inode, OpenFile>,
    passed_files: usize,
    /// Whether files may be named that have no name: until the kernel has refused once.
    may_name: bool,
    /// A successor is about to be told who has what open: from now on that does not change.
    is_held: bool,
    /// Opens and closes that wait for the successor, or for this process to go on.
    held: Vec<Box<dyn FnOnce() + Send>>,
}

#[derive(Debug, Default)]
struct OpenFile {
    handles: Handles,
    /// Has `handles.backing` given up when it is dropped. Missing where a predecessor got the name and nobody has opened the
    /// file since.
    backing: Option<Arc<BackingId>>,
}

/// How an open is to be answered.
pub(super) enum Opening {
    /// Through the kernel's page cache.
    Cached,
    /// By the kernel itself; whether nobody else has the file open so.
    Passed(Arc<BackingId>, bool),
    /// Not now: see [`Passthrough::hold`].
    Held,
}

impl Passthrough {
    /// Nothing is open but what predecessors left.
    pub(super) fn new(is_wanted: bool, inherited: Inherited, registry: Option<Arc<dyn Registry>>) -> Self {
        let passed_files = inherited.handles.values().filter(|handles| handles.backing.is_some()).count();
        let files = inherited.handles.into_iter().map(|(inode, handles)| (inode, OpenFile { handles, backing: None }));
        let may_name = is_wanted && !inherited.is_incomplete;
        let state = State { files: files.collect(), passed_files, may_name, ..State::default() };
        // Files that were passed must be opened so whatever is wanted now.
        Self { registry, is_wanted: is_wanted || passed_files > 0, state: Mutex::new(state) }
    }

    /// Whether opens and closes must be told to this at all.
    pub(super) fn is_wanted(&self) -> bool {
        self.is_wanted
    }

    /// From now on nothing is opened or closed. What was, has been told to the registry; what the kernel asks for waits until
    /// [`release`](Self::release), or goes to a successor when this process ends.
    pub(super) fn hold(&self) {
        self.lock().is_held = true;
    }

    /// The successor did not come: what waited is done.
    pub(super) fn release(&self) {
        let mut state = self.lock();
        state.is_held = false;
        let held = std::mem::take(&mut state.held);
        drop(state);
        for job in held {
            job();
        }
    }

    /// Has `job` done after [`release`](Self::release), if that comes.
    pub(super) fn after_release(&self, job: impl FnOnce() + Send + 'static) {
        let mut state = self.lock();
        if state.is_held {
            state.held.push(Box::new(job));
            return;
        }
        drop(state);
        job(); // it came meanwhile
    }

    /// Notes an open of `inode`, and says how to answer it. `find` gives the file on disk, if there is one, and may take its
    /// time; `register` names it to the kernel, and `adopt` takes a name that the kernel knows already.
    pub(super) fn open(
        &self,
        inode: Inode,
        find: impl FnOnce() -> Option<Arc<File>>,
        register: impl FnOnce(&File) -> io::Result<BackingId>,
        adopt: impl FnOnce(u32) -> BackingId,
    ) -> Opening {
        let may_be_named = {
            let state = self.lock();
            state.may_name && state.passed_files < MAX_PASSED && !state.files.contains_key(&inode)
        };
        let found = if may_be_named { find() } else { None };
        let mut state = self.lock();
        let State { files, passed_files, may_name, is_held, .. } = &mut *state;
        if *is_held {
            return Opening::Held;
        }
        let is_open = files.contains_key(&inode); // somebody may have been faster
        let file = files.entry(inode).or_default();
        if let (Some(name), None) = (file.handles.backing, &file.backing) {
            file.backing = Some(Arc::new(adopt(name)));
        } else if let Some(found) = found
            && !is_open
        {
            match register(&found) {
                Ok(backing) => {
                    let name = backing.into_raw();
                    file.handles.backing = Some(name);
                    file.backing = Some(Arc::new(adopt(name)));
                    *passed_files += 1;
                }
                Err(error) => {
                    info!("no passthrough, decoded files are read here: {error}");
                    *may_name = false;
                }
            }
        }
        let Handles { cached, passed, .. } = &mut file.handles;
        let opening = match &file.backing {
            Some(backing) => {
                *passed += 1;
                Opening::Passed(Arc::clone(backing), *passed == 1)
            }
            None => {
                *cached += 1;
                Opening::Cached
            }
        };
        self.note(inode, file.handles);
        opening
    }

    /// Notes that a handle was closed, after `answer` has said so to the kernel. Gives `answer` back where that must wait.
    pub(super) fn close<A: FnOnce()>(&self, inode: Inode, handle: FileHandle, answer: A) -> Option<A> {
        let mut state = self.lock();
        if state.is_held {
            return Some(answer);
        }
        answer();
        let file = state.files.get_mut(&inode)?;
        let count = if handle == PASSED { &mut file.handles.passed } else { &mut file.handles.cached };
        *count = count.saturating_sub(1);
        let mut given_up = None;
        if file.handles.passed == 0 && file.backing.is_some() {
            file.handles.backing = None;
            given_up = file.backing.take();
        }
        let handles = file.handles;
        if handles == Handles::default() {
            state.files.remove(&inode);
        }
        state.passed_files -= usize::from(given_up.is_some());
        self.note(inode, handles);
        drop(given_up); // only now, when nobody will be told of it any more
        None
    }

    fn note(&self, inode: Inode, handles: Handles) {
        if let Some(registry) = &self.registry {
            registry.note(inode, handles);
        }
    }

    /// Nobody's code but the registry's and the kernel's runs under this lock, so poison tells nothing.
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;

    const INODE: Inode = Inode(7);

    /// What has been noted last.
    #[derive(Default)]
    struct Account(Mutex<HashMap<Inode, Handles>>);

    impl Registry for Account {
        fn note(&self, inode: Inode, handles: Handles) {
            self.0.lock().unwrap().insert(inode, handles);
        }
    }

    /// Opens a file that is on no disk, as it is where no kernel names files.
    fn open(passthrough: &Passthrough) -> Opening {
        passthrough.open(INODE, || None, |_| unreachable!("no file"), |_| unreachable!("no name"))
    }

    #[test]
    fn a_successor_takes_the_account_over() {
        let account = Arc::new(Account::default());
        let passthrough = Passthrough::new(true, Inherited::default(), Some(account.clone()));
        assert!(matches!(open(&passthrough), Opening::Cached));
        assert!(matches!(open(&passthrough), Opening::Cached));
        let handles = account.0.lock().unwrap().clone();
        assert_eq!(handles[&INODE], Handles { cached: 2, ..Handles::default() });

        let successor = Passthrough::new(true, Inherited { handles, is_incomplete: false }, Some(account.clone()));
        let look = || {
            let find = || panic!("it is open through the page cache: no name is looked for");
            successor.open(INODE, find, |_| unreachable!("no file"), |_| unreachable!("no name"))
        };
        assert!(matches!(look(), Opening::Cached));
        for left in (0..3).rev() {
            assert!(successor.close(INODE, CACHED, || ()).is_none());
            assert_eq!(account.0.lock().unwrap()[&INODE].cached, left);
        }
        let looked = AtomicUsize::new(0);
        let find = || {
            looked.fetch_add(1, Ordering::Relaxed);
            None
        };
        successor.open(INODE, find, |_| unreachable!("no file"), |_| unreachable!("no name"));
        assert_eq!(looked.into_inner(), 1, "nobody has it open any more");
    }

    #[test]
    fn without_a_whole_account_no_other_file_is_passed() {
        let inherited = Inherited { is_incomplete: true, ..Inherited::default() };
        let passthrough = Passthrough::new(true, inherited, None);
        let find = || panic!("nothing is looked for");
        passthrough.open(INODE, find, |_| unreachable!("no file"), |_| unreachable!("no name"));
    }

    #[test]
    fn while_it_is_held_nothing_is_opened_or_closed_and_all_of_it_afterwards() {
        let passthrough = Arc::new(Passthrough::new(true, Inherited::default(), None));
        open(&passthrough);
        passthrough.hold();
        assert!(matches!(open(&passthrough), Opening::Held));
        let answered = Arc::new(AtomicUsize::new(0));
        let answer = {
            let answered = Arc::clone(&answered);
            move || answered.store(1, Ordering::Relaxed)
        };
        let held = passthrough.close(INODE, CACHED, answer).expect("it must wait");
        passthrough.after_release(held);
        assert_eq!(answered.load(Ordering::Relaxed), 0);
        passthrough.release();
        assert_eq!(answered.load(Ordering::Relaxed), 1);
        assert!(matches!(open(&passthrough), Opening::Cached));
    }
}
