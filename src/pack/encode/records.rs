//! Writing: records one after another, each from its source to its bytes, and the index behind them.

use std::collections::BTreeMap;
use std::io::{Seek, SeekFrom, Write};
use std::sync::Arc;

use sha2::{Digest, Sha256};

use super::super::calibration::Calibration;
use super::super::entropy_model::TablePool;
use super::super::evaluation::{Evaluation, EvaluationReport};
use super::super::options::OPTIONS;
use super::super::part::{EncodedPart, SelfCheckError};
use super::super::quantize::values_of;
use super::super::record::{Below, Context, EncodedRecord, FoundMotion, RecordEncoder, decode_part};
use super::super::report::StageTotals;
use super::super::survey::{Probe, ProbedPart};
use super::super::symbols::RunLayout;
use super::super::train::state::StateError;
use super::super::train::{TrainError, Trainer};
use super::super::treatment::{Decision, Drafted, Fineness, Treatment};
use super::steering::Steering;
use super::{Encoder, PackError};
use crate::archive::content_id;
use crate::codec::architecture::{BlockType, RecordPlan};
use crate::decode::Pools;
use crate::decode::prepared::Motions;
use crate::format::bytes::crc32c;
use crate::format::codebook::StoredCodebook;
use crate::format::index::{FileEntry, Index};
use crate::format::part::{Coding, StoredPredictor};
use crate::format::preamble::PREAMBLE_BYTES;
use crate::format::record::{PartEntry, RecordEntry, SideInformation};
use crate::forward::ForwardError;
use crate::tensor::TensorInfo;

/// Steps of training that take about as long as quantizing everything in a closed loop.
const STEPS_AS_LONG_AS_ENCODING: u64 = 8;
/// What says in the provenance how weights were trained.
pub(super) const TRAINING: &str = "training";
/// How far off a rate of its own a part may be, relative, before it is coded once more.
const OWN_RATE_TOLERANCE: f64 = 0.002;
/// What a weight saves, in bits, where its step is doubled: nearly one at all rates that matter.
const BITS_PER_OCTAVE: f64 = 0.95;
/// Stands for an error that is not yet measured, and takes as many bytes.
const UNKNOWN_ERROR: f64 = 1.2345e-3;

/// An archive's records, written.
pub(super) struct Written {
    pub(super) index: Index,
    /// Where the records end.
    pub(super) bytes: u64,
    pub(super) stages: StageTotals,
    pub(super) keyframe_records: u64,
    pub(super) predicted_records: u64,
    /// How far the decoded model is from the checkpoint on inputs that it was not trained on, where that was asked.
    pub(super) held_out_distance: Option<f64>,
    /// Bits of the bodies of predicted parts, and their elements.
    pub(super) residual_bits: f64,
    pub(super) residual_elements: u64,
    /// Every part as it was written, record by record.
    pub(super) parts: Vec<Vec<ProbedPart>>,
}

/// Writing a record failed.
pub(super) enum WriteError {
    Io(std::io::Error),
    SelfCheck(SelfCheckError),
    Start(Box<PackError>),
    Forward(ForwardError),
    State(StateError),
    Interrupted,
}

impl From<TrainError> for WriteError {
    fn from(error: TrainError) -> Self {
        match error {
            TrainError::Forward(error) => Self::Forward(error),
            TrainError::State(error) => Self::State(error),
        }
    }
}

impl From<std::io::Error> for WriteError {
    fn from(error: std::io::Error) -> Self {
        Self::Io(error)
    }
}

impl From<PackError> for WriteError {
    fn from(error: PackError) -> Self {
        Self::Start(Box::new(error))
    }
}

impl From<ForwardError> for WriteError {
    fn from(error: ForwardError) -> Self {
        Self::Forward(error)
    }
}

impl From<SelfCheckError> for WriteError {
    fn from(error: SelfCheckError) -> Self {
        Self::SelfCheck(error)
    }
}

