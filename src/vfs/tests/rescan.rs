//! A source that changes under the file system.

use std::fs::Permissions;
use std::os::unix::fs::PermissionsExt;
use std::sync::atomic::{AtomicU64, Ordering};

use super::*;

/// Puts a file in the place of another at once, as everybody should.
fn replace(source: &Path, name: &str, content: &str) {
    fs::write(source.join(".new"), content).unwrap();
    fs::rename(source.join(".new"), source.join(name)).unwrap();
}

fn changed_names(changes: &Changes) -> Vec<&str> {
    changes.names.iter().map(|(_, name)| name.to_str().unwrap()).collect()
}

fn read(vfs: &Vfs, inode: Inode) -> Vec<u8> {
    let mut out = vec![0; vfs.attributes(inode).unwrap().length_bytes as usize];
    assert_eq!(fill(vfs, inode, 0, &mut out).unwrap(), out.len());
    out
}

#[test]
fn new_changed_and_removed_archives_appear_change_and_vanish() {
    let (source, vfs) = tree(&[("a/old.mcwc", "old=1"), ("a/changing.mcwc", "model=first"), ("b/config.json", "{}")]);
    assert!(vfs.rescan().unwrap().is_empty());
    fs::remove_file(source.path().join("a/old.mcwc")).unwrap();
    replace(source.path(), "a/changing.mcwc", "model=second");
    fs::write(source.path().join("a/new.mcwc"), "new=3").unwrap();
    fs::remove_dir_all(source.path().join("b")).unwrap();
    let changes = vfs.rescan().unwrap();
    let mut names_changed = changed_names(&changes);
    names_changed.sort_unstable();
    assert_eq!(names_changed, ["b", "model", "new", "old"]);
    assert!(changes.directories.contains(&Inode::ROOT));
    assert!(changes.directories.contains(&find(&vfs, "a").unwrap().inode));
    assert_eq!(names(&vfs, "a"), ["model", "new"]);
    assert_eq!(content(&vfs, "a/model").unwrap(), b"HEADERsecond");
    assert_eq!(vfs.totals().archives, 2);
    assert!(vfs.rescan().unwrap().is_empty());
}

#[test]
fn who_has_a_file_open_reads_its_old_bytes_until_it_is_released() {
    let (source, vfs) = tree(&[("m.mcwc", "model=first"), ("gone.mcwc", "gone=1")]);
    let (old, gone) = (find(&vfs, "model").unwrap().inode, find(&vfs, "gone").unwrap().inode);
    replace(source.path(), "m.mcwc", "model=second");
    fs::remove_file(source.path().join("gone.mcwc")).unwrap();
    vfs.rescan().unwrap();
    let new = find(&vfs, "model").unwrap().inode;
    assert_ne!(old, new);
    assert_eq!(read(&vfs, old), b"HEADERfirst");
    assert_eq!(read(&vfs, gone), b"HEADER1");
    assert_eq!(read(&vfs, new), b"HEADERsecond");
    let mut retired = vfs.retired();
    retired.sort_unstable();
    let mut expected = [old, gone];
    expected.sort_unstable();
    assert_eq!(retired, expected);
    vfs.release(old);
    assert!(matches!(fill(&vfs, old, 0, &mut [0]), Err(VfsError::NoSuchInode(_))));
    replace(source.path(), "gone.mcwc", "gone=1");
    vfs.rescan().unwrap();
    assert_eq!(find(&vfs, "gone").unwrap().inode, gone, "the same content has the same number");
    assert!(vfs.retired().is_empty());
}

#[test]
fn an_archive_that_did_not_change_is_not_opened_again() {
    let opened = Arc::new(AtomicU64::new(0));
    let source = tempfile::tempdir().unwrap();
    for name in ["a.mcwc", "b.mcwc", "c.mcwc"] {
        fs::write(source.path().join(name), format!("{name}=1")).unwrap();
    }
    fs::write(source.path().join("c.mcwc"), "broken").unwrap();
    let counted = Arc::clone(&opened);
    let vfs = Vfs::open(source.path(), move |path| {
        counted.fetch_add(1, Ordering::Relaxed);
        Fake::open(path)
    });
    let vfs = vfs.unwrap();
    assert_eq!(opened.load(Ordering::Relaxed), 3);
    fs::write(source.path().join("config.json"), "{}").unwrap();
    assert_eq!(changed_names(&vfs.rescan().unwrap()), ["config.json"]);
    assert_eq!(opened.load(Ordering::Relaxed), 3);
    replace(source.path(), "c.mcwc", "sound=1");
    assert_eq!(changed_names(&vfs.rescan().unwrap()), ["sound"]);
    assert_eq!(opened.load(Ordering::Relaxed), 4);
    assert_eq!(vfs.totals().refused_archives, 0);
}

