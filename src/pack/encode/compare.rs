//! The end of packing: the finished archive is decoded from first to last byte and compared with its source.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use sha2::{Digest, Sha256};

use super::super::counting::sum_of_squares;
use super::super::quantize::values_of;
use super::super::survey::ProbedPart;
use super::super::treatment::changes;
use super::{Encoder, PackError, quantized_tensors};
use crate::archive::{Archive, ArchiveError};
use crate::materialize::{MaterializeOptions, Materializer};

/// Bytes decoded at once when the finished archive is compared with its source.
const COMPARE_WINDOW: usize = 8 << 20;
/// Cache of that comparison beside the tensors that predictions start from: strips at the edges of windows.
const COMPARE_CACHE: u64 = 8 << 20;

/// What comparing the decoded archive with its source found.
#[derive(Default)]
pub(super) struct Compared {
    pub(super) decoded: Vec<[u8; 32]>,
    pub(super) sources: Vec<[u8; 32]>,
    pub(super) decoded_blake3: Vec<[u8; 32]>,
    /// Per file, per tensor: squared error and energy.
    pub(super) errors: Vec<Vec<(f64, f64)>>,
    /// Of tensors that are quantized from the base: squared error, and energy of what changed.
    pub(super) changes: BTreeMap<(usize, usize), (f64, f64)>,
}

impl Encoder<'_> {
    /// Decodes the archive in `file` from first to last byte, hashes it, and compares it with the source.
    pub(super) fn compare(
        &self,
        file: &std::fs::File,
        out: &Path,
        parts: &[Vec<ProbedPart>],
    ) -> Result<Compared, PackError> {
        self.progress.phase("comparing", self.source_bytes());
        let archive = self.reopened(file)?;
        let materializer = Materializer::new(MaterializeOptions {
            cache_bytes: self.compare_cache(),
            ..MaterializeOptions::default()
        });
        let quantized = quantized_tensors(&self.plan, parts);
        let mut compared = Compared::default();
        let mut window = Vec::new();
        for (file, source) in self.checkpoint.files.iter().enumerate() {
            let header_bytes = source.header.bytes.len() as u64;
            let mut decoded_hash = Sha256::new_with_prefix(&source.header.bytes);
            let mut decoded_tree = blake3::Hasher::new();
            decoded_tree.update(&source.header.bytes);
            // One of its own only from the first byte on that differs.
            let mut source_hash: Option<Sha256> = None;
            let mut errors = Vec::new();
            for (number, tensor) in source.header.tensors.iter().enumerate() {
                let bytes = source.tensor_bytes(number);
                let is_quantized = quantized.contains(&(file, number));
                let (mut squared_error, mut energy) = (0.0, 0.0);
                let mut is_equal = true;
                for (chunk_number, chunk) in bytes.chunks(COMPARE_WINDOW).enumerate() {
                    window.resize(chunk.len(), 0);
                    let first = header_bytes + tensor.offset_bytes + (chunk_number * COMPARE_WINDOW) as u64;
                    self.check_interrupted(out)?;
                    materializer.read_in_parallel(&archive, file, first, &mut window)?;
                    if window != chunk {
                        is_equal = false;
                        source_hash.get_or_insert_with(|| decoded_hash.clone());
                    }
                    decoded_hash.update(&window);
                    decoded_tree.update(&window);
                    if let Some(hash) = &mut source_hash {
                        hash.update(chunk);
                    }
                    if is_quantized {
                        let (decoded, values) = (values_of(&tensor.dtype, &window), values_of(&tensor.dtype, chunk));
                        let errors: Vec<f32> =
                            decoded.iter().zip(&values).map(|(decoded, value)| decoded - value).collect();
                        squared_error += sum_of_squares(&errors);
                        energy += sum_of_squares(&values);
                    }
                }
                if is_equal {
                    squared_error = 0.0;
                } else if !is_quantized || squared_error.is_nan() {
                    return Err(PackError::Mismatch { file: source.name.clone(), tensor: tensor.name.clone() });
                }
                errors.push((squared_error, energy));
                if is_quantized && let Some(start) = self.start(file, number, true)? {
                    let change = sum_of_squares(&changes(tensor, bytes, &start.predicted));
                    compared.changes.insert((file, number), (squared_error, change));
                }
                self.finish_part(file, number);
            }
            let decoded: [u8; 32] = decoded_hash.finalize().into();
            compared.decoded.push(decoded);
            compared.sources.push(source_hash.map_or(decoded, |hash| hash.finalize().into()));
            compared.decoded_blake3.push(decoded_tree.finalize().into());
            compared.errors.push(errors);
            log::debug!("compared: {} in {}", source.name, out.display());
        }
        Ok(compared)
    }

    /// The archive in `file`, with what it starts from.
    pub(super) fn reopened(&self, file: &std::fs::File) -> Result<Arc<Archive>, ArchiveError> {
        let path = PathBuf::from(format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(file)));
        let mut archive = Archive::open(&path)?;
        let needed = self.base.iter().take(archive.index().bases.len()); // none, where nothing starts from it
        archive.attach_bases(needed.map(|base| Arc::clone(base.archive())).collect())?;
        Ok(Arc::new(archive))
    }

    /// Room for a tensor and its reference, where there are predictions.
    fn compare_cache(&self) -> u64 {
        let in_layers = self.plan.records.iter().filter(|record| self.may_be_a_reference(record));
        let lengths = in_layers.flat_map(|record| &record.parts).map(|part| self.tensor(part.file, part.tensor).0);
        let of_base = if self.base.is_some() { COMPARE_WINDOW as u64 } else { 0 };
        COMPARE_CACHE + of_base + 2 * lengths.map(|tensor| tensor.length_bytes).max().unwrap_or(0)
    }
}

impl Compared {
    /// Squared error over squared changes of all tensors that are quantized from the base; `None` where none is.
    pub(super) fn error_of_changes(&self) -> Option<f64> {
        let sums = self.changes.values().fold((0.0, 0.0), |sum, change| (sum.0 + change.0, sum.1 + change.1));
        (sums.1 > 0.0).then(|| sums.0 / sums.1)
    }

    /// Squared error and energy of these tensors, each a file and its tensor.
    pub(super) fn error_of(&self, tensors: &BTreeSet<(usize, usize)>) -> (f64, f64) {
        let errors = tensors.iter().map(|&(file, tensor)| self.errors[file][tensor]);
        errors.fold((0.0, 0.0), |sum, error| (sum.0 + error.0, sum.1 + error.1))
    }
}
