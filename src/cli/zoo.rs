//! `mcwc-pack zoo`: a directory of checkpoints, each variant packed against its base.

use std::fs;
use std::io::Write;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};

use clap::Args;
use serde::Serialize;

use super::pack::{Bar, Destination, PackCommandError, copy_sidecars, print};
use super::{lies_inside, parse_threads};
use crate::archive::{Archive, ArchivedFile};
use crate::hexadecimal::hex;
use crate::pack::base::Base;
use crate::pack::encode::{Encoder, PackError, Silent, hidden_file};
use crate::pack::options::{Effort, PackOptions};
use crate::pack::profile::Profile;
use crate::pack::source::{Checkpoint, Sidecar, SourceFile};
use crate::pack::zoo::{self, Member};

/// The manifest's name in the output.
const MANIFEST: &str = "zoo.json";

/// Packs a directory of checkpoints, losslessly: finds which are variants of one another, chooses a base for each family,
/// and packs the others as what changed, each with the packed one that is about as far from their base as its profile.
#[derive(Args, Debug)]
pub struct ZooArgs {
    /// A directory with a directory for each checkpoint, at any depth.
    input: PathBuf,
    /// A directory that receives the archives, each with its other files, and the manifest zoo.json.
    output: PathBuf,
    /// How much time packing may take.
    #[arg(long, value_enum, default_value_t)]
    effort: Effort,
    /// Threads; all cores by default. The archives are the same for any number.
    #[arg(long, value_name = "N", value_parser = parse_threads)]
    threads: Option<usize>,
    /// Say what would be packed against what, and write nothing.
    #[arg(long)]
    dry_run: bool,
    /// Measure besides what each would take alone, and what zstd -3 makes of it where that is installed.
    #[arg(long)]
    compare: bool,
    /// Print the manifest, or the plan, as JSON.
    #[arg(long)]
    json: bool,
    /// Pack again what was packed before; otherwise archives of checkpoints that did not change are kept.
    #[arg(long)]
    force: bool,
}

/// One checkpoint, as the manifest lists it.
#[derive(Debug, Serialize)]
struct Entry {
    /// The checkpoint's directory, from the root of the zoo.
    checkpoint: String,
    /// The base's directory, where it is a variant.
    base: Option<String>,
    /// How far it is from its base: 0 is equal, 1 unrelated.
    distance: Option<f64>,
    /// Bytes of its safetensors files.
    raw_bytes: u64,
    /// The archive, from the output.
    #[serde(skip_serializing_if = "Option::is_none")]
    packed: Option<PackedEntry>,
    /// Bytes that it would take alone, estimated.
    #[serde(skip_serializing_if = "Option::is_none")]
    alone_bytes: Option<u64>,
    /// Bytes that zstd -3 makes of its safetensors files.
    #[serde(skip_serializing_if = "Option::is_none")]
    zstd_bytes: Option<u64>,
}

/// What was written of a checkpoint.
#[derive(Debug, Serialize)]
struct PackedEntry {
    archive: String,
    bytes: u64,
    bits_per_parameter: f64,
    content_id: String,
    base_content_id: Option<String>,
    /// Name and SHA-256 of every safetensors file.
    files: Vec<(String, String)>,
}

/// Runs the command.
///
/// # Errors
/// See [`PackCommandError`]. What was packed before an error stays, and is not packed again by the next run.
pub fn run(args: &ZooArgs) -> Result<ExitCode, PackCommandError> {
    rayon::ThreadPoolBuilder::new().num_threads(args.threads.unwrap_or(0)).build_global()?;
    let root = args.input.canonicalize().map_err(super::pack::io_at(&args.input))?;
    if lies_inside(&args.output, &root) {
        return Err(PackCommandError::InsideInput(args.output.clone()));
    }
    let paths = zoo::checkpoints(&root).map_err(super::pack::io_at(&args.input))?;
    if paths.is_empty() {
        return Err(PackCommandError::NoCheckpoints(args.input.clone()));
    }
    let members = zoo::plan(&root, paths).map_err(PackError::from)?;
    let mut entries: Vec<Entry> = members.iter().map(|member| entry_of(member, &members)).collect();
    if !args.dry_run {
        let progress = Bar::new()?;
        // Bases first: variants are packed against what they will be decoded from.
        let (bases, variants): (Vec<usize>, Vec<usize>) =
            (0..members.len()).partition(|&member| members[member].base.is_none());
        let mut done = Vec::new();
        for member in bases.into_iter().chain(variants) {
            progress.bar.println(members[member].path.display().to_string());
            let profile = profile_of(&members, member, &done);
            let packed = pack_member(args, &root, &members, member, profile, &progress)?;
            if packed.base_content_id.is_some() {
                done.push(member); // not where every tensor turned out shorter alone
            }
            let entry = &mut entries[member];
            entry.packed = Some(packed);
            if args.compare {
                compare(args, &root.join(&members[member].path), entry)?;
            }
            write_manifest(&args.output, &entries)?;
        }
        progress.bar.finish_and_clear();
    }
    print(|output| {
        if args.json {
            return writeln!(output, "{}", serde_json::to_string_pretty(&entries).expect("plain data"));
        }
        print_table(output, &entries)
    })?;
    Ok(ExitCode::SUCCESS)
}

