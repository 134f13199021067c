//! Extended attributes of archived files (contract lines 1 and 11): what a reader may want to know without decoding.

use std::ffi::OsStr;

use super::tree::Archived;
use crate::hexadecimal::hex;

/// SHA-256 of the bytes that the file reads as, in hexadecimal.
const SHA256: &str = "user.mcwc.sha256";
/// SHA-256 of the file that was packed, in hexadecimal.
const SOURCE_SHA256: &str = "user.mcwc.source_sha256";
/// Stored bits per parameter, over the whole archive.
const BITS_PER_PARAMETER: &str = "user.mcwc.bpp";
/// `true` if any byte may differ from the file that was packed, else `false`.
const LOSSY: &str = "user.mcwc.lossy";
/// Length of the `.mcwc` file: what the checkpoint takes on disk.
const STORED_BYTES: &str = "user.mcwc.stored_bytes";

pub(super) const NAMES: [&str; 5] = [SHA256, SOURCE_SHA256, BITS_PER_PARAMETER, LOSSY, STORED_BYTES];

/// The value of the attribute, or `None` if there is none of that name.
pub(super) fn value(archived: &Archived, name: &OsStr) -> Option<String> {
    let (checkpoint, file) = (archived.checkpoint(), archived.file());
    match name.to_str()? {
        SHA256 => Some(hex(&file.decoded_sha256)),
        SOURCE_SHA256 => Some(hex(&file.source_sha256)),
        BITS_PER_PARAMETER => bits_per_parameter(checkpoint.stored_bytes(), checkpoint.parameters()),
        LOSSY => Some(checkpoint.is_lossy().to_string()),
        STORED_BYTES => Some(checkpoint.stored_bytes().to_string()),
        _ => None,
    }
}

/// `None` for a checkpoint without parameters, of which there is nothing to say.
fn bits_per_parameter(stored_bytes: u64, parameters: u64) -> Option<String> {
    (parameters > 0).then(|| format!("{:.4}", stored_bytes as f64 * 8.0 / parameters as f64))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bits_per_parameter_counts_the_whole_archive() {
        assert_eq!(bits_per_parameter(1_000, 2_000).as_deref(), Some("4.0000"));
        assert_eq!(bits_per_parameter(1_000, 0), None);
    }
}
