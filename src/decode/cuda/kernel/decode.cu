// Decoding on CUDA: one warp per strip, any strips of any parts in one launch.
//
// The host has looked at every header and every checksum; what is left that can be wrong is reported per strip, in the
// reference decoder's order. No read leaves a strip and no write leaves its output, whatever the bytes are.

#include "based.h"
#include "lossless.h"
#include "quantized.h"

template <Kind kind>
DEVICE void decode_strip(const Strip& described, Status& to, Scratch& scratch) {
    // Copies, which no store can be taken to change: what loops need of them stays in registers.
    const Strip strip = described;
    const Part part = *reinterpret_cast<const Part*>(strip.part);
    Status status = {NONE, 0, 0, 0};
    if (kind == RAW) copy_raw(strip);
    if (kind == SPLIT) decode_split(part, strip, scratch, status);
    if (kind == UNITS) decode_units(part, strip, scratch, status);
    if (kind == QUANTIZED) decode_quantized<false>(part, strip, scratch, status);
    if (kind == PREDICTED) decode_quantized<true>(part, strip, scratch, status);
    if (kind == BASED) decode_based(part, strip, scratch, status);
    if (lane() == 0) to = status;
}

#ifdef __CUDA__

// Warps of a block: they share nothing but the multiprocessor.
constexpr u32 WARPS = 4;

template <Kind kind>
DEVICE void decode_as_warp(const Strip* strips, u32 count, Status* statuses) {
    SHARED Scratch scratch[WARPS];
    const u32 warp = __nvvm_read_ptx_sreg_tid_x() / WARP;
    const u32 number = __nvvm_read_ptx_sreg_ctaid_x() * WARPS + warp;
    if (number < count) decode_strip<kind>(strips[number], statuses[number], scratch[warp]);
}

#define DECODE(name, kind) \
    KERNEL void name(const Strip* strips, u32 count, Status* statuses) { decode_as_warp<kind>(strips, count, statuses); }

#else

namespace {

struct Launch {
    const Strip* strip;
    Status* status;
    Scratch* scratch;
};

template <Kind kind>
void decode_as_lane(void* argument) {
    const Launch& launch = *static_cast<const Launch*>(argument);
    decode_strip<kind>(*launch.strip, *launch.status, *launch.scratch);
}

template <Kind kind>
void decode_as_grid(const Strip* strips, u32 count, Status* statuses) {
    emulated::Warp warp;
    emulated::Warp::of_thread() = &warp;
    Scratch scratch;
    for (u32 number = 0; number < count; number++) {
        Launch launch{strips + number, statuses + number, &scratch};
        warp.run(decode_as_lane<kind>, &launch);
    }
    emulated::Warp::of_thread() = nullptr;
}

} // namespace

#define DECODE(name, kind) \
    extern "C" void name(const Strip* strips, u32 count, Status* statuses) { decode_as_grid<kind>(strips, count, statuses); }

#endif

// One kernel per kind: registers are those that its own path needs.
DECODE(mcwcfs_decode_raw, RAW)
DECODE(mcwcfs_decode_split, SPLIT)
DECODE(mcwcfs_decode_units, UNITS)
DECODE(mcwcfs_decode_quantized, QUANTIZED)
DECODE(mcwcfs_decode_predicted, PREDICTED)
DECODE(mcwcfs_decode_based, BASED)
