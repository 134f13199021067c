//! The first 64 bytes: what the file is, how long it is, and where its index lies (SPEC.md section 2; Eqs. 51-52).

use super::bytes::{Reader, Writer, crc32c};
use super::error::FormatError;
use super::limits;

/// Length of the preamble in bytes.
pub const PREAMBLE_BYTES: u64 = 64;
/// The first four bytes of every archive.
pub const MAGIC: [u8; 4] = *b"MCWC";
/// The version this crate writes and the newest it reads.
pub const VERSION: u16 = 1;
/// Feature: the index has a BLAKE3 digest of every decoded file.
pub const FEATURE_TREE_DIGESTS: u64 = 1 << 0;
/// Feature: the index has codebooks, which parts of vectors refer to.
pub const FEATURE_CODEBOOKS: u64 = 1 << 1;
/// Feature: the index lists bases, archives that parts start from.
pub const FEATURE_BASES: u64 = 1 << 2;
/// Feature: there are parts of units.
pub const FEATURE_UNITS: u64 = 1 << 3;
/// Feature: there are quantized parts whose columns have scales.
pub const FEATURE_COLUMN_SCALES: u64 = 1 << 4;
/// Feature: there are motion vectors and learned predictors; the index has the networks of the latter.
pub const FEATURE_PREDICTORS: u64 = 1 << 5;
/// Feature bits this crate knows (SPEC.md section 10).
pub const KNOWN_FEATURES: u64 = FEATURE_TREE_DIGESTS
    | FEATURE_CODEBOOKS
    | FEATURE_BASES
    | FEATURE_UNITS
    | FEATURE_COLUMN_SCALES
    | FEATURE_PREDICTORS;

const SECTION: &str = "preamble";

/// The preamble's content.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Preamble {
    /// One bit per feature that a reader must know to decode this archive.
    pub required_features: u64,
    /// Length of the whole file in bytes.
    pub file_bytes: u64,
    /// Where the stored index starts; it ends with the file.
    pub index_offset: u64,
    /// Length of the index after inflation.
    pub index_inflated_bytes: u64,
    /// CRC-32C of the stored index.
    pub index_crc: u32,
}

impl Preamble {
    /// Reads the preamble of a file that is `file_bytes` long.
    pub fn parse(bytes: &[u8], file_bytes: u64) -> Result<Self, FormatError> {
        let mut reader = Reader::new(SECTION, bytes);
        let magic = reader.take("magic", 4)?;
        if magic != MAGIC {
            return Err(reader.invalid(
                "magic",
                0,
                format!("{magic:02x?}"),
                "the four bytes MCWC: not a .mcwc archive",
            ));
        }
        let version = reader.u16("version")?;
        if version != VERSION {
            return Err(FormatError::UnknownFeature { feature: format!("version {version} of the .mcwc format") });
        }
        let flags = reader.u16("flags")?;
        if flags != 0 {
            return Err(reader.invalid("flags", 6, flags, 0));
        }
        let required_features = reader.u64("required features")?;
        let stated_bytes = reader.u64("file length")?;
        let index_offset = reader.u64("index offset")?;
        let index_inflated_bytes = reader.u64("index length")?;
        let index_crc = reader.u32("index checksum")?;
        let reserved = reader.take("reserved", 16)?;
        if reserved.iter().any(|&byte| byte != 0) {
            return Err(reader.invalid("reserved", 44, format!("{reserved:02x?}"), "zeros"));
        }
        let expected = reader.u32("preamble checksum")?;
        let found = crc32c(&bytes[..60]);
        if found != expected {
            return Err(FormatError::Checksum { section: SECTION, found, expected });
        }
        let unknown = required_features & !KNOWN_FEATURES;
        if unknown != 0 {
            return Err(FormatError::UnknownFeature { feature: format!("feature bit {}", unknown.trailing_zeros()) });
        }
        if stated_bytes != file_bytes {
            let expected = format!("the length of the file, {file_bytes}: the archive is cut off or has grown");
            return Err(reader.invalid("file length", 16, stated_bytes, expected));
        }
        if index_offset < PREAMBLE_BYTES || index_offset > file_bytes {
            return Err(reader.invalid("index offset", 24, index_offset, format!("{PREAMBLE_BYTES} to {file_bytes}")));
        }
        let (value, limit) = (file_bytes - index_offset, limits::STORED_INDEX_BYTES);
        if value > limit {
            return Err(FormatError::TooLarge { section: SECTION, field: "stored index", offset: 24, value, limit });
        }
        let limit = limits::INDEX_BYTES.min((file_bytes - index_offset).saturating_mul(limits::DEFLATE_RATIO));
        if index_inflated_bytes > limit {
            let value = index_inflated_bytes;
            return Err(FormatError::TooLarge { section: SECTION, field: "index length", offset: 32, value, limit });
        }
        Ok(Self { required_features, file_bytes, index_offset, index_inflated_bytes, index_crc })
    }

    /// The 64 bytes.
    pub fn write(&self) -> Vec<u8> {
        let mut writer = Writer::new();
        writer.raw(&MAGIC);
        writer.u16(VERSION);
        writer.u16(0);
        writer.u64(self.required_features);
        writer.u64(self.file_bytes);
        writer.u64(self.index_offset);
        writer.u64(self.index_inflated_bytes);
        writer.u32(self.index_crc);
        writer.raw(&[0; 16]);
        let mut bytes = writer.into_bytes();
        let crc = crc32c(&bytes);
        bytes.extend_from_slice(&crc.to_le_bytes());
        bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PREAMBLE: Preamble =
        Preamble { required_features: 0, file_bytes: 1000, index_offset: 900, index_inflated_bytes: 300, index_crc: 7 };

    #[test]
    fn a_preamble_comes_back() {
        let bytes = PREAMBLE.write();
        assert_eq!(bytes.len() as u64, PREAMBLE_BYTES);
        assert_eq!(Preamble::parse(&bytes, 1000), Ok(PREAMBLE));
    }

    #[test]
    fn an_unknown_feature_is_refused_by_number() {
        let unknown = KNOWN_FEATURES.trailing_ones();
        let bytes = Preamble { required_features: 1 << unknown, ..PREAMBLE }.write();
        let error = Preamble::parse(&bytes, 1000).expect_err("the bit means nothing yet");
        assert!(error.to_string().starts_with(&format!("needs feature bit {unknown}")), "{error}");
    }

    #[test]
    fn every_flipped_bit_is_an_error() {
        let bytes = PREAMBLE.write();
        for bit in 0..bytes.len() * 8 {
            let mut damaged = bytes.clone();
            damaged[bit / 8] ^= 1 << (bit % 8);
            assert!(Preamble::parse(&damaged, 1000).is_err(), "bit {bit}");
        }
    }

    #[test]
    fn a_stored_index_as_long_as_a_sparse_file_can_be_is_an_error() {
        let bytes = Preamble { file_bytes: 1 << 60, ..PREAMBLE }.write();
        let error = Preamble::parse(&bytes, 1 << 60).expect_err("nobody has memory for it");
        assert!(error.to_string().contains("stored index"), "{error}");
    }

    #[test]
    fn a_file_of_another_length_is_an_error() {
        let error = Preamble::parse(&PREAMBLE.write(), 999).expect_err("one byte short");
        assert!(error.to_string().contains("cut off"), "{error}");
    }
}
