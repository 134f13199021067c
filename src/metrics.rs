//! What a running mount counts: every metric, declared once with its name, kind, unit and meaning.
//!
//! A metric is a field of [`Metrics`] and lives in the one [`METRICS`] of the process; counting is one relaxed atomic
//! addition, so every room may count on its hottest path. Who shows them is above: `telemetry` writes them in Prometheus'
//! text format, `mcwcfs status` as JSON.
//!
//! Names follow Prometheus: `mcwcfs_` first, the unit last, `_total` behind counters. Counters start at zero with each
//! worker process, as Prometheus expects of a process that was started again.

mod instruments;

pub use instruments::{Counter, Gauge, Histogram, HistogramSnapshot};

/// What a number counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unit {
    /// Things: requests, archives, threads.
    Count,
    /// Bytes.
    Bytes,
    /// Seconds; instruments keep nanoseconds.
    Seconds,
}

/// One metric as it stands now.
#[derive(Clone, Debug)]
pub struct Metric {
    /// Its name in every place where it is shown.
    pub name: &'static str,
    /// What it means, in one sentence.
    pub help: &'static str,
    /// What its number counts.
    pub unit: Unit,
    /// Its number or numbers.
    pub value: Value,
}

/// What an instrument shows.
#[derive(Clone, Debug)]
pub enum Value {
    /// Only ever grows while the process lives.
    Counter(u64),
    /// Goes up and down.
    Gauge(u64),
    /// How often something took how long.
    Histogram(HistogramSnapshot),
}

/// Declares [`Metrics`]: `field: Instrument, Unit, "name", "meaning.";`
macro_rules! declare {
    ($($field:ident: $instrument:ident, $unit:ident, $name:literal, $help:literal;)*) => {
        /// Every metric of the process: see [`METRICS`].
        #[derive(Debug)]
        pub struct Metrics {
            $(#[doc = $help] #[doc = concat!("\n\nShown as `", $name, "`.")] pub $field: $instrument,)*
        }

        impl Metrics {
            const fn new() -> Self {
                Self { $($field: $instrument::new(),)* }
            }

            /// All metrics as they stand now, in the order of their declaration.
            pub fn all(&self) -> Vec<Metric> {
                vec![$(Metric { name: $name, help: $help, unit: Unit::$unit, value: self.$field.value() },)*]
            }
        }
    };
}

/// The metrics of this process.
pub static METRICS: Metrics = Metrics::new();

declare! {
    // What the kernel asks.
    opens: Counter, Count, "mcwcfs_opens_total", "Files opened.";
    passed_opens: Counter, Count, "mcwcfs_passthrough_opens_total", "Files opened that the kernel reads by itself.";
    reads: Counter, Count, "mcwcfs_read_requests_total", "Read requests of the kernel; what its page cache answers is not among them.";
    read_bytes: Counter, Bytes, "mcwcfs_read_bytes_total", "Bytes given to read requests.";
    read_errors: Counter, Count, "mcwcfs_read_errors_total", "Read requests answered with an error.";
    read_seconds: Histogram, Seconds, "mcwcfs_read_seconds", "Time from a read request to its answer.";
    waiting_requests: Gauge, Count, "mcwcfs_waiting_requests", "Read requests that have no answer yet.";

    // What is shown.
    archives: Gauge, Count, "mcwcfs_archives", "Archives shown.";
    refused_archives: Gauge, Count, "mcwcfs_refused_archives", "Archives left out because they are damaged or contradict another.";
    shown_bytes: Gauge, Bytes, "mcwcfs_shown_bytes", "Sum of the lengths of all files shown, decoded.";
    rescans: Counter, Count, "mcwcfs_rescans_total", "Times that the source was listed again, changed or not.";
    rescan_failures: Counter, Count, "mcwcfs_rescan_failures_total", "Times that the source could not be listed again.";

    // Decoding.
    decoded_bytes: Counter, Bytes, "mcwcfs_decoded_bytes_total", "Bytes decoded, counted again where they were decoded again.";
    decoded_ahead_bytes: Counter, Bytes, "mcwcfs_decoded_ahead_bytes_total", "Bytes decoded before anybody had asked for them.";
    decode_seconds: Histogram, Seconds, "mcwcfs_decode_seconds", "Time that one thread took to decode some strips of a tensor.";
    memory_waits: Counter, Count, "mcwcfs_memory_waits_total", "Times that a decode or a reply had to wait for memory under the limit.";

    // The cache of decoded bytes.
    cache_bytes: Gauge, Bytes, "mcwcfs_cache_bytes", "Decoded bytes kept in memory.";
    cache_budget_bytes: Gauge, Bytes, "mcwcfs_cache_budget_bytes", "Decoded bytes that may be kept in memory.";
    cache_entries: Gauge, Count, "mcwcfs_cache_entries", "Pieces of tensors kept in memory.";
    cache_hits: Gauge, Count, "mcwcfs_cache_hits", "Look-ups that found their piece, since the worker started.";
    cache_misses: Gauge, Count, "mcwcfs_cache_misses", "Look-ups that had to decode, since the worker started.";
    cache_shared: Gauge, Count, "mcwcfs_cache_shared", "Look-ups that waited for another's decode, since the worker started.";
    cache_evictions: Gauge, Count, "mcwcfs_cache_evictions", "Pieces dropped to stay within the budget, since the worker started.";
    duplicate_decodes: Gauge, Count, "mcwcfs_duplicate_decodes", "Pieces decoded again after they were dropped, since the worker started.";

    // The process.
    worker_restarts: Gauge, Count, "mcwcfs_worker_restarts", "Workers that died and were replaced since the mount.";
    worker_upgrades: Gauge, Count, "mcwcfs_worker_upgrades", "Workers that were replaced on request since the mount.";
    failed_upgrades: Gauge, Count, "mcwcfs_failed_upgrades", "Replacements on request whose new worker did not start, so the old one stayed.";
    resident_bytes: Gauge, Bytes, "mcwcfs_resident_bytes", "Memory of the worker process, as the system counts it.";
    open_descriptors: Gauge, Count, "mcwcfs_open_descriptors", "File descriptors of the worker process.";
    started_seconds: Gauge, Seconds, "mcwcfs_worker_start_time_seconds", "When the worker process started, since 1970.";
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn every_name_follows_the_rules_and_is_used_once() {
        let all = METRICS.all();
        let names: BTreeSet<_> = all.iter().map(|metric| metric.name).collect();
        assert_eq!(names.len(), all.len());
        for Metric { name, help, unit, value } in all {
            assert!(name.starts_with("mcwcfs_") && name.chars().all(|c| c.is_ascii_lowercase() || c == '_'), "{name}");
            assert!(help.ends_with('.') && !help.contains(['\n', '\\']), "{name}: {help}");
            assert_eq!(name.ends_with("_total"), matches!(value, Value::Counter(_)), "{name}");
            let stem = name.strip_suffix("_total").unwrap_or(name);
            assert_eq!(stem.ends_with("_bytes"), unit == Unit::Bytes, "{name}");
            assert_eq!(stem.ends_with("_seconds"), unit == Unit::Seconds, "{name}");
        }
    }
}
