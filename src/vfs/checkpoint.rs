//! What the file system needs of an opened archive.

use std::sync::Arc;

use crate::archive::{Archive, ArchivedFile};
use crate::materialize::Materializer;

pub use crate::materialize::{Decoded, Keeper};

/// Why an archive cannot be opened or decoded. Opaque here: it is logged, and the reader gets an I/O error.
pub type BoxError = Box<dyn std::error::Error + Send + Sync>;

/// The files of one archive and their bytes: [`DecodedArchive`] in a mount, bytes in memory in tests.
pub trait Checkpoint: Send + Sync + std::fmt::Debug {
    /// Names the decoded content: equal archives of equal weights share it.
    fn content_id(&self) -> [u8; 32];

    /// Length of the `.mcwc` file in bytes.
    fn stored_bytes(&self) -> u64;

    /// Elements over all tensors.
    fn parameters(&self) -> u64;

    /// Whether any decoded byte may differ from the source.
    fn is_lossy(&self) -> bool;

    /// The safetensors files it holds.
    fn files(&self) -> &[ArchivedFile];

    /// Whether all that it is decoded from beside its own file is still there.
    fn is_complete(&self) -> bool {
        true
    }

    /// Fills `out` with the bytes of file `file` from `offset_bytes` on; returns how many that was. Blocks while decoding.
    ///
    /// # Errors
    /// With a message that names the archive, the tensor and the record.
    fn read(&self, file: usize, offset_bytes: u64, keeper: Keeper, out: &mut [u8]) -> Result<usize, BoxError>;

    /// Decodes `length_bytes` of file `file` from `offset_bytes` on when nothing else is to be done, for readers that keep
    /// them or not, and returns when reading them takes no decoding any more; does nothing where that cannot be had.
    fn decode_ahead(&self, file: usize, offset_bytes: u64, length_bytes: u64, keeper: Keeper);

    /// The bytes `offset_bytes..offset_bytes + length` of file `file`, which has them, where they have been decoded already
    /// and lie side by side; waits where they are being decoded so. `None` means that [`read`](Self::read) must be asked.
    fn decoded(&self, _file: usize, _offset_bytes: u64, _length: usize) -> Option<Decoded> {
        None
    }

    /// [`decoded`](Self::decoded) where that takes no time at all.
    fn decoded_already(&self, _file: usize, _offset_bytes: u64, _length: usize) -> Option<Decoded> {
        None
    }
}

/// An archive and what decodes it.
#[derive(Debug)]
pub struct DecodedArchive {
    archive: Arc<Archive>,
    materializer: Arc<Materializer>,
}

impl DecodedArchive {
    /// The files of `archive`, decoded by `materializer`, which all archives of a mount share.
    pub fn new(archive: Arc<Archive>, materializer: Arc<Materializer>) -> Self {
        Self { archive, materializer }
    }
}

impl Checkpoint for DecodedArchive {
    fn content_id(&self) -> [u8; 32] {
        self.archive.content_id()
    }

    fn stored_bytes(&self) -> u64 {
        self.archive.stored_bytes()
    }

    fn parameters(&self) -> u64 {
        self.archive.parameters()
    }

    fn is_lossy(&self) -> bool {
        self.archive.is_lossy()
    }

    fn files(&self) -> &[ArchivedFile] {
        self.archive.files()
    }

    fn is_complete(&self) -> bool {
        self.archive.bases().iter().all(|base| base.is_still_there())
    }

    fn read(&self, file: usize, offset_bytes: u64, keeper: Keeper, out: &mut [u8]) -> Result<usize, BoxError> {
        Ok(self.materializer.read_for(keeper, &self.archive, file, offset_bytes, out)?)
    }

    fn decode_ahead(&self, file: usize, offset_bytes: u64, length_bytes: u64, keeper: Keeper) {
        self.materializer.decode_ahead(keeper, &self.archive, file, offset_bytes, length_bytes);
    }

    fn decoded(&self, file: usize, offset_bytes: u64, length: usize) -> Option<Decoded> {
        self.materializer.decoded(&self.archive, file, offset_bytes, length)
    }

    fn decoded_already(&self, file: usize, offset_bytes: u64, length: usize) -> Option<Decoded> {
        self.materializer.decoded_already(&self.archive, file, offset_bytes, length)
    }
}