fn entry_of(member: &Member, members: &[Member]) -> Entry {
    Entry {
        checkpoint: member.path.display().to_string(),
        base: member.base.map(|(base, _)| members[base].path.display().to_string()),
        distance: member.base.map(|(_, distance)| distance),
        raw_bytes: member.bytes,
        packed: None,
        alone_bytes: None,
        zstd_bytes: None,
    }
}

fn options(args: &ZooArgs) -> PackOptions {
    PackOptions { effort: args.effort, ..PackOptions::default() }
}

/// The variant that says how another is coded: of those that are packed and start from the same base, the one that is about as
/// far from it. `done` are packed as variants.
fn profile_of(members: &[Member], member: usize, done: &[usize]) -> Option<usize> {
    let (base, distance) = members[member].base?;
    let variants = done.iter().filter_map(|&other| Some((other, members[other].base?)));
    let of_base = variants.filter(|&(_, (other_base, _))| other_base == base);
    let nearest = of_base.min_by(|(_, (_, a)), (_, (_, b))| (a - distance).abs().total_cmp(&(b - distance).abs()));
    nearest.map(|(other, _)| other)
}

/// Packs one checkpoint, unless that was done before; as the member `profile` is, where there is one.
fn pack_member(
    args: &ZooArgs,
    root: &Path,
    members: &[Member],
    member: usize,
    profile: Option<usize>,
    progress: &Bar,
) -> Result<PackedEntry, PackCommandError> {
    let Member { path, base, .. } = &members[member];
    let checkpoint = Checkpoint::open(&root.join(path)).map_err(PackError::from)?;
    let directory = args.output.join(path);
    let destination = Destination::of(&directory, &checkpoint)?;
    let archive_of = |member: usize| -> Result<PathBuf, PackCommandError> {
        let path = &members[member].path;
        let checkpoint = Checkpoint::open(&root.join(path)).map_err(PackError::from)?;
        Ok(Destination::of(&args.output.join(path), &checkpoint)?.archive)
    };
    let base = match base {
        Some((base, _)) => Some(Base::open(&archive_of(*base)?).map_err(PackError::from)?),
        None => None,
    };
    let base_id = base.as_ref().map(|base| base.reference().content_id);
    let is_packed = !args.force && is_packed(&destination.archive, &checkpoint, base_id);
    if is_packed {
        let is_other = |sidecar: &&Sidecar| !is_copied(sidecar, &directory);
        let changed: Vec<Sidecar> = checkpoint.sidecars.iter().filter(is_other).cloned().collect();
        copy_sidecars(&changed, &directory)?;
    } else {
        fs::create_dir_all(&directory).map_err(super::pack::io_at(&directory))?;
        let options = options(args);
        let profile = match (profile, &base) {
            // What only saves time is no reason to stop.
            (Some(profile), Some(base)) => Profile::open(&archive_of(profile)?, base)
                .inspect_err(|error| log::warn!("{}: packed without a profile: {error}", path.display()))
                .ok(),
            _ => None,
        };
        let encoder = Encoder::with_profile(&checkpoint, &options, base.as_ref(), profile.as_ref(), progress)?;
        destination.fill(&encoder, &checkpoint.sidecars, true)?;
    }
    let archive = Archive::open(&destination.archive).map_err(PackError::from)?;
    let name = destination.archive.strip_prefix(&args.output).unwrap_or(&destination.archive);
    Ok(PackedEntry {
        archive: name.display().to_string(),
        bytes: archive.stored_bytes(),
        bits_per_parameter: 8.0 * archive.stored_bytes() as f64 / archive.parameters().max(1) as f64,
        content_id: hex(&archive.content_id()),
        base_content_id: archive.index().bases.first().map(|base| hex(&base.content_id)),
        files: archive.files().iter().map(|file| (file.name.clone(), hex(&file.decoded_sha256))).collect(),
    })
}

/// Whether a sidecar lies in the output as it is.
fn is_copied(sidecar: &Sidecar, directory: &Path) -> bool {
    let copy = directory.join(&sidecar.name);
    let length = |path: &Path| fs::metadata(path).map(|metadata| metadata.len()).ok();
    let is_as_long = length(&copy).is_some_and(|bytes| length(&sidecar.path) == Some(bytes));
    is_as_long && fs::read(&copy).is_ok_and(|bytes| fs::read(&sidecar.path).is_ok_and(|source| source == bytes))
}

