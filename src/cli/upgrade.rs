//! `mcwcfs upgrade MNT`.
//!
//! Exit codes are those of mount(8): 0 upgraded, 1 wrong usage, 32 not upgraded, and the mount goes on as it was.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::Args;

use super::mount::{exit_code, fail};
use crate::daemon;

/// Have a running mount served by the program as it is on disk now, while files stay open and loads go on.
///
/// The supervisor, which does little, stays the old one until the next mount.
#[derive(Args, Clone, Debug)]
pub struct UpgradeArgs {
    /// The mount point
    #[arg(value_name = "MNT")]
    mountpoint: PathBuf,
}

/// Upgrades, and returns when the new worker serves.
pub fn run(args: &UpgradeArgs) -> ExitCode {
    match daemon::upgrade(&args.mountpoint) {
        Ok(report) => {
            println!(
                "{}: served by mcwcfs {}, process {}",
                args.mountpoint.display(),
                report.version,
                report.worker_pid
            );
            ExitCode::SUCCESS
        }
        Err(error) => fail(exit_code(&error), &error.to_string()),
    }
}
