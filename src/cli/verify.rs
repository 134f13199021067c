//! `mcwcfs verify`: whether archives decode to what they say they hold and, beside the originals, to what was packed.
//!
//! Every checksum is looked at on the way: preamble, index, side information, each strip, and the digests of each file.

mod compare;

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread::available_parallelism;

use clap::Args;
use indicatif::ProgressBar;
use serde::Serialize;
use sha2::{Digest, Sha256};

use super::decoded::{SequentialDecoder, decode_in_order};
use super::packed_tree::{PackedTree, PackedTreeError};
use super::unpack::progress_bar;
use super::{base_places, parse_threads};
use crate::archive::{Archive, ArchiveError, Bases};
use crate::hexadecimal::hex;
use crate::materialize::{EngineChoice, MaterializeError};

pub use compare::{Compared, Comparison, SquaredError, TensorDifference};

/// Check archives: every checksum, every decoded file, and on request against the originals.
#[derive(Debug, Args)]
pub struct VerifyArgs {
    /// An archive, or a directory of archives and sidecars
    #[arg(value_name = "ARCHIVE_OR_DIR")]
    pub packed: PathBuf,
    /// Compare with the original: a directory, or one .safetensors file
    #[arg(long, value_name = "PATH")]
    pub against: Option<PathBuf>,
    /// Fail where an archive's squared error over squared weights, all quantized tensors together, is larger
    #[arg(long, value_name = "E", requires = "against")]
    pub max_rel_mse: Option<f64>,
    /// Where to look for the bases of variants, beside the same tree: a directory with all below it, or an archive
    #[arg(long, value_name = "PATH")]
    pub base_path: Vec<PathBuf>,
    /// Threads that decode [default: all cores]
    #[arg(long, value_name = "N", value_parser = parse_threads)]
    pub threads: Option<usize>,
    /// Which engine decodes
    #[arg(long, value_enum, default_value_t)]
    pub engine: EngineChoice,
    /// Print the result as JSON
    #[arg(long)]
    pub json: bool,
}

