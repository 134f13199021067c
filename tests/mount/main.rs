//! The filesystem contract on real mounts, read as unmodified readers read.
//!
//! `contract` has a test for each line of the contract, named after it: `line_07_...`. Its mounts run inside the test's own
//! process, over checkpoints in memory that can count, fail and wait. `daemon` runs the program, `life` changes its source and asks it
//! how it is, and `supervisor` kills it. `archives` mounts what `mcwc-pack` wrote, `candle` loads it, and `load` has many readers at once
//! read that. `decoded_files` reads what was kept on disk, `faults` has things go
//! wrong, in `sources` it is the file system below, `variants` come and go with their base, `model` compares with a plain directory, and
//! `soak` runs when it is asked for.
//!
//! Where there is no `/dev/fuse` each test says so in one line and passes; where there is one, none is skipped.

mod archives;
mod candle;
#[path = "../common/mod.rs"]
mod common;
mod concurrency;
mod contract;
mod daemon;
mod decoded_files;
mod faults;
mod life;
mod load;
mod model;
mod packed;
mod place;
mod soak;
mod sources;
mod supervisor;
mod support;
mod systemd;
mod variants;
