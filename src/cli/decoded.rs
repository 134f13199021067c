//! Decodes whole files of an archive on several threads, in little memory: what `verify` and `unpack` share.

use std::panic::resume_unwind;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::channel;
use std::sync::{Arc, OnceLock};
use std::thread;

use blake3::hazmat::{ChainingValue, HasherExt, Mode, merge_subtrees_non_root, merge_subtrees_root};

use crate::archive::Archive;
use crate::decode::Engine;
use crate::materialize::{MaterializeError, MaterializeOptions, Materializer};
use crate::tensor::TensorInfo;

/// Bytes that one thread decodes at a time: many strips, few of them shared with the neighbours. A power of two, so that
/// a window is a subtree of BLAKE3.
pub const WINDOW_BYTES: u64 = 4 << 20;
/// Least budget for decoded tensors that others are predicted from.
const CACHE_BYTES: u64 = 512 << 20;

/// What reads archives once, from start to end: one engine for all of them.
pub struct SequentialDecoder {
    /// Which.
    pub engine: Arc<dyn Engine>,
    /// On so many threads.
    pub threads: usize,
}

impl SequentialDecoder {
    /// A materializer for `archive`.
    pub fn materializer(&self, archive: &Archive) -> Materializer {
        // A tensor that the cache cannot keep would be decoded again for each of its windows. Two layers of a chain are
        // needed at a time; twice that leaves room for the windows in between.
        let largest = archive.files().iter().flat_map(|file| &file.tensors).map(|tensor| tensor.length_bytes).max();
        let cache_bytes = CACHE_BYTES.max(largest.unwrap_or(0).saturating_mul(4));
        let options = MaterializeOptions { cache_bytes, threads: self.threads, ..MaterializeOptions::default() };
        Materializer::with_engine(options, Arc::clone(&self.engine))
    }
}

/// Decodes file number `file` of `archive` on `threads` threads. `place` is given every window with its offset, by the thread
/// that decoded it, in any order and several at once.
///
/// Memory stays within a window per thread and the materializer's cache.
///
/// # Errors
/// One of decoding or `place`.
pub fn decode_in_any_order<E: From<MaterializeError> + Send>(
    materializer: &Materializer,
    archive: &Arc<Archive>,
    file: usize,
    threads: usize,
    place: impl Fn(u64, &[u8]) -> Result<(), E> + Sync,
) -> Result<(), E> {
    let length = archive.files()[file].length_bytes;
    let windows = length.div_ceil(WINDOW_BYTES);
    let next = AtomicU64::new(0);
    let work = || {
        let mut bytes = Vec::new();
        loop {
            let window = next.fetch_add(1, Ordering::Relaxed);
            if window >= windows {
                return Ok(());
            }
            let offset = window * WINDOW_BYTES;
            bytes.resize(WINDOW_BYTES.min(length - offset) as usize, 0);
            let read = materializer.read_once(archive, file, offset, &mut bytes);
            if let Err(error) = read.map_err(E::from).and_then(|_| place(offset, &bytes)) {
                next.store(windows, Ordering::Relaxed); // nobody starts another
                return Err(error);
            }
        }
    };
    thread::scope(|scope| {
        let running: Vec<_> = (0..windows.min(threads.max(1) as u64)).map(|_| scope.spawn(work)).collect();
        running.into_iter().try_for_each(|thread| thread.join().unwrap_or_else(|panic| resume_unwind(panic)))
    })
}

/// Decodes file number `file` of `archive` on `threads` threads. `place` is given every window with its offset, by the thread
/// that decoded it, in any order and several at once; after that `consume` is given it, in order and one at a time.
///
/// Memory stays within a window per thread and the materializer's cache.
///
/// # Errors
/// The first error of decoding, `place` or `consume`, in the order of the bytes.
pub fn decode_in_order<E: From<MaterializeError> + Send>(
    materializer: &Materializer,
    archive: &Arc<Archive>,
    file: usize,
    threads: usize,
    place: impl Fn(u64, &[u8]) -> Result<(), E> + Sync,
    consume: impl FnMut(&[u8]) -> Result<(), E> + Send,
) -> Result<(), E> {
    let length = archive.files()[file].length_bytes;
    let windows = length.div_ceil(WINDOW_BYTES);
    let threads = (threads.max(1) as u64).min(windows) as usize;
    let place = &place;
    // Each thread decodes every `threads`th window. Whose turn it is has `consume`, and passes it on. One that fails does
    // not, so that nobody after it has a turn.
    let (senders, receivers): (Vec<_>, Vec<_>) = (0..threads).map(|_| channel()).unzip();
    if let Some(first) = senders.first() {
        first.send(consume).expect("its receiver is at hand");
    }
    // Plain threads, not rayon's: one that waits here for a tensor that another decodes must not be a thread that the
    // decoding itself is spread over.
    thread::scope(|scope| {
        let running: Vec<_> = receivers
            .into_iter()
            .enumerate()
            .map(|(thread, my_turn)| {
                let next = senders[(thread + 1) % threads].clone();
                scope.spawn(move || {
                    let mut bytes = Vec::new();
                    for window in (thread as u64..windows).step_by(threads) {
                        let offset = window * WINDOW_BYTES;
                        bytes.resize(WINDOW_BYTES.min(length - offset) as usize, 0);
                        let read = materializer.read_once(archive, file, offset, &mut bytes);
                        let placed = read.map_err(E::from).and_then(|_| place(offset, &bytes));
                        let Ok(mut consume) = my_turn.recv() else { break };
                        placed.and_then(|()| consume(&bytes))?;
                        // Nobody is there to receive it after the last window.
                        let _ = next.send(consume);
                    }
                    Ok(())
                })
            })
            .collect();
        drop(senders);
        running.into_iter().try_for_each(|thread| thread.join().unwrap_or_else(|panic| resume_unwind(panic)))
    })
}

