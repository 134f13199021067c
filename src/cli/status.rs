//! `mcwcfs status MNT`: how a running mount is.
//!
//! Exit codes are those of mount(8): 0, 1 wrong usage, 32 nothing of ours is mounted there, or its daemon does not answer.

use std::fmt::Write as _;
use std::io::{self, Write as _};
use std::path::PathBuf;
use std::process::ExitCode;
use std::thread;
use std::time::Duration;

use clap::Args;
use indicatif::{HumanBytes, HumanDuration};

use super::mount::{exit_code, fail};
use crate::daemon::{self, ArchiveReport, Report};

/// How long reads are watched to tell how fast they are.
const WATCHED: Duration = Duration::from_millis(500);

/// Show how a running mount is: what is read, from which archives, how fast, and what the cache holds.
#[derive(Args, Clone, Debug)]
pub struct StatusArgs {
    /// The mount point
    #[arg(value_name = "MNT")]
    mountpoint: PathBuf,
    /// The whole report at this moment as JSON
    #[arg(long)]
    json: bool,
}

/// Prints the status.
pub fn run(args: &StatusArgs) -> ExitCode {
    let report = || daemon::status(&args.mountpoint);
    let text = if args.json {
        report().map(|report| serde_json::to_string_pretty(&report).expect("a report is JSON") + "\n")
    } else {
        report().and_then(|before| {
            thread::sleep(WATCHED);
            Ok(describe(&before, &report()?))
        })
    };
    match text {
        Ok(text) => {
            let _ = io::stdout().write_all(text.as_bytes()); // a reader that has seen enough is no failure
            ExitCode::SUCCESS
        }
        Err(error) => fail(exit_code(&error), &error.to_string()),
    }
}

/// The status in words, with the speed between two reports.
fn describe(before: &Report, now: &Report) -> String {
    let number = |name: &str| now.metrics.get(name).and_then(serde_json::Value::as_u64).unwrap_or(0);
    let bytes = |name: &str| HumanBytes(number(name));
    let seconds = (now.now_ms.saturating_sub(before.now_ms)) as f64 / 1000.0;
    let is_same_worker = now.worker_pid == before.worker_pid;
    // The counters of another worker start again.
    let per_second = |before: u64, now: u64| {
        let grown = if is_same_worker { now.saturating_sub(before) } else { now };
        HumanBytes((grown as f64 / seconds.max(0.001)) as u64)
    };
    let read = |report: &Report| report.metrics.get(READ_BYTES).and_then(serde_json::Value::as_u64).unwrap_or(0);
    let up = Duration::from_millis(now.now_ms.saturating_sub(now.started_ms));
    let (hits, misses) = (number("mcwcfs_cache_hits"), number("mcwcfs_cache_misses"));
    let lines = [
        format!("{} shows {}, mcwcfs {}", now.mountpoint.display(), now.source.display(), now.version),
        format!(
            "process  {}, up {}, {} restarts, {} upgrades",
            now.worker_pid,
            HumanDuration(up),
            number("mcwcfs_worker_restarts"),
            number("mcwcfs_worker_upgrades")
        ),
        format!(
            "reads    {}/s now, {} so far, {} requests waiting, {} failed",
            per_second(read(before), read(now)),
            bytes(READ_BYTES),
            number("mcwcfs_waiting_requests"),
            number("mcwcfs_read_errors_total")
        ),
        format!(
            "cache    {} of {}, {hits} hits, {misses} misses, {} decoded again",
            bytes("mcwcfs_cache_bytes"),
            bytes("mcwcfs_cache_budget_bytes"),
            number("mcwcfs_duplicate_decodes")
        ),
        format!("memory   {}", bytes("mcwcfs_resident_bytes")),
        format!("archives {} shown, {} refused", now.archive_count, number("mcwcfs_refused_archives")),
    ];
    let mut text = lines.join("\n") + "\n";
    let used: Vec<&ArchiveReport> =
        now.archives.iter().filter(|archive| archive.opens + archive.read_bytes > 0).collect();
    if used.is_empty() {
        return text;
    }
    writeln!(text, "\n{:>6} {:>12} {:>12} {:>7}  ARCHIVE", "READ", "PER SECOND", "OF", "OPENED").expect(TO_TEXT);
    for archive in used {
        let earlier = before.archives.iter().find(|earlier| earlier.path == archive.path);
        let speed = per_second(earlier.map_or(0, |earlier| earlier.read_bytes), archive.read_bytes);
        let (share, of) = (archive.read_share * 100.0, HumanBytes(archive.length_bytes));
        let (speed, of) = (speed.to_string(), of.to_string());
        writeln!(text, "{share:>5.0}% {speed:>12} {of:>12} {:>7}  {}", archive.opens, archive.path).expect(TO_TEXT);
    }
    text
}

const READ_BYTES: &str = "mcwcfs_read_bytes_total";
const TO_TEXT: &str = "a String takes all that is written to it";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn speeds_are_those_between_two_reports_and_start_again_with_another_worker() {
        let report = |worker_pid, now_ms, read: u64| Report {
            version: "1".into(),
            source: "/src".into(),
            mountpoint: "/mnt".into(),
            daemon_pid: 1,
            worker_pid,
            started_ms: 0,
            now_ms,
            metrics: [(READ_BYTES.to_owned(), read.into())].into_iter().collect(),
            archive_count: 2,
            archives: vec![
                ArchiveReport {
                    path: "a.mcwc".into(),
                    length_bytes: 8 << 20,
                    stored_bytes: 1,
                    opens: 1,
                    read_bytes: read,
                    read_share: 0.5,
                },
                ArchiveReport {
                    path: "unused.mcwc".into(),
                    length_bytes: 1,
                    stored_bytes: 1,
                    opens: 0,
                    read_bytes: 0,
                    read_share: 0.0,
                },
            ],
        };
        let text = describe(&report(7, 1000, 1 << 20), &report(7, 1500, 4 << 20));
        assert!(text.contains("6.00 MiB/s now, 4.00 MiB so far"), "{text}");
        assert!(text.contains("   50%     6.00 MiB     8.00 MiB       1  a.mcwc"), "{text}");
        assert!(!text.contains("unused"), "{text}");
        assert!(describe(&report(7, 1000, 9 << 20), &report(8, 2000, 2 << 20)).contains("2.00 MiB/s now"));
    }
}
