//! Inode numbers that stay the same across remounts and hosts (contract line 2).
//!
//! A number is the start of a SHA-256 over what the inode shows: for an archived file the archive's content and the
//! path, for a sidecar its path, length and modification time, for directories and links the path. A changed file is
//! thus another inode, and no page of the old one can be taken for it.

use std::fmt;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::time::SystemTime;

use sha2::{Digest, Sha256};

/// Number of a file, directory or link in the tree.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Inode(pub u64);

impl Inode {
    /// The root of the tree; FUSE fixes its number.
    pub const ROOT: Self = Self(1);

    /// The next candidate where two paths' numbers collide.
    pub(super) fn next(self) -> Self {
        Self::from_number(self.0.wrapping_add(1))
    }

    pub(super) fn of_directory(path: &Path) -> Self {
        Self::derive(b"directory", path, &[])
    }

    pub(super) fn of_link(path: &Path) -> Self {
        Self::derive(b"link", path, &[])
    }

    pub(super) fn of_sidecar(path: &Path, length_bytes: u64, modified: SystemTime) -> Self {
        // Before 1970 there is no duration: any fixed value will do, the length and the path still tell files apart.
        let since_epoch = modified.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        Self::derive(b"sidecar", path, &[&length_bytes.to_le_bytes(), &since_epoch.as_nanos().to_le_bytes()])
    }

    pub(super) fn of_archived(path: &Path, content_id: &[u8; 32]) -> Self {
        Self::derive(b"archived", path, &[content_id])
    }

    fn derive(kind: &[u8], path: &Path, parts: &[&[u8]]) -> Self {
        let mut hasher = Sha256::new();
        hasher.update(kind);
        for part in parts {
            hasher.update(part); // of a fixed length for each kind: no two inputs look alike
        }
        hasher.update(path.as_os_str().as_bytes());
        let digest = hasher.finalize();
        Self::from_number(u64::from_le_bytes(*digest.first_chunk().expect("a SHA-256 has 32 bytes")))
    }

    /// 63 bits, because some readers keep inode numbers in signed integers; 0 means none and 1 is the root.
    fn from_number(number: u64) -> Self {
        Self((number & (u64::MAX >> 1)).max(2))
    }
}

impl fmt::Display for Inode {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(formatter)
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn numbers_do_not_change_between_versions() {
        let path = Path::new("model/config.json");
        let modified = SystemTime::UNIX_EPOCH + Duration::from_secs(1_700_000_000);
        assert_eq!(Inode::of_directory(path), Inode(3_019_391_519_195_111_657));
        assert_eq!(Inode::of_sidecar(path, 17, modified), Inode(3_618_924_063_705_992_598));
        assert_eq!(Inode::of_archived(path, &[7; 32]), Inode(3_667_504_693_513_045_274));
    }

    #[test]
    fn a_changed_sidecar_is_another_inode() {
        let path = Path::new("config.json");
        let modified = SystemTime::UNIX_EPOCH + Duration::from_nanos(5);
        let inode = Inode::of_sidecar(path, 1, modified);
        assert_ne!(inode, Inode::of_sidecar(path, 2, modified));
        assert_ne!(inode, Inode::of_sidecar(path, 1, modified + Duration::from_nanos(1)));
    }

    #[test]
    fn the_next_candidate_is_never_the_root_nor_none() {
        assert_eq!(Inode(u64::MAX >> 1).next(), Inode(2));
        assert_eq!(Inode(5).next(), Inode(6));
    }
}
