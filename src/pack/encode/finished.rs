//! From a hidden file to an archive: nothing that looks finished is there before it is.

use std::fs::Permissions;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use tempfile::NamedTempFile;

use super::super::report::PackReport;
use super::PackError;
use crate::archive::UNFINISHED_PREFIX;

/// How the names of hidden files end.
const SUFFIX: &str = ".partial";

/// An archive that is written, compared and on the disk, under a hidden name. Dropped, it is gone.
pub struct Finished {
    temporary: NamedTempFile,
    out: PathBuf,
    report: PackReport,
}

impl Finished {
    pub(super) fn new(temporary: NamedTempFile, out: &Path, report: PackReport) -> Self {
        Self { temporary, out: out.to_owned(), report }
    }

    /// Gives the archive its name, which must not be taken unless `replace` is set.
    ///
    /// # Errors
    /// See [`PackError`]; after one, nothing is there that was not there before.
    pub fn publish(self, replace: bool) -> Result<PackReport, PackError> {
        let Self { temporary, out, report } = self;
        let output = |source| PackError::Output { path: out.clone(), source };
        let renamed = if replace { temporary.persist(&out) } else { temporary.persist_noclobber(&out) };
        renamed.map_err(|error| match error.error.kind() {
            io::ErrorKind::AlreadyExists => PackError::Exists(out.clone()),
            _ => output(system_error(error.error)),
        })?;
        std::fs::File::open(directory_of(&out)).and_then(|directory| directory.sync_all()).map_err(output)?;
        Ok(report)
    }
}

/// The hidden file beside `out`, without an archive's suffix: a run cut short leaves nothing that looks finished.
pub(super) fn create(out: &Path) -> Result<NamedTempFile, PackError> {
    name_leftovers(directory_of(out));
    tempfile::Builder::new()
        .prefix(UNFINISHED_PREFIX)
        .suffix(SUFFIX)
        .permissions(Permissions::from_mode(0o666)) // less the umask, as any other new file
        .tempfile_in(directory_of(out))
        .map_err(|error| PackError::Output { path: out.to_owned(), source: system_error(error) })
}

/// Warns of hidden files that a run left behind which could not clean up.
fn name_leftovers(directory: &Path) {
    for entry in std::fs::read_dir(directory).into_iter().flatten().flatten() {
        let name = entry.file_name();
        if name.as_bytes().starts_with(UNFINISHED_PREFIX.as_bytes()) && name.as_bytes().ends_with(SUFFIX.as_bytes()) {
            let path = entry.path();
            log::warn!("{}: of another run; unless that still runs, it may be deleted", path.display());
        }
    }
}

/// What the system said, without the hidden name that `tempfile` adds to it: the user gave another.
pub fn system_error(error: io::Error) -> io::Error {
    let said =
        error.get_ref().and_then(|wrapped| wrapped.source()).and_then(|source| source.downcast_ref::<io::Error>());
    match said.and_then(io::Error::raw_os_error) {
        Some(code) => io::Error::from_raw_os_error(code),
        None => error,
    }
}

/// The directory that `path` lies in.
fn directory_of(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_of_the_hidden_file_names_the_one_that_was_asked_for() {
        let directory = tempfile::tempdir().expect("a directory");
        let out = directory.path().join("missing/model.mcwc");
        let error = create(&out).expect_err("no such directory").to_string();
        assert!(error.starts_with(&format!("{}: ", out.display())), "{error}");
        assert!(!error.contains(UNFINISHED_PREFIX), "{error}");
    }
}
