//! What `inspect` finds, as `--json` prints it.

use std::collections::BTreeMap;

use serde::Serialize;

use super::streams::StreamBytes;
use crate::archive::{Archive, ArchiveError, PartAddress};
use crate::format::difference::BasedInfo;
use crate::format::part::{Carrier, Coding, PartHeader, StoredPredictor};
use crate::format::preamble::VERSION;
use crate::hexadecimal::hex;
use crate::tensor::total_elements;

/// An archive, summed up.
#[derive(Debug, Serialize)]
pub struct Report {
    /// Path as given.
    pub archive: String,
    /// Version of the format.
    pub format_version: u16,
    /// Model family whose block rules the encoder used.
    pub architecture: String,
    /// Number of layers (L).
    pub layers: u32,
    /// Keyframe interval (K).
    pub keyframe_interval: u32,
    /// SHA-256 over the decoded digests, hexadecimal.
    pub content_id: String,
    /// Whether any decoded byte may differ from the source.
    pub lossy: bool,
    /// Length of the archive.
    pub stored_bytes: u64,
    /// Length of the files it decodes to.
    pub decoded_bytes: u64,
    /// Elements over all tensors.
    pub parameters: u64,
    /// Bits of the whole archive per parameter; absent where there are none.
    pub bits_per_parameter: Option<f64>,
    /// Its safetensors files.
    pub files: Vec<FileReport>,
    /// Bytes by stream; they add up to `stored_bytes`.
    pub stream_bytes: StreamBytes,
    /// Records and parts by block type, in the order of their first record.
    pub block_types: Vec<BlockTypeReport>,
    /// Every part of every record; only where asked for.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub parts: Vec<PartReport>,
    /// Archives that parts start from.
    pub bases: Vec<BaseReport>,
    /// How the archive came to be.
    pub provenance: BTreeMap<String, String>,
}

/// One safetensors file of the archive.
#[derive(Debug, Serialize)]
pub struct FileReport {
    /// Name without directories.
    pub name: String,
    /// Length when decoded.
    pub bytes: u64,
    /// Number of tensors.
    pub tensors: usize,
    /// Elements over its tensors.
    pub parameters: u64,
    /// SHA-256 of the decoded file, hexadecimal.
    pub decoded_sha256: String,
    /// SHA-256 of the file that was packed, hexadecimal.
    pub source_sha256: String,
    /// BLAKE3 of the decoded file, hexadecimal; absent in archives from before they had it.
    pub decoded_blake3: Option<String>,
}

/// An archive that parts start from.
#[derive(Debug, Serialize)]
pub struct BaseReport {
    /// Where it was when it was used.
    pub name: String,
    /// What names its content, hexadecimal.
    pub content_id: String,
}

/// All records of one block type.
#[derive(Debug, Default, Serialize)]
pub struct BlockTypeReport {
    /// Name of the block type.
    pub block_type: String,
    /// Number of records.
    pub records: u64,
    /// Records with a permutation.
    pub permuted_records: u64,
    /// Parts by mode.
    pub parts: BTreeMap<String, u64>,
    /// Elements of its tensors.
    pub parameters: u64,
    /// Bytes of its records, side information included.
    pub bytes: u64,
}

/// One part.
#[derive(Debug, Serialize)]
pub struct PartReport {
    /// Record, counted in the file.
    pub record: u32,
    /// Layer, counted from 0; absent outside the layers.
    pub layer: Option<u32>,
    /// Name of the block type.
    pub block_type: String,
    /// The tensor.
    pub tensor: String,
    /// Its element type.
    pub dtype: String,
    /// Its dimensions.
    pub shape: Vec<u64>,
    /// How it is coded.
    pub mode: String,
    /// Step in weight units, of quantized parts.
    pub step: Option<f32>,
    /// Bytes of its strips.
    pub bytes: u64,
}

/// How a part is coded, in a few words.
pub fn mode(header: &PartHeader) -> String {
    let columns = if header.coding.has_column_scales() { ", column scales" } else { "" };
    format!("{}{columns}", named(header))
}

