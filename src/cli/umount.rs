//! `mcwcfs umount MNT`.
//!
//! Exit codes are those of umount(8): 0 unmounted, 1 wrong usage, 32 not unmounted.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::Args;

use super::mount::{exit_code, fail};
use crate::daemon;

/// Unmount what `mcwcfs mount` mounted, and return when its daemon has ended.
#[derive(Args, Clone, Debug)]
pub struct UmountArgs {
    /// The mount point
    #[arg(value_name = "MNT")]
    mountpoint: PathBuf,
    /// Also while files are open: the path is free at once, and open files are served until they are closed
    #[arg(short, long)]
    lazy: bool,
}

/// Unmounts.
pub fn run(args: &UmountArgs) -> ExitCode {
    match daemon::umount(&args.mountpoint, args.lazy) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => fail(exit_code(&error), &error.to_string()),
    }
}
