//! What is decoded before it is asked for: into pieces for readers that keep what they are given, and into the cache for
//! others; and how readers get it.

use std::sync::Arc;

use super::based::identical_to;
use super::pieces::{Decoded, PIECE_BYTES};
use super::prepared_records::PreparedRecord;
use super::ranges::first_tensor_at;
use super::{Keeper, MaterializeError, Materializer, is_decoded_whole};
use crate::archive::{Archive, PartAddress};
use crate::metrics::METRICS;

impl Materializer {
    /// Decodes the bytes `offset_bytes..offset_bytes + length_bytes` of a file when processors have nothing else to do, for a
    /// reader that keeps them or not, and returns when that is done. What does not decode is passed over: whoever needs it
    /// will be told.
    pub fn decode_ahead(&self, keeper: Keeper, archive: &Archive, file: usize, offset_bytes: u64, length_bytes: u64) {
        let end = offset_bytes.saturating_add(length_bytes).min(archive.files()[file].length_bytes);
        let mut offset = offset_bytes;
        while offset < end {
            let length = PIECE_BYTES.min((end - offset) as usize);
            let decoded = match keeper {
                Keeper::Reader => self.decode_piece_ahead(archive, file, offset, length),
                Keeper::Cache => self.decode_tensors_ahead(archive, file, offset, length),
            };
            if let Err(error) = decoded {
                log::debug!("decoding ahead: {error}");
            }
            offset += length as u64;
        }
    }

    /// Decodes what has no piece yet into one. Tensors that are decoded whole lie side by side anyway.
    fn decode_piece_ahead(
        &self,
        archive: &Archive,
        file: usize,
        offset: u64,
        length: usize,
    ) -> Result<(), MaterializeError> {
        if let Some((address, part, _)) = self.whole_tensor_around(archive, file, offset, length)? {
            return self.decode_whole_ahead(archive, address, &part[address.part as usize]);
        }
        self.processors.wait_until_idle();
        let fill = |out: &mut [u8]| self.read_range(Keeper::Reader, archive, file, offset, out);
        if self.pieces.make((archive.instance(), file, offset), length, fill)? {
            METRICS.decoded_ahead_bytes.add(length as u64);
        }
        Ok(())
    }

    /// Decodes the tensors of a range into the cache.
    fn decode_tensors_ahead(
        &self,
        archive: &Archive,
        file: usize,
        offset: u64,
        length: usize,
    ) -> Result<(), MaterializeError> {
        let entry = &archive.files()[file];
        let header_bytes = entry.header.len() as u64;
        let end = (offset + length as u64).saturating_sub(header_bytes);
        let mut offset = offset.saturating_sub(header_bytes);
        for tensor in first_tensor_at(archive, file, offset)..entry.tensors.len() {
            let info = &entry.tensors[tensor];
            if info.offset_bytes >= end {
                break;
            }
            let within = offset - info.offset_bytes;
            let wanted = info.length_bytes.min(end - info.offset_bytes) - within;
            self.decode_tensor_ahead(archive, archive.address(file, tensor), within, wanted)?;
            offset += wanted;
        }
        Ok(())
    }

    /// The bytes `offset_bytes..offset_bytes + length` of a file, which must lie inside it, where they have been decoded and
    /// lie side by side; waits where they are being decoded so. `None` means that they must be read.
    pub fn decoded(&self, archive: &Archive, file: usize, offset_bytes: u64, length: usize) -> Option<Decoded> {
        if let Some(found) = self.pieces.find((archive.instance(), file, offset_bytes), length, length) {
            return Some(found);
        }
        let (address, _, within) = self.whole_tensor_around(archive, file, offset_bytes, length).ok()??;
        let from = usize::try_from(within).ok()?;
        Some(Decoded::part_of(self.whole_if_known(archive, address)?, from..from + length))
    }

    /// [`Self::decoded`] where that takes no time at all.
    pub fn decoded_already(&self, archive: &Archive, file: usize, offset_bytes: u64, length: usize) -> Option<Decoded> {
        self.pieces.find_made((archive.instance(), file, offset_bytes), length)
    }

    /// The tensor that all of a range belongs to, its record, and where in it the range begins; `None` if there is none, or it
    /// is not decoded whole.
    #[allow(clippy::type_complexity)] // named where it is taken apart
    fn whole_tensor_around(
        &self,
        archive: &Archive,
        file: usize,
        offset: u64,
        length: usize,
    ) -> Result<Option<(PartAddress, Arc<PreparedRecord>, u64)>, MaterializeError> {
        let entry = &archive.files()[file];
        let Some(offset) = offset.checked_sub(entry.header.len() as u64) else { return Ok(None) };
        let tensor = first_tensor_at(archive, file, offset);
        let Some(info) = entry.tensors.get(tensor) else { return Ok(None) };
        let within = offset - info.offset_bytes;
        if within + length as u64 > info.length_bytes {
            return Ok(None);
        }
        let address = archive.address(file, tensor);
        let record = self.prepared.get(archive, address.record)?;
        let is_whole = is_decoded_whole(archive, address, &record[address.part as usize]);
        Ok(is_whole.then_some((address, record, within)))
    }

    fn decode_tensor_ahead(
        &self,
        archive: &Archive,
        address: PartAddress,
        offset: u64,
        length: u64,
    ) -> Result<(), MaterializeError> {
        if length == 0 {
            return Ok(());
        }
        let record = self.prepared.get(archive, address.record)?;
        let part = &record[address.part as usize];
        if let Some((base, place)) = identical_to(archive, part) {
            return self.decode_tensor_ahead(base, place, offset, length);
        }
        if is_decoded_whole(archive, address, part) {
            self.decode_whole_ahead(archive, address, part)
        } else {
            self.decode_strips_ahead(archive, address, part, offset, length)
        }
    }
}
