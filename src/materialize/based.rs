//! What parts start from: the decoded bytes of a base archive, through the cache that all variants of the base share.

use std::ops::Range;
use std::sync::Arc;

use super::{MaterializeError, Materializer, Purpose, is_decoded_whole};
use crate::archive::{Archive, PartAddress};
use crate::decode::PreparedPart;
use crate::format::difference::BaseTensor;

/// The tensor of a base that a part is equal to.
pub(super) fn identical_to<'a>(archive: &'a Archive, part: &PreparedPart) -> Option<(&'a Arc<Archive>, PartAddress)> {
    let based = part.based().filter(|based| based.is_identical())?;
    archive.base_tensor(based.reference)
}

impl Materializer {
    /// These bytes of a tensor of one of the archive's bases, which must have it; zeros where it is shorter. The caller sees
    /// to the memory for it.
    pub fn base_bytes(
        &self,
        archive: &Archive,
        reference: BaseTensor,
        range: Range<u64>,
    ) -> Result<Vec<u8>, MaterializeError> {
        let (base, address) = archive.base_tensor(reference).expect("checked when the part was prepared");
        let mut bytes = vec![0; (range.end - range.start) as usize];
        let available = base.tensor(address).length_bytes.min(range.end).saturating_sub(range.start);
        self.read_tensor(Purpose::Decoding, base, address, range.start, &mut bytes[..available as usize])?;
        Ok(bytes)
    }

    /// Memory that the base's bytes for these strips of a part take, and what those are decoded from.
    pub(super) fn memory_for_base(
        &self,
        archive: &Archive,
        part: &PreparedPart,
        strips: Range<usize>,
    ) -> Result<u64, MaterializeError> {
        let Some(reference) = part.base() else { return Ok(0) };
        let (base, address) = archive.base_tensor(reference).expect("checked when the part was prepared");
        let range = part.output_range(strips);
        let copied = range.end - range.start;
        let record = self.prepared.get(base, address.record)?;
        let base_part = &record[address.part as usize];
        let end = base_part.length_bytes().min(range.end);
        if range.start >= end {
            return Ok(copied);
        }
        if is_decoded_whole(base, address, base_part) {
            return Ok(copied + self.memory_for_whole(base_part));
        }
        let strip_bytes = base_part.full_strip_output_bytes();
        let strips = (range.start / strip_bytes) as usize..end.div_ceil(strip_bytes) as usize;
        let decoded = base_part.output_range(strips.clone());
        let stored = base_part.strip_range(strips.end - 1).end - base_part.strip_range(strips.start).start;
        let below = self.memory_for_base(base, base_part, strips)?;
        Ok(copied + (decoded.end - decoded.start) + stored + below)
    }
}
