"""At no error: what other codecs and ours make of the tensors of a safetensors file."""

import json
import warnings
from pathlib import Path

import numpy as np
import zstandard
from pcodec import ChunkConfig, standalone

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what PyTorch deprecates in the peer's code is not our reader's concern
    from zipnn import ZipNN

VERSION = "zipnn 0.5.4"
PCODEC_VERSION = "pcodec 1.1.0"
ZSTD_VERSION = "zstandard 0.25.0"
DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
NUMBERS = {"F32": "<f4", "F16": "<f2", "BF16": "<u2", "F64": "<f8"}
"""What pcodec is given: it has no BF16."""


def parameters(file):
    """Elements over all tensors."""
    return sum(int(np.prod(tensor["shape"])) for tensor in split(file)[0].values())


def zipnn_bytes(file):
    """Bytes of all tensors by zipnn."""
    coder, body = zipnn_coder(file)
    return len(coder.compress(bytearray(body)))


def pcodec_bytes(file):
    """Bytes of all tensors by pcodec at its default level, those of a type together; others as they are."""
    total = 0
    for dtype, piece in by_type(file).items():
        if dtype in NUMBERS:
            total += len(standalone.simple_compress(np.frombuffer(piece, NUMBERS[dtype]), ChunkConfig()))
        else:
            total += len(piece)
    return total


def zstd_bytes(file, level):
    """Bytes of all tensors by zstd, the bytes of the elements in a stream for each of their places."""
    coder, total = zstandard.ZstdCompressor(level=level), 0
    for dtype, piece in by_type(file).items():
        stored = np.frombuffer(piece, np.uint8)
        width = np.dtype(NUMBERS[dtype]).itemsize if dtype in NUMBERS else 1
        total += sum(len(coder.compress(stored[place::width].tobytes())) for place in range(width))
    return total


def by_type(file):
    """The bytes of the tensors of each type, in one piece."""
    header, body = split(file)
    pieces = {}
    for tensor in header.values():
        pieces.setdefault(tensor["dtype"], []).append(body[slice(*tensor["data_offsets"])])
    return {dtype: b"".join(found) for dtype, found in pieces.items()}


def zipnn_coder(file):
    """A coder on one thread and what it is for: the tensors of a file in one piece, as their commonest type."""
    header, body = split(file)
    elements = {}
    for tensor in header.values():
        elements[tensor["dtype"]] = elements.get(tensor["dtype"], 0) + int(np.prod(tensor["shape"]))
    dtype = DTYPES[max(elements, key=elements.get)]
    return ZipNN(input_format="byte", bytearray_dtype=dtype, threads=1), body


def ours_bytes(mcwcfs, file, work):
    """Bytes of the lossless archive of a file, headers and all; packing has compared it with what it decodes to."""
    return mcwcfs.pack(file, work / "lossless.mcwc", "--lossless")["archive_bytes"]


def write_as_bf16(file, path):
    """Writes `file` with its F32 tensors rounded to BF16; False, and nothing written, where it has none."""
    header, body = split(file)
    if not any(tensor["dtype"] == "F32" for tensor in header.values()):
        return False
    rounded, pieces, offset = {}, [], 0
    for name, tensor in header.items():
        start, end = tensor["data_offsets"]
        piece, dtype = body[start:end], tensor["dtype"]
        if dtype == "F32":
            bits = np.frombuffer(piece, "<u4").astype(np.uint64)
            # To nearest, ties to even. Checkpoints hold no NaN, whose payload this would change.
            piece, dtype = ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype("<u2").tobytes(), "BF16"
        rounded[name] = {"dtype": dtype, "shape": tensor["shape"], "data_offsets": [offset, offset + len(piece)]}
        pieces.append(piece)
        offset += len(piece)
    encoded = json.dumps(rounded).encode()
    Path(path).write_bytes(len(encoded).to_bytes(8, "little") + encoded + b"".join(pieces))
    return True


def split(file):
    """Header, without metadata, and tensor bytes of a safetensors file."""
    content = Path(file).read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:start])
    header.pop("__metadata__", None)
    return header, content[start:]
