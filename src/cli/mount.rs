//! `mcwcfs mount SRC MNT`.
//!
//! Exit codes are those of mount(8): 0 mounted (in the foreground: and unmounted again), 1 wrong usage, 2 the system
//! lacks something, 4 a mistake of ours, 8 interrupted before the mount answered, 32 the mount failed.

use std::net::{Ipv4Addr, SocketAddr};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use clap::{Args, Parser};
use log::LevelFilter;

use super::parse_threads;
use super::size::parse_size;
use crate::daemon::launch::{self, Outcome};
use crate::daemon::{self, DaemonError, DecodedCache, LEAST_LIMIT_BYTES, MemoryPlan, ServeOptions};
use crate::decode::cuda::DEFAULT_GPU_MEMORY_BYTES;
use crate::fuse::{FuseError, MountOptions};
use crate::materialize::{EngineChoice, MaterializeOptions};
use crate::telemetry;
use crate::vfs::DecodeAhead;

const WRONG_USAGE: u8 = 1;
const SYSTEM: u8 = 2;
const INTERNAL: u8 = 4;
const INTERRUPTED: u8 = 8;
const MOUNT_FAILED: u8 = 32;

/// The kernel's readahead below the mount where nobody says: good for whole models and bearable for slices.
const READAHEAD_KIB: u32 = 1024;

/// How often the source is listed again where nobody says.
const RESCAN_SECONDS: u64 = 10;

/// Mount a directory of archives: each shows its .safetensors files, decoded as they are read.
#[derive(Args, Clone, Debug)]
pub struct MountArgs {
    /// Directory with archives and whatever lies beside them
    #[arg(value_name = "SRC")]
    source: PathBuf,
    /// Directory that will show it; what is in there now is hidden meanwhile
    #[arg(value_name = "MNT")]
    mountpoint: PathBuf,
    /// Stay in the foreground; without this, return once the mount answers
    #[arg(short, long)]
    foreground: bool,
    #[command(flatten)]
    flags: MountFlags,
    /// Flags as mount(8) passes them, for example cache_size=4G,allow_other; flags given as such win
    #[arg(short, value_name = "OPTION[=VALUE],...", value_delimiter = ',')]
    options: Vec<String>,
}

/// What `-o` can say too.
#[derive(Args, Clone, Debug, Default)]
struct MountFlags {
    /// Memory for everything that is decoded, kept or on its way to readers, 32 MiB or more [default: half of the
    /// machine's, or three quarters of what the control group allows]
    #[arg(long, value_name = "SIZE", value_parser = parse_memory_limit)]
    memory_limit: Option<u64>,
    /// The part of it for decoded weights that are kept [default: a half]
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    cache_size: Option<u64>,
    /// What decodes [default: auto]
    #[arg(long, value_enum)]
    engine: Option<EngineChoice>,
    /// What decoding may take of a CUDA device, where that is the engine, and of this machine beside the memory limit for the
    /// copies [default: 1G]
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    gpu_memory: Option<u64>,
    /// Keep whole decoded files in DIR, at most SIZE of them [default: three quarters of what is free]: later opens, also
    /// after a restart, read them at the speed of that disk, as root without coming here at all
    #[arg(long, value_name = "DIR[:SIZE]", value_parser = parse_decoded_cache)]
    decoded_cache: Option<DecodedCache>,
    /// Where to look for the bases of variants, beside SRC: a directory with all below it, or an archive
    #[arg(long, value_name = "PATH", value_parser = parse_absolute)]
    base_path: Vec<PathBuf>,
    /// How far weights are decoded before they are asked for: off, file (the rest of a file that is being read), or model
    /// (on into the archive's next file) [default: model]
    #[arg(long, value_enum, hide_possible_values = true)]
    decode_ahead: Option<DecodeAhead>,
    /// Threads that decode at a time [default: all cores]
    #[arg(long, value_name = "COUNT", value_parser = parse_threads)]
    threads: Option<usize>,
    /// How far the kernel reads ahead, set as root only [default: 1MiB]
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    readahead: Option<u64>,
    /// Let other users in; without root, user_allow_other in /etc/fuse.conf must permit it
    #[arg(long)]
    allow_other: bool,
    /// Refuse to execute anything
    #[arg(long)]
    noexec: bool,
    /// Owner of everything [default: who mounts]
    #[arg(long)]
    uid: Option<u32>,
    /// Group of everything [default: that of who mounts]
    #[arg(long)]
    gid: Option<u32>,
    /// Permissions of files, octal [default: 444]
    #[arg(long, value_name = "OCTAL", value_parser = parse_mode)]
    file_mode: Option<u16>,
    /// Permissions of directories, octal [default: 555]
    #[arg(long, value_name = "OCTAL", value_parser = parse_mode)]
    dir_mode: Option<u16>,
    /// What /proc/mounts shows as source [default: mcwcfs]
    #[arg(long, value_name = "NAME")]
    fsname: Option<String>,
    /// Seconds between looks at SRC for new, changed and removed files; 0: only on SIGHUP [default: 10]
    #[arg(long, value_name = "SECONDS")]
    rescan: Option<u64>,
    /// Serve Prometheus metrics and a status page on this address; a port alone means 127.0.0.1 [default: none]
    #[arg(long, value_name = "[IP:]PORT", value_parser = parse_address)]
    metrics: Option<SocketAddr>,
    /// Serve in this process, so that a crash ends the mount; otherwise a supervisor starts a new worker, and readers
    /// notice nothing but time (Linux 6.9 or newer)
    #[arg(long)]
    no_supervisor: bool,
    /// off, error, warn, info, debug or trace [default: info]
    #[arg(long, value_name = "LEVEL")]
    log_level: Option<LevelFilter>,
    /// Log of the background daemon [default: MNT.log, with dashes for slashes, in /var/log/mcwcfs as root, else in
    /// ~/.local/state/mcwcfs]; in the foreground the log goes to standard error
    #[arg(long, value_name = "FILE")]
    log_file: Option<PathBuf>,
}

