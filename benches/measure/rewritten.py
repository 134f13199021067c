"""A copy of a checkpoint in which another codec's decoded values stand for the matrices, so that it can be evaluated."""

import json
import shutil

import numpy as np


def write(model, directory, decoded):
    """Copies `model` to the new `directory`, its two-dimensional tensors replaced by `decoded`, rounded to their type."""
    shutil.copytree(model.directory, directory, symlinks=False)
    for file in directory.glob("*.safetensors"):
        file.chmod(0o644)
        stored = np.memmap(file, np.uint8, "r+")
        header_bytes = int(stored[:8].view("<u8")[0])
        for name, tensor in json.loads(stored[8 : 8 + header_bytes].tobytes()).items():
            if name in decoded:
                start, end = (8 + header_bytes + offset for offset in tensor["data_offsets"])
                stored[start:end] = np.frombuffer(rounded(tensor["dtype"], decoded[name]), np.uint8)
        stored.flush()


def rounded(dtype, values):
    """The values as bytes of this float type."""
    values = np.ascontiguousarray(values, np.float32)
    match dtype:
        case "F32":
            return values.tobytes()
        case "F16" | "F64":
            return values.astype({"F16": "<f2", "F64": "<f8"}[dtype]).tobytes()
        case "BF16":
            bits = values.view(np.uint32)
            return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype("<u2").tobytes()
    raise ValueError(f"{dtype}: no float type that checkpoints here have")


def other_bits(model, weights):
    """Bits of everything in the safetensors files but the matrices `weights`: a peer carries those as they are."""
    bits = 0
    for file in model.files():
        mapped = np.memmap(file, np.uint8, "r")
        header_bytes = int(mapped[:8].view("<u8")[0])
        for name, tensor in json.loads(mapped[8 : 8 + header_bytes].tobytes()).items():
            if name != "__metadata__" and name not in weights:
                bits += 8 * (tensor["data_offsets"][1] - tensor["data_offsets"][0])
    return bits


def parameters(model):
    """Elements over all tensors."""
    count = 0
    for file in model.files():
        mapped = np.memmap(file, np.uint8, "r")
        header_bytes = int(mapped[:8].view("<u8")[0])
        header = json.loads(mapped[8 : 8 + header_bytes].tobytes())
        count += sum(int(np.prod(tensor["shape"])) for name, tensor in header.items() if name != "__metadata__")
    return count
