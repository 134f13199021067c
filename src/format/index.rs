//! The index: everything needed to find and decode any tensor, in one range read (SPEC.md section 3; Eqs. 51-57).
//!
//! The original safetensors headers are the paper's `ParamShapes`: names, types, shapes and order, said once. The index
//! is stored as one raw deflate stream.

use std::collections::HashSet;
use std::io::Write;

use flate2::{Decompress, FlushDecompress, Status};

use super::bytes::{Reader, Writer, crc32c};
use super::codebook::StoredCodebook;
use super::error::FormatError;
use super::limits;
use super::network::StoredNetwork;
use super::preamble::{
    FEATURE_BASES, FEATURE_CODEBOOKS, FEATURE_COLUMN_SCALES, FEATURE_PREDICTORS, FEATURE_TREE_DIGESTS, FEATURE_UNITS,
    Preamble,
};
use super::record::RecordEntry;
use super::table::Table;

const SECTION: &str = "index";

/// One packed safetensors file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FileEntry {
    /// File name without directories.
    pub name: String,
    /// The file's first bytes: header length and JSON, exactly as they were.
    pub header: Vec<u8>,
    /// SHA-256 of the decoded file.
    pub decoded_sha256: [u8; 32],
    /// SHA-256 of the file that was packed.
    pub source_sha256: [u8; 32],
    /// BLAKE3 of the decoded file, which many threads can compute together. All files of an archive have it, or none:
    /// archives from before it do not.
    pub decoded_blake3: Option<[u8; 32]>,
}

/// An archive that parts start from, announced by a feature bit.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BaseReference {
    /// Content id of the base: SHA-256 over the SHA-256 of its decoded files.
    pub content_id: [u8; 32],
    /// A name for people: where it was when it was used.
    pub name: String,
}

/// The index's content.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Index {
    /// Model family whose block rules the encoder used (`ArchID`), for example `bert`; `unknown` where it knew none.
    pub architecture: String,
    /// Number of layers (L).
    pub layers: u32,
    /// Keyframe interval (K).
    pub keyframe_interval: u32,
    /// SHA-256 over the decoded digests of all files, in order: the archive's identity.
    pub content_id: [u8; 32],
    /// Packed files.
    pub files: Vec<FileEntry>,
    /// Entropy tables that parts refer to by number (`EntropySpec`).
    pub tables: Vec<Table>,
    /// Codebooks that parts of vectors refer to by number.
    pub codebooks: Vec<StoredCodebook>,
    /// Networks of learned predictors, which parts refer to by number.
    pub networks: Vec<StoredNetwork>,
    /// Names that records refer to by number.
    pub block_types: Vec<String>,
    /// Records in the order of their bytes, which is the canonical traversal order (Eq. 49).
    pub records: Vec<RecordEntry>,
    /// Archives that parts start from.
    pub bases: Vec<BaseReference>,
    /// Whether parts may be of units: only said in the preamble.
    pub has_units: bool,
    /// Whether parts may have motion vectors or learned predictors: only said in the preamble.
    pub has_predictors: bool,
    /// Whether columns of parts may have scales: only said in the preamble.
    pub has_column_scales: bool,
    /// How the archive came to be: tool, version, options.
    pub provenance: Vec<(String, String)>,
}

impl Index {
    /// Checks, inflates and reads the stored index that the preamble describes.
    pub fn parse(stored: &[u8], preamble: &Preamble) -> Result<Self, FormatError> {
        let found = crc32c(stored);
        if found != preamble.index_crc {
            return Err(FormatError::Checksum { section: SECTION, found, expected: preamble.index_crc });
        }
        let bytes = inflate(stored, preamble.index_inflated_bytes)?;
        let mut reader = Reader::new(SECTION, &bytes);
        let index = Self::parse_fields(&mut reader, preamble.required_features)?;
        reader.end()?;
        Ok(index)
    }

