//! Decodes whole files of an archive in order, on several threads, in little memory: what `verify` and `unpack` share.

use std::sync::Arc;
use std::sync::mpsc::sync_channel;
use std::thread;

use crate::archive::Archive;
use crate::materialize::{EngineChoice, MaterializeError, MaterializeOptions, Materializer};
use crate::tensor::TensorInfo;

/// Bytes that one thread decodes at a time: many strips, few of them shared with the neighbours.
pub const WINDOW_BYTES: u64 = 4 << 20;
/// Least budget for decoded tensors that others are predicted from.
const CACHE_BYTES: u64 = 512 << 20;

/// A materializer for reading `archive` once, from start to end, on `threads` threads.
pub fn sequential_materializer(archive: &Archive, engine: EngineChoice, threads: usize) -> Materializer {
    // A tensor that the cache cannot keep would be decoded again for each of its windows. Two layers of a chain are
    // needed at a time; twice that leaves room for the windows in between.
    let largest = archive.files().iter().flat_map(|file| &file.tensors).map(|tensor| tensor.length_bytes).max();
    let cache_bytes = CACHE_BYTES.max(largest.unwrap_or(0).saturating_mul(4));
    Materializer::new(MaterializeOptions { cache_bytes, engine, threads, ..MaterializeOptions::default() })
}

/// Decodes file number `file` of `archive` on `threads` threads and hands its bytes to `consume`, in order and each once.
///
/// Memory stays within two windows per thread and the materializer's cache.
///
/// # Errors
/// The first error of decoding or of `consume`, in the order of the bytes.
pub fn decode_in_order<E: From<MaterializeError>>(
    materializer: &Materializer,
    archive: &Arc<Archive>,
    file: usize,
    threads: usize,
    mut consume: impl FnMut(&[u8]) -> Result<(), E>,
) -> Result<(), E> {
    let length = archive.files()[file].length_bytes;
    let windows = length.div_ceil(WINDOW_BYTES);
    let threads = (threads.max(1) as u64).min(windows);
    thread::scope(|scope| {
        let decoded: Vec<_> = (0..threads)
            .map(|first| {
                let (sender, receiver) = sync_channel(1);
                scope.spawn(move || {
                    for window in (first..windows).step_by(threads as usize) {
                        let offset = window * WINDOW_BYTES;
                        let mut bytes = vec![0; WINDOW_BYTES.min(length - offset) as usize];
                        let result = materializer.read_once(archive, file, offset, &mut bytes).map(|_| bytes);
                        let is_last = result.is_err();
                        if sender.send(result).is_err() || is_last {
                            break; // nobody takes more
                        }
                    }
                });
                receiver
            })
            .collect();
        for window in 0..windows {
            let receiver = &decoded[(window % threads) as usize];
            consume(&receiver.recv().expect("a thread sends until its last window")?)?;
        }
        Ok(())
    })
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
