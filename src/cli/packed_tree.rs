//! One archive, or a directory of archives and sidecars, as `verify` and `unpack` take it.
//!
//! A mount leaves out what it cannot show and says so in its log. Here that would pass for success, so it is an error.

use std::fs;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use crate::archive::UNFINISHED_PREFIX;

/// Why a path cannot be taken as packed files.
#[derive(Debug, thiserror::Error)]
pub enum PackedTreeError {
    /// The operating system refused.
    #[error("{}: {source}", path.display())]
    Io {
        /// File or directory.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// There is nothing to verify or to unpack.
    #[error("{}: no .mcwc file found", path.display())]
    NoArchive {
        /// The directory.
        path: PathBuf,
    },
    /// Neither a regular file nor a directory, or a link that leads elsewhere.
    #[error("{}: found {found}, expected a regular file, a directory, or a link to a file of the same tree", path.display())]
    Kind {
        /// Where it lies.
        path: PathBuf,
        /// What it is.
        found: String,
    },
}

/// What is to be verified or unpacked. Paths are relative to `root` and sorted; there is one archive at least.
#[derive(Debug, PartialEq, Eq)]
pub struct PackedTree {
    /// The directory, or the one that holds the archive.
    pub root: PathBuf,
    /// Files named `*.mcwc`, or the one file given whatever its name.
    pub archives: Vec<PathBuf>,
    /// All other files; none where one archive was given.
    pub sidecars: Vec<PathBuf>,
}

impl PackedTree {
    /// Lists `path`, an archive or a directory.
    pub fn read(path: &Path) -> Result<Self, PackedTreeError> {
        let root = fs::canonicalize(path).map_err(|source| PackedTreeError::Io { path: path.to_owned(), source })?;
        if !root.is_dir() {
            // Links are resolved: a content-addressed store gives its files names without endings.
            let directory = root.parent().expect("a file lies in a directory").to_owned();
            let name = PathBuf::from(root.file_name().expect("a file has a name"));
            return Ok(Self { root: directory, archives: vec![name], sidecars: Vec::new() });
        }
        let mut tree = Self { root, archives: Vec::new(), sidecars: Vec::new() };
        let mut waiting = vec![PathBuf::new()];
        while let Some(directory) = waiting.pop() {
            tree.list(&directory, &mut waiting)?;
        }
        if tree.archives.is_empty() {
            return Err(PackedTreeError::NoArchive { path: path.to_owned() });
        }
        tree.archives.sort();
        tree.sidecars.sort();
        Ok(tree)
    }

    fn list(&mut self, directory: &Path, waiting: &mut Vec<PathBuf>) -> Result<(), PackedTreeError> {
        let absolute = self.root.join(directory);
        let io_at = |path: &Path, source| PackedTreeError::Io { path: path.to_owned(), source };
        for entry in fs::read_dir(&absolute).map_err(|source| io_at(&absolute, source))? {
            let entry = entry.map_err(|source| io_at(&absolute, source))?;
            let path = entry.path();
            if entry.file_name().as_bytes().starts_with(UNFINISHED_PREFIX.as_bytes()) {
                continue;
            }
            let relative = directory.join(entry.file_name());
            let kind = entry.file_type().map_err(|source| io_at(&path, source))?;
            if kind.is_dir() {
                waiting.push(relative);
                continue;
            }
            let wrong_kind = |found: String| PackedTreeError::Kind { path: path.clone(), found };
            if kind.is_symlink() {
                let target = fs::canonicalize(&path).map_err(|source| io_at(&path, source))?;
                if !target.starts_with(&self.root) || !target.is_file() {
                    return Err(wrong_kind(format!("a link to {}", target.display())));
                }
            } else if !kind.is_file() {
                return Err(wrong_kind("a device, pipe or socket".into()));
            }
            let is_archive = relative.extension().is_some_and(|extension| extension == "mcwc");
            if is_archive { &mut self.archives } else { &mut self.sidecars }.push(relative);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;

    fn tree_of(files: &[&str]) -> tempfile::TempDir {
        let directory = tempfile::tempdir().expect("a directory");
        for file in files {
            let path = directory.path().join(file);
            fs::create_dir_all(path.parent().expect("below the directory")).expect("a directory");
            fs::write(path, file).expect("a file");
        }
        directory
    }

    fn paths(names: &[&str]) -> Vec<PathBuf> {
        names.iter().map(PathBuf::from).collect()
    }

    #[test]
    fn archives_and_sidecars_are_told_apart_at_every_depth() {
        let directory = tree_of(&["b.mcwc", "a/x.mcwc", "config.json", "a/deep/vocab.txt"]);
        symlink("config.json", directory.path().join("link.json")).expect("a link");
        let tree = PackedTree::read(directory.path()).expect("a plain tree");
        assert_eq!(tree.archives, paths(&["a/x.mcwc", "b.mcwc"]));
        assert_eq!(tree.sidecars, paths(&["a/deep/vocab.txt", "config.json", "link.json"]));
    }

    #[test]
    fn one_file_is_an_archive_whatever_its_name() {
        let directory = tree_of(&["blob", "config.json"]);
        let tree = PackedTree::read(&directory.path().join("blob")).expect("a file");
        assert_eq!((tree.archives, tree.sidecars), (paths(&["blob"]), vec![]));
    }

    #[test]
    fn a_link_out_of_the_tree_is_an_error_that_names_it() {
        let outside = tree_of(&["secret"]);
        let directory = tree_of(&["a.mcwc"]);
        symlink(outside.path().join("secret"), directory.path().join("innocent")).expect("a link");
        let error = PackedTree::read(directory.path()).expect_err("it leads out");
        assert!(error.to_string().contains("innocent: found a link to"), "{error}");
    }

    #[test]
    fn a_missing_path_is_an_error_that_names_it() {
        let error = PackedTree::read(Path::new("no/such/place")).expect_err("nothing there");
        assert!(error.to_string().starts_with("no/such/place: "), "{error}");
    }
}
