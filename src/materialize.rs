//! Any byte range of any mounted file, from an opened archive, an engine and the cache.
//!
//! What is decoded at once is a strip, or the whole tensor where prediction ties its strips together: a predicted part, and
//! a part that others may be predicted from. No lock is held while decoding.

use std::num::NonZeroUsize;
use std::sync::{Arc, Mutex, PoisonError};

use lru::LruCache;
use rayon::prelude::*;

use crate::archive::{Archive, ArchiveError, PartAddress};
use crate::cache::{Cache, CacheStats};
use crate::codec::blocks::Placement;
use crate::codec::motion::Motion;
use crate::codec::permutation::{self, GroupedPermutation, Symmetry};
use crate::decode::cpu::WORDS_PADDING;
use crate::decode::prepared::PartKind;
use crate::decode::{DecodeError, Engine, PreparedPart, StripJob};
use crate::format::part::{Coding, StoredPlacement};
use crate::tensor::TensorInfo;

pub use crate::decode::EngineChoice;

/// How a [`Materializer`] works.
#[derive(Clone, Copy, Debug)]
pub struct MaterializeOptions {
    /// Budget of the cache of decoded bytes.
    pub cache_bytes: u64,
    /// Which engine decodes.
    pub engine: EngineChoice,
}

/// Why bytes could not be produced. Cheap to clone: waiters of one decode share it.
#[derive(Clone, Debug, thiserror::Error)]
pub enum MaterializeError {
    /// The archive could not be read, or its bytes are not what they should be.
    #[error("{0}")]
    Archive(Arc<ArchiveError>),
    /// A tensor does not decode.
    #[error("{archive}: {tensor} (layer {layer}, {block_type}, record {record}): {error}")]
    Decode {
        /// File name of the archive.
        archive: String,
        /// Name of the tensor.
        tensor: String,
        /// Layer of its record, `none` outside the layers.
        layer: String,
        /// Block type of its record.
        block_type: String,
        /// Record, counted in the index.
        record: u32,
        /// What is wrong.
        error: DecodeError,
    },
}

impl From<ArchiveError> for MaterializeError {
    fn from(error: ArchiveError) -> Self {
        Self::Archive(Arc::new(error))
    }
}

/// What the cache keeps: one strip of a part, or all of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct UnitKey {
    archive: u64,
    record: u32,
    part: u32,
    /// `None` for the whole tensor.
    strip: Option<u32>,
}

/// What a read leaves in the cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Keep {
    /// Every strip it touched, and tensors that others are predicted from.
    Strips,
    /// Tensors that others are predicted from, and strips it took only a piece of.
    ReferencesOnly,
}

type PreparedRecord = Vec<PreparedPart>;

/// Prepared records kept: their side information is small beside what they decode to.
const PREPARED_RECORDS: NonZeroUsize = NonZeroUsize::new(4096).expect("it is not zero");

/// Decodes on demand, remembering what it decoded. Shared by all archives of a mount; every method takes `&self`.
#[derive(Debug)]
pub struct Materializer {
    engine: Arc<dyn Engine>,
    cache: Cache<UnitKey>,
    prepared: Mutex<LruCache<(u64, u32), Arc<PreparedRecord>>>,
}

impl Materializer {
    /// Starts with an empty cache.
    pub fn new(options: MaterializeOptions) -> Self {
        Self {
            engine: options.engine.engine(),
            cache: Cache::new(options.cache_bytes),
            prepared: Mutex::new(LruCache::new(PREPARED_RECORDS)),
        }
    }

    /// What the cache holds and has done.
    pub fn cache_stats(&self) -> CacheStats {
        self.cache.stats()
    }

    /// Fills `out` with the bytes of file `file` of `archive` from `offset_bytes` on; returns how many bytes that was,
    /// less than `out.len()` only where the file ends. Blocks while decoding.
    ///
    /// Not to be called on rayon's threads: a whole tensor is decoded by all of them, and one that waits here for that
    /// tensor could be the one that it waits for.
    pub fn read(
        &self,
        archive: &Arc<Archive>,
        file: usize,
        offset_bytes: u64,
        out: &mut [u8],
    ) -> Result<usize, MaterializeError> {
        self.read_and(Keep::Strips, archive, file, offset_bytes, out)
    }

