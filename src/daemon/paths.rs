//! Whether a source and a mount point can go together.

use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use super::{DaemonError, process};
use crate::fuse::{self, FuseError, MountEntry};
use crate::vfs::VfsError;

/// How long a mount whose daemon is gone may take to be seen dead.
const DYING: Duration = Duration::from_secs(2);

/// Refuses what would deadlock or confuse: a mount point in, around or equal to the source, and one already in use by us.
/// Clears what a daemon that was killed left there. Returns both paths, absolute and without symbolic links.
pub(super) fn check(source: &Path, mountpoint: &Path) -> Result<(PathBuf, PathBuf), DaemonError> {
    clear_dead(mountpoint)?;
    let source = source
        .canonicalize()
        .map_err(|error| DaemonError::Source(VfsError::Source { path: source.to_owned(), source: error }))?;
    let mountpoint = mountpoint
        .canonicalize()
        .map_err(|source| DaemonError::Fuse(FuseError::MountPoint { path: mountpoint.to_owned(), source }))?;
    if source.starts_with(&mountpoint) || mountpoint.starts_with(&source) {
        return Err(DaemonError::Overlap { source_path: source, mountpoint });
    }
    let is_ours = |mountpoint: &Path| fuse::mount_at(mountpoint).filter(MountEntry::is_ours);
    // A supervisor that was killed a moment ago leaves a worker that is about to notice.
    let started = Instant::now();
    while is_ours(&mountpoint).is_some() && process::daemon_of(&mountpoint).is_none() && started.elapsed() < DYING {
        clear_dead(&mountpoint)?;
        thread::sleep(Duration::from_millis(10));
    }
    match is_ours(&mountpoint) {
        Some(entry) => Err(DaemonError::AlreadyMounted { mountpoint, what: entry.source }),
        _ => Ok((source, mountpoint)),
    }
}

/// Refuses a directory, there or not yet, that lies in the source or at the mount point. Both are absolute and without
/// symbolic links.
pub(super) fn check_outside(directory: &Path, source: &Path, mountpoint: &Path) -> Result<(), DaemonError> {
    let absolute = std::path::absolute(directory).unwrap_or_else(|_| directory.to_owned());
    let existing = absolute.ancestors().find_map(|ancestor| ancestor.canonicalize().ok().map(|real| (ancestor, real)));
    let real = match existing {
        Some((ancestor, real)) => real.join(absolute.strip_prefix(ancestor).unwrap_or(Path::new(""))),
        None => absolute,
    };
    if real.starts_with(source) || real.starts_with(mountpoint) {
        return Err(DaemonError::CacheInside(directory.to_owned()));
    }
    Ok(())
}

fn clear_dead(mountpoint: &Path) -> Result<(), DaemonError> {
    while fuse::is_dead(mountpoint) {
        if !fuse::clear_if_dead(mountpoint) {
            return Err(FuseError::DeadMount { path: mountpoint.to_owned() }.into());
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::symlink;

    use super::*;

    #[test]
    fn a_mount_point_in_around_or_equal_to_the_source_is_refused() {
        let directory = tempfile::tempdir().unwrap();
        let path = |name: &str| directory.path().join(name);
        for name in ["models", "models/inner", "models-mounted"] {
            fs::create_dir(path(name)).unwrap();
        }
        symlink(path("models/inner"), path("link")).unwrap();
        for (source, mountpoint) in
            [("models", "models"), ("models", "models/inner"), ("models/inner", "models"), ("models", "link")]
        {
            let result = check(&path(source), &path(mountpoint));
            assert!(matches!(result, Err(DaemonError::Overlap { .. })), "{source} at {mountpoint}");
        }
        check(&path("models"), &path("models-mounted")).unwrap();
    }

    #[test]
    fn decoded_files_inside_the_source_or_the_mount_are_refused() {
        let directory = tempfile::tempdir().unwrap();
        let root = directory.path().canonicalize().unwrap();
        let (source, mountpoint) = (root.join("models"), root.join("mnt"));
        fs::create_dir(&source).unwrap();
        fs::create_dir(&mountpoint).unwrap();
        symlink(&mountpoint, root.join("link")).unwrap();
        for inside in ["models", "models/new", "mnt/a/b", "link/cache"] {
            let result = check_outside(&root.join(inside), &source, &mountpoint);
            assert!(matches!(result, Err(DaemonError::CacheInside(_))), "{inside}");
        }
        check_outside(&root.join("models-decoded"), &source, &mountpoint).unwrap();
    }

    #[test]
    fn a_missing_source_or_mount_point_is_named() {
        let directory = tempfile::tempdir().unwrap();
        let missing = directory.path().join("missing");
        assert!(check(&missing, directory.path()).unwrap_err().to_string().starts_with("source "));
        assert!(check(directory.path(), &missing).unwrap_err().to_string().starts_with("mount point "));
    }
}
