//! Mounts over checkpoints in memory, and the system calls that `std` has no name for.

use std::collections::BTreeMap;
use std::ffi::CString;
use std::fs::{self, File};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use mcwcfs::archive::ArchivedFile;
use mcwcfs::fuse::{self, MountOptions, Mounted};
use mcwcfs::tensor::{Dtype, TensorInfo};
use mcwcfs::vfs::{BoxError, Checkpoint, Keeper, Vfs};

use crate::common::Random;

/// Leaves the test where there is no FUSE, saying so.
macro_rules! require_fuse {
    () => {
        if !std::path::Path::new("/dev/fuse").exists() {
            eprintln!("not tested: /dev/fuse is missing here");
            return;
        }
    };
}
pub(crate) use require_fuse;

/// Called before each decode, with the file's name and the offset.
type BeforeDecode = dyn Fn(&str, u64) -> Result<(), BoxError> + Send + Sync;

/// The files of an archive, in memory.
pub struct InMemory {
    files: Vec<ArchivedFile>,
    bytes: Vec<Vec<u8>>,
    before_decode: Box<BeforeDecode>,
    pub decodes: Arc<AtomicU64>,
    /// What was asked for ahead: file, offset, length.
    pub ahead: Arc<Mutex<Vec<(usize, u64, u64)>>>,
}

impl std::fmt::Debug for InMemory {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.debug_struct("InMemory").field("files", &self.files).finish_non_exhaustive()
    }
}

impl InMemory {
    /// One file per name, each with a header of 24 bytes and `data_bytes` of noise.
    pub fn new(names: &[&str], data_bytes: usize) -> Self {
        let mut checkpoint = Self {
            files: Vec::new(),
            bytes: Vec::new(),
            before_decode: Box::new(|_, _| Ok(())),
            decodes: Arc::default(),
            ahead: Arc::default(),
        };
        for (index, name) in names.iter().enumerate() {
            let header = b"\x10\0\0\0\0\0\0\0{\"header\": true}".to_vec();
            let bytes = [header.clone(), Random::new(index as u64).bytes(data_bytes)].concat();
            let length_bytes = data_bytes as u64;
            checkpoint.files.push(ArchivedFile {
                name: (*name).to_owned(),
                header,
                tensors: vec![TensorInfo {
                    name: "weight".to_owned(),
                    dtype: Dtype::U8,
                    shape: vec![length_bytes],
                    offset_bytes: 0,
                    length_bytes,
                }],
                length_bytes: bytes.len() as u64,
                decoded_sha256: [0xab; 32],
                source_sha256: [0xcd; 32],
            });
            checkpoint.bytes.push(bytes);
        }
        checkpoint
    }

    /// One file of these bytes.
    pub fn file(name: &str, bytes: Vec<u8>) -> Self {
        let mut checkpoint = Self::new(&[name], bytes.len() - 24);
        checkpoint.files[0].header = bytes[..24].to_vec();
        checkpoint.bytes[0] = bytes;
        checkpoint
    }

    pub fn before_decode(mut self, before: impl Fn(&str, u64) -> Result<(), BoxError> + Send + Sync + 'static) -> Self {
        self.before_decode = Box::new(before);
        self
    }

    pub fn bytes(&self, index: usize) -> Vec<u8> {
        self.bytes[index].clone()
    }
}

impl Checkpoint for InMemory {
    fn content_id(&self) -> [u8; 32] {
        [self.bytes.len() as u8; 32]
    }

    fn stored_bytes(&self) -> u64 {
        1000
    }

    fn parameters(&self) -> u64 {
        2000
    }

    fn is_lossy(&self) -> bool {
        true
    }

    fn files(&self) -> &[ArchivedFile] {
        &self.files
    }

    fn read(&self, file: usize, offset_bytes: u64, _: Keeper, out: &mut [u8]) -> Result<usize, BoxError> {
        self.decodes.fetch_add(1, Ordering::Relaxed);
        (self.before_decode)(&self.files[file].name, offset_bytes)?;
        out.copy_from_slice(&self.bytes[file][offset_bytes as usize..][..out.len()]);
        Ok(out.len())
    }

    fn decode_ahead(&self, file: usize, offset_bytes: u64, length_bytes: u64, _: Keeper) {
        self.ahead.lock().unwrap().push((file, offset_bytes, length_bytes));
    }
}

/// A mount in this process that comes down with the value, also when a test fails.
pub struct TestMount {
    mounted: Option<Mounted>,
    path: PathBuf,
    source: PathBuf,
    _directory: tempfile::TempDir,
}

