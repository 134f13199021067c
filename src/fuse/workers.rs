//! The pool that reads and decodes, so that the event loops do not.
//!
//! A job may wait for a decode that another job does. A fixed number of threads would then be occupied by waiters while
//! the work that could go on stands in the queue; therefore the pool grows: a job that finds no idle thread gets a new
//! one, and threads that stay idle go away. How many decodes run at once is bounded below, where decodes are known.

use std::collections::VecDeque;
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

use log::{error, warn};

/// What a worker does.
type Job = Box<dyn FnOnce() + Send>;

/// Threads that never go away, so that a job is done even where no thread can be added.
const PERMANENT: usize = 4;
/// More than the kernel has in flight: 1024 in the background, and one for each thread that reads directly.
const MAX: usize = 2048;
/// How long a thread beyond the permanent ones waits for work.
const IDLE: Duration = Duration::from_secs(5);

/// A pool of threads. Dropping it lets the running jobs end and forgets those that wait.
#[derive(Debug)]
pub(super) struct Workers {
    shared: Arc<Shared>,
}

#[derive(Debug, Default)]
struct Shared {
    state: Mutex<State>,
    arrived: Condvar,
    /// While draining: a job ended.
    ended: Condvar,
}

#[derive(Default)]
struct State {
    queue: VecDeque<Job>,
    threads: usize,
    idle: usize,
    running: usize,
    is_draining: bool,
    is_closed: bool,
}

impl std::fmt::Debug for State {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { queue, threads, idle, running, .. } = self;
        write!(formatter, "{} queued, {threads} threads, {idle} idle, {running} running", queue.len())
    }
}

impl Workers {
    /// Starts the permanent threads.
    ///
    /// # Errors
    /// When the system grants no thread.
    pub(super) fn new() -> io::Result<Self> {
        let workers = Self { shared: Arc::new(Shared::default()) };
        for _ in 0..PERMANENT {
            workers.shared.lock().threads += 1;
            workers.shared.add_thread()?;
        }
        Ok(workers)
    }

    /// Has `job` done by a worker, soon.
    pub(super) fn submit(&self, job: impl FnOnce() + Send + 'static) {
        let mut state = self.shared.lock();
        state.queue.push_back(Box::new(job));
        if state.idle >= state.queue.len() {
            self.shared.arrived.notify_one();
            return;
        }
        if state.threads >= MAX {
            return; // the next thread that is done takes it
        }
        state.threads += 1;
        drop(state);
        if let Err(error) = self.shared.add_thread() {
            self.shared.lock().threads -= 1;
            warn!("no more worker threads: {error}");
        }
    }
}

impl Workers {
    /// Waits until every job is done, at most `limit`; returns whether they are. From now on
    /// [`Self::hold_while_draining`] does not return.
    pub(super) fn drain(&self, limit: Duration) -> bool {
        let mut state = self.shared.lock();
        state.is_draining = true;
        let waiting = |state: &mut State| state.running > 0 || !state.queue.is_empty();
        let waited = self.shared.ended.wait_timeout_while(state, limit, waiting);
        !waited.unwrap_or_else(PoisonError::into_inner).1.timed_out()
    }

    /// Called by an event loop that has handed a request over: while draining it waits for ever, so that it takes no
    /// other request from the device. A successor does.
    pub(super) fn hold_while_draining(&self) {
        while self.shared.lock().is_draining {
            thread::park();
        }
    }
}

impl Drop for Workers {
    fn drop(&mut self) {
        let mut state = self.shared.lock();
        state.is_closed = true;
        let forgotten = std::mem::take(&mut state.queue);
        drop(state);
        self.shared.arrived.notify_all();
        drop(forgotten); // each says so to its reader, which takes a system call: not under the lock
    }
}

impl Shared {
    /// No job runs under this lock, so poison tells nothing.
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Starts a thread that the caller has counted already.
    fn add_thread(self: &Arc<Self>) -> io::Result<()> {
        let shared = Arc::clone(self);
        thread::Builder::new().name("worker".to_owned()).spawn(move || shared.run()).map(drop)
    }

    fn run(&self) {
        while let Some(job) = self.next_job() {
            // A panic is our mistake. It costs its reader an I/O error (the dropped reply sends it) and no one else.
            if catch_unwind(AssertUnwindSafe(job)).is_err() {
                error!("internal error in a worker: the reader got an I/O error; please report this");
            }
            let mut state = self.lock();
            state.running -= 1;
            if state.is_draining {
                self.ended.notify_all();
            }
        }
    }

    /// The next job, or `None` where this thread should end; it is no longer counted then.
    fn next_job(&self) -> Option<Job> {
        let mut state = self.lock();
        loop {
            if let Some(job) = state.queue.pop_front() {
                state.running += 1;
                return Some(job);
            }
            if state.is_closed {
                state.threads -= 1;
                return None;
            }
            state.idle += 1;
            let (woken, wait) = self.arrived.wait_timeout(state, IDLE).unwrap_or_else(PoisonError::into_inner);
            state = woken;
            state.idle -= 1;
            if wait.timed_out() && state.queue.is_empty() && state.threads > PERMANENT {
                state.threads -= 1;
                return None;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Barrier;
    use std::sync::mpsc;

    use super::*;

    #[test]
    fn jobs_that_wait_do_not_hold_up_jobs_that_need_not() {
        let workers = Workers::new().unwrap();
        let (release, released) = mpsc::channel::<()>();
        let released = Arc::new(Mutex::new(released));
        for _ in 0..100 {
            let released = Arc::clone(&released);
            workers.submit(move || {
                let _ = released.lock().unwrap().recv();
            });
        }
        let (done, is_done) = mpsc::channel();
        workers.submit(move || done.send(()).unwrap());
        is_done.recv().unwrap();
        drop(release);
    }

    #[test]
    fn many_jobs_can_meet() {
        let workers = Workers::new().unwrap();
        let all = Arc::new(Barrier::new(201));
        for _ in 0..200 {
            let all = Arc::clone(&all);
            workers.submit(move || {
                all.wait();
            });
        }
        all.wait();
    }

    #[test]
    fn a_panicking_job_takes_no_thread_away() {
        let workers = Workers::new().unwrap();
        for _ in 0..3 * PERMANENT {
            workers.submit(|| panic!("a bug"));
        }
        let (done, is_done) = mpsc::channel();
        workers.submit(move || done.send(()).unwrap());
        is_done.recv().unwrap();
        assert!(workers.shared.lock().threads >= PERMANENT);
    }

    #[test]
    fn draining_waits_for_jobs_and_no_longer_than_it_may() {
        let workers = Workers::new().unwrap();
        workers.hold_while_draining();
        let (release, released) = mpsc::channel::<()>();
        workers.submit(move || {
            let _ = released.recv();
        });
        assert!(!workers.drain(Duration::from_millis(10)));
        drop(release);
        assert!(workers.drain(Duration::from_secs(60)));
    }

    #[test]
    fn forgotten_jobs_are_dropped_with_the_pool() {
        let workers = Workers::new().unwrap();
        let alive = Arc::new(());
        let (started, has_started) = mpsc::channel();
        let (release, released) = mpsc::channel::<()>();
        workers.submit(move || {
            started.send(()).unwrap();
            let _ = released.recv();
        });
        has_started.recv().unwrap();
        workers.shared.lock().queue.push_back({
            let alive = Arc::clone(&alive);
            Box::new(move || drop(alive))
        });
        drop(workers);
        assert_eq!(Arc::strong_count(&alive), 1);
        drop(release);
    }
}
