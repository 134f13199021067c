//! Command line: one file per subcommand. Results go to stdout, progress and logs to stderr.

use std::process::ExitCode;

use clap::{Parser, Subcommand};

pub mod pack;

/// Compressed model checkpoints, mounted as ordinary safetensors files.
#[derive(Parser, Debug)]
#[command(name = "mcwcfs", version)]
struct Mcwcfs {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand, Debug)]
enum Command {
    /// Pack a checkpoint into a .mcwc archive.
    #[command(name = "mcwc-pack", visible_alias = "pack")]
    Pack(pack::PackArgs),
}

/// Packs a checkpoint into a .mcwc archive.
#[derive(Parser, Debug)]
#[command(name = "mcwc-pack", version)]
struct McwcPack {
    #[command(flatten)]
    pack: pack::PackArgs,
}

/// The process `mcwcfs`.
pub fn mcwcfs() -> ExitCode {
    let arguments = Mcwcfs::parse();
    match arguments.command {
        Command::Pack(args) => finish(pack::run(&args)),
    }
}

/// The process `mcwc-pack`.
pub fn mcwc_pack() -> ExitCode {
    finish(pack::run(&McwcPack::parse().pack))
}

/// One line for an error, and its exit code.
fn finish<E: std::error::Error>(result: Result<ExitCode, E>) -> ExitCode {
    result.unwrap_or_else(|error| {
        eprintln!("mcwcfs: {error}");
        ExitCode::FAILURE
    })
}
