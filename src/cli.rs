//! Command line: one file per subcommand.

pub mod mount;
pub mod size;
pub mod umount;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

/// Mounts compressed model checkpoints as ordinary safetensors files.
#[derive(Parser)]
#[command(name = "mcwcfs", version)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    Mount(mount::MountArgs),
    Umount(umount::UmountArgs),
}

/// Parses the arguments of `mcwcfs` and runs what they say.
pub fn main() -> ExitCode {
    match Cli::parse().command {
        Command::Mount(args) => mount::run(args),
        Command::Umount(args) => umount::run(&args),
    }
}
