// Quantized parts (SPEC.md sections 6.1, 7.3 and 7.4): points to values, prediction, rounding.
#pragma once

#include "symbols.h"

// Where an element finds its reference (section 8.3), both counted in the part.
DEVICE u64 reference_of(const Part& part, u64 element) {
    if (part.motion == 0) return element;
    const u64 line = divide(element, part.motion_stride), within = element - line * part.motion_stride;
    const u64 outer = divide(line, part.motion_length), index = line - outer * part.motion_length;
    const u64 source = reinterpret_cast<const u32*>(part.motion)[index];
    return (outer * part.motion_length + source) * part.motion_stride + within;
}

// Eqs. 68 to 71, from left to right, and the element nearest to what comes of it. `is_predicted`, `has_trellis` and
// `has_pairs` are known when this is compiled, so that the loop over symbols asks for none of them.
template <bool is_predicted>
DEVICE void write_quantized(const Part& part, const Strip& strip, const Run& run, u32 index, u32 column, float point) {
    float value = multiply(point, run.step);
    if (part.flags & MEANS) value = add(value, run.mean);
    if (part.flags & COLUMN_SCALES) value = multiply(value, reinterpret_cast<const float*>(part.column_scales)[column]);
    if (is_predicted) {
        const u64 source = reference_of(part, strip.first_element + index);
        float prediction = number_of(part.element, u32(load(strip.reference, source, part.symbol_bits)));
        prediction = multiply(run.gain, prediction);
        if (part.flags & OFFSETS) prediction = add(prediction, run.offset);
        value = add(value, prediction);
    }
    store(strip.out, index, part.symbol_bits, element_of(part.element, value));
}

template <bool is_predicted, bool has_trellis, bool has_pairs>
DEVICE bool decode_points(const Part& part, const Strip& strip, Scratch& scratch, Status& status) {
    u32 state = 0; // of the lane's trellis
    return for_each_symbol(
        part, strip, scratch, status, [&] { return has_pairs ? state & 1 : 0; },
        [&](const Symbol& symbol, const Run& run) {
            if (!symbol.is_active) return;
            const i32 code = i32(u32(code_of(symbol.value)) << part.raw_bits | u32(symbol.raw));
            float point;
            if (has_trellis) {
                const i32 multiple = 2 * code + i32(state & 1);
                point = add(float(multiple), point_offset_of(symbol.value));
                state = state >> 1 ^ (state & 1 ? part.from_second : 0) ^ (code & 1 ? part.from_odd : 0);
            } else {
                point = float(code);
                if (part.raw_bits == 0) point = add(point, point_offset_of(symbol.value)); // exact
            }
            write_quantized<is_predicted>(part, strip, run, symbol.index, symbol.column, point);
        });
}

// Indices of codewords in place of symbols.
template <bool is_predicted>
DEVICE void decode_vectors(const Part& part, const Strip& strip) {
    const u32 vector_bits = part.first_index_bits + part.second_index_bits;
    const float* first_codewords = reinterpret_cast<const float*>(part.values);
    const float* second_codewords = reinterpret_cast<const float*>(part.second_values);
    const u8* stored = reinterpret_cast<const u8*>(strip.stored);
    u64 number = strip.first_run;
    for (u32 first = 0; first < strip.symbols; number++) {
        const u32 left = strip.symbols - first, elements = left < part.run_elements ? left : part.run_elements;
        const u32 bytes = ((elements + part.vector_elements - 1) / part.vector_elements * vector_bits + 7) / 8;
        const Run run = run_of(part, number);
        for (u32 index = lane(); index < elements; index += WARP) {
            const u32 vector = index / part.vector_elements, within = index - vector * part.vector_elements;
            const u32 bit = vector * vector_bits, end = (bit + vector_bits + 7) / 8;
            const u32 indices = u32(load_bytes(stored + bit / 8, end - bit / 8) >> bit % 8);
            const u32 one = indices & ((1 << part.first_index_bits) - 1);
            const u32 other = indices >> part.first_index_bits & ((1 << part.second_index_bits) - 1);
            const float point = add(first_codewords[one * part.vector_elements + within],
                                    second_codewords[other * part.vector_elements + within]);
            write_quantized<is_predicted>(part, strip, run, first + index, index, point);
        }
        first += elements;
        stored += bytes;
    }
}

template <bool is_predicted>
DEVICE void decode_quantized(const Part& part, const Strip& strip, Scratch& scratch, Status& status) {
    if (part.flags & VECTORS) return decode_vectors<is_predicted>(part, strip);
    const bool is_sound = part.flags & PAIRS     ? decode_points<is_predicted, true, true>(part, strip, scratch, status)
                          : part.flags & TRELLIS ? decode_points<is_predicted, true, false>(part, strip, scratch, status)
                                                 : decode_points<is_predicted, false, false>(part, strip, scratch, status);
    if (!is_sound) return;
    for_each_exception(part, strip, status, false, [&](u32 index, u64 value) {
        const u32 run = index / part.run_elements, column = index - run * part.run_elements;
        write_quantized<is_predicted>(part, strip, run_of(part, strip.first_run + run), index, column, float(i16(value)));
    });
}
