//! An opened archive: its index, checked against the safetensors headers it carries, and its records' bytes on request.
//!
//! Reads with `pread`: an I/O error must be an error of one read, not a SIGBUS of the daemon. Nothing is decoded here.

mod bases;
mod plain;

use std::ffi::OsStr;
use std::fs::File;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use sha2::{Digest, Sha256};

use crate::codec::entropy::CodingTable;
use crate::codec::predictor::network::Network;
use crate::codec::vector_quantizer::Codebook;
use crate::format::FormatError;
use crate::format::difference::BaseTensor;
use crate::format::index::Index;
use crate::format::part::Coding;
use crate::format::preamble::{PREAMBLE_BYTES, Preamble};
use crate::format::record::{RecordEntry, SideInformation};
use crate::hexadecimal::hex;
use crate::safetensors::{Header, SafetensorsError};
use crate::tensor::{TensorInfo, total_elements};
use plain::PlainFiles;

pub use bases::{Bases, Place};

/// What names begin with while their files are being written, and after a run that was killed: no part of any tree.
pub const UNFINISHED_PREFIX: &str = ".mcwc-pack-";

/// Whether a file of this name is one that is still being written, or that was left behind by a run that was killed.
pub fn is_unfinished_name(name: &OsStr) -> bool {
    name.as_bytes().starts_with(UNFINISHED_PREFIX.as_bytes())
}

/// Whether a file of this name is a finished archive.
pub fn is_archive_name(name: &OsStr) -> bool {
    !is_unfinished_name(name) && Path::new(name).extension().is_some_and(|extension| extension == "mcwc")
}

/// Why an archive cannot be opened or read.
#[derive(Debug, thiserror::Error)]
pub enum ArchiveError {
    /// The operating system refused.
    #[error("{path}: {source}")]
    Io {
        /// The archive.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// A structure of the archive is not what the format allows.
    #[error("{path}: {error}")]
    Format {
        /// The archive.
        path: PathBuf,
        /// What is wrong.
        error: FormatError,
    },
    /// A safetensors header in the index is not valid.
    #[error("{path}: header of {file}: {error}")]
    Header {
        /// The archive.
        path: PathBuf,
        /// The safetensors file inside it.
        file: String,
        /// What is wrong.
        error: SafetensorsError,
    },
    /// A base that the archive starts from was not found.
    #[error(
        "{path}: needs the base {name} (content id {content_id}), which no archive in {} decodes to: --base-path names another \
         place, and a base that is a plain checkpoint must be packed too, losslessly",
        display_all(places)
    )]
    BaseMissing {
        /// The archive.
        path: PathBuf,
        /// Where the base was when the archive was packed.
        name: String,
        /// What names its content.
        content_id: String,
        /// Where it was looked for.
        places: Vec<PathBuf>,
    },
    /// Two structures contradict each other.
    #[error("{path}: {field}: found {found}, expected {expected}")]
    Inconsistent {
        /// The archive.
        path: PathBuf,
        /// Name of the field in `SPEC.md`.
        field: &'static str,
        /// What it says.
        found: String,
        /// What would fit.
        expected: String,
    },
}

/// One safetensors file inside an archive, as the mount shows it.
#[derive(Clone, Debug)]
pub struct ArchivedFile {
    /// File name without directories, for example `model-00001-of-00002.safetensors`.
    pub name: String,
    /// The original's first bytes: 8-byte length and JSON header, exactly.
    pub header: Vec<u8>,
    /// Tensors in the order of their data.
    pub tensors: Vec<TensorInfo>,
    /// Length of the whole file in bytes: header and data.
    pub length_bytes: u64,
    /// SHA-256 of the bytes that the mount serves.
    pub decoded_sha256: [u8; 32],
    /// SHA-256 of the file that was packed. Equal to `decoded_sha256` when everything is bit-exact.
    pub source_sha256: [u8; 32],
}

/// Where a tensor is coded.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct PartAddress {
    /// Record, counted in the index.
    pub record: u32,
    /// Part of that record.
    pub part: u32,
}

/// An opened archive.
#[derive(Debug)]
pub struct Archive {
    path: PathBuf,
    storage: Storage,
    instance: u64,
    stored_bytes: u64,
    index_stored_bytes: u64,
    index: Index,
    files: Vec<ArchivedFile>,
    tables: Vec<Arc<CodingTable>>,
    codebooks: Vec<Arc<Codebook>>,
    networks: Vec<Arc<Network>>,
    /// First byte of each record.
    record_offsets: Vec<u64>,
    /// Whether a later record is predicted from it.
    referenced: Vec<bool>,
    /// Per file, per tensor.
    addresses: Vec<Vec<PartAddress>>,
    /// What parts start from: as many as the index lists, or none before they are attached.
    bases: Vec<Arc<Archive>>,
}

