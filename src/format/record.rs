//! Records, one per layer and block type: their entries in the index and their side information (SPEC.md sections 3.1
//! and 4; Eq. 50).

use super::bytes::{Reader, Writer, crc32c};
use super::error::FormatError;
use super::limits;
use super::part::{Coding, PartHeader, StoredPredictor};

const SECTION: &str = "side information";

/// One part of a record, as the index lists it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PartEntry {
    /// Which file the tensor belongs to.
    pub file: u32,
    /// Which tensor of that file, counted in the order of the data.
    pub tensor: u32,
    /// Length of all its strips in bytes.
    pub body_bytes: u64,
}

/// One record, as the index lists it. Records lie one after another from the end of the preamble to the index.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RecordEntry {
    /// Layer, counted from 0; `None` for tensors outside the layers.
    pub layer: Option<u32>,
    /// Number of the block type's name.
    pub block_type: u8,
    /// The earlier record that predicted parts start from.
    pub reference: Option<u32>,
    /// Length of the side information, with which the record starts.
    pub side_bytes: u64,
    /// CRC-32C of the side information.
    pub side_crc: u32,
    /// Parts in the order of their strips.
    pub parts: Vec<PartEntry>,
}

impl RecordEntry {
    /// Reads one entry; `earlier` are the records before it.
    pub fn parse(reader: &mut Reader<'_>, earlier: &[Self], block_types: usize) -> Result<Self, FormatError> {
        let layer = reader.varint("record layer", limits::LAYERS)?.checked_sub(1).map(|layer| layer as u32);
        let offset = reader.position();
        let block_type = reader.u8("record block type")?;
        if usize::from(block_type) >= block_types {
            return Err(reader.invalid("record block type", offset, block_type, format!("less than {block_types}")));
        }
        let offset = reader.position();
        let distance = reader.varint("record reference", earlier.len() as u64)?;
        let reference = (distance > 0).then(|| earlier.len() as u32 - distance as u32);
        if let Some(reference) = reference {
            let other = &earlier[reference as usize];
            if other.block_type != block_type {
                let found = format!("a record of block type {}", other.block_type);
                return Err(reader.invalid("record reference", offset, found, format!("block type {block_type}")));
            }
        }
        let side_bytes = reader.varint("side information length", limits::SIDE_BYTES)?;
        let side_crc = reader.u32("side information checksum")?;
        let count = reader.count("record parts", limits::PARTS)?;
        let mut parts = Vec::with_capacity(count);
        for _ in 0..count {
            parts.push(PartEntry {
                file: reader.varint("part file", limits::FILES)? as u32,
                tensor: reader.varint("part tensor", u32::MAX.into())? as u32,
                body_bytes: reader.varint("part length", u64::MAX >> 8)?,
            });
        }
        Ok(Self { layer, block_type, reference, side_bytes, side_crc, parts })
    }

    /// Writes the entry of record number `ordinal`.
    pub fn write(&self, writer: &mut Writer, ordinal: usize) {
        writer.varint(self.layer.map_or(0, |layer| u64::from(layer) + 1));
        writer.u8(self.block_type);
        writer.varint(self.reference.map_or(0, |reference| ordinal as u64 - u64::from(reference)));
        writer.varint(self.side_bytes);
        writer.u32(self.side_crc);
        writer.varint(self.parts.len() as u64);
        for part in &self.parts {
            writer.varint(part.file.into());
            writer.varint(part.tensor.into());
            writer.varint(part.body_bytes);
        }
    }

    /// Length of the whole record: side information and strips.
    pub fn bytes(&self) -> u64 {
        self.parts.iter().fold(self.side_bytes, |sum, part| sum.saturating_add(part.body_bytes))
    }
}

/// A permutation as stored (Eq. 58): its size and the coded digits, which `codec::permutation` understands.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StoredPermutation {
    /// Groups that move as wholes.
    pub groups: u32,
    /// Members that move inside each group; 1 where blocks have no inner order.
    pub members: u32,
    /// Coded digits.
    pub coded: Vec<u8>,
}

/// What a record says before its strips.
#[derive(Clone, Debug, PartialEq)]
pub struct SideInformation {
    /// From which block of the reference each block is predicted; absent where every block is predicted from its own place.
    pub permutation: Option<StoredPermutation>,
    /// One header per part.
    pub parts: Vec<PartHeader>,
    /// Bytes spent on the permutation.
    pub permutation_bytes: u64,
}

impl SideInformation {
    /// Checks and reads the side information of the record `entry`.
    pub fn parse(bytes: &[u8], entry: &RecordEntry) -> Result<Self, FormatError> {
        let found = crc32c(bytes);
        if found != entry.side_crc {
            return Err(FormatError::Checksum { section: SECTION, found, expected: entry.side_crc });
        }
        let mut reader = Reader::new(SECTION, bytes);
        let permutation = match reader.u8("permutation flag")? {
            0 => None,
            1 => {
                let groups = reader.varint("permutation groups", limits::BLOCKS)? as u32;
                let offset = reader.position();
                let members = reader.varint("permutation members", limits::BLOCKS)? as u32;
                let blocks = u64::from(groups) * u64::from(members);
                if blocks == 0 || blocks > limits::BLOCKS {
                    let expected = format!("1 to {}", limits::BLOCKS);
                    return Err(reader.invalid("permutation members", offset, format!("{blocks} blocks"), expected));
                }
                let coded = reader.blob("permutation digits", limits::SIDE_BYTES)?.to_vec();
                Some(StoredPermutation { groups, members, coded })
            }
            other => return Err(reader.invalid("permutation flag", 0, other, "0 or 1")),
        };
        let permutation_bytes = reader.position();
        let parts = entry.parts.iter().map(|_| PartHeader::parse(&mut reader)).collect::<Result<Vec<_>, _>>()?;
        reader.end()?;
        Ok(Self { permutation, parts, permutation_bytes })
    }

    /// Whether a part is predicted from the reference record's own reference record too.
    pub fn looks_at_two_layers(&self) -> bool {
        self.parts.iter().any(|part| {
            let Coding::Quantized(info) = &part.coding else { return false };
            let predictor = info.prediction.as_ref().map(|prediction| &prediction.predictor);
            matches!(predictor, Some(StoredPredictor::Network { second_part: Some(_), .. }))
        })
    }

    /// The bytes of the side information.
    pub fn write(&self) -> Vec<u8> {
        let mut writer = Writer::new();
        writer.u8(u8::from(self.permutation.is_some()));
        if let Some(permutation) = &self.permutation {
            writer.varint(permutation.groups.into());
            writer.varint(permutation.members.into());
            writer.blob(&permutation.coded);
        }
        for part in &self.parts {
            part.write(&mut writer);
        }
        writer.into_bytes()
    }
}
