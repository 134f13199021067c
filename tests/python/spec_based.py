"""Parts that start from a base archive, by SPEC.md sections 4.3, 7.7 and 7.8; beside spec_decoder.py, which has the rest."""

import numpy as np
from spec_format import integers, require


def read_base_tensor(part, reader, rows_may_differ):
    """The first fields of section 4.3. `rows_may_differ` may be told later, where a flag says so."""
    number = reader.varint("base", 15)
    require(number < len(part.archive.bases), f"base: {number}")
    base = part.archive.bases[number]
    file, index = reader.varint("base file", 2**16), reader.varint("base tensor", 2**32 - 1)
    require(file < len(base.files) and index < len(base.files[file][2]), f"base tensor: {index} of file {file}")
    part.base, part.base_place = base, (file, index)
    if rows_may_differ is not None:
        check_shapes(part, rows_may_differ)


def check_shapes(part, rows_may_differ):
    file, index = part.base_place
    tensor, other = part.tensor, part.base.files[file][2][index]
    rows_may_differ = rows_may_differ and min(len(tensor.shape), len(other.shape)) >= 2
    ours, theirs = (shape[1:] if rows_may_differ else shape for shape in (tensor.shape, other.shape))
    require(tensor.dtype == other.dtype and list(ours) == list(theirs), "base tensor: type or shape")


def read_based(part, reader):
    """The fields of section 4.3; what needs the streams to be understood is kept as it is stored."""
    tensor = part.tensor
    read_base_tensor(part, reader, rows_may_differ=None)
    flags = reader.u8("base flags", below=4)
    part.has_difference = bool(flags & 2)
    check_shapes(part, part.has_difference)
    if flags & 1:
        require(tensor.dtype in ("F32", "F16", "BF16") and len(tensor.shape) >= 2 and tensor.elements, "low rank: no matrix")
        rows, columns = tensor.shape[0], tensor.elements // tensor.shape[0]
        rank, scale = reader.varint("rank", 256), reader.f32("low-rank scale")
        require(1 <= rank <= min(rows, columns), f"rank: {rank}")
        left, right = reader.blob("left factor"), reader.blob("right factor")
        for factor, count in (left, rows * rank), (right, rank * columns):
            require(factor[0] != 0 or count <= 65536, "factor: constant")
        left = integers(left, rows * rank, -2047, 2047, "left factor").reshape(rows, rank)
        right = integers(right, rank * columns, -2047, 2047, "right factor").reshape(rank, columns)
        part.factors = scale, left.astype(np.int64) @ right.astype(np.int64)
    if part.has_difference:
        require(tensor.bits in (8, 16, 32), f"difference of {tensor.dtype}")
        part.common_zero_bits = reader.u8("common zero bits", below=min(32, tensor.bits))
        part.class_shift = reader.u8("class shift", below=min(32, tensor.bits))
        part.class_row = reader.varint("class row", 2**32 - 1)
        require(part.class_row >= 1, "class row: 0")
        offsets = reader.blob("class offsets")
        part.class_offsets = integers(offsets, -(-tensor.elements // part.class_row), 0, 2**31 - 1, "class offsets")
        part.stored_table_raw_bits = reader.blob("table raw bits")


def references(part, decoded, to_float, from_float):
    """What every element starts from, as unsigned integers."""
    width = part.tensor.bits // 8
    stored = decoded(part.base.part_of[part.base_place])[: part.tensor.length]
    start = np.frombuffer(stored + bytes(part.tensor.length - len(stored)), f"<u{width}")
    if part.factors is not None:
        scale, product = part.factors
        value = to_float(start, part.tensor.dtype) + scale * product.reshape(-1).astype(np.float32)
        require(value.dtype == np.float32, "numpy has widened binary32")
        start = from_float(value, part.tensor.dtype)
    return start


def based_elements(part, start, decode_symbols):
    if not part.has_difference:
        return start
    B, elements = part.tensor.bits, []
    full = part.run_elements * part.runs_per_strip

    def order(x):
        return x if x >> B - 1 == 0 else 2**B - 1 - x % 2 ** (B - 1)

    for strip in range(part.strips):
        symbols, exceptions = decode_symbols(part, strip, lambda table, k, raw, _: ((table.code[k], raw), 0))
        references = start[strip * full : (strip + 1) * full].tolist()
        offsets = part.class_offsets[(strip * full + np.arange(len(references))) // part.class_row].tolist()
        classes = [
            min(max((r % 2 ** (B - 1) >> part.class_shift) - o, 0), 63) for r, o in zip(references, offsets)
        ]
        decoded = [None] * len(references)
        for i, element in enumerate(sorted(range(len(references)), key=classes.__getitem__)):
            (symbol, raw), run = symbols[i], strip * part.runs_per_strip + i // part.run_elements
            R = int(part.table_raw_bits[part.table_of_run[run]])
            d = (symbol * 2**R + (raw >> part.raw_bits - R)) * 2**part.common_zero_bits
            if i in exceptions:
                d = int.from_bytes(exceptions[i].tobytes(), "little")
            r = references[element]
            decoded[element] = order((order(r) + (d if r >> B - 1 == 0 else -d)) % 2**B)
        elements += decoded
    return np.array(elements, f"<u{B // 8}")