/// Where the bytes of records lie.
#[derive(Debug)]
enum Storage {
    /// In a `.mcwc` file.
    Packed(File),
    /// In safetensors files, as they are.
    Plain(PlainFiles),
}

/// What an archive is made of.
struct Contents {
    storage: Storage,
    index: Index,
    records_start: u64,
    index_stored_bytes: u64,
}

impl Archive {
    /// Opens and checks preamble, index and headers; decodes nothing.
    pub fn open(path: &Path) -> Result<Self, ArchiveError> {
        let io = |source| ArchiveError::Io { path: path.to_owned(), source };
        let format = |error| ArchiveError::Format { path: path.to_owned(), error };
        let file = File::open(path).map_err(io)?;
        let metadata = file.metadata().map_err(io)?;
        if metadata.is_dir() {
            let reason = "is a directory, expected an archive: name the .mcwc file in it";
            return Err(io(std::io::Error::new(std::io::ErrorKind::IsADirectory, reason)));
        }
        let stored_bytes = metadata.len();
        let mut preamble = vec![0; PREAMBLE_BYTES.min(stored_bytes) as usize];
        file.read_exact_at(&mut preamble, 0).map_err(io)?;
        let preamble = Preamble::parse(&preamble, stored_bytes).map_err(format)?;
        let index_stored_bytes = stored_bytes - preamble.index_offset;
        let mut stored_index = vec![0; index_stored_bytes as usize]; // as long as the file says it is
        file.read_exact_at(&mut stored_index, preamble.index_offset).map_err(io)?;
        let index = Index::parse(&stored_index, &preamble).map_err(format)?;
        let storage = Storage::Packed(file);
        let archive =
            Self::from_contents(path, Contents { storage, index, records_start: PREAMBLE_BYTES, index_stored_bytes })?;
        let end = archive.stored_bytes - index_stored_bytes;
        if end != preamble.index_offset {
            return Err(ArchiveError::Inconsistent {
                path: path.to_owned(),
                field: "record lengths",
                found: format!("an end at byte {end}"),
                expected: format!("{}, where the index starts", preamble.index_offset),
            });
        }
        Ok(archive)
    }

    /// BLAKE3 of a decoded file; `None` for archives made before they had it.
    pub fn decoded_blake3(&self, file: usize) -> Option<[u8; 32]> {
        self.index.files[file].decoded_blake3
    }

