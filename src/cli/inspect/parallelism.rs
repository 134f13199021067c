//! What can be decoded at once (Table 4): records are predicted from others in chains, from a keyframe on, and chains are
//! independent of one another.

use serde::Serialize;

use crate::archive::{Archive, ArchiveError, PartAddress};
use crate::format::index::Index;

/// The chains of an archive.
#[derive(Debug, PartialEq, Serialize)]
pub struct Parallelism {
    /// Number of layers (L).
    pub layers: u32,
    /// Keyframe interval (K).
    pub keyframe_interval: u32,
    /// Segments of the keyframe schedule, ceil(L / K): what the paper counts.
    pub scheduled_segments: u32,
    /// Records.
    pub records: u64,
    /// Chains of records: as many can be decoded at once. A record that nothing is predicted from, and that is itself not
    /// predicted, is one.
    pub chains: u64,
    /// Records of the longest chain, which follow one another.
    pub longest_chain: u64,
    /// Strips of all records: within a record all can be decoded at once.
    pub strips: u64,
    /// Bytes of all decoded tensors.
    pub decoded_bytes: u64,
    /// Bytes of the chain with most, which no number of machines that take whole records shortens.
    pub critical_path_bytes: u64,
    /// The two divided: the greatest speed-up of records decoded in parallel.
    pub greatest_speedup: f64,
    /// The same by block type.
    pub block_types: Vec<BlockTypeChains>,
}

/// The chains of one block type.
#[derive(Debug, Default, PartialEq, Serialize)]
pub struct BlockTypeChains {
    /// Name of the block type.
    pub block_type: String,
    /// Records.
    pub records: u64,
    /// Chains.
    pub chains: u64,
    /// Records of the longest chain.
    pub longest_chain: u64,
    /// Decoded bytes of the chain with most.
    pub critical_path_bytes: u64,
}

/// A record at the end of its chain so far.
#[derive(Clone, Copy)]
struct ChainEnd {
    records: u64,
    bytes: u64,
}

impl Parallelism {
    /// Follows the references of all records.
    ///
    /// # Errors
    /// When side information cannot be read.
    pub fn of_archive(archive: &Archive) -> Result<Self, ArchiveError> {
        let records = archive.index().records.len() as u32;
        let bytes: Vec<u64> = (0..records)
            .map(|record| {
                let parts = 0..archive.record(record).parts.len() as u32;
                parts.map(|part| archive.tensor(PartAddress { record, part }).length_bytes).sum()
            })
            .collect();
        let mut strips = 0;
        for record in 0..records {
            strips +=
                archive.side_information(record)?.parts.iter().map(|part| part.strip_crcs.len() as u64).sum::<u64>();
        }
        Ok(Self::of_index(archive.index(), &bytes, strips))
    }

    /// `bytes` are the decoded bytes of each record.
    fn of_index(index: &Index, bytes: &[u64], strips: u64) -> Self {
        let mut ends: Vec<ChainEnd> = Vec::with_capacity(bytes.len());
        let mut block_types: Vec<BlockTypeChains> = Vec::new();
        for (record, &bytes) in index.records.iter().zip(bytes) {
            let end = match record.reference {
                Some(reference) => {
                    let before = ends[reference as usize]; // references come first
                    ChainEnd { records: before.records + 1, bytes: before.bytes + bytes }
                }
                None => ChainEnd { records: 1, bytes },
            };
            ends.push(end);
            let name = &index.block_types[usize::from(record.block_type)];
            let position = block_types.iter().position(|known| known.block_type == *name).unwrap_or_else(|| {
                block_types.push(BlockTypeChains { block_type: name.clone(), ..BlockTypeChains::default() });
                block_types.len() - 1
            });
            let of_type = &mut block_types[position];
            of_type.records += 1;
            of_type.chains += u64::from(record.reference.is_none());
            of_type.longest_chain = of_type.longest_chain.max(end.records);
            of_type.critical_path_bytes = of_type.critical_path_bytes.max(end.bytes);
        }
        let decoded_bytes: u64 = bytes.iter().sum();
        let critical_path_bytes = ends.iter().map(|end| end.bytes).max().unwrap_or(0);
        Self {
            layers: index.layers,
            keyframe_interval: index.keyframe_interval,
            scheduled_segments: index.layers.div_ceil(index.keyframe_interval.max(1)),
            records: ends.len() as u64,
            chains: block_types.iter().map(|of_type| of_type.chains).sum(),
            longest_chain: ends.iter().map(|end| end.records).max().unwrap_or(0),
            strips,
            decoded_bytes,
            critical_path_bytes,
            greatest_speedup: decoded_bytes as f64 / critical_path_bytes.max(1) as f64,
            block_types,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::record::RecordEntry;

    #[test]
    fn a_chain_goes_from_a_keyframe_to_the_last_record_that_is_predicted_from_it() {
        let record = |reference| RecordEntry {
            layer: Some(0),
            block_type: 0,
            reference,
            side_bytes: 0,
            side_crc: 0,
            parts: Vec::new(),
        };
        let index = Index {
            architecture: "bert".into(),
            layers: 5,
            keyframe_interval: 3,
            content_id: [0; 32],
            files: Vec::new(),
            tables: Vec::new(),
            codebooks: Vec::new(),
            networks: Vec::new(),
            block_types: vec!["ffn".into()],
            records: [None, Some(0), Some(1), None, Some(3)].map(record).to_vec(),
            bases: Vec::new(),
            has_units: false,
            has_predictors: false,
            has_column_scales: false,
            provenance: Vec::new(),
        };
        let found = Parallelism::of_index(&index, &[10, 20, 30, 70, 5], 9);
        assert_eq!((found.scheduled_segments, found.chains, found.longest_chain), (2, 2, 3));
        assert_eq!((found.decoded_bytes, found.critical_path_bytes, found.strips), (135, 75, 9));
        assert_eq!(found.greatest_speedup, 1.8);
        assert_eq!(found.block_types[0].critical_path_bytes, 75);
    }
}
