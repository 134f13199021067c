//! How often a worker may die before its supervisor gives up.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

/// What happened longer ago is forgiven.
const WINDOW: Duration = Duration::from_secs(60);
/// More deaths than this within the window are no accident.
const MOST: usize = 30;
/// As many as this point to a request that kills whoever answers it.
const SUSPICIOUS: usize = 15;
/// How much longer each death within the window makes the next wait.
const STEP: Duration = Duration::from_millis(5);

/// The deaths of workers.
#[derive(Debug, Default)]
pub(super) struct Restarts {
    recent: VecDeque<Instant>,
    total: u64,
}

impl Restarts {
    /// Counts a death at `now`. Returns how long to wait before the next worker, or `None` to give up.
    pub(super) fn count(&mut self, now: Instant) -> Option<Duration> {
        while self.recent.front().is_some_and(|then| now.duration_since(*then) > WINDOW) {
            self.recent.pop_front();
        }
        let before = self.recent.len();
        if before >= MOST {
            return None;
        }
        self.recent.push_back(now);
        self.total += 1;
        Some(STEP * u32::try_from(before * before / 4).expect("it is small"))
    }

    /// Whether so many died lately that a request must be suspected, and is better refused than repeated.
    pub(super) fn are_suspicious(&self) -> bool {
        self.recent.len() >= SUSPICIOUS
    }

    /// Workers that were replaced because they died.
    pub(super) fn total(&self) -> u64 {
        self.total
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_is_replaced_at_once_ten_within_seconds_and_too_many_not_at_all() {
        let (start, mut restarts) = (Instant::now(), Restarts::default());
        let waits: Vec<_> = (0..MOST).map(|_| restarts.count(start).unwrap()).collect();
        assert_eq!(waits[0], Duration::ZERO);
        assert!(waits[..10].iter().sum::<Duration>() < Duration::from_secs(3), "{waits:?}");
        assert!(waits.is_sorted() && restarts.are_suspicious());
        assert_eq!(restarts.count(start), None);
        assert_eq!(restarts.total(), MOST as u64);
    }

    #[test]
    fn what_happened_long_ago_is_forgiven() {
        let (start, mut restarts) = (Instant::now(), Restarts::default());
        for minute in 0..100 {
            assert_eq!(restarts.count(start + minute * (WINDOW + STEP)), Some(Duration::ZERO));
            assert!(!restarts.are_suspicious());
        }
        assert_eq!(restarts.total(), 100);
    }
}
