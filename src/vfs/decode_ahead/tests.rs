//! Readers in the order in which their reads arrive, and what is decoded ahead of them.

use super::*;
use crate::archive::ArchivedFile;
use crate::vfs::{BoxError, Keeper};

const HEADER_BYTES: u64 = 1000;
const MIB: u64 = 1 << 20;
const INODE: Inode = Inode(7);

/// Two files of 64 MiB, which note what is asked for ahead.
#[derive(Debug)]
struct Shards {
    files: Vec<ArchivedFile>,
    ahead: Mutex<Vec<(usize, u64, u64)>>,
}

impl Checkpoint for Shards {
    fn content_id(&self) -> [u8; 32] {
        [0; 32]
    }

    fn stored_bytes(&self) -> u64 {
        0
    }

    fn parameters(&self) -> u64 {
        0
    }

    fn is_lossy(&self) -> bool {
        false
    }

    fn files(&self) -> &[ArchivedFile] {
        &self.files
    }

    fn read(&self, _: usize, _: u64, _: Keeper, _: &mut [u8]) -> Result<usize, BoxError> {
        unreachable!("nothing is read here")
    }

    fn decode_ahead(&self, file: usize, offset_bytes: u64, length_bytes: u64, _: Keeper) {
        self.ahead.lock().unwrap().push((file, offset_bytes, length_bytes));
    }
}

/// A follower without threads: what it queues stays to be looked at.
struct Readers {
    follower: Follower,
    shards: Arc<Shards>,
    checkpoint: Arc<dyn Checkpoint>,
}

impl Readers {
    fn new(mode: DecodeAhead) -> Self {
        let file = |name: &str| ArchivedFile {
            name: name.to_owned(),
            header: vec![0; HEADER_BYTES as usize],
            tensors: vec![],
            length_bytes: 64 * MIB,
            decoded_sha256: [0; 32],
            source_sha256: [0; 32],
        };
        let shards = Arc::new(Shards { files: vec![file("1"), file("2")], ahead: Mutex::default() });
        let follower =
            Follower { mode, window_bytes: 8 * MIB, most_bytes: 32 * MIB, shared: Arc::new(Shared::default()) };
        Self { follower, checkpoint: Arc::clone(&shards) as Arc<dyn Checkpoint>, shards }
    }

    fn read(&self, inode: Inode, offset: u64, length: u64) {
        self.follower.follow(inode, &self.checkpoint, 0, offset, length, Keeper::Reader);
    }

    /// What is queued, as ranges of files that lie side by side.
    fn queued(&self) -> Vec<(usize, u64, u64)> {
        let mut ranges: Vec<(usize, u64, u64)> = Vec::new();
        for piece in self.follower.shared.lock().queue.drain(..) {
            let end = piece.offset_bytes + piece.length_bytes;
            match ranges.last_mut() {
                Some(last) if last.0 == piece.file && last.2 == piece.offset_bytes => last.2 = end,
                _ => ranges.push((piece.file, piece.offset_bytes, end)),
            }
        }
        ranges
    }
}

#[test]
fn a_header_is_read_without_decoding_ahead() {
    let readers = Readers::new(DecodeAhead::Model);
    readers.read(INODE, 0, 128 << 10);
    assert_eq!(readers.queued(), []);
}

#[test]
fn the_first_read_past_the_header_starts_a_window_that_moves_with_the_reader() {
    let readers = Readers::new(DecodeAhead::Model);
    readers.read(INODE, 2 * MIB, MIB);
    assert_eq!(readers.queued(), [(0, 3 * MIB, 11 * MIB)]);
    readers.read(INODE, 3 * MIB, MIB);
    assert_eq!(readers.queued(), [(0, 11 * MIB, 12 * MIB)]);
    readers.read(INODE, 4 * MIB, 4096);
    assert_eq!(readers.queued(), [], "too little to be worth a piece");
}

#[test]
fn a_file_that_is_read_from_its_start_is_decoded_ahead_from_the_second_read_on() {
    let readers = Readers::new(DecodeAhead::File);
    readers.read(INODE, 0, MIB);
    readers.read(INODE, MIB, MIB);
    assert_eq!(readers.queued(), [(0, 2 * MIB, 10 * MIB)]);
}

#[test]
fn a_file_that_is_read_again_is_decoded_ahead_again() {
    let readers = Readers::new(DecodeAhead::File);
    for _ in 0..2 {
        let mut queued = Vec::new();
        for read in 0..64 {
            readers.read(INODE, read * MIB, MIB);
            queued.extend(readers.queued());
        }
        let ahead: u64 = queued.iter().map(|(_, from, to)| to - from).sum();
        assert_eq!(ahead, 62 * MIB, "all but what the first two reads asked for");
    }
}