    /// As [`Self::read`], for who reads each byte once: a strip that fits `out` is decoded in place and not kept.
    pub fn read_once(
        &self,
        archive: &Arc<Archive>,
        file: usize,
        offset_bytes: u64,
        out: &mut [u8],
    ) -> Result<usize, MaterializeError> {
        self.read_and(Keep::ReferencesOnly, archive, file, offset_bytes, out)
    }

    fn read_and(
        &self,
        keep: Keep,
        archive: &Arc<Archive>,
        file: usize,
        offset_bytes: u64,
        out: &mut [u8],
    ) -> Result<usize, MaterializeError> {
        let entry = &archive.files()[file];
        let available = entry.length_bytes.saturating_sub(offset_bytes);
        let length = available.min(out.len() as u64) as usize;
        let mut out = &mut out[..length];
        let header_bytes = entry.header.len() as u64;
        if offset_bytes < header_bytes && !out.is_empty() {
            let header = &entry.header[offset_bytes as usize..];
            let (head, rest) = out.split_at_mut(header.len().min(out.len()));
            head.copy_from_slice(&header[..head.len()]);
            out = rest;
        }
        let mut data_offset = offset_bytes.max(header_bytes) - header_bytes;
        // Tensors tile the data section, so the first one that ends after the offset holds it.
        let mut tensor =
            entry.tensors.partition_point(|tensor| tensor.offset_bytes + tensor.length_bytes <= data_offset);
        while !out.is_empty() {
            let info = &entry.tensors[tensor];
            let within = data_offset - info.offset_bytes;
            let wanted = (info.length_bytes - within).min(out.len() as u64) as usize;
            let (piece, rest) = out.split_at_mut(wanted);
            self.read_tensor(keep, archive, archive.address(file, tensor), within, piece)?;
            out = rest;
            data_offset += wanted as u64;
            tensor += 1;
        }
        Ok(length)
    }

    /// Fills `out` with the bytes of one tensor from `offset` on; they must lie inside it.
    fn read_tensor(
        &self,
        keep: Keep,
        archive: &Arc<Archive>,
        address: PartAddress,
        offset: u64,
        out: &mut [u8],
    ) -> Result<(), MaterializeError> {
        if out.is_empty() {
            return Ok(());
        }
        let record = self.prepared(archive, address.record)?;
        let part = &record[address.part as usize];
        if is_decoded_whole(archive, address, part) {
            let whole = self.whole(archive, address)?;
            out.copy_from_slice(&whole[offset as usize..][..out.len()]);
            return Ok(());
        }
        let strip_bytes = part.full_strip_output_bytes();
        let mut offset = offset;
        let mut out = out;
        while !out.is_empty() {
            let strip = (offset / strip_bytes) as usize;
            let within = (offset % strip_bytes) as usize;
            if keep == Keep::ReferencesOnly && within == 0 {
                let to_the_end = offset + out.len() as u64 == part.length_bytes();
                let whole_strips = if to_the_end { out.len() } else { out.len() - out.len() % strip_bytes as usize };
                let (piece, rest) = out.split_at_mut(whole_strips.min(self.group_bytes(part)));
                if !piece.is_empty() {
                    self.decode(archive, address, part, strip, None, piece)?;
                    offset += piece.len() as u64;
                    out = rest;
                    continue;
                }
                out = rest;
            }
            let decoded = self.strip(archive, address, part, strip)?;
            let (piece, rest) = out.split_at_mut((decoded.len() - within).min(out.len()));
            piece.copy_from_slice(&decoded[within..][..piece.len()]);
            offset += piece.len() as u64;
            out = rest;
        }
        Ok(())
    }

    /// One decoded strip, through the cache.
    fn strip(
        &self,
        archive: &Arc<Archive>,
        address: PartAddress,
        part: &PreparedPart,
        strip: usize,
    ) -> Result<Arc<[u8]>, MaterializeError> {
        let key = UnitKey {
            archive: archive.instance(),
            record: address.record,
            part: address.part,
            strip: Some(strip as u32),
        };
        self.cache.get_or_try_insert(key, || {
            let mut decoded = zeroed(part.strip_output_bytes(strip));
            let out = Arc::get_mut(&mut decoded).expect("nobody else has it yet");
            self.decode(archive, address, part, strip, None, out)?;
            Ok(decoded)
        })
    }

