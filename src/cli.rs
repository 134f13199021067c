//! Command line: one file per subcommand. Results go to stdout, progress and logs to stderr.
//!
//! Exit codes: 0 done, 1 failed, 2 wrong usage, 3 `verify` found damage or a difference, 4 a `--fail-if` of `pack` holds. What
//! works on a mount (`mount`, `umount`, `status`, `upgrade`) uses those of mount(8).

use std::ffi::{OsStr, OsString};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::{CommandFactory, Parser, Subcommand};
use log::LevelFilter;

use crate::archive::Place;
use crate::telemetry;
use packed_tree::PackedTree;

pub mod analyze;
pub mod bench;
pub mod card;
pub mod cost;
pub mod decoded;
pub mod doctor;
pub mod inspect;
pub mod mount;
pub mod pack;
pub mod packed_tree;
pub mod report;
pub mod size;
pub mod status;
pub mod umount;
pub mod unpack;
pub mod upgrade;
pub mod verify;
pub mod zoo;

/// Exit code of `verify` where an archive is damaged or differs from the original.
const NOT_SOUND: u8 = 3;
/// Exit code of `pack` where the archive is written and a `--fail-if` says that it is not good enough.
const NOT_GOOD_ENOUGH: u8 = 4;

/// Compressed model checkpoints, mounted as ordinary safetensors files.
#[derive(Parser, Debug)]
#[command(name = "mcwcfs", version)]
struct Mcwcfs {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand, Debug)]
#[allow(clippy::large_enum_variant)] // made once per process
enum Command {
    /// Pack a checkpoint into a .mcwc archive.
    #[command(visible_alias = "mcwc-pack")]
    Pack(pack::PackArgs),
    /// Pack a directory of checkpoints, variants against their bases.
    Zoo(zoo::ZooArgs),
    Mount(mount::MountArgs),
    Umount(umount::UmountArgs),
    Status(status::StatusArgs),
    Upgrade(upgrade::UpgradeArgs),
    Doctor(doctor::DoctorArgs),
    Inspect(inspect::InspectArgs),
    Verify(verify::VerifyArgs),
    Unpack(unpack::UnpackArgs),
    Bench(bench::BenchArgs),
    /// Show how alike the layers of a checkpoint are, before and after alignment.
    Analyze(analyze::AnalyzeArgs),
}

/// Pack a checkpoint into a .mcwc archive.
#[derive(Parser, Debug)]
#[command(name = "mcwc-pack", version)]
#[command(
    after_help = "mcwc-pack zoo DIR OUT packs a directory of checkpoints, variants against their bases: see mcwc-pack zoo --help"
)]
struct McwcPack {
    #[command(flatten)]
    pack: pack::PackArgs,
}

/// Packs a directory of checkpoints, variants against their bases.
#[derive(Parser, Debug)]
#[command(name = "mcwc-pack zoo", version)]
struct McwcPackZoo {
    #[command(flatten)]
    zoo: zoo::ZooArgs,
}

/// Reads `--threads`. More than a thousand only wait for one another, and tens of thousands bring a machine to a halt.
fn parse_threads(text: &str) -> Result<usize, String> {
    let count: usize = text.parse().map_err(|error| format!("{error}"))?;
    if (1..=1024).contains(&count) { Ok(count) } else { Err("expected 1 to 1024".into()) }
}

/// Where the bases of packed files are looked for: among themselves, beside the directory that holds them, and where the
/// user says.
fn base_places(packed: &PackedTree, is_directory: bool, base_paths: &[PathBuf]) -> Vec<Place> {
    let own = Place { path: packed.root.clone(), levels: if is_directory { usize::MAX } else { 0 } };
    let beside = packed.root.parent().map(|parent| Place { path: parent.to_owned(), levels: 1 });
    std::iter::once(own).chain(base_paths.iter().map(|path| Place::tree(path))).chain(beside).collect()
}

/// Whether `path` is `directory`, which is canonical, or lies in it, whatever links lead there. It need not exist yet.
fn lies_inside(path: &Path, directory: &Path) -> bool {
    // What does not exist yet cannot be resolved, but what it will lie in can.
    let resolved = path.ancestors().find_map(|ancestor| {
        let ancestor = if ancestor.as_os_str().is_empty() { Path::new(".") } else { ancestor };
        std::fs::canonicalize(ancestor).ok()
    });
    resolved.is_some_and(|resolved| resolved.starts_with(directory))
}

