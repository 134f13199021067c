//! From a hidden file to an archive: nothing that looks finished is there before it is.

use std::fs::Permissions;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use tempfile::NamedTempFile;

use super::super::report::PackReport;
use super::PackError;
use crate::archive::UNFINISHED_PREFIX;

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
            std::io::ErrorKind::AlreadyExists => PackError::Exists(out.clone()),
            _ => output(error.error),
        })?;
        std::fs::File::open(directory_of(&out)).and_then(|directory| directory.sync_all()).map_err(output)?;
        Ok(report)
    }
}

/// The hidden file beside `out`, without an archive's suffix: a run cut short leaves nothing that looks finished.
pub(super) fn create(out: &Path) -> Result<NamedTempFile, PackError> {
    tempfile::Builder::new()
        .prefix(UNFINISHED_PREFIX)
        .suffix(".partial")
        .permissions(Permissions::from_mode(0o666)) // less the umask, as any other new file
        .tempfile_in(directory_of(out))
        .map_err(|source| PackError::Output { path: out.to_owned(), source })
}

/// The directory that `path` lies in.
fn directory_of(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    }
}
