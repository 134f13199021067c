//! Keeps decoded files on disk for later: each file that somebody loads is written there once its readers are quiet.

use std::collections::{HashMap, HashSet, VecDeque};
use std::fs::File;
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use log::{error, info, warn};

use super::{BoxError, Checkpoint, Keeper};
use crate::archive::ArchivedFile;
use crate::decoded_files::{DecodedFiles, DecodedFilesError, FileDigest};

/// A load that paused for so long is taken to be over: what it needed is decoded, and processors are free.
const QUIET: Duration = Duration::from_secs(1);
/// A file that could not be kept is not tried again before.
const BEFORE_RETRY: Duration = Duration::from_secs(60);
/// Readers that are never quiet do not put a file off for ever.
const PATIENCE: Duration = Duration::from_secs(60);

/// Finds decoded files, and writes those that are asked for again and again. Dropping it ends what it is writing.
#[derive(Debug)]
pub(super) struct FileKeeper {
    files: Arc<DecodedFiles>,
    shared: Arc<Shared>,
}

#[derive(Debug, Default)]
struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    /// What is queued or being written, and since when files are not tried again that could not be kept.
    seen: HashSet<FileDigest>,
    failed: HashMap<FileDigest, Instant>,
    queue: VecDeque<Wanted>,
    last_read: Option<Instant>,
    is_closed: bool,
}

/// A file to keep.
#[derive(Debug)]
struct Wanted {
    checkpoint: Arc<dyn Checkpoint>,
    file: usize,
}

impl Wanted {
    fn file(&self) -> &ArchivedFile {
        &self.checkpoint.files()[self.file]
    }
}

impl FileKeeper {
    /// # Errors
    /// When the system grants no thread.
    pub(super) fn start(files: Arc<DecodedFiles>) -> io::Result<Self> {
        let keeper = Self { files, shared: Arc::default() };
        let (files, shared) = (Arc::clone(&keeper.files), Arc::clone(&keeper.shared));
        thread::Builder::new().name("decoded-files".to_owned()).spawn(move || shared.run(&files))?;
        Ok(keeper)
    }

    /// The decoded file, looked for on disk.
    pub(super) fn find(&self, file: &ArchivedFile) -> Option<Arc<File>> {
        self.files.find(&file.decoded_sha256)
    }

    /// The decoded file, if it has been found or written before.
    pub(super) fn get(&self, file: &ArchivedFile) -> Option<Arc<File>> {
        self.files.get(&file.decoded_sha256)
    }

    /// Notes a read that has to decode. One past the header asks for the whole file to be kept.
    pub(super) fn note_read(&self, checkpoint: &Arc<dyn Checkpoint>, file: usize, end_bytes: u64) {
        let wanted = Wanted { checkpoint: Arc::clone(checkpoint), file };
        let is_header = end_bytes <= wanted.file().header.len() as u64;
        let mut state = self.shared.lock();
        state.last_read = Some(Instant::now());
        let digest = wanted.file().decoded_sha256;
        if is_header || state.failed.get(&digest).is_some_and(|since| since.elapsed() < BEFORE_RETRY) {
            return;
        }
        if state.seen.insert(digest) {
            state.queue.push_back(wanted);
            self.shared.changed.notify_all();
        }
    }
}

impl Drop for FileKeeper {
    fn drop(&mut self) {
        self.shared.lock().is_closed = true;
        self.shared.changed.notify_all();
    }
}

impl Shared {
    /// Nothing is read or written under this lock, so poison tells nothing.
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn run(&self, files: &DecodedFiles) {
        while let Some(wanted) = self.next() {
            let name = &wanted.file().name;
            let digest = wanted.file().decoded_sha256;
            let kept = catch_unwind(AssertUnwindSafe(|| self.keep(files, &wanted)));
            {
                // It may be wanted again: what is kept makes room for others in time.
                let mut state = self.lock();
                state.seen.remove(&digest);
                match &kept {
                    Ok(Ok(())) => state.failed.remove(&digest),
                    _ => state.failed.insert(digest, Instant::now()),
                };
            }
            match kept {
                Ok(Ok(())) => info!("decoded file kept: {name}, {} bytes", wanted.file().length_bytes),
                Ok(Err(error)) if self.lock().is_closed => info!("decoded file not kept: {name}: {error}"),
                Ok(Err(error)) => warn!("decoded file not kept: {name}: {error}"),
                Err(_) => error!("internal error while keeping the decoded file {name}; please report this"),
            }
        }
    }

    fn next(&self) -> Option<Wanted> {
        let nothing = |state: &mut State| state.queue.is_empty() && !state.is_closed;
        let mut state = self.changed.wait_while(self.lock(), nothing).unwrap_or_else(PoisonError::into_inner);
        if state.is_closed { None } else { state.queue.pop_front() }
    }

    fn keep(&self, files: &DecodedFiles, wanted: &Wanted) -> Result<(), DecodedFilesError> {
        let Wanted { checkpoint, file } = wanted;
        let ArchivedFile { decoded_sha256, length_bytes, .. } = wanted.file();
        let mut patience = PATIENCE;
        let produce = |offset: u64, out: &mut [u8]| -> Result<(), BoxError> {
            self.until_quiet(&mut patience)?;
            checkpoint.decode_ahead(*file, offset, out.len() as u64, Keeper::Reader);
            let found = checkpoint.read(*file, offset, Keeper::Reader, out)?;
            if found == out.len() { Ok(()) } else { Err(format!("{found} bytes at byte {offset}").into()) }
        };
        files.keep(decoded_sha256, *length_bytes, produce).map(drop)
    }

    /// Waits until readers are quiet, at most for what is left of `patience`.
    fn until_quiet(&self, patience: &mut Duration) -> Result<(), BoxError> {
        let mut state = self.lock();
        loop {
            if state.is_closed {
                return Err("the mount ends".into());
            }
            let since = state.last_read.map_or(QUIET, |read| read.elapsed());
            let wait = QUIET.saturating_sub(since).min(*patience);
            if wait.is_zero() {
                return Ok(());
            }
            *patience -= wait;
            state = self.changed.wait_timeout(state, wait).unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}
