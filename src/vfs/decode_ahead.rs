//! Decoding what a reader will ask for next, while processors have nothing else to do.
//!
//! Loaders read a checkpoint once, from front to back, and often with several threads that take turns. So reads are joined
//! into streams by where they lie, not by who made them: per inode and region, because torch opens the same path again and
//! others share a descriptor between processes. The bytes in front of a stream are decoded in a window that moves with it,
//! in file order, on threads that stand back for every reader that waits. A reader that overtakes its window is not held
//! up: what lies behind it is skipped.
//!
//! A window's pieces end where its reader's requests are expected to, so that each is answered from one of them. Windows
//! together take at most a quarter of the cache, so what was decoded ahead is still there when its reader comes.

use std::collections::VecDeque;
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;

use log::error;

use super::{Checkpoint, Inode, Keeper};

/// How far decoding goes ahead of readers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum DecodeAhead {
    /// What is asked for is decoded, and nothing else.
    Off,
    /// To the end of the file that is read.
    File,
    /// On into the next file of the archive.
    #[default]
    Model,
}

/// What a piece of a window holds: as much as a reader asks for at once.
const PIECE_BYTES: u64 = 1 << 20;
/// How far ahead of a stream each thread is kept busy.
const WINDOW_BYTES_PER_THREAD: u64 = 4 << 20;
/// A read this far from a stream still belongs to it: threads that take turns are that far apart. One further back begins a
/// stream of its own: somebody reads the file again.
const REACH_BYTES: u64 = 32 << 20;
/// Streams that are followed at a time; the one that stood still longest makes room.
const MOST_STREAMS: usize = 64;

/// Follows readers and decodes ahead of them. Dropping it forgets what was not begun.
#[derive(Debug)]
pub(super) struct Follower {
    mode: DecodeAhead,
    /// How far ahead of a stream is decoded.
    window_bytes: u64,
    /// What all windows together may hold.
    most_bytes: u64,
    shared: Arc<Shared>,
}

#[derive(Debug, Default)]
struct Shared {
    state: Mutex<State>,
    arrived: Condvar,
}

#[derive(Debug, Default)]
struct State {
    /// The one that was read last comes last.
    streams: Vec<Stream>,
    queue: VecDeque<Piece>,
    is_closed: bool,
}

/// Reads that go forward through a file. Positions are bytes of the file; past its end they go on into the next.
#[derive(Debug)]
struct Stream {
    inode: Inode,
    /// Where it began.
    start: u64,
    /// The end of what was read so far.
    position: Arc<AtomicU64>,
    /// Sum of the lengths of its reads.
    read_bytes: u64,
    reads: u64,
    /// The end of what was queued.
    queued_to: u64,
}

/// Bytes of one file to decode.
#[derive(Debug)]
struct Piece {
    checkpoint: Arc<dyn Checkpoint>,
    file: usize,
    offset_bytes: u64,
    length_bytes: u64,
    keeper: Keeper,
    /// Its end, as its stream counts.
    end: u64,
    position: Arc<AtomicU64>,
}

impl Stream {
    fn position(&self) -> u64 {
        self.position.load(Ordering::Relaxed)
    }

    fn reaches(&self, inode: Inode, offset: u64) -> bool {
        let position = self.position();
        let near = position.saturating_sub(REACH_BYTES)..=position.saturating_add(REACH_BYTES);
        self.inode == inode && offset >= self.start && near.contains(&offset)
    }

    /// Whether what was read is a good part of what lies between its first and last byte: a random reader's is not.
    fn is_dense(&self) -> bool {
        self.read_bytes >= (self.position() - self.start) / 4
    }

    fn ahead_bytes(&self) -> u64 {
        self.queued_to.saturating_sub(self.position())
    }
}

impl Follower {
    /// Starts to decode ahead into a cache of `cache_bytes`, on a machine on which `threads` may decode. `None` where nothing is to be done: the mode
    /// is off, or the cache too small.
    ///
    /// # Errors
    /// When the system grants no thread.
    pub(super) fn start(mode: DecodeAhead, threads: usize, cache_bytes: u64) -> io::Result<Option<Self>> {
        let window_bytes = (threads as u64 * WINDOW_BYTES_PER_THREAD).min(cache_bytes / 8);
        if mode == DecodeAhead::Off || window_bytes < PIECE_BYTES {
            return Ok(None);
        }
        let follower = Self { mode, window_bytes, most_bytes: cache_bytes / 4, shared: Arc::default() };
        // A processor is left to readers and to what the kernel does for them: one fewer decodes as much as they can take.
        for _ in 0..(threads - 1).max(1) {
            let shared = Arc::clone(&follower.shared);
            thread::Builder::new().name("decode-ahead".to_owned()).spawn(move || shared.run())?;
        }
        Ok(Some(follower))
    }

