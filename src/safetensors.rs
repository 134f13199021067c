//! Safetensors headers, shards with their index JSON, and the model description (`config.json`) beside them.
//!
//! Everything here reads bytes that others wrote: each length is checked before it is believed, and an error names the
//! tensor, the field and what was expected. The tensors' data is not looked at: that is [`crate::pack::source`] when
//! packing and [`crate::materialize`] when serving. This room alone reads JSON of checkpoints.

mod config;
mod header;
mod shards;
mod writer;

pub use config::ModelConfig;
pub use header::{Header, MAX_HEADER_BYTES};
pub use shards::ShardIndex;
pub use writer::{NewTensor, write_file};

/// Why a header, an index or a model description cannot be used.
///
/// The caller adds the file's path: this room reads bytes.
#[derive(Debug, thiserror::Error)]
pub enum SafetensorsError {
    /// Reading failed.
    #[error("reading the header: {0}")]
    Io(#[from] std::io::Error),
    /// Fewer bytes than a field needs.
    #[error("{field}: needs {needed} bytes, the file has {left} there")]
    Truncated {
        /// What was being read.
        field: &'static str,
        /// Bytes it needs.
        needed: u64,
        /// Bytes there are.
        left: u64,
    },
    /// The header, or another JSON file, is longer than anyone's.
    #[error("{field}: {length} bytes, expected at most {limit}")]
    TooLong {
        /// Which length.
        field: &'static str,
        /// What it claims.
        length: u64,
        /// The limit of the format.
        limit: u64,
    },
    /// The bytes are not the JSON that was expected; the message names the tensor and the field.
    #[error("{what}: {source}")]
    Json {
        /// Which JSON.
        what: &'static str,
        /// What the parser said, with line and column.
        source: serde_json::Error,
    },
    /// One tensor's description contradicts itself, its neighbours or the file.
    #[error("tensor `{tensor}`: {field}: {problem}")]
    Tensor {
        /// Name of the tensor.
        tensor: String,
        /// Field of its description.
        field: &'static str,
        /// What was found, and what was expected.
        problem: String,
    },
    /// The file is longer or shorter than its header says.
    #[error("file length: {found} bytes, expected {expected} (header {header}, data {data})")]
    FileLength {
        /// Length of the file.
        found: u64,
        /// Sum of the two parts.
        expected: u64,
        /// Bytes of the header with its length field.
        header: u64,
        /// Bytes of the data section.
        data: u64,
    },
    /// An index names a shard that is not a plain file name.
    #[error("weight_map: tensor `{tensor}`: shard `{shard}`: expected a file name without directories")]
    ShardName {
        /// The tensor that the index places there.
        tensor: String,
        /// The name as found.
        shard: String,
    },
    /// The safetensors crate refused to write a file.
    #[error("writing: {0}")]
    Write(String),
}
