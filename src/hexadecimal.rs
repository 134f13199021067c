//! Bytes as people read them: digests, identities.

use std::fmt::Write;

/// Lower-case hexadecimal, as sha256sum prints it.
///
/// ```
/// assert_eq!(mcwcfs::hexadecimal::hex(&[0x0a, 0xff, 0x00]), "0aff00");
/// ```
pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::with_capacity(2 * bytes.len()), |mut text, byte| {
        write!(text, "{byte:02x}").expect("a String takes all that is written to it");
        text
    })
}
