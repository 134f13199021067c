"""The bytes of a .mcwc archive, by src/format/SPEC.md alone: sections 1 to 3, 4.2 and 5. See spec_decoder.py."""

import hashlib
import json
import struct
import zlib
from collections import Counter

import numpy as np


class Invalid(Exception):
    """The archive is not what SPEC.md allows."""


def require(condition, what):
    if not condition:
        raise Invalid(what)


# Section 1: conventions


def crc32c_table():
    for number in range(256):
        for _ in range(8):
            number = number >> 1 ^ (0x82F63B78 if number & 1 else 0)  # 0x1EDC6F41 with its bits reflected
        yield number


CRC_TABLE = list(crc32c_table())


def crc32c(data):
    crc = 0xFFFFFFFF
    for byte in data:
        crc = crc >> 8 ^ CRC_TABLE[(crc ^ byte) & 255]
    return crc ^ 0xFFFFFFFF


assert crc32c(b"123456789") == 0xE3069283


class Reader:
    def __init__(self, section, data):
        self.section, self.data, self.at = section, bytes(data), 0

    def take(self, name, length):
        require(length <= len(self.data) - self.at, f"{self.section}: {name} at byte {self.at} is cut off")
        self.at += length
        return self.data[self.at - length : self.at]

    def fixed(self, name, code):
        return struct.unpack("<" + code, self.take(name, struct.calcsize("<" + code)))[0]

    def u8(self, name, below=256):
        value = self.fixed(name, "B")
        require(value < below, f"{self.section}: {name} is {value}")
        return value

    def u16(self, name):
        return self.fixed(name, "H")

    def u32(self, name):
        return self.fixed(name, "I")

    def u64(self, name):
        return self.fixed(name, "Q")

    def f32(self, name):
        value = np.float32(self.fixed(name, "f"))
        require(np.isfinite(value), f"{self.section}: {name} is {value}")
        return value

    def varint(self, name, limit=2**64 - 1):
        value = shift = 0
        while True:
            byte = self.u8(name)
            value |= (byte & 127) << shift
            if byte < 128:
                break
            shift += 7
        require(shift == 0 or byte != 0, f"{self.section}: {name} is padded")
        require(value <= limit, f"{self.section}: {name} is {value}, the limit is {limit}")
        return value

    def zigzag(self, name, low, high):
        value = self.varint(name)
        value = value // 2 if value % 2 == 0 else -(value + 1) // 2
        require(low <= value <= high, f"{self.section}: {name} is {value}")
        return value

    def count(self, name, limit=2**64 - 1):
        return self.varint(name, min(limit, len(self.data) - self.at))

    def digest(self, name):
        return self.take(name, 32)

    def blob(self, name, limit=2**30):
        return self.take(name, self.varint(name, limit))

    def text(self, name):
        return self.blob(name, 2**16).decode("utf-8")

    def flag(self, name):
        return self.u8(name, below=2) == 1

    def end(self):
        require(self.at == len(self.data), f"{self.section}: {len(self.data) - self.at} bytes are left over")


# Section 4.2: integer arrays


