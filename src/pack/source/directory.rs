//! What lies in a checkpoint's directory.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use log::warn;

use super::{Sidecar, SourceError};
use crate::archive::UNFINISHED_PREFIX;

/// Directories that belong to tools and not to the checkpoint.
const TOOL_DIRECTORIES: [&str; 2] = [".git", ".cache"];

/// The files of a directory by what they are to a checkpoint; each list sorted.
#[derive(Debug, Default)]
pub(super) struct Listing {
    /// `*.safetensors` of the directory itself.
    pub tensor_files: Vec<PathBuf>,
    /// `*.safetensors.index.json` of the directory itself; they are sidecars too.
    pub indexes: Vec<PathBuf>,
    /// Every file but the tensor files, at any depth.
    pub sidecars: Vec<Sidecar>,
}

/// Lists a checkpoint's directory.
pub(super) fn list(root: &Path) -> Result<Listing, SourceError> {
    let mut listing = Listing::default();
    let canonical = fs::canonicalize(root).map_err(|source| SourceError::Io { path: root.to_owned(), source })?;
    visit(root, Path::new(""), &mut vec![canonical], &mut listing)?;
    listing.tensor_files.sort();
    listing.indexes.sort();
    listing.sidecars.sort();
    Ok(listing)
}

/// Adds what lies in `root/below`; `ancestors` are the real paths from the root to it.
fn visit(root: &Path, below: &Path, ancestors: &mut Vec<PathBuf>, listing: &mut Listing) -> Result<(), SourceError> {
    let directory = root.join(below);
    let io = |path: &Path, source| SourceError::Io { path: path.to_owned(), source };
    for entry in fs::read_dir(&directory).map_err(|error| io(&directory, error))? {
        let entry = entry.map_err(|error| io(&directory, error))?;
        let (path, name) = (entry.path(), below.join(entry.file_name()));
        let metadata = match fs::metadata(&path) {
            Ok(metadata) => metadata,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                warn!("left out, the link leads nowhere: {}", path.display());
                continue;
            }
            Err(error) => return Err(io(&path, error)),
        };
        if metadata.is_dir() {
            if TOOL_DIRECTORIES.iter().any(|tool| entry.file_name() == *tool) {
                continue;
            }
            let canonical = fs::canonicalize(&path).map_err(|error| io(&path, error))?;
            if ancestors.contains(&canonical) || !canonical.starts_with(&ancestors[0]) {
                warn!("left out, the link leads outside or in a circle: {}", path.display());
                continue;
            }
            ancestors.push(canonical);
            visit(root, &name, ancestors, listing)?;
            ancestors.pop();
        } else if metadata.is_file() {
            listing.add(path, name);
        } else {
            warn!("left out, neither a file nor a directory: {}", path.display());
        }
    }
    Ok(())
}

impl Listing {
    fn add(&mut self, path: PathBuf, name: PathBuf) {
        let file_name = name.file_name().unwrap_or_default().to_string_lossy();
        if file_name.starts_with(UNFINISHED_PREFIX) {
            return;
        }
        let in_root = name.components().count() == 1;
        if in_root && file_name.ends_with(".safetensors") {
            self.tensor_files.push(path);
            return;
        }
        if file_name.ends_with(".mcwc") {
            warn!("left out, an archive already: {}", path.display());
            return;
        }
        if in_root && file_name.ends_with(".safetensors.index.json") {
            self.indexes.push(path.clone());
        }
        self.sidecars.push(Sidecar { name, path });
    }
}