impl TestMount {
    /// Mounts a source with one archive `model.mcwc`, beside it `config.json`.
    pub fn of(checkpoint: InMemory) -> Self {
        Self::with(BTreeMap::from([("model.mcwc", checkpoint)]), &MountOptions::default(), |source| {
            fs::write(source.join("config.json"), "{\"model_type\": \"bert\"}").unwrap();
        })
    }

    /// Mounts a source with these archives and whatever `fill` puts beside them. An archive that is not in `archives`
    /// does not open.
    pub fn with(archives: BTreeMap<&'static str, InMemory>, options: &MountOptions, fill: impl FnOnce(&Path)) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let (source, path) = (directory.path().join("source"), directory.path().join("mnt"));
        for path in [&source, &path] {
            fs::create_dir(path).unwrap();
        }
        for name in archives.keys() {
            fs::create_dir_all(source.join(name).parent().unwrap()).unwrap();
            fs::write(source.join(name), "in memory").unwrap();
        }
        fill(&source);
        let root = source.canonicalize().unwrap();
        let archives: BTreeMap<PathBuf, Arc<InMemory>> =
            archives.into_iter().map(|(name, checkpoint)| (root.join(name), Arc::new(checkpoint))).collect();
        let vfs = Vfs::open(&source, move |path| {
            archives.get(path).cloned().map(Shared).ok_or_else(|| "preamble: magic: expected MCWC".into())
        });
        let mounted = fuse::mount(vfs.unwrap(), &path, options).unwrap();
        Self { mounted: Some(mounted), path, source, _directory: directory }
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.path.join(name)
    }

    pub fn source(&self, name: &str) -> PathBuf {
        self.source.join(name)
    }

    pub fn open(&self, name: &str) -> File {
        File::open(self.path(name)).unwrap()
    }
}

impl Drop for TestMount {
    fn drop(&mut self) {
        // Lazily: a failing test may still have files open.
        let unmounted = fuse::unmount(&self.path, true);
        let ended = self.mounted.take().expect("taken here only").wait();
        if !std::thread::panicking() {
            unmounted.unwrap();
            ended.unwrap();
        }
    }
}

/// A checkpoint that several openings share.
#[derive(Debug)]
struct Shared(Arc<InMemory>);

impl Checkpoint for Shared {
    fn content_id(&self) -> [u8; 32] {
        self.0.content_id()
    }

    fn stored_bytes(&self) -> u64 {
        self.0.stored_bytes()
    }

    fn parameters(&self) -> u64 {
        self.0.parameters()
    }

    fn is_lossy(&self) -> bool {
        self.0.is_lossy()
    }

    fn files(&self) -> &[ArchivedFile] {
        self.0.files()
    }

    fn read(&self, file: usize, offset_bytes: u64, keeper: Keeper, out: &mut [u8]) -> Result<usize, BoxError> {
        self.0.read(file, offset_bytes, keeper, out)
    }

    fn decode_ahead(&self, file: usize, offset_bytes: u64, length_bytes: u64, keeper: Keeper) {
        self.0.decode_ahead(file, offset_bytes, length_bytes, keeper);
    }
}

/// The errno of a failed system call.
pub fn errno<T: std::fmt::Debug>(result: io::Result<T>) -> i32 {
    result.unwrap_err().raw_os_error().expect("the system said it")
}

/// Turns the C way of failing into Rust's.
pub fn checked(result: impl Into<i64>) -> io::Result<i64> {
    let result = result.into();
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

pub fn c_path(path: &Path) -> CString {
    CString::new(path.as_os_str().as_bytes()).unwrap()
}

/// The value of an extended attribute.
pub fn extended_attribute(path: &Path, name: &str) -> io::Result<String> {
    let (path, name) = (c_path(path), CString::new(name).unwrap());
    let mut value = [0_u8; 256];
    // SAFETY: both names are C strings and `value` has the length stated.
    let length = unsafe { libc::getxattr(path.as_ptr(), name.as_ptr(), value.as_mut_ptr().cast(), value.len()) };
    let length = checked(length as i64)? as usize;
    Ok(String::from_utf8(value[..length].to_vec()).unwrap())
}

/// Where the next data or hole is, from `offset` on.
pub fn seek(file: &File, offset: i64, whence: i32) -> io::Result<i64> {
    // SAFETY: the call takes integers and an open descriptor.
    checked(unsafe { libc::lseek(file.as_raw_fd(), offset, whence) })
}

/// The names in a directory, sorted.
pub fn names(directory: &Path) -> Vec<String> {
    let entries = fs::read_dir(directory).unwrap();
    let mut names: Vec<_> = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}
