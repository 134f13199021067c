// Elements as bytes and as numbers: the bit-exact conversions of SPEC.md section 7.5, as in `src/numerics.rs`.
#pragma once

#include "description.h"

DEVICE float float_of(u32 bits) { return __builtin_bit_cast(float, bits); }
DEVICE u32 bits_of(float value) { return __builtin_bit_cast(u32, value); }

DEVICE float from_f16(u32 bits) {
    const u32 sign = (bits & 0x8000) << 16, exponent = bits >> 10 & 0x1f, mantissa = bits & 0x3ff;
    if (exponent == 0) return float_of(sign | bits_of(multiply(float(mantissa), float_of(0x33800000)))); // times 2^-24: exact
    if (exponent == 31) return float_of(sign | 0x7f800000 | mantissa << 13);
    return float_of(sign | (exponent + 112) << 23 | mantissa << 13);
}

DEVICE u32 to_f16(float value) {
    const u32 bits = bits_of(value), sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffff;
    if (magnitude > 0x7f800000) return sign | 0x7e00 | (magnitude >> 13 & 0x1ff);
    if (magnitude >= 0x477ff000) return sign | 0x7c00; // 65520 and more round to infinity
    if (magnitude >= 0x38800000) return sign | (magnitude + 0xfff + (magnitude >> 13 & 1) - 0x38000000) >> 13;
    // A denormal: adding 0.5 leaves the value in units of 2^-24 in the low mantissa bits, rounded by the addition.
    return sign | (bits_of(add(float_of(magnitude), 0.5f)) - 0x3f000000);
}

DEVICE u32 to_bf16(float value) {
    const u32 bits = bits_of(value);
    if ((bits & 0x7fffffff) > 0x7f800000) return bits >> 16 | 0x40;
    return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

// The number that an element's bits stand for.
DEVICE float number_of(u32 element, u32 bits) {
    return element == BF16 ? float_of(bits << 16) : element == F16 ? from_f16(bits) : float_of(bits);
}

// The bits of the element nearest to a number.
DEVICE u32 element_of(u32 element, float value) {
    return element == BF16 ? to_bf16(value) : element == F16 ? to_f16(value) : bits_of(value);
}

// Item `index` of an array of unsigned integers of 8 to 64 bits.
DEVICE u64 load(u64 address, u64 index, u32 bits) {
    switch (bits) {
        case 8: return reinterpret_cast<const u8*>(address)[index];
        case 16: return reinterpret_cast<const u16*>(address)[index];
        case 32: return reinterpret_cast<const u32*>(address)[index];
        default: return reinterpret_cast<const u64*>(address)[index];
    }
}

DEVICE void store(u64 address, u64 index, u32 bits, u64 value) {
    switch (bits) {
        case 8: reinterpret_cast<u8*>(address)[index] = u8(value); break;
        case 16: reinterpret_cast<u16*>(address)[index] = u16(value); break;
        case 32: reinterpret_cast<u32*>(address)[index] = u32(value); break;
        default: reinterpret_cast<u64*>(address)[index] = value; break;
    }
}

// Little-endian numbers of some bytes, which may lie anywhere.
DEVICE u64 load_bytes(const u8* from, u32 bytes) {
    u64 number = 0;
    for (u32 byte = 0; byte < bytes; byte++) number |= u64(from[byte]) << (8 * byte);
    return number;
}

// Division of numbers that are small but for enormous tensors: a GPU has none of 64 bits.
DEVICE u64 divide(u64 number, u64 by) {
    return ((number | by) >> 32) == 0 ? u64(u32(number) / u32(by)) : number / by;
}