    fn from_contents(path: &Path, contents: Contents) -> Result<Self, ArchiveError> {
        let Contents { storage, index, records_start, index_stored_bytes } = contents;
        let inconsistent = |field, found: String, expected: String| ArchiveError::Inconsistent {
            path: path.to_owned(),
            field,
            found,
            expected,
        };
        let files = index
            .files
            .iter()
            .map(|entry| {
                let header = Header::parse(&entry.header).map_err(|error| ArchiveError::Header {
                    path: path.to_owned(),
                    file: entry.name.clone(),
                    error,
                })?;
                Ok(ArchivedFile {
                    name: entry.name.clone(),
                    length_bytes: header.file_bytes(),
                    header: header.bytes,
                    tensors: header.tensors,
                    decoded_sha256: entry.decoded_sha256,
                    source_sha256: entry.source_sha256,
                })
            })
            .collect::<Result<Vec<_>, ArchiveError>>()?;

        let content_id = content_id(files.iter().map(|file| file.decoded_sha256));
        if content_id != index.content_id {
            let expected = format!("{content_id:02x?}, made of the decoded digests");
            return Err(inconsistent("content id", format!("{:02x?}", index.content_id), expected));
        }

        let mut addresses: Vec<Vec<Option<PartAddress>>> =
            files.iter().map(|file| vec![None; file.tensors.len()]).collect();
        let mut record_offsets = Vec::with_capacity(index.records.len());
        let mut referenced = vec![false; index.records.len()];
        let mut offset = records_start;
        for (ordinal, record) in index.records.iter().enumerate() {
            record_offsets.push(offset);
            offset = offset.saturating_add(record.bytes());
            if let Some(reference) = record.reference {
                referenced[reference as usize] = true;
            }
            for (part_ordinal, part) in record.parts.iter().enumerate() {
                let address = PartAddress { record: ordinal as u32, part: part_ordinal as u32 };
                let slot = addresses.get_mut(part.file as usize).and_then(|file| file.get_mut(part.tensor as usize));
                match slot {
                    Some(slot @ None) => *slot = Some(address),
                    Some(Some(_)) => {
                        let found = format!("tensor {} of file {} again", part.tensor, part.file);
                        return Err(inconsistent("part tensor", found, "every tensor once".into()));
                    }
                    None => {
                        let found = format!("tensor {} of file {}", part.tensor, part.file);
                        return Err(inconsistent("part tensor", found, "a tensor of the headers".into()));
                    }
                }
            }
        }
        let addresses = addresses
            .into_iter()
            .zip(&files)
            .map(|(addresses, file)| {
                let complete: Option<Vec<PartAddress>> = addresses.iter().copied().collect();
                complete.ok_or_else(|| {
                    let missing = addresses.iter().position(Option::is_none).unwrap_or(0);
                    let found = format!("no part for {} of {}", file.tensors[missing].name, file.name);
                    inconsistent("part tensor", found, "every tensor once".into())
                })
            })
            .collect::<Result<Vec<_>, _>>()?;

        static NEXT_INSTANCE: AtomicU64 = AtomicU64::new(0);
        Ok(Self {
            path: path.to_owned(),
            storage,
            instance: NEXT_INSTANCE.fetch_add(1, Ordering::Relaxed),
            stored_bytes: offset.saturating_add(index_stored_bytes),
            index_stored_bytes,
            codebooks: index.codebooks.iter().map(|stored| Arc::new(Codebook::of_stored(stored))).collect(),
            networks: index.networks.iter().map(|stored| Arc::new(Network::new(stored.clone()))).collect(),
            tables: index.tables.iter().map(|table| Arc::new(CodingTable::new(table.clone()))).collect(),
            index,
            files,
            record_offsets,
            referenced,
            addresses,
            bases: Vec::new(),
        })
    }

    /// Gives the archive what its parts start from, in the order of its index.
    ///
    /// # Errors
    /// When these are others than the index names.
    pub fn attach_bases(&mut self, bases: Vec<Arc<Self>>) -> Result<(), ArchiveError> {
        let named: Vec<[u8; 32]> = self.index.bases.iter().map(|base| base.content_id).collect();
        let given: Vec<[u8; 32]> = bases.iter().map(|base| base.content_id()).collect();
        if named != given {
            return Err(ArchiveError::Inconsistent {
                path: self.path.clone(),
                field: "base content id",
                found: given.iter().map(|id| hex(id)).collect::<Vec<_>>().join(", "),
                expected: named.iter().map(|id| hex(id)).collect::<Vec<_>>().join(", "),
            });
        }
        self.bases = bases;
        Ok(())
    }

    /// What parts start from; empty where nothing was attached.
    pub fn bases(&self) -> &[Arc<Self>] {
        &self.bases
    }

    /// The base with this number and the place of one of its tensors, if they are there.
    pub fn base_tensor(&self, reference: BaseTensor) -> Option<(&Arc<Self>, PartAddress)> {
        let base = self.bases.get(reference.base as usize)?;
        let address = base.addresses.get(reference.file as usize)?.get(reference.tensor as usize)?;
        Some((base, *address))
    }

    /// The `.mcwc` file; `None` for a checkpoint that was taken as it is.
    fn opened_file(&self) -> Option<&File> {
        match &self.storage {
            Storage::Packed(file) => Some(file),
            Storage::Plain(_) => None,
        }
    }

    /// Where the archive lies.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// A number that no other opened archive of this process has: the name of its bytes in a cache.
    pub fn instance(&self) -> u64 {
        self.instance
    }

    /// The safetensors files it holds.
    pub fn files(&self) -> &[ArchivedFile] {
        &self.files
    }

    /// The index as stored.
    pub fn index(&self) -> &Index {
        &self.index
    }

    /// Length of the stored, deflated index in bytes.
    pub fn index_stored_bytes(&self) -> u64 {
        self.index_stored_bytes
    }

    /// The networks of learned predictors.
    pub fn networks(&self) -> &[Arc<Network>] {
        &self.networks
    }

    /// The codebooks of vectors, ready for look-ups.
    pub fn codebooks(&self) -> &[Arc<Codebook>] {
        &self.codebooks
    }

    /// The entropy tables, ready for coding.
    pub fn tables(&self) -> &[Arc<CodingTable>] {
        &self.tables
    }

