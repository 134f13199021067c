// From a strip's bytes to its symbols (SPEC.md section 6): the lanes of the entropy coder are those of the warp.
#pragma once

#include "numbers.h"

// What a warp has of the multiprocessor's own memory.
struct Scratch {
    // The tables of the run at hand.
    Table tables[2];
    // Elements of each class; then, the place of the next one in coded order.
    u32 classes[64];
};

// Where the pieces of a strip lie.
struct Pieces {
    const u8 *states, *words, *raw, *exceptions;

    DEVICE Pieces(const Strip& strip, u32 lanes) {
        states = reinterpret_cast<const u8*>(strip.stored);
        words = states + 4 * lanes;
        raw = words + 2 * strip.words;
        exceptions = raw + strip.raw_bytes;
    }
};

// The calling lane of the entropy coder.
struct Lane {
    u32 state;
    // Words that all lanes have used, more than there are where the strip is damaged.
    u32 words_used;

    DEVICE Lane(const Pieces& pieces, u32 lanes) : words_used(0) {
        state = lane() < lanes ? reinterpret_cast<const u32*>(pieces.states)[lane()] : 1 << 16;
    }

    // Decodes a symbol in every lane that is active, in the order of lanes: its entry in the table's values. All lanes come
    // here; others keep their state.
    DEVICE u32 decode(const Table& table, bool is_active, const u16* words, u32 count) {
        const u32 slot = state & 4095, within = slot & 31, bucket = table.buckets[slot >> 5];
        const u32 position = (bucket & 0xff) + (within > (bucket >> 8 & 0xff)) + (within > (bucket >> 16 & 0xff)) +
                             (within > bucket >> 24);
        const u32 interval = table.intervals[position];
        if (is_active) state = (interval >> 16) * (state >> 12) + slot - (interval & 0xffff);
        const bool refills = is_active && state < 1 << 16;
        const u32 refilling = ballot(refills);
        if (refills) {
            const u32 word = words_used + count_bits(refilling & lanes_below());
            state = state << 16 | (word < count ? words[word] : 0); // a damaged strip reads nothing outside of it
        }
        words_used += count_bits(refilling);
        return table.values[position];
    }

    // Whether all lanes have come home with every word used; says which has not.
    DEVICE bool has_come_home(const Strip& strip, Status& status) const {
        if (words_used != strip.words) {
            status = {WORDS, words_used, 0, 0};
            return false;
        }
        const u32 lost = ballot(state != 1 << 16);
        if (lost == 0) return true;
        const u32 first = __builtin_ctz(lost);
        status = {END_STATE, first, broadcast(state, first), 0};
        return false;
    }
};

// Code of an entry in a table's values, and its point's offset in steps.
DEVICE i32 code_of(u32 value) { return i16(value); }
DEVICE float point_offset_of(u32 value) { return multiply(float(i8(value >> 16)), 1.0f / 256); }

DEVICE u32 stored_raw_bits(const Run& run) { return run.raw_bits & 0xff; }
DEVICE u32 zero_raw_bits(const Run& run) { return run.raw_bits >> 8; }

// Bytes of the raw bits of a run.
DEVICE u32 raw_bytes_of_run(u32 symbols, u32 bits) {
    return bits / 8 * symbols + bits % 8 * 4 * ((symbols + 31) / 32);
}

// The stored raw bits of one symbol of a run: whole bytes from the byte planes, the bits above them from the bit planes.
DEVICE u64 raw_of(const u8* planes, u32 symbols, u32 index, u32 bits) {
    const u32 bytes = bits / 8;
    u64 raw = 0;
    for (u32 plane = 0; plane < bytes; plane++) raw |= u64(planes[plane * symbols + index]) << (8 * plane);
    // Bit j of a little-endian u32 is bit j mod 8 of byte j / 8.
    const u8* group = planes + bytes * symbols + index / 32 * 4 * (bits % 8) + index % 32 / 8;
    for (u32 bit = 0; bit < bits % 8; bit++) raw |= u64(group[4 * bit] >> index % 8 & 1) << (8 * bytes + bit);
    return raw;
}

