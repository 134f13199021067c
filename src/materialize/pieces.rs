//! Pieces of files decoded ahead of readers that keep what they are given: each lies in one buffer, as its reader is
//! expected to ask for it, and is handed on without a copy.
//!
//! A piece is let go of when its last byte has been handed on. Its buffer is used again: fresh memory costs as much as a
//! copy. Readers wait for a piece that is being made; whoever makes one waits for no reader and for no other piece.

use std::collections::BTreeMap;
use std::fmt;
use std::ops::{Deref, Range};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use super::{bytes_of, zeroed};

/// The longest piece, and the size of every buffer: what the kernel asks for at once.
pub(super) const PIECE_BYTES: usize = 1 << 20;

/// More buffers than this are not kept for later.
const MOST_IDLE: usize = 32;

/// Where a piece begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Place {
    archive: u64,
    file: usize,
    offset: u64,
}

/// Pieces, never more than a number of buffers.
#[derive(Debug)]
pub(super) struct Pieces {
    most_buffers: usize,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    pieces: BTreeMap<Place, Piece>,
    idle: Vec<Arc<[u8]>>,
    /// Buffers there are: in pieces, idle, being filled, or on their way to a reader.
    buffers: usize,
    /// Counts pieces, so that they have an order of age.
    made: u64,
    hits: u64,
}

#[derive(Debug)]
struct Piece {
    length: usize,
    /// `None` while it is being made.
    bytes: Option<Arc<[u8]>>,
    number: u64,
}

/// Decoded bytes that lie side by side in memory, for as long as this lives.
pub struct Decoded {
    bytes: Arc<[u8]>,
    range: Range<usize>,
    /// Where to give the buffer back.
    piece: Option<(Arc<Pieces>, Place)>,
}

impl Decoded {
    /// A part of bytes that somebody else keeps.
    pub(super) fn part_of(bytes: Arc<[u8]>, range: Range<usize>) -> Self {
        Self { bytes, range, piece: None }
    }
}

impl Deref for Decoded {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.bytes[self.range.clone()]
    }
}

impl fmt::Debug for Decoded {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.debug_struct("Decoded").field("range", &self.range).finish_non_exhaustive()
    }
}

impl Drop for Decoded {
    fn drop(&mut self) {
        let Some((pieces, place)) = self.piece.take() else { return };
        let bytes = std::mem::replace(&mut self.bytes, Arc::new([]));
        let mut state = pieces.lock();
        let is_this = |piece: &Piece| piece.bytes.as_ref().is_some_and(|held| Arc::ptr_eq(held, &bytes));
        let was_last = |piece: &Piece| piece.length == self.range.end;
        if state.pieces.get(&place).is_some_and(|piece| is_this(piece) && was_last(piece)) {
            state.pieces.remove(&place);
        }
        state.give_back(bytes);
    }
}

impl State {
    /// The piece that has the byte at `place`, with where it begins.
    fn around(&self, place: Place) -> Option<(Place, &Piece)> {
        let (&start, piece) = self.pieces.range(..=place).next_back()?;
        let is_there = (start.archive, start.file) == (place.archive, place.file)
            && place.offset - start.offset < piece.length as u64;
        is_there.then_some((start, piece))
    }

    /// Where the first piece after `place` begins, in the same file.
    fn next_start(&self, place: Place) -> Option<u64> {
        let (start, _) = self.pieces.range(place..).next()?;
        ((start.archive, start.file) == (place.archive, place.file)).then_some(start.offset)
    }

    /// A buffer that nobody has: an idle one, a new one, or that of the oldest piece that nobody has come for.
    fn buffer(&mut self, most: usize) -> Option<Arc<[u8]>> {
        if let Some(buffer) = self.idle.pop() {
            return Some(buffer);
        }
        if self.buffers < most {
            self.buffers += 1;
            return Some(zeroed(PIECE_BYTES));
        }
        let unused = |piece: &Piece| piece.bytes.as_ref().is_some_and(|bytes| Arc::strong_count(bytes) == 1);
        let oldest = self.pieces.iter().filter(|(_, piece)| unused(piece)).min_by_key(|(_, piece)| piece.number);
        let place = *oldest?.0;
        self.pieces.remove(&place)?.bytes
    }

    /// Takes a buffer back from one who had it. The last who had it gives it to all.
    fn give_back(&mut self, mut buffer: Arc<[u8]>) {
        // Others get theirs under the lock that the caller holds, so that nobody is between two counts here.
        if Arc::get_mut(&mut buffer).is_none() {
            return;
        }
        if self.idle.len() < MOST_IDLE {
            self.idle.push(buffer);
        } else {
            self.buffers -= 1;
        }
    }
}

