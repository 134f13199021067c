//! What can be wrong with bytes that should be an archive.

/// A structure of the archive is not what `SPEC.md` allows. Offsets count from the start of the named section.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FormatError {
    /// The bytes end before the field does.
    #[error("{section}: {field} at byte {offset}: needs {needed} bytes, {left} left")]
    Truncated {
        /// Preamble, index, or side information.
        section: &'static str,
        /// Name of the field in `SPEC.md`.
        field: &'static str,
        /// Where the field starts.
        offset: u64,
        /// Bytes the field needs.
        needed: u64,
        /// Bytes that are left.
        left: u64,
    },
    /// A count or size is larger than the format allows or than the file can hold.
    #[error("{section}: {field} at byte {offset}: {value} is more than the limit of {limit}")]
    TooLarge {
        /// Preamble, index, or side information.
        section: &'static str,
        /// Name of the field in `SPEC.md`.
        field: &'static str,
        /// Where the field starts.
        offset: u64,
        /// What the field says.
        value: u64,
        /// The most it may say.
        limit: u64,
    },
    /// A field has a value that means nothing.
    #[error("{section}: {field} at byte {offset}: found {found}, expected {expected}")]
    Invalid {
        /// Preamble, index, or side information.
        section: &'static str,
        /// Name of the field in `SPEC.md`.
        field: &'static str,
        /// Where the field starts.
        offset: u64,
        /// What is there.
        found: String,
        /// What may be there.
        expected: String,
    },
    /// The archive needs something that this version does not know.
    #[error("needs {feature}, which this version of mcwcfs does not know: use a newer one")]
    UnknownFeature {
        /// The feature, or its bit number.
        feature: String,
    },
    /// A checksum does not match its bytes.
    #[error("{section}: CRC-32C is {found:#010x}, expected {expected:#010x}: the archive is damaged")]
    Checksum {
        /// What the checksum covers.
        section: &'static str,
        /// Checksum of the bytes as read.
        found: u32,
        /// Checksum that the archive states.
        expected: u32,
    },
}
