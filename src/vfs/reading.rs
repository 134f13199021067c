//! Bytes of files: from the source, from a decoded file on disk, from memory, or by decoding.

use std::fs::File;
use std::ops::{Deref, DerefMut, Range};
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use super::loads::Answered;
use super::tree::{Archived, Content, Node};
use super::{Decoded, Inode, Keeper, Vfs, VfsError};

/// Bytes of a file that are in memory already: see [`Vfs::resident`].
#[derive(Debug)]
pub struct Resident(Held);

#[derive(Debug)]
enum Held {
    Header(Arc<Node>, Range<usize>),
    Decoded(Decoded),
}

impl Deref for Resident {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        match &self.0 {
            Held::Decoded(decoded) => decoded,
            Held::Header(node, range) => match &node.content {
                Content::Archived(archived) => &archived.file().header[range.clone()],
                _ => unreachable!("made for archived files only"),
            },
        }
    }
}

/// Bytes of a file: see [`Vfs::read`].
#[derive(Debug)]
pub enum Bytes<B> {
    /// As they were decoded ahead, or as others need them too.
    Decoded(Decoded),
    /// In a buffer of the caller's.
    Buffer(B),
}

impl<B: Deref<Target = [u8]>> Deref for Bytes<B> {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        match self {
            Self::Decoded(decoded) => decoded,
            Self::Buffer(buffer) => buffer,
        }
    }
}

impl Vfs {
    /// The bytes of an archived file from `offset_bytes` on, `length` of them or as many as it has, where they are in memory
    /// already, side by side: of its header, or decoded ahead for a reader that keeps them. `None` means that
    /// [`read`](Self::read) must be asked. Never blocks.
    pub fn resident(&self, inode: Inode, offset_bytes: u64, length: usize, keeper: Keeper) -> Option<Resident> {
        let node = self.node(inode).ok()?;
        let Content::Archived(archived) = &node.content else { return None };
        let from = usize::try_from(offset_bytes).ok()?;
        let to = from.checked_add(length)?;
        if archived.file().header.get(from..to).is_some() {
            self.note_answer(&node, archived, offset_bytes, length as u64, false);
            return Some(Resident(Held::Header(node, from..to)));
        }
        let left = node.attributes.length_bytes.checked_sub(offset_bytes)?;
        let length = usize::try_from(left).unwrap_or(usize::MAX).min(length);
        if archived.keeper(keeper) == Keeper::Cache || length == 0 {
            return None;
        }
        let decoded = archived.checkpoint().decoded_already(archived.index, offset_bytes, length)?;
        self.note_read(&node, archived, offset_bytes, length as u64, keeper);
        archived.count_read(offset_bytes, length as u64);
        self.note_answer(&node, archived, offset_bytes, length as u64, true);
        Some(Resident(Held::Decoded(decoded)))
    }

    /// Gives the bytes of a file from `offset_bytes` on, `length` of them or as many as it has; in a `buffer` of that length
    /// where they are not in memory side by side. Blocks while reading the source or decoding, and holds no lock meanwhile.
    ///
    /// A failure has one log line, with the path, the tensor and what was wrong, however often it is met.
    pub fn read<B: DerefMut<Target = [u8]>>(
        &self,
        inode: Inode,
        offset_bytes: u64,
        length: usize,
        keeper: Keeper,
        buffer: impl FnOnce(usize) -> B,
    ) -> Result<Bytes<B>, VfsError> {
        let node = self.node(inode)?;
        let left = node.attributes.length_bytes.saturating_sub(offset_bytes);
        let length = usize::try_from(left).unwrap_or(usize::MAX).min(length);
        if length == 0 {
            return Ok(Bytes::Buffer(buffer(0)));
        }
        let mut keeper = keeper;
        if let Content::Archived(archived) = &node.content
            && self.decoded_file_of(archived).is_none()
        {
            keeper = archived.keeper(keeper);
            self.note_read(&node, archived, offset_bytes, length as u64, keeper);
            if keeper == Keeper::Reader
                && let Some(decoded) = archived.checkpoint().decoded(archived.index, offset_bytes, length)
            {
                archived.count_read(offset_bytes, length as u64);
                self.note_answer(&node, archived, offset_bytes, length as u64, true);
                return Ok(Bytes::Decoded(decoded));
            }
        }
        let mut out = buffer(length);
        let result = self.read_content(&node, offset_bytes, keeper, &mut out);
        if let Err(error) = &result {
            self.log.error(&format!("read failed: {error}"));
        }
        result.map(|()| Bytes::Buffer(out))
    }

    fn read_content(&self, node: &Node, offset_bytes: u64, keeper: Keeper, out: &mut [u8]) -> Result<(), VfsError> {
        match &node.content {
            Content::Sidecar(file) => self.source.read_exact_at(file, offset_bytes, out),
            Content::Archived(archived) => {
                let is_decoded = !self.read_decoded_file(archived, offset_bytes, out);
                if is_decoded {
                    archived.read_exact_at(&node.path, offset_bytes, keeper, out)?;
                }
                self.note_answer(node, archived, offset_bytes, out.len() as u64, is_decoded);
                Ok(())
            }
            Content::Directory(_) => Err(VfsError::IsADirectory),
            Content::Link(_) => Err(VfsError::NotAFile),
        }
    }

    /// Tells those who look ahead of readers of a read that is about to be answered by decoding.
    fn note_read(&self, node: &Node, archived: &Archived, offset_bytes: u64, length_bytes: u64, keeper: Keeper) {
        let (checkpoint, file) = (archived.checkpoint(), archived.index);
        if let Some(file_keeper) = &self.file_keeper {
            file_keeper.note_read(checkpoint, file, offset_bytes + length_bytes);
        }
        if let Some(follower) = &self.follower {
            follower.follow(node.attributes.inode, checkpoint, file, offset_bytes, length_bytes, keeper);
        }
    }

    /// Tells the log's keeper of a read that is about to be answered.
    fn note_answer(&self, node: &Node, archived: &Archived, offset_bytes: u64, length_bytes: u64, is_decoded: bool) {
        let (path, file) = (node.path.as_path(), archived.file());
        let answered = Answered { path, file, offset_bytes, length_bytes, is_decoded };
        self.loads.answered(node.attributes.inode, &answered);
    }

    /// The file on disk with the bytes of an archived file, if it has been found or written before.
    fn decoded_file_of(&self, archived: &Archived) -> Option<Arc<File>> {
        self.file_keeper.as_ref()?.get(archived.file())
    }

    /// Fills `out` from the decoded file on disk; returns whether there is one and that went well.
    fn read_decoded_file(&self, archived: &Archived, offset_bytes: u64, out: &mut [u8]) -> bool {
        let Some(file) = self.decoded_file_of(archived) else { return false };
        match file.read_exact_at(out, offset_bytes) {
            Ok(()) => {
                archived.count_read(offset_bytes, out.len() as u64);
                true
            }
            Err(error) => {
                self.log.warn(&format!("decoded file of {}: {error}: decoded again", archived.file().name));
                false
            }
        }
    }
}
