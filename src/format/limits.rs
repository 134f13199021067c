//! The largest counts and sizes an archive may state. Every one is checked before memory is taken for it.

/// Bytes of the index after inflation.
pub const INDEX_BYTES: u64 = 1 << 28;
/// Bytes of the index as stored: room for one that deflate could only make longer.
pub const STORED_INDEX_BYTES: u64 = 1 << 29;
/// Deflate cannot expand more than this; an index that claims to is a lie found before inflating.
pub const DEFLATE_RATIO: u64 = 1032;
/// Safetensors files in one archive.
pub const FILES: u64 = 1 << 16;
/// Bytes of a name or a provenance value.
pub const TEXT_BYTES: u64 = 1 << 16;
/// Bytes of one safetensors header, length prefix included (the safetensors library's own limit).
pub const HEADER_BYTES: u64 = 100_000_008;
/// Entropy tables in one archive: a decoder keeps some kilobytes for each.
pub const TABLES: u64 = 1 << 12;
/// Coded positions of one entropy table: 64 less the three that the vector lookup keeps.
pub const TABLE_POSITIONS: u64 = 61;
/// Codebooks of residual vector quantization in one archive.
pub const CODEBOOKS: u64 = 1 << 8;
/// Elements that share indices in residual vector quantization.
pub const VECTOR_ELEMENTS: std::ops::RangeInclusive<u8> = 2..=16;
/// Base-2 logarithm of the codewords of a codebook.
pub const VECTOR_INDEX_BITS: std::ops::RangeInclusive<u8> = 1..=12;
/// Networks of learned predictors in one archive.
pub const NETWORKS: u64 = 16;
/// Elements that a network predicts at once.
pub const NETWORK_UNIT: u64 = 1 << 10;
/// Latent elements of a network: with a unit of two contexts, sums of products stay below 2^26.
pub const NETWORK_WIDTH: u64 = 1 << 8;
/// Hidden elements of a network.
pub const NETWORK_HIDDEN: u64 = 1 << 10;
/// Kinds of tensors that a network is for.
pub const NETWORK_KINDS: u64 = 64;
/// Layer embeddings of a network.
pub const NETWORK_LAYERS: u64 = 1 << 12;
/// Magnitude of a number that a network adds to a sum of products.
pub const NETWORK_BIAS: i32 = 1 << 24;
/// Right shift with which a sum becomes eight bits.
pub const NETWORK_SHIFT: std::ops::RangeInclusive<u8> = 1..=40;
/// Motion vectors of one unit.
pub const MOTION_VECTORS: i32 = 4;
/// Block types.
pub const BLOCK_TYPES: u64 = 256;
/// Layers.
pub const LAYERS: u64 = 1 << 20;
/// Records.
pub const RECORDS: u64 = 1 << 20;
/// Parts of all records together: tensors of one archive.
pub const PARTS: u64 = 1 << 20;
/// Layers from a keyframe to the last record predicted from it.
pub const CHAIN_RECORDS: u64 = 256;
/// Base archives of one archive.
pub const BASES: u64 = 16;
/// Archives below one another, each the base of the one above.
pub const BASE_CHAIN: usize = 4;
/// Rank of a low-rank product: sums of so many products of two factors stay exact in 32 bits.
pub const RANK: u64 = 256;
/// Magnitude of a factor of a low-rank product.
pub const FACTOR: i32 = 2047;
/// Provenance entries.
pub const PROVENANCE: u64 = 1 << 10;
/// Bytes of one record's side information.
pub const SIDE_BYTES: u64 = 1 << 30;
/// Symbols of one strip: a position must fit 16 bits.
pub const STRIP_SYMBOLS: u64 = 1 << 16;
/// Bytes of one strip of a raw part.
pub const RAW_STRIP_BYTES: u64 = 1 << 17;
/// Strips of all parts of one record: some have strips that no stored byte pays for.
pub const RECORD_STRIPS: u64 = 1 << 20;
/// Raw low bits per symbol.
pub const RAW_BITS: u64 = 56;
/// Base-2 logarithm of the states of a trellis.
pub const TRELLIS_STATE_BITS: std::ops::RangeInclusive<u8> = 3..=8;
/// Blocks that one permutation moves.
pub const BLOCKS: u64 = 1 << 20;
