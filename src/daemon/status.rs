//! What a mount tells about itself: `mcwcfs status`, the status page, and the attributes of the root by which programs
//! find the daemon.

use std::ffi::OsStr;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};

use super::handover::Facts;
use crate::materialize::Materializer;
use crate::metrics::{METRICS, Value};
use crate::vfs::{ArchiveStatus, Totals, Vfs};

/// Attribute of the root: the process that owns the mount. `mcwcfs umount` waits for its end.
pub(super) const DAEMON_PID: &str = "user.mcwc.daemon_pid";
/// Attribute of the root: a [`Report`] as JSON.
pub(super) const STATUS: &str = "user.mcwc.status";
/// The kernel gives no longer attributes.
pub(super) const MAX_ATTRIBUTE_BYTES: usize = 64 << 10;

/// What a running mount says of itself.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Report {
    /// Version of the program that serves the mount.
    pub version: String,
    /// The source directory.
    pub source: PathBuf,
    /// The mount point.
    pub mountpoint: PathBuf,
    /// The process that owns the mount.
    pub daemon_pid: u32,
    /// The process that serves it; the same one where there is no supervisor.
    pub worker_pid: u32,
    /// When that process started to serve, in milliseconds since 1970.
    pub started_ms: u64,
    /// When this was said, in milliseconds since 1970.
    pub now_ms: u64,
    /// Every metric by its name; of those that are times, the number and the sum in seconds.
    pub metrics: serde_json::Map<String, serde_json::Value>,
    /// How many archives are shown.
    pub archive_count: u64,
    /// Of these, the ones most used, and no more than fit an extended attribute.
    pub archives: Vec<ArchiveReport>,
}

/// One archive of a [`Report`].
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct ArchiveReport {
    /// The `.mcwc` file, from the root of the source.
    pub path: String,
    /// Length of its files together, decoded.
    pub length_bytes: u64,
    /// Length of the `.mcwc` file.
    pub stored_bytes: u64,
    /// How often one of its files was opened.
    pub opens: u64,
    /// Bytes that readers got from the daemon.
    pub read_bytes: u64,
    /// How much of it has been read and so decoded, from 0 to 1.
    pub read_share: f64,
}

/// Makes [`Report`]s.
pub(super) struct Status {
    vfs: Arc<Vfs>,
    materializer: Arc<Materializer>,
    mountpoint: PathBuf,
    facts: Facts,
    failed_upgrades: AtomicU64,
    started_ms: u64,
}

impl Status {
    pub(super) fn new(vfs: Arc<Vfs>, materializer: Arc<Materializer>, mountpoint: &Path, facts: Facts) -> Self {
        let started_ms = now_ms();
        METRICS.started_seconds.set(started_ms.saturating_mul(1_000_000));
        METRICS.worker_restarts.set(facts.restarts);
        METRICS.worker_upgrades.set(facts.upgrades);
        let failed_upgrades = AtomicU64::new(0);
        Self { vfs, materializer, mountpoint: mountpoint.to_owned(), facts, failed_upgrades, started_ms }
    }

    pub(super) fn count_failed_upgrade(&self) {
        METRICS.failed_upgrades.set(self.failed_upgrades.fetch_add(1, Ordering::Relaxed) + 1);
    }

    /// One line about what is shown.
    pub(super) fn summary(&self) -> String {
        let Totals { archives, refused_archives, .. } = self.vfs.totals();
        format!("serving {}: archives {archives}, refused {refused_archives}", self.vfs.source_path().display())
    }

    /// The value of an attribute that only the root has.
    pub(super) fn root_attribute(&self, name: &OsStr) -> Option<String> {
        match name.to_str()? {
            DAEMON_PID => Some(self.facts.daemon.to_string()),
            STATUS => Some(self.json()),
            _ => None,
        }
    }

    /// A [`Report`] that fits an extended attribute.
    pub(super) fn json(&self) -> String {
        let mut report = self.report();
        loop {
            let text = serde_json::to_string(&report).expect("names are text and no number is infinite");
            if text.len() <= MAX_ATTRIBUTE_BYTES {
                return text;
            }
            report.archives.truncate(report.archives.len() / 2);
        }
    }

    fn report(&self) -> Report {
        const MOST_ARCHIVES: usize = 256;
        self.refresh();
        let mut archives = self.vfs.archives();
        archives
            .sort_by(|a, b| (b.read_bytes, b.opens).cmp(&(a.read_bytes, a.opens)).then_with(|| a.path.cmp(&b.path)));
        let archive_count = archives.len() as u64;
        archives.truncate(MOST_ARCHIVES);
        Report {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            source: self.vfs.source_path().to_string_lossy().into_owned().into(), // JSON has no other text than Unicode
            mountpoint: self.mountpoint.to_string_lossy().into_owned().into(),
            daemon_pid: self.facts.daemon,
            worker_pid: std::process::id(),
            started_ms: self.started_ms,
            now_ms: now_ms(),
            metrics: METRICS.all().into_iter().flat_map(|metric| numbers(metric.name, &metric.value)).collect(),
            archive_count,
            archives: archives.into_iter().map(ArchiveReport::from).collect(),
        }
    }

    /// Sets the gauges that nobody keeps up to date.
    pub(super) fn refresh(&self) {
        let cache = self.materializer.cache_stats();
        METRICS.cache_bytes.set(cache.bytes);
        METRICS.cache_budget_bytes.set(cache.budget_bytes);
        METRICS.cache_entries.set(cache.entries);
        METRICS.cache_hits.set(cache.hits);
        METRICS.cache_misses.set(cache.misses);
        METRICS.cache_shared.set(cache.shared);
        METRICS.cache_evictions.set(cache.evictions);
        METRICS.duplicate_decodes.set(cache.duplicate_makes);
        let totals = self.vfs.totals();
        METRICS.archives.set(totals.archives);
        METRICS.refused_archives.set(totals.refused_archives);
        METRICS.shown_bytes.set(totals.bytes);
        METRICS.resident_bytes.set(resident_bytes().unwrap_or(0));
        METRICS.open_descriptors.set(fs::read_dir("/proc/self/fd").map_or(0, Iterator::count) as u64);
    }
}

impl From<ArchiveStatus> for ArchiveReport {
    fn from(status: ArchiveStatus) -> Self {
        let ArchiveStatus { path, length_bytes, stored_bytes, opens, read_bytes, read_share } = status;
        let path = path.to_string_lossy().into_owned();
        Self { path, length_bytes, stored_bytes, opens, read_bytes, read_share }
    }
}

fn numbers(name: &str, value: &Value) -> Vec<(String, serde_json::Value)> {
    match value {
        Value::Counter(number) | Value::Gauge(number) => vec![(name.to_owned(), (*number).into())],
        Value::Histogram(times) => {
            vec![(format!("{name}_count"), times.count.into()), (format!("{name}_sum"), times.sum.as_secs_f64().into())]
        }
    }
}

fn now_ms() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}

/// Second field of `/proc/self/statm`, which counts pages.
fn resident_bytes() -> Option<u64> {
    // SAFETY: the call has no preconditions.
    let page_bytes = u64::try_from(unsafe { libc::sysconf(libc::_SC_PAGESIZE) }).ok()?;
    let text = fs::read_to_string("/proc/self/statm").ok()?;
    text.split(' ').nth(1)?.parse::<u64>().ok()?.checked_mul(page_bytes)
}
