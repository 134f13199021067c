"""Decodes a .mcwc archive into its safetensors files, by src/format/SPEC.md alone.

    python spec_decoder.py ARCHIVE DIRECTORY [BASE_ARCHIVE...]

Section numbers are those of SPEC.md. Written to be read beside it, and to share nothing with the program that it checks:
slow, whole tensors at a time, with every check that the text asks for. Prints one line per file once its SHA-256 is
checked, then what the archive was made of; any error ends it with exit status 1. spec_format.py has sections 1 to 3,
4.2 and 5, spec_permutation.py has section 8,
spec_based.py has sections 4.3, 7.7 and 7.8, spec_predictors.py has 5.2 and the end of 7.4, this file the rest.
"""

import hashlib
import sys
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
from spec_based import based_elements, read_base_tensor, read_based, references
from spec_blake3 import blake3
from spec_format import Archive, Invalid, Reader, crc32c, integers, require
from spec_permutation import permutation_of
from spec_predictors import network_predictions, read_network, read_vectors, vector_predictions

FLOAT = np.float32
MET = Counter()  # what the archive was made of


# Section 4: side information


class Side:
    """The side information of a record, each part header held against its tensor."""

    def __init__(self, archive, record):
        data = archive.data[record.at : record.at + record.side_length]
        require(crc32c(data) == record.side_checksum, "side information checksum")
        reader = Reader("side information", data)
        self.permutation = None
        if reader.flag("permutation flag"):
            g, m = reader.varint("permutation groups", 2**20), reader.varint("permutation members", 2**20)
            require(1 <= g * m <= 2**20, f"permutation members: {g} times {m}")
            below = record.reference and side_of(archive, record.reference).permutation
            coded = reader.blob("permutation digits")
            self.permutation = permutation_of(coded, g, m, below)
            MET[f"permutation coding {coded[0]}"] += 1
        self.parts, at = [], record.at + record.side_length
        for file, tensor, length in record.parts:
            part = Part(archive, record, self, archive.files[file][2][tensor], reader)
            require(part.length == length, f"part length: {length}, the strips have {part.length}")
            part.at, at = at, at + length
            self.parts.append(part)
        reader.end()


def side_of(archive, record):
    if not hasattr(record, "side"):
        record.side = Side(archive, record)
    return record.side


CODINGS = {0: "raw", 1: "split", 2: "quantized", 3: "units", 4: "based", 5: "quantized"}


