#!/usr/bin/env python3
"""Lossless packing of what is quantized already: bits per weight, scales and all, beside the format's own and zlib's.

    cargo build --release
    python3 benches/quantized.py [--model FILE] [--binary FILE]

Needs numpy and no evaluation folder. The weights are Gaussian, 1024 x 4096, or with --model the largest matrix of a
safetensors file of F32, F16 or BF16; they are quantized as GPTQ, AWQ, compressed-tensors, MXFP4, NVFP4, FP8 and INT8
checkpoints store them (groups of 128). *Entropy* is that of the codes alone, all with one distribution.
"""

import argparse
import json
import subprocess
import tempfile
import zlib
from pathlib import Path

import numpy as np

REPOSITORY = Path(__file__).resolve().parent.parent
GROUP = 128
NUMPY = {"F32": "<f4", "F16": "<f2", "BF16": "<u2"}
AWQ_ORDER = [0, 2, 4, 6, 1, 3, 5, 7]


def gaussian():
    return np.random.default_rng(1).standard_normal((1024, 4096)).astype(np.float32) * np.float32(0.02)


def largest_matrix(file):
    content = Path(file).read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:start])
    header.pop("__metadata__", None)
    usable = [tensor for tensor in header.values() if tensor["dtype"] in NUMPY and len(tensor["shape"]) == 2]
    tensor = max(usable, key=lambda tensor: np.prod(tensor["shape"]))
    begin, end = tensor["data_offsets"]
    values = np.frombuffer(content[start + begin : start + end], NUMPY[tensor["dtype"]]).reshape(tensor["shape"])
    values = (values.astype(np.uint32) << 16).view(np.float32) if tensor["dtype"] == "BF16" else values.astype(np.float32)
    return values[: len(values) // 16 * 16, : values.shape[1] // GROUP * GROUP]


def magnitudes(exponent_bits, mantissa_bits, count):
    """The numbers that the bits of a small float type without its sign stand for, ascending."""
    bits, bias = np.arange(count), 2 ** (exponent_bits - 1) - 1
    exponent, fraction = bits >> mantissa_bits, (bits % 2**mantissa_bits) / 2**mantissa_bits
    return np.where(exponent > 0, (1 + fraction) * 2.0 ** (exponent - bias), fraction * 2.0 ** (1 - bias))


def nearest(values, numbers, sign):
    """Codes of the nearest numbers of a small float type, `sign` added where they are negative."""
    between = (numbers[1:] + numbers[:-1]) / 2
    return (np.searchsorted(between, np.abs(values)) + sign * (values < 0)).astype(np.uint8)


def four_bits(weights, symmetric):
    """Codes, `[outputs, inputs]`, and scales and zero points, `[outputs, groups]`."""
    groups = weights.reshape(len(weights), -1, GROUP)
    low, high = np.minimum(groups.min(-1), 0), np.maximum(groups.max(-1), 0)
    if symmetric:
        scales = (2 * np.maximum(high, -low) / 15).astype(np.float16)
        zeros = np.full(scales.shape, 8)
    else:
        scales = ((high - low) / 15).astype(np.float16)
        zeros = np.round(-low / scales.astype(np.float32))
    codes = np.round(groups / scales.astype(np.float32)[..., None]) + zeros[..., None]
    return np.clip(codes, 0, 15).astype(np.uint8).reshape(weights.shape), scales, zeros.astype(np.uint8)


def packed(codes, order=range(8)):
    """Eight neighbours of a row in an integer."""
    eight = codes.reshape(len(codes), -1, 8).astype(np.uint32)
    return sum(eight[..., source] << np.uint32(4 * place) for place, source in enumerate(order)).astype("<u4")


def transposed(array):
    return np.ascontiguousarray(array.T)


def gptq(weights, symmetric):
    codes, scales, zeros = four_bits(weights, symmetric)
    places = (np.arange(weights.shape[1]) // GROUP).astype("<i4")
    return codes, {
        "l.qweight": ("I32", transposed(packed(codes))),
        "l.qzeros": ("I32", packed(transposed(zeros - 1 & 15))),
        "l.scales": ("F16", transposed(scales)),
        "l.g_idx": ("I32", places),
    }


def awq(weights):
    codes, scales, zeros = four_bits(weights, False)
    return codes, {
        "l.qweight": ("I32", packed(transposed(codes), AWQ_ORDER)),
        "l.qzeros": ("I32", packed(transposed(zeros), AWQ_ORDER)),
        "l.scales": ("F16", transposed(scales)),
    }


def compressed_tensors(weights):
    codes, scales, _ = four_bits(weights, True)
    return codes, {"l.weight_packed": ("I32", packed(codes)), "l.weight_scale": ("F16", scales)}


def int8(weights):
    scales = np.abs(weights).max(1, keepdims=True) / np.float32(127)
    codes = np.round(weights / scales).astype(np.int8)
    return codes, {"l.weight": ("I8", codes), "l.weight_scale": ("F32", scales)}


def fp8(weights, dtype):
    numbers = magnitudes(4, 3, 127) if dtype == "F8_E4M3" else magnitudes(5, 2, 124)
    scale = np.abs(weights).max() / numbers[-1]
    codes = nearest(weights / scale, numbers, 128)
    return codes, {"l.weight": (dtype, codes), "l.weight_scale": ("F32", np.array([scale], np.float32))}


def halves(codes):
    pairs = codes.reshape(len(codes), -1, 2)
    return pairs[..., 0] | pairs[..., 1] << 4


def mxfp4(weights):
    blocks = weights.reshape(len(weights), -1, 32)
    exponents = np.floor(np.log2(np.maximum(np.abs(blocks).max(-1), 1e-30))) - 2
    codes = nearest(blocks / 2.0 ** exponents[..., None], magnitudes(2, 1, 8), 8).reshape(weights.shape)
    return codes, {
        "l.weight_blocks": ("U8", halves(codes)),
        "l.weight_scales": ("U8", (exponents + 127).clip(0, 254).astype(np.uint8)),
    }


def nvfp4(weights):
    numbers, blocks = magnitudes(4, 3, 127), weights.reshape(len(weights), -1, 16)
    scale_of_all = np.abs(weights).max() / (6 * 448)
    scales = nearest(np.abs(blocks).max(-1) / 6 / scale_of_all, numbers, 128)
    steps = np.maximum(numbers[scales] * scale_of_all, 1e-30)
    codes = nearest(blocks / steps[..., None], magnitudes(2, 1, 8), 8).reshape(weights.shape)
    return codes, {
        "l.weight_packed": ("U8", halves(codes)),
        "l.weight_scale": ("F8_E4M3", scales),
        "l.weight_scale_2": ("F32", np.array([scale_of_all], np.float32)),
    }


FORMATS = {
    "GPTQ int4, symmetric": lambda weights: gptq(weights, True),
    "GPTQ int4, asymmetric": lambda weights: gptq(weights, False),
    "AWQ int4": awq,
    "compressed-tensors int4, symmetric": compressed_tensors,
    "INT8 per row": int8,
    "FP8 E4M3": lambda weights: fp8(weights, "F8_E4M3"),
    "FP8 E5M2": lambda weights: fp8(weights, "F8_E5M2"),
    "MXFP4": mxfp4,
    "NVFP4": nvfp4,
}


def entropy(codes):
    _, counts = np.unique(codes, return_counts=True)
    shares = counts / counts.sum()
    return -(shares * np.log2(shares)).sum()


def write(path, tensors):
    header, pieces, offset = {}, [], 0
    for name, (dtype, array) in tensors.items():
        piece = array.tobytes()
        header[name] = {"dtype": dtype, "shape": list(array.shape), "data_offsets": [offset, offset + len(piece)]}
        pieces.append(piece)
        offset += len(piece)
    encoded = json.dumps(header).encode()
    path.write_bytes(len(encoded).to_bytes(8, "little") + encoded + b"".join(pieces))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", metavar="FILE", help="a safetensors file whose largest matrix is taken")
    parser.add_argument("--binary", default=REPOSITORY / "target" / "release" / "mcwcfs", help="mcwcfs (%(default)s)")
    arguments = parser.parse_args()
    weights = largest_matrix(arguments.model) if arguments.model else gaussian()
    print("| format | as stored | zlib -9 | ours | of it codes | entropy of the codes |\n|---|---|---|---|---|---|")
    for name, make in FORMATS.items():
        codes, tensors = make(weights)
        with tempfile.TemporaryDirectory(prefix="mcwcfs-bench-") as work:
            file, archive = Path(work) / "model.safetensors", Path(work) / "packed.mcwc"
            write(file, tensors)
            content = file.read_bytes()
            command = [arguments.binary, "pack", "--json", "--lossless", file, archive]
            report = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        first = next(iter(tensors))
        of_codes = next(tensor["bits_per_element"] for tensor in report["tensors"] if tensor["name"] == first)
        of_codes *= tensors[first][1].size / weights.size
        ours, stored, zipped = (
            8 * size / weights.size for size in (report["archive_bytes"], len(content), len(zlib.compress(content, 9)))
        )
        print(f"| {name} | {stored:.3f} | {zipped:.3f} | {ours:.3f} | {of_codes:.3f} | {entropy(codes):.3f} |", flush=True)


if __name__ == "__main__":
    main()
