//! Little-endian fields, read with a name so that an error can say what was missing and where.
//!
//! `varint` is LEB128, at most ten bytes, shortest form only. `zigzag` maps a signed integer onto it (0, -1, 1, -2, ...).

use super::error::FormatError;

/// CRC-32C of some bytes (SPEC.md section 1): what every checksum of an archive is.
///
/// With carry-less multiplication, five times as fast as with the instruction made for it, which would take as long as the
/// decoding of what is checked.
#[inline]
pub fn crc32c(bytes: &[u8]) -> u32 {
    crc_fast::crc32_iscsi(bytes)
}

/// Reads fields one after another from a section of the archive.
#[derive(Clone, Debug)]
pub struct Reader<'a> {
    section: &'static str,
    bytes: &'a [u8],
    position: usize,
}

impl<'a> Reader<'a> {
    /// Starts at the first byte of `bytes`, which is the section named.
    pub fn new(section: &'static str, bytes: &'a [u8]) -> Self {
        Self { section, bytes, position: 0 }
    }

    /// Bytes read so far.
    pub fn position(&self) -> u64 {
        self.position as u64
    }

    /// Bytes not read yet.
    pub fn left(&self) -> u64 {
        (self.bytes.len() - self.position) as u64
    }

    /// The next `length` bytes.
    pub fn take(&mut self, field: &'static str, length: u64) -> Result<&'a [u8], FormatError> {
        if length > self.left() {
            return Err(FormatError::Truncated {
                section: self.section,
                field,
                offset: self.position(),
                needed: length,
                left: self.left(),
            });
        }
        let start = self.position;
        self.position += length as usize; // fits: not more than what is left
        Ok(&self.bytes[start..self.position])
    }

    fn array<const N: usize>(&mut self, field: &'static str) -> Result<[u8; N], FormatError> {
        let bytes = self.take(field, N as u64)?;
        let mut array = [0; N];
        array.copy_from_slice(bytes);
        Ok(array)
    }

    /// One byte.
    pub fn u8(&mut self, field: &'static str) -> Result<u8, FormatError> {
        Ok(self.array::<1>(field)?[0])
    }

    /// Two bytes.
    pub fn u16(&mut self, field: &'static str) -> Result<u16, FormatError> {
        Ok(u16::from_le_bytes(self.array(field)?))
    }

    /// Four bytes.
    pub fn u32(&mut self, field: &'static str) -> Result<u32, FormatError> {
        Ok(u32::from_le_bytes(self.array(field)?))
    }

    /// Eight bytes.
    pub fn u64(&mut self, field: &'static str) -> Result<u64, FormatError> {
        Ok(u64::from_le_bytes(self.array(field)?))
    }

    /// Four bytes, an IEEE 754 binary32 that must be finite.
    pub fn finite_f32(&mut self, field: &'static str) -> Result<f32, FormatError> {
        let offset = self.position();
        let value = f32::from_le_bytes(self.array(field)?);
        if value.is_finite() {
            return Ok(value);
        }
        Err(self.invalid(field, offset, value, "a finite number"))
    }

    /// Thirty-two bytes: a SHA-256 digest.
    pub fn digest(&mut self, field: &'static str) -> Result<[u8; 32], FormatError> {
        self.array(field)
    }

    /// An unsigned LEB128 integer that may not exceed `limit`.
    pub fn varint(&mut self, field: &'static str, limit: u64) -> Result<u64, FormatError> {
        let offset = self.position();
        let mut value = 0_u64;
        for shift in (0..64).step_by(7) {
            let byte = self.u8(field)?;
            let bits = u64::from(byte & 0x7f);
            if shift == 63 && bits > 1 {
                return Err(self.invalid(field, offset, "an integer over 64 bits", "at most 64 bits"));
            }
            value |= bits << shift;
            if byte & 0x80 == 0 {
                if byte == 0 && shift > 0 {
                    return Err(self.invalid(field, offset, "a padded integer", "the shortest form"));
                }
                if value > limit {
                    return Err(FormatError::TooLarge { section: self.section, field, offset, value, limit });
                }
                return Ok(value);
            }
        }
        Err(self.invalid(field, offset, "an integer over ten bytes", "at most ten bytes"))
    }

    /// A count whose items take at least one byte each: it may exceed neither `limit` nor the bytes left.
    pub fn count(&mut self, field: &'static str, limit: u64) -> Result<usize, FormatError> {
        let offset = self.position();
        let value = self.varint(field, limit)?;
        if value > self.left() {
            return Err(FormatError::TooLarge { section: self.section, field, offset, value, limit: self.left() });
        }
        Ok(value as usize)
    }

    /// A zig-zag integer between `low` and `high`.
    pub fn zigzag(&mut self, field: &'static str, low: i64, high: i64) -> Result<i64, FormatError> {
        let offset = self.position();
        let value = self.varint(field, u64::MAX)?;
        let value = (value >> 1) as i64 ^ -((value & 1) as i64);
        if value < low || value > high {
            return Err(self.invalid(field, offset, value, format!("{low} to {high}")));
        }
        Ok(value)
    }

    /// A length and that many bytes.
    pub fn blob(&mut self, field: &'static str, limit: u64) -> Result<&'a [u8], FormatError> {
        let length = self.varint(field, limit)?;
        self.take(field, length)
    }

    /// A length and that many bytes of UTF-8.
    pub fn text(&mut self, field: &'static str, limit: u64) -> Result<String, FormatError> {
        let offset = self.position();
        let bytes = self.blob(field, limit)?;
        match std::str::from_utf8(bytes) {
            Ok(text) => Ok(text.to_owned()),
            Err(_) => Err(self.invalid(field, offset, "bytes that are not UTF-8", "UTF-8")),
        }
    }

    /// Fails where bytes are left over.
    pub fn end(&self) -> Result<(), FormatError> {
        match self.left() {
            0 => Ok(()),
            left => Err(self.invalid("end", self.position(), format!("{left} more bytes"), "the end of the section")),
        }
    }

    /// The error for a field whose value means nothing.
    #[allow(clippy::needless_pass_by_value)] // literals and numbers alike
    pub fn invalid(
        &self,
        field: &'static str,
        offset: u64,
        found: impl ToString,
        expected: impl ToString,
    ) -> FormatError {
        FormatError::Invalid {
            section: self.section,
            field,
            offset,
            found: found.to_string(),
            expected: expected.to_string(),
        }
    }
}

/// Appends fields to a section of the archive.
#[derive(Clone, Debug, Default)]
pub struct Writer {
    bytes: Vec<u8>,
}

impl Writer {
    /// Starts empty.
    pub fn new() -> Self {
        Self::default()
    }

    /// Bytes written so far.
    pub fn position(&self) -> u64 {
        self.bytes.len() as u64
    }

    /// What was written.
    pub fn into_bytes(self) -> Vec<u8> {
        self.bytes
    }

    /// Bytes as they are.
    pub fn raw(&mut self, bytes: &[u8]) {
        self.bytes.extend_from_slice(bytes);
    }

    /// One byte.
    pub fn u8(&mut self, value: u8) {
        self.bytes.push(value);
    }

    /// Two bytes.
    pub fn u16(&mut self, value: u16) {
        self.raw(&value.to_le_bytes());
    }

    /// Four bytes.
    pub fn u32(&mut self, value: u32) {
        self.raw(&value.to_le_bytes());
    }

    /// Eight bytes.
    pub fn u64(&mut self, value: u64) {
        self.raw(&value.to_le_bytes());
    }

    /// Four bytes, an IEEE 754 binary32.
    pub fn f32(&mut self, value: f32) {
        self.raw(&value.to_le_bytes());
    }

    /// An unsigned LEB128 integer.
    pub fn varint(&mut self, mut value: u64) {
        while value >= 0x80 {
            self.bytes.push(value as u8 | 0x80);
            value >>= 7;
        }
        self.bytes.push(value as u8);
    }

    /// A zig-zag integer.
    pub fn zigzag(&mut self, value: i64) {
        self.varint(((value << 1) ^ (value >> 63)) as u64);
    }

    /// A length and the bytes.
    pub fn blob(&mut self, bytes: &[u8]) {
        self.varint(bytes.len() as u64);
        self.raw(bytes);
    }

    /// A length and the text.
    pub fn text(&mut self, text: &str) {
        self.blob(text.as_bytes());
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn checksums_are_those_of_another_implementation(bytes in prop::collection::vec(any::<u8>(), 0..2000)) {
            prop_assert_eq!(crc32c(&bytes), crc32c::crc32c(&bytes));
        }

        #[test]
        fn integers_come_back(unsigned: u64, signed: i64) {
            let mut writer = Writer::new();
            writer.varint(unsigned);
            writer.zigzag(signed);
            let bytes = writer.into_bytes();
            let mut reader = Reader::new("test", &bytes);
            prop_assert_eq!(reader.varint("unsigned", u64::MAX), Ok(unsigned));
            prop_assert_eq!(reader.zigzag("signed", i64::MIN, i64::MAX), Ok(signed));
            prop_assert_eq!(reader.end(), Ok(()));
        }

        #[test]
        fn no_bytes_make_a_reader_panic(bytes: Vec<u8>) {
            let mut reader = Reader::new("test", &bytes);
            while reader.text("text", 100).is_ok() && reader.zigzag("zigzag", -5, 5).is_ok() && reader.left() > 0 {}
        }
    }

    #[test]
    fn a_padded_integer_is_an_error() {
        assert!(Reader::new("test", &[0x80, 0x00]).varint("value", 9).is_err());
    }

    #[test]
    fn a_truncated_field_tells_its_name_and_place() {
        let mut reader = Reader::new("index", &[1, 2, 3, 4, 5]);
        reader.u32("first").expect("four bytes");
        let error = reader.u16("second").expect_err("one byte is left");
        assert_eq!(error.to_string(), "index: second at byte 4: needs 2 bytes, 1 left");
    }

    #[test]
    fn a_count_beyond_the_bytes_left_is_an_error() {
        let error = Reader::new("index", &[100, 0, 0]).count("records", 1000).expect_err("two bytes are left");
        assert_eq!(error.to_string(), "index: records at byte 0: 100 is more than the limit of 2");
    }
}
