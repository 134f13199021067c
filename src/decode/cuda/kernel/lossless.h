// Parts that are bit-exact by themselves (SPEC.md section 7.2): raw bytes, split elements, units.
#pragma once

#include "symbols.h"

DEVICE void copy_raw(const Strip& strip) {
    // Both begin on a multiple of four.
    const u32 words = strip.symbols / 4;
    for (u32 word = lane(); word < words; word += WARP) store(strip.out, word, 32, load(strip.stored, word, 32));
    for (u32 byte = 4 * words + lane(); byte < strip.symbols; byte += WARP) {
        store(strip.out, byte, 8, load(strip.stored, byte, 8));
    }
}

DEVICE void write_split(const Part& part, const Strip& strip, u32 index, u64 element) {
    if (part.flags & FROM_BF16) element = bits_of(float_of(u32(element) << 16));
    if (part.flags & FROM_F16) element = bits_of(from_f16(u32(element)));
    store(strip.out, index, part.symbol_bits, element);
}

DEVICE void decode_split(const Part& part, const Strip& strip, Scratch& scratch, Status& status) {
    const u32 low_bits = part.raw_bits - 1, sign_bit = part.carrier_bits - 1;
    const u64 low_mask = (1ull << low_bits) - 1, magnitude_mask = (1ull << sign_bit) - 1;
    const bool is_sound = for_each_symbol(
        part, strip, scratch, status, [] { return 0; },
        [&](const Symbol& symbol, const Run& run) {
            if (!symbol.is_active) return;
            const u64 raw = symbol.raw << zero_raw_bits(run), high = u16(code_of(symbol.value));
            const u64 magnitude = (high << low_bits | (raw & low_mask)) & magnitude_mask;
            write_split(part, strip, symbol.index, (raw >> low_bits & 1) << sign_bit | magnitude);
        });
    if (!is_sound) return;
    for_each_exception(part, strip, status, false,
                       [&](u32 index, u64 value) { write_split(part, strip, index, value); });
}

// Unit `index` of a strip.
DEVICE u64 load_unit(const Part& part, const Strip& strip, u32 index) {
    if (part.symbol_bits > 4) return load(strip.out, index, part.symbol_bits);
    return load(strip.out, index / 2, 8) >> 4 * (index % 2) & 15;
}

// Writes a unit; of units of 4 bits the other in its byte stays.
DEVICE void write_unit(const Part& part, const Strip& strip, u32 index, u64 unit) {
    if (part.symbol_bits > 4) return store(strip.out, index, part.symbol_bits, unit);
    const u64 other = load(strip.out, index / 2, 8) & (index % 2 ? 0x0f : 0xf0);
    store(strip.out, index / 2, 8, other | (unit & 15) << 4 * (index % 2));
}

// Writes one unit per active lane; all lanes come here. Two of 4 bits are in one byte: first the even, then the odd.
DEVICE void write_units(const Part& part, const Strip& strip, bool is_active, u32 index, u64 unit) {
    const bool shares_bytes = part.symbol_bits == 4;
    if (is_active && !(shares_bytes && index % 2)) write_unit(part, strip, index, unit);
    if (!shares_bytes) return;
    meet();
    if (is_active && index % 2) write_unit(part, strip, index, unit);
    meet();
}

// Numbers become units: each is added to the unit before it, modulo two to the power of its bits, which writing sees to.
DEVICE void add_up_units(const Part& part, const Strip& strip) {
    meet();
    u64 before = 0;
    for (u32 start = 0; start < strip.symbols; start += WARP) {
        const u32 index = start + lane();
        const bool is_active = index < strip.symbols;
        u64 sum = is_active ? load_unit(part, strip, index) : 0;
        for (u32 distance = 1; distance < WARP; distance *= 2) {
            const u64 below = from_below(u32(sum), distance) | u64(from_below(u32(sum >> 32), distance)) << 32;
            if (lane() >= distance) sum += below;
        }
        sum += before;
        write_units(part, strip, is_active, index, sum);
        before = broadcast(u32(sum), WARP - 1) | u64(broadcast(u32(sum >> 32), WARP - 1)) << 32;
    }
}

DEVICE void decode_units(const Part& part, const Strip& strip, Scratch& scratch, Status& status) {
    const u64* listed = reinterpret_cast<const u64*>(part.values);
    const bool is_sound = for_each_symbol(
        part, strip, scratch, status, [] { return 0; },
        [&](const Symbol& symbol, const Run&) {
            const i32 code = code_of(symbol.value);
            u64 number;
            if (part.flags & VALUES) {
                number = code >= 0 && u32(code) < part.values_listed ? listed[code] : 0;
            } else {
                number = u64(i64(code)) << part.raw_bits | symbol.raw;
            }
            write_units(part, strip, symbol.is_active, symbol.index, number);
        });
    if (!is_sound) return;
    // One after another where two may be in one byte.
    const bool is_ordered = for_each_exception(part, strip, status, part.symbol_bits == 4, [&](u32 index, u64 value) {
        write_unit(part, strip, index, value);
    });
    if (is_ordered && part.flags & DIFFERENCES) add_up_units(part, strip);
}
