//! Files that the kernel reads by itself, from a file on disk that we name to it.
//!
//! The kernel allows one way at a time for a file: while somebody has it open through its page cache, nobody gets it by
//! passthrough, and the other way round. So the first open decides for all that overlap with it.
//!
//! That outlives this process. So whoever may succeed it is told through a [`Registry`] who has what open: see
//! [`OpenFiles`].

use std::fs::File;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use log::info;

use super::open_files::{HandleChange, OpenFiles};
use crate::vfs::Inode;

/// Keeps account of open files beyond the life of this process.
pub trait Registry: Send + Sync {
    /// Takes a change down.
    fn note(&self, change: HandleChange);
}

/// How the kernel is told of files on disk.
pub(super) trait Backings: Send + Sync {
    /// Has the kernel name `file`.
    fn name(&self, file: &File) -> io::Result<u32>;

    /// Nobody needs the file of that name any more.
    fn give_up(&self, name: u32);
}

/// Which files are open, and how.
pub(super) struct Passthrough {
    backings: Box<dyn Backings>,
    registry: Option<Arc<dyn Registry>>,
    is_wanted: bool,
    state: Mutex<State>,
}

struct State {
    open: OpenFiles,
    /// Whether files may be named that have no name: until the kernel has refused once.
    may_name: bool,
    /// A successor is about to be told who has what open: from now on that does not change.
    is_held: bool,
    /// Opens and closes that wait for the successor, or for this process to go on.
    held: Vec<Box<dyn FnOnce() + Send>>,
}

/// How an open is to be answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Opening {
    /// Through the kernel's page cache.
    Cached,
    /// By the kernel itself.
    Passed {
        /// The kernel's name of the file on disk.
        backing: u32,
        /// Whether nobody else has the file open.
        is_first: bool,
    },
    /// Not now: see [`Passthrough::hold`].
    Held,
}