    /// SHA-256 that names the decoded content: equal archives of equal weights share it.
    pub fn content_id(&self) -> [u8; 32] {
        self.index.content_id
    }

    /// Length of the `.mcwc` file in bytes.
    pub fn stored_bytes(&self) -> u64 {
        self.stored_bytes
    }

    /// Parameters of the checkpoint: elements over all tensors.
    pub fn parameters(&self) -> u64 {
        total_elements(self.files.iter().flat_map(|file| &file.tensors))
    }

    /// Whether any decoded byte may differ from the source.
    pub fn is_lossy(&self) -> bool {
        self.files.iter().any(|file| file.decoded_sha256 != file.source_sha256)
    }

    /// The record entry in the index.
    pub fn record(&self, record: u32) -> &RecordEntry {
        &self.index.records[record as usize]
    }

    /// Whether a later record is predicted from this one.
    pub fn is_referenced(&self, record: u32) -> bool {
        self.referenced[record as usize]
    }

    /// The name of a record's block type.
    pub fn block_type(&self, record: u32) -> &str {
        &self.index.block_types[usize::from(self.record(record).block_type)]
    }

    /// Where a tensor is coded.
    pub fn address(&self, file: usize, tensor: usize) -> PartAddress {
        self.addresses[file][tensor]
    }

    /// The tensor that a part holds.
    pub fn tensor(&self, address: PartAddress) -> &TensorInfo {
        let part = &self.record(address.record).parts[address.part as usize];
        &self.files[part.file as usize].tensors[part.tensor as usize]
    }

    /// Reads and checks the side information of a record.
    pub fn side_information(&self, record: u32) -> Result<SideInformation, ArchiveError> {
        let entry = self.record(record);
        if let Storage::Plain(plain) = &self.storage {
            return Ok(plain.sides[record as usize].clone());
        }
        // The records' lengths add up to the file's, so this allocation is earned.
        let mut bytes = vec![0; entry.side_bytes as usize];
        self.read_at(&mut bytes, self.record_offsets[record as usize])?;
        let failed = |error| ArchiveError::Format { path: self.path.clone(), error };
        let side = SideInformation::parse(&bytes, entry).map_err(failed)?;
        let has = |is_so: fn(&Coding) -> bool| side.parts.iter().any(|part| is_so(&part.coding));
        for (is_there, is_announced, field, found, feature) in [
            (has(Coding::is_of_units), self.index.has_units, "part coding", "a part of units", 3),
            (has(Coding::has_column_scales), self.index.has_column_scales, "quantizer flags", "column scales", 4),
        ] {
            if is_there && !is_announced {
                return Err(failed(FormatError::Invalid {
                    section: "side information",
                    field,
                    offset: 0,
                    found: found.into(),
                    expected: format!("none without feature {feature}"),
                }));
            }
        }
        Ok(side)
    }

    /// Fills `out` with stored strip bytes of a part, from `offset` on, counted from its first strip.
    ///
    /// The range must lie in the part's body, whose length the index states.
    pub fn read_body(&self, address: PartAddress, offset: u64, out: &mut [u8]) -> Result<(), ArchiveError> {
        let entry = self.record(address.record);
        if let Storage::Plain(plain) = &self.storage {
            let tensor = self.tensor(address);
            let (file, header_bytes) = &plain.files[address.record as usize];
            let io = |source| ArchiveError::Io { path: self.path.clone(), source };
            return file.read_exact_at(out, header_bytes + tensor.offset_bytes + offset).map_err(io);
        }
        let before: u64 = entry.parts[..address.part as usize].iter().map(|part| part.body_bytes).sum();
        self.read_at(out, self.record_offsets[address.record as usize] + entry.side_bytes + before + offset)
    }

    fn read_at(&self, out: &mut [u8], offset: u64) -> Result<(), ArchiveError> {
        let io = |source| ArchiveError::Io { path: self.path.clone(), source };
        let Storage::Packed(file) = &self.storage else { unreachable!("plain files are read tensor by tensor") };
        file.read_exact_at(out, offset).map_err(io)
    }
}

fn display_all(places: &[PathBuf]) -> String {
    places.iter().map(|place| place.display().to_string()).collect::<Vec<_>>().join(", ")
}

/// The identity of decoded content: SHA-256 over the SHA-256 of every file, in order.
pub fn content_id(decoded_digests: impl Iterator<Item = [u8; 32]>) -> [u8; 32] {
    let mut hash = Sha256::new();
    for digest in decoded_digests {
        hash.update(digest);
    }
    hash.finalize().into()
}
