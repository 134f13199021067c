//! Buffers that replies are made in: kept for reuse, and never more of them than the memory for replies holds.

use std::ops::{Deref, DerefMut};
use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::budget::{Budget, Share};
use crate::metrics::METRICS;

/// The least that the kernel asks for, but at the end of a file.
const PAGE_BYTES: usize = 4096;

/// More idle buffers than this are not looked through.
const MOST_IDLE: usize = 64;

/// Where buffers come from.
#[derive(Debug)]
pub(super) struct Replies {
    in_use: Budget,
    idle: Mutex<Vec<Vec<u8>>>,
    /// What the idle ones may take: fresh memory costs as much as a copy into it.
    most_idle_bytes: usize,
}

/// A buffer of a reply; it goes back when it is dropped.
#[derive(Debug)]
pub(super) struct Reply<'a> {
    replies: &'a Replies,
    buffer: Vec<u8>,
    length: usize,
    _share: Share<'a>,
}

impl Replies {
    /// Buffers that together take at most `bytes`.
    pub(super) fn new(bytes: u64) -> Self {
        let most_idle_bytes = bytes / 4;
        let in_use = Budget::new(bytes - most_idle_bytes);
        Self { in_use, idle: Mutex::default(), most_idle_bytes: usize::try_from(most_idle_bytes).unwrap_or(usize::MAX) }
    }

    /// A buffer of `length` bytes whose content means nothing. Waits where there is no memory for it.
    pub(super) fn take(&self, length: usize) -> Reply<'_> {
        // Sizes are rounded, so that most buffers fit most requests, and one that is taken is as large as it is counted.
        let size = length.next_power_of_two().max(PAGE_BYTES);
        let share = self.in_use.take(size as u64);
        METRICS.memory_waits.add(share.has_waited().into());
        let mut idle = self.idle();
        let fits = idle.iter().rposition(|buffer| buffer.len() == size);
        let buffer = fits.map(|at| idle.swap_remove(at));
        drop(idle);
        Reply { replies: self, buffer: buffer.unwrap_or_else(|| vec![0; size]), length, _share: share }
    }

    fn idle(&self) -> MutexGuard<'_, Vec<Vec<u8>>> {
        self.idle.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Deref for Reply<'_> {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.buffer[..self.length]
    }
}

impl DerefMut for Reply<'_> {
    fn deref_mut(&mut self) -> &mut [u8] {
        &mut self.buffer[..self.length]
    }
}

impl Drop for Reply<'_> {
    fn drop(&mut self) {
        let buffer = std::mem::take(&mut self.buffer);
        let mut idle = self.replies.idle();
        let idle_bytes: usize = idle.iter().map(Vec::len).sum();
        if idle.len() < MOST_IDLE && idle_bytes + buffer.len() <= self.replies.most_idle_bytes {
            idle.push(buffer);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::thread;

    use super::*;

    #[test]
    fn buffers_are_used_again_and_the_idle_ones_are_bounded() {
        let replies = Replies::new(4 << 20);
        let all: Vec<_> = (0..3).map(|_| replies.take(1_000_000)).collect();
        drop(all);
        assert_eq!(replies.idle().len(), 1);
        assert_eq!(replies.take(10).len(), 10, "a small one takes no large buffer away");
        let mut large = replies.take(1 << 20);
        assert!(replies.idle().is_empty());
        large.fill(7);
    }

    #[test]
    fn more_readers_than_memory_take_turns() {
        let replies = Replies::new(40_000);
        thread::scope(|scope| {
            for _ in 0..8 {
                scope.spawn(|| {
                    for length in (1..20_000).step_by(100) {
                        assert_eq!(replies.take(length).len(), length);
                        assert!(replies.in_use.used() <= 30_000);
                    }
                });
            }
        });
    }
}