fn named(header: &PartHeader) -> &'static str {
    match &header.coding {
        Coding::Raw => "raw",
        Coding::Split { carrier: Carrier::Own, .. } => "split",
        Coding::Split { carrier: Carrier::Bf16, .. } => "split as BF16",
        Coding::Split { carrier: Carrier::F16, .. } => "split as F16",
        Coding::Units(info) if !info.values.is_empty() => "few values",
        Coding::Units(info) if info.unit_bits == 4 => "units of 4 bits",
        Coding::Units(_) => "integers",
        Coding::Based(BasedInfo { low_rank, difference, .. }) => match (low_rank, difference) {
            (None, None) => "the base's",
            (None, Some(_)) => "difference",
            (Some(_), None) => "low rank",
            (Some(_), Some(_)) => "low rank and difference",
        },
        Coding::QuantizedFromBase(_, info) => match info.trellis {
            None => "from the base",
            Some(_) => "from the base, trellis",
        },
        Coding::Quantized(info) => {
            if info.vectors.is_some() {
                return if info.prediction.is_some() { "predicted, vectors" } else { "keyframe, vectors" };
            }
            let predictor = info.prediction.as_ref().map(|prediction| &prediction.predictor);
            match (predictor, info.trellis.is_some()) {
                (None, false) => "keyframe",
                (None, true) => "keyframe, trellis",
                (Some(StoredPredictor::ScaledCopy { .. }), false) => "predicted, scaled copy",
                (Some(StoredPredictor::ScaledCopy { .. }), true) => "predicted, scaled copy, trellis",
                (Some(StoredPredictor::RowAffine { .. }), false) => "predicted, affine",
                (Some(StoredPredictor::RowAffine { .. }), true) => "predicted, affine, trellis",
                (Some(StoredPredictor::MotionVectors { .. }), false) => "predicted, motion vectors",
                (Some(StoredPredictor::MotionVectors { .. }), true) => "predicted, motion vectors, trellis",
                (Some(StoredPredictor::Network { .. }), false) => "predicted, network",
                (Some(StoredPredictor::Network { .. }), true) => "predicted, network, trellis",
            }
        }
    }
}

impl Report {
    /// Reads all side information of `archive`; lists every part where `with_parts`.
    pub fn new(archive: &Archive, with_parts: bool) -> Result<Self, ArchiveError> {
        let index = archive.index();
        let parameters = archive.parameters();
        let stored_bytes = archive.stored_bytes();
        let mut report = Self {
            archive: archive.path().display().to_string(),
            format_version: VERSION,
            architecture: index.architecture.clone(),
            layers: index.layers,
            keyframe_interval: index.keyframe_interval,
            content_id: hex(&index.content_id),
            lossy: archive.is_lossy(),
            stored_bytes,
            decoded_bytes: archive.files().iter().map(|file| file.length_bytes).sum(),
            parameters,
            bits_per_parameter: (parameters > 0).then(|| 8.0 * stored_bytes as f64 / parameters as f64),
            files: Vec::new(),
            stream_bytes: StreamBytes::of_archive(archive)?,
            block_types: Vec::new(),
            parts: Vec::new(),
            bases: (index.bases.iter())
                .map(|base| BaseReport { name: base.name.clone(), content_id: hex(&base.content_id) })
                .collect(),
            provenance: index.provenance.iter().cloned().collect(),
        };
        for (number, file) in archive.files().iter().enumerate() {
            report.files.push(FileReport {
                name: file.name.clone(),
                bytes: file.length_bytes,
                tensors: file.tensors.len(),
                parameters: total_elements(&file.tensors),
                decoded_sha256: hex(&file.decoded_sha256),
                source_sha256: hex(&file.source_sha256),
                decoded_blake3: archive.decoded_blake3(number).map(|digest| hex(&digest)),
            });
        }
        for record in 0..index.records.len() as u32 {
            report.add_record(archive, record, with_parts)?;
        }
        Ok(report)
    }

    fn add_record(&mut self, archive: &Archive, record: u32, with_parts: bool) -> Result<(), ArchiveError> {
        let entry = archive.record(record);
        let side = archive.side_information(record)?;
        let name = archive.block_type(record);
        let position = self.block_types.iter().position(|known| known.block_type == name).unwrap_or_else(|| {
            self.block_types.push(BlockTypeReport { block_type: name.to_owned(), ..BlockTypeReport::default() });
            self.block_types.len() - 1
        });
        let block_type = &mut self.block_types[position];
        block_type.records += 1;
        block_type.permuted_records += u64::from(side.permutation.is_some());
        block_type.bytes += entry.bytes();
        for (ordinal, (part, header)) in entry.parts.iter().zip(&side.parts).enumerate() {
            let tensor = archive.tensor(PartAddress { record, part: ordinal as u32 });
            *block_type.parts.entry(mode(header)).or_default() += 1;
            block_type.parameters += tensor.elements();
            if with_parts {
                let step = match &header.coding {
                    Coding::Quantized(info) | Coding::QuantizedFromBase(_, info) => Some(info.step),
                    Coding::Raw | Coding::Split { .. } | Coding::Units(_) | Coding::Based(_) => None,
                };
                self.parts.push(PartReport {
                    record,
                    layer: entry.layer,
                    block_type: name.to_owned(),
                    tensor: tensor.name.clone(),
                    dtype: tensor.dtype.to_string(),
                    shape: tensor.shape.clone(),
                    mode: mode(header),
                    step,
                    bytes: part.body_bytes,
                });
            }
        }
        Ok(())
    }
}
