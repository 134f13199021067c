"""BLAKE3 by its specification (github.com/BLAKE3-team/BLAKE3-specs, section 2): the hash only, without key or context."""

import struct

IV = (0x6A09E667, 0xBB67AE85, 0x3C6EF372, 0xA54FF53A, 0x510E527F, 0x9B05688C, 0x1F83D9AB, 0x5BE0CD19)
ORDER = (2, 6, 3, 10, 7, 0, 4, 13, 1, 11, 12, 5, 9, 14, 15, 8)
COLUMNS_AND_DIAGONALS = [(i, 4 + i, 8 + i, 12 + i) for i in range(4)]
COLUMNS_AND_DIAGONALS += [(i, 4 + (i + 1) % 4, 8 + (i + 2) % 4, 12 + (i + 3) % 4) for i in range(4)]
CHUNK_START, CHUNK_END, PARENT, ROOT = 1, 2, 4, 8
CHUNK = 1024
MASK = 0xFFFFFFFF


def rotated(word, bits):
    return (word >> bits | word << 32 - bits) & MASK


def compressed(chaining, block, counter, length, flags):
    """The first eight words of the output of one compression."""
    words = struct.unpack("<16I", block.ljust(64, b"\0"))
    v = [*chaining, *IV[:4], counter & MASK, counter >> 32, length, flags]
    for _ in range(7):
        for step, (a, b, c, d) in enumerate(COLUMNS_AND_DIAGONALS):
            for word, turns in ((words[2 * step], (16, 12)), (words[2 * step + 1], (8, 7))):
                v[a] = v[a] + v[b] + word & MASK
                v[d] = rotated(v[d] ^ v[a], turns[0])
                v[c] = v[c] + v[d] & MASK
                v[b] = rotated(v[b] ^ v[c], turns[1])
        words = [words[i] for i in ORDER]
    return [v[i] ^ v[i + 8] for i in range(8)]


def subtree(data, first_chunk, root):
    """The chaining value of a subtree, or its hash where it is the root."""
    if len(data) <= CHUNK:
        chaining, blocks = IV, [data[at : at + 64] for at in range(0, len(data), 64)] or [b""]
        for number, block in enumerate(blocks):
            last = number == len(blocks) - 1
            flags = (CHUNK_START if number == 0 else 0) | (CHUNK_END | root if last else 0)
            chaining = compressed(chaining, block, first_chunk, len(block), flags)
        return chaining
    left = CHUNK << (-(-len(data) // CHUNK) - 1).bit_length() - 1  # the largest power of two of chunks that leaves some
    halves = subtree(data[:left], first_chunk, 0) + subtree(data[left:], first_chunk + left // CHUNK, 0)
    return compressed(IV, struct.pack("<16I", *halves), 0, 64, PARENT | root)


def blake3(data):
    return struct.pack("<8I", *subtree(data, 0, ROOT))


assert blake3(b"").hex() == "af1349b9f5f9a1a6a0404dea36dcc9499bcb25c9adc112b7cc9a93cae41f3262"
