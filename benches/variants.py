#!/usr/bin/env python3
"""What fine-tuned variants of a model take, given their base: ours beside BitX and zipnn, in bits per parameter.

    cargo build --release
    .bench-venv/bin/python benches/variants.py CHECKPOINT.safetensors [--keep DIR] [--only NAME]... [--binary PATH]

Rounds the checkpoint to bfloat16, makes variants of it with a fixed seed, packs each with `--base`, mounts all archives, and
compares the SHA-256 of every file in the mount with that of what was packed. BitX is what ZipLLM does: the exclusive-or of both files in two byte streams, each through zstd. zipnn codes the same
exclusive-or, as its own delta does. Ours is the whole archive; theirs are the streams alone. Ends with an error where a goal is
missed.
"""

import argparse
import hashlib
import json
import tempfile
from pathlib import Path

import numpy as np
import zstandard
from measure.lossless import split, zipnn_coder
from measure.ours import DEFAULT_BINARY, Mcwcfs


def bf16(values):
    """Bits of the nearest bfloat16, ties to even."""
    bits = np.ascontiguousarray(values, "<f4").view("<u4").astype(np.uint64)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype("<u2")


def widened(bits):
    return (bits.astype("<u4") << 16).view("<f4")


def row_std(values):
    return values.std(axis=1, keepdims=True)


def dense(size):
    """Gaussian changes of every matrix, of this size in standard deviations of its rows."""

    def change(random, name, original, base):
        if base.ndim != 2:
            return base
        values = widened(base)
        return bf16(values + size * row_std(values) * random.standard_normal(values.shape).astype("<f4"))

    return change


def top_layers(random, name, original, base):
    """Changes of the last third of the layers alone."""
    return dense(3e-3)(random, name, original, base) if ".layer.4." in name or ".layer.5." in name else base


def merged_lora(random, name, original, base, rank=16):
    """A product of this rank added to every matrix of a layer, a hundredth of the weights in size."""
    if base.ndim != 2 or ".layer." not in name:
        return base
    values = widened(base)
    left = random.standard_normal((values.shape[0], rank)).astype("<f4")
    right = random.standard_normal((rank, values.shape[1])).astype("<f4")
    return bf16(values + 1e-2 * values.std() / np.sqrt(rank) * (left @ right))


def reinforcement_step(random, name, original, base):
    """One step of 3e-6 on the unrounded weights, rounded once more."""
    return bf16(original + 3e-6 * random.standard_normal(original.shape).astype("<f4"))


# How each is made, and the bits per parameter that it may take.
VARIANTS = {
    "dense, 1e-3 of row std": (dense(1e-3), 1.1),
    "dense, 3e-3": (dense(3e-3), 2.4),
    "dense, 1e-2": (dense(1e-2), 4.0),
    "merged LoRA, rank 16": (merged_lora, 1.0),
    "top two layers only": (top_layers, 0.42),
    "one RL step": (reinforcement_step, 0.3),
}


def write(path, tensors):
    """A safetensors file of bfloat16 tensors."""
    header, pieces, offset = {}, [], 0
    for name, bits in tensors.items():
        piece = bits.tobytes()
        header[name] = {"dtype": "BF16", "shape": list(bits.shape), "data_offsets": [offset, offset + len(piece)]}
        pieces.append(piece)
        offset += len(piece)
    encoded = json.dumps(header).encode()
    path.write_bytes(len(encoded).to_bytes(8, "little") + encoded + b"".join(pieces))


def sha256(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def exclusive_or(base, variant):
    return np.frombuffer(split(base)[1], "<u2") ^ np.frombuffer(split(variant)[1], "<u2")


def bitx_bits(base, variant):
    changed = exclusive_or(base, variant).view(np.uint8)
    coder = zstandard.ZstdCompressor(level=3)
    return 8 * sum(len(coder.compress(changed[byte::2].tobytes())) for byte in (0, 1)) / (changed.size / 2)


def zipnn_bits(base, variant):
    changed = exclusive_or(base, variant)
    return 8 * len(zipnn_coder(variant)[0].compress(bytearray(changed.tobytes()))) / changed.size


def check_mounted(mcwcfs, packed, mount_point, originals):
    """Compares the mounted file of every archive in `packed` with what was packed."""
    mount_point.mkdir(exist_ok=True)
    with mcwcfs.mounted(packed, mount_point):
        for original in originals:
            if sha256(mount_point / original.name) != sha256(original):
                raise SystemExit(f"{original.name}: other bytes in the mount")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--keep", type=Path, help="write the variants and archives there, and leave them")
    parser.add_argument("--only", action="append", choices=VARIANTS, default=[])
    parser.add_argument("--binary", type=Path, default=DEFAULT_BINARY)
    arguments = parser.parse_args()
    mcwcfs = Mcwcfs(arguments.binary)
    header, body = split(arguments.checkpoint)
    original = {
        name: np.frombuffer(body[slice(*tensor["data_offsets"])], "<f4").reshape(tensor["shape"])
        for name, tensor in header.items()
        if tensor["dtype"] == "F32"
    }
    with tempfile.TemporaryDirectory(prefix="mcwcfs-variants-") as scratch:
        work = arguments.keep or Path(scratch)
        (work / "packed").mkdir(parents=True, exist_ok=True)
        base, rounded = work / "base.safetensors", {name: bf16(values) for name, values in original.items()}
        write(base, rounded)
        alone = mcwcfs.pack(base, work / "packed" / "base.mcwc")["bits_per_parameter"]
        print(f"base, alone: {alone:.3f} bits per parameter\n")
        rows, missed, originals = [], [], [base]
        for name in arguments.only or VARIANTS:
            (change, goal), random = VARIANTS[name], np.random.default_rng(1)
            variant = work / f"{name.replace(' ', '-').replace(',', '')}.safetensors"
            write(variant, {t: change(random, t, original[t], rounded[t]) for t in original})
            ours = mcwcfs.pack(variant, work / "packed" / f"{variant.stem}.mcwc", "--base", base)["bits_per_parameter"]
            originals.append(variant)
            if ours > goal:
                missed.append(name)
            peers = f"{bitx_bits(base, variant):.2f} | {zipnn_bits(base, variant):.2f}"
            rows.append(f"| {name} | {peers} | {goal:.2f} | **{ours:.3f}** |")
        check_mounted(mcwcfs, work / "packed", work / "mnt", originals)
        print("| variant | BitX (xor, two streams, zstd -3) | zipnn of the xor | goal | ours |\n|---|---|---|---|---|")
        print("\n".join(rows))
        print(f"\nSHA-256 of all {len(originals)} files in the mount: as packed")
        if missed:
            raise SystemExit(f"more than the goal: {', '.join(missed)}")


if __name__ == "__main__":
    main()
