//! Where every byte of an archive goes (Eq. 8, Table 1).

use serde::Serialize;

use crate::archive::{Archive, ArchiveError};
use crate::format::bytes::Writer;
use crate::format::part::{Coding, PartHeader};
use crate::format::preamble::PREAMBLE_BYTES;
use crate::format::record::{RecordEntry, SideInformation};

/// Bytes of an archive by stream. Their sum is the length of the file.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct StreamBytes {
    /// Codes of quantized parts that stand alone.
    pub keyframe_codes: u64,
    /// Codes of quantized parts that are predicted, and differences to a base.
    pub residual_codes: u64,
    /// Permutations of blocks.
    pub permutations: u64,
    /// Steps, scales, means and predictor coefficients.
    pub quantizer: u64,
    /// Entropy tables, and which run uses which.
    pub entropy_model: u64,
    /// Names, headers, lengths, checksums.
    pub metadata: u64,
    /// Elements carried bit-exact.
    pub verbatim: u64,
}

impl StreamBytes {
    /// Adds up a whole archive. Reads its side information and decodes nothing.
    ///
    /// The stored index is one deflate stream, so its entropy tables are charged their share of its bytes before deflation.
    pub fn of_archive(archive: &Archive) -> Result<Self, ArchiveError> {
        let mut streams = Self::default();
        for ordinal in 0..archive.index().records.len() as u32 {
            streams.add_record(archive.record(ordinal), &archive.side_information(ordinal)?);
        }
        let mut tables = Writer::new();
        for table in &archive.index().tables {
            table.write(&mut tables);
        }
        let index_bytes = archive.index_stored_bytes();
        let (preamble, _) = archive.index().write(PREAMBLE_BYTES);
        let share = tables.into_bytes().len() as f64 / preamble.index_inflated_bytes.max(1) as f64;
        let table_bytes = ((index_bytes as f64 * share).round() as u64).min(index_bytes);
        streams.entropy_model += table_bytes;
        streams.metadata += PREAMBLE_BYTES + index_bytes - table_bytes;
        Ok(streams)
    }

    /// Adds one record: its side information and its strips.
    pub fn add_record(&mut self, entry: &RecordEntry, side: &SideInformation) {
        match &side.permutation {
            Some(_) => self.permutations += side.permutation_bytes,
            None => self.metadata += side.permutation_bytes, // the flag that says there is none
        }
        for (part, header) in entry.parts.iter().zip(&side.parts) {
            self.quantizer += header.cost.quantizer;
            self.entropy_model += header.cost.entropy_model;
            self.metadata += header.cost.metadata;
            *self.codes_of(header) += part.body_bytes;
        }
    }

    fn codes_of(&mut self, header: &PartHeader) -> &mut u64 {
        match &header.coding {
            Coding::Raw | Coding::Split { .. } | Coding::Units(_) => &mut self.verbatim,
            Coding::Based(_) | Coding::QuantizedFromBase(..) => &mut self.residual_codes,
            Coding::Quantized(info) if info.prediction.is_some() => &mut self.residual_codes,
            Coding::Quantized(_) => &mut self.keyframe_codes,
        }
    }

    /// Name and bytes of each stream, in the order of Table 1.
    pub fn named(&self) -> [(&'static str, u64); 7] {
        [
            ("keyframe codes", self.keyframe_codes),
            ("residual codes", self.residual_codes),
            ("permutations", self.permutations),
            ("quantizer", self.quantizer),
            ("entropy model", self.entropy_model),
            ("metadata", self.metadata),
            ("verbatim", self.verbatim),
        ]
    }

    /// The length of the archive.
    pub fn total(&self) -> u64 {
        self.named().iter().map(|(_, bytes)| bytes).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::part::{Carrier, PartHeaderBytes, QuantizerInfo, StoredPrediction, StoredPredictor};
    use crate::format::record::{PartEntry, StoredPermutation};

    fn part(coding: Coding) -> PartHeader {
        let cost = PartHeaderBytes { quantizer: 1, entropy_model: 10, metadata: 100 };
        PartHeader { coding, streams: None, strip_crcs: vec![], cost }
    }

    fn quantized(prediction: Option<StoredPrediction>) -> Coding {
        Coding::Quantized(QuantizerInfo {
            step: 1.0,
            raw_bits: 0,
            trellis: None,
            vectors: None,
            scales: None,
            means: None,
            column_scales: None,
            prediction,
        })
    }

    #[test]
    fn every_byte_of_a_record_goes_to_one_stream() {
        let predictor = StoredPredictor::ScaledCopy { gain: 1.0 };
        let prediction = StoredPrediction { reference_part: 0, placement: None, predictor };
        let mut side = SideInformation {
            permutation: Some(StoredPermutation { groups: 4, members: 1, coded: vec![0; 17] }),
            parts: vec![
                part(quantized(None)),
                part(quantized(Some(prediction))),
                part(Coding::Raw),
                part(Coding::Split { carrier: Carrier::Own, raw_bits: 8, zero_bits: None }),
            ],
            permutation_bytes: 20,
        };
        let body = |body_bytes| PartEntry { file: 0, tensor: 0, body_bytes };
        let entry = RecordEntry {
            layer: None,
            block_type: 0,
            reference: None,
            side_bytes: 20 + 4 * 111,
            side_crc: 0,
            parts: vec![body(1000), body(2000), body(3000), body(4000)],
        };
        let mut streams = StreamBytes::default();
        streams.add_record(&entry, &side);
        let expected = StreamBytes {
            keyframe_codes: 1000,
            residual_codes: 2000,
            permutations: 20,
            quantizer: 4,
            entropy_model: 40,
            metadata: 400,
            verbatim: 7000,
        };
        assert_eq!(streams, expected);
        assert_eq!(streams.total(), entry.bytes());

        (side.permutation, side.permutation_bytes) = (None, 1);
        let mut streams = StreamBytes::default();
        streams.add_record(&entry, &side);
        assert_eq!((streams.permutations, streams.metadata), (0, 401));
    }
}
