// What the 32 lanes of a warp do together, and arithmetic that nobody fuses: all that the kernel needs of the device it runs on.
//
// The GPU's are one instruction each. Where no GPU compiles this, `emulated_warp.h` has the same functions for a CPU, on
// which every other line of the kernel is the same source: what tests prove of one holds for the other.
#pragma once

using u8 = unsigned char;
using u16 = unsigned short;
using u32 = unsigned int;
using u64 = unsigned long long;
using i8 = signed char;
using i16 = short;
using i32 = int;
using i64 = long long;

constexpr u32 WARP = 32;

#ifdef __CUDA__

// clang without a toolkit's headers.
#define KERNEL extern "C" __attribute__((global))
#define DEVICE __attribute__((device)) inline __attribute__((always_inline))
#define SHARED __attribute__((shared))

// Number of the calling lane in its warp.
DEVICE u32 lane() { return __nvvm_read_ptx_sreg_laneid(); }

// Bit i is what lane i says.
DEVICE u32 ballot(bool vote) { return __nvvm_vote_ballot_sync(~0u, vote); }

// The value of one lane.
DEVICE u32 broadcast(u32 value, u32 from) { return __nvvm_shfl_sync_idx_i32(~0u, value, from, 31); }

// The value of the lane `distance` below; that of lanes without one is their own.
DEVICE u32 from_below(u32 value, u32 distance) { return __nvvm_shfl_sync_up_i32(~0u, value, distance, 0); }

// Bit i is whether lane i has the same value.
DEVICE u32 lanes_alike(u32 value) { return __nvvm_match_any_sync_i32(~0u, value); }

// Waits for all lanes; what they wrote before, all can read behind it.
DEVICE void meet() { __nvvm_bar_warp_sync(~0u); }

// Single binary32 operations, rounded to nearest, ties to even (SPEC.md section 7.1).
DEVICE float multiply(float a, float b) { return __nvvm_mul_rn_f(a, b); }
DEVICE float add(float a, float b) { return __nvvm_add_rn_f(a, b); }

#else

#include "emulated_warp.h"

#endif

// Lanes below the calling one.
DEVICE u32 lanes_below() { return (1u << lane()) - 1; }

DEVICE u32 count_bits(u32 bits) { return __builtin_popcount(bits); }
