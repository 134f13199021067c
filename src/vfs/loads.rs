//! Loads of files, in the log: that one begins, when its first byte past the header comes, and how it went.
//!
//! A load begins with the first request that comes here while somebody has the file open, and is done when every part of the
//! file has been asked for. What the kernel answers from its page cache is no load. However many requests it takes, a load
//! has three lines.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::Instant;

use log::info;

use super::Inode;
use crate::archive::ArchivedFile;

/// In how many pieces, or half as many, it is known what has been asked for; none is smaller than a page.
const PIECES: u64 = 4096;
const PAGE_BYTES: u64 = 4096;

/// Files that somebody has open.
#[derive(Debug, Default)]
pub(super) struct Loads(Mutex<HashMap<Inode, Load>>);

#[derive(Debug)]
struct Load {
    /// Known once a request has come.
    path: PathBuf,
    handles: u64,
    opened: Instant,
    /// When the first request came, if one has.
    begun: Option<Instant>,
    has_first_byte: bool,
    piece_bytes: u64,
    /// A bit for each piece of the file that was not asked for yet; none once all were.
    missing: Vec<u64>,
    read_bytes: u64,
    decoded_bytes: u64,
}

/// A request that has been answered.
#[derive(Clone, Copy, Debug)]
pub(super) struct Answered<'a> {
    pub(super) path: &'a Path,
    pub(super) file: &'a ArchivedFile,
    pub(super) offset_bytes: u64,
    pub(super) length_bytes: u64,
    /// Whether it came by decoding: the header and decoded files on disk do not.
    pub(super) is_decoded: bool,
}

impl Load {
    fn new() -> Self {
        Self {
            path: PathBuf::new(),
            handles: 0,
            opened: Instant::now(),
            begun: None,
            has_first_byte: false,
            piece_bytes: PAGE_BYTES,
            missing: Vec::new(),
            read_bytes: 0,
            decoded_bytes: 0,
        }
    }

    /// `N bytes in T ms, R GB/s, S % decoded`.
    fn summary(&self) -> String {
        let seconds = self.begun.map_or(0.0, |begun| begun.elapsed().as_secs_f64());
        let rate = self.read_bytes as f64 / 1e9 / seconds.max(1e-9);
        let decoded = 100.0 * self.decoded_bytes as f64 / self.read_bytes.max(1) as f64;
        format!("{} bytes in {:.1} ms, {rate:.2} GB/s, {decoded:.0} % decoded", self.read_bytes, seconds * 1e3)
    }

    fn begin(&mut self, path: &Path, file: &ArchivedFile) {
        info!("open: {}, {} bytes", path.display(), file.length_bytes);
        self.path = path.to_owned();
        self.begun = Some(Instant::now());
        self.piece_bytes = (file.length_bytes / PIECES).next_power_of_two().max(PAGE_BYTES);
        let pieces = file.length_bytes.div_ceil(self.piece_bytes);
        self.missing = vec![u64::MAX; pieces.div_ceil(64) as usize];
        if let Some(last) = self.missing.last_mut() {
            *last >>= (64 - pieces % 64) % 64;
        }
    }

    fn count(&mut self, answered: &Answered<'_>) {
        let Answered { path, file, offset_bytes, length_bytes, is_decoded } = *answered;
        let end = offset_bytes + length_bytes;
        if !self.has_first_byte && end > file.header.len() as u64 {
            self.has_first_byte = true;
            let at = offset_bytes.saturating_sub(file.header.len() as u64);
            let first = file.tensors.partition_point(|tensor| tensor.offset_bytes + tensor.length_bytes <= at);
            let name = file.tensors.get(first).map_or("no tensor", |tensor| tensor.name.as_str());
            let milliseconds = self.opened.elapsed().as_secs_f64() * 1e3;
            info!("first byte: {}, {milliseconds:.1} ms after open, of {name}", path.display());
        }
        self.read_bytes += length_bytes;
        self.decoded_bytes += if is_decoded { length_bytes } else { 0 };
        for piece in offset_bytes / self.piece_bytes..end.div_ceil(self.piece_bytes) {
            if let Some(word) = self.missing.get_mut((piece / 64) as usize) {
                *word &= !(1 << (piece % 64));
            }
        }
        if !self.is_done() && self.missing.iter().all(|word| *word == 0) {
            self.missing.clear();
            info!("loaded: {}, {}", path.display(), self.summary());
        }
    }

    fn is_done(&self) -> bool {
        self.missing.is_empty()
    }
}

impl Loads {
    /// Notes an open.
    pub(super) fn opened(&self, inode: Inode) {
        self.lock().entry(inode).or_insert_with(Load::new).handles += 1;
    }

    /// Notes a request. One for a file that a predecessor opened is taken for an open too.
    pub(super) fn answered(&self, inode: Inode, answered: &Answered<'_>) {
        let mut loads = self.lock();
        let load = loads.entry(inode).or_insert_with(Load::new);
        if load.begun.is_none() {
            load.begin(answered.path, answered.file);
        }
        load.count(answered);
    }

    /// Notes a close; the last one ends the load.
    pub(super) fn closed(&self, inode: Inode) {
        let mut loads = self.lock();
        let Some(load) = loads.get_mut(&inode) else { return };
        load.handles = load.handles.saturating_sub(1);
        if load.handles > 0 {
            return;
        }
        let load = loads.remove(&inode).expect("it was just there");
        drop(loads);
        if load.begun.is_some() && !load.is_done() {
            info!("closed before all was read: {}, {}", load.path.display(), load.summary());
        }
    }

    /// Nothing is decoded under this lock, so poison tells nothing.
    fn lock(&self) -> std::sync::MutexGuard<'_, HashMap<Inode, Load>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