    /// A whole decoded tensor, through the cache; its reference first (Algorithm 1's context buffer).
    fn whole(&self, archive: &Arc<Archive>, address: PartAddress) -> Result<Arc<[u8]>, MaterializeError> {
        let key = UnitKey { archive: archive.instance(), record: address.record, part: address.part, strip: None };
        self.cache.get_or_try_insert(key, || {
            let record = self.prepared(archive, address.record)?;
            let part = &record[address.part as usize];
            let reference = match part.prediction() {
                Some(prediction) => {
                    let reference = archive.record(address.record).reference.expect("checked when it was prepared");
                    Some(self.whole(archive, PartAddress { record: reference, part: prediction.reference_part })?)
                }
                None => None,
            };
            let mut decoded = zeroed(part.length_bytes() as usize);
            let out = Arc::get_mut(&mut decoded).expect("nobody else has it yet");
            out.par_chunks_mut(self.group_bytes(part)).enumerate().try_for_each(|(group, out)| {
                let first = group * self.engine.strips_at_once();
                self.decode(archive, address, part, first, reference.as_deref(), out)
            })?;
            Ok(decoded)
        })
    }

    /// Bytes of as many strips as the engine decodes best together.
    fn group_bytes(&self, part: &PreparedPart) -> usize {
        self.engine.strips_at_once() * part.full_strip_output_bytes() as usize
    }

    /// Decodes as many whole strips of a part as fill `out`, from number `first` on.
    fn decode(
        &self,
        archive: &Archive,
        address: PartAddress,
        part: &PreparedPart,
        first: usize,
        reference: Option<&[u8]>,
        out: &mut [u8],
    ) -> Result<(), MaterializeError> {
        let strip_bytes = part.full_strip_output_bytes() as usize;
        let last = first + out.len().div_ceil(strip_bytes) - 1;
        let (start, end) = (part.strip_range(first).start, part.strip_range(last).end);
        let mut stored = vec![0; (end - start) as usize + WORDS_PADDING];
        let unpadded = stored.len() - WORDS_PADDING;
        archive.read_body(address, start, &mut stored[..unpadded])?;
        let mut jobs: Vec<StripJob<'_>> = (first..)
            .zip(out.chunks_mut(strip_bytes))
            .map(|(strip, out)| {
                let offset = (part.strip_range(strip).start - start) as usize;
                StripJob { strip, stored: &stored[offset..], out }
            })
            .collect();
        let decoded = self.engine.decode_strips(part, reference, &mut jobs);
        decoded.map_err(|error| decode_error(archive, address, error))
    }

    fn prepared(&self, archive: &Archive, record: u32) -> Result<Arc<PreparedRecord>, MaterializeError> {
        let key = (archive.instance(), record);
        if let Some(prepared) = self.prepared.lock().unwrap_or_else(PoisonError::into_inner).get(&key) {
            return Ok(Arc::clone(prepared));
        }
        let prepared = Arc::new(prepare_record(archive, record)?);
        self.prepared.lock().unwrap_or_else(PoisonError::into_inner).put(key, Arc::clone(&prepared));
        Ok(prepared)
    }
}

/// Reads, checks and prepares all parts of a record.
pub fn prepare_record(archive: &Archive, record: u32) -> Result<Vec<PreparedPart>, MaterializeError> {
    let side = archive.side_information(record)?;
    let permutation = if side.permutation.is_some() { decode_permutation(archive, record)? } else { None };
    let entry = archive.record(record);
    let mut parts = Vec::with_capacity(side.parts.len());
    for (ordinal, header) in side.parts.iter().enumerate() {
        let address = PartAddress { record, part: ordinal as u32 };
        let tensor = archive.tensor(address);
        let check = || {
            let mut motion = None;
            if let Coding::Quantized(info) = &header.coding
                && let Some(prediction) = &info.prediction
            {
                check_reference(archive, address, prediction.reference_part)?;
                if let (Some(permutation), Some(placement)) = (&permutation, &prediction.placement) {
                    motion = Some(motion_of(permutation, placement, tensor)?);
                }
            }
            let part = PreparedPart::new(tensor, header, archive.tables(), motion)?;
            let stated = entry.parts[ordinal].body_bytes;
            if part.body_bytes() != stated {
                let found = part.body_bytes().to_string();
                let expected = format!("{stated}, as the index says");
                return Err(DecodeError::Inconsistent { field: "part length", found, expected });
            }
            Ok(part)
        };
        parts.push(check().map_err(|error| decode_error(archive, address, error))?);
    }
    Ok(parts)
}

