//! Amounts that many callers share and together may not exceed: bytes of memory, threads that decode.
//!
//! What does not fit waits, and whoever holds a [`Share`] keeps it to the end. A caller that holds a share of a budget must
//! not wait for another share of the same one, nor for a caller that does; what needs more than one thing takes it all at once.

use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

/// An amount given out in shares.
///
/// ```
/// # use mcwcfs::budget::Budget;
/// let memory = Budget::new(100);
/// let share = memory.take(70);
/// assert_eq!(memory.take_what_is_free(50).amount(), 30);
/// drop(share);
/// assert_eq!(memory.used(), 0);
/// ```
#[derive(Debug)]
pub struct Budget {
    total: u64,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    used: u64,
    /// Callers are served in the order of their numbers, so that one who needs much is not passed for ever.
    next_number: u64,
    now_served: u64,
    waiting: u64,
}

impl State {
    fn is_anyone_waiting(&self) -> bool {
        self.waiting > 0
    }
}

/// Part of a budget, given back when it is dropped.
#[derive(Debug)]
pub struct Share<'a> {
    budget: &'a Budget,
    amount: u64,
    has_waited: bool,
}

impl Share<'_> {
    /// Whether it was not free at once.
    pub fn has_waited(&self) -> bool {
        self.has_waited
    }

    /// How much it is.
    pub fn amount(&self) -> u64 {
        self.amount
    }
}

impl Drop for Share<'_> {
    fn drop(&mut self) {
        self.budget.lock().used -= self.amount;
        self.budget.changed.notify_all();
    }
}

impl Budget {
    /// A budget of `total`, of which nothing is taken.
    pub fn new(total: u64) -> Self {
        Self { total, state: Mutex::default(), changed: Condvar::new() }
    }

    /// What can be given out.
    pub fn total(&self) -> u64 {
        self.total
    }

    /// What is given out now.
    pub fn used(&self) -> u64 {
        self.lock().used
    }

    /// Takes `amount`, waiting until it is free. One that exceeds the budget takes all of it, and so runs alone.
    pub fn take(&self, amount: u64) -> Share<'_> {
        let amount = amount.min(self.total);
        let mut state = self.lock();
        let number = state.next_number;
        state.next_number += 1;
        let has_waited = state.now_served != number || state.used + amount > self.total;
        if has_waited {
            state.waiting += 1;
            state = self
                .changed
                .wait_while(state, |state| state.now_served != number || state.used + amount > self.total)
                .unwrap_or_else(PoisonError::into_inner);
            state.waiting -= 1;
        }
        state.now_served += 1;
        state.used += amount;
        let is_anyone_waiting = state.is_anyone_waiting();
        drop(state);
        if is_anyone_waiting {
            self.changed.notify_all(); // the next may fit too
        }
        Share { budget: self, amount, has_waited }
    }

    /// Waits until some of the budget is free and nobody waits in [`take`](Self::take): the moment for work that can wait.
    /// Takes nothing, so that whoever comes next need not wait for the caller.
    pub fn wait_until_idle(&self) {
        let is_busy = |state: &mut State| state.is_anyone_waiting() || state.used >= self.total;
        drop(self.changed.wait_while(self.lock(), is_busy).unwrap_or_else(PoisonError::into_inner));
    }

    /// Takes what is free, at most `amount`, and nothing where somebody waits. Does not wait itself.
    pub fn take_what_is_free(&self, amount: u64) -> Share<'_> {
        let mut state = self.lock();
        let free = if state.is_anyone_waiting() { 0 } else { self.total - state.used };
        let amount = amount.min(free);
        state.used += amount;
        Share { budget: self, amount, has_waited: false }
    }

    /// No caller's code runs under this lock, so poison tells nothing.
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU64, Ordering};
    use std::thread;

    use super::*;

    fn until_waiting(budget: &Budget, count: u64) {
        while budget.lock().waiting < count {
            thread::yield_now();
        }
    }

    #[test]
    fn no_more_than_the_total_is_ever_out() {
        let budget = Budget::new(10);
        let out = AtomicU64::new(0);
        thread::scope(|scope| {
            for caller in 0..16_u64 {
                let (budget, out) = (&budget, &out);
                scope.spawn(move || {
                    for turn in 0..200 {
                        let share = budget.take((caller * 7 + turn) % 12);
                        let now = out.fetch_add(share.amount(), Ordering::SeqCst) + share.amount();
                        assert!(now <= 10, "{now}");
                        out.fetch_sub(share.amount(), Ordering::SeqCst);
                    }
                });
            }
        });
        assert_eq!(budget.used(), 0);
    }

    #[test]
    fn one_that_needs_much_is_not_passed_by_those_who_need_little() {
        let budget = Budget::new(10);
        let small = budget.take(4);
        let order = Mutex::new(Vec::new());
        thread::scope(|scope| {
            let (budget, order) = (&budget, &order);
            scope.spawn(move || {
                let share = budget.take(10);
                order.lock().unwrap().push(share.amount());
            });
            until_waiting(budget, 1);
            scope.spawn(move || {
                let share = budget.take(1); // would fit beside `small`
                order.lock().unwrap().push(share.amount());
            });
            until_waiting(budget, 2);
            assert_eq!(budget.take_what_is_free(1).amount(), 0, "others wait");
            drop(small);
            while order.lock().unwrap().len() < 2 {
                thread::yield_now();
            }
            assert_eq!(*order.lock().unwrap(), [10, 1]);
        });
    }

    #[test]
    fn what_exceeds_the_total_runs_alone() {
        let budget = Budget::new(10);
        assert_eq!(budget.take(1000).amount(), 10);
        assert_eq!(budget.used(), 0);
        assert_eq!(Budget::new(0).take(1).amount(), 0);
    }

    #[test]
    fn work_that_can_wait_waits_for_those_who_cannot() {
        let budget = Budget::new(1);
        let share = budget.take(1);
        let order = Mutex::new(Vec::new());
        thread::scope(|scope| {
            let (budget, order) = (&budget, &order);
            scope.spawn(move || {
                budget.wait_until_idle();
                order.lock().unwrap().push("can wait");
            });
            scope.spawn(move || {
                let _share = budget.take(1);
                order.lock().unwrap().push("cannot");
            });
            until_waiting(budget, 1);
            drop(share);
        });
        assert_eq!(*order.lock().unwrap(), ["cannot", "can wait"]);
    }
}
