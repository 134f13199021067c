//! **mcwcfs** stores model checkpoints as `.mcwc` archives and mounts them as ordinary `.safetensors` files that are
//! decoded on demand. The codec is Motion-Compensated Weight Compression (MCWC, arXiv 2605.24754): depth is
//! treated as a video, a layer is predicted from the decoded layer before it, and quantized residuals are entropy-coded.
//!
//! # The map
//!
//! A `.mcwc` file is bytes ([`mod@format`]). Bytes become weights through stages that encoder and decoder share ([`codec`]).
//! Engines run the decoding stages, all to the same bits ([`decode`]). [`forward`] runs a model, so that the encoder knows
//! what its weights are multiplied with. [`materialize`] gives any byte range of any mounted file from an opened [`archive`]
//! and the base it may start from, through a [`cache`] and within a [`budget`] of memory; whole files may be kept on disk
//! ([`decoded_files`]). Three products stand on it: [`vfs`] serves the bytes as files, [`pack`] makes archives, [`gpu`]
//! decodes them in a GPU's memory. [`fuse`] and
//! [`telemetry`] face Linux; [`daemon`] and [`cli`] are the process and its front door. What any of them counts is declared
//! in [`metrics`].
//!
//! *If this line were wrong, what would break?* The file cannot be read: `format`. It reads but decodes to other weights:
//! `codec` or `decode`. It only got bigger or less accurate: `pack`. Only the mounted files are wrong: `vfs`. Only the
//! terminal: `cli`.
//!
//! The groups of `pub mod` below are floors, lowest first: a room uses floors below its own, never its own floor or one
//! above. `tests/layers.rs` reads this file and fails where that is not so.
//!
//! # Where to start reading
//!
//! `src/format/SPEC.md` is the archive, byte by byte. [`decode::reference`] is the paper's Algorithm 1 read aloud.
//! [`pack::encode`] is its other half. [`vfs`] is the file system without FUSE.
//!
//! # Words
//!
//! | word | meaning here |
//! |---|---|
//! | archive | one `.mcwc` file: one checkpoint, one or more safetensors files |
//! | checkpoint | the input: safetensors files and their sidecars |
//! | block | what a permutation moves: an attention head, an FFN unit (section 4.1) |
//! | block type | which blocks: FFN units, attention heads (t in the paper) |
//! | record | one (layer, block type) in the archive (Eq. 50), or one expert of a layer |
//! | part | one tensor of a record: its codes are read alone |
//! | run | the consecutive elements of a part that share an entropy table, usually one row |
//! | strip | whole runs coded together: the entropy coder's independent piece |
//! | chain | records of one block type from a keyframe to the next |
//! | segment | the layers from one keyframe to the next |
//! | base, variant | an archive, and one whose parts start from its tensors: a fine-tune of it |
//! | profile | an earlier variant's archive that says how to code a further one |
//! | reference | what a prediction starts from: the decoded part one layer below, or a tensor of the base |
//! | verbatim | carried bit-exact |
//! | engine | an implementation of decoding; all give the reference decoder's bytes |

// What tests of both kinds share names the crate.
#[cfg(test)]
extern crate self as mcwcfs;

pub mod hexadecimal;
pub mod metrics;

pub mod budget;
pub mod cache;
pub mod decoded_files;
pub mod numerics;
pub mod tensor;

pub mod format;
pub mod safetensors;

pub mod codec;
pub mod forward;

pub mod archive;
pub mod decode;

pub mod materialize;

pub mod gpu;
pub mod pack;
pub mod vfs;

pub mod fuse;
pub mod telemetry;

pub mod daemon;

pub mod cli;