def integers(stored, n, low, high, name):
    reader = Reader(name, stored)
    form, lowest = reader.u8("form", below=3), reader.zigzag("lowest value", -(2**31), 2**31 - 1)
    if form == 0:
        require(low <= lowest <= high, f"{name}: {lowest}")
        values = np.full(n, lowest, np.int64)
    elif form == 1:
        width = reader.u8("width")
        require(1 <= width <= 32, f"{name}: width {width}")
        packed = int.from_bytes(reader.take("packed values", -(-n * width // 8)), "little")
        values = np.array([lowest + (packed >> width * i & (1 << width) - 1) for i in range(n)], np.int64)
    else:
        require(n <= 512 * len(stored), f"{name}: {n} integers in {len(stored)} bytes")
        frequency = [reader.varint("frequency", 4095) for _ in range(reader.count("span", 61))]
        require(sum(frequency) == 4096, f"{name}: frequencies")
        owner = [k for k, times in enumerate(frequency) for _ in range(times)]
        x, values = reader.u32("state"), np.zeros(n, np.int64)
        for i in range(n):
            q = x % 4096
            k = owner[q]
            x = frequency[k] * (x // 4096) + q - sum(frequency[:k])
            if x < 65536:
                x = x * 65536 + reader.u16("words")
            values[i] = lowest + k
        require(x == 65536, f"{name}: ends in state {x}")
    reader.end()
    require(n == 0 or low <= values.min() and values.max() <= high, f"{name}: out of {low} to {high}")
    return values


# Sections 2, 3 and 5: preamble, index, tables

BITS = {
    name: bits
    for bits, names in {
        4: "F4",
        6: "F6_E2M3 F6_E3M2",
        8: "BOOL U8 I8 F8_E5M2 F8_E4M3 F8_E8M0",
        16: "I16 U16 F16 BF16",
        32: "I32 U32 F32",
        64: "C64 F64 I64 U64",
    }.items()
    for name in names.split()
}


class Tensor:
    def __init__(self, name, described):
        self.name, self.dtype, self.shape = name, described["dtype"], described["shape"]
        self.begin, end = described["data_offsets"]
        numbers = [*self.shape, self.begin, end]
        require(all(type(number) is int and 0 <= number < 2**64 for number in numbers), f"{name}: {numbers}")
        self.length = end - self.begin
        self.elements = int(np.prod(self.shape, dtype=object))
        self.bits = BITS.get(self.dtype)
        require(self.bits is None or 8 * self.length == self.bits * self.elements, f"{name}: length")


def once(pairs):
    require(len(dict(pairs)) == len(pairs), "a name of a header comes twice")
    return dict(pairs)


def tensors_of(header):
    require(len(header) >= 8 and struct.unpack("<Q", header[:8])[0] == len(header) - 8, "file header: length")
    described = json.loads(header[8:], object_pairs_hook=once)
    described.pop("__metadata__", None)
    tensors = sorted((Tensor(*item) for item in described.items()), key=lambda tensor: (tensor.begin, tensor.length))
    end = 0
    for tensor in tensors:
        require(tensor.begin == end, f"{tensor.name}: begins at {tensor.begin}, expected {end}")
        end += tensor.length
    return tensors


class Table:
    def __init__(self, reader):
        positions = reader.u8("table positions")
        require(2 <= positions <= 61, f"table positions: {positions}")
        has_points = reader.flag("table flags")
        self.code = [reader.zigzag("table code", -32768, 32767) for _ in range(positions)]
        self.frequency = [reader.varint("table frequency", 4095) for _ in range(positions)]
        points = reader.take("table points", positions) if has_points else bytes(positions)
        self.point = np.frombuffer(points, np.int8).astype(np.float32) / np.float32(256)
        require(len(set(self.code)) == positions, "table code: comes twice")
        require(min(self.frequency) > 0 and sum(self.frequency) == 4096, "table frequencies")
        self.first = [sum(self.frequency[:k]) for k in range(positions)]
        inside = Counter(boundary // 32 for boundary in self.first if boundary % 32)
        require(max(inside.values(), default=0) <= 3, "table frequencies: the depth rule")
        self.owner = [k for k, frequency in enumerate(self.frequency) for _ in range(frequency)]


class Codebook:
    def __init__(self, reader):
        self.elements = reader.u8("codebook elements", below=17)
        require(self.elements >= 2, f"codebook elements: {self.elements}")
        self.index_bits = reader.u8("codebook index bits", below=13)
        require(self.index_bits >= 1, "codebook index bits: 0")
        values = reader.take("codewords", 2 * self.elements << self.index_bits)
        self.codewords = np.frombuffer(values, "<f2").astype(np.float32).reshape(-1, self.elements)
        require(np.isfinite(self.codewords).all(), "codewords: not finite")


class Record:
    def __init__(self, reader, records, layers, block_types):
        layer = reader.varint("record layer", 2**20)
        require(layer <= layers, f"record layer: {layer - 1}")
        self.block_type = reader.u8("record block type", below=block_types)
        distance = reader.varint("record reference", len(records))
        self.reference = records[-distance] if distance else None
        self.below = 0 if distance == 0 else self.reference.below + 1
        require(distance == 0 or self.reference.block_type == self.block_type, "record reference: block type")
        require(self.below <= 256, "record reference: a chain of more than 256 steps")
        self.side_length, self.side_checksum = reader.varint("side length", 2**30), reader.u32("side checksum")
        self.parts = []
        for _ in range(reader.count("record parts", 2**20)):
            file, tensor = reader.varint("part file", 2**16), reader.varint("part tensor", 2**32 - 1)
            self.parts.append((file, tensor, reader.varint("part length", 2**56 - 1)))
        self.length = self.side_length + sum(length for _, _, length in self.parts)


class Archive:
    def __init__(self, data):
        self.data = data
        preamble = Reader("preamble", data[:64])
        require(preamble.take("magic", 4) == b"MCWC", "magic")
        require(preamble.u16("version") == 1, "version: a newer program is needed")
        require(preamble.u16("flags") == 0, "flags")
        features, length = preamble.u64("required features"), preamble.u64("file length")
        index_offset, index_length = preamble.u64("index offset"), preamble.u64("index length")
        index_checksum = preamble.u32("index checksum")
        require(preamble.take("reserved", 16) == bytes(16), "reserved")
        require(preamble.u32("preamble checksum") == crc32c(data[:60]), "preamble checksum")
        require(features & ~63 == 0, f"required features: {features:#x}")
        self.features = features
        self.has_tree_digests = features & 1 != 0
        require(length == len(data), "file length")
        require(64 <= index_offset <= length, "index offset")
        stored = data[index_offset:]
        require(index_length <= min(2**28, 1032 * len(stored)), "index length")
        require(len(stored) <= 2**29, "stored index")
        require(crc32c(stored) == index_checksum, "index checksum")
        inflater = zlib.decompressobj(wbits=-15)
        index = inflater.decompress(stored, index_length + 1)
        require(len(index) == index_length and inflater.eof and not inflater.unused_data, "index: deflate stream")
        self.read_index(Reader("index", index), index_offset, features)

    def read_index(self, reader, index_offset, features):
        reader.text("architecture")
        layers = reader.varint("layers", 2**20)
        reader.varint("keyframe interval", 256)
        content_id = reader.digest("content id")
        self.files = []
        for _ in range(reader.count("files", 2**16)):
            name, header = reader.text("file name"), reader.blob("file header", 100_000_008)
            require(name not in ("", ".", "..") and "/" not in name and "\0" not in name, f"file name {name!r}")
            decoded, _ = reader.digest("decoded SHA-256"), reader.digest("source SHA-256")
            tree = reader.digest("decoded BLAKE3") if self.has_tree_digests else None
            self.files.append((name, header, tensors_of(header), decoded, tree))
        require(len({file[0] for file in self.files}) == len(self.files), "file name: comes twice")
        require(content_id == hashlib.sha256(b"".join(file[3] for file in self.files)).digest(), "content id")
        self.tables = [Table(reader) for _ in range(reader.count("tables", 2**12))]
        self.has_units = features & 8 != 0
        self.has_column_scales = features & 16 != 0
        self.codebooks = []
        if features & 2:
            self.codebooks = [Codebook(reader) for _ in range(reader.count("codebooks", 2**8))]
        self.has_predictors, self.networks = features & 32 != 0, []
        if self.has_predictors:
            from spec_predictors import Network  # which needs this file

            self.networks = [Network(reader) for _ in range(reader.count("networks", 16))]
        block_types = [reader.text("block type") for _ in range(reader.count("block types", 256))]
        self.records = []
        for _ in range(reader.count("records", 2**20)):
            self.records.append(Record(reader, self.records, layers, len(block_types)))
        self.content_id, self.base_ids = content_id, []
        for _ in range(reader.count("bases", 16)):
            self.base_ids.append(reader.digest("base content id")), reader.text("base name")
        require(bool(self.base_ids) == bool(self.features & 4), "bases: announced by feature 2")
        for _ in range(reader.count("provenance", 2**10)):
            reader.text("provenance key"), reader.text("provenance value")
        reader.end()
        at = 64
        for record in self.records:
            record.at, at = at, at + record.length
        require(at == index_offset, f"records end at byte {at}, the index starts at {index_offset}")
        parts = [(file, tensor) for record in self.records for file, tensor, _ in record.parts]
        tensors = [(file, tensor) for file, entry in enumerate(self.files) for tensor in range(len(entry[2]))]
        require(sorted(parts) == tensors, "part tensor: every tensor once")
