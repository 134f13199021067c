//! Safetensors files taken as an archive of raw parts, without packing them: what a checkpoint must look like to be a base.

use std::fs::File;
use std::io::{BufReader, Read};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};

use super::{Archive, ArchiveError, Contents, Storage, content_id};
use crate::format::bytes::crc32c;
use crate::format::index::{FileEntry, Index};
use crate::format::limits::RAW_STRIP_BYTES;
use crate::format::part::{Coding, PartHeader, PartHeaderBytes};
use crate::format::record::{PartEntry, RecordEntry, SideInformation};
use crate::safetensors::Header;

/// The files that raw parts are read from.
#[derive(Debug)]
pub(super) struct PlainFiles {
    /// Each with the length of its header.
    pub(super) files: Vec<(File, u64)>,
    /// One record per file.
    pub(super) sides: Vec<SideInformation>,
}

impl Archive {
    /// Takes safetensors files as they are for an archive that lies at `path`. Reads them from first to last byte, for their
    /// digests and the checksums of what will be served as strips.
    ///
    /// # Errors
    /// When a file cannot be read or is no safetensors file.
    pub fn of_plain_files(path: &Path, files: &[PathBuf]) -> Result<Self, ArchiveError> {
        let (mut entries, mut records, mut sides, mut opened) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
        for (number, file_path) in files.iter().enumerate() {
            let plain = read_plain(file_path)?;
            let parts = plain.header.tensors.iter().enumerate();
            records.push(RecordEntry {
                layer: None,
                block_type: 0,
                reference: None,
                side_bytes: 0,
                side_crc: 0,
                parts: parts
                    .map(|(tensor, info)| PartEntry {
                        file: number as u32,
                        tensor: tensor as u32,
                        body_bytes: info.length_bytes,
                    })
                    .collect(),
            });
            entries.push(FileEntry {
                name: file_path.file_name().unwrap_or_default().to_string_lossy().into_owned(),
                header: plain.header.bytes.clone(),
                decoded_sha256: plain.sha256,
                source_sha256: plain.sha256,
                decoded_blake3: None,
            });
            sides.push(SideInformation { permutation: None, parts: plain.parts, permutation_bytes: 0 });
            opened.push((plain.file, plain.header.bytes.len() as u64));
        }
        let index = Index {
            architecture: "unknown".into(),
            layers: 0,
            keyframe_interval: 1,
            content_id: content_id(entries.iter().map(|entry| entry.decoded_sha256)),
            files: entries,
            tables: Vec::new(),
            codebooks: Vec::new(),
            networks: Vec::new(),
            block_types: vec!["plain".into()],
            records,
            bases: Vec::new(),
            has_units: false,
            has_predictors: false,
            has_column_scales: false,
            provenance: Vec::new(),
        };
        let storage = Storage::Plain(PlainFiles { files: opened, sides });
        Self::from_contents(path, Contents { storage, index, records_start: 0, index_stored_bytes: 0 })
    }
}

/// One file, read through.
struct Plain {
    file: File,
    header: Header,
    sha256: [u8; 32],
    /// Raw parts, in the order of the tensors.
    parts: Vec<PartHeader>,
}

fn read_plain(path: &Path) -> Result<Plain, ArchiveError> {
    let io = |source| ArchiveError::Io { path: path.to_owned(), source };
    let name = || path.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let file = File::open(path).map_err(io)?;
    let length = file.metadata().map_err(io)?.len();
    let header = Header::read_from(&file, length).map_err(|error| ArchiveError::Header {
        path: path.to_owned(),
        file: name(),
        error,
    })?;
    let mut hash = Sha256::new_with_prefix(&header.bytes);
    let mut reader = BufReader::with_capacity(1 << 20, At { file: &file, offset: header.bytes.len() as u64 });
    let mut parts = Vec::with_capacity(header.tensors.len());
    let mut strip = vec![0; RAW_STRIP_BYTES as usize];
    for tensor in &header.tensors {
        let mut strip_crcs = Vec::new();
        let mut left = tensor.length_bytes;
        while left > 0 {
            let strip = &mut strip[..RAW_STRIP_BYTES.min(left) as usize];
            reader.read_exact(strip).map_err(io)?;
            hash.update(&*strip);
            strip_crcs.push(crc32c(strip));
            left -= strip.len() as u64;
        }
        parts.push(PartHeader { coding: Coding::Raw, streams: None, strip_crcs, cost: PartHeaderBytes::default() });
    }
    Ok(Plain { sha256: hash.finalize().into(), file, header, parts })
}

/// A file read from a place on.
struct At<'a> {
    file: &'a File,
    offset: u64,
}

impl Read for At<'_> {
    fn read(&mut self, out: &mut [u8]) -> std::io::Result<usize> {
        let length = self.file.read_at(out, self.offset)?;
        self.offset += length as u64;
        Ok(length)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::archive::PartAddress;

    #[test]
    fn a_checkpoint_is_an_archive_of_its_own_bytes() {
        let scratch = tempfile::tempdir().expect("a directory");
        let json = br#"{"a":{"dtype":"U8","shape":[5],"data_offsets":[0,5]}}"#;
        let bytes = [&(json.len() as u64).to_le_bytes(), &json[..], b"weigh"].concat();
        let path = scratch.path().join("model.safetensors");
        std::fs::write(&path, &bytes).expect("a file");
        let archive = Archive::of_plain_files(scratch.path(), std::slice::from_ref(&path)).expect("a checkpoint");
        assert_eq!(archive.files()[0].decoded_sha256, <[u8; 32]>::from(Sha256::digest(&bytes)));
        let mut body = [0; 3];
        archive.read_body(PartAddress { record: 0, part: 0 }, 1, &mut body).expect("the tensor");
        assert_eq!(&body, b"eig");
        std::fs::write(&path, &bytes[..40]).expect("a file");
        Archive::of_plain_files(scratch.path(), &[path]).expect_err("its header is cut off");
    }
}