/// The process `mcwcfs`.
pub fn mcwcfs() -> ExitCode {
    let arguments = named_command(std::env::args_os().collect());
    let command = match Mcwcfs::try_parse_from(&arguments) {
        Ok(arguments) => arguments.command,
        Err(error) => return usage(&error, arguments.get(1).map(OsString::as_os_str)),
    };
    if !matches!(command, Command::Mount(_) | Command::Umount(_)) {
        telemetry::start(LevelFilter::Warn); // mount has a flag for it
    }
    match command {
        Command::Pack(args) => finish(pack::run(&args)),
        Command::Zoo(args) => finish(zoo::run(&args)),
        Command::Mount(args) => mount::run(args),
        Command::Umount(args) => umount::run(&args),
        Command::Status(args) => status::run(&args),
        Command::Upgrade(args) => upgrade::run(&args),
        Command::Doctor(args) => doctor::run(&args),
        Command::Inspect(args) => finish(inspect::run(&args).map(|()| ExitCode::SUCCESS)),
        Command::Verify(args) => finish(verify::run(&args).map(|verification| match verification.sound {
            true => ExitCode::SUCCESS,
            false => ExitCode::from(NOT_SOUND),
        })),
        Command::Analyze(args) => finish(analyze::run(&args).map(|()| ExitCode::SUCCESS)),
        Command::Bench(args) => finish(bench::run(&args).map(|()| ExitCode::SUCCESS)),
        Command::Unpack(args) => finish(unpack::run(&args).map(|()| ExitCode::SUCCESS)),
    }
}

/// `mcwcfs SRC MNT` is `mcwcfs mount SRC MNT`: so the helpers of mount(8) call the programs of file systems. A directory that
/// is named like a command must be given with a slash.
fn named_command(mut arguments: Vec<OsString>) -> Vec<OsString> {
    let is_source = |argument: &OsString| {
        let is_command = argument.to_str().is_some_and(|name| Mcwcfs::command().find_subcommand(name).is_some());
        let is_option = argument.as_encoded_bytes().starts_with(b"-");
        !is_command && !is_option && (argument.as_encoded_bytes().contains(&b'/') || Path::new(argument).is_dir())
    };
    if arguments.get(1).is_some_and(is_source) {
        arguments.insert(1, "mount".into());
    }
    arguments
}

/// Prints what is wrong with the arguments, or the help that was asked for. mount(8) calls wrong usage 1, all others 2.
fn usage(error: &clap::Error, command: Option<&OsStr>) -> ExitCode {
    let _ = error.print(); // nothing is left to tell it to
    let of_mounts = ["mount", "umount", "status", "upgrade"];
    let mounts = command.is_some_and(|command| of_mounts.iter().any(|name| command == *name));
    match error.exit_code() {
        0 => ExitCode::SUCCESS,
        _ if mounts => ExitCode::from(1),
        _ => ExitCode::from(2),
    }
}

/// The process `mcwc-pack`.
pub fn mcwc_pack() -> ExitCode {
    telemetry::start(LevelFilter::Warn);
    // A checkpoint of this name is `./zoo`.
    if std::env::args_os().nth(1).is_some_and(|first| first == "zoo") {
        let arguments = McwcPackZoo::parse_from(std::env::args_os().skip(1));
        return finish(zoo::run(&arguments.zoo));
    }
    let arguments = McwcPack::parse();
    finish(pack::run(&arguments.pack))
}

/// One line for an error, and its exit code.
fn finish<E: std::error::Error>(result: Result<ExitCode, E>) -> ExitCode {
    result.unwrap_or_else(|error| {
        eprintln!("mcwcfs: {error}");
        ExitCode::FAILURE
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_source_without_a_command_is_mounted_and_commands_stay_commands() {
        let named = |line: &str| {
            let arguments = named_command(line.split(' ').map(OsString::from).collect());
            arguments[1].to_str().unwrap().to_owned()
        };
        for line in ["mcwcfs /srv/models /mnt -o allow_other", "mcwcfs ./pack /mnt", "mcwcfs src mnt"] {
            assert_eq!(named(line), "mount", "{line}"); // `src` is there where tests run
        }
        for line in ["mcwcfs pack a b", "mcwcfs mcwc-pack a b", "mcwcfs mount a b", "mcwcfs --help", "mcwcfs mout a b"]
        {
            assert_eq!(named(line), line.split(' ').nth(1).unwrap(), "{line}");
        }
        assert_eq!(named_command(vec!["mcwcfs".into()]), ["mcwcfs"]);
    }
}