class Part:
    def __init__(self, archive, record, side, tensor, reader):
        self.archive, self.record, self.tensor = archive, record, tensor
        number = reader.u8("part coding")
        require(number in CODINGS, f"part coding {number}")
        self.coding = CODINGS[number]
        self.trellis = self.vectors = self.reference = self.stored_zero_bits = self.factors = None
        self.stored_column_scales = self.column_scales = None
        self.is_from_base = number == 5
        if self.coding == "split":
            require(tensor.bits in (8, 16, 32, 64), f"part coding: split {tensor.dtype}")
            self.carrier = reader.u8("carrier", below=3)
            require(self.carrier == 0 or tensor.dtype == "F32", f"carrier of {tensor.dtype}")
            self.bits = 16 if self.carrier else tensor.bits
            self.raw_bits = reader.u8("raw bits")
            require(1 <= self.raw_bits <= min(56, self.bits), f"raw bits: {self.raw_bits}")
            self.stored_zero_bits = reader.blob("zero bits") if reader.u8("split flags", below=2) else None
        if self.coding == "units":
            self.read_units(reader)
        if self.coding == "based":
            read_based(self, reader)
            self.bits = tensor.bits
        if self.is_from_base:
            read_base_tensor(self, reader, rows_may_differ=True)
        per_run = self.read_quantizer(reader, side) if self.coding == "quantized" else []
        has_symbols = self.coding in ("split", "quantized", "units") or self.coding == "based" and self.has_difference
        if self.vectors:
            self.read_layout(reader)
        elif has_symbols:
            self.read_streams(reader)
        count = reader.count("strips")
        self.checksums = [reader.u32("strip checksums") for _ in range(count)]
        if self.coding == "raw":
            self.strips, self.length = -(-tensor.length // 131072), tensor.length
        elif self.vectors:
            self.lay_out_vectors()
        elif not has_symbols:
            self.strips = self.length = 0
        else:
            self.lay_out_strips()
        require(count == self.strips, f"strips: {count}, expected {self.strips}")
        if self.coding == "quantized":
            self.set_coefficients(per_run)

    def read_units(self, reader):
        require(self.archive.has_units, "part coding: units without feature 3")
        self.bits, self.raw_bits = reader.u8("unit bits"), reader.u8("raw bits")
        require(self.bits in (4, 8, 16, 32, 64), f"unit bits: {self.bits}")
        require(8 * self.tensor.length % self.bits == 0, f"unit bits: {self.bits} in {self.tensor.length} bytes")
        require(self.raw_bits <= min(56, self.bits), f"raw bits: {self.raw_bits}")
        flags = reader.u8("units flags", below=4)
        self.differences, self.values = flags & 2 != 0, None
        if flags & 1:
            require(self.raw_bits == 0, "units flags: values beside raw bits")
            count = reader.count("values", 61)
            require(count >= 1, "values: none")
            size = -(-self.bits // 8)
            self.values = [int.from_bytes(reader.take("value", size), "little") for _ in range(count)]
            require(max(self.values) < 2**self.bits, "value")

    def symbols(self):
        """Symbols of the part: its elements, or its units."""
        return 8 * self.tensor.length // self.bits if self.coding == "units" else self.tensor.elements

    def read_quantizer(self, reader, side):
        """The quantizer fields; arrays of one integer per run are given back, for the number of runs is read later."""
        require(self.tensor.dtype in ("F32", "F16", "BF16"), f"part coding: quantized {self.tensor.dtype}")
        self.step, self.raw_bits = reader.f32("step"), reader.u8("raw bits", below=9)
        require(self.step > 0, f"step: {self.step}")
        flags, per_run = reader.u8("quantizer flags", below=64), []
        if flags & 8:
            self.trellis = reader.u8("trellis", below=2)
            self.state_bits = reader.u8("trellis state bits", below=9)
            require(self.state_bits >= 3, f"trellis state bits: {self.state_bits}")
        if flags & 16:
            require(not flags & 8 and self.raw_bits == 0, "quantizer flags: vectors beside others")
            numbers = [reader.varint("vector codebook", 2**8 - 1) for _ in range(2)]
            require(max(numbers) < len(self.archive.codebooks), f"vector codebook: {numbers}")
            self.vectors = [self.archive.codebooks[number] for number in numbers]
            require(self.vectors[0].elements == self.vectors[1].elements, "vector codebook: lengths")
        if flags & 1:
            per_run.append(("scales", self.step, reader.blob("scales")))
        if flags & 2:
            per_run.append(("means", reader.f32("mean step"), reader.blob("means")))
        if flags & 32:
            require(self.archive.has_column_scales, "quantizer flags: column scales without feature 4")
            self.stored_column_scales = reader.blob("column scales")
        require(not (flags & 20 and self.is_from_base), "quantizer flags: a prediction or vectors from a base")
        if flags & 4:
            require(self.record.reference is not None, "reference part: the record has no reference")
            parts = side_of(self.archive, self.record.reference).parts
            self.reference = parts[reader.varint("reference part", min(2**20, len(parts) - 1))]
            other = self.reference.tensor
            require((other.dtype, other.shape) == (self.tensor.dtype, self.tensor.shape), "reference part: shape")
            self.axis = self.placement = None
            if reader.flag("placement flag"):
                require(side.permutation is not None, "placement: no permutation")
                self.read_placement(reader, side.permutation)
            self.predictor = reader.u8("predictor", below=4 if self.archive.has_predictors else 2)
            if self.predictor == 0:
                self.gain = reader.f32("gain")
            elif self.predictor == 2:
                read_vectors(self, reader)
            elif self.predictor == 3:
                read_network(self, reader, side_of)
            else:
                units = reader.f32("gain step"), reader.f32("offset step")
                per_run += [(name, unit, reader.blob(name)) for name, unit in zip(("gains", "offsets"), units)]
        return per_run

    def read_placement(self, reader, permutation):
        """Section 8.3: for each index along the axis, the index of the reference that it is predicted from."""
        self.axis, repeat = reader.u8("placement axis"), reader.varint("placement repeat", 2**20)
        per_member, unit = reader.flag("placement per member"), reader.varint("placement unit", 2**32 - 1)
        blocks = permutation.members() if per_member else permutation.outer
        self.placement = repeat, per_member, unit
        require(self.axis < len(self.tensor.shape), f"placement axis: {self.axis} of {self.tensor.shape}")
        extent = self.tensor.shape[self.axis]
        require(0 not in self.tensor.shape and extent == repeat * len(blocks) * unit < 2**32, f"placement: does not fill {extent}")
        self.motion = self.motion_of(blocks)

    def motion_of(self, blocks):
        repeat, _, unit = self.placement
        return [
            (repetition * len(blocks) + block) * unit + element
            for repetition in range(repeat)
            for block in blocks
            for element in range(unit)
        ]

    def second_motion(self):
        """Section 7.4: where the second context is found: by this record's permutation, then by the reference record's."""
        own = side_of(self.archive, self.record).permutation
        below = side_of(self.archive, self.record.reference).permutation
        if below is None or (len(below.outer), len(below.members())) != (len(own.outer), len(own.members())):
            return self.motion
        then = self.motion_of(below.members() if self.placement[1] else below.outer)
        return [then[index] for index in self.motion]

    def read_streams(self, reader):
        numbers = [reader.varint("part table", 2**12 - 1) for _ in range(reader.count("part tables", 2**12))]
        require(all(number < len(self.archive.tables) for number in numbers), "part table")
        self.tables = [self.archive.tables[number] for number in numbers]
        if self.trellis == 1:
            require(len(numbers) % 2 == 0, "part tables: pairs of tables")
            self.tables = list(zip(self.tables[::2], self.tables[1::2]))
        choices = reader.blob("table of run") if len(numbers) > 1 else b"\0\0"
        self.read_layout(reader)
        self.lanes = reader.u8("lanes")
        require(self.lanes in (1, 2, 4, 8, 16, 32), f"lanes: {self.lanes}")
        require(self.tables or not self.runs, "part tables: none")
        zeros = b"\0\0" if self.stored_zero_bits is None else self.stored_zero_bits
        most = max(len(self.tables), 1) - 1
        if self.coding == "based":
            self.table_raw_bits = integers(self.stored_table_raw_bits, len(numbers), 0, self.bits, "table raw bits")
            self.raw_bits = max(self.table_raw_bits.tolist(), default=0)
            self.table_of_run = np.cumsum(integers(choices, self.runs, -most, most, "table of run"))
            require(all(0 <= number <= most for number in self.table_of_run), "table of run: after a step")
            self.zero_bits = [self.raw_bits - int(self.table_raw_bits[number]) for number in self.table_of_run]
        else:
            self.zero_bits = integers(zeros, self.runs, 0, max(self.raw_bits - 1, 0), "zero bits").tolist()
            MET["zero bits"] += any(self.zero_bits)
            self.table_of_run = integers(choices, self.runs, 0, most, "table of run")
        self.words = integers(reader.blob("strip words"), self.strips, 0, 2**17, "strip words")
        self.exceptions = integers(reader.blob("strip exceptions"), self.strips, 0, 2**16, "strip exceptions")

    def read_layout(self, reader):
        self.run_elements = reader.varint("run elements", 2**16)
        self.runs_per_strip = reader.varint("runs per strip", 2**16)
        require(1 <= self.run_elements * self.runs_per_strip <= 2**16, "runs per strip")
        require(self.coding != "units" or self.run_elements * self.bits % 8 == 0, "run elements: no whole bytes")
        self.runs = -(-self.symbols() // self.run_elements)
        self.strips = -(-self.runs // self.runs_per_strip)

    def lay_out_vectors(self):
        """Section 6.1: the lengths of each strip's runs in elements and in bytes, and where the strip begins."""
        bits = sum(codebook.index_bits for codebook in self.vectors)
        full, self.layout, self.length = self.run_elements * self.runs_per_strip, [], 0
        for strip in range(self.strips):
            elements = min(full, self.tensor.elements - strip * full)
            lengths = [min(self.run_elements, elements - at) for at in range(0, elements, self.run_elements)]
            sizes = [-(-(-(-n // self.vectors[0].elements) * bits) // 8) for n in lengths]
            self.layout.append((self.length, lengths, sizes))
            self.length += sum(sizes)

    def lay_out_strips(self):
        """Section 6: where the pieces of each strip lie, and how long the body is."""
        self.exception_bytes = 2 if self.coding == "quantized" else -(-self.bits // 8)
        full, self.layout, self.length = self.run_elements * self.runs_per_strip, [], 0
        for strip in range(self.strips):
            symbols = min(full, self.symbols() - strip * full)
            lengths = [min(self.run_elements, symbols - at) for at in range(0, symbols, self.run_elements)]
            words, exceptions = int(self.words[strip]), int(self.exceptions[strip])
            require(exceptions <= symbols, f"strip exceptions: {exceptions}")
            bits = [self.raw_bits - zeros for zeros in self.zero_bits[strip * self.runs_per_strip :][: len(lengths)]]
            raw = sum(n * (r // 8) + 4 * (r % 8) * -(-n // 32) for n, r in zip(lengths, bits))
            sizes = [4 * self.lanes, 2 * words, raw, 2 * exceptions, self.exception_bytes * exceptions]
            self.layout.append((self.length, sizes, lengths, bits))
            self.length += sum(sizes)

    def set_coefficients(self, per_run):
        """Section 7.3: step, mean, gain and offset of every run."""
        values = {}
        for name, unit, stored in per_run:
            low, high = (-800, 807) if name == "scales" else (-(2**24), 2**24)
            number = integers(stored, self.runs, low, high, name)
            if name == "scales":
                values[name] = unit * np.ldexp((8 + number % 8).astype(FLOAT) / FLOAT(8), number // 8)
            else:
                values[name] = unit * number.astype(FLOAT)
            require(values[name].dtype == FLOAT and np.isfinite(values[name]).all(), f"{name}: not finite")
        self.steps = values.get("scales", np.full(self.runs, self.step))
        self.means, self.offsets = values.get("means"), values.get("offsets")
        if self.stored_column_scales is not None:
            number = integers(self.stored_column_scales, self.run_elements, -800, 807, "column scales")
            self.column_scales = np.ldexp((8 + number % 8).astype(FLOAT) / FLOAT(8), number // 8)
        if self.reference and self.predictor < 2:
            self.gains = values["gains"] if "gains" in values else np.full(self.runs, self.gain)


# Section 6: strips


def strip_pieces(part, number):
    """The pieces of a strip after its checksum, and the lengths of its runs."""
    offset, sizes, lengths, bits = part.layout[number]
    stored = part.archive.data[part.at + offset : part.at + offset + sum(sizes)]
    require(crc32c(stored) == part.checksums[number], f"strip {number}: checksum")
    ends = np.cumsum(sizes).tolist()
    states, words, planes, positions, values = (
        stored[end - size : end] for end, size in zip(ends, sizes)
    )
    positions = np.frombuffer(positions, "<u2").tolist()
    require(all(a < b for a, b in pairwise(positions)), f"strip {number}: exception positions")
    require(not positions or positions[-1] < sum(lengths), f"strip {number}: exception position")
    MET["exceptions"] += len(positions)
    exceptions = dict(zip(positions, np.frombuffer(values, f"<V{part.exception_bytes}")))
    raw = raw_numbers(planes, part.raw_bits, bits, lengths)
    return np.frombuffer(states, "<u4").tolist(), np.frombuffer(words, "<u2").tolist(), raw, exceptions, lengths


def raw_numbers(planes, raw_bits, stored_bits, lengths):
    raw, at = [], 0
    for length, bits in zip(lengths, stored_bits):
        whole, rest, zeros = bits // 8, bits % 8, raw_bits - bits
        groups = at + whole * length
        for i in range(length):
            number = sum(planes[at + plane * length + i] << 8 * plane for plane in range(whole))
            for k in range(rest):
                word = groups + 4 * (i // 32 * rest + k)
                number |= (planes[word + i % 32 // 8] >> i % 8 & 1) << (8 * whole + k)
            raw.append(number << zeros)
        at = groups + 4 * rest * -(-length // 32)
    return raw


TRELLIS = {3: (5, 2), 4: (9, 2), 5: (18, 4), 6: (33, 10), 7: (78, 43), 8: (166, 121)}


def decode_symbols(part, number, take):
    """Entropy decoding; calls `take(table, position, raw number, state of the trellis)`, which gives the symbol's value
    and, where there is a trellis, the parity of its code."""
    x, words, raw, exceptions, lengths = strip_pieces(part, number)
    trellis, used, values = [0] * part.lanes, 0, []
    for run, length in enumerate(lengths):
        choice = part.tables[part.table_of_run[number * part.runs_per_strip + run]]
        for i in range(length):
            j = i % part.lanes
            table = choice[trellis[j] % 2] if part.trellis == 1 else choice
            q = x[j] % 4096
            k = table.owner[q]
            x[j] = table.frequency[k] * (x[j] // 4096) + q - table.first[k]
            if x[j] < 65536:
                require(used < len(words), f"strip {number}: a word is missing")
                x[j], used = x[j] * 65536 + words[used], used + 1
            value, second_bit = take(table, k, raw[len(values)], trellis[j])
            values.append(value)
            if part.trellis is not None:
                a, b = TRELLIS[part.state_bits]
                trellis[j] = trellis[j] // 2 ^ a * (trellis[j] % 2) ^ b * second_bit
    require(used == len(words) and x == [65536] * part.lanes, f"strip {number}: the lanes do not end")
    return values, exceptions


# Section 7: elements


def to_float(bits, dtype):
    """Section 7.5: binary32 from an element's bits, exactly."""
    if dtype == "F32":
        return bits.view(FLOAT)
    if dtype == "BF16":
        return (bits.astype(np.uint32) << 16).view(FLOAT)
    bits = bits.astype(np.uint32)
    sign, exponent, mantissa = bits >> 15 << 31, bits >> 10 & 31, bits & 1023
    small = (mantissa.astype(FLOAT) * FLOAT(2**-24)).view(np.uint32)
    normal = exponent + 112 << 23 | mantissa << 13
    special = np.uint32(255 << 23) | mantissa << 13
    return (sign | np.select([exponent == 0, exponent == 31], [small, special], normal)).view(FLOAT)


def from_float(values, dtype):
    """Section 7.5: an element's bits from binary32, to nearest, ties to even."""
    if dtype == "F32":
        return values.view("<u4")
    if dtype == "F16":
        return values.astype(np.float16).view("<u2")
    bits = values.view(np.uint32)
    return (bits + np.uint32(0x7FFF) + (bits >> 16 & 1) >> 16).astype("<u2")


def split_elements(part):
    R, B = part.raw_bits, part.bits

    def take(table, position, raw, _):
        magnitude = (table.code[position] % 65536 << R - 1 | raw % 2 ** (R - 1)) % 2 ** (B - 1)
        return (raw >> R - 1 & 1) << B - 1 | magnitude, 0

    elements = []
    for number in range(part.strips):
        decoded, exceptions = decode_symbols(part, number, take)
        for position, value in exceptions.items():
            decoded[position] = int.from_bytes(value.tobytes(), "little")
        elements += decoded
    bits = np.array(elements, f"<u{B // 8}")
    return bits if part.carrier == 0 else to_float(bits, "BF16" if part.carrier == 1 else "F16").view("<u4")


def units(part):
    """Section 7.2: the bytes of a part of units."""

    def take(table, position, raw, _):
        code = table.code[position]
        if part.values is not None:
            return part.values[code] if 0 <= code < len(part.values) else 0, 0
        return (code * 2**part.raw_bits + raw) % 2**part.bits, 0

    data = b""
    for number in range(part.strips):
        numbers, exceptions = decode_symbols(part, number, take)
        for position, value in exceptions.items():
            numbers[position] = int.from_bytes(value.tobytes(), "little") % 2**part.bits
        if part.differences:
            before = 0
            for i in range(len(numbers)):
                before = numbers[i] = (before + numbers[i]) % 2**part.bits
        if part.bits == 4:
            numbers = [low | high << 4 for low, high in zip(numbers[::2], numbers[1::2])]
        data += b"".join(n.to_bytes(-(-part.bits // 8), "little") for n in numbers)
    return data


def vector_points(part):
    """Section 7.3: what the vectors' codewords add up to, in steps."""
    first, second = part.vectors
    all_points = []
    for number, (offset, lengths, sizes) in enumerate(part.layout):
        stored = part.archive.data[part.at + offset : part.at + offset + sum(sizes)]
        require(crc32c(stored) == part.checksums[number], f"strip {number}: checksum")
        at = 0
        for length, size in zip(lengths, sizes):
            bits, run = int.from_bytes(stored[at : at + size], "little"), []
            while len(run) < length:
                i, bits = bits % 2**first.index_bits, bits >> first.index_bits
                k, bits = bits % 2**second.index_bits, bits >> second.index_bits
                run += (first.codewords[i] + second.codewords[k]).tolist()
            all_points += run[:length]
            at += size
    return np.array(all_points, FLOAT)


def points(part):
    """What every code of the part stands for, in steps."""

    def scalar(table, position, raw, _):
        if part.raw_bits == 0:
            return FLOAT(table.code[position]) + table.point[position], 0
        return FLOAT(table.code[position] * 2**part.raw_bits + raw), 0

    def trellis(table, position, raw, state):
        code = table.code[position] * 2**part.raw_bits + raw
        multiple = 2 * code + state % 2
        return FLOAT(multiple) + table.point[position], code & 1

    all_points = []
    for number in range(part.strips):
        decoded, exceptions = decode_symbols(part, number, scalar if part.trellis is None else trellis)
        for position, value in exceptions.items():
            decoded[position] = FLOAT(int.from_bytes(value.tobytes(), "little", signed=True))
        all_points += decoded
    return np.array(all_points, FLOAT)


def moved_reference(part, other, motion):
    reference = np.frombuffer(decoded(other), f"<u{part.tensor.bits // 8}")
    reference = to_float(reference, part.tensor.dtype).reshape(part.tensor.shape)
    return reference if part.axis is None else np.take(reference, motion(), axis=part.axis)


def prediction_of(part, run):
    """Section 7.4."""
    reference = moved_reference(part, part.reference, lambda: part.motion)
    if part.predictor == 2:
        return vector_predictions(part, reference).reshape(-1)
    if part.predictor == 3:
        seconds = [moved_reference(part, part.second, part.second_motion)] if part.second else []
        return network_predictions(part, [context.reshape(-1) for context in [reference, *seconds]])
    prediction = part.gains[run] * reference.reshape(-1)
    return prediction if part.offsets is None else prediction + part.offsets[run]


def quantized_elements(part):
    run = np.arange(part.tensor.elements) // part.run_elements
    values = (vector_points if part.vectors else points)(part) * part.steps[run]
    if part.means is not None:
        values = values + part.means[run]
    if part.column_scales is not None:
        values = values * part.column_scales[np.arange(part.tensor.elements) % part.run_elements]
    if part.reference:
        values = values + prediction_of(part, run)
    if part.is_from_base:
        values = values + to_float(references(part, decoded, to_float, from_float), part.tensor.dtype)
    require(values.dtype == FLOAT, "numpy has widened binary32")
    return from_float(values, part.tensor.dtype)


def decoded(part):
    """The bytes of a part's tensor."""
    if not hasattr(part, "bytes"):
        if part.coding == "raw":
            part.bytes = part.archive.data[part.at : part.at + part.length]
            for number, checksum in enumerate(part.checksums):
                strip = part.bytes[131072 * number : 131072 * (number + 1)]
                require(crc32c(strip) == checksum, f"strip {number}: checksum")
        elif part.coding == "units":
            part.bytes = units(part)
        elif part.coding == "based":
            start = references(part, decoded, to_float, from_float)
            part.bytes = based_elements(part, start, decode_symbols).tobytes()
        else:
            part.bytes = (split_elements if part.coding == "split" else quantized_elements)(part).tobytes()
        count(part)
    return part.bytes


def count(part):
    """For the tests, which must know that they have met what they are for."""
    MET[part.coding] += 1
    if part.coding == "split":
        MET[f"carrier {part.carrier}"] += 1
    if part.coding == "units":
        MET[f"units of {part.bits} bits"] += 1
        MET["unit values"] += part.values is not None
        MET["unit differences"] += part.differences
    if part.coding == "based":
        MET["difference" if part.has_difference else "no difference"] += 1
        MET["low rank"] += part.factors is not None
        MET["other rows"] += part.base.files[part.base_place[0]][2][part.base_place[1]].shape != part.tensor.shape
    if part.coding == "quantized":
        MET["predicted"] += part.reference is not None
        MET["quantized from a base"] += part.is_from_base
        MET["moved"] += part.reference is not None and part.axis is not None
        MET["row affine"] += part.reference is not None and part.offsets is not None
        MET["motion vectors"] += part.reference is not None and part.predictor == 2
        MET["network"] += part.reference is not None and part.predictor == 3
        MET["two contexts"] += part.reference is not None and part.predictor == 3 and part.second is not None
        MET["trellis"] += part.trellis is not None
        MET["256 states"] += part.trellis is not None and part.state_bits == 8
        MET["table pairs"] += part.trellis == 1
        MET["means"] += part.means is not None
        MET["column scales"] += part.column_scales is not None
        MET["scales"] += len(set(part.steps.tolist())) > 1
        MET["raw bits"] += part.raw_bits > 0
        MET["vectors"] += part.vectors is not None
        MET["points"] += not part.vectors and any(table.point.any() for table in np.ravel(part.tables))


def opened(path, others, depth=0):
    """An archive with its bases, found among `others`, and the part of every tensor."""
    archive = Archive(Path(path).read_bytes())
    require(depth <= 4, "bases: more than 4 below one another")
    archive.bases = []
    for content_id in archive.base_ids:
        found = [other for other in others if Archive(Path(other).read_bytes()).content_id == content_id]
        require(found, f"base {content_id.hex()}: not given")
        archive.bases.append(opened(found[0], others, depth + 1))
    archive.part_of = {}
    for record in archive.records:
        for (file, tensor, _), part in zip(record.parts, side_of(archive, record).parts):
            archive.part_of[file, tensor] = part
    return archive


def main(path, directory, *others):
    archive = opened(path, others)
    part_of = archive.part_of
    for file, (name, header, tensors, sha256, tree) in enumerate(archive.files):
        data = header + b"".join(decoded(part_of[file, tensor]) for tensor in range(len(tensors)))
        require(hashlib.sha256(data).digest() == sha256, f"{name}: decoded SHA-256")
        require(tree is None or blake3(data) == tree, f"{name}: decoded BLAKE3")
        MET["tree digests"] += tree is not None
        (Path(directory) / name).write_bytes(data)
        print(f"{name}: {len(data)} bytes, SHA-256 as stated")
    print("; ".join(f"{what}: {times}" for what, times in sorted(MET.items()) if times))


if __name__ == "__main__":
    try:
        with np.errstate(all="ignore"):
            main(*sys.argv[1:])
    except Invalid as error:
        sys.exit(f"spec_decoder: {sys.argv[1]}: {error}")
