//! The directory on its own, with bytes that mean nothing.

use std::cell::Cell;
use std::convert::Infallible;
use std::os::unix::fs::FileExt;

use super::*;

/// `length` bytes and their digest; another seed, other bytes.
fn bytes(seed: u8, length: usize) -> (FileDigest, Vec<u8>) {
    let bytes: Vec<u8> = (0..length).map(|at| (at as u8).wrapping_mul(31) ^ seed).collect();
    (Sha256::digest(&bytes).into(), bytes)
}

fn keep(files: &DecodedFiles, digest: &FileDigest, bytes: &[u8]) -> Result<Arc<File>, DecodedFilesError> {
    files.keep(digest, bytes.len() as u64, |offset, out| {
        out.copy_from_slice(&bytes[offset as usize..][..out.len()]);
        Ok::<_, Infallible>(())
    })
}

/// Keeps what must not be asked for.
fn keep_as_it_is(files: &DecodedFiles, digest: &FileDigest, bytes: &[u8]) -> Arc<File> {
    let produce = |_, _: &mut [u8]| -> Result<(), Infallible> { panic!("it is there") };
    files.keep(digest, bytes.len() as u64, produce).unwrap()
}

fn content(file: &File) -> Vec<u8> {
    let mut bytes = vec![0; file.metadata().unwrap().len() as usize];
    file.read_exact_at(&mut bytes, 0).unwrap();
    bytes
}

fn names(directory: &Path) -> Vec<String> {
    let entries = fs::read_dir(directory).unwrap();
    let mut names: Vec<_> = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.retain(|name| name != ".lock");
    names.sort();
    names
}

#[test]
fn a_file_is_written_once_and_found_by_every_daemon_after_that() {
    let directory = tempfile::tempdir().unwrap();
    let (digest, bytes) = bytes(1, 2 * PIECE_BYTES + 77);
    let files = DecodedFiles::open(directory.path(), None).unwrap();
    assert!(files.get(&digest).is_none() && files.find(&digest).is_none());
    assert!(content(&keep(&files, &digest, &bytes).unwrap()) == bytes);
    assert!(content(&files.get(&digest).unwrap()) == bytes);
    let other = DecodedFiles::open(directory.path(), None).unwrap();
    assert!(other.get(&digest).is_none(), "it was not asked for yet");
    assert!(content(&other.find(&digest).unwrap()) == bytes);
    assert!(other.get(&digest).is_some());
    assert_eq!(names(directory.path()).len(), 2);
}

#[test]
fn a_file_that_was_touched_is_read_through_before_it_is_believed() {
    let directory = tempfile::tempdir().unwrap();
    let (digest, bytes) = bytes(1, 1000);
    keep(&DecodedFiles::open(directory.path(), None).unwrap(), &digest, &bytes).unwrap();
    let path = directory.path().join(hex(&digest) + FILE_SUFFIX);
    File::options().write(true).open(&path).unwrap().set_modified(SystemTime::UNIX_EPOCH).unwrap();
    let files = DecodedFiles::open(directory.path(), None).unwrap();
    assert!(files.find(&digest).is_none());
    assert!(content(&keep_as_it_is(&files, &digest, &bytes)) == bytes);
    assert!(DecodedFiles::open(directory.path(), None).unwrap().find(&digest).is_some(), "and then it is");
}

#[test]
fn a_file_with_other_bytes_is_written_anew() {
    let directory = tempfile::tempdir().unwrap();
    let (digest, bytes) = bytes(1, 1000);
    keep(&DecodedFiles::open(directory.path(), None).unwrap(), &digest, &bytes).unwrap();
    let path = directory.path().join(hex(&digest) + FILE_SUFFIX);
    for damaged in [&b"short"[..], &[0; 1000]] {
        fs::write(&path, damaged).unwrap();
        let files = DecodedFiles::open(directory.path(), None).unwrap();
        assert!(files.find(&digest).is_none());
        assert!(content(&keep(&files, &digest, &bytes).unwrap()) == bytes);
    }
}

#[test]
fn bytes_of_another_digest_or_none_leave_nothing() {
    let directory = tempfile::tempdir().unwrap();
    let files = DecodedFiles::open(directory.path(), None).unwrap();
    let ((digest, _), (_, other)) = (bytes(1, 1000), bytes(2, 1000));
    assert!(matches!(keep(&files, &digest, &other), Err(DecodedFilesError::Digest { .. })));
    let failed = files.keep(&digest, 1000, |_, _: &mut [u8]| Err("record 3: CRC-32C"));
    assert_eq!(failed.unwrap_err().to_string(), "record 3: CRC-32C");
    assert!(names(directory.path()).is_empty());
}

