//! Prepared records, kept within a budget: preparing one reads and decodes its side information.

use std::sync::{Arc, Mutex, PoisonError};

use lru::LruCache;

use super::{MaterializeError, prepare_record};
use crate::archive::Archive;
use crate::codec::integers::Integers;
use crate::decode::PreparedPart;

/// More than this is not worth keeping: it is the side information of a model of some hundred billion parameters.
const MOST_BYTES: u64 = 256 << 20;

/// The parts of a record.
pub(super) type PreparedRecord = Vec<PreparedPart>;

/// The records prepared last.
#[derive(Debug)]
pub(super) struct PreparedRecords {
    budget_bytes: u64,
    held: Mutex<Held>,
}

#[derive(Debug)]
struct Held {
    records: LruCache<(u64, u32), Arc<PreparedRecord>>,
    bytes: u64,
}

impl PreparedRecords {
    pub(super) fn new(budget_bytes: u64) -> Self {
        let held = Held { records: LruCache::unbounded(), bytes: 0 };
        Self { budget_bytes: budget_bytes.min(MOST_BYTES), held: Mutex::new(held) }
    }

    /// A record, prepared now if it is not there. Callers that come at once each prepare it: it takes little time, and
    /// nobody waits for anybody.
    pub(super) fn get(&self, archive: &Archive, record: u32) -> Result<Arc<PreparedRecord>, MaterializeError> {
        let key = (archive.instance(), record);
        if let Some(prepared) = self.held.lock().unwrap_or_else(PoisonError::into_inner).records.get(&key) {
            return Ok(Arc::clone(prepared));
        }
        let prepared = Arc::new(prepare_record(archive, record)?);
        let mut held = self.held.lock().unwrap_or_else(PoisonError::into_inner);
        held.bytes += memory_bytes(&prepared);
        if let Some(replaced) = held.records.put(key, Arc::clone(&prepared)) {
            held.bytes -= memory_bytes(&replaced);
        }
        // The newest stays whatever it takes: its caller holds it anyway.
        while held.bytes > self.budget_bytes && held.records.len() > 1 {
            let (_, oldest) = held.records.pop_lru().expect("there are several");
            held.bytes -= memory_bytes(&oldest);
        }
        Ok(prepared)
    }
}

/// What a prepared record takes, near enough: a line per strip, up to five integers per run, and of parts that start from a
/// base the factors of a product and an integer per row of classes.
fn memory_bytes(record: &PreparedRecord) -> u64 {
    let of_part = |part: &PreparedPart| {
        let runs = part.symbols().map_or(0, |symbols| part.strips() * symbols.runs_per_strip);
        let low_rank = part.based().and_then(|based| based.low_rank.as_ref());
        let factors = low_rank.map_or(0, |product| product.left.len() + product.right.len());
        let difference = part.based().and_then(|based| based.difference.as_ref());
        let class_rows = difference.map_or(0, |difference| match &difference.classes.offsets {
            Integers::Constant(_) => 0,
            Integers::Each(offsets) => offsets.len(),
        });
        512 + 48 * part.strips() as u64 + 20 * runs as u64 + 2 * factors as u64 + 4 * class_rows as u64
    };
    record.iter().map(of_part).sum()
}
