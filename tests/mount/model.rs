//! Random operations on a mount and on a plain directory with the same files give the same answers.

use std::fs::{self, File};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, symlink};
use std::path::Path;

use memmap2::MmapOptions;
use proptest::prelude::*;
use proptest::test_runner::TestRunner;

use crate::packed::{MODEL, Packed};
use crate::support::{c_path, checked, extended_attribute, require_fuse};

/// What operations are done on, from the root; some are not there.
const PATHS: [&str; 12] = [
    MODEL,
    "config.json",
    "README.md",
    "nested",
    "nested/deeper/notes.txt",
    "link.json",
    "linked",
    "linked/deeper/notes.txt",
    "naïve 模型 🦀.txt",
    "empty",
    "missing",
    "config.json/impossible",
];

/// How many descriptors an operation may name.
const HANDLES: usize = 4;

#[derive(Clone, Debug)]
enum Operation {
    Open { handle: usize, path: usize },
    Close { handle: usize },
    ReadAt { handle: usize, at: f64, length: usize },
    Read { handle: usize, length: usize },
    Seek { handle: usize, at: f64, whence: i32 },
    Map { handle: usize, at: f64, length: usize },
    Stat { path: usize },
    List { path: usize },
    ReadLink { path: usize },
    Access { path: usize, mode: i32 },
    Attribute { path: usize },
}

fn operation() -> impl Strategy<Value = Operation> {
    use Operation::*;
    let (handle, path) = (0..HANDLES, 0..PATHS.len());
    // Positions are shares of the file's length, and past its end.
    let (at, length) = (0.0..1.1_f64, prop_oneof![0..100_usize, 0..300_000_usize]);
    let whence = prop::sample::select(&[libc::SEEK_SET, libc::SEEK_END, libc::SEEK_DATA, libc::SEEK_HOLE][..]);
    let mode = prop::sample::select(&[libc::F_OK, libc::R_OK, libc::X_OK, libc::R_OK | libc::X_OK][..]);
    prop_oneof![
        3 => (handle.clone(), path.clone()).prop_map(|(handle, path)| Open { handle, path }),
        1 => handle.clone().prop_map(|handle| Close { handle }),
        6 => (handle.clone(), at.clone(), length.clone())
            .prop_map(|(handle, at, length)| ReadAt { handle, at, length }),
        3 => (handle.clone(), length.clone()).prop_map(|(handle, length)| Read { handle, length }),
        2 => (handle.clone(), at.clone(), whence).prop_map(|(handle, at, whence)| Seek { handle, at, whence }),
        3 => (handle, at, length).prop_map(|(handle, at, length)| Map { handle, at, length }),
        2 => path.clone().prop_map(|path| Stat { path }),
        1 => path.clone().prop_map(|path| List { path }),
        1 => path.clone().prop_map(|path| ReadLink { path }),
        1 => (path.clone(), mode).prop_map(|(path, mode)| Access { path, mode }),
        1 => path.prop_map(|path| Attribute { path }),
    ]
}

/// A directory, and what an operation sequence has open in it.
struct Side<'a> {
    root: &'a Path,
    handles: [Option<File>; HANDLES],
}

/// An answer that both sides must give alike: text, bytes, or an errno.
#[derive(Debug, PartialEq)]
enum Answer {
    Nothing,
    Number(i64),
    Text(String),
    Bytes(Vec<u8>),
    Errno(i32),
}

fn answer(result: io::Result<Answer>) -> Answer {
    result.unwrap_or_else(|error| Answer::Errno(error.raw_os_error().expect("the system said it")))
}

impl<'a> Side<'a> {
    fn new(root: &'a Path) -> Self {
        Self { root, handles: [const { None }; HANDLES] }
    }

