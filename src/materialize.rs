//! Any byte range of any mounted file, from an opened archive, an engine and the cache.

use std::sync::Arc;

use crate::archive::{Archive, ArchiveError};

/// Which engine decodes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum EngineChoice {
    /// The fastest this machine has.
    #[default]
    Auto,
    /// The portable reference decoder.
    Reference,
}

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
}

/// Decodes on demand, remembering what it decoded. Shared by all archives of a mount; every method takes `&self`.
#[derive(Debug)]
pub struct Materializer {
    #[allow(dead_code)]
    options: MaterializeOptions,
}

impl Materializer {
    /// Starts with an empty cache.
    pub fn new(options: MaterializeOptions) -> Self {
        Self { options }
    }

    /// Fills `out` with the bytes of file `file` of `archive` from `offset_bytes` on; returns how many bytes that was,
    /// less than `out.len()` only where the file ends. Blocks while decoding.
    pub fn read(
        &self,
        archive: &Arc<Archive>,
        file: usize,
        offset_bytes: u64,
        out: &mut [u8],
    ) -> Result<usize, MaterializeError> {
        let _ = (archive, file, offset_bytes, out);
        Ok(0)
    }
}
