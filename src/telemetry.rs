//! Logging, and the metrics for who watches from outside.
//!
//! One log line per event, on standard error: a person or journald reads it there. A daemon that left its terminal has
//! standard error redirected to its log file before it starts (see [`crate::daemon::launch`]), so nothing here knows
//! about files. What is counted is declared in [`crate::metrics`].

mod http;
mod prometheus;

use log::LevelFilter;

pub use http::serve_metrics;

/// Starts logging. Later calls change nothing, so a test or an embedder may have its own logger.
///
/// `fuser`, whose lines are about its own workings, is quiet unless everything is asked for: what a reader meets is
/// logged here, once, with the file's name.
pub fn start(level: LevelFilter) {
    let fuser = match level {
        LevelFilter::Trace => LevelFilter::Debug,
        LevelFilter::Debug => LevelFilter::Warn,
        _ => LevelFilter::Off,
    };
    let mut builder = env_logger::Builder::new();
    builder.filter_level(level).filter_module("fuser", fuser).format_target(false).format_timestamp_millis();
    let _ = builder.try_init(); // fails only where a logger is there already
}
