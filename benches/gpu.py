#!/usr/bin/env python3
"""Everything that needs a GPU, in one call: that it decodes to the right bits, and how fast.

    python3 benches/gpu.py [--parameters N] [--model DIR_OR_FILE ...]

Needs a CUDA driver, Rust and nothing else. Packs the models given and a synthetic one of N parameters (Gaussian bfloat16 in
matrices of 4096 x 4096; 10^9 unless said otherwise), lossless and at 4.2 bits, in memory where there is room, and prints for each

    equal       whether what lies on the device has the digest that the archive states
    device      GB/s of decoded weights into device memory, all launches of the model
    load        GB/s of decoded weights, reading, checking and copying what is stored included
    host cuda   GB/s of `unpack --engine cuda` into files, and beside it of `--engine auto`

with the device's name and how fast it copies. Then the kernels' tests under compute-sanitizer, where that is installed, and how
long packing took: on the CPU, the only place where this program packs yet. Exits with 1 where anything is not equal.
"""

import argparse
import json
import os
import random
import shutil
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SIDE = 4096


def run(*command, **options):
    """Standard output of a command that must succeed, and its seconds."""
    start = time.perf_counter()
    done = subprocess.run([str(part) for part in command], check=True, stdout=subprocess.PIPE, text=True, **options)
    return done.stdout, time.perf_counter() - start


def write_synthetic(path, parameters):
    """A checkpoint of Gaussian matrices. They repeat, which no stage of the codec notices: entropy coding has no memory."""
    numbers = random.Random(1)
    row = [struct.unpack("<I", struct.pack("<f", numbers.gauss(0, 0.02)))[0] >> 16 for _ in range(1 << 18)]
    block = struct.pack(f"<{len(row)}H", *row)
    tensors = max(1, round(parameters / SIDE**2))
    length = 2 * SIDE * SIDE
    header = {
        f"model.layers.{number}.weight": {
            "dtype": "BF16", "shape": [SIDE, SIDE], "data_offsets": [number * length, (number + 1) * length],
        }
        for number in range(tensors)
    }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for number in range(tensors):
            turned = block[2 * number :] + block[: 2 * number]
            for _ in range(length // len(block)):
                file.write(turned)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parameters", type=float, default=1e9)
    parser.add_argument("--model", type=Path, nargs="*", default=[], help="safetensors files or checkpoint directories")
    parser.add_argument("--skip-build", action="store_true", help="take what is in target/release")
    arguments = parser.parse_args()
    if not arguments.skip_build:
        run("cargo", "build", "--release", "--locked", "--bins", "--example", "decode_to_gpu", cwd=ROOT)
    binary, example = ROOT / "target/release/mcwcfs", ROOT / "target/release/examples/decode_to_gpu"

    shared = Path("/dev/shm")
    has_room = shared.is_dir() and shutil.disk_usage(shared).free > 8 * arguments.parameters
    wrong = []
    with tempfile.TemporaryDirectory(dir=shared if has_room else None) as work:
        work = Path(work)
        synthetic = work / "synthetic.safetensors"
        write_synthetic(synthetic, arguments.parameters)
        archives, packing = [], []
        for model in [*arguments.model, synthetic]:
            for name, options in (("lossless", ["--lossless"]), ("4.2 bits", ["--bpp", "4.2", "--effort", "fast"])):
                archive = work / f"{model.stem}-{name.split()[0]}.mcwc"
                if model.is_dir():
                    (work / archive.stem).mkdir()
                    _, seconds = run(binary, "pack", model, work / archive.stem, *options)
                    archives += [(f"{model.name}, {name}", found) for found in sorted((work / archive.stem).rglob("*.mcwc"))]
                else:
                    _, seconds = run(binary, "pack", model, archive, *options)
                    archives.append((f"{model.name}, {name}", archive))
                packing.append((f"{model.name}, {name}", seconds))

        lines = []
        for name, archive in archives:
            try:
                report = json.loads(run(example, archive)[0].splitlines()[-1])
            except subprocess.CalledProcessError as error:
                sys.exit(f"{name}: {example.name} failed: {error}")
            if not lines:
                up, down = (report[f"copy_to_{where}_gigabytes_per_second"] for where in ("device", "host"))
                print(f"{report['device']}, copies {up:.1f} GB/s to the device, {down:.1f} GB/s to the host\n")
                print(f"{'':32} {'parameters':>13} {'bits':>6} {'equal':>6} {'device':>8} {'load':>7} {'host cuda':>10} {'auto':>6}")
            rates = []
            for engine in ("cuda", "auto"):
                command = [binary, "unpack", "--force", "--skip-digests", "--engine", engine, archive, work / "unpacked"]
                seconds = min(run(*command, stderr=subprocess.PIPE)[1] for _ in range(3))
                rates.append(report["decoded_bytes"] / seconds / 1e9)
            checked = subprocess.run([binary, "unpack", "--force", "--engine", "cuda", archive, work / "unpacked"], check=False)
            is_equal = report["is_equal"] and checked.returncode == 0
            wrong += [] if is_equal else [name]
            lines.append(name)
            load = report["decoded_bytes"] / (report["load_seconds"] + report["decode_seconds"]) / 1e9
            bits = 8 * report["stored_bytes"] / report["parameters"]
            print(
                f"{name:32} {report['parameters']:13} {bits:6.2f} {'yes' if is_equal else 'NO':>6} "
                f"{report['decode_gigabytes_per_second']:8.1f} {load:7.1f} {rates[0]:10.1f} {rates[1]:6.1f}"
            )
            shutil.rmtree(work / "unpacked", ignore_errors=True)
        for name, seconds in packing:
            print(f"packing {name}: {seconds:.1f} s on {os.cpu_count()} processors")

        sanitizer = shutil.which("compute-sanitizer")
        if sanitizer:
            smallest = min(archives, key=lambda found: found[1].stat().st_size)[1]
            for tool in ("memcheck", "racecheck", "synccheck"):
                done = subprocess.run([sanitizer, "--tool", tool, "--error-exitcode", "9", example, smallest],
                                      stdout=subprocess.DEVNULL, check=False)
                print(f"compute-sanitizer {tool}: {'clean' if done.returncode == 0 else 'ERRORS'}")
                wrong += [tool] if done.returncode else []
        else:
            print("compute-sanitizer is not installed")
    if wrong:
        sys.exit("wrong: " + ", ".join(wrong))


if __name__ == "__main__":
    main()