/// A predicted part's reference must exist and be a tensor of the same type and shape.
fn check_reference(archive: &Archive, address: PartAddress, reference_part: u32) -> Result<(), DecodeError> {
    let tensor = archive.tensor(address);
    let reference = archive.record(address.record).reference.and_then(|record| {
        let exists = (reference_part as usize) < archive.record(record).parts.len();
        exists.then(|| archive.tensor(PartAddress { record, part: reference_part }))
    });
    match reference {
        Some(reference) if reference.dtype == tensor.dtype && reference.shape == tensor.shape => Ok(()),
        other => Err(DecodeError::Inconsistent {
            field: "reference part",
            found: other.map_or("no such part".into(), |other| format!("{} {:?}", other.dtype, other.shape)),
            expected: format!("{} {:?}", tensor.dtype, tensor.shape),
        }),
    }
}

/// The permutation of a record. One coded as a difference needs the permutation of the record below it.
fn decode_permutation(archive: &Archive, record: u32) -> Result<Option<GroupedPermutation>, MaterializeError> {
    // From the record down to its keyframe; the index bounds the length of a chain.
    let mut stored = Vec::new();
    let mut at = Some(record);
    while let Some(record) = at {
        stored.push(archive.side_information(record)?.permutation);
        at = archive.record(record).reference;
    }
    let mut permutation = None;
    for stored in stored.into_iter().rev() {
        permutation = match stored {
            None => None,
            Some(stored) => {
                let symmetry = Symmetry { groups: stored.groups, members: stored.members };
                let decoded = permutation::decode(&stored.coded, symmetry, permutation.as_ref());
                Some(decoded.map_err(|error| {
                    let error = DecodeError::Permutation(error);
                    decode_error(archive, PartAddress { record, part: 0 }, error)
                })?)
            }
        };
    }
    Ok(permutation)
}

/// What a record's permutation does to one tensor.
fn motion_of(
    permutation: &GroupedPermutation,
    placement: &StoredPlacement,
    tensor: &TensorInfo,
) -> Result<Motion, DecodeError> {
    let StoredPlacement { axis, repeat, per_member, unit } = *placement;
    let placement = Placement { axis, repeat, per_member, unit };
    placement.check(permutation.symmetry(), &tensor.shape).map_err(DecodeError::Placement)?;
    let map = placement.index_map(permutation);
    Motion::new(&tensor.shape, axis.into(), map).ok_or_else(|| DecodeError::Inconsistent {
        field: "placement",
        found: format!("axis {axis} of {:?}", tensor.shape),
        expected: "an axis that the blocks fill".into(),
    })
}

fn is_decoded_whole(archive: &Archive, address: PartAddress, part: &PreparedPart) -> bool {
    match part.kind() {
        PartKind::Raw | PartKind::Split { .. } => false,
        PartKind::Quantized { prediction, .. } => prediction.is_some() || archive.is_referenced(address.record),
    }
}

fn zeroed(length: usize) -> Arc<[u8]> {
    std::iter::repeat_n(0, length).collect()
}