#[test]
fn threads_that_take_turns_are_one_stream() {
    let readers = Readers::new(DecodeAhead::File);
    let mut queued = Vec::new();
    for round in 0..2 {
        for thread in [3, 0, 7, 1, 2, 5, 6, 4] {
            readers.read(INODE, (8 * round + thread) * 2 * MIB, 2 * MIB);
            queued.extend(readers.queued());
        }
    }
    assert_eq!(readers.follower.shared.lock().streams.len(), 2, "one began before the other's first read");
    assert!(queued.iter().all(|range| range.1 >= 8 * MIB), "nothing behind the readers: {queued:?}");
    assert_eq!(queued.last().map(|range| range.2), Some(40 * MIB));
}

#[test]
fn pieces_end_where_the_requests_that_follow_do() {
    let readers = Readers::new(DecodeAhead::File);
    let ends = || -> Vec<u64> {
        let pieces = readers.follower.shared.lock().queue.drain(..).collect::<Vec<_>>();
        pieces.iter().map(|piece| piece.end).collect()
    };
    // As the kernel begins to read ahead: each request is longer than the one before, up to a mebibyte.
    readers.read(INODE, 0, MIB / 4);
    readers.read(INODE, MIB / 4, MIB / 2);
    ends();
    let mut from = 3 * MIB / 4;
    for _ in 0..20 {
        readers.read(INODE, from, MIB);
        from += MIB;
        assert!(ends().iter().all(|end| end % MIB == 3 * MIB / 4));
    }
}

#[test]
fn random_reads_are_not_followed() {
    let readers = Readers::new(DecodeAhead::Model);
    readers.read(INODE, 40 * MIB, 4096);
    readers.queued(); // the first may have been a start
    for offset in [3, 55, 21, 13, 60, 35, 8, 48] {
        readers.read(INODE, offset * MIB, 4096);
    }
    assert_eq!(readers.queued(), []);
}

#[test]
fn a_window_ends_with_the_file_or_goes_on_into_the_next() {
    for (mode, expected) in [
        (DecodeAhead::File, vec![(0, 61 * MIB, 64 * MIB)]),
        (DecodeAhead::Model, vec![(0, 61 * MIB, 64 * MIB), (1, 0, 5 * MIB)]),
    ] {
        let readers = Readers::new(mode);
        readers.read(INODE, 60 * MIB, MIB);
        assert_eq!(readers.queued(), expected);
    }
}

#[test]
fn a_window_ends_with_the_last_file() {
    let readers = Readers::new(DecodeAhead::Model);
    readers.follower.follow(INODE, &readers.checkpoint, 1, 60 * MIB, MIB, Keeper::Reader);
    assert_eq!(readers.queued(), [(1, 61 * MIB, 64 * MIB)]);
}

#[test]
fn all_windows_together_stay_within_what_they_may_take() {
    let readers = Readers::new(DecodeAhead::File);
    for inode in 0..20 {
        readers.read(Inode(inode), MIB, MIB);
        let ahead: u64 = readers.follower.shared.lock().streams.iter().map(Stream::ahead_bytes).sum();
        assert!(ahead <= 32 * MIB, "{ahead}");
    }
}

#[test]
fn what_a_reader_has_passed_is_skipped() {
    let readers = Readers::new(DecodeAhead::File);
    readers.read(INODE, MIB, MIB);
    readers.read(INODE, 2 * MIB, 4 * MIB);
    let piece = readers.follower.shared.next_piece().unwrap();
    assert_eq!(piece.offset_bytes, 6 * MIB);
}

#[test]
fn threads_decode_what_is_queued_and_end_with_the_follower() {
    let Readers { shards, checkpoint, .. } = Readers::new(DecodeAhead::File);
    let follower = Follower::start(DecodeAhead::File, 2, 1 << 30).unwrap().unwrap();
    follower.follow(INODE, &checkpoint, 0, MIB, MIB, Keeper::Reader);
    let until = |is_so: &dyn Fn() -> bool| {
        while !is_so() {
            thread::yield_now();
        }
    };
    until(&|| shards.ahead.lock().unwrap().len() == 8);
    drop((follower, checkpoint));
    until(&|| Arc::strong_count(&shards) == 1);
}

#[test]
fn nothing_is_started_where_it_is_off_or_the_cache_is_too_small() {
    assert!(Follower::start(DecodeAhead::Off, 2, 1 << 30).unwrap().is_none());
    assert!(Follower::start(DecodeAhead::Model, 2, 1 << 20).unwrap().is_none());
}
