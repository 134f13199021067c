#!/usr/bin/env python3
"""How long `unpack` and packing take beside `cp`, all on tmpfs and in one run.

    cargo build --release
    python3 benches/unpack_speed.py FILE.safetensors [--rounds N] [--binary PATH]

Needs nothing but Python. Prints medians of wall-clock time beside that of `cp` of the same file, and the processor seconds
of packing on one thread, the check by decoding included.
"""

import argparse
import resource
import shutil
import statistics
import subprocess
import tempfile
import time
from pathlib import Path

BINARY = Path(__file__).resolve().parent.parent / "target" / "release" / "mcwcfs"


def run(*command):
    """Wall-clock and processor seconds of a command that must succeed."""
    start, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([str(part) for part in command], check=True, capture_output=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.perf_counter() - start, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--binary", type=Path, default=BINARY)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir="/dev/shm") as work:
        work = Path(work)
        source = work / "source.safetensors"
        source.write_bytes(arguments.file.read_bytes())
        lines = [("cp", ["cp", source, work / "copy"])]
        for name, options in (("lossless", ["--lossless"]), ("4.2 bits", ["--bpp", "4.2"])):
            archive = work / f"{name}.mcwc"
            _, seconds = run(arguments.binary, "pack", source, archive, "--threads", "1", *options)
            print(f"pack, {name}: {seconds:.2f} s of processor time, {source.stat().st_size / seconds / 1e6:.0f} MB/s")
            unpack = [arguments.binary, "unpack", archive, work / "unpacked"]
            lines += [(f"unpack, {name}", unpack), (f"unpack --skip-digests, {name}", [*unpack, "--skip-digests"])]
        seconds = {name: [] for name, _ in lines}
        for _ in range(arguments.rounds):
            for name, command in lines:
                # Each makes a new file: no time goes into giving back the memory of the one before.
                (work / "copy").unlink(missing_ok=True)
                shutil.rmtree(work / "unpacked", ignore_errors=True)
                seconds[name].append(run(*command)[0])
        copy = statistics.median(seconds["cp"])
        for name, times in seconds.items():
            print(f"{name}: {1000 * statistics.median(times):.1f} ms, {statistics.median(times) / copy:.2f} x cp")


if __name__ == "__main__":
    main()