impl Passthrough {
    /// Nothing is open but what predecessors left.
    pub(super) fn new(
        is_wanted: bool,
        inherited: OpenFiles,
        registry: Option<Arc<dyn Registry>>,
        backings: Box<dyn Backings>,
    ) -> Self {
        // Files that were passed must be opened so whatever is wanted now.
        let is_needed = is_wanted || inherited.has_passed();
        let state = State { open: inherited, may_name: is_wanted, is_held: false, held: Vec::new() };
        Self { backings, registry, is_wanted: is_needed, state: Mutex::new(state) }
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

    /// Notes that request number `handle` opens `inode`, and says how to answer it. `find` gives the file on disk, if there is
    /// one, and may take its time: it is asked where nobody has the file open, under no lock.
    pub(super) fn open(&self, inode: Inode, handle: u64, find: impl FnOnce() -> Option<Arc<File>>) -> Opening {
        let may_be_named = {
            let state = self.lock();
            state.may_name && state.open.get(inode).is_none()
        };
        let found = if may_be_named { find() } else { None };
        let mut state = self.lock();
        if state.is_held {
            return Opening::Held;
        }
        let known = state.open.get(inode).map(|file| file.backing); // somebody may have been faster
        let is_first = known.is_none();
        let backing = known.unwrap_or_else(|| {
            let found = found?;
            let named = self.backings.name(&found);
            if let Err(error) = &named {
                info!("no passthrough, decoded files are read here: {error}");
                state.may_name = false;
            }
            named.ok()
        });
        self.note(&mut state, HandleChange::Opened { inode, handle, backing });
        backing.map_or(Opening::Cached, |backing| Opening::Passed { backing, is_first })
    }

    /// Notes that a handle was closed; returns whether it could, or must wait: see [`hold`](Self::hold).
    pub(super) fn close(&self, inode: Inode, handle: u64) -> bool {
        let mut state = self.lock();
        if state.is_held {
            return false;
        }
        let given_up = self.note(&mut state, HandleChange::Closed { inode, handle });
        drop(state);
        if let Some(name) = given_up {
            self.backings.give_up(name); // only now, when nobody will be told of it any more
        }
        true
    }

    fn note(&self, state: &mut State, change: HandleChange) -> Option<u32> {
        if let Some(registry) = &self.registry {
            registry.note(change);
        }
        state.open.apply(change)
    }

    /// Nobody's code but the registry's and the kernel's runs under this lock, so poison tells nothing.
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;

    const INODE: Inode = Inode(7);

    /// What a successor would be told.
    #[derive(Default)]
    struct Account(Mutex<OpenFiles>);

    impl Registry for Account {
        fn note(&self, change: HandleChange) {
            self.0.lock().unwrap().apply(change);
        }
    }

    /// A kernel that counts names, and refuses when it is told to.
    #[derive(Clone, Default)]
    struct Kernel(Arc<Mutex<(u32, BTreeSet<u32>)>>);

    impl Backings for Kernel {
        fn name(&self, _: &File) -> io::Result<u32> {
            let (last, names) = &mut *self.0.lock().unwrap();
            *last = last.checked_add(1).ok_or(io::ErrorKind::Unsupported)?;
            names.insert(*last);
            Ok(*last)
        }

        fn give_up(&self, name: u32) {
            assert!(self.0.lock().unwrap().1.remove(&name), "{name} is given up once");
        }
    }

    impl Kernel {
        fn names(&self) -> usize {
            self.0.lock().unwrap().1.len()
        }
    }

    fn on_disk() -> Option<Arc<File>> {
        Some(Arc::new(File::open("/dev/null").unwrap()))
    }

    fn start(inherited: OpenFiles, account: &Arc<Account>, kernel: &Kernel) -> Passthrough {
        Passthrough::new(true, inherited, Some(account.clone()), Box::new(kernel.clone()))
    }

    #[test]
    fn the_first_open_decides_for_all_that_overlap_with_it() {
        let (account, kernel) = (Arc::default(), Kernel::default());
        let passthrough = start(OpenFiles::default(), &account, &kernel);
        assert_eq!(passthrough.open(INODE, 2, || None), Opening::Cached);
        assert_eq!(passthrough.open(INODE, 4, || panic!("it is open: no name is looked for")), Opening::Cached);
        assert!(passthrough.close(INODE, 2) && passthrough.close(INODE, 4));
        assert_eq!(passthrough.open(INODE, 6, on_disk), Opening::Passed { backing: 1, is_first: true });
        assert_eq!(passthrough.open(INODE, 8, || None), Opening::Passed { backing: 1, is_first: false });
        assert!(passthrough.close(INODE, 6));
        assert_eq!(kernel.names(), 1);
        assert!(passthrough.close(INODE, 8));
        assert_eq!(kernel.names(), 0);
    }

    #[test]
    fn a_kernel_that_refuses_is_asked_once() {
        let (account, kernel) = (Arc::default(), Kernel::default());
        kernel.0.lock().unwrap().0 = u32::MAX;
        let passthrough = start(OpenFiles::default(), &account, &kernel);
        assert_eq!(passthrough.open(INODE, 2, on_disk), Opening::Cached);
        assert_eq!(passthrough.open(Inode(8), 4, || panic!("nothing is looked for")), Opening::Cached);
    }

    #[test]
    fn a_process_killed_before_it_answered_leaves_no_handle_too_many_and_none_too_few() {
        let (account, kernel) = (Arc::<Account>::default(), Kernel::default());
        let inherited = || account.0.lock().unwrap().clone();
        for (find, passed) in [(on_disk as fn() -> _, true), (|| None, false)] {
            let opened = start(inherited(), &account, &kernel).open(INODE, 2, find);
            // It noted that and was killed; the kernel asks the next one, which must not look elsewhere.
            assert_eq!(
                start(inherited(), &account, &kernel).open(INODE, 2, || panic!("it is open")),
                match opened {
                    Opening::Passed { backing, .. } => Opening::Passed { backing, is_first: false },
                    other => other,
                }
            );
            assert_eq!(matches!(opened, Opening::Passed { .. }), passed);
            assert_eq!(kernel.names(), usize::from(passed));
            for _ in 0..2 {
                assert!(start(inherited(), &account, &kernel).close(INODE, 2)); // the next is asked that again, too
            }
            assert_eq!((inherited(), kernel.names()), (OpenFiles::default(), 0));
        }
    }

    #[test]
    fn what_was_passed_is_passed_on_where_nothing_else_is() {
        let mut inherited = OpenFiles::default();
        inherited.apply(HandleChange::Opened { inode: INODE, handle: 2, backing: Some(9) });
        let passthrough = Passthrough::new(false, inherited, None, Box::new(Kernel::default()));
        assert!(passthrough.is_wanted());
        assert_eq!(passthrough.open(INODE, 4, || None), Opening::Passed { backing: 9, is_first: false });
        assert_eq!(passthrough.open(Inode(8), 6, || panic!("nothing is looked for")), Opening::Cached);
    }

    #[test]
    fn while_it_is_held_nothing_is_opened_or_closed_and_all_of_it_afterwards() {
        let passthrough = start(OpenFiles::default(), &Arc::default(), &Kernel::default());
        passthrough.open(INODE, 2, || None);
        passthrough.hold();
        assert_eq!(passthrough.open(INODE, 4, || None), Opening::Held);
        assert!(!passthrough.close(INODE, 2));
        let done = Arc::new(AtomicUsize::new(0));
        passthrough.after_release({
            let done = Arc::clone(&done);
            move || done.store(1, Ordering::Relaxed)
        });
        assert_eq!(done.load(Ordering::Relaxed), 0);
        passthrough.release();
        assert_eq!(done.load(Ordering::Relaxed), 1);
        assert!(passthrough.close(INODE, 2));
        assert_eq!(passthrough.open(INODE, 4, || None), Opening::Cached);
    }
}
