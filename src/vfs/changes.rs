//! What differs between two trees: what the kernel must be told after the source changed.

use std::cmp::Ordering;
use std::collections::HashMap;
use std::ffi::OsString;
use std::sync::Arc;

use super::tree::{Content, Node, Tree};
use super::{DirectoryEntry, Inode, Kind};

/// What a rescan changed. Empty where nothing did.
#[derive(Debug, Default)]
pub struct Changes {
    /// Names that mean something else now, something at last, or nothing any more; each with its directory.
    pub names: Vec<(Inode, OsString)>,
    /// Directories that list something else now.
    pub directories: Vec<Inode>,
    /// Inodes whose attributes changed and whose bytes did not.
    pub attributes: Vec<Inode>,
}

impl Changes {
    /// Whether nothing changed.
    pub fn is_empty(&self) -> bool {
        self.names.is_empty() && self.directories.is_empty() && self.attributes.is_empty()
    }

    pub(super) fn everything(tree: &Tree) -> Self {
        let mut changes = Self::default();
        for node in tree.nodes() {
            let inode = node.attributes.inode;
            if let Content::Directory(directory) = &node.content {
                changes.directories.push(inode);
                changes.names.extend(directory.entries.iter().map(|entry| (inode, entry.name.clone())));
            }
        }
        changes
    }

    pub(super) fn between(old: &Tree, new: &Tree) -> Self {
        let mut changes = Self::default();
        for node in old.nodes() {
            let inode = node.attributes.inode;
            // What is gone altogether went with its name, of which its directory tells.
            let Some(now) = new.node(inode) else { continue };
            if let (Content::Directory(old), Content::Directory(new)) = (&node.content, &now.content) {
                let known = changes.names.len();
                names_between(inode, &old.entries, &new.entries, &mut changes.names);
                if changes.names.len() > known {
                    changes.directories.push(inode);
                }
            }
            if node.attributes != now.attributes {
                changes.attributes.push(inode);
            }
        }
        changes
    }
}

/// Files of `old` that `new` does not have: somebody may have them open.
pub(super) fn retired(old: &Tree, new: &Tree) -> HashMap<Inode, Arc<Node>> {
    let gone = old.nodes().filter(|node| new.node(node.attributes.inode).is_none());
    let files = gone.filter(|node| node.attributes.kind == Kind::File);
    files.map(|node| (node.attributes.inode, Arc::clone(node))).collect()
}

/// Both lists are sorted by name.
fn names_between(
    directory: Inode,
    old: &[DirectoryEntry],
    new: &[DirectoryEntry],
    changed: &mut Vec<(Inode, OsString)>,
) {
    let (mut old, mut new) = (old.iter().peekable(), new.iter().peekable());
    loop {
        let order = match (old.peek(), new.peek()) {
            (None, None) => return,
            (Some(_), None) => Ordering::Less,
            (None, Some(_)) => Ordering::Greater,
            (Some(before), Some(now)) => before.name.cmp(&now.name),
        };
        let before = if order.is_le() { old.next() } else { None };
        let now = if order.is_ge() { new.next() } else { None };
        if before.map(|entry| entry.inode) != now.map(|entry| entry.inode) {
            let entry = before.or(now).expect("one of them was there");
            changed.push((directory, entry.name.clone()));
        }
    }
}
