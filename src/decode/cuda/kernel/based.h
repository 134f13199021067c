// Parts that start from a tensor of a base archive and are bit-exact (SPEC.md sections 7.7 and 7.8).
#pragma once

#include "symbols.h"

// What an element starts from: its reference, with the low-rank product added.
DEVICE u32 start_of(const Part& part, const Strip& strip, u32 index) {
    const u64 element = strip.first_element + index;
    const u64 reference = load(strip.reference, element, part.symbol_bits);
    if (!(part.flags & LOW_RANK)) return u32(reference);
    const u64 row = divide(element, part.columns), column = element - row * part.columns;
    const i32* left = reinterpret_cast<const i32*>(part.left + row * part.rank * sizeof(i32));
    const i32* right = reinterpret_cast<const i32*>(part.right + column * sizeof(i32));
    i32 sum = 0;
    for (u32 k = 0; k < part.rank; k++) sum += left[k] * right[k * part.columns];
    const float product = multiply(part.low_rank_scale, float(sum));
    return element_of(part.element, add(number_of(part.element, u32(reference)), product));
}

// Which bits an element has, and those that say how large it is.
struct Width {
    u32 all, magnitude;

    DEVICE explicit Width(u32 bits) : all(~0u >> (32 - bits)), magnitude(all >> 1) {}

    // Sign and magnitude to two's complement, -0 below 0; its own inverse.
    DEVICE u32 order(u32 bits) const { return bits > magnitude ? bits ^ magnitude : bits; }

    DEVICE u32 changed_by(u32 start, u32 difference) const {
        const u32 ordered = order(start);
        return order((start > magnitude ? ordered - difference : ordered + difference) & all);
    }
};

DEVICE u32 class_of(const Part& part, const Strip& strip, const Width& width, u32 index, u32 start) {
    const u64 row = divide(strip.first_element + index, part.class_row_elements);
    const i32 offset = reinterpret_cast<const i32*>(part.class_offsets)[row];
    const i32 level = i32((start & width.magnitude) >> part.class_shift) - offset;
    return level < 0 ? 0 : level > 63 ? 63 : level;
}

// Puts elements in coded order, by class and within one as they come: `out` has what they start from.
DEVICE void sort_elements(const Part& part, const Strip& strip, const Width& width, Scratch& scratch) {
    u16* order = reinterpret_cast<u16*>(strip.order);
    scratch.classes[lane()] = scratch.classes[lane() + WARP] = 0;
    meet();
    // Counted, then added up to the first place of each class, then placed: lanes of one class take places in their order.
    for (u32 pass = 0; pass < 2; pass++) {
        for (u32 first = 0; first < strip.symbols; first += WARP) {
            const u32 index = first + lane();
            const bool is_active = index < strip.symbols;
            const u32 start = is_active ? u32(load(strip.out, index, part.symbol_bits)) : 0;
            const u32 group = is_active ? class_of(part, strip, width, index, start) : 64;
            const u32 alike = lanes_alike(group), before = count_bits(alike & lanes_below());
            const u32 next = is_active ? scratch.classes[group] : 0;
            if (is_active && pass == 1) order[next + before] = u16(index);
            meet();
            if (is_active && before == 0) scratch.classes[group] = next + count_bits(alike);
            meet();
        }
        if (pass == 0 && lane() == 0) {
            u32 place = 0;
            for (u32 group = 0; group < 64; group++) {
                const u32 elements = scratch.classes[group];
                scratch.classes[group] = place;
                place += elements;
            }
        }
        meet();
    }
}

DEVICE void decode_based(const Part& part, const Strip& strip, Scratch& scratch, Status& status) {
    for (u32 index = lane(); index < strip.symbols; index += WARP) {
        // What is not coded may be of any type.
        const u64 start = part.flags & (LOW_RANK | CODED) ? start_of(part, strip, index)
                                                          : load(strip.reference, strip.first_element + index, part.symbol_bits);
        store(strip.out, index, part.symbol_bits, start);
    }
    meet();
    if (!(part.flags & CODED)) return;
    const Width width(part.symbol_bits);
    sort_elements(part, strip, width, scratch);
    const u16* order = reinterpret_cast<const u16*>(strip.order);
    const bool is_sound = for_each_symbol(
        part, strip, scratch, status, [] { return 0; },
        [&](const Symbol& symbol, const Run& run) {
            if (!symbol.is_active) return;
            const u64 joined = u64(i64(code_of(symbol.value))) << stored_raw_bits(run) | symbol.raw;
            const u32 difference = u32(joined << part.zero_bits) & width.all, index = order[symbol.index];
            const u32 start = u32(load(strip.out, index, part.symbol_bits));
            store(strip.out, index, part.symbol_bits, width.changed_by(start, difference));
        });
    if (!is_sound) return;
    for_each_exception(part, strip, status, false, [&](u32 place, u64 value) {
        const u32 index = order[place]; // its symbol has changed it: from the start again
        store(strip.out, index, part.symbol_bits, width.changed_by(start_of(part, strip, index), u32(value)));
    });
}
