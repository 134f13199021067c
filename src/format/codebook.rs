//! Codebooks of residual vector quantization: the codewords that vectors of points are sums of (SPEC.md section 5.1).

use super::bytes::{Reader, Writer};
use super::error::FormatError;
use super::limits;

/// One codebook: two to the power of `index_bits` codewords, one after another.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct StoredCodebook {
    /// Elements of a codeword.
    pub elements: u8,
    /// Bits of an index.
    pub index_bits: u8,
    /// binary16 numbers, `[codewords, elements]`.
    pub values: Vec<u16>,
}

impl StoredCodebook {
    /// Reads one codebook and checks that its values are finite.
    pub fn parse(reader: &mut Reader<'_>) -> Result<Self, FormatError> {
        let offset = reader.position();
        let elements = reader.u8("codebook elements")?;
        if !limits::VECTOR_ELEMENTS.contains(&elements) {
            return Err(reader.invalid("codebook elements", offset, elements, "2 to 16"));
        }
        let offset = reader.position();
        let index_bits = reader.u8("codebook index bits")?;
        if !limits::VECTOR_INDEX_BITS.contains(&index_bits) {
            return Err(reader.invalid("codebook index bits", offset, index_bits, "1 to 12"));
        }
        let offset = reader.position();
        let bytes = reader.take("codewords", (2 * u64::from(elements)) << index_bits)?;
        let values: Vec<u16> = bytes.as_chunks().0.iter().map(|&bytes| u16::from_le_bytes(bytes)).collect();
        let is_finite = |value: &u16| value & 0x7c00 != 0x7c00;
        if let Some(value) = values.iter().find(|value| !is_finite(value)) {
            return Err(reader.invalid("codewords", offset, format!("{value:#06x}"), "finite numbers"));
        }
        Ok(Self { elements, index_bits, values })
    }

    /// Writes the codebook.
    pub fn write(&self, writer: &mut Writer) {
        writer.u8(self.elements);
        writer.u8(self.index_bits);
        for &value in &self.values {
            writer.u16(value);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(codebook: &StoredCodebook) -> Result<StoredCodebook, FormatError> {
        let mut writer = Writer::new();
        codebook.write(&mut writer);
        StoredCodebook::parse(&mut Reader::new("test", &writer.into_bytes()))
    }

    #[test]
    fn a_codebook_comes_back() {
        let codebook = StoredCodebook { elements: 3, index_bits: 1, values: vec![0, 0x3c00, 0x8000, 1, 2, 0xfbff] };
        assert_eq!(parse(&codebook), Ok(codebook));
    }

    #[test]
    fn infinities_and_sizes_out_of_range_are_errors() {
        let codebook = StoredCodebook { elements: 2, index_bits: 1, values: vec![0; 4] };
        assert!(parse(&StoredCodebook { values: vec![0, 0, 0, 0x7c00], ..codebook.clone() }).is_err());
        assert!(parse(&StoredCodebook { values: vec![0, 0, 0], ..codebook.clone() }).is_err());
        assert!(parse(&StoredCodebook { elements: 1, ..codebook.clone() }).is_err());
        assert!(parse(&StoredCodebook { index_bits: 13, ..codebook }).is_err());
    }
}