/// An error of the engine with what it was decoding.
pub fn decode_error(archive: &Archive, address: PartAddress, error: DecodeError) -> MaterializeError {
    let record = archive.record(address.record);
    MaterializeError::Decode {
        archive: archive.path().display().to_string(),
        // A record without parts may still carry a permutation that does not decode.
        tensor: record
            .parts
            .get(address.part as usize)
            .map_or("no tensor".into(), |_| archive.tensor(address).name.clone()),
        layer: record.layer.map_or("none".into(), |layer| layer.to_string()),
        block_type: archive.block_type(address.record).to_owned(),
        record: address.record,
        error,
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use sha2::{Digest, Sha256};

    use super::*;
    use crate::archive::content_id;
    use crate::format::index::{FileEntry, Index};
    use crate::format::part::{
        PartHeader, PartHeaderBytes, QuantizerInfo, StoredIntegers, StoredPrediction, StoredPredictor, SymbolStreams,
    };
    use crate::format::preamble::PREAMBLE_BYTES;
    use crate::format::record::{PartEntry, RecordEntry, SideInformation, StoredPermutation};

    /// An archive of F32 tensors without data; a record is its reference, its side information and how many parts it has.
    fn archive(path: &Path, shapes: &[&str], records: &[(Option<u32>, SideInformation)]) -> Arc<Archive> {
        let tensors: Vec<String> = (shapes.iter().enumerate())
            .map(|(tensor, shape)| format!(r#""{tensor}":{{"dtype":"F32","shape":{shape},"data_offsets":[0,0]}}"#))
            .collect();
        let json = format!("{{{}}}", tensors.join(","));
        let header = [&(json.len() as u64).to_le_bytes(), json.as_bytes()].concat();
        let digest = Sha256::digest(&header).into();
        let mut tensors = 0..;
        let (mut entries, mut bodies) = (Vec::new(), Vec::new());
        for (reference, side) in records {
            let parts = side.parts.iter().zip(&mut tensors);
            let parts = parts.map(|(_, tensor)| PartEntry { file: 0, tensor, body_bytes: 0 }).collect();
            let bytes = side.write();
            let (side_bytes, side_crc) = (bytes.len() as u64, crc32c::crc32c(&bytes));
            entries.push(RecordEntry {
                layer: None,
                block_type: 0,
                reference: *reference,
                side_bytes,
                side_crc,
                parts,
            });
            bodies.extend(bytes);
        }
        let index = Index {
            architecture: "made up".into(),
            layers: 0,
            keyframe_interval: 4,
            content_id: content_id(std::iter::once(digest)),
            files: vec![FileEntry { name: "model".into(), header, decoded_sha256: digest, source_sha256: digest }],
            tables: vec![],
            block_types: vec!["ffn".into()],
            records: entries,
            bases: vec![],
            provenance: vec![],
        };
        let (preamble, stored) = index.write(PREAMBLE_BYTES + bodies.len() as u64);
        std::fs::write(path, [preamble.write(), bodies, stored].concat()).expect("a scratch file");
        Arc::new(Archive::open(path).expect("a sound index"))
    }

    fn side(permutation: StoredPermutation, parts: Vec<PartHeader>) -> SideInformation {
        SideInformation { permutation: Some(permutation), parts, permutation_bytes: 0 }
    }

    fn zero() -> StoredIntegers {
        StoredIntegers(vec![0, 0])
    }

    /// A quantized part without elements, predicted where `placement` is given.
    fn header(placement: Option<StoredPlacement>) -> PartHeader {
        let prediction = placement.map(|placement| StoredPrediction {
            reference_part: 0,
            placement: Some(placement),
            predictor: StoredPredictor::ScaledCopy { gain: 1.0 },
        });
        let info = QuantizerInfo { step: 1.0, raw_bits: 0, trellis: None, scales: None, means: None, prediction };
        let streams = SymbolStreams {
            run_elements: 1,
            runs_per_strip: 1,
            strip_words: zero(),
            strip_exceptions: zero(),
            ..SymbolStreams::default()
        };
        let cost = PartHeaderBytes::default();
        PartHeader { coding: Coding::Quantized(info), streams: Some(streams), strip_crcs: vec![], cost }
    }

    #[test]
    fn a_broken_permutation_of_a_record_without_parts_is_an_error() {
        let scratch = tempfile::tempdir().expect("a directory");
        let broken = StoredPermutation { groups: 2, members: 1, coded: vec![9] };
        let archive = archive(&scratch.path().join("x.mcwc"), &[], &[(None, side(broken, vec![]))]);
        let error = prepare_record(&archive, 0).expect_err("there is no coding 9");
        assert!(error.to_string().contains("no tensor"), "{error}");
    }

    #[test]
    fn a_placement_along_an_axis_of_a_tensor_without_elements_is_an_error_before_it_takes_memory() {
        let scratch = tempfile::tempdir().expect("a directory");
        let identity = || StoredPermutation { groups: 1, members: 1, coded: vec![1] };
        let placement = StoredPlacement { axis: 1, repeat: 1, per_member: false, unit: u32::MAX };
        let records = [
            (None, side(identity(), vec![header(None)])),
            (Some(0), side(identity(), vec![header(Some(placement))])), // a map along the axis would take 16 GiB
        ];
        let archive = archive(&scratch.path().join("x.mcwc"), &["[0,4294967295]"; 2], &records);
        prepare_record(&archive, 0).expect("nothing is wrong with the reference");
        let error = prepare_record(&archive, 1).expect_err("no element is predicted");
        assert!(error.to_string().contains("placement"), "{error}");
    }
}