/// A piece being made. Dropped before it is finished it leaves nothing.
struct Making<'a> {
    pieces: &'a Pieces,
    place: Place,
    buffer: Option<Arc<[u8]>>,
    is_good: bool,
}

impl Drop for Making<'_> {
    fn drop(&mut self) {
        let buffer = self.buffer.take().expect("taken here only");
        let mut state = self.pieces.lock();
        if self.is_good {
            state.pieces.get_mut(&self.place).expect("nobody removes what is being made").bytes = Some(buffer);
        } else {
            state.pieces.remove(&self.place);
            state.give_back(buffer);
        }
        drop(state);
        self.pieces.changed.notify_all();
    }
}

impl Pieces {
    /// Room for pieces of together `bytes`, rounded down; none of them is allocated yet.
    pub(super) fn new(bytes: u64) -> Self {
        let most_buffers = usize::try_from(bytes / PIECE_BYTES as u64).unwrap_or(usize::MAX);
        Self { most_buffers, state: Mutex::default(), changed: Condvar::new() }
    }

    /// Makes the piece of `length` bytes at `offset` of a file with `fill`, unless some of it is there or being made or
    /// there is no room. Returns whether it was made.
    ///
    /// # Errors
    /// Those of `fill`; nothing is kept then.
    ///
    /// # Panics
    /// Where `length` exceeds [`PIECE_BYTES`].
    pub(super) fn make<E>(
        &self,
        (archive, file, offset): (u64, usize, u64),
        length: usize,
        fill: impl FnOnce(&mut [u8]) -> Result<(), E>,
    ) -> Result<bool, E> {
        assert!(length <= PIECE_BYTES, "a piece of {length} bytes");
        let place = Place { archive, file, offset };
        let mut state = self.lock();
        let is_taken = state.around(place).is_some()
            || state.next_start(place).is_some_and(|start| start - offset < length as u64);
        if is_taken || self.most_buffers == 0 {
            return Ok(false);
        }
        let Some(buffer) = state.buffer(self.most_buffers) else { return Ok(false) };
        state.made += 1;
        let number = state.made;
        state.pieces.insert(place, Piece { length, bytes: None, number });
        drop(state);
        let mut making = Making { pieces: self, place, buffer: Some(buffer), is_good: false };
        fill(&mut bytes_of(making.buffer.as_mut().expect("it was just put there"))[..length])?;
        making.is_good = true;
        Ok(true)
    }

    /// The bytes from `offset` on of a file that one piece has, `least` of them or more and `most` or fewer; waits where that
    /// piece is being made. `None` where there is none.
    pub(super) fn find(
        self: &Arc<Self>,
        (archive, file, offset): (u64, usize, u64),
        least: usize,
        most: usize,
    ) -> Option<Decoded> {
        self.find_or_wait((archive, file, offset), least, most, true)
    }

    /// [`find`](Self::find) without waiting.
    pub(super) fn find_made(self: &Arc<Self>, place: (u64, usize, u64), length: usize) -> Option<Decoded> {
        self.find_or_wait(place, length, length, false)
    }

