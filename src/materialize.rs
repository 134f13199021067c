//! Any byte range of any mounted file, from an opened archive, an engine and the cache.
//!
//! What is decoded at once is a strip, or the whole tensor where prediction ties its strips together: a predicted part, and
//! a part that others may be predicted from. Strips that lie side by side and are wanted together are decoded together,
//! which is what vector engines are best at.
//!
//! Decoded bytes are kept in the cache where somebody else may need them. A reader that keeps what it is given (the kernel
//! does, in its page cache) gets its strips decoded in place, and the cache keeps what it left over of them until it has
//! taken that too. What is decoded ahead of such a reader lies ready in `pieces`, to be handed on without a copy.
//!
//! # Waiting
//!
//! No lock is held while decoding. Whoever may decode first takes a share of the working memory, large enough for all that
//! it will decode, and then waits for nothing but values that holders of such shares are making; a processor is taken for
//! the decoding itself and nothing else. A predicted tensor waits for its reference and never the other way round. So
//! nobody waits in a circle, whatever the number of readers and however little memory there is. A variant waits for its
//! base and never the other way round. A large decode is spread over threads of its own; none that waits here takes up
//! other work meanwhile, so readers may be threads of any pool.

mod ahead;
mod based;
mod pieces;
mod prepared_records;
mod ranges;
mod record;
mod strips;
mod whole;

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::Instant;

use crate::archive::{Archive, ArchiveError, PartAddress};
use crate::budget::{Budget, Share};
use crate::cache::{Cache, CacheStats, Loan};
use crate::decode::cpu::WORDS_PADDING;
use crate::decode::cuda::DEFAULT_GPU_MEMORY_BYTES;
use crate::decode::prepared::PartKind;
use crate::decode::{DecodeError, Engine, PreparedPart, StripJob};
use crate::format::limits;
use crate::metrics::METRICS;
use pieces::Pieces;
use prepared_records::PreparedRecords;

pub use crate::decode::EngineChoice;
pub use pieces::Decoded;
pub use record::prepare_record;

/// How a [`Materializer`] works.
#[derive(Clone, Copy, Debug)]
pub struct MaterializeOptions {
    /// Budget of decoded bytes that are kept: the cache, and what was decoded ahead.
    pub cache_bytes: u64,
    /// What decoding may take beside the cache: what is being decoded, and what it is decoded from. A single tensor that
    /// needs more is decoded alone, and the cache makes room for it.
    pub working_bytes: u64,
    /// How many threads may decode at a time.
    pub threads: usize,
    /// Which engine decodes.
    pub engine: EngineChoice,
    /// What decoding may take of a CUDA device's memory, where the engine is that.
    pub gpu_memory_bytes: u64,
}

impl Default for MaterializeOptions {
    /// The best engine on all processors, no limit to working memory, and no cache.
    fn default() -> Self {
        let threads = thread::available_parallelism().map_or(1, usize::from);
        let (engine, gpu_memory_bytes) = (EngineChoice::Auto, DEFAULT_GPU_MEMORY_BYTES);
        Self { cache_bytes: 0, working_bytes: u64::MAX, threads, engine, gpu_memory_bytes }
    }
}

/// Why bytes could not be produced. Cheap to clone: waiters of one decode share it.
#[derive(Clone, Debug, thiserror::Error)]
pub enum MaterializeError {
    /// The archive could not be read, or its bytes are not what they should be.
    #[error("{0}")]
    Archive(Arc<ArchiveError>),
    /// A tensor that is decoded whole takes more memory than there may be.
    #[error(
        "{archive}: {tensor}: takes {needed_bytes} bytes to decode, expected at most {available_bytes}: the memory limit is too low"
    )]
    TooLarge {
        /// File name of the archive.
        archive: String,
        /// Name of the tensor.
        tensor: String,
        /// Memory for it, for what it is predicted from, and for what both are decoded from.
        needed_bytes: u64,
        /// Working memory and cache together.
        available_bytes: u64,
    },
    /// A tensor does not decode.
    #[error("{archive}: {tensor} (layer {layer}, {block_type}, record {record}): {error}")]
    Decode {
        /// File name of the archive.
        archive: String,
        /// Name of the tensor.
        tensor: String,
        /// Layer of its record, `none` outside the layers.
        layer: String,
        /// Block type of its record.
        block_type: String,
        /// Record, counted in the index.
        record: u32,
        /// What is wrong.
        error: DecodeError,
    },
}