/// The flags on their own, to read what stands behind `-o`.
#[derive(Parser)]
#[command(no_binary_name = true, disable_help_flag = true)]
struct MirroredFlags {
    #[command(flatten)]
    flags: MountFlags,
}

/// Mounts, and returns the exit code once the mount answers or, in the foreground, has ended.
pub fn run(args: MountArgs) -> ExitCode {
    // The panic has said on standard error what was wrong.
    catch_unwind(AssertUnwindSafe(|| run_unguarded(args))).unwrap_or(ExitCode::from(INTERNAL))
}

fn run_unguarded(args: MountArgs) -> ExitCode {
    let flags = match mirrored(&args.options) {
        Ok(mirrored) => args.flags.or(mirrored),
        Err(message) => return fail(WRONG_USAGE, &message),
    };
    let (is_daemon, is_worker) = (launch::is_daemon(), launch::is_worker());
    if !args.foreground && !is_daemon && !is_worker {
        return in_background(&args.mountpoint, flags.log_file.as_deref());
    }
    telemetry::start(flags.log_level.unwrap_or(LevelFilter::Info));
    let options = serve_options(args.source, args.mountpoint, flags);
    if is_worker {
        return match daemon::run_worker(options, exit_code) {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => ExitCode::from(exit_code(&error)), // the supervisor has its message
        };
    }
    let ready = || if is_daemon { launch::report_ready() } else { Ok(()) };
    let arguments = std::env::args_os().skip(1).collect();
    match daemon::run(&options, arguments, ready) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) if is_daemon => {
            log::error!("{error}");
            launch::report_failure(exit_code(&error), &error.to_string());
            ExitCode::from(exit_code(&error))
        }
        Err(error) => fail(exit_code(&error), &error.to_string()),
    }
}

fn serve_options(source: PathBuf, mountpoint: PathBuf, flags: MountFlags) -> ServeOptions {
    let default = MountOptions::default();
    let memory = MemoryPlan::new(flags.memory_limit, flags.cache_size);
    let rescan = flags.rescan.unwrap_or(RESCAN_SECONDS);
    ServeOptions {
        source,
        mountpoint,
        materialize: MaterializeOptions {
            cache_bytes: memory.cache_bytes,
            working_bytes: memory.working_bytes,
            threads: flags.threads.unwrap_or_else(|| MaterializeOptions::default().threads),
            engine: flags.engine.unwrap_or_default(),
            gpu_memory_bytes: flags.gpu_memory.unwrap_or(DEFAULT_GPU_MEMORY_BYTES),
        },
        base_paths: flags.base_path,
        decode_ahead: flags.decode_ahead.unwrap_or_default(),
        readahead_kib: flags.readahead.map_or(READAHEAD_KIB, |bytes| (bytes / 1024).try_into().unwrap_or(u32::MAX)),
        rescan_interval: (rescan > 0).then(|| Duration::from_secs(rescan)),
        metrics: flags.metrics,
        supervise: !flags.no_supervisor,
        mount: MountOptions {
            fsname: flags.fsname.unwrap_or(default.fsname),
            allow_other: flags.allow_other,
            no_exec: flags.noexec,
            uid: flags.uid.unwrap_or(default.uid),
            gid: flags.gid.unwrap_or(default.gid),
            file_mode: flags.file_mode.unwrap_or(default.file_mode),
            directory_mode: flags.dir_mode.unwrap_or(default.directory_mode),
            reply_bytes: memory.reply_bytes,
            passthrough: flags.decoded_cache.is_some(),
            ..default
        },
        decoded_cache: flags.decoded_cache,
    }
}

