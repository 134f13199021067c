//! `mcwcfs unpack`: real files again. Nothing gets its final name before its digest is the one that the index states,
//! unless somebody in a hurry says that the checksums of the stored bytes are enough; and none gets it before all are there,
//! so that what fails leaves no part of a model behind.
//!
//! The digest is BLAKE3, which the threads that decode compute together. SHA-256 is one chain, slower than decoding on two
//! threads; it is computed for archives that have nothing else, and by `verify`.

use std::collections::BTreeSet;
use std::fmt;
use std::fs::{self, File, Permissions};
use std::io::{self, Write};
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread::available_parallelism;

use clap::Args;
use indicatif::{ProgressBar, ProgressStyle};
use serde::Serialize;
use sha2::{Digest, Sha256};
use tempfile::{NamedTempFile, TempPath};

use super::decoded::{SequentialDecoder, WindowDigests, decode_in_any_order, decode_in_order};
use super::packed_tree::{PackedTree, PackedTreeError};
use super::size::parse_size;
use super::{base_places, lies_inside, parse_threads};
use crate::archive::{Archive, ArchiveError, Bases};
use crate::decode::cuda::DEFAULT_GPU_MEMORY_BYTES;
use crate::hexadecimal::hex;
use crate::materialize::{EngineChoice, MaterializeError};

/// Write the files of archives as they were before packing.
#[derive(Debug, Args)]
pub struct UnpackArgs {
    /// An archive, or a directory of archives and sidecars
    #[arg(value_name = "ARCHIVE_OR_DIR")]
    pub source: PathBuf,
    /// Directory to write into; for an archive of one file, a path that ends in .safetensors is that file
    #[arg(value_name = "OUT")]
    pub output: PathBuf,
    /// Where to look for the bases of variants, beside the same tree: a directory with all below it, or an archive
    #[arg(long, value_name = "PATH")]
    pub base_path: Vec<PathBuf>,
    /// Threads that decode [default: all cores]
    #[arg(long, value_name = "N", value_parser = parse_threads)]
    pub threads: Option<usize>,
    /// Which engine decodes
    #[arg(long, value_enum, default_value_t)]
    pub engine: EngineChoice,
    /// What decoding may take of a CUDA device, where that is the engine, and of this machine for the copies [default: 1G]
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    pub gpu_memory: Option<u64>,
    /// Do not compare digests of decoded files with the index's; the stored bytes have checksums all the same
    #[arg(long)]
    pub skip_digests: bool,
    /// Overwrite files that exist
    #[arg(long)]
    pub force: bool,
    /// Print what was written as JSON
    #[arg(long)]
    pub json: bool,
}