    fn parse_fields(reader: &mut Reader<'_>, features: u64) -> Result<Self, FormatError> {
        let architecture = reader.text("architecture", limits::TEXT_BYTES)?;
        let layers = reader.varint("layers", limits::LAYERS)? as u32;
        let keyframe_interval = reader.varint("keyframe interval", limits::CHAIN_RECORDS)? as u32;
        let content_id = reader.digest("content id")?;
        let count = reader.count("files", limits::FILES)?;
        let mut files = Vec::with_capacity(count);
        let mut names = HashSet::with_capacity(count);
        for _ in 0..count {
            let offset = reader.position();
            let name = reader.text("file name", limits::TEXT_BYTES)?;
            if name.is_empty() || name == "." || name == ".." || name.contains(['/', '\0']) {
                return Err(reader.invalid("file name", offset, format!("{name:?}"), "a name without directories"));
            }
            if !names.insert(name.clone()) {
                return Err(reader.invalid("file name", offset, format!("{name:?} again"), "different names"));
            }
            files.push(FileEntry {
                name,
                header: reader.blob("file header", limits::HEADER_BYTES)?.to_vec(),
                decoded_sha256: reader.digest("decoded SHA-256")?,
                source_sha256: reader.digest("source SHA-256")?,
                decoded_blake3: match features & FEATURE_TREE_DIGESTS {
                    0 => None,
                    _ => Some(reader.digest("decoded BLAKE3")?),
                },
            });
        }
        let count = reader.count("tables", limits::TABLES)?;
        let tables = (0..count).map(|_| Table::parse(reader)).collect::<Result<Vec<_>, _>>()?;
        let count = if features & FEATURE_CODEBOOKS == 0 { 0 } else { reader.count("codebooks", limits::CODEBOOKS)? };
        let codebooks = (0..count).map(|_| StoredCodebook::parse(reader)).collect::<Result<Vec<_>, _>>()?;
        let count = if features & FEATURE_PREDICTORS == 0 { 0 } else { reader.count("networks", limits::NETWORKS)? };
        let networks = (0..count).map(|_| StoredNetwork::parse(reader)).collect::<Result<Vec<_>, _>>()?;
        let count = reader.count("block types", limits::BLOCK_TYPES)?;
        let block_types =
            (0..count).map(|_| reader.text("block type", limits::TEXT_BYTES)).collect::<Result<Vec<_>, _>>()?;
        let count = reader.count("records", limits::RECORDS)?;
        let mut records: Vec<RecordEntry> = Vec::new();
        let mut records_below: Vec<u64> = Vec::new();
        let mut parts = 0;
        for _ in 0..count {
            let offset = reader.position();
            let record = RecordEntry::parse(reader, &records, block_types.len())?;
            let below = record.reference.map_or(0, |reference| records_below[reference as usize] + 1);
            if below > limits::CHAIN_RECORDS {
                let expected = format!("at most {} records to a keyframe", limits::CHAIN_RECORDS);
                return Err(reader.invalid("record reference", offset, format!("a chain of {below}"), expected));
            }
            records_below.push(below);
            parts += record.parts.len() as u64;
            if parts > limits::PARTS {
                let found = format!("{parts} parts so far");
                return Err(reader.invalid("record parts", offset, found, format!("{} in all", limits::PARTS)));
            }
            if let Some(layer) = record.layer
                && layer >= layers
            {
                return Err(reader.invalid("record layer", offset, layer, format!("less than {layers}")));
            }
            records.push(record);
        }
        let offset = reader.position();
        let count = reader.count("bases", limits::BASES)?;
        if (count > 0) != (features & FEATURE_BASES != 0) {
            let expected = if count > 0 { "none without feature 2" } else { "one at least with feature 2" };
            return Err(reader.invalid("bases", offset, count, expected));
        }
        let mut bases = Vec::with_capacity(count);
        for _ in 0..count {
            let content_id = reader.digest("base content id")?;
            bases.push(BaseReference { content_id, name: reader.text("base name", limits::TEXT_BYTES)? });
        }
        let count = reader.count("provenance", limits::PROVENANCE)?;
        let mut provenance = Vec::with_capacity(count);
        for _ in 0..count {
            provenance.push((
                reader.text("provenance key", limits::TEXT_BYTES)?,
                reader.text("provenance value", limits::TEXT_BYTES)?,
            ));
        }
        Ok(Self {
            architecture,
            layers,
            keyframe_interval,
            content_id,
            files,
            tables,
            codebooks,
            networks,
            block_types,
            records,
            bases,
            has_units: features & FEATURE_UNITS != 0,
            has_predictors: features & FEATURE_PREDICTORS != 0,
            has_column_scales: features & FEATURE_COLUMN_SCALES != 0,
            provenance,
        })
    }

    fn has_tree_digests(&self) -> bool {
        self.files.first().is_some_and(|file| file.decoded_blake3.is_some())
    }

    /// The features that a reader must know.
    fn required_features(&self) -> u64 {
        let feature = |bit, is_used| if is_used { bit } else { 0 };
        feature(FEATURE_TREE_DIGESTS, self.has_tree_digests())
            | feature(FEATURE_CODEBOOKS, !self.codebooks.is_empty())
            | feature(FEATURE_BASES, !self.bases.is_empty())
            | feature(FEATURE_UNITS, self.has_units)
            | feature(FEATURE_PREDICTORS, self.has_predictors || !self.networks.is_empty())
            | feature(FEATURE_COLUMN_SCALES, self.has_column_scales)
    }

