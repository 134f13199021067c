//! What a request to the file system can meet. [`crate::fuse`] alone turns these into errnos.

use std::path::PathBuf;

use super::Inode;
use super::checkpoint::BoxError;

/// Why the file system cannot answer.
#[derive(Debug, thiserror::Error)]
pub enum VfsError {
    /// The source directory cannot be used.
    #[error("source {path}: {source}", path = path.display())]
    Source {
        /// The directory, as given.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// The kernel asked for an inode that the tree does not have.
    #[error("inode {0}: not in the tree")]
    NoSuchInode(Inode),
    /// The directory has no such name.
    #[error("no such file or directory")]
    NoSuchName,
    /// The extended attribute is not offered.
    #[error("no such extended attribute")]
    NoSuchAttribute,
    /// A directory was expected.
    #[error("not a directory")]
    NotADirectory,
    /// A file was expected, and a directory is there.
    #[error("is a directory")]
    IsADirectory,
    /// A file was expected, and a symbolic link is there.
    #[error("not a file")]
    NotAFile,
    /// A symbolic link was expected.
    #[error("not a symbolic link")]
    NotALink,
    /// A sidecar cannot be read.
    #[error("{path}: {source}", path = path.display())]
    Read {
        /// The sidecar, from the root of the source.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// A sidecar is not what it was when the tree was listed.
    #[error(
        "{path}: changed since it was listed ({found_bytes} bytes now, {expected_bytes} then): list the source again to see it",
        path = path.display()
    )]
    Changed {
        /// The sidecar, from the root of the source.
        path: PathBuf,
        /// Its length now.
        found_bytes: u64,
        /// Its length when the tree was listed; where the lengths agree, the modification times do not.
        expected_bytes: u64,
    },
    /// A file's bytes cannot be produced from its archive.
    #[error("{path}: {source}", path = path.display())]
    Decode {
        /// The file, from the root of the tree.
        path: PathBuf,
        /// What was wrong, with archive, tensor and record.
        source: BoxError,
    },
}