#[test]
fn the_file_used_least_recently_makes_room() {
    let directory = tempfile::tempdir().unwrap();
    let files = DecodedFiles::open(directory.path(), Some(2500)).unwrap();
    let all: Vec<_> = (0..4).map(|seed| bytes(seed, 1000)).collect();
    let use_at = |number: usize, seconds: u64| {
        let path = directory.path().join(hex(&all[number].0) + SEEN_SUFFIX);
        let time = SystemTime::UNIX_EPOCH + std::time::Duration::from_secs(seconds);
        File::options().write(true).open(path).unwrap().set_modified(time).unwrap();
    };
    for number in [0, 1] {
        keep(&files, &all[number].0, &all[number].1).unwrap();
    }
    use_at(0, 2000);
    use_at(1, 1000);
    let open = files.find(&all[1].0).unwrap(); // used just now
    keep(&files, &all[2].0, &all[2].1).unwrap();
    assert!(files.find(&all[0].0).is_none());
    assert!(files.find(&all[1].0).is_some());
    use_at(1, 3000);
    use_at(2, 4000);
    keep(&files, &all[3].0, &all[3].1).unwrap();
    assert!(files.find(&all[1].0).is_none());
    assert!(content(&open) == all[1].1, "who has it open reads on");
    let too_large = bytes(9, 2501);
    assert!(matches!(keep(&files, &too_large.0, &too_large.1), Err(DecodedFilesError::NoRoom { .. })));
    assert_eq!(names(directory.path()).len(), 4, "nothing was removed in vain");
}

#[test]
fn what_a_crash_left_is_removed_and_what_is_being_written_is_not() {
    let directory = tempfile::tempdir().unwrap();
    fs::write(directory.path().join(".partial-dead"), [0; 100]).unwrap();
    let files = DecodedFiles::open(directory.path(), Some(5000)).unwrap();
    assert!(names(directory.path()).is_empty());
    let ((digest, own), is_first) = (bytes(1, 1000), Cell::new(true));
    let kept = files.keep(&digest, 1000, |offset, out: &mut [u8]| {
        // Meanwhile another daemon starts, and needs more room than there is.
        if is_first.replace(false) {
            let other = DecodedFiles::open(directory.path(), Some(2000)).unwrap();
            let (digest, bytes) = bytes(2, 1500);
            assert!(matches!(keep(&other, &digest, &bytes), Err(DecodedFilesError::NoRoom { .. })));
        }
        out.copy_from_slice(&own[offset as usize..][..out.len()]);
        Ok::<_, Infallible>(())
    });
    assert!(content(&kept.unwrap()) == own);
}

#[test]
fn two_writers_of_one_file_both_have_it() {
    let directory = tempfile::tempdir().unwrap();
    let (digest, bytes) = bytes(1, 100_000);
    std::thread::scope(|scope| {
        for _ in 0..8 {
            scope.spawn(|| {
                let files = DecodedFiles::open(directory.path(), None).unwrap();
                assert!(content(&keep(&files, &digest, &bytes).unwrap()) == bytes);
            });
        }
    });
    assert_eq!(names(directory.path()).len(), 2);
}

#[test]
fn a_directory_that_others_may_write_to_is_refused() {
    use std::os::unix::fs::PermissionsExt;
    let directory = tempfile::tempdir().unwrap();
    for (mode, is_refused) in [(0o700, false), (0o755, false), (0o775, true), (0o707, true), (0o1777, true)] {
        fs::set_permissions(directory.path(), fs::Permissions::from_mode(mode)).unwrap();
        let opened = DecodedFiles::open(directory.path(), Some(100));
        assert_eq!(matches!(opened, Err(DecodedFilesError::NotOurs { .. })), is_refused, "{mode:o}");
    }
    // SAFETY: the call has no preconditions and cannot fail.
    if unsafe { libc::geteuid() } == 0 {
        fs::set_permissions(directory.path(), fs::Permissions::from_mode(0o700)).unwrap();
        std::os::unix::fs::chown(directory.path(), Some(12_345), None).unwrap();
        let error = DecodedFiles::open(directory.path(), Some(100)).unwrap_err().to_string();
        assert!(error.contains("owner 12345, mode 700"), "{error}");
    }
}