    fn find_or_wait(
        self: &Arc<Self>,
        (archive, file, offset): (u64, usize, u64),
        least: usize,
        most: usize,
        is_patient: bool,
    ) -> Option<Decoded> {
        if self.most_buffers == 0 {
            return None;
        }
        let place = Place { archive, file, offset };
        let mut state = self.lock();
        loop {
            let (start, piece) = state.around(place)?;
            let from = usize::try_from(offset - start.offset).expect("inside a piece");
            let range = from..piece.length.min(from.saturating_add(most));
            if range.len() < least {
                return None;
            }
            if let Some(bytes) = &piece.bytes {
                let bytes = Arc::clone(bytes);
                state.hits += 1;
                return Some(Decoded { bytes, range, piece: Some((Arc::clone(self), start)) });
            }
            if !is_patient {
                return None;
            }
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Where the first piece at `offset` of a file or behind it begins.
    pub(super) fn next_start(&self, (archive, file, offset): (u64, usize, u64)) -> Option<u64> {
        if self.most_buffers == 0 { None } else { self.lock().next_start(Place { archive, file, offset }) }
    }

    /// What all buffers may take.
    pub(super) fn most_bytes(&self) -> u64 {
        self.most_buffers as u64 * PIECE_BYTES as u64
    }

    /// Bytes of all buffers, the number of pieces, and how often one was found.
    pub(super) fn stats(&self) -> (u64, u64, u64) {
        let state = self.lock();
        ((state.buffers * PIECE_BYTES) as u64, state.pieces.len() as u64, state.hits)
    }

    /// Nothing is decoded under this lock, so poison tells nothing.
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;
    use std::thread;

    use super::*;

    const FILE: usize = 3;

    fn make(pieces: &Pieces, offset: u64, length: usize, value: u8) -> bool {
        let fill = |bytes: &mut [u8]| {
            bytes.fill(value);
            Ok::<_, ()>(())
        };
        pieces.make((1, FILE, offset), length, fill).unwrap()
    }

    fn find(pieces: &Arc<Pieces>, offset: u64, length: usize) -> Option<Vec<u8>> {
        pieces.find((1, FILE, offset), 1, length).map(|found| found.to_vec())
    }

    #[test]
    fn a_piece_is_found_by_any_of_its_bytes_and_gone_with_its_last() {
        let pieces = Arc::new(Pieces::new(4 << 20));
        assert!(make(&pieces, 100, 50, 7));
        assert_eq!((find(&pieces, 99, 10), find(&pieces, 150, 10)), (None, None));
        assert!(pieces.find((2, FILE, 100), 1, 10).is_none() && pieces.find((1, 0, 100), 1, 10).is_none());
        assert_eq!(find(&pieces, 100, 10), Some(vec![7; 10]));
        assert_eq!(find(&pieces, 145, 4), Some(vec![7; 4]));
        assert!(pieces.find((1, FILE, 145), 6, 10).is_none(), "too little of it, which does not count as taken");
        assert_eq!(find(&pieces, 140, 100), Some(vec![7; 10]), "as far as it goes");
        assert_eq!(find(&pieces, 100, 10), None);
        assert_eq!(pieces.lock().idle.len(), 1);
    }

    #[test]
    fn pieces_do_not_overlap() {
        let pieces = Arc::new(Pieces::new(4 << 20));
        assert!(make(&pieces, 100, 50, 1));
        assert!(!make(&pieces, 149, 10, 2) && !make(&pieces, 90, 11, 2) && !make(&pieces, 100, 50, 2));
        assert!(make(&pieces, 150, 10, 2) && make(&pieces, 90, 10, 2));
        assert_eq!(pieces.next_start((1, FILE, 101)), Some(150));
        assert_eq!((pieces.next_start((1, FILE, 151)), pieces.next_start((0, FILE, 0))), (None, None));
    }

    #[test]
    fn the_oldest_that_nobody_holds_makes_room() {
        let pieces = Arc::new(Pieces::new(2 << 20));
        assert!(make(&pieces, 0, 10, 1) && make(&pieces, 10, 10, 2));
        let held = pieces.find((1, FILE, 0), 1, 5).unwrap();
        assert!(make(&pieces, 20, 10, 3));
        assert_eq!((find(&pieces, 10, 5), &held[..]), (None, &[1; 5][..]));
        let also_held = pieces.find((1, FILE, 20), 1, 5).unwrap();
        assert!(!make(&pieces, 30, 10, 4), "both buffers are with readers");
        drop((held, also_held));
        assert!(make(&pieces, 30, 10, 4));
        assert_eq!(pieces.stats().0, 2 << 20);
        assert!(!make(&Pieces::new((1 << 20) - 1), 0, 1, 0), "no room at all");
    }

    #[test]
    fn the_last_of_several_readers_gives_the_buffer_back() {
        let pieces = Arc::new(Pieces::new(1 << 20));
        assert!(make(&pieces, 0, 10, 1));
        let [first, second] = [0, 5].map(|offset| pieces.find((1, FILE, offset), 1, 5).unwrap());
        drop(second);
        assert!(!make(&pieces, 50, 10, 2));
        assert_eq!(first[..], [1; 5]);
        drop(first);
        assert!(make(&pieces, 50, 10, 2));
    }

    #[test]
    fn readers_wait_for_what_is_being_made_and_go_on_where_it_fails() {
        let pieces = Arc::new(Pieces::new(4 << 20));
        for is_good in [true, false] {
            let (started, has_started) = mpsc::channel();
            let (release, released) = mpsc::channel::<()>();
            thread::scope(|scope| {
                let maker = scope.spawn(|| {
                    let (started, released) = (started, released);
                    pieces.make((1, FILE, 0), 10, |bytes| {
                        started.send(()).unwrap();
                        released.recv().unwrap();
                        bytes.fill(9);
                        if is_good { Ok(()) } else { Err("damaged") }
                    })
                });
                has_started.recv().unwrap();
                let reader = scope.spawn(|| find(&pieces, 0, 10));
                release.send(()).unwrap();
                assert_eq!(reader.join().unwrap(), is_good.then(|| vec![9; 10]));
                assert_eq!(maker.join().unwrap(), if is_good { Ok(true) } else { Err("damaged") });
            });
        }
        assert_eq!(pieces.lock().idle.len(), 1);
    }
}
