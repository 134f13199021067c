//! Opens the archives that a scan found, and keeps open what did not change since the scan before.

use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

use super::activity::Activity;
use super::checkpoint::{BoxError, Checkpoint};
use super::log_once::LogOnce;
use super::scan::Scan;
use super::source::{Source, SourceFile};
use crate::archive::ArchiveError;

/// Opens the archive at an absolute path.
pub(super) type OpenArchive = dyn Fn(&Path) -> Result<Arc<dyn Checkpoint>, BoxError> + Send + Sync;

/// The archives of a source, by where they lie, from its root.
#[derive(Debug, Default)]
pub(super) struct Opened {
    archives: BTreeMap<PathBuf, Attempt>,
}

/// One archive, and what came of opening it.
#[derive(Clone, Debug)]
struct Attempt {
    file: SourceFile,
    outcome: Outcome,
}

#[derive(Clone, Debug)]
enum Outcome {
    Opened(Arc<OpenedArchive>),
    /// Its bytes are not what they should be. Not tried again until the file changes.
    Damaged,
    /// The system refused to read it, or a base of it is missing, which may pass.
    Unreadable,
}

impl Attempt {
    /// Whether opening again could end otherwise although the file did not change.
    fn is_worth_another(&self) -> bool {
        match &self.outcome {
            Outcome::Opened(archive) => !archive.checkpoint.is_complete(),
            Outcome::Damaged => false,
            Outcome::Unreadable => true,
        }
    }
}

/// An archive whose index is sound, and what has been asked of it.
#[derive(Debug)]
pub(super) struct OpenedArchive {
    /// Where it lies, from the root of the source.
    pub(super) path: PathBuf,
    pub(super) file: SourceFile,
    pub(super) checkpoint: Arc<dyn Checkpoint>,
    pub(super) activity: Activity,
}

impl Opened {
    /// Opens every archive of `scan`, several at once, except those that `previous` holds and that did not change. One
    /// that cannot be opened is left out with one log line; the others are not affected.
    pub(super) fn new(
        source: &Source,
        scan: &Scan,
        previous: &Self,
        open_archive: &OpenArchive,
        log: &LogOnce,
    ) -> Self {
        let mut archives = BTreeMap::new();
        let mut candidates = Vec::new();
        for (path, file) in scan.archives() {
            match previous.archives.get(&path) {
                Some(attempt) if attempt.file == *file && !attempt.is_worth_another() => {
                    archives.insert(path, attempt.clone());
                }
                _ => candidates.push((path, file.clone())),
            }
        }
        let results = in_parallel(&candidates, |(_, file)| {
            // A panic is our mistake, and still no reason to take the other archives away.
            catch_unwind(AssertUnwindSafe(|| open_archive(&source.root().join(&file.path))))
                .unwrap_or_else(|_| Err("internal error while opening: please report it with the archive".into()))
        });
        for ((path, file), result) in candidates.into_iter().zip(results) {
            let outcome = match result {
                Ok(checkpoint) => Outcome::Opened(Arc::new(OpenedArchive {
                    path: path.clone(),
                    file: file.clone(),
                    activity: Activity::new(checkpoint.files()),
                    checkpoint,
                })),
                Err(error) => {
                    log.error(&format!("archive refused: {}: {error}", path.display()));
                    let passes = matches!(
                        error.downcast_ref(),
                        Some(ArchiveError::Io { .. } | ArchiveError::BaseMissing { .. })
                    );
                    if passes { Outcome::Unreadable } else { Outcome::Damaged }
                }
            };
            archives.insert(path, Attempt { file, outcome });
        }
        Self { archives }
    }

    /// The archive at `path`, from the root of the source, if it could be opened.
    pub(super) fn get(&self, path: &Path) -> Option<&Arc<OpenedArchive>> {
        match &self.archives.get(path)?.outcome {
            Outcome::Opened(archive) => Some(archive),
            Outcome::Damaged | Outcome::Unreadable => None,
        }
    }

    /// Archives that could not be opened.
    pub(super) fn refused(&self) -> u64 {
        let refused = |attempt: &&Attempt| !matches!(attempt.outcome, Outcome::Opened(_));
        self.archives.values().filter(refused).count() as u64
    }

    /// Whether opening again could help although nothing in the source changes.
    pub(super) fn is_worth_another_try(&self) -> bool {
        self.archives.values().any(Attempt::is_worth_another)
    }
}

/// `work` on every item by a few threads, results in order. Enough to hide a disk's or network's latency.
fn in_parallel<T: Sync, R: Send>(items: &[T], work: impl Fn(&T) -> R + Sync) -> Vec<R> {
    const THREADS: usize = 8;
    let next = AtomicUsize::new(0);
    let mut results: Vec<(usize, R)> = thread::scope(|scope| {
        let worker = || {
            let take = || {
                let index = next.fetch_add(1, Ordering::Relaxed);
                items.get(index).map(|item| (index, item))
            };
            std::iter::from_fn(take).map(|(index, item)| (index, work(item))).collect::<Vec<_>>()
        };
        let threads: Vec<_> = (0..THREADS.min(items.len())).map(|_| scope.spawn(worker)).collect();
        threads.into_iter().flat_map(|thread| thread.join().expect("the work does not panic")).collect()
    });
    results.sort_unstable_by_key(|&(index, _)| index);
    results.into_iter().map(|(_, result)| result).collect()
}
