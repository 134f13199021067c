// What the host tells the kernel: `src/decode/cuda/description.rs` is the same in Rust, field by field.
//
// Addresses are the device's. Numbers of runs, elements and class rows are those of the whole part: where the host has sent
// only some of an array, the address is that of its item 0, sent or not.
#pragma once

#include "warp.h"

// How the elements of a part are coded: each kind has a kernel.
enum Kind { RAW, SPLIT, UNITS, QUANTIZED, PREDICTED, BASED };

// Element types that are computed with; others are bits.
enum Element : u32 { BITS = 0, F32 = 1, F16 = 2, BF16 = 3 };

// Flags of a part.
enum Flag : u32 {
    MEANS = 1 << 0,
    OFFSETS = 1 << 2,
    TRELLIS = 1 << 3,
    // The trellis chooses between two tables: run table n is tables 2n and 2n + 1.
    PAIRS = 1 << 4,
    VECTORS = 1 << 5,
    // Units are listed values; differences to the unit before.
    VALUES = 1 << 6,
    DIFFERENCES = 1 << 7,
    // Parts that start from a base: a product is added; symbols are differences.
    LOW_RANK = 1 << 8,
    CODED = 1 << 9,
    // Split elements are F16 or BF16 numbers in elements of F32.
    FROM_F16 = 1 << 10,
    FROM_BF16 = 1 << 11,
    COLUMN_SCALES = 1 << 12,
};

// An entropy table, 1 KiB. The position of a slot is the first position of its bucket of 32 and as many more as it has passed
// boundaries: three at most (SPEC.md section 5, depth rule).
struct Table {
    // By bucket: first position in bits 0 to 7; above it, eight bits each, how far into the bucket the last slot before each
    // boundary lies, 31 where there is none.
    u32 buckets[128];
    // By position: first slot in bits 0 to 15, slots above.
    u32 intervals[64];
    // By position: code (i16) in bits 0 to 15, 256 times the offset of its point (i8) in bits 16 to 23.
    u32 values[64];
};

// What a run has of its own.
struct Run {
    // Number of its table, or of its pair of tables.
    u32 table;
    // Raw bits of a symbol that are stored, and from bit 8 on the zero bits below them that are not.
    u32 raw_bits;
    float step, mean, gain, offset;
};

struct Part {
    u64 tables; // Table[]
    u64 runs;   // Run[], or the only one: see run_stride
    // Listed units (u64[]), or the codewords of both codebooks (float[]).
    u64 values, second_values;
    // For every index along the moved axis that of its reference (u32[]); 0 where elements stay in place.
    u64 motion;
    u64 motion_stride;
    // What the values of a run are multiplied with, by their places in it (float[]).
    u64 column_scales;
    // Offset of each class row (i32[]).
    u64 class_offsets;
    u64 class_row_elements;
    // Factors of a product (i32[]), row-major, and the columns of the right one.
    u64 left, right, columns;
    u32 element, flags;
    // Bits of the tensor that a symbol stands for.
    u32 symbol_bits;
    u32 run_elements, lanes;
    // 1, or 0 where all runs are alike and one is described.
    u32 run_stride;
    // Raw bits of a symbol, stored or zero.
    u32 raw_bits;
    // Bits of a split element; bytes of an exception's value.
    u32 carrier_bits, exception_bytes;
    // What a state of the second quantizer, and an odd code, add to the next state of the trellis.
    u32 from_second, from_odd;
    u32 values_listed;
    u32 vector_elements, first_index_bits, second_index_bits;
    u32 motion_length;
    u32 class_shift, zero_bits;
    u32 rank;
    float low_rank_scale;
};

struct Strip {
    u64 part;      // Part
    u64 stored;    // the strip's bytes, on a multiple of four
    u64 out;       // where its elements go
    u64 reference; // element 0 of what the part is predicted from
    u64 order;     // u16[symbols]: room for the coded order of differences
    u64 first_element, first_run;
    // Of a raw strip bytes take the place of symbols.
    u32 symbols, words, raw_bytes, exceptions;
};

// Why a strip did not decode, in the order in which they are looked for.
enum Failure : u32 { NONE = 0, WORDS = 1, END_STATE = 2, EXCEPTION_POSITION = 3 };

struct Status {
    u32 failure;
    // Words used; the lane; the position.
    u32 found;
    // The lane's state.
    u32 state;
    u32 reserved;
};

static_assert(sizeof(Table) == 1024 && sizeof(Run) == 24 && sizeof(Part) == 176 && sizeof(Strip) == 72 && sizeof(Status) == 16,
              "the host lays these out alike");