/// Why there is no verdict.
#[derive(Debug, thiserror::Error)]
pub enum VerifyError {
    /// The packed files cannot be listed.
    #[error(transparent)]
    Packed(#[from] PackedTreeError),
    /// The operating system refused.
    #[error("{}: {source}", path.display())]
    Io {
        /// File or directory.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
}

/// What verification found.
#[derive(Debug, Serialize)]
pub struct Verification {
    /// Whether there is no problem anywhere.
    pub sound: bool,
    /// Every archive.
    pub archives: Vec<VerifiedArchive>,
    /// What is wrong beside the archives: sidecars that differ from the originals, originals that were not packed.
    pub problems: Vec<String>,
}

/// One archive.
#[derive(Debug, Serialize)]
pub struct VerifiedArchive {
    /// Where it lies.
    pub archive: String,
    /// Why it does not open, its files being unknown then, or why it is wrong as a whole.
    pub problem: Option<String>,
    /// Its safetensors files.
    pub files: Vec<VerifiedFile>,
    /// Squared error over squared weights, over all quantized tensors together; absent without originals to compare with.
    pub relative_squared_error: Option<f64>,
}

/// One safetensors file of an archive.
#[derive(Debug, Serialize)]
pub struct VerifiedFile {
    /// Name without directories.
    pub name: String,
    /// Number of tensors.
    pub tensors: usize,
    /// Every reason not to trust it.
    pub problems: Vec<String>,
    /// The original it was compared with.
    pub against: Option<String>,
    /// Tensors that are not bit for bit the original's; absent without an original.
    pub differences: Option<Vec<TensorDifference>>,
    /// Squared error of its quantized tensors.
    #[serde(skip)]
    pub quantized: SquaredError,
}

/// Verifies, prints the result, and returns it: what is not `sound` is for exit code 3.
pub fn run(args: &VerifyArgs) -> Result<Verification, VerifyError> {
    let tree = PackedTree::read(&args.packed)?;
    let threads = args.threads.unwrap_or_else(|| available_parallelism().map_or(1, usize::from));

    let bases = Bases::new(base_places(&tree, args.packed.is_dir(), &args.base_path));
    let mut verification = Verification { sound: true, archives: Vec::new(), problems: Vec::new() };
    let decoder = SequentialDecoder { engine: args.engine.engine(), threads };
    for relative in &tree.archives {
        verification.archives.push(verify_archive(&bases, &tree.root, relative, args, &decoder)?);
    }
    if let Some(original) = &args.against
        && args.packed.is_dir()
    {
        verification.problems = compare_directories(&tree, original, &verification.archives)?;
    }
    let archive_is_sound = |archive: &VerifiedArchive| {
        archive.problem.is_none() && archive.files.iter().all(|file| file.problems.is_empty())
    };
    verification.sound = verification.problems.is_empty() && verification.archives.iter().all(archive_is_sound);
    print(&verification, args.json).map_err(|source| VerifyError::Io { path: "standard output".into(), source })?;
    Ok(verification)
}

fn verify_archive(
    bases: &Bases,
    root: &Path,
    relative: &Path,
    args: &VerifyArgs,
    decoder: &SequentialDecoder,
) -> Result<VerifiedArchive, VerifyError> {
    let path = root.join(relative);
    let mut verified = VerifiedArchive {
        archive: path.display().to_string(),
        problem: None,
        files: Vec::new(),
        relative_squared_error: None,
    };
    let archive = match bases.open(&path) {
        Ok(archive) => archive,
        Err(ArchiveError::Io { path, source }) => return Err(VerifyError::Io { path, source }),
        Err(error) => {
            verified.problem = Some(error.to_string());
            return Ok(verified);
        }
    };
    let progress = progress_bar(archive.files().iter().map(|file| file.length_bytes).sum());
    for file in 0..archive.files().len() {
        let original = args.against.as_ref().map(|against| {
            let is_the_file = archive.files().len() == 1 && against.is_file();
            let directory = || against.join(relative.parent().unwrap_or(Path::new("")));
            if is_the_file { against.clone() } else { directory().join(&archive.files()[file].name) }
        });
        progress.set_message(archive.files()[file].name.clone());
        verified.files.push(verify_file(&archive, file, original, decoder, &progress)?);
    }
    progress.finish_and_clear();
    if verified.files.iter().all(|file| file.differences.is_some()) && args.against.is_some() {
        let mut together = SquaredError::default();
        verified.files.iter().for_each(|file| together.add(file.quantized));
        let error = together.relative();
        verified.relative_squared_error = Some(error);
        let limit = args.max_rel_mse.unwrap_or(f64::MAX);
        let is_within = error <= limit; // which a NaN is not
        if !is_within {
            let path = path.display();
            verified.problem =
                Some(format!("{path}: relative squared error {error:.3e}, expected at most {limit:.3e}"));
        }
    }
    Ok(verified)
}

/// What stops the decoding of one file.
enum Stop {
    Undecodable(MaterializeError),
    Original(io::Error),
}

impl From<MaterializeError> for Stop {
    fn from(error: MaterializeError) -> Self {
        Self::Undecodable(error)
    }
}

fn verify_file(
    archive: &Arc<Archive>,
    file: usize,
    original_path: Option<PathBuf>,
    decoder: &SequentialDecoder,
    progress: &ProgressBar,
) -> Result<VerifiedFile, VerifyError> {
    let entry = &archive.files()[file];
    let mut verified = VerifiedFile {
        name: entry.name.clone(),
        tensors: entry.tensors.len(),
        problems: Vec::new(),
        against: original_path.as_ref().map(|path| path.display().to_string()),
        differences: None,
        quantized: SquaredError::default(),
    };
    let mut original = match &original_path {
        Some(path) => open_original(path, entry.length_bytes, &mut verified.problems),
        None => None,
    };

    let (materializer, threads) = (decoder.materializer(archive), decoder.threads);
    let mut decoded_hash = Sha256::new();
    let mut decoded_tree = blake3::Hasher::new();
    let mut original_hash = Sha256::new();
    let mut original_bytes = Vec::new();
    let mut comparison = Comparison::new(entry.header.len() as u64, &entry.tensors);
    let anywhere = |_, _: &[u8]| Ok(());
    let decoded = decode_in_order(&materializer, archive, file, threads, anywhere, |bytes| {
        decoded_hash.update(bytes);
        decoded_tree.update(bytes);
        if let Some(original) = &mut original {
            original_bytes.resize(bytes.len(), 0);
            original.read_exact(&mut original_bytes).map_err(Stop::Original)?;
            original_hash.update(&original_bytes);
            comparison.feed(bytes, &original_bytes);
        }
        progress.inc(bytes.len() as u64);
        Ok(())
    });
    match decoded {
        Ok(()) => {}
        Err(Stop::Undecodable(error)) => {
            verified.problems.push(error.to_string());
            return Ok(verified);
        }
        Err(Stop::Original(source)) => {
            return Err(VerifyError::Io { path: original_path.unwrap_or_default(), source });
        }
    }
    let digest = |hash: Sha256| -> [u8; 32] { hash.finalize().into() };
    let mut expect_digest = |what: &str, found: [u8; 32], expected: [u8; 32]| {
        if found != expected {
            verified.problems.push(format!("{what} is {}, expected {}", hex(&found), hex(&expected)));
        }
    };
    expect_digest("SHA-256 of the decoded file", digest(decoded_hash), entry.decoded_sha256);
    if let Some(expected) = archive.decoded_blake3(file) {
        expect_digest("BLAKE3 of the decoded file", decoded_tree.finalize().into(), expected);
    }
    if original.is_some() {
        expect_digest(
            "SHA-256 of the original, which must be the file that was packed,",
            digest(original_hash),
            entry.source_sha256,
        );
        let compared = comparison.finish();
        if !compared.header_equal {
            verified.problems.push("header: found other bytes than the original's".into());
        }
        let quantized = match quantized_tensors(archive, file) {
            Ok(tensors) => tensors,
            Err(error) => {
                verified.problems.push(error.to_string());
                return Ok(verified);
            }
        };
        let may_differ: BTreeSet<&str> = quantized.iter().map(|&tensor| entry.tensors[tensor].name.as_str()).collect();
        for TensorDifference { tensor, .. } in &compared.differences {
            if !may_differ.contains(tensor.as_str()) {
                let problem = format!("{tensor}: differs from the original, though it is stored bit-exact");
                verified.problems.push(problem);
            }
        }
        let errors = compared.errors.iter().filter(|(tensor, _)| quantized.contains(tensor));
        errors.for_each(|&(_, error)| verified.quantized.add(error));
        verified.differences = Some(compared.differences);
    }
    Ok(verified)
}

/// Opens the original where it is a file of the right length; says what is wrong where not.
fn open_original(path: &Path, expected: u64, problems: &mut Vec<String>) -> Option<File> {
    let opened = File::open(path).and_then(|file| Ok((file.metadata()?.len(), file)));
    match opened {
        Ok((length, file)) if length == expected => return Some(file),
        Ok((length, _)) => problems.push(format!("{}: {length} bytes, expected {expected}", path.display())),
        Err(error) => problems.push(format!("{}: {error}", path.display())),
    }
    None
}

/// The tensors that were quantized, by number: only they may differ from the original.
fn quantized_tensors(archive: &Archive, file: usize) -> Result<BTreeSet<usize>, ArchiveError> {
    let mut quantized = BTreeSet::new();
    for record in 0..archive.index().records.len() as u32 {
        let side = archive.side_information(record)?;
        for (part, header) in archive.record(record).parts.iter().zip(&side.parts) {
            if part.file as usize == file && header.coding.is_quantized() {
                quantized.insert(part.tensor as usize);
            }
        }
    }
    Ok(quantized)
}

/// Everything beside the archives: sidecars byte for byte, and no original without a packed counterpart.
fn compare_directories(
    tree: &PackedTree,
    original: &Path,
    archives: &[VerifiedArchive],
) -> Result<Vec<String>, VerifyError> {
    let mut problems = Vec::new();
    for relative in &tree.sidecars {
        let (packed, original) = (tree.root.join(relative), original.join(relative));
        match (fs::read(&packed), fs::read(&original)) {
            (Err(source), _) => return Err(VerifyError::Io { path: packed, source }),
            (_, Err(error)) => problems.push(format!("{}: {error}", original.display())),
            (Ok(ours), Ok(theirs)) if ours != theirs => {
                problems.push(format!("{}: differs from {}", packed.display(), original.display()));
            }
            _ => {}
        }
    }
    let mut packed: BTreeSet<PathBuf> = tree.sidecars.iter().cloned().collect();
    for (relative, archive) in tree.archives.iter().zip(archives) {
        let directory = relative.parent().unwrap_or(Path::new(""));
        packed.extend(archive.files.iter().map(|file| directory.join(&file.name)));
    }
    let unreadable_archive = archives.iter().any(|archive| archive.files.is_empty());
    let mut waiting = vec![PathBuf::new()];
    while let Some(directory) = waiting.pop() {
        let path = original.join(&directory);
        let entries = fs::read_dir(&path).map_err(|source| VerifyError::Io { path: path.clone(), source })?;
        for entry in entries {
            let entry = entry.map_err(|source| VerifyError::Io { path: path.clone(), source })?;
            let relative = directory.join(entry.file_name());
            if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                waiting.push(relative);
            } else if !packed.contains(&relative) && !unreadable_archive {
                problems.push(format!("{}: has no packed counterpart", entry.path().display()));
            }
        }
    }
    problems.sort();
    Ok(problems)
}

fn print(verification: &Verification, json: bool) -> io::Result<()> {
    let mut output = io::stdout().lock();
    if json {
        serde_json::to_writer_pretty(&mut output, verification)?;
        return writeln!(output);
    }
    for archive in &verification.archives {
        if let Some(problem) = &archive.problem {
            writeln!(output, "{problem}")?; // it names the archive
        }
        for file in &archive.files {
            let place = format!("{}: {}", archive.archive, file.name);
            for problem in &file.problems {
                writeln!(output, "{place}: {problem}")?;
            }
            if file.problems.is_empty() {
                writeln!(output, "{place}: {} tensors, {}", file.tensors, summary(file))?;
            }
        }
    }
    for problem in &verification.problems {
        writeln!(output, "{problem}")?;
    }
    output.flush()
}

/// What is good about a file without problems.
fn summary(file: &VerifiedFile) -> String {
    match file.differences.as_deref() {
        None => "every checksum right".into(),
        Some([]) => "every checksum right, every byte the original's".into(),
        Some(differences) => {
            let error = |difference: &TensorDifference| difference.relative_squared_error.unwrap_or(f64::INFINITY);
            let worst = differences.iter().max_by(|a, b| error(a).total_cmp(&error(b))).expect("not empty");
            let (count, exact) = (differences.len(), file.tensors - differences.len());
            let (all, tensor, worst) = (file.quantized.relative(), &worst.tensor, error(worst));
            format!(
                "every checksum right, {exact} tensors bit-exact, {count} not: relative squared error {all:.3e}, at most \
                 {worst:.3e} ({tensor})"
            )
        }
    }
}