    /// The index before deflation.
    fn write_fields(&self) -> Writer {
        let mut writer = Writer::new();
        writer.text(&self.architecture);
        writer.varint(self.layers.into());
        writer.varint(self.keyframe_interval.into());
        writer.raw(&self.content_id);
        writer.varint(self.files.len() as u64);
        for file in &self.files {
            writer.text(&file.name);
            writer.blob(&file.header);
            writer.raw(&file.decoded_sha256);
            writer.raw(&file.source_sha256);
            file.decoded_blake3.iter().for_each(|digest| writer.raw(digest));
        }
        writer.varint(self.tables.len() as u64);
        for table in &self.tables {
            table.write(&mut writer);
        }
        if self.required_features() & FEATURE_CODEBOOKS != 0 {
            writer.varint(self.codebooks.len() as u64);
            for codebook in &self.codebooks {
                codebook.write(&mut writer);
            }
        }
        if self.required_features() & FEATURE_PREDICTORS != 0 {
            writer.varint(self.networks.len() as u64);
            for network in &self.networks {
                network.write(&mut writer);
            }
        }
        writer.varint(self.block_types.len() as u64);
        for name in &self.block_types {
            writer.text(name);
        }
        writer.varint(self.records.len() as u64);
        for (ordinal, record) in self.records.iter().enumerate() {
            record.write(&mut writer, ordinal);
        }
        writer.varint(self.bases.len() as u64);
        for base in &self.bases {
            writer.raw(&base.content_id);
            writer.text(&base.name);
        }
        writer.varint(self.provenance.len() as u64);
        for (key, value) in &self.provenance {
            writer.text(key);
            writer.text(value);
        }
        writer
    }

    /// The stored index and the preamble of a file in which it follows `index_offset` bytes.
    ///
    /// Panics where some files have a BLAKE3 digest and others do not.
    pub fn write(&self, index_offset: u64) -> (Preamble, Vec<u8>) {
        let is_alike = |file: &FileEntry| file.decoded_blake3.is_some() == self.has_tree_digests();
        assert!(self.files.iter().all(is_alike), "the feature bit speaks for all files");
        let fields = self.write_fields().into_bytes();
        let mut encoder = flate2::write::DeflateEncoder::new(Vec::new(), flate2::Compression::best());
        encoder.write_all(&fields).expect("a vector takes every byte");
        let stored = encoder.finish().expect("a vector takes every byte");
        let preamble = Preamble {
            required_features: self.required_features(),
            file_bytes: index_offset + stored.len() as u64,
            index_offset,
            index_inflated_bytes: fields.len() as u64,
            index_crc: crc32c(&stored),
        };
        (preamble, stored)
    }
}