impl From<ArchiveError> for MaterializeError {
    fn from(error: ArchiveError) -> Self {
        Self::Archive(Arc::new(error))
    }
}

/// What the cache keeps: one strip of a part, or all of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct UnitKey {
    archive: u64,
    record: u32,
    part: u32,
    /// `None` for the whole tensor.
    strip: Option<u32>,
}

/// Who keeps what a read decodes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Keeper {
    /// The cache.
    Cache,
    /// Whoever asked: strips are decoded in place, and what the cache has of them it need not keep.
    Reader,
}

/// What bytes of a tensor are wanted for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Purpose {
    /// A reader, who waits for the memory that decoding them takes.
    Reading(Keeper),
    /// To decode others from. Whoever does has taken the memory for both, and the cache keeps them.
    Decoding,
}

impl Purpose {
    fn keeper(self) -> Keeper {
        match self {
            Self::Reading(keeper) => keeper,
            Self::Decoding => Keeper::Cache,
        }
    }
}

/// Decodes on demand, remembering what it decoded. Shared by all archives of a mount; every method takes `&self`.
#[derive(Debug)]
pub struct Materializer {
    engine: Arc<dyn Engine>,
    cache: Cache<UnitKey>,
    /// How much readers that keep their bytes have taken of strips in the cache.
    taken_bytes: Mutex<HashMap<UnitKey, usize>>,
    pieces: Arc<Pieces>,
    prepared: PreparedRecords,
    /// Bytes being decoded and what they are decoded from: see "Waiting" above.
    memory: Budget,
    processors: Budget,
    /// Buffers for stored bytes, kept for reuse: one per processor at most.
    stored: Mutex<Vec<Vec<u8>>>,
}

impl Materializer {
    /// Starts with an empty cache.
    pub fn new(options: MaterializeOptions) -> Self {
        Self::with_engine(options, options.engine.engine_within(options.gpu_memory_bytes))
    }

    /// [`Self::new`] with an engine that is there already, whatever the options say.
    pub fn with_engine(options: MaterializeOptions, engine: Arc<dyn Engine>) -> Self {
        let piece_bytes = options.cache_bytes / 4;
        Self {
            engine,
            cache: Cache::new(options.cache_bytes - piece_bytes),
            taken_bytes: Mutex::default(),
            pieces: Arc::new(Pieces::new(piece_bytes)),
            prepared: PreparedRecords::new(options.working_bytes / 8),
            memory: Budget::new(options.working_bytes - options.working_bytes / 8),
            processors: Budget::new(options.threads.max(1) as u64),
            stored: Mutex::default(),
        }
    }

    /// What is kept and what that has done: the cache, and the pieces decoded ahead.
    pub fn cache_stats(&self) -> CacheStats {
        let (bytes, entries, hits) = self.pieces.stats();
        let cache = self.cache.stats();
        CacheStats {
            hits: cache.hits + hits,
            bytes: cache.bytes + bytes,
            entries: cache.entries + entries,
            budget_bytes: cache.budget_bytes + self.pieces.most_bytes(),
            ..cache
        }
    }

    /// Takes working memory; where all of it does not suffice, the cache lends the rest.
    fn take_memory(&self, bytes: u64) -> (Share<'_>, Option<Loan<'_, UnitKey>>) {
        let share = self.memory.take(bytes);
        METRICS.memory_waits.add(share.has_waited().into());
        let missing = bytes.saturating_sub(self.memory.total()); // whoever misses some has all, and borrows alone
        (share, (missing > 0).then(|| self.cache.lend(missing)))
    }