/// Why nothing, or not everything, was unpacked.
#[derive(Debug, thiserror::Error)]
pub enum UnpackError {
    /// The source cannot be listed.
    #[error(transparent)]
    Source(#[from] PackedTreeError),
    /// An archive does not open.
    #[error(transparent)]
    Archive(#[from] ArchiveError),
    /// An archive does not decode.
    #[error(transparent)]
    Decode(#[from] MaterializeError),
    /// A file decodes to other bytes than were packed.
    #[error("{}: {file}: the decoded file has {found}, expected {expected}: nothing was written", archive.display())]
    WrongContent {
        /// The archive.
        archive: PathBuf,
        /// The safetensors file inside it.
        file: String,
        /// Digest of what was decoded.
        found: String,
        /// Digest that the index states.
        expected: String,
    },
    /// A file to be written is there already.
    #[error("{}: exists already: --force overwrites it", path.display())]
    Exists {
        /// The file.
        path: PathBuf,
    },
    /// Two files would be written under one name.
    #[error("{}: would be written twice, from {first} and from {second}", path.display())]
    Collision {
        /// The file.
        path: PathBuf,
        /// Where its bytes come from.
        first: String,
        /// Where its other bytes come from.
        second: String,
    },
    /// The output would become part of the source.
    #[error("{}: lies inside the directory to be unpacked, expected another place", path.display())]
    InsideSource {
        /// The output.
        path: PathBuf,
    },
    /// The operating system refused.
    #[error("{}: {source}", path.display())]
    Io {
        /// File or directory.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
}

/// One file to be written.
struct Output {
    path: PathBuf,
    origin: Origin,
}

enum Origin {
    Decoded { archive: Arc<Archive>, file: usize },
    Sidecar(PathBuf),
}

impl Origin {
    fn describe(&self) -> String {
        match self {
            Self::Decoded { archive, .. } => archive.path().display().to_string(),
            Self::Sidecar(path) => path.display().to_string(),
        }
    }
}

/// One file that was written, as `--json` lists it.
#[derive(Debug, Serialize)]
struct Written {
    path: String,
    bytes: u64,
    /// Of what was written, unless that was not asked for.
    #[serde(flatten)]
    digest: Option<FileDigest>,
}

/// A digest of a whole file, hexadecimal.
#[derive(Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
enum FileDigest {
    Blake3(String),
    Sha256(String),
}

impl fmt::Display for FileDigest {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Blake3(digest) => write!(out, "BLAKE3 {digest}"),
            Self::Sha256(digest) => write!(out, "SHA-256 {digest}"),
        }
    }
}

/// Unpacks and, with `--json`, prints what was written.
pub fn run(args: &UnpackArgs) -> Result<(), UnpackError> {
    let threads = args.threads.unwrap_or_else(|| available_parallelism().map_or(1, usize::from));

    let outputs = plan(args)?;
    let exists = outputs.iter().find(|output| fs::symlink_metadata(&output.path).is_ok());
    if let Some(Output { path, .. }) = exists.filter(|_| !args.force) {
        return Err(UnpackError::Exists { path: path.clone() });
    }
    let engine = args.engine.engine_within(args.gpu_memory.unwrap_or(DEFAULT_GPU_MEMORY_BYTES));
    let decoder = SequentialDecoder { engine, threads };
    let progress = progress_bar(outputs.iter().map(Output::bytes).sum());
    let mut made = MadeDirectories::default();
    let unnamed = outputs.iter().map(|output| output.write(&decoder, args, &mut made, &progress));
    let unnamed = unnamed.collect::<Result<Vec<_>, _>>()?;
    let written = name_all(unnamed, args.force)?;
    made.keep();
    progress.finish_and_clear();
    if args.json {
        let to_stdout = |source: io::Error| UnpackError::Io { path: "standard output".into(), source };
        let mut stdout = io::stdout().lock();
        serde_json::to_writer_pretty(&mut stdout, &written).map_err(|error| to_stdout(error.into()))?;
        writeln!(stdout).map_err(to_stdout)?;
    }
    Ok(())
}

/// A bar on standard error, where that is a terminal.
pub(super) fn progress_bar(bytes: u64) -> ProgressBar {
    let style = ProgressStyle::with_template("{msg} {wide_bar} {bytes}/{total_bytes} {eta}");
    ProgressBar::new(bytes).with_style(style.expect("a valid template"))
}

/// Every file to be written, no path twice. Opens every archive, so that a damaged one is found before anything is written.
fn plan(args: &UnpackArgs) -> Result<Vec<Output>, UnpackError> {
    let (source, output) = (&args.source, &args.output);
    let tree = PackedTree::read(source)?;
    let is_directory = source.is_dir();
    let bases = Bases::new(base_places(&tree, is_directory, &args.base_path));
    if is_directory && lies_inside(output, &tree.root) {
        return Err(UnpackError::InsideSource { path: output.to_owned() });
    }

    let mut outputs = Vec::new();
    for relative in &tree.archives {
        let archive = bases.open(&tree.root.join(relative))?;
        let directory = output.join(relative.parent().unwrap_or(Path::new("")));
        let names_the_file = output.extension().is_some_and(|extension| extension == "safetensors");
        let is_one_file = !is_directory && names_the_file && archive.files().len() == 1 && !output.is_dir();
        for (file, entry) in archive.files().iter().enumerate() {
            let path = if is_one_file { output.to_owned() } else { directory.join(&entry.name) };
            outputs.push(Output { path, origin: Origin::Decoded { archive: Arc::clone(&archive), file } });
        }
    }
    for relative in tree.sidecars {
        outputs.push(Output { path: output.join(&relative), origin: Origin::Sidecar(tree.root.join(relative)) });
    }
    let mut seen = BTreeSet::new();
    for (position, Output { path, origin }) in outputs.iter().enumerate() {
        if !seen.insert(path) {
            let first = outputs[..position].iter().find(|earlier| &earlier.path == path).expect("it was seen");
            let (first, second) = (first.origin.describe(), origin.describe());
            return Err(UnpackError::Collision { path: path.clone(), first, second });
        }
    }
    Ok(outputs)
}

/// A file that is written and checked, under a temporary name. Dropped, it is gone.
struct Unnamed {
    temporary: TempPath,
    path: PathBuf,
    bytes: u64,
    digest: Option<FileDigest>,
}

/// Gives all files their names, or none: where one cannot have it, those before it lose theirs, unless they replaced others.
fn name_all(unnamed: Vec<Unnamed>, replace: bool) -> Result<Vec<Written>, UnpackError> {
    let mut written: Vec<(PathBuf, Written)> = Vec::with_capacity(unnamed.len());
    for Unnamed { temporary, path, bytes, digest } in unnamed {
        let renamed = if replace { temporary.persist(&path) } else { temporary.persist_noclobber(&path) };
        if let Err(error) = renamed {
            for (path, _) in written.iter().filter(|_| !replace) {
                let _ = fs::remove_file(path); // the error at hand says more
            }
            return Err(match error.error.kind() {
                io::ErrorKind::AlreadyExists => UnpackError::Exists { path },
                _ => UnpackError::Io { path, source: error.error },
            });
        }
        let shown = path.display().to_string();
        written.push((path, Written { path: shown, bytes, digest }));
    }
    Ok(written.into_iter().map(|(_, written)| written).collect())
}

/// Directories that were made for the output. Dropped before they are kept, those that are empty are gone.
#[derive(Default)]
struct MadeDirectories(Vec<PathBuf>);

impl MadeDirectories {
    /// Makes a directory and those it lies in.
    fn make(&mut self, directory: &Path) -> io::Result<()> {
        let missing =
            directory.ancestors().take_while(|ancestor| !ancestor.as_os_str().is_empty() && !ancestor.exists());
        let mut missing: Vec<PathBuf> = missing.map(Path::to_owned).collect();
        fs::create_dir_all(directory)?;
        missing.reverse(); // parents first, as they were made
        self.0.append(&mut missing);
        Ok(())
    }

    fn keep(mut self) {
        self.0.clear();
    }
}

impl Drop for MadeDirectories {
    fn drop(&mut self) {
        for directory in self.0.iter().rev() {
            let _ = fs::remove_dir(directory); // only if it is empty
        }
    }
}

impl Output {
    fn bytes(&self) -> u64 {
        match &self.origin {
            Origin::Decoded { archive, file } => archive.files()[*file].length_bytes,
            Origin::Sidecar(path) => fs::metadata(path).map_or(0, |metadata| metadata.len()),
        }
    }

    /// Writes the file under a temporary name beside its own (`.name.XXXXXX.part`) and checks it.
    fn write(
        &self,
        decoder: &SequentialDecoder,
        args: &UnpackArgs,
        made: &mut MadeDirectories,
        progress: &ProgressBar,
    ) -> Result<Unnamed, UnpackError> {
        let io_at = |source| UnpackError::Io { path: self.path.clone(), source };
        let directory = match self.path.parent() {
            Some(parent) if !parent.as_os_str().is_empty() => parent,
            _ => Path::new("."),
        };
        made.make(directory).map_err(io_at)?;
        let name = self.path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        progress.set_message(name.clone());
        let mut partial = tempfile::Builder::new()
            .prefix(&format!(".{name}."))
            .suffix(".part")
            .permissions(Permissions::from_mode(0o666)) // less the umask, as any other new file
            .tempfile_in(directory)
            .map_err(io_at)?;
        let digest = match &self.origin {
            Origin::Decoded { archive, file } => {
                self.decode(archive, *file, decoder, args, partial.as_file(), progress)?
            }
            Origin::Sidecar(path) => Some(FileDigest::Sha256(hex(&self.copy(path, &mut partial, progress)?))),
        };
        partial.as_file().sync_all().map_err(io_at)?;
        let bytes = partial.as_file().metadata().map_err(io_at)?.len();
        // Closed: there may be more of them than descriptors.
        Ok(Unnamed { temporary: partial.into_temp_path(), path: self.path.clone(), bytes, digest })
    }

    fn decode(
        &self,
        archive: &Arc<Archive>,
        file: usize,
        decoder: &SequentialDecoder,
        args: &UnpackArgs,
        partial: &File,
        progress: &ProgressBar,
    ) -> Result<Option<FileDigest>, UnpackError> {
        let (materializer, threads) = (decoder.materializer(archive), decoder.threads);
        let place = |offset, bytes: &[u8]| {
            let written = partial.write_all_at(bytes, offset);
            written.map_err(|source| UnpackError::Io { path: self.path.clone(), source })
        };
        let entry = &archive.files()[file];
        let expected = match archive.decoded_blake3(file) {
            _ if args.skip_digests => None,
            Some(digest) => Some(FileDigest::Blake3(hex(&digest))),
            None => Some(FileDigest::Sha256(hex(&entry.decoded_sha256))),
        };
        let found = if let Some(FileDigest::Sha256(_)) = expected {
            let mut hash = Sha256::new();
            decode_in_order(&materializer, archive, file, threads, place, |bytes| {
                hash.update(bytes);
                progress.inc(bytes.len() as u64);
                Ok(())
            })?;
            Some(FileDigest::Sha256(hex(&hash.finalize())))
        } else {
            let digests = expected.is_some().then(|| WindowDigests::new(entry.length_bytes));
            decode_in_any_order(&materializer, archive, file, threads, |offset, bytes| {
                if let Some(digests) = &digests {
                    digests.add(offset, bytes);
                }
                progress.inc(bytes.len() as u64);
                place(offset, bytes)
            })?;
            digests.map(|digests| FileDigest::Blake3(hex(&digests.digest())))
        };
        match (found, expected) {
            (Some(found), Some(expected)) if found != expected => Err(UnpackError::WrongContent {
                archive: archive.path().to_owned(),
                file: entry.name.clone(),
                found: found.to_string(),
                expected: expected.to_string(),
            }),
            (found, _) => Ok(found),
        }
    }

    fn copy(
        &self,
        sidecar: &Path,
        partial: &mut NamedTempFile,
        progress: &ProgressBar,
    ) -> Result<[u8; 32], UnpackError> {
        let io_of_source = |source| UnpackError::Io { path: sidecar.to_owned(), source };
        let mut original = File::open(sidecar).map_err(io_of_source)?;
        let mode = original.metadata().map_err(io_of_source)?.permissions().mode();
        let mut tee = HashingWriter { hash: Sha256::new(), file: partial.as_file_mut() };
        let bytes =
            io::copy(&mut original, &mut tee).map_err(|source| UnpackError::Io { path: self.path.clone(), source })?;
        let digest = tee.hash.finalize().into();
        // A script stays executable; everything else about its permissions is this user's business.
        let own = partial.as_file().metadata().map_err(io_of_source)?.permissions().mode();
        let executable = own | (mode & 0o111 & (own >> 2));
        partial.as_file().set_permissions(Permissions::from_mode(executable)).map_err(io_of_source)?;
        progress.inc(bytes);
        Ok(digest)
    }
}

struct HashingWriter<'a> {
    hash: Sha256,
    file: &'a mut File,
}

impl Write for HashingWriter<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let written = self.file.write(bytes)?;
        self.hash.update(&bytes[..written]);
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file.flush()
    }
}