#[test]
fn an_archive_rewritten_with_its_old_length_and_time_is_seen() {
    let (source, vfs) = tree(&[("m.mcwc", "model=1")]);
    let path = source.path().join("m.mcwc");
    let modified = fs::metadata(&path).unwrap().modified().unwrap();
    fs::write(&path, "model=2").unwrap();
    fs::File::options().write(true).open(&path).unwrap().set_modified(modified).unwrap();
    assert_eq!(changed_names(&vfs.rescan().unwrap()), ["model"]);
    assert_eq!(content(&vfs, "model").unwrap(), b"HEADER2");
}

#[test]
fn an_archive_that_could_not_be_read_is_tried_again_and_a_damaged_one_is_not() {
    let tries = Arc::new(AtomicU64::new(0));
    let source = tempfile::tempdir().unwrap();
    fs::write(source.path().join("m.mcwc"), "model=1").unwrap();
    let counted = Arc::clone(&tries);
    let vfs = Vfs::open(source.path(), move |path| match counted.fetch_add(1, Ordering::Relaxed) {
        0 => {
            let source = std::io::Error::from_raw_os_error(libc::EMFILE);
            Err(crate::archive::ArchiveError::Io { path: path.to_owned(), source }.into())
        }
        _ => Fake::open(path),
    });
    let vfs = vfs.unwrap();
    assert_eq!(vfs.totals().refused_archives, 1);
    assert_eq!(changed_names(&vfs.rescan().unwrap()), ["model"]);
    assert!(vfs.rescan().unwrap().is_empty());
    assert_eq!(tries.load(Ordering::Relaxed), 2);
}

#[test]
fn touching_an_archive_changes_its_time_and_nothing_else() {
    let (source, vfs) = tree(&[("m.mcwc", "model=1")]);
    let before = find(&vfs, "model").unwrap();
    let file = fs::File::options().write(true).open(source.path().join("m.mcwc")).unwrap();
    file.set_modified(SystemTime::UNIX_EPOCH).unwrap();
    let changes = vfs.rescan().unwrap();
    assert_eq!((changed_names(&changes), changes.attributes.as_slice()), (vec![], &[before.inode][..]));
    let after = find(&vfs, "model").unwrap();
    assert_eq!(after, Attributes { modified: SystemTime::UNIX_EPOCH, ..before });
    assert!(vfs.retired().is_empty());
}

#[test]
fn a_source_or_directory_that_cannot_be_listed_stays_as_it_was() {
    let (source, vfs) = tree(&[("a/m.mcwc", "model=1"), ("b/config.json", "{}")]);
    // SAFETY: the call has no preconditions and cannot fail.
    if unsafe { libc::geteuid() } != 0 {
        fs::set_permissions(source.path().join("a"), Permissions::from_mode(0o000)).unwrap();
        assert!(vfs.rescan().unwrap().is_empty());
        fs::set_permissions(source.path().join("a"), Permissions::from_mode(0o755)).unwrap();
    }
    let away = source.path().with_extension("away");
    fs::rename(source.path(), &away).unwrap();
    assert!(matches!(vfs.rescan(), Err(VfsError::Source { .. })));
    assert_eq!(names(&vfs, "a"), ["model"]);
    fs::rename(&away, source.path()).unwrap();
    assert!(vfs.rescan().unwrap().is_empty());
}

#[test]
fn what_is_asked_of_an_archive_is_counted() {
    let (_source, vfs) = tree(&[("a/m.mcwc", "model=12345"), ("config.json", "{}")]);
    let model = find(&vfs, "a/model").unwrap().inode;
    vfs.open_file(model, Keeper::Reader).unwrap();
    fill(&vfs, model, 6, &mut [0; 100]).unwrap();
    let [status] = vfs.archives().try_into().unwrap();
    let expected = ArchiveStatus {
        path: "a/m.mcwc".into(),
        length_bytes: 11,
        stored_bytes: 11,
        opens: 1,
        read_bytes: 5,
        read_share: 1.0,
    };
    assert_eq!(status, expected);
}
