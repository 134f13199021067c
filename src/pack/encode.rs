//! The encoding of a whole checkpoint: Algorithm 1's upper half, around it rate control, and at the end a full decode that
//! is compared with the source before anything is called done.

mod compare;
mod target;

use std::collections::BTreeMap;
use std::fs::Permissions;
use std::io::{Seek, SeekFrom, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use tempfile::NamedTempFile;

use self::compare::Compared;
use super::entropy_model::{ClassHistograms, TablePool};
use super::options::{PackOptions, PredictorChoice};
use super::part::SelfCheckError;
use super::quantize::{is_lossy, values_of};
use super::record::{Context, Drafted, RecordEncoder, Treatment, decode_part, motion_of};
use super::report::{PackReport, StageTotals, TensorReport};
use super::source::{Checkpoint, SourceError};
use crate::archive::{Archive, ArchiveError, UNFINISHED_PREFIX, content_id};
use crate::codec::architecture::{BlockType, CheckpointPlan, RecordPlan};
use crate::codec::entropy::CodingTable;
use crate::format::index::{FileEntry, Index};
use crate::format::preamble::PREAMBLE_BYTES;
use crate::format::record::{PartEntry, RecordEntry, SideInformation};
use crate::materialize::MaterializeError;
use crate::tensor::TensorInfo;

/// Why packing failed. Nothing that was on disk before has changed.
#[derive(Debug, thiserror::Error)]
pub enum PackError {
    /// The checkpoint cannot be read.
    #[error(transparent)]
    Source(#[from] SourceError),
    /// The output cannot be written.
    #[error("{path}: {source}")]
    Output {
        /// The archive or its directory.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// The output is there already.
    #[error("{0}: exists already, expected a new name; --force replaces it")]
    Exists(PathBuf),
    /// The rate cannot be reached.
    #[error("--bpp {wanted}: {reason}")]
    Rate {
        /// Bits per parameter asked for.
        wanted: f64,
        /// What is in the way.
        reason: String,
    },
    /// The archive just written cannot be opened.
    #[error("the new archive does not open: {0}; please report this")]
    Reopen(#[from] ArchiveError),
    /// The archive just written does not decode.
    #[error("the new archive does not decode: {0}; please report this")]
    Redecode(#[from] MaterializeError),
    /// An encoded part does not decode.
    #[error(transparent)]
    SelfCheck(#[from] SelfCheckError),
    /// A bit-exact tensor came back different.
    #[error("{file}: {tensor}: decoded bytes differ from the source's; please report this")]
    Mismatch {
        /// Safetensors file.
        file: String,
        /// Tensor.
        tensor: String,
    },
}

/// Told how far packing has come.
pub trait Progress: Sync {
    /// A phase begins that will go through this many bytes of the checkpoint.
    fn phase(&self, name: &str, bytes: u64);
    /// So many bytes of the phase are done.
    fn advance(&self, bytes: u64);
}

/// Nobody listens.
pub struct Silent;

impl Progress for Silent {
    fn phase(&self, _: &str, _: u64) {}
    fn advance(&self, _: u64) {}
}

/// A checkpoint on its way into an archive.
pub struct Encoder<'a> {
    checkpoint: &'a Checkpoint,
    options: &'a PackOptions,
    progress: &'a dyn Progress,
    plan: CheckpointPlan,
    /// Per record, per part.
    treatments: Vec<Vec<Treatment>>,
    /// Symbols of all bit-exact parts; they do not change with the step.
    exact_classes: ClassHistograms,
}

/// One look at the whole checkpoint with one step.
struct Scan {
    pool: TablePool,
    /// Estimated bits of each part's body, per record.
    part_bits: Vec<Vec<f64>>,
    /// Squared rounding error and energy of all quantized values.
    squared_error: f64,
    energy: f64,
    quantized: u64,
}

/// An archive's records, written.
struct Written {
    index: Index,
    bytes: u64,
    stages: StageTotals,
    keyframe_records: u64,
    predicted_records: u64,
}

/// An archive that is written, compared and on the disk, under a hidden name. Dropped, it is gone.
pub struct Finished {
    temporary: NamedTempFile,
    out: PathBuf,
    report: PackReport,
}

impl Finished {
    /// Gives the archive its name, which must not be taken unless `replace` is set.
    ///
    /// # Errors
    /// See [`PackError`]; after one, nothing is there that was not there before.
    pub fn publish(self, replace: bool) -> Result<PackReport, PackError> {
        let Self { temporary, out, report } = self;
        let output = |source| PackError::Output { path: out.clone(), source };
        let renamed = if replace { temporary.persist(&out) } else { temporary.persist_noclobber(&out) };
        renamed.map_err(|error| match error.error.kind() {
            std::io::ErrorKind::AlreadyExists => PackError::Exists(out.clone()),
            _ => output(error.error),
        })?;
        std::fs::File::open(directory_of(&out)).and_then(|directory| directory.sync_all()).map_err(output)?;
        Ok(report)
    }
}

impl<'a> Encoder<'a> {
    /// Plans the records and chooses every tensor's treatment.
    pub fn new(checkpoint: &'a Checkpoint, options: &'a PackOptions, progress: &'a dyn Progress) -> Self {
        let mut encoder = Self {
            checkpoint,
            options,
            progress,
            plan: checkpoint.plan(),
            treatments: Vec::new(),
            exact_classes: ClassHistograms::default(),
        };
        encoder.progress.phase("reading", encoder.source_bytes());
        for record in &encoder.plan.records {
            let mut treatments = Vec::with_capacity(record.parts.len());
            for part in &record.parts {
                let (tensor, bytes) = encoder.tensor(part.file, part.tensor);
                let treatment = Treatment::choose(record, tensor, bytes, is_lossy(options.target), options);
                if let Treatment::Split(_) = treatment {
                    let counted = Drafted::new(treatment, tensor, bytes, 1.0, options).count();
                    encoder.exact_classes.merge(&counted);
                }
                encoder.finish_part(part.file, part.tensor);
                treatments.push(treatment);
            }
            encoder.treatments.push(treatments);
        }
        encoder
    }

    fn tensor(&self, file: usize, tensor: usize) -> (&'a TensorInfo, &'a [u8]) {
        let file = &self.checkpoint.files[file];
        (&file.header.tensors[tensor], file.tensor_bytes(tensor))
    }

    fn finish_part(&self, file: usize, tensor: usize) {
        let file = &self.checkpoint.files[file];
        file.release(tensor);
        self.progress.advance(file.header.tensors[tensor].length_bytes);
    }

    fn source_bytes(&self) -> u64 {
        self.checkpoint.files.iter().map(|file| file.header.file_bytes()).sum()
    }

    /// Elements that are to be quantized, and the sum of their squares.
    fn quantized_energy(&self) -> (u64, f64) {
        let (mut count, mut energy) = (0, 0.0);
        for (record, treatments) in self.plan.records.iter().zip(&self.treatments) {
            for (part, treatment) in record.parts.iter().zip(treatments) {
                if let Treatment::Quantized { .. } = treatment {
                    let (tensor, bytes) = self.tensor(part.file, part.tensor);
                    let values = values_of(&tensor.dtype, bytes);
                    count += tensor.elements();
                    let square: f64 =
                        values.iter().filter(|value| value.is_finite()).map(|&value| f64::from(value).powi(2)).sum();
                    energy += square;
                }
            }
        }
        (count, energy)
    }

    /// Counts and measures everything as keyframes with one step: tables are fitted to the nearest codes first, then to the
    /// codes that those tables lead to.
    fn scan(&self, step: f64) -> Scan {
        let mut nearest = self.exact_classes.clone();
        let (mut energy, mut quantized) = (0.0, 0);
        if self.has_quantized() {
            self.for_each_draft(step, &mut |_, draft| {
                if let Drafted::Quantized { values, .. } = &draft {
                    nearest.merge(&draft.count());
                    quantized += values.len() as u64;
                    energy += values.iter().map(|&value| f64::from(value).powi(2)).sum::<f64>();
                }
            });
        }
        let first_pool = nearest.fit();
        let mut placed_classes = self.exact_classes.clone();
        let mut squared_error = 0.0;
        let mut part_bits = vec![Vec::new(); self.plan.records.len()];
        self.for_each_draft(step, &mut |record, draft| {
            part_bits[record].push(match draft.count_placed(&first_pool) {
                Some(placed) => {
                    placed_classes.merge(&placed.classes);
                    squared_error += placed.squared_error;
                    placed.bits
                }
                None => draft.estimate(&first_pool),
            });
        });
        Scan { pool: placed_classes.fit(), part_bits, squared_error, energy, quantized }
    }

    /// Drafts all parts, one after another.
    fn for_each_draft(&self, step: f64, take: &mut dyn FnMut(usize, Drafted<'_>)) {
        self.progress.phase("measuring", self.source_bytes());
        for (ordinal, (record, treatments)) in self.plan.records.iter().zip(&self.treatments).enumerate() {
            for (part, &treatment) in record.parts.iter().zip(treatments) {
                let (tensor, bytes) = self.tensor(part.file, part.tensor);
                take(ordinal, Drafted::new(treatment, tensor, bytes, step as f32, self.options));
                self.finish_part(part.file, part.tensor);
            }
        }
    }

    fn has_quantized(&self) -> bool {
        self.treatments.iter().flatten().any(|treatment| matches!(treatment, Treatment::Quantized { .. }))
    }

    /// What would be done to every tensor, with estimated sizes.
    ///
    /// # Errors
    /// [`PackError::Rate`] where the target cannot be met.
    pub fn dry_run(&self) -> Result<Vec<TensorReport>, PackError> {
        let (_, scan) = self.first_step()?;
        let mut reports = Vec::new();
        for ((record, treatments), bits) in self.plan.records.iter().zip(&self.treatments).zip(&scan.part_bits) {
            for ((part, treatment), bits) in record.parts.iter().zip(treatments).zip(bits) {
                reports.push(self.tensor_report(record, part.file, part.tensor, treatment, *bits, None));
            }
        }
        Ok(reports)
    }

    fn tensor_report(
        &self,
        record: &RecordPlan,
        file: usize,
        tensor: usize,
        treatment: &Treatment,
        bits: f64,
        relative_squared_error: Option<f64>,
    ) -> TensorReport {
        let file = &self.checkpoint.files[file];
        let info = &file.header.tensors[tensor];
        TensorReport {
            file: file.name.clone(),
            name: info.name.clone(),
            dtype: info.dtype.to_string(),
            shape: info.shape.clone(),
            layer: record.layer,
            block_type: record.block_type.name(),
            treatment: treatment.name(),
            bits_per_element: bits / info.elements().max(1) as f64,
            relative_squared_error,
        }
    }

    /// Writes all records from the start of `out` on.
    fn write_records(&self, out: &mut (impl Write + Seek), step: f64, pool: &TablePool) -> Result<Written, WriteError> {
        self.progress.phase("encoding", self.source_bytes());
        out.seek(SeekFrom::Start(0))?;
        out.write_all(&[0; PREAMBLE_BYTES as usize])?; // written last
        let mut index = self.empty_index();
        let mut bytes = PREAMBLE_BYTES;
        let (mut stages, mut keyframe_records, mut predicted_records) = (StageTotals::default(), 0, 0);
        let mut numbers: BTreeMap<usize, u16> = BTreeMap::new();
        let pool_tables = pool.coding_tables();
        let plan_files = self.checkpoint.plan_files();
        let mut contexts: BTreeMap<BlockType, Context> = BTreeMap::new();
        let encoder = RecordEncoder { pool, options: self.options };
        for (ordinal, (record, treatments)) in self.plan.records.iter().zip(&self.treatments).enumerate() {
            let source: Vec<(&TensorInfo, &[u8])> =
                record.parts.iter().map(|part| self.tensor(part.file, part.tensor)).collect();
            let drafts: Vec<Drafted<'_>> = (source.iter().zip(treatments))
                .map(|(&(tensor, bytes), &treatment)| Drafted::new(treatment, tensor, bytes, step as f32, self.options))
                .collect();
            let context = (contexts.remove(&record.block_type))
                .filter(|context| !self.is_keyframe(record) && record.follows(&context.plan, &plan_files));
            let encoded = encoder.encode(record, &source, &drafts, context.as_ref());
            stages.add(&encoded.stages);
            predicted_records += u64::from(encoded.predicted);
            keyframe_records += u64::from(!encoded.predicted);

            let mut number_of = |table: usize| {
                let next = numbers.len() as u16;
                *numbers.entry(table).or_insert_with(|| {
                    index.tables.push(pool.table(table).coding.table().clone());
                    next
                })
            };
            let headers = encoded.parts.iter().map(|part| part.header(&mut number_of)).collect();
            let side =
                SideInformation { permutation: encoded.permutation.clone(), parts: headers, permutation_bytes: 0 };
            let side = side.write();
            let entry = RecordEntry {
                layer: record.layer,
                block_type: record.block_type as u8,
                reference: context.as_ref().filter(|_| encoded.predicted).map(|context| context.ordinal),
                side_bytes: side.len() as u64,
                side_crc: crc32c::crc32c(&side),
                parts: (record.parts.iter().zip(&encoded.parts))
                    .map(|(part, encoded)| PartEntry {
                        file: part.file as u32,
                        tensor: part.tensor as u32,
                        body_bytes: encoded.body.len() as u64,
                    })
                    .collect(),
            };
            bytes += entry.bytes();
            index.records.push(entry);
            out.write_all(&side)?;
            for part in &encoded.parts {
                out.write_all(&part.body)?;
            }

            if self.may_be_a_reference(record) {
                let decoded = self.decode_record(record, &source, &drafts, &encoded, context.as_ref(), &pool_tables)?;
                let permutation = encoded.grouped;
                let context = Context { ordinal: ordinal as u32, plan: record.clone(), permutation, decoded };
                contexts.insert(record.block_type, context);
            }
            for part in &record.parts {
                self.finish_part(part.file, part.tensor);
            }
        }
        Ok(Written { index, bytes, stages, keyframe_records, predicted_records })
    }

    /// The periodic keyframe schedule (Eq. 19), layers counted from 0.
    fn is_keyframe(&self, record: &RecordPlan) -> bool {
        record.layer.is_none_or(|layer| layer % self.options.keyframe_interval == 0)
    }

    /// Whether the next layer's record could be predicted from this one.
    fn may_be_a_reference(&self, record: &RecordPlan) -> bool {
        self.has_quantized()
            && self.options.predictor != PredictorChoice::None
            && record.layer.is_some_and(|layer| (layer + 1) % self.options.keyframe_interval != 0)
    }

    /// The local decode loop: what the decoder will have when it comes to the next layer.
    fn decode_record(
        &self,
        record: &RecordPlan,
        source: &[(&TensorInfo, &[u8])],
        drafts: &[Drafted<'_>],
        encoded: &super::record::EncodedRecord,
        context: Option<&Context>,
        tables: &[Arc<CodingTable>],
    ) -> Result<Vec<Option<Vec<u8>>>, SelfCheckError> {
        (drafts.iter().enumerate())
            .map(|(ordinal, draft)| {
                let Drafted::Quantized { .. } = draft else { return Ok(None) };
                let tensor = source[ordinal].0;
                let motion = (encoded.grouped.as_ref())
                    .and_then(|permutation| motion_of(&record.parts[ordinal], tensor, permutation));
                let reference = context.and_then(|context| context.decoded[ordinal].as_deref());
                decode_part(tensor, &encoded.parts[ordinal], tables, motion, reference).map(Some)
            })
            .collect()
    }

    fn empty_index(&self) -> Index {
        let files: Vec<FileEntry> = (self.checkpoint.files.iter())
            .map(|file| FileEntry {
                name: file.name.clone(),
                header: file.header.bytes.clone(),
                decoded_sha256: [0; 32],
                source_sha256: [0; 32],
            })
            .collect();
        let layers = self.plan.records.iter().filter_map(|record| record.layer).max().map_or(0, |layer| layer + 1);
        Index {
            architecture: self.plan.family.unwrap_or("unknown").to_owned(),
            layers,
            keyframe_interval: self.options.keyframe_interval,
            content_id: content_id(files.iter().map(|file| file.decoded_sha256)),
            files,
            tables: Vec::new(),
            block_types: BlockType::ALL.iter().map(|block_type| block_type.name().to_owned()).collect(),
            records: Vec::new(),
            bases: Vec::new(),
            provenance: self.options.provenance(),
        }
    }

    /// Packs into `out`, which must not exist unless `replace` is set.
    ///
    /// # Errors
    /// See [`PackError`]; after one, nothing is at `out` that was not there before.
    pub fn pack(&self, out: &Path, replace: bool) -> Result<PackReport, PackError> {
        self.write(out)?.publish(replace)
    }

    /// Packs into a hidden file beside `out`, to which [`Finished::publish`] gives that name.
    ///
    /// # Errors
    /// See [`PackError`]; the hidden file is gone then.
    pub fn write(&self, out: &Path) -> Result<Finished, PackError> {
        let output = |source| PackError::Output { path: out.to_owned(), source };
        // Before the work, in case it cannot be made. Hidden and without the archive's suffix: a run cut short leaves
        // nothing that looks finished.
        let mut temporary = tempfile::Builder::new()
            .prefix(UNFINISHED_PREFIX)
            .suffix(".partial")
            .permissions(Permissions::from_mode(0o666)) // less the umask, as any other new file
            .tempfile_in(directory_of(out))
            .map_err(output)?;
        let (step, scan) = self.first_step()?;
        let (written, compared, target_missed) = self.settle(temporary.as_file_mut(), step, scan, out)?;

        let mut index = written.index;
        for (file, (decoded, source)) in index.files.iter_mut().zip(compared.decoded.iter().zip(&compared.sources)) {
            file.decoded_sha256 = *decoded;
            file.source_sha256 = *source;
        }
        index.content_id = content_id(compared.decoded.iter().copied());
        let archive_bytes = write_index(temporary.as_file_mut(), &index, written.bytes).map_err(output)?;
        temporary.as_file().sync_all().map_err(output)?;
        let archive = Archive::open(temporary.path())?;

        let tensors = self.tensor_reports(&archive, &compared);
        let (squared_error, energy) = self.quantized_error(&compared);
        let parameters = self.checkpoint.parameters();
        let report = PackReport {
            archive: out.display().to_string(),
            architecture: index.architecture,
            source_bytes: self.source_bytes(),
            archive_bytes,
            parameters,
            bits_per_parameter: 8.0 * archive_bytes as f64 / parameters.max(1) as f64,
            lossless: compared.decoded == compared.sources,
            relative_squared_error: if energy > 0.0 { squared_error / energy } else { 0.0 },
            target_missed,
            keyframe_records: written.keyframe_records,
            predicted_records: written.predicted_records,
            stages: written.stages,
            tensors,
        };
        Ok(Finished { temporary, out: out.to_owned(), report })
    }

    fn tensor_reports(&self, archive: &Archive, compared: &Compared) -> Vec<TensorReport> {
        let mut reports = Vec::new();
        for (ordinal, (record, treatments)) in self.plan.records.iter().zip(&self.treatments).enumerate() {
            let entry = archive.record(ordinal as u32);
            for ((part, treatment), stored) in record.parts.iter().zip(treatments).zip(&entry.parts) {
                let (squared_error, energy) = compared.errors[part.file][part.tensor];
                let error = if energy > 0.0 { squared_error / energy } else { 0.0 };
                let bits = 8.0 * stored.body_bytes as f64;
                reports.push(self.tensor_report(record, part.file, part.tensor, treatment, bits, Some(error)));
            }
        }
        reports
    }
}

/// Writing a record failed.
enum WriteError {
    Io(std::io::Error),
    SelfCheck(SelfCheckError),
}

impl From<std::io::Error> for WriteError {
    fn from(error: std::io::Error) -> Self {
        Self::Io(error)
    }
}

impl From<SelfCheckError> for WriteError {
    fn from(error: SelfCheckError) -> Self {
        Self::SelfCheck(error)
    }
}

/// Writes the index after the records and the preamble before them; returns the length of the whole file.
fn write_index(file: &mut std::fs::File, index: &Index, records_end: u64) -> std::io::Result<u64> {
    let (preamble, stored) = index.write(records_end);
    file.set_len(records_end)?;
    file.seek(SeekFrom::Start(records_end))?;
    file.write_all(&stored)?;
    file.seek(SeekFrom::Start(0))?;
    file.write_all(&preamble.write())?;
    Ok(preamble.file_bytes)
}

/// The directory that `path` lies in.
fn directory_of(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    }
}
