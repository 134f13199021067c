#!/usr/bin/env python3
"""How fast lossless archives decode on one thread, beside zipnn and a copy of the same bytes, all in one run.

    cargo build --release
    .bench-venv/bin/python benches/decode_speed.py FILE.safetensors ... [--rounds N] [--engines NAME ...]

Needs benches/setup. A file with F32 tensors is measured as it is and rounded to BF16. Everything is in memory: of ours,
`mcwcfs bench` times all tensors and what it takes to prepare them, output touched before, reading apart; of zipnn, one call
for all tensors, in processor time, which a busy machine cannot make longer by letting it wait. Each round decodes with
everything; the fastest counts. Prints a Markdown table.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

import numpy as np
from measure import lossless
from measure.ours import DEFAULT_BINARY, Mcwcfs


def seconds_of(call):
    """Processor seconds of one call; zipnn has a thread of its own."""
    start = time.process_time()
    call()
    return time.process_time() - start


def measure(mcwcfs, file, work, rounds, engines):
    """Bytes of the tensors, and by decoder the seconds of its fastest round."""
    archive = work / "decode_speed.mcwc"
    mcwcfs.pack(file, archive, "--lossless")
    coder, body = lossless.zipnn_coder(file)
    compressed = coder.compress(bytearray(body))
    if bytes(coder.decompress(compressed)) != body:
        raise SystemExit(f"{file}: zipnn does not give the bytes back")
    source, copied = np.frombuffer(body, np.uint8), np.ones(len(body), np.uint8)

    seconds = {}

    def note(decoder, found):
        seconds[decoder] = min(found, seconds.get(decoder, found))

    for _ in range(rounds):
        note("copy", seconds_of(lambda: np.copyto(copied, source)))
        note(lossless.VERSION, seconds_of(lambda: coder.decompress(compressed)))
        for engine in engines:
            report = mcwcfs.run("bench", "--json", "--repeat", 3, "--engine", engine, archive)
            note(f"ours, {engine}", json.loads(report)["decode_seconds"])
    return len(body), seconds


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", type=Path, nargs="+", metavar="FILE.safetensors")
    parser.add_argument("--binary", type=Path, default=DEFAULT_BINARY)
    parser.add_argument("--rounds", type=int, default=10)
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
                for decoder, fastest in seconds.items():
                    faster = seconds[lossless.VERSION] / fastest
                    copies = fastest / seconds["copy"]
                    print(f"| {name} | {decoder} | {length / fastest / 1e9:.2f} | {faster:.2f} | {copies:.2f} |")


if __name__ == "__main__":
    main()
