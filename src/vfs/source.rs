//! The source directory: finding out where a symbolic link leads, and reading sidecars without ever leaving the tree.
//!
//! A sidecar is opened for each read and closed again: no number of files in the tree exhausts the descriptors, and a
//! restarted daemon needs nothing of the old one. The path is walked from the root's descriptor, component by component,
//! following no link: whatever happens to the source after it was listed, nothing outside it is opened. Because the walk
//! starts at a descriptor, it does not go through a mount that was put on top of the source either.

use std::ffi::CString;
use std::fs::{File, Metadata};
use std::io;
use std::os::fd::{AsRawFd, FromRawFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Component, Path, PathBuf};
use std::time::SystemTime;

use super::VfsError;

/// The root of everything that is read.
#[derive(Debug)]
pub(super) struct Source {
    root: PathBuf,
    directory: File,
}

/// A file of the source as it was when it was listed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct SourceFile {
    /// From the root of the source, without symbolic links.
    pub(super) path: PathBuf,
    pub(super) length_bytes: u64,
    pub(super) modified: SystemTime,
    /// Device, inode and the time of the last change of any kind, which no program can set: a file rewritten with its
    /// old length and modification time is still seen to be another.
    identity: (u64, u64, i64, i64),
}

impl SourceFile {
    pub(super) fn new(path: PathBuf, metadata: &Metadata) -> io::Result<Self> {
        let identity = (metadata.dev(), metadata.ino(), metadata.ctime(), metadata.ctime_nsec());
        Ok(Self { path, length_bytes: metadata.len(), modified: metadata.modified()?, identity })
    }
}

impl Source {
    pub(super) fn open(path: &Path) -> Result<Self, VfsError> {
        let wrap = |source| VfsError::Source { path: path.to_owned(), source };
        let root = path.canonicalize().map_err(wrap)?;
        let directory = File::open(&root).map_err(wrap)?;
        if !directory.metadata().map_err(wrap)?.is_dir() {
            return Err(wrap(io::Error::from(io::ErrorKind::NotADirectory)));
        }
        Ok(Self { root, directory })
    }

    pub(super) fn root(&self) -> &Path {
        &self.root
    }

    /// Where `path`, from the root, really lies, from the root; `None` if that is outside.
    pub(super) fn resolve(&self, path: &Path) -> io::Result<Option<PathBuf>> {
        let real = self.root.join(path).canonicalize()?;
        Ok(real.strip_prefix(&self.root).ok().map(Path::to_owned))
    }

    /// All of a small file, or an error if it is longer than `limit_bytes`.
    pub(super) fn read_whole(&self, file: &SourceFile, limit_bytes: u64) -> Result<Vec<u8>, VfsError> {
        if file.length_bytes > limit_bytes {
            let message = format!("{} bytes, expected at most {limit_bytes}", file.length_bytes);
            let source = io::Error::new(io::ErrorKind::FileTooLarge, message);
            return Err(VfsError::Read { path: file.path.clone(), source });
        }
        let mut bytes = vec![0; usize::try_from(file.length_bytes).expect("checked against the limit")];
        self.read_exact_at(file, 0, &mut bytes)?;
        Ok(bytes)
    }

    /// Fills `out` from `offset_bytes` on, which must lie inside the file's listed length.
    pub(super) fn read_exact_at(&self, file: &SourceFile, offset_bytes: u64, out: &mut [u8]) -> Result<(), VfsError> {
        let wrap = |source| VfsError::Read { path: file.path.clone(), source };
        let opened = self.open_beneath(&file.path).map_err(wrap)?;
        let now = opened.metadata().map_err(wrap)?;
        let modified = now.modified().map_err(wrap)?;
        if !now.is_file() || now.len() != file.length_bytes || modified != file.modified {
            let (found_bytes, expected_bytes) = (now.len(), file.length_bytes);
            return Err(VfsError::Changed { path: file.path.clone(), found_bytes, expected_bytes });
        }
        opened.read_exact_at(out, offset_bytes).map_err(wrap)
    }

    fn open_beneath(&self, path: &Path) -> io::Result<File> {
        const EACH: i32 = libc::O_CLOEXEC | libc::O_NOFOLLOW;
        // O_NONBLOCK: a FIFO that took the file's place must not hold a reader. Regular files do not know it.
        const LAST: i32 = EACH | libc::O_RDONLY | libc::O_NONBLOCK;
        const BETWEEN: i32 = EACH | libc::O_PATH | libc::O_DIRECTORY;
        let mut held: Option<File> = None;
        let mut components = path.components().peekable();
        while let Some(component) = components.next() {
            let Component::Normal(name) = component else {
                return Err(io::Error::from(io::ErrorKind::InvalidInput));
            };
            let name = CString::new(name.as_bytes())?;
            let flags = if components.peek().is_some() { BETWEEN } else { LAST };
            let directory = held.as_ref().unwrap_or(&self.directory).as_raw_fd();
            // SAFETY: `name` is a C string and `directory` an open descriptor, both alive during the call.
            let descriptor = unsafe { libc::openat(directory, name.as_ptr(), flags) };
            if descriptor < 0 {
                return Err(io::Error::last_os_error());
            }
            // SAFETY: the descriptor is new and nobody else's.
            held = Some(unsafe { File::from_raw_fd(descriptor) });
        }
        held.ok_or_else(|| io::Error::from(io::ErrorKind::IsADirectory))
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::symlink;

    use super::*;

    fn listed(source: &Source, path: &str) -> SourceFile {
        SourceFile::new(path.into(), &fs::metadata(source.root().join(path)).unwrap()).unwrap()
    }

    #[test]
    fn a_directory_swapped_for_a_link_to_the_outside_is_not_followed() {
        let outside = tempfile::tempdir().unwrap();
        let inside = tempfile::tempdir().unwrap();
        fs::create_dir(inside.path().join("a")).unwrap();
        fs::write(inside.path().join("a/file"), "ours").unwrap();
        let source = Source::open(inside.path()).unwrap();
        let file = listed(&source, "a/file");
        assert_eq!(source.read_whole(&file, 100).unwrap(), b"ours");

        fs::rename(inside.path().join("a/file"), outside.path().join("file")).unwrap(); // same length, same time
        fs::remove_dir(inside.path().join("a")).unwrap();
        symlink(outside.path(), inside.path().join("a")).unwrap();
        let error = source.read_whole(&file, 100).unwrap_err();
        assert!(matches!(error, VfsError::Read { .. }), "{error}");
    }

    #[test]
    fn a_file_that_grew_shrank_or_was_rewritten_is_refused() {
        let inside = tempfile::tempdir().unwrap();
        let path = inside.path().join("file");
        fs::write(&path, "0123").unwrap();
        let source = Source::open(inside.path()).unwrap();
        let file = listed(&source, "file");
        for content in ["012", "01234"] {
            fs::write(&path, content).unwrap();
            assert!(matches!(source.read_whole(&file, 100), Err(VfsError::Changed { .. })));
        }
        fs::write(&path, "4567").unwrap();
        File::options().write(true).open(&path).unwrap().set_modified(SystemTime::UNIX_EPOCH).unwrap();
        assert!(matches!(source.read_whole(&file, 100), Err(VfsError::Changed { .. })));
    }

    #[test]
    fn a_path_with_dots_is_not_walked() {
        let inside = tempfile::tempdir().unwrap();
        let source = Source::open(inside.path()).unwrap();
        for path in ["../x", "/etc/hostname", "a/../../x"] {
            assert!(source.open_beneath(Path::new(path)).is_err(), "{path}");
        }
    }
}