impl Encoder<'_> {
    /// Writes all records from the start of `out` on, as `plan` has them, steps corrected by `steering`; with what `trainer`
    /// makes of the weights, where there is one. `found` has an entry per record.
    pub(super) fn write_records(
        &self,
        out: &mut (impl Write + Seek),
        plan: &Probe,
        mut steering: Steering,
        mut trainer: Option<&mut Trainer<'_>>,
        found: &mut [FoundMotion],
    ) -> Result<Written, WriteError> {
        let step_bytes = self.source_bytes() / STEPS_AS_LONG_AS_ENCODING;
        let steps = trainer.as_ref().map_or(0, |trainer| trainer.schedule().steps as u64);
        let phase = if steps > 0 { "training" } else { "encoding" };
        self.progress.phase(phase, self.source_bytes() + steps * step_bytes);
        out.seek(SeekFrom::Start(0))?;
        out.write_all(&[0; PREAMBLE_BYTES as usize])?; // written last
        let mut written = Written {
            index: self.empty_index(),
            bytes: PREAMBLE_BYTES,
            stages: StageTotals::default(),
            keyframe_records: 0,
            predicted_records: 0,
            held_out_distance: None,
            residual_bits: 0.0,
            residual_elements: 0,
            parts: Vec::with_capacity(plan.parts.len()),
        };
        let pool = &plan.pool;
        let mut numbers: BTreeMap<usize, u16> = BTreeMap::new();
        let pool_tables = pool.coding_tables();
        let network = self.network();
        let networks: Vec<_> = network.iter().map(|network| Arc::clone(network.network())).collect();
        let pools = Pools { tables: &pool_tables, codebooks: pool.codebooks(), networks: &networks };
        written.index.codebooks = stored_codebooks(pool);
        if steps > 0
            && let Some(trainer) = &trainer
        {
            written.index.provenance.push((TRAINING.to_owned(), trainer.schedule().description()));
        }
        let plan_files = self.checkpoint.plan_files();
        let mut contexts: BTreeMap<BlockType, Context> = BTreeMap::new();
        let mut needs_base = false;
        let mut uses_network = false;
        let encoder = RecordEncoder { pool, options: self.options, network };
        let mut statistics = self.calibration.as_ref().map(Calibration::statistics);
        for (ordinal, (record, planned)) in self.plan.records.iter().zip(&plan.parts).enumerate() {
            if self.progress.is_interrupted() {
                return Err(WriteError::Interrupted);
            }
            let source: Vec<(&TensorInfo, &[u8])> =
                record.parts.iter().map(|part| self.tensor(part.file, part.tensor)).collect();
            if let Some(trainer) = &mut trainer
                && planned.iter().any(|part| part.decision.is_quantized())
            {
                trainer.train(self.progress, step_bytes)?;
            }
            let follow = |part: &ProbedPart| if part.follows_step { steering.step_factor() } else { 1.0 };
            let step_factors: Vec<f32> = planned.iter().map(follow).collect();
            let mut drafts = self.drafts(record, &source, planned, &step_factors)?;
            let context = (contexts.remove(&record.block_type))
                .filter(|context| !self.is_keyframe(record) && record.follows(&context.plan, &plan_files));
            let feedback = match &mut statistics {
                Some(statistics) => statistics.of_record(record, &quantized_layouts(&source, &drafts))?,
                None => Vec::new(),
            };
            let activations = statistics.as_ref().and_then(|statistics| statistics.activations(record, &source));
            let moves = match trainer.as_ref().filter(|_| steps > 0) {
                Some(trainer) => source.iter().map(|(tensor, _)| trainer.moves(&tensor.name)).collect(),
                None => vec![None; source.len()],
            };
            move_values(&mut drafts, &moves);
            let mut encode = |drafts: &[Drafted<'_>]| {
                let below = context.as_ref().map(|context| Below {
                    context,
                    activations: activations.as_ref(),
                    found: &mut found[ordinal],
                });
                encoder.encode(record, &source, drafts, &feedback, below)
            };
            let mut encoded = encode(&drafts);
            if feedback.iter().any(Option::is_some)
                && let Some(step_factors) =
                    own_step_factors(&self.treatments[ordinal], &drafts, &encoded, &step_factors)
            {
                // What a closed loop takes no sample shows.
                drafts = self.drafts(record, &source, planned, &step_factors)?;
                move_values(&mut drafts, &moves);
                encoded = encode(&drafts);
            }
            written.stages.add(&encoded.stages);
            written.predicted_records += u64::from(encoded.predicted);
            written.keyframe_records += u64::from(!encoded.predicted);

            for (part, (tensor, _)) in encoded.parts.iter().zip(&source) {
                if let Some(prediction) = part.prediction() {
                    written.residual_bits += 8.0 * part.body.len() as f64;
                    written.residual_elements += tensor.elements();
                    written.index.has_predictors |= prediction.predictor.needs_feature();
                    uses_network |= matches!(prediction.predictor, StoredPredictor::Network { .. });
                }
            }
            needs_base |= encoded.parts.iter().any(EncodedPart::starts_from_base);
            let reference = context.as_ref().filter(|_| encoded.predicted).map(|context| context.ordinal);
            let bytes = write_record(out, record, &encoded, reference, pool, &mut numbers, &mut written.index)?;
            written.bytes += bytes;
            let parts = written_parts(planned, &drafts, &encoded.parts, bytes);
            steering.account(planned, &parts);
            written.parts.push(parts);

            let is_reference = self.may_be_a_reference(record);
            let decoded = match is_reference || trainer.is_some() {
                true => self.decode_record(record, &source, &drafts, &encoded, context.as_ref(), pools)?,
                false => Vec::new(),
            };
            if let Some(trainer) = &mut trainer {
                for (&(tensor, _), bytes) in source.iter().zip(&decoded) {
                    // What turned out to be bit-exact is as it was.
                    trainer.settle(&tensor.name, bytes.as_ref().map(|bytes| values_of(&tensor.dtype, bytes)));
                }
            }
            if is_reference {
                let below = context
                    .filter(|_| encoded.predicted && network.is_some_and(|network| network.contexts() == 2))
                    .map(|context| context.decoded);
                let context = Context {
                    ordinal: ordinal as u32,
                    plan: record.clone(),
                    permutation: encoded.grouped,
                    decoded,
                    below,
                    activations,
                };
                contexts.insert(record.block_type, context);
            }
            for part in &record.parts {
                self.finish_part(part.file, part.tensor);
            }
        }
        if !uses_network {
            written.index.networks.clear(); // no part was cheaper with it
        }
        if !needs_base {
            written.index.bases.clear(); // everything turned out shorter alone
        }
        written.held_out_distance = trainer.map(|trainer| trainer.held_out_distance()).transpose()?;
        Ok(written)
    }

    /// The parts of a record as planned, their steps multiplied by these factors.
    fn drafts<'s>(
        &self,
        record: &RecordPlan,
        source: &[(&'s TensorInfo, &'s [u8])],
        planned: &[ProbedPart],
        step_factors: &[f32],
    ) -> Result<Vec<Drafted<'s>>, PackError> {
        let parts = source.iter().zip(&record.parts).zip(planned.iter().zip(step_factors));
        parts
            .map(|((&(tensor, bytes), part), (planned, &step_factor))| {
                let start = self.start(part.file, part.tensor, planned.decision.is_quantized())?;
                Ok(Drafted::new(planned.decision, tensor, bytes, start, step_factor, self.options))
            })
            .collect()
    }

    /// The local decode loop: what the decoder will have when it comes to the next layer, of every quantized part.
    fn decode_record(
        &self,
        record: &RecordPlan,
        source: &[(&TensorInfo, &[u8])],
        drafts: &[Drafted<'_>],
        encoded: &EncodedRecord,
        context: Option<&Context>,
        pools: Pools<'_>,
    ) -> Result<Vec<Option<Vec<u8>>>, WriteError> {
        (drafts.iter().enumerate())
            .map(|(ordinal, draft)| {
                let Drafted::Quantized { base, .. } = draft else { return Ok(None) };
                let tensor = source[ordinal].0;
                if base.is_some() {
                    let part = &record.parts[ordinal];
                    let start = self.start(part.file, part.tensor, true)?.expect("the part starts from the base");
                    let part = &encoded.parts[ordinal];
                    return Ok(Some(decode_part(&*self.engine, tensor, part, pools, None, Some(&start.predicted))?));
                }
                let part = &encoded.parts[ordinal];
                let contexts = if part.looks_at_two_layers() { 2 } else { 1 };
                let reference = context.and_then(|context| context.references(ordinal, contexts));
                let motions = match (context, &encoded.grouped) {
                    (Some(context), Some(permutation)) => {
                        context.motions_of(&record.parts[ordinal], tensor, permutation)
                    }
                    _ => Motions::default(),
                };
                Ok(Some(decode_part(&*self.engine, tensor, part, pools, motions, reference.as_deref())?))
            })
            .collect()
    }

    fn empty_index(&self) -> Index {
        let files: Vec<FileEntry> = (self.checkpoint.files.iter())
            .map(|file| FileEntry {
                name: file.name.clone(),
                header: file.header.bytes.clone(),
                // Until they are known others, which deflate as little.
                decoded_sha256: Sha256::digest(["decoded ", &file.name].concat()).into(),
                source_sha256: Sha256::digest(["source ", &file.name].concat()).into(),
                decoded_blake3: Some(Sha256::digest(["tree ", &file.name].concat()).into()),
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
            codebooks: Vec::new(),
            networks: self.network().iter().map(|network| network.network().stored().clone()).collect(),
            block_types: BlockType::NAMES.map(str::to_owned).to_vec(),
            records: Vec::new(),
            bases: self.base.iter().map(|base| base.reference()).collect(),
            has_units: false,
            has_predictors: false,
            has_column_scales: false,
            provenance: self.provenance(UNKNOWN_ERROR, self.evaluation.as_ref().map(Evaluation::stand_in).as_ref()),
        }
    }

    /// How the archive came to be, and what was measured on what it decodes to. Nothing of the machine or the hour is in it.
    pub(super) fn provenance(
        &self,
        relative_squared_error: f64,
        evaluation: Option<&EvaluationReport>,
    ) -> Vec<(String, String)> {
        let mut provenance = self.options.provenance();
        if let Some(profile) = self.profile {
            for (_, options) in provenance.iter_mut().filter(|(key, _)| key == OPTIONS) {
                options.push_str(&format!(" --profile '{}'", profile.name()));
            }
        }
        let mut add = |key: &str, value: String| provenance.push((key.to_owned(), value));
        if let Some(calibration) = &self.calibration {
            add("calibration", calibration.data().origin.to_string());
        }
        if self.has_quantized() {
            add("measured", format!("relative squared error {relative_squared_error:.4e}"));
        }
        if let Some(evaluation) = evaluation {
            add("evaluation", evaluation.to_string());
        }
        provenance
    }

    /// Bits of preamble and index for records like these, about.
    pub(super) fn index_bits(&self, plan: &Probe) -> f64 {
        let mut index = self.empty_index();
        index.tables = plan.pool.coding_tables().iter().map(|table| table.table().clone()).collect();
        index.codebooks = stored_codebooks(&plan.pool);
        for (record, parts) in self.plan.records.iter().zip(&plan.parts) {
            let mut entry = record_entry(record, parts.iter().map(|part| (part.bits / 8.0) as u64));
            entry.side_crc = crc32c(&index.records.len().to_le_bytes()); // no two alike, as in the real index
            index.records.push(entry);
        }
        let (_, stored) = index.write(0);
        8.0 * (PREAMBLE_BYTES as f64 + stored.len() as f64)
    }
}

fn stored_codebooks(pool: &TablePool) -> Vec<StoredCodebook> {
    pool.codebooks().iter().map(|codebook| codebook.stored()).collect()
}

/// The tensors of a record, each with the layout of its runs where it is quantized.
fn quantized_layouts<'a>(
    source: &[(&'a TensorInfo, &[u8])],
    drafts: &[Drafted<'_>],
) -> Vec<(&'a TensorInfo, Option<RunLayout>)> {
    let layout = |draft: &Drafted<'_>| match draft {
        Drafted::Quantized { layout, .. } => Some(*layout),
        _ => None,
    };
    source.iter().zip(drafts).map(|(&(tensor, _), draft)| (tensor, layout(draft))).collect()
}

/// Moves the values of drafts, but for those that would get values without codes.
fn move_values(drafts: &mut [Drafted<'_>], moves: &[Option<Vec<f32>>]) {
    for (draft, moves) in drafts.iter_mut().zip(moves) {
        if let (Drafted::Quantized { values, layout, quantizer, .. }, Some(moves)) = (draft, moves) {
            let moved: Vec<f32> = values.iter().zip(moves).map(|(value, by)| value + by).collect();
            if quantizer.holds(&moved, *layout) {
                *values = moved;
            }
        }
    }
}

/// The factors with which parts that have a rate of their own meet it, given what they took with these; `None` where they do.
fn own_step_factors(
    treatments: &[Treatment],
    drafts: &[Drafted<'_>],
    encoded: &EncodedRecord,
    step_factors: &[f32],
) -> Option<Vec<f32>> {
    let mut better = step_factors.to_vec();
    for (part, (treatment, draft)) in treatments.iter().zip(drafts).enumerate() {
        let (Treatment::Quantized(Fineness::Rate(wanted)), Drafted::Quantized { values, .. }) = (treatment, draft)
        else {
            continue;
        };
        let bits = encoded.parts[part].stored_bits() / values.len() as f64;
        if (bits / wanted - 1.0).abs() > OWN_RATE_TOLERANCE {
            better[part] *= ((bits - wanted) / BITS_PER_OCTAVE).exp2() as f32;
        }
    }
    (better != step_factors).then_some(better)
}

/// Writes one record, adds it to the index, and returns its length in bytes.
fn write_record(
    out: &mut impl Write,
    record: &RecordPlan,
    encoded: &EncodedRecord,
    reference: Option<u32>,
    pool: &TablePool,
    numbers: &mut BTreeMap<usize, u16>,
    index: &mut Index,
) -> std::io::Result<u64> {
    let mut number_of = |table: usize| {
        let next = numbers.len() as u16;
        *numbers.entry(table).or_insert_with(|| {
            index.tables.push(pool.table(table).coding.table().clone());
            next
        })
    };
    let headers = encoded.parts.iter().map(|part| part.header(&mut number_of)).collect();
    let has = |is_so: fn(&Coding) -> bool| encoded.parts.iter().any(|part| is_so(part.coding()));
    index.has_units |= has(Coding::is_of_units);
    index.has_column_scales |= has(Coding::has_column_scales);
    let side = SideInformation { permutation: encoded.permutation.clone(), parts: headers, permutation_bytes: 0 };
    let side = side.write();
    let mut entry = record_entry(record, encoded.parts.iter().map(|part| part.body.len() as u64));
    entry.reference = reference;
    entry.side_bytes = side.len() as u64;
    entry.side_crc = crc32c(&side);
    let bytes = entry.bytes();
    index.records.push(entry);
    out.write_all(&side)?;
    for part in &encoded.parts {
        out.write_all(&part.body)?;
    }
    Ok(bytes)
}

/// A record's entry, its side information and reference left open.
fn record_entry(record: &RecordPlan, body_bytes: impl Iterator<Item = u64>) -> RecordEntry {
    RecordEntry {
        layer: record.layer,
        block_type: record.block_type.number(),
        reference: None,
        side_bytes: 0,
        side_crc: 0,
        parts: (record.parts.iter().zip(body_bytes))
            .map(|(part, body_bytes)| PartEntry { file: part.file as u32, tensor: part.tensor as u32, body_bytes })
            .collect(),
    }
}

/// The parts of a record as they were written; side information is shared out by what was planned.
fn written_parts(
    planned: &[ProbedPart],
    drafts: &[Drafted<'_>],
    encoded: &[EncodedPart],
    record_bytes: u64,
) -> Vec<ProbedPart> {
    let bodies: usize = encoded.iter().map(|part| part.body.len()).sum();
    let side_bits = 8.0 * (record_bytes as f64 - bodies as f64) / encoded.len().max(1) as f64;
    (planned.iter().zip(drafts).zip(encoded))
        .map(|((planned, draft), encoded)| ProbedPart {
            decision: match draft {
                Drafted::Quantized { quantizer, .. } => Decision::Quantized(quantizer.choice),
                Drafted::Split(split, ..) => Decision::Split(*split),
                Drafted::Based { choice, .. } => Decision::Based(*choice),
                Drafted::Raw(_) => Decision::Raw,
            },
            bits: 8.0 * encoded.body.len() as f64 + side_bits,
            squared_error: encoded.squared_error,
            ..*planned
        })
        .collect()
}

/// Writes the index after the records and the preamble before them; returns the length of the whole file.
pub(super) fn write_index(file: &mut std::fs::File, index: &Index, records_end: u64) -> std::io::Result<u64> {
    let (preamble, stored) = index.write(records_end);
    file.set_len(records_end)?;
    file.seek(SeekFrom::Start(records_end))?;
    file.write_all(&stored)?;
    file.seek(SeekFrom::Start(0))?;
    file.write_all(&preamble.write())?;
    Ok(preamble.file_bytes)
}