/// Whether there is a sound archive of the checkpoint as it is, against the same base. Of a file that nobody has touched since
/// only the header is read; whatever a file says of its own time, the system knows when anything of it last changed.
fn is_packed(archive_path: &Path, checkpoint: &Checkpoint, base: Option<[u8; 32]>) -> bool {
    let Ok(archive) = Archive::open(archive_path) else { return false };
    let Ok(packed) = fs::metadata(archive_path) else { return false };
    let is_as_packed = |ours: &ArchivedFile, theirs: &SourceFile| {
        let is_untouched = fs::metadata(&theirs.path)
            .is_ok_and(|file| (file.ctime(), file.ctime_nsec()) < (packed.ctime(), packed.ctime_nsec()));
        ours.name == theirs.name
            && ours.header == theirs.header.bytes
            && (is_untouched || theirs.sha256().is_ok_and(|digest| digest == ours.source_sha256))
    };
    let is_the_base = archive.index().bases.first().map(|found| found.content_id) == base;
    is_the_base
        && !archive.is_lossy()
        && archive.files().len() == checkpoint.files.len()
        && archive.files().iter().zip(&checkpoint.files).all(|(ours, theirs)| is_as_packed(ours, theirs))
}

/// What the checkpoint takes alone, and compressed by zstd.
fn compare(args: &ZooArgs, path: &Path, entry: &mut Entry) -> Result<(), PackCommandError> {
    let checkpoint = Checkpoint::open(path).map_err(PackError::from)?;
    let options = options(args);
    entry.alone_bytes = match (&entry.base, &entry.packed) {
        (None, Some(packed)) => Some(packed.bytes),
        _ => {
            let tensors = Encoder::new(&checkpoint, &options, &Silent).dry_run()?;
            let bits = |tensor: &crate::pack::report::TensorReport| {
                tensor.bits_per_element * tensor.shape.iter().product::<u64>() as f64
            };
            Some((tensors.iter().map(bits).sum::<f64>() / 8.0) as u64)
        }
    };
    entry.zstd_bytes = checkpoint.files.iter().map(|file| zstd_bytes(&file.path)).sum();
    Ok(())
}

/// What the program zstd makes of a file; `None` where there is none.
fn zstd_bytes(file: &Path) -> Option<u64> {
    let mut child = Command::new("zstd")
        .args(["-3", "--quiet", "--stdout"])
        .arg(file)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .ok()?;
    let bytes = std::io::copy(child.stdout.as_mut()?, &mut std::io::sink()).ok();
    child.wait().ok().filter(std::process::ExitStatus::success).and(bytes)
}

/// Writes the manifest under a temporary name, then gives it its own.
fn write_manifest(output: &Path, entries: &[Entry]) -> Result<(), PackCommandError> {
    let path = output.join(MANIFEST);
    let mut file = hidden_file(output, "").map_err(super::pack::io_at(&path))?;
    serde_json::to_writer_pretty(&mut file, entries).map_err(|error| super::pack::io_at(&path)(error.into()))?;
    file.persist(&path).map_err(|error| super::pack::io_at(&path)(error.error))?;
    Ok(())
}

fn print_table(output: &mut impl Write, entries: &[Entry]) -> std::io::Result<()> {
    let megabytes = |bytes: Option<u64>| bytes.map_or("-".into(), |bytes| format!("{:.1}", bytes as f64 / 1e6));
    writeln!(
        output,
        "{:>10} {:>10} {:>10} {:>10} {:>10}  checkpoint",
        "MB", "packed", "bits/param", "alone", "zstd -3"
    )?;
    for entry in entries {
        let bits = entry.packed.as_ref().map_or("-".into(), |packed| format!("{:.3}", packed.bits_per_parameter));
        let base = entry.base.as_ref().map_or(String::new(), |base| {
            format!(" (variant of {base}, distance {:.3})", entry.distance.unwrap_or(0.0))
        });
        writeln!(
            output,
            "{:>10} {:>10} {bits:>10} {:>10} {:>10}  {}{base}",
            megabytes(Some(entry.raw_bytes)),
            megabytes(entry.packed.as_ref().map(|packed| packed.bytes)),
            megabytes(entry.alone_bytes),
            megabytes(entry.zstd_bytes),
            entry.checkpoint
        )?;
    }
    let raw: u64 = entries.iter().map(|entry| entry.raw_bytes).sum();
    let packed: u64 = entries.iter().filter_map(|entry| entry.packed.as_ref()).map(|packed| packed.bytes).sum();
    if packed > 0 {
        let percent = 100.0 * packed as f64 / raw.max(1) as f64;
        writeln!(output, "{raw} -> {packed} bytes ({percent:.1} %) in {} checkpoints", entries.len())?;
    }
    Ok(())
}