/// What a window adds to the digest, once it is there.
type Window = OnceLock<ChainingValue>;

/// BLAKE3 of a file from its windows, which may come in any order and several at once.
#[derive(Debug)]
pub struct WindowDigests {
    length: u64,
    /// Chaining values; of a file of one window, its hash.
    windows: Vec<Window>,
}

impl WindowDigests {
    /// For a file of `length` bytes.
    pub fn new(length: u64) -> Self {
        Self { length, windows: vec![Window::new(); length.div_ceil(WINDOW_BYTES) as usize] }
    }

    /// Hashes the window that starts at `offset`; it is not looked at twice.
    pub fn add(&self, offset: u64, window: &[u8]) {
        self.windows[(offset / WINDOW_BYTES) as usize].get_or_init(|| match self.length {
            ..=WINDOW_BYTES => *blake3::hash(window).as_bytes(),
            _ => blake3::Hasher::new().set_input_offset(offset).update(window).finalize_non_root(),
        });
    }

    /// The digest of the file, all of whose windows were added.
    pub fn digest(&self) -> [u8; 32] {
        match halves(&self.windows) {
            None => self.windows.first().map_or(*blake3::hash(&[]).as_bytes(), added),
            Some((left, right)) => *merge_subtrees_root(&merged(left), &merged(right), Mode::Hash).as_bytes(),
        }
    }
}

fn added(window: &Window) -> ChainingValue {
    *window.get().expect("every window was added")
}

fn merged(windows: &[Window]) -> ChainingValue {
    match halves(windows) {
        None => added(&windows[0]),
        Some((left, right)) => merge_subtrees_non_root(&merged(left), &merged(right), Mode::Hash),
    }
}

/// Where BLAKE3 divides a tree of two windows or more: on the left is the largest power of two that leaves some.
fn halves(windows: &[Window]) -> Option<(&[Window], &[Window])> {
    (windows.len() > 1).then(|| windows.split_at(windows.len().next_power_of_two() / 2))
}

/// Follows the bytes of a safetensors file as they go by and says which belong to the header and which to which tensor.
#[derive(Debug)]
pub struct TensorCursor<'a> {
    header_bytes: u64,
    tensors: &'a [TensorInfo],
    position: u64,
    tensor: usize,
}

/// Some consecutive bytes of one tensor, or of the header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Piece {
    /// Which tensor, in the order of the data; `None` for the header.
    pub tensor: Option<usize>,
    /// Length in bytes.
    pub length: usize,
}

impl<'a> TensorCursor<'a> {
    /// Starts before a file's first byte. `tensors` are in the order of their data, which they tile.
    pub fn new(header_bytes: u64, tensors: &'a [TensorInfo]) -> Self {
        Self { header_bytes, tensors, position: 0, tensor: 0 }
    }

    /// What the next bytes belong to, at most `available` of them; `None` where `available` is 0 or the file ends.
    pub fn next(&mut self, available: usize) -> Option<Piece> {
        let (tensor, end) = if self.position < self.header_bytes {
            (None, self.header_bytes)
        } else {
            while self.tensors.get(self.tensor).is_some_and(|tensor| self.end_of(tensor) <= self.position) {
                self.tensor += 1;
            }
            (Some(self.tensor), self.end_of(self.tensors.get(self.tensor)?))
        };
        let length = (end - self.position).min(available as u64);
        self.position += length;
        (length > 0).then_some(Piece { tensor, length: length as usize })
    }

    fn end_of(&self, tensor: &TensorInfo) -> u64 {
        self.header_bytes + tensor.offset_bytes + tensor.length_bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tensor::Dtype;

    #[test]
    fn windows_in_any_order_give_the_digest_of_the_file() {
        let window = WINDOW_BYTES as usize;
        let bytes: Vec<u8> = (0..6 * window + 5).map(|at| ((at * at) >> 7) as u8).collect();
        for length in [0, 1, window - 1, window, window + 1, 3 * window, 4 * window, 5 * window + 1024, bytes.len()] {
            let file = &bytes[..length];
            let digests = WindowDigests::new(length as u64);
            for (number, bytes) in file.chunks(window).enumerate().rev() {
                digests.add(number as u64 * WINDOW_BYTES, bytes);
            }
            assert_eq!(digests.digest(), *blake3::hash(file).as_bytes(), "{length} bytes");
        }
    }

    #[test]
    fn a_cursor_gives_each_byte_to_its_tensor_and_skips_empty_ones() {
        let tensor = |name: &str, offset_bytes, length_bytes| TensorInfo {
            name: name.into(),
            dtype: Dtype::U8,
            shape: vec![length_bytes],
            offset_bytes,
            length_bytes,
        };
        let tensors = [tensor("empty", 0, 0), tensor("a", 0, 5), tensor("also empty", 5, 0), tensor("b", 5, 3)];
        let mut cursor = TensorCursor::new(10, &tensors);
        let mut pieces = Vec::new();
        for mut available in [4, 8, 20] {
            while let Some(piece) = cursor.next(available) {
                available -= piece.length;
                pieces.push((piece.tensor, piece.length));
            }
        }
        assert_eq!(pieces, [(None, 4), (None, 6), (Some(1), 2), (Some(1), 3), (Some(3), 3)]);
    }
}
