//! Parts whose strips are decoded apart from one another: those without prediction.

use std::ops::Range;
use std::sync::{Arc, PoisonError};

use super::{Keeper, MaterializeError, Materializer, Purpose, UnitKey, bytes_of, zeroed};
use crate::archive::{Archive, PartAddress};
use crate::decode::PreparedPart;
use crate::metrics::METRICS;

/// What the kernel asks for at once, and so what is decoded at once.
pub(super) const TOGETHER_BYTES: usize = 1 << 20;

/// More strips than this are not followed at a time.
const MOST_PARTLY_TAKEN: usize = 4096;

/// The strips of a part, and what they are called in the cache.
#[derive(Clone, Copy)]
struct Strips<'a> {
    archive: &'a Archive,
    address: PartAddress,
    part: &'a PreparedPart,
}

/// What a reader wants of one strip.
struct Piece<'a> {
    strip: usize,
    /// First byte wanted, counted in the strip.
    from: usize,
    out: &'a mut [u8],
}

impl Strips<'_> {
    fn key(&self, strip: usize) -> UnitKey {
        let PartAddress { record, part } = self.address;
        UnitKey { archive: self.archive.instance(), record, part, strip: Some(strip as u32) }
    }

    /// Memory for decoding these strips, which lie side by side.
    fn stored_bytes(&self, strips: Range<usize>) -> u64 {
        self.part.strip_range(strips.end - 1).end - self.part.strip_range(strips.start).start
    }

    /// Cuts `out`, the bytes from `offset` on, into what each strip has of it.
    fn pieces<'a>(&self, offset: u64, out: &'a mut [u8]) -> Vec<Piece<'a>> {
        let strip_bytes = self.part.full_strip_output_bytes();
        let (mut offset, mut out, mut pieces) = (offset, out, Vec::new());
        while !out.is_empty() {
            let (strip, from) = ((offset / strip_bytes) as usize, (offset % strip_bytes) as usize);
            let length = (self.part.strip_output_bytes(strip) - from).min(out.len());
            let (piece, rest) = out.split_at_mut(length);
            pieces.push(Piece { strip, from, out: piece });
            offset += length as u64;
            out = rest;
        }
        pieces
    }

    fn is_whole(&self, piece: &Piece<'_>) -> bool {
        piece.out.len() == self.part.strip_output_bytes(piece.strip)
    }
}

