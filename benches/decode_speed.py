#!/usr/bin/env python3
"""How fast lossless archives decode on one thread, beside zipnn and a copy of the same bytes, all in one run.

    cargo build --release
    .bench-venv/bin/python benches/decode_speed.py FILE.safetensors ... [--rounds N] [--engines NAME ...]

Needs benches/setup. A file with F32 tensors is measured as it is and rounded to BF16. Each round decodes with everything
once, so that a busy machine is unfair to all alike; medians count. Everything is in memory: of ours, `mcwcfs bench` times
all tensors and what it takes to prepare them, output touched before, reading apart; of zipnn, one call for all tensors.
Prints a Markdown table.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
from measure import lossless
from measure.ours import DEFAULT_BINARY, Mcwcfs


def seconds_of(call):
    """Wall-clock seconds of one call."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def measure(mcwcfs, file, work, rounds, engines):
    """Bytes of the tensors, and by decoder the seconds of every round."""
    archive = work / "decode_speed.mcwc"
    mcwcfs.pack(file, archive, "--lossless")
    coder, body = lossless.zipnn_coder(file)
    compressed = coder.compress(bytearray(body))
    if bytes(coder.decompress(compressed)) != body:
        raise SystemExit(f"{file}: zipnn does not give the bytes back")
    source, copied = np.frombuffer(body, np.uint8), np.ones(len(body), np.uint8)

    seconds = {"copy": [], lossless.VERSION: []} | {f"ours, {engine}": [] for engine in engines}
    for _ in range(rounds):
        seconds["copy"].append(seconds_of(lambda: np.copyto(copied, source)))
        seconds[lossless.VERSION].append(seconds_of(lambda: coder.decompress(compressed)))
        for engine in engines:
            report = mcwcfs.run("bench", "--json", "--repeat", 1, "--engine", engine, archive)
            seconds[f"ours, {engine}"].append(json.loads(report)["decode_seconds"])
    return len(body), seconds


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", type=Path, nargs="+", metavar="FILE.safetensors")
    parser.add_argument("--binary", type=Path, default=DEFAULT_BINARY)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--engines", nargs="+", default=["auto", "avx2", "portable"])
    arguments = parser.parse_args()
    mcwcfs = Mcwcfs(arguments.binary)

    print("| file | decoder | GB/s | times zipnn | copies |")
    print("|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as directory:
        work = Path(directory)
        for file in arguments.files:
            variants = [(file.name, file)]
            rounded = work / "rounded.safetensors"
            if lossless.write_as_bf16(file, rounded):
                variants.append((f"{file.name} as BF16", rounded))
            for name, variant in variants:
                length, seconds = measure(mcwcfs, variant, work, arguments.rounds, arguments.engines)
                medians = {decoder: statistics.median(rounds) for decoder, rounds in seconds.items()}
                for decoder, median in medians.items():
                    faster = medians[lossless.VERSION] / median
                    copies = median / medians["copy"]
                    print(f"| {name} | {decoder} | {length / median / 1e9:.2f} | {faster:.2f} | {copies:.2f} |")


if __name__ == "__main__":
    main()