    /// Notes a read of file `file` of `checkpoint`, about to be answered.
    pub(super) fn follow(
        &self,
        inode: Inode,
        checkpoint: &Arc<dyn Checkpoint>,
        file: usize,
        offset_bytes: u64,
        length_bytes: u64,
        keeper: Keeper,
    ) {
        let header_bytes = checkpoint.files()[file].header.len() as u64;
        let end = offset_bytes.saturating_add(length_bytes);
        let mut state = self.shared.lock();
        let is_first_of_its_file = state.streams.iter().all(|stream| stream.inode != inode);
        let known = state.streams.iter().rposition(|stream| stream.reaches(inode, offset_bytes));
        let mut stream = match known {
            Some(at) => state.streams.remove(at),
            None => {
                let position = Arc::new(AtomicU64::new(end));
                Stream { inode, start: offset_bytes, position, read_bytes: 0, reads: 0, queued_to: end }
            }
        };
        stream.position.fetch_max(end, Ordering::Relaxed);
        stream.read_bytes += length_bytes;
        stream.reads += 1;
        // A file's first read is taken for the start of a load, unless it is after the header: many want no more than that.
        let goes_on = (stream.reads > 1 && stream.is_dense()) || (is_first_of_its_file && offset_bytes >= header_bytes);
        let mut more_to_do = 0;
        if goes_on {
            let pieces = self.pieces(&mut stream, checkpoint, file, keeper);
            let mut others: u64 = state.streams.iter().map(Stream::ahead_bytes).sum();
            while others + stream.ahead_bytes() > self.most_bytes && !state.streams.is_empty() {
                others -= state.streams.remove(0).ahead_bytes(); // if it goes on it will be seen again
            }
            more_to_do = pieces.len();
            state.queue.extend(pieces);
        }
        if state.streams.len() >= MOST_STREAMS {
            state.streams.remove(0);
        }
        state.streams.push(stream);
        drop(state);
        match more_to_do {
            0 => {}
            1 => self.shared.arrived.notify_one(),
            _ => self.shared.arrived.notify_all(),
        }
    }

    /// What is to be decoded so that the window in front of `stream`, which reads file `file`, is full.
    fn pieces(&self, stream: &mut Stream, checkpoint: &Arc<dyn Checkpoint>, file: usize, keeper: Keeper) -> Vec<Piece> {
        let mut pieces = Vec::new();
        let target = stream.position() + self.window_bytes;
        let mut from = stream.queued_to.max(stream.position());
        // A small step is not worth a piece of its own.
        if from + PIECE_BYTES > target {
            return pieces;
        }
        let last_file = if self.mode == DecodeAhead::Model { checkpoint.files().len() - 1 } else { file };
        let mut file_start = 0;
        for file in file..=last_file {
            let length = checkpoint.files()[file].length_bytes;
            while from < target && from < file_start + length {
                // The kernel's requests grow to their full length, and go on at multiples of that from where they are now.
                let past_last = (from - stream.position()) % PIECE_BYTES;
                let end = (from + PIECE_BYTES - past_last).min(file_start + length);
                pieces.push(Piece {
                    checkpoint: Arc::clone(checkpoint),
                    file,
                    offset_bytes: from - file_start,
                    length_bytes: end - from,
                    keeper,
                    end,
                    position: Arc::clone(&stream.position),
                });
                from = end;
            }
            file_start += length;
        }
        stream.queued_to = from;
        pieces
    }
}

impl Drop for Follower {
    fn drop(&mut self) {
        let mut state = self.shared.lock();
        state.is_closed = true;
        state.queue.clear();
        drop(state);
        self.shared.arrived.notify_all();
    }
}

impl Shared {
    /// Nothing is decoded under this lock, so poison tells nothing.
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn run(&self) {
        while let Some(piece) = self.next_piece() {
            let Piece { checkpoint, file, offset_bytes, length_bytes, keeper, .. } = &piece;
            let decode = AssertUnwindSafe(|| checkpoint.decode_ahead(*file, *offset_bytes, *length_bytes, *keeper));
            if catch_unwind(decode).is_err() {
                error!("internal error while decoding ahead: whoever reads there will see it too; please report this");
            }
        }
    }

    /// The next piece that its reader has not reached yet; `None` when there will be no more.
    fn next_piece(&self) -> Option<Piece> {
        let mut state = self.lock();
        loop {
            if state.is_closed {
                return None;
            }
            match state.queue.pop_front() {
                Some(piece) if piece.end > piece.position.load(Ordering::Relaxed) => return Some(piece),
                Some(_) => {}
                None => state = self.arrived.wait(state).unwrap_or_else(PoisonError::into_inner),
            }
        }
    }
}

#[cfg(test)]
mod tests;
