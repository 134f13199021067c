"""Coded permutations of a .mcwc archive, by src/format/SPEC.md alone: section 8. See spec_decoder.py."""

from spec_format import Reader, require


class Permutation:
    """Group i is predicted from group outer[i], its member j from that group's member inner[i][j] (section 8.1)."""

    def __init__(self, outer, inner):
        self.outer, self.inner = outer, inner
        self.size = len(outer), len(inner[0])

    def members(self):
        m = self.size[1]
        return [group * m + member for group, inner in zip(self.outer, self.inner) for member in inner]


class Bits:
    """Numbers of a given width, lowest bit first."""

    def __init__(self, data):
        self.number, self.left = int.from_bytes(data, "little"), 8 * len(data)

    def read(self, width):
        require(width <= self.left, "permutation: entries are cut off")
        value, self.number, self.left = self.number & (1 << width) - 1, self.number >> width, self.left - width
        return value


def permutation_of(coded, g, m, below):
    radices = [*range(g, 0, -1), *(radix for _ in range(g) for radix in range(m, 0, -1))]
    coding, reader = Reader("permutation", coded).u8("coding", below=3), Reader("permutation", coded[1:])
    if coding == 0:
        bits = Bits(coded[1:])
        outer = [bits.read((g - 1).bit_length()) for _ in range(g)]
        inner = [[bits.read((m - 1).bit_length()) for _ in range(m)] for _ in range(g)]
        require(bits.left < 8 and bits.number == 0, "permutation: bits are left over")
        require(all(sorted(entries) == list(range(len(entries))) for entries in [outer, *inner]), "permutation: repeats")
        return Permutation(outer, inner)
    digits = uniform_digits(reader, radices) if coding == 1 else delta_digits(reader, radices, g, m, below)
    inner = [entries_of(digits[g + i * m : g + (i + 1) * m]) for i in range(g)]
    return Permutation(entries_of(digits[:g]), inner)


def entries_of(digits):
    unused = list(range(len(digits)))
    return [unused.pop(digit) for digit in digits]


def digits_of(entries):
    return [sum(later < entry for later in entries[k + 1 :]) for k, entry in enumerate(entries)]


class State:
    """The 64-bit state and its words."""

    def __init__(self, reader):
        self.reader, self.x = reader, reader.u64("state")
        require(self.x >= 2**32, f"permutation: state {self.x}")

    def leave(self, c, f, q, bits):
        self.x = f * (self.x >> bits) + q - c
        if self.x < 2**32:
            self.x = (self.x << 32) + self.reader.u32("next word")

    def uniform(self, r):
        if r == 1:
            return 0
        q = self.x % 2**32
        d = ((q + 1) * r - 1) >> 32
        c = (d << 32) // r
        self.leave(c, ((d + 1) << 32) // r - c, q, 32)
        return d

    def end(self, x):
        self.reader.end()
        require(x is None or self.x == x, f"permutation: ends in state {self.x}")


def uniform_digits(reader, radices):
    first, product = len(radices), 1
    while first > 0 and product * radices[first - 1] <= 2**61:
        first, product = first - 1, product * radices[first - 1]
    if first == 0:
        number = int.from_bytes(reader.take("digits", -(-(product - 1).bit_length() // 8)), "little")
        reader.end()
        digits = []
    else:
        state = State(reader)
        digits = [state.uniform(r) for r in radices[:first]]
        state.end(None)
        number = state.x - 2**62
    require(0 <= number < product, f"permutation: last digits {number}")
    for r in radices[first:]:
        digits.append(number % r)
        number //= r
    return digits


def delta_digits(reader, radices, g, m, below):
    require(below is not None and below.size == (g, m), "permutation: no reference to be a difference to")
    bits = Bits(reader.take("frequencies", 27))
    F = [bits.read(12) for _ in range(18)]
    frequency = [F[(z + 1) // 2] for z in range(34)]
    require(min(F) > 0 and sum(frequency) == 4096, "permutation: frequencies")
    owner = [z for z, f in enumerate(frequency) for _ in range(f)]
    state, digits = State(reader), []
    before = digits_of(below.outer) + [digit for inner in below.inner for digit in digits_of(inner)]
    for digit, r in zip(before, radices):
        if r == 1:
            digits.append(0)
            continue
        q = state.x % 4096
        z = owner[q]
        state.leave(sum(frequency[:z]), frequency[z], q, 12)
        if z == 33:
            digit = state.uniform(r)
        else:
            digit += z // 2 if z % 2 == 0 else -(z + 1) // 2
        require(0 <= digit < r, f"Lehmer digit: {digit} of {r}")
        digits.append(digit)
    state.end(2**32)
    return digits
