//! Byte ranges of files, cut into what the header, each piece decoded ahead and each tensor has of them.

use std::thread;

use super::based::identical_to;
use super::{Keeper, MaterializeError, Materializer, Purpose, is_decoded_whole, strips};
use crate::archive::{Archive, PartAddress};

impl Materializer {
    /// [`Self::read_for`] a reader that has no memory of its own.
    pub fn read(
        &self,
        archive: &Archive,
        file: usize,
        offset_bytes: u64,
        out: &mut [u8],
    ) -> Result<usize, MaterializeError> {
        self.read_for(Keeper::Cache, archive, file, offset_bytes, out)
    }

    /// [`Self::read_for`] a reader that needs each byte once.
    pub fn read_once(
        &self,
        archive: &Archive,
        file: usize,
        offset_bytes: u64,
        out: &mut [u8],
    ) -> Result<usize, MaterializeError> {
        self.read_for(Keeper::Reader, archive, file, offset_bytes, out)
    }

    /// Fills `out` with the bytes of file `file` of `archive` from `offset_bytes` on; returns how many bytes that was,
    /// less than `out.len()` only where the file ends. Blocks while decoding.
    pub fn read_for(
        &self,
        keeper: Keeper,
        archive: &Archive,
        file: usize,
        offset_bytes: u64,
        out: &mut [u8],
    ) -> Result<usize, MaterializeError> {
        let available = archive.files()[file].length_bytes.saturating_sub(offset_bytes);
        let length = available.min(out.len() as u64) as usize;
        let mut out = &mut out[..length];
        let mut offset = offset_bytes;
        while !out.is_empty() {
            let place = (archive.instance(), file, offset);
            let taken = if let Some(found) = self.pieces.find(place, 1, out.len()) {
                out[..found.len()].copy_from_slice(&found);
                found.len()
            } else {
                let to_next = self.pieces.next_start(place).map_or(u64::MAX, |start| start.max(offset + 1) - offset);
                let taken = to_next.min(out.len() as u64) as usize;
                self.read_range(keeper, archive, file, offset, &mut out[..taken])?;
                taken
            };
            out = &mut out[taken..];
            offset += taken as u64;
        }
        Ok(length)
    }

    /// Fills `out` with the bytes of a file from `offset_bytes` on, which must lie inside it, from no piece.
    pub(super) fn read_range(
        &self,
        keeper: Keeper,
        archive: &Archive,
        file: usize,
        offset_bytes: u64,
        mut out: &mut [u8],
    ) -> Result<(), MaterializeError> {
        let entry = &archive.files()[file];
        let header_bytes = entry.header.len() as u64;
        if offset_bytes < header_bytes && !out.is_empty() {
            let header = &entry.header[offset_bytes as usize..];
            let (head, rest) = out.split_at_mut(header.len().min(out.len()));
            head.copy_from_slice(&header[..head.len()]);
            out = rest;
        }
        let mut data_offset = offset_bytes.max(header_bytes) - header_bytes;
        let mut tensor = first_tensor_at(archive, file, data_offset);
        while !out.is_empty() {
            let info = &entry.tensors[tensor];
            let within = data_offset - info.offset_bytes;
            let wanted = (info.length_bytes - within).min(out.len() as u64) as usize;
            let (piece, rest) = out.split_at_mut(wanted);
            self.read_tensor(Purpose::Reading(keeper), archive, archive.address(file, tensor), within, piece)?;
            out = rest;
            data_offset += wanted as u64;
            tensor += 1;
        }
        Ok(())
    }

    /// Fills `out`, which must lie inside file `file`, from `offset_bytes` on, on several threads.
    pub fn read_in_parallel(
        &self,
        archive: &Archive,
        file: usize,
        offset_bytes: u64,
        out: &mut [u8],
    ) -> Result<(), MaterializeError> {
        let threads = self.processors.total() as usize;
        let piece_bytes = out.len().div_ceil(threads).max(strips::TOGETHER_BYTES);
        thread::scope(|scope| {
            let readers: Vec<_> = out
                .chunks_mut(piece_bytes)
                .enumerate()
                .map(|(piece, out)| {
                    let first = offset_bytes + (piece * piece_bytes) as u64;
                    scope.spawn(move || self.read(archive, file, first, out).map(drop))
                })
                .collect();
            readers.into_iter().try_for_each(|reader| reader.join().expect("reading does not panic"))
        })
    }

    /// Fills `out` with the bytes of one tensor from `offset` on; they must lie inside it.
    pub(super) fn read_tensor(
        &self,
        purpose: Purpose,
        archive: &Archive,
        address: PartAddress,
        offset: u64,
        out: &mut [u8],
    ) -> Result<(), MaterializeError> {
        if out.is_empty() {
            return Ok(());
        }
        let record = self.prepared.get(archive, address.record)?;
        let part = &record[address.part as usize];
        if let Some((base, place)) = identical_to(archive, part) {
            return self.read_tensor(purpose, base, place, offset, out); // nothing of it is kept twice
        }
        if is_decoded_whole(archive, address, part) {
            self.read_whole(purpose, archive, address, part, offset, out)
        } else {
            self.read_strips(purpose, archive, address, part, offset, out)
        }
    }
}

/// Tensors tile the data section, so the first one that ends after the offset holds it.
pub(super) fn first_tensor_at(archive: &Archive, file: usize, data_offset: u64) -> usize {
    let tensors = &archive.files()[file].tensors;
    tensors.partition_point(|tensor| tensor.offset_bytes + tensor.length_bytes <= data_offset)
}