fn in_background(mountpoint: &Path, log_file: Option<&Path>) -> ExitCode {
    let log = match log_file {
        Some(path) => match launch::open_log(path) {
            Ok(file) => Some(file),
            Err(error) => return fail(WRONG_USAGE, &format!("log file {}: {error}", path.display())),
        },
        None => default_log(mountpoint),
    };
    match launch::launch(std::env::args_os().skip(1), log, INTERRUPTED) {
        Ok(Outcome::Ready) => ExitCode::SUCCESS,
        Ok(Outcome::Failed(code, message)) => fail(code, &message),
        Err(error) => fail(SYSTEM, &format!("starting the daemon: {error}")),
    }
}

/// The log where nobody asked for one: a mount does not fail for want of it.
fn default_log(mountpoint: &Path) -> Option<std::fs::File> {
    // The daemon's own check of the mount point says what is wrong with it, if anything.
    let mountpoint = mountpoint.canonicalize().ok()?;
    let path = launch::default_log_path(&mountpoint)?;
    launch::open_log(&path)
        .inspect_err(|error| eprintln!("mcwcfs: mounting without a log: {}: {error}", path.display()))
        .ok()
}

/// What stands behind `-o`: each option is a flag under its own name, with `_` for `-` if one likes.
fn mirrored(options: &[String]) -> Result<MountFlags, String> {
    let mut arguments = Vec::new();
    for option in options.iter().map(|option| option.trim()).filter(|option| !is_ignored(option)) {
        if option == "rw" {
            return Err("-o rw: the mount is always read-only".to_owned());
        }
        let (name, value) = option.split_once('=').map_or((option, None), |(name, value)| (name, Some(value)));
        let name = name.replace('_', "-");
        arguments.push(value.map_or_else(|| format!("--{name}"), |value| format!("--{name}={value}")));
    }
    let parsed = MirroredFlags::try_parse_from(arguments).map_err(|error| {
        let message = error.to_string();
        let first = message.lines().next().unwrap_or_default();
        format!("-o {}: {}", options.join(","), first.strip_prefix("error: ").unwrap_or(first))
    })?;
    Ok(parsed.flags)
}

/// What mount(8) and fstab say to others, and what is so anyway.
fn is_ignored(option: &str) -> bool {
    const OTHERS: [&str; 12] =
        ["", "defaults", "auto", "noauto", "nofail", "_netdev", "user", "users", "nouser", "owner", "group", "exec"];
    const SO_ANYWAY: [&str; 5] = ["ro", "nosuid", "nodev", "noatime", "default_permissions"];
    OTHERS.contains(&option)
        || SO_ANYWAY.contains(&option)
        || option.starts_with("x-")
        || option.starts_with("comment=")
        || option.starts_with("user=")
}

impl MountFlags {
    /// These flags, and where they say nothing, `other`.
    fn or(self, other: Self) -> Self {
        Self {
            memory_limit: self.memory_limit.or(other.memory_limit),
            cache_size: self.cache_size.or(other.cache_size),
            engine: self.engine.or(other.engine),
            gpu_memory: self.gpu_memory.or(other.gpu_memory),
            decoded_cache: self.decoded_cache.or(other.decoded_cache),
            base_path: if self.base_path.is_empty() { other.base_path } else { self.base_path },
            decode_ahead: self.decode_ahead.or(other.decode_ahead),
            threads: self.threads.or(other.threads),
            readahead: self.readahead.or(other.readahead),
            allow_other: self.allow_other || other.allow_other,
            noexec: self.noexec || other.noexec,
            rescan: self.rescan.or(other.rescan),
            metrics: self.metrics.or(other.metrics),
            no_supervisor: self.no_supervisor || other.no_supervisor,
            uid: self.uid.or(other.uid),
            gid: self.gid.or(other.gid),
            file_mode: self.file_mode.or(other.file_mode),
            dir_mode: self.dir_mode.or(other.dir_mode),
            fsname: self.fsname.or(other.fsname),
            log_level: self.log_level.or(other.log_level),
            log_file: self.log_file.or(other.log_file),
        }
    }
}

/// Reads `--memory-limit`.
fn parse_memory_limit(text: &str) -> Result<u64, String> {
    let bytes = parse_size(text)?;
    if bytes < LEAST_LIMIT_BYTES { Err("expected 32MiB or more".to_owned()) } else { Ok(bytes) }
}

fn parse_address(text: &str) -> Result<SocketAddr, String> {
    let port = text.parse().map(|port: u16| SocketAddr::from((Ipv4Addr::LOCALHOST, port)));
    port.or_else(|_| text.parse())
        .map_err(|_| format!("{text:?}: expected a port, or an IP address with one such as 127.0.0.1:9464"))
}

