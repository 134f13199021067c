//! One log line for each thing that is wrong, however often it is met: a reader that retries, or a source that is listed
//! again and again, must not flood the log.

use std::collections::HashSet;
use std::hash::{BuildHasher, RandomState};
use std::sync::{Mutex, PoisonError};

use log::Level;

/// Remembers what has been said, as hashes.
#[derive(Debug, Default)]
pub(super) struct LogOnce {
    said: Mutex<HashSet<u64>>,
    hasher: RandomState,
}

impl LogOnce {
    /// Logs `message` unless it has been logged before.
    pub(super) fn log(&self, level: Level, message: &str) {
        const MAX_REMEMBERED: usize = 65_536; // a bound on memory: past it a message may come again
        let mut said = self.said.lock().unwrap_or_else(PoisonError::into_inner);
        if said.len() >= MAX_REMEMBERED {
            said.clear();
        }
        let is_new = said.insert(self.hasher.hash_one(message));
        drop(said);
        if is_new {
            log::log!(level, "{message}");
        }
    }

    /// Logs an error once.
    pub(super) fn error(&self, message: &str) {
        self.log(Level::Error, message);
    }

    /// Logs a warning once.
    pub(super) fn warn(&self, message: &str) {
        self.log(Level::Warn, message);
    }
}
