"""At no error: bits per parameter of ours and zipnn, of the files as they are and of F32 files rounded to BF16."""

import json
import warnings
from pathlib import Path

import numpy as np

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what PyTorch deprecates in the peer's code is not our reader's concern
    from zipnn import ZipNN

VERSION = "zipnn 0.5.4"
DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


def zipnn_bits(file):
    """Bits per parameter of the tensors of a file."""
    coder, body = zipnn_coder(file)
    header, _ = split(file)
    elements = sum(int(np.prod(tensor["shape"])) for tensor in header.values())
    return 8 * len(coder.compress(bytearray(body))) / elements


def zipnn_coder(file):
    """A coder on one thread and what it is for: the tensors of a file in one piece, as their commonest type."""
    header, body = split(file)
    elements = {}
    for tensor in header.values():
        elements[tensor["dtype"]] = elements.get(tensor["dtype"], 0) + int(np.prod(tensor["shape"]))
    dtype = DTYPES[max(elements, key=elements.get)]
    return ZipNN(input_format="byte", bytearray_dtype=dtype, threads=1), body


def ours_bits(mcwcfs, file, work):
    """Bits per parameter of the lossless archive of a file; packing has compared it with what it decodes to."""
    return mcwcfs.pack(file, work / "lossless.mcwc", "--lossless")["bits_per_parameter"]


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