/// A path made absolute: a daemon has another current directory.
fn parse_absolute(text: &str) -> Result<PathBuf, String> {
    std::path::absolute(text).map_err(|error| format!("{text:?}: {error}"))
}

/// `DIR` or `DIR:SIZE`. The directory is made absolute: a daemon has another current directory.
fn parse_decoded_cache(text: &str) -> Result<DecodedCache, String> {
    let (directory, bytes) = match text.rsplit_once(':') {
        Some((directory, size)) => (directory, Some(parse_size(size)?)),
        None => (text, None),
    };
    let directory = std::path::absolute(directory).map_err(|error| format!("{directory:?}: {error}"))?;
    Ok(DecodedCache { directory, bytes })
}

fn parse_mode(text: &str) -> Result<u16, String> {
    match u16::from_str_radix(text, 8) {
        Ok(mode) if mode <= 0o777 => Ok(mode),
        _ => Err(format!("{text:?}: expected octal permissions such as 444")),
    }
}

/// The exit code of a failure, as mount(8) documents them.
pub(super) fn exit_code(error: &DaemonError) -> u8 {
    match error {
        DaemonError::Overlap { .. } | DaemonError::CacheInside(_) => WRONG_USAGE,
        DaemonError::Worker { exit_code, .. } => *exit_code,
        DaemonError::Handover { .. } => INTERNAL,
        DaemonError::System { .. }
        | DaemonError::DecodedFiles(_)
        | DaemonError::Listen { .. }
        | DaemonError::Fuse(FuseError::Session { .. }) => SYSTEM,
        DaemonError::AlreadyMounted { .. }
        | DaemonError::NotMounted { .. }
        | DaemonError::Source(_)
        | DaemonError::Fuse(_)
        | DaemonError::NotAnswering { .. }
        | DaemonError::Ended { .. }
        | DaemonError::KeepsDying { .. }
        | DaemonError::NotUpgraded { .. }
        | DaemonError::StillRunning { .. } => MOUNT_FAILED,
    }
}

pub(super) fn fail(code: u8, message: &str) -> ExitCode {
    eprintln!("mcwcfs: {message}");
    ExitCode::from(code)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn options(text: &str) -> Result<MountFlags, String> {
        mirrored(&text.split(',').map(str::to_owned).collect::<Vec<_>>())
    }

    #[test]
    fn options_mirror_flags_with_either_dash() {
        let flags = options("cache_size=4G,allow-other,noexec,uid=7,file_mode=0400,engine=reference,log_level=debug");
        let flags = flags.unwrap();
        assert!(flags.noexec);
        assert_eq!((flags.cache_size, flags.allow_other, flags.uid), (Some(4 << 30), true, Some(7)));
        assert_eq!((flags.file_mode, flags.engine), (Some(0o400), Some(EngineChoice::Reference)));
        assert_eq!(flags.log_level, Some(LevelFilter::Debug));
    }

    #[test]
    fn options_for_others_are_ignored() {
        let flags = options("ro,nofail,_netdev,user,x-systemd.automount,comment=a,defaults,uid=1,").unwrap();
        assert_eq!(flags.uid, Some(1));
    }

    #[test]
    fn an_option_nobody_knows_is_named() {
        for text in ["frobnicate", "cache_size=much", "memory_limit=31M", "rw", "uid", "help", "suid"] {
            let message = options(text).unwrap_err();
            assert!(message.starts_with(&format!("-o {text}: ")), "{message}");
            assert_eq!(message.lines().count(), 1);
        }
    }

    #[test]
    fn a_flag_wins_over_an_option() {
        let flags = MountFlags { uid: Some(1), ..MountFlags::default() };
        let merged = flags.or(options("uid=2,gid=3").unwrap());
        assert_eq!((merged.uid, merged.gid), (Some(1), Some(3)));
    }

    #[test]
    fn metrics_are_for_this_machine_unless_an_address_says_otherwise() {
        assert_eq!(parse_address("9464"), Ok(SocketAddr::from(([127, 0, 0, 1], 9464))));
        assert_eq!(parse_address("0.0.0.0:80"), Ok(SocketAddr::from(([0, 0, 0, 0], 80))));
        assert_eq!(parse_address("[::1]:80"), Ok("[::1]:80".parse().unwrap()));
        for text in ["", "host:80", "127.0.0.1", "70000"] {
            assert!(parse_address(text).is_err(), "{text}");
        }
    }

    #[test]
    fn permissions_are_octal() {
        assert_eq!(parse_mode("0440"), Ok(0o440));
        for text in ["", "9", "1777", "rwx"] {
            assert!(parse_mode(text).is_err(), "{text}");
        }
    }
}
