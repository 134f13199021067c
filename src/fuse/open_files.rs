//! Account of who has which files open, for those who may have to go on with it after this process.
//!
//! A handle is named after the request that opened it, by the kernel's number. A request that the kernel hands out again
//! names the same handle, and what is noted twice changes nothing. So a process notes an open, and a close, before it
//! answers it, and may be killed at any point: the account has every handle that the kernel has, and no other for longer
//! than it takes a successor to answer what was left.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::str::FromStr;

use crate::vfs::Inode;

/// A file that somebody has open.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct OpenFile {
    /// Numbers of the requests that opened it.
    handles: BTreeSet<u64>,
    /// The kernel's name of the file on disk that it reads for all of them; `None` where it reads through its page cache.
    pub backing: Option<u32>,
}

/// What happened to a handle.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HandleChange {
    /// A handle is about to be given out.
    Opened {
        /// The file.
        inode: Inode,
        /// Number of the request.
        handle: u64,
        /// See [`OpenFile::backing`].
        backing: Option<u32>,
    },
    /// A handle was closed.
    Closed {
        /// The file.
        inode: Inode,
        /// Number of the request that opened it.
        handle: u64,
    },
}

/// Files by inode.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct OpenFiles(BTreeMap<Inode, OpenFile>);

impl OpenFiles {
    /// Takes a change down. Returns the kernel's name of a file on disk where nobody needs that any more.
    pub fn apply(&mut self, change: HandleChange) -> Option<u32> {
        match change {
            HandleChange::Opened { inode, handle, backing } => {
                let file = self.0.entry(inode).or_default();
                file.handles.insert(handle);
                file.backing = backing;
                None
            }
            HandleChange::Closed { inode, handle } => {
                let file = self.0.get_mut(&inode)?;
                file.handles.remove(&handle);
                if file.handles.is_empty() { self.0.remove(&inode)?.backing } else { None }
            }
        }
    }

    /// The file of `inode`, if anybody has it open.
    pub fn get(&self, inode: Inode) -> Option<&OpenFile> {
        self.0.get(&inode)
    }

    /// Whether the kernel reads any of the files by itself.
    pub fn has_passed(&self) -> bool {
        self.0.values().any(|file| file.backing.is_some())
    }

    /// What leads here from an empty account.
    pub fn changes(&self) -> impl Iterator<Item = HandleChange> {
        self.0.iter().flat_map(|(&inode, OpenFile { handles, backing })| {
            handles.iter().map(move |&handle| HandleChange::Opened { inode, handle, backing: *backing })
        })
    }
}

/// `opened INODE HANDLE`, `opened INODE HANDLE BACKING` or `closed INODE HANDLE`.
impl fmt::Display for HandleChange {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Opened { inode, handle, backing: None } => write!(formatter, "opened {} {handle}", inode.0),
            Self::Opened { inode, handle, backing: Some(name) } => {
                write!(formatter, "opened {} {handle} {name}", inode.0)
            }
            Self::Closed { inode, handle } => write!(formatter, "closed {} {handle}", inode.0),
        }
    }
}

/// The text is no [`HandleChange`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NotAChange;

impl FromStr for HandleChange {
    type Err = NotAChange;

    fn from_str(text: &str) -> Result<Self, NotAChange> {
        let number = |text: &str| text.parse().map_err(|_| NotAChange);
        let fields: Vec<&str> = text.split(' ').collect();
        match fields[..] {
            ["opened", inode, handle] => {
                Ok(Self::Opened { inode: Inode(number(inode)?), handle: number(handle)?, backing: None })
            }
            ["opened", inode, handle, name] => {
                let backing = Some(name.parse().map_err(|_| NotAChange)?);
                Ok(Self::Opened { inode: Inode(number(inode)?), handle: number(handle)?, backing })
            }
            ["closed", inode, handle] => Ok(Self::Closed { inode: Inode(number(inode)?), handle: number(handle)? }),
            _ => Err(NotAChange),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const INODE: Inode = Inode(7);

    fn opened(handle: u64, backing: Option<u32>) -> HandleChange {
        HandleChange::Opened { inode: INODE, handle, backing }
    }

    fn closed(handle: u64) -> HandleChange {
        HandleChange::Closed { inode: INODE, handle }
    }

    #[test]
    fn what_is_noted_twice_changes_nothing() {
        let mut account = OpenFiles::default();
        for change in [opened(2, Some(5)), opened(2, Some(5)), opened(4, Some(5)), closed(2), closed(2)] {
            assert_eq!(account.apply(change), None);
        }
        assert_eq!(account.get(INODE).unwrap().backing, Some(5));
        assert_eq!(account.apply(closed(4)), Some(5), "nobody needs it any more");
        assert_eq!((account.apply(closed(4)), account.get(INODE)), (None, None));
    }

    #[test]
    fn an_account_is_told_by_changes_and_changes_by_lines() {
        let mut account = OpenFiles::default();
        for (inode, handle, backing) in [(1, 2, None), (1, 4, None), (u64::MAX, 6, Some(u32::MAX))] {
            account.apply(HandleChange::Opened { inode: Inode(inode), handle, backing });
        }
        let mut told = OpenFiles::default();
        for change in account.changes() {
            told.apply(change.to_string().parse().unwrap());
        }
        assert_eq!(told, account);
        assert!(account.has_passed());
        assert_eq!(closed(9).to_string().parse(), Ok(closed(9)));
        for text in ["", "opened", "opened 1", "opened 1 x", "opened 1 2 -3", "opened 1 2 3 4", "closed 1", "moved 1 2"]
        {
            assert_eq!(text.parse::<HandleChange>(), Err(NotAChange), "{text:?}");
        }
    }
}
