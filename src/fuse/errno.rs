//! The errno table: what a reader is told for each thing that can go wrong.

use std::io;

use fuser::Errno;

use crate::vfs::VfsError;

/// The errno of a failed request.
pub(super) fn errno(error: &VfsError) -> Errno {
    match error {
        VfsError::NoSuchName => Errno::ENOENT,
        VfsError::NoSuchAttribute => Errno::ENODATA,
        VfsError::NotADirectory => Errno::ENOTDIR,
        VfsError::IsADirectory => Errno::EISDIR,
        VfsError::NotAFile | VfsError::NotALink => Errno::EINVAL,
        // The kernel looks the path up again and finds what is there now.
        VfsError::NoSuchInode(_) | VfsError::Changed { .. } => Errno::ESTALE,
        VfsError::Read { source, .. } | VfsError::Source { source, .. } => of_source(source),
        VfsError::Decode { .. } => Errno::EIO,
    }
}

/// The errno of a failed access to the source.
fn of_source(error: &io::Error) -> Errno {
    match error.raw_os_error() {
        // The file is gone or was swapped: true of the source's name, but no answer to a read.
        Some(libc::ENOENT | libc::ENOTDIR | libc::ELOOP) => Errno::ESTALE,
        Some(code @ (libc::EACCES | libc::EPERM | libc::ENOMEM | libc::EMFILE | libc::ENFILE)) => Errno::from_i32(code),
        _ => Errno::EIO,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_vanished_or_swapped_source_is_stale_and_a_failing_one_an_io_error() {
        for (code, expected) in [
            (libc::ENOENT, Errno::ESTALE),
            (libc::ELOOP, Errno::ESTALE),
            (libc::EACCES, Errno::EACCES),
            (libc::EIO, Errno::EIO),
            (libc::ENXIO, Errno::EIO),
        ] {
            let source = io::Error::from_raw_os_error(code);
            assert_eq!(errno(&VfsError::Read { path: "x".into(), source }).code(), expected.code());
        }
        assert_eq!(of_source(&io::ErrorKind::UnexpectedEof.into()).code(), libc::EIO);
    }
}