impl Materializer {
    /// Fills `out` with the bytes of a part from `offset` on.
    pub(super) fn read_strips(
        &self,
        purpose: Purpose,
        archive: &Archive,
        address: PartAddress,
        part: &PreparedPart,
        offset: u64,
        out: &mut [u8],
    ) -> Result<(), MaterializeError> {
        let strips = Strips { archive, address, part };
        let keeper = purpose.keeper();
        let mut pieces = strips.pieces(offset, out);
        for pieces in pieces.chunks_mut(self.strips_together(part)) {
            let keys: Vec<UnitKey> = pieces.iter().map(|piece| strips.key(piece.strip)).collect();
            let is_known = self.cache.knows(&keys);
            let in_place = |(piece, is_known): (&Piece<'_>, &bool)| {
                keeper == Keeper::Reader && !is_known && strips.is_whole(piece)
            };
            let in_place: Vec<bool> = pieces.iter().zip(&is_known).map(in_place).collect();
            let _memory = match purpose {
                Purpose::Reading(_) => Some(self.take_memory(self.memory_for_strips(strips, pieces, &in_place)?)),
                Purpose::Decoding => None,
            };
            let mut pieces: Vec<(&mut Piece<'_>, bool)> = pieces.iter_mut().zip(in_place).collect();
            for alike in pieces.chunk_by_mut(|a, b| a.1 == b.1) {
                let in_place = alike[0].1;
                let pieces = alike.iter_mut().map(|(piece, _)| &mut **piece);
                if in_place {
                    let first = alike[0].0.strip;
                    let outs = alike.iter_mut().map(|(piece, _)| &mut *piece.out).collect();
                    self.decode(archive, address, part, first, None, outs)?;
                } else {
                    self.copy_from_cache(keeper, strips, pieces.collect())?;
                }
            }
        }
        Ok(())
    }

    /// Memory for decoding pieces of strips that lie side by side, those `in_place` where their reader wants them.
    fn memory_for_strips(
        &self,
        strips: Strips<'_>,
        pieces: &[Piece<'_>],
        in_place: &[bool],
    ) -> Result<u64, MaterializeError> {
        let Strips { archive, part, .. } = strips;
        let numbers = pieces[0].strip..pieces[pieces.len() - 1].strip + 1;
        let kept = pieces.iter().zip(in_place).filter(|(_, in_place)| !**in_place);
        let kept_bytes: usize = kept.map(|(piece, _)| part.strip_output_bytes(piece.strip)).sum();
        let of_base = self.memory_for_base(archive, part, numbers.clone())?;
        Ok(kept_bytes as u64 + strips.stored_bytes(numbers) + of_base)
    }

    /// Fills pieces of strips that lie side by side through the cache.
    fn copy_from_cache(
        &self,
        keeper: Keeper,
        strips: Strips<'_>,
        mut pieces: Vec<&mut Piece<'_>>,
    ) -> Result<(), MaterializeError> {
        let numbers: Vec<usize> = pieces.iter().map(|piece| piece.strip).collect();
        let decoded = self.strips_through_cache(strips, &numbers)?;
        for (piece, decoded) in pieces.iter_mut().zip(&decoded) {
            piece.out.copy_from_slice(&decoded[piece.from..][..piece.out.len()]);
        }
        if keeper == Keeper::Reader {
            self.let_go_of_what_was_taken(strips, &pieces);
        }
        Ok(())
    }

    /// Strips of which readers that keep their bytes have taken as much as there is will not be asked for again.
    fn let_go_of_what_was_taken(&self, strips: Strips<'_>, pieces: &[&mut Piece<'_>]) {
        let mut all_taken = self.taken_bytes.lock().unwrap_or_else(PoisonError::into_inner);
        if all_taken.len() > MOST_PARTLY_TAKEN {
            all_taken.clear(); // the cache evicts them in time
        }
        let mut done_with = Vec::new();
        for piece in pieces {
            let key = strips.key(piece.strip);
            let taken = all_taken.remove(&key).unwrap_or(0) + piece.out.len();
            if taken < strips.part.strip_output_bytes(piece.strip) {
                all_taken.insert(key, taken);
            } else {
                done_with.push(key);
            }
        }
        drop(all_taken);
        if !done_with.is_empty() {
            self.cache.forget(&done_with);
        }
    }

    /// Decoded strips, through the cache. The caller holds the memory for them.
    fn strips_through_cache(&self, strips: Strips<'_>, numbers: &[usize]) -> Result<Vec<Arc<[u8]>>, MaterializeError> {
        let keys: Vec<UnitKey> = numbers.iter().map(|&strip| strips.key(strip)).collect();
        self.cache.get_or_make_all(&keys, |missing| {
            let missing: Vec<usize> = missing.iter().map(|&place| numbers[place]).collect();
            let runs = missing.chunk_by(|a, b| a + 1 == *b);
            runs.flat_map(|run| self.decode_strips(strips, run)).collect()
        })
    }

    /// Decodes strips that lie side by side. Where they do not all decode, each is tried alone, so that one damaged strip
    /// takes no other away.
    fn decode_strips(&self, strips: Strips<'_>, run: &[usize]) -> Vec<Result<Arc<[u8]>, MaterializeError>> {
        let Strips { archive, address, part } = strips;
        let mut decoded: Vec<Arc<[u8]>> = run.iter().map(|&strip| zeroed(part.strip_output_bytes(strip))).collect();
        let outs = decoded.iter_mut().map(bytes_of).collect();
        let result = self.decode(archive, address, part, run[0], None, outs);
        match result {
            Ok(()) => decoded.into_iter().map(Ok).collect(),
            Err(error) if run.len() == 1 => vec![Err(error)],
            Err(_) => run.chunks(1).flat_map(|strip| self.decode_strips(strips, strip)).collect(),
        }
    }

    /// Decodes into the cache what it does not have of the `length` bytes of a part from `offset` on.
    pub(super) fn decode_strips_ahead(
        &self,
        archive: &Archive,
        address: PartAddress,
        part: &PreparedPart,
        offset: u64,
        length: u64,
    ) -> Result<(), MaterializeError> {
        let strips = Strips { archive, address, part };
        if self.cache.stats().budget_bytes < 4 * TOGETHER_BYTES as u64 {
            return Ok(()); // it would be gone before its reader comes
        }
        let strip_bytes = part.full_strip_output_bytes();
        let numbers = (offset / strip_bytes) as usize..(offset + length).div_ceil(strip_bytes) as usize;
        let numbers: Vec<usize> = numbers.collect();
        for numbers in numbers.chunks(self.strips_together(part)) {
            self.processors.wait_until_idle();
            let keys: Vec<UnitKey> = numbers.iter().map(|&strip| strips.key(strip)).collect();
            let is_known = self.cache.knows(&keys);
            let missing = numbers.iter().zip(is_known).filter(|(_, is_known)| !is_known);
            let missing: Vec<usize> = missing.map(|(&strip, _)| strip).collect();
            let (Some(first), Some(last)) = (missing.first(), missing.last()) else { continue };
            let decoded_bytes: usize = missing.iter().map(|&strip| part.strip_output_bytes(strip)).sum();
            let of_base = self.memory_for_base(archive, part, *first..last + 1)?;
            let _memory = self.take_memory(decoded_bytes as u64 + strips.stored_bytes(*first..last + 1) + of_base);
            self.strips_through_cache(strips, &missing)?;
            METRICS.decoded_ahead_bytes.add(decoded_bytes as u64);
        }
        Ok(())
    }
}
