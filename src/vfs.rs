//! The file system without FUSE: tree, inodes, virtual files.