    fn apply(&mut self, operation: &Operation) -> Answer {
        use Operation::*;
        let path = |path: usize| self.root.join(PATHS[path]);
        match *operation {
            Open { handle, path: number } => answer(File::open(path(number)).map(|file| {
                self.handles[handle] = Some(file);
                Answer::Nothing
            })),
            Close { handle } => {
                self.handles[handle] = None;
                Answer::Nothing
            }
            ReadAt { handle, at, length } => self.with_file(handle, |file, size| {
                let mut out = vec![0; length];
                let found = file.read_at(&mut out, position(at, size))?;
                out.truncate(found);
                Ok(Answer::Bytes(out))
            }),
            Read { handle, length } => self.with_file(handle, |mut file, _| {
                let mut out = vec![0; length];
                let found = io::Read::read(&mut file, &mut out)?;
                out.truncate(found);
                Ok(Answer::Bytes(out))
            }),
            Seek { handle, at, whence } => self.with_file(handle, |file, size| {
                let offset = position(at, size) as i64;
                let offset = if whence == libc::SEEK_END { offset - size as i64 } else { offset };
                // SAFETY: the call takes integers and an open descriptor.
                checked(unsafe { libc::lseek(file.as_raw_fd(), offset, whence) }).map(Answer::Number)
            }),
            Map { handle, at, length } => self.with_file(handle, |file, size| {
                let from = position(at, size).min(size);
                let length = length.min((size - from) as usize);
                if length == 0 || !file.metadata()?.is_file() {
                    return Ok(Answer::Nothing);
                }
                // SAFETY: nobody changes either file while the test runs.
                let map = unsafe { MmapOptions::new().offset(from).len(length).map(file) }?;
                Ok(Answer::Bytes(map.to_vec()))
            }),
            Stat { path: number } => answer(fs::metadata(path(number)).map(|metadata| {
                // A directory's length is its file system's affair, and modes are the mount's.
                let length = if metadata.is_file() { metadata.len() } else { 0 };
                Answer::Text(format!("{:?} {length}", metadata.file_type().is_dir()))
            })),
            List { path: number } => answer(fs::read_dir(path(number)).map(|entries| {
                let mut names: Vec<_> = entries.map(|entry| entry.expect("a name").file_name()).collect();
                names.sort();
                Answer::Text(format!("{names:?}"))
            })),
            ReadLink { path: number } => answer(match fs::read_link(path(number)) {
                // Links to files are shown as the files.
                Err(error) if error.raw_os_error() == Some(libc::EINVAL) => Ok(Answer::Nothing),
                Ok(_) if self.root.join(PATHS[number]).is_file() => Ok(Answer::Nothing),
                other => other.map(|target| Answer::Text(target.to_string_lossy().into_owned())),
            }),
            Access { path: number, mode } => {
                let name = c_path(&path(number));
                // SAFETY: the path is a C string.
                answer(checked(unsafe { libc::access(name.as_ptr(), mode) }).map(Answer::Number))
            }
            Attribute { path: number } => answer(extended_attribute(&path(number), "user.nothing").map(Answer::Text)),
        }
    }

    fn with_file(&self, handle: usize, work: impl FnOnce(&File, u64) -> io::Result<Answer>) -> Answer {
        let Some(file) = &self.handles[handle] else { return Answer::Nothing };
        let metadata = file.metadata().expect("it is open");
        if metadata.is_dir() {
            return Answer::Nothing; // positions in directories mean what their file system likes
        }
        answer(work(file, metadata.len()))
    }
}

/// A share of a file's length as a position in it, or past its end.
fn position(at: f64, size: u64) -> u64 {
    (at * size as f64) as u64
}

#[test]
fn random_operations_give_the_same_answers_as_on_a_plain_directory() {
    require_fuse!();
    let packed = Packed::bert(&[]);
    let (plain, mounted) = (packed.original(), packed.mounted());
    for root in [&plain, &packed.path("packed/bert")] {
        fs::create_dir_all(root.join("nested/deeper")).unwrap();
        fs::write(root.join("nested/deeper/notes.txt"), "notes\n".repeat(10_000)).unwrap();
        fs::write(root.join("naïve 模型 🦀.txt"), "text").unwrap();
        fs::write(root.join("empty"), "").unwrap();
        symlink("config.json", root.join("link.json")).unwrap();
        symlink("nested", root.join("linked")).unwrap();
    }
    packed.mount(&["--cache-size", "64K"]);
    for path in &PATHS[..10] {
        assert!(plain.join(path).exists() && mounted.join(path).exists(), "{path}");
    }
    let mut runner = TestRunner::new(ProptestConfig { cases: 128, ..ProptestConfig::default() });
    let compared = runner.run(&prop::collection::vec(operation(), 1..60), |operations| {
        let (mut plain, mut mounted) = (Side::new(&plain), Side::new(&mounted));
        for (number, operation) in operations.iter().enumerate() {
            let (expected, found) = (plain.apply(operation), mounted.apply(operation));
            prop_assert!(expected == found, "operation {}, {:?}: {:?} and {:?}", number, operation, expected, found);
        }
        Ok(())
    });
    compared.unwrap_or_else(|failure| panic!("{failure}"));
}