DEVICE Run run_of(const Part& part, u64 number) {
    return reinterpret_cast<const Run*>(part.runs)[number * part.run_stride];
}

// A symbol as it is handed on. All lanes are handed one: that of a lane which is not active means nothing.
struct Symbol {
    bool is_active;
    // Counted in the strip, and in its run.
    u32 index, column;
    // Entry in the table's values.
    u32 value;
    // Raw bits as stored.
    u64 raw;
};

// Decodes all symbols of a strip in coded order and hands them to `take(symbol, run)`; `choose()` is which of the run's
// tables the lane's next symbol is coded with. False where the lanes do not come home.
template <typename Choose, typename Take>
DEVICE bool for_each_symbol(const Part& part, const Strip& strip, Scratch& scratch, Status& status, Choose choose, Take take) {
    const Pieces pieces(strip, part.lanes);
    const u16* words = reinterpret_cast<const u16*>(pieces.words);
    const u32 tables_of_run = part.flags & PAIRS ? 2 : 1;
    Lane coder(pieces, part.lanes);
    const u8* raw = pieces.raw;
    u32 loaded = ~0u;
    u64 number = strip.first_run;
    for (u32 first = 0; first < strip.symbols; number++) {
        const u32 left = strip.symbols - first, symbols = left < part.run_elements ? left : part.run_elements;
        const Run run = run_of(part, number);
        if (run.table != loaded) {
            meet();
            const u32* from = reinterpret_cast<const u32*>(part.tables + u64(run.table) * tables_of_run * sizeof(Table));
            u32* to = reinterpret_cast<u32*>(scratch.tables);
            for (u32 word = lane(); word < tables_of_run * sizeof(Table) / 4; word += WARP) to[word] = from[word];
            meet();
            loaded = run.table;
        }
        const u32 bits = stored_raw_bits(run);
        for (u32 start = 0; start < symbols; start += part.lanes) {
            const u32 index = start + lane();
            const bool is_active = lane() < part.lanes && index < symbols;
            const u32 value = coder.decode(scratch.tables[choose()], is_active, words, strip.words);
            const u64 number_below = is_active && bits > 0 ? raw_of(raw, symbols, index, bits) : 0;
            take(Symbol{is_active, first + index, index, value, number_below}, run);
        }
        first += symbols;
        raw += raw_bytes_of_run(symbols, bits);
    }
    return coder.has_come_home(strip, status);
}

// Hands the strip's exceptions to `patch(index, value)`, each to one lane, and to one after another where `one_by_one`. False
// where they are out of order or outside the strip.
template <typename Patch>
DEVICE bool for_each_exception(const Part& part, const Strip& strip, Status& status, bool one_by_one, Patch patch) {
    const u8* positions = Pieces(strip, part.lanes).exceptions;
    const u8* values = positions + 2 * strip.exceptions;
    meet(); // behind what the symbols wrote
    for (u32 start = 0; start < strip.exceptions; start += WARP) {
        const u32 number = start + lane();
        const bool is_active = number < strip.exceptions;
        const u32 position = is_active ? u32(load_bytes(positions + 2 * number, 2)) : 0;
        const bool is_ordered = number == 0 || !is_active || load_bytes(positions + 2 * (number - 1), 2) < position;
        const u32 wrong = ballot(is_active && (!is_ordered || position >= strip.symbols));
        if (wrong != 0) {
            status = {EXCEPTION_POSITION, broadcast(position, __builtin_ctz(wrong)), 0, 0};
            return false;
        }
        for (u32 turn = 0; turn < (one_by_one ? WARP : 1); turn++) {
            if (is_active && (!one_by_one || turn == lane())) {
                patch(position, load_bytes(values + number * part.exception_bytes, part.exception_bytes));
            }
            meet();
        }
    }
    return true;
}
