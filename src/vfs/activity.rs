//! What has been asked of one archive: how often, how much, which part of it, and by what kind of reader.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use super::Keeper;
use crate::archive::ArchivedFile;

/// Bytes that one bit of the coverage stands for.
const PIECE_BYTES: u64 = 1 << 20;

/// Counters of one archive since it was opened.
#[derive(Debug)]
pub(super) struct Activity {
    opens: AtomicU64,
    read_bytes: AtomicU64,
    /// Number of the first piece of each file.
    first_pieces: Vec<u64>,
    pieces: u64,
    /// One bit for each piece, set when a byte of it was read.
    touched: Box<[AtomicU64]>,
    /// By file: whether somebody reads it who keeps nothing.
    is_shared: Box<[AtomicBool]>,
}

impl Activity {
    pub(super) fn new(files: &[ArchivedFile]) -> Self {
        let mut pieces = 0;
        let first_pieces = files
            .iter()
            .map(|file| {
                let first = pieces;
                pieces += file.length_bytes.div_ceil(PIECE_BYTES);
                first
            })
            .collect();
        let touched = (0..pieces.div_ceil(64)).map(|_| AtomicU64::new(0)).collect();
        let is_shared = files.iter().map(|_| AtomicBool::new(false)).collect();
        Self { opens: AtomicU64::new(0), read_bytes: AtomicU64::new(0), first_pieces, pieces, touched, is_shared }
    }

    /// Who keeps what a reader of file number `file` is given: whoever it says does, until there was one who keeps nothing.
    /// From then on the cache keeps it for all of them, so that what one has caused to be decoded the others find there.
    pub(super) fn keeper(&self, file: usize, of_reader: Keeper) -> Keeper {
        let is_shared = &self.is_shared[file];
        if of_reader == Keeper::Cache {
            is_shared.store(true, Ordering::Relaxed);
        }
        if is_shared.load(Ordering::Relaxed) { Keeper::Cache } else { Keeper::Reader }
    }

    pub(super) fn count_open(&self) {
        self.opens.fetch_add(1, Ordering::Relaxed);
    }

    /// Counts a read of `length_bytes` from `offset_bytes` on of file number `file`, which has them.
    pub(super) fn count_read(&self, file: usize, offset_bytes: u64, length_bytes: u64) {
        self.read_bytes.fetch_add(length_bytes, Ordering::Relaxed);
        let first = self.first_pieces[file];
        for piece in first + offset_bytes / PIECE_BYTES..first + (offset_bytes + length_bytes).div_ceil(PIECE_BYTES) {
            let (word, bit) = (&self.touched[(piece / 64) as usize], 1 << (piece % 64));
            if word.load(Ordering::Relaxed) & bit == 0 {
                word.fetch_or(bit, Ordering::Relaxed);
            }
        }
    }

    pub(super) fn opens(&self) -> u64 {
        self.opens.load(Ordering::Relaxed)
    }

    pub(super) fn read_bytes(&self) -> u64 {
        self.read_bytes.load(Ordering::Relaxed)
    }

    /// How much of the archive's files has been read, from 0 to 1, to the mebibyte.
    pub(super) fn read_share(&self) -> f64 {
        let touched: u64 = self.touched.iter().map(|word| u64::from(word.load(Ordering::Relaxed).count_ones())).sum();
        if self.pieces == 0 { 0.0 } else { touched as f64 / self.pieces as f64 }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(length_bytes: u64) -> ArchivedFile {
        ArchivedFile {
            name: String::new(),
            header: Vec::new(),
            tensors: Vec::new(),
            length_bytes,
            decoded_sha256: [0; 32],
            source_sha256: [0; 32],
        }
    }

    #[test]
    fn a_reader_that_keeps_nothing_has_the_cache_keep_its_file_for_all() {
        let activity = Activity::new(&[file(1), file(1)]);
        assert_eq!(activity.keeper(0, Keeper::Reader), Keeper::Reader);
        assert_eq!(activity.keeper(0, Keeper::Cache), Keeper::Cache);
        assert_eq!(activity.keeper(0, Keeper::Reader), Keeper::Cache);
        assert_eq!(activity.keeper(1, Keeper::Reader), Keeper::Reader);
    }

    #[test]
    fn the_share_counts_each_piece_once() {
        let activity = Activity::new(&[file(64 << 20), file((35 << 20) + 1)]); // 64 + 36 pieces
        activity.count_read(0, 5, 0);
        assert_eq!(activity.read_share(), 0.01); // an empty read touches where it stands: nobody asks for one
        for _ in 0..2 {
            activity.count_read(0, (2 << 20) - 1, 2);
            activity.count_read(1, 35 << 20, 1);
        }
        assert_eq!((activity.read_share(), activity.read_bytes()), (0.04, 6));
        activity.count_read(0, 0, 64 << 20);
        activity.count_read(1, 0, (35 << 20) + 1);
        assert_eq!(activity.read_share(), 1.0);
        assert_eq!(Activity::new(&[]).read_share(), 0.0);
    }
}