    /// Decodes whole strips of a part that lie side by side, from number `first` on, each into one of `outs`. The caller
    /// holds the memory for it.
    fn decode(
        &self,
        archive: &Archive,
        address: PartAddress,
        part: &PreparedPart,
        first: usize,
        reference: Option<&[u8]>,
        outs: Vec<&mut [u8]>,
    ) -> Result<(), MaterializeError> {
        let bytes: usize = outs.iter().map(|out| out.len()).sum();
        let last = first + outs.len() - 1;
        let of_base = match part.base() {
            Some(reference) => Some(self.base_bytes(archive, reference, part.output_range(first..last + 1))?),
            None => None,
        };
        let reference = of_base.as_deref().or(reference);
        let (start, end) = (part.strip_range(first).start, part.strip_range(last).end);
        let length = (end - start) as usize;
        let mut stored = self.stored.lock().unwrap_or_else(PoisonError::into_inner).pop().unwrap_or_default();
        stored.resize(stored.len().max(length + WORDS_PADDING), 0);
        archive.read_body(address, start, &mut stored[..length])?;
        // After the archive has been read: storage may take its time.
        let processor = self.processors.take(1);
        let clock = Instant::now();
        let mut jobs: Vec<StripJob<'_>> = (first..)
            .zip(outs)
            .map(|(strip, out)| {
                let offset = (part.strip_range(strip).start - start) as usize;
                StripJob { strip, stored: &stored[offset..], out }
            })
            .collect();
        let decoded = self.engine.decode_strips(part, reference, &mut jobs);
        METRICS.decode_seconds.record(clock.elapsed());
        METRICS.decoded_bytes.add(bytes as u64);
        drop((jobs, processor));
        let mut kept = self.stored.lock().unwrap_or_else(PoisonError::into_inner);
        if (kept.len() as u64) < self.processors.total() && stored.len() <= 2 * strips::TOGETHER_BYTES {
            kept.push(stored);
        }
        drop(kept);
        decoded.map_err(|error| decode_error(archive, address, error))
    }

    /// What is decoded in one call at most, near enough.
    fn together_bytes(&self) -> u64 {
        (strips::TOGETHER_BYTES as u64).max(self.engine.strips_at_once() as u64 * limits::RAW_STRIP_BYTES)
    }

    /// How many strips of a part are decoded in one call at most: what the engine does best together, or what a reader
    /// asks for at once.
    fn strips_together(&self, part: &PreparedPart) -> usize {
        self.engine.strips_at_once().max(strips::TOGETHER_BYTES / part.full_strip_output_bytes() as usize)
    }
}

fn is_decoded_whole(archive: &Archive, address: PartAddress, part: &PreparedPart) -> bool {
    match part.kind() {
        PartKind::Raw | PartKind::Split { .. } | PartKind::Units { .. } | PartKind::Based(_) => false,
        PartKind::Quantized { .. } => part.prediction().is_some() || archive.is_referenced(address.record),
    }
}

/// Room for decoded bytes.
fn zeroed(length: usize) -> Arc<[u8]> {
    // SAFETY: zeros are valid bytes.
    unsafe { Arc::new_zeroed_slice(length).assume_init() }
}

/// The only owner's bytes.
fn bytes_of(new: &mut Arc<[u8]>) -> &mut [u8] {
    Arc::get_mut(new).expect("nobody else has it yet")
}

/// An error of the engine with what it was decoding.
pub fn decode_error(archive: &Archive, address: PartAddress, error: DecodeError) -> MaterializeError {
    let record = archive.record(address.record);
    MaterializeError::Decode {
        archive: archive.path().display().to_string(),
        // A record without parts may still carry a permutation that does not decode.
        tensor: record
            .parts
            .get(address.part as usize)
            .map_or("no tensor".into(), |_| archive.tensor(address).name.clone()),
        layer: record.layer.map_or("none".into(), |layer| layer.to_string()),
        block_type: archive.block_type(address.record).to_owned(),
        record: address.record,
        error,
    }
}
