//! A record read, checked and made ready for decoding: its side information, the permutation it carries or inherits, and
//! what its parts are predicted from.

use super::{MaterializeError, decode_error};
use crate::archive::{Archive, PartAddress};
use crate::codec::blocks::Placement;
use crate::codec::motion::Motion;
use crate::codec::permutation::{self, GroupedPermutation, Symmetry};
use crate::decode::prepared::Motions;
use crate::decode::{DecodeError, Pools, PreparedPart};
use crate::format::difference::BaseTensor;
use crate::format::limits;
use crate::format::part::{Coding, StoredPlacement, StoredPredictor};
use crate::tensor::TensorInfo;

/// Reads, checks and prepares all parts of a record.
pub fn prepare_record(archive: &Archive, record: u32) -> Result<Vec<PreparedPart>, MaterializeError> {
    let side = archive.side_information(record)?;
    let permutation = if side.permutation.is_some() { decode_permutation(archive, record)? } else { None };
    let entry = archive.record(record);
    let permutation_below = match (&permutation, entry.reference) {
        (Some(permutation), Some(reference)) if side.looks_at_two_layers() => {
            decode_permutation(archive, reference)?.filter(|below| below.symmetry() == permutation.symmetry())
        }
        _ => None,
    };
    let (mut parts, mut strips) = (Vec::with_capacity(side.parts.len()), 0);
    for (ordinal, header) in side.parts.iter().enumerate() {
        let address = PartAddress { record, part: ordinal as u32 };
        let tensor = archive.tensor(address);
        let mut check = || {
            let mut motions = Motions::default();
            match &header.coding {
                Coding::Based(info) => check_base(archive, tensor, info.reference, info.difference.is_some())?,
                Coding::QuantizedFromBase(reference, _) => check_base(archive, tensor, *reference, true)?,
                _ => {}
            }
            if let Coding::Quantized(info) = &header.coding
                && let Some(prediction) = &info.prediction
            {
                let second_part = match prediction.predictor {
                    StoredPredictor::Network { second_part, .. } => second_part,
                    _ => None,
                };
                check_references(archive, address, prediction.reference_part, second_part)?;
                if let (Some(permutation), Some(placement)) = (&permutation, &prediction.placement) {
                    let nearest = motion_of(permutation, placement, tensor)?;
                    if second_part.is_some() {
                        let below = match &permutation_below {
                            Some(below) => Some(motion_of(below, placement, tensor)?),
                            None => None,
                        };
                        motions.second = Some(below.map_or_else(|| nearest.clone(), |below| nearest.then(&below)));
                    }
                    motions.nearest = Some(nearest);
                }
            }
            let pools =
                Pools { tables: archive.tables(), codebooks: archive.codebooks(), networks: archive.networks() };
            let part = PreparedPart::new(tensor, header, pools, motions)?;
            strips += part.strips() as u64;
            if strips > limits::RECORD_STRIPS {
                let expected = format!("at most {} in a record", limits::RECORD_STRIPS);
                return Err(DecodeError::Inconsistent { field: "strips", found: strips.to_string(), expected });
            }
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

/// What a part starts from must be a tensor of the same type, of as long rows, and where nothing says otherwise of as many.
fn check_base(
    archive: &Archive,
    tensor: &TensorInfo,
    reference: BaseTensor,
    has_differences: bool,
) -> Result<(), DecodeError> {
    let Some((base, place)) = archive.base_tensor(reference) else {
        let BaseTensor { base, file, tensor } = reference;
        return Err(DecodeError::Inconsistent {
            field: "base tensor",
            found: format!("tensor {tensor} of file {file} of base {base}"),
            expected: format!("one of the {} bases at hand", archive.bases().len()),
        });
    };
    let reference = base.tensor(place);
    let rows_may_differ = has_differences && tensor.shape.len() > 1;
    let is_alike = match (tensor.shape.split_first(), reference.shape.split_first()) {
        (Some((_, columns)), Some((_, others))) if rows_may_differ => columns == others,
        _ => tensor.shape == reference.shape,
    };
    if reference.dtype == tensor.dtype && is_alike && (rows_may_differ || reference.length_bytes == tensor.length_bytes)
    {
        return Ok(());
    }
    Err(DecodeError::Inconsistent {
        field: "base tensor",
        found: format!("{} {:?}", reference.dtype, reference.shape),
        expected: format!("{} {:?}", tensor.dtype, tensor.shape),
    })
}

/// A predicted part's reference must exist and be a tensor of the same type and shape, and so must the second reference,
/// in the record below that, where there is one.
fn check_references(
    archive: &Archive,
    address: PartAddress,
    reference_part: u32,
    second_part: Option<u32>,
) -> Result<(), DecodeError> {
    check_reference(archive, address, archive.record(address.record).reference, ("reference part", reference_part))?;
    let Some(second_part) = second_part else { return Ok(()) };
    let record = archive.record(address.record).reference.and_then(|record| archive.record(record).reference);
    check_reference(archive, address, record, ("second reference part", second_part))
}

fn check_reference(
    archive: &Archive,
    address: PartAddress,
    record: Option<u32>,
    (field, reference_part): (&'static str, u32),
) -> Result<(), DecodeError> {
    let tensor = archive.tensor(address);
    let reference = record.and_then(|record| {
        let exists = (reference_part as usize) < archive.record(record).parts.len();
        exists.then(|| archive.tensor(PartAddress { record, part: reference_part }))
    });
    match reference {
        Some(reference) if reference.dtype == tensor.dtype && reference.shape == tensor.shape => Ok(()),
        other => Err(DecodeError::Inconsistent {
            field,
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

#[cfg(test)]
mod tests {
    use std::path::Path;

    use sha2::{Digest, Sha256};

    use std::sync::Arc;

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
            files: vec![FileEntry {
                name: "model".into(),
                header,
                decoded_sha256: digest,
                source_sha256: digest,
                decoded_blake3: None,
            }],
            tables: vec![],
            codebooks: vec![],
            networks: vec![],
            block_types: vec!["ffn".into()],
            records: entries,
            bases: vec![],
            has_units: false,
            has_predictors: false,
            has_column_scales: false,
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
        let info = QuantizerInfo {
            step: 1.0,
            raw_bits: 0,
            trellis: None,
            vectors: None,
            scales: None,
            means: None,
            column_scales: None,
            prediction,
        };
        let streams = SymbolStreams {
            run_elements: 1,
            runs_per_strip: 1,
            lanes: 1,
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