fn inflate(stored: &[u8], length: u64) -> Result<Vec<u8>, FormatError> {
    let invalid = |found: String| FormatError::Invalid {
        section: SECTION,
        field: "deflate stream",
        offset: 0,
        found,
        expected: format!("{length} bytes after inflation"),
    };
    // The preamble has bounded `length` by what a stream of this size can expand to. One byte more shows a longer stream.
    let mut bytes = Vec::with_capacity(length as usize + 1);
    let mut inflater = Decompress::new(false);
    let status = inflater.decompress_vec(stored, &mut bytes, FlushDecompress::Finish);
    let status = status.map_err(|error| invalid(error.to_string()))?;
    if bytes.len() as u64 > length {
        return Err(invalid("more bytes".into()));
    }
    if status != Status::StreamEnd {
        return Err(invalid(format!("{} bytes and no end of the stream", bytes.len())));
    }
    if bytes.len() as u64 != length {
        return Err(invalid(format!("{} bytes", bytes.len())));
    }
    if inflater.total_in() != stored.len() as u64 {
        return Err(invalid(format!("{} bytes after the stream's end", stored.len() as u64 - inflater.total_in())));
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::super::record::{PartEntry, RecordEntry};
    use super::*;
    use proptest::prelude::*;

    pub(super) fn sample() -> Index {
        let record = |layer, reference| RecordEntry {
            layer,
            block_type: 1,
            reference,
            side_bytes: 40,
            side_crc: 99,
            parts: vec![PartEntry { file: 0, tensor: 3, body_bytes: 1000 }],
        };
        Index {
            architecture: "bert".into(),
            layers: 2,
            keyframe_interval: 4,
            content_id: [7; 32],
            files: vec![FileEntry {
                name: "model.safetensors".into(),
                header: vec![1, 2, 3],
                decoded_sha256: [1; 32],
                source_sha256: [2; 32],
                decoded_blake3: None,
            }],
            tables: vec![Table { codes: vec![0, 1], frequencies: vec![4000, 96], point_offsets: vec![] }],
            codebooks: vec![],
            networks: vec![],
            block_types: vec!["global".into(), "ffn".into()],
            records: vec![record(Some(0), None), record(Some(1), Some(0))],
            bases: vec![],
            has_units: false,
            has_predictors: false,
            has_column_scales: false,
            provenance: vec![("tool".into(), "mcwcfs".into())],
        }
    }

    #[test]
    fn an_index_comes_back() {
        let index = sample();
        let (preamble, stored) = index.write(5000);
        assert_eq!(Index::parse(&stored, &preamble), Ok(index));
    }

    #[test]
    fn tree_digests_are_announced_by_their_feature_bit() {
        let mut index = sample();
        assert_eq!(index.write(5000).0.required_features, 0);
        index.files[0].decoded_blake3 = Some([3; 32]);
        let (preamble, stored) = index.write(5000);
        assert_eq!(preamble.required_features, FEATURE_TREE_DIGESTS);
        assert_eq!(Index::parse(&stored, &preamble), Ok(index));
        let unannounced = Preamble { required_features: 0, ..preamble };
        assert!(Index::parse(&stored, &unannounced).is_err(), "the digest would be read as something else");
    }

    #[test]
    fn an_index_with_codebooks_units_and_column_scales_comes_back_and_needs_their_features() {
        let codebook = StoredCodebook { elements: 2, index_bits: 1, values: vec![0x3c00, 0, 0, 0x3c00] };
        let index = Index { codebooks: vec![codebook], has_units: true, has_column_scales: true, ..sample() };
        let (preamble, stored) = index.write(5000);
        assert_eq!(preamble.required_features, FEATURE_CODEBOOKS | FEATURE_UNITS | FEATURE_COLUMN_SCALES);
        assert_eq!(Index::parse(&stored, &preamble), Ok(index));
    }

    #[test]
    fn bases_are_announced_by_their_feature_bit() {
        let mut index = sample();
        index.bases = vec![BaseReference { content_id: [5; 32], name: "base.mcwc".into() }];
        let (preamble, stored) = index.write(5000);
        assert_eq!(preamble.required_features, FEATURE_BASES);
        assert_eq!(Index::parse(&stored, &preamble), Ok(index));
        let unannounced = Preamble { required_features: 0, ..preamble };
        let error = Index::parse(&stored, &unannounced).expect_err("an older reader would not have refused it");
        assert!(error.to_string().contains("bases"), "{error}");
        let (preamble, stored) = sample().write(5000);
        let announced = Preamble { required_features: FEATURE_BASES, ..preamble };
        Index::parse(&stored, &announced).expect_err("there are none");
    }

    #[test]
    fn bytes_after_the_deflate_stream_are_an_error() {
        let (mut preamble, mut stored) = sample().write(5000);
        stored.push(0);
        preamble.index_crc = crc32c::crc32c(&stored);
        assert!(Index::parse(&stored, &preamble).is_err());
    }

    #[test]
    fn a_deflate_stream_without_an_end_is_an_error() {
        let fields = sample().write_fields().into_bytes();
        let (mut preamble, _) = sample().write(5000);
        // One stored block that does not say it is the last: every byte is there, the end is not.
        let mut stored = vec![0];
        stored.extend((fields.len() as u16).to_le_bytes());
        stored.extend((!(fields.len() as u16)).to_le_bytes());
        stored.extend(&fields);
        preamble.index_crc = crc32c::crc32c(&stored);
        let error = Index::parse(&stored, &preamble).expect_err("the stream goes on");
        assert!(error.to_string().contains("no end of the stream"), "{error}");
        stored[0] = 1;
        preamble.index_crc = crc32c::crc32c(&stored);
        assert_eq!(Index::parse(&stored, &preamble), Ok(sample()));
    }

    #[test]
    fn a_record_of_a_layer_past_the_last_is_an_error() {
        let mut index = sample();
        index.layers = 1;
        let (preamble, stored) = index.write(5000);
        let error = Index::parse(&stored, &preamble).expect_err("there is layer 0 only");
        assert!(error.to_string().contains("record layer"), "{error}");
    }

    #[test]
    fn two_files_of_one_name_are_an_error() {
        let mut index = sample();
        index.files.push(index.files[0].clone());
        let (preamble, stored) = index.write(5000);
        assert!(Index::parse(&stored, &preamble).expect_err("which is it?").to_string().contains("again"));
    }

    #[test]
    fn a_file_name_with_a_directory_is_an_error() {
        let mut index = sample();
        index.files[0].name = "../model.safetensors".into();
        let (preamble, stored) = index.write(5000);
        let error = Index::parse(&stored, &preamble).expect_err("it would leave the directory");
        assert!(error.to_string().contains("file name"), "{error}");
    }

    proptest! {
        #[test]
        fn damaged_fields_are_errors_or_another_index_never_a_panic(position: prop::sample::Index, value: u8) {
            let mut fields = sample().write_fields().into_bytes();
            let position = position.index(fields.len());
            fields[position] = value;
            let _ = Index::parse_fields(&mut Reader::new(SECTION, &fields), FEATURE_BASES);
        }
    }
}
