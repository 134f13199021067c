//! Command line: one file per subcommand.

pub mod decoded;
pub mod inspect;
pub mod packed_tree;
pub mod unpack;
pub mod verify;
