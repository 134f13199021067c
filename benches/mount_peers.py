#!/usr/bin/env python3
"""A mounted archive beside compressed file systems of the kernel and plain files: what a checkpoint takes, and a cold read.

    apt-get install squashfs-tools erofs-utils
    cargo build --release
    .bench-venv/bin/python benches/mount_peers.py FILE.safetensors [--rounds N]        # as root

The same file four ways, all on tmpfs: plain, in a squashfs image (zstd 19, blocks of a mebibyte), in an erofs image (lz4hc)
and in a lossless archive; and an archive of 4.2 bits per parameter. Each round mounts each anew, so that nothing is cached,
and reads the file through one descriptor, a mebibyte at a time; the fastest round counts. The kernel's file systems
decompress in the kernel, which our daemon cannot. File systems in user space that compress better (DwarFS) are not packaged
for Debian, and no other program shows compressed checkpoints as files; transfers that decode while they load (zipnn's, and
DFloat11 on a GPU) are libraries that a program must call.
"""

import argparse
import subprocess
import tempfile
import time
from pathlib import Path

from measure import page
from measure.ours import DEFAULT_BINARY, Mcwcfs

PIECE_BYTES = 1 << 20


def run(*command):
    """A command that must succeed; its standard output."""
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    if done.returncode != 0:
        raise SystemExit(f"{' '.join(map(str, command))}: exit status {done.returncode}\n{done.stderr.strip()}")
    return done.stdout


def seconds_to_read(path):
    """Wall-clock seconds from opening a file to its last byte."""
    piece, start = bytearray(PIECE_BYTES), time.perf_counter()
    with open(path, "rb", buffering=0) as opened:
        while opened.readinto(piece):
            pass
    return time.perf_counter() - start


class Way:
    """One way to keep the file: what it takes, and how it is mounted at a directory and taken down."""

    def __init__(self, stored, mount, unmount):
        self.stored, self.mount, self.unmount = stored, mount, unmount
        self.seconds = []


def ways(mcwcfs, work, mount_point):
    """All of them, made in `work`, which has `plain/`."""
    plain, squashfs, erofs = work / "plain", work / "model.squashfs", work / "model.erofs"
    run("mksquashfs", plain, squashfs, "-quiet", "-no-progress", "-comp", "zstd", "-Xcompression-level", 19, "-b", "1M")
    run("mkfs.erofs", "-zlz4hc", "-C65536", erofs, plain)
    made = {"plain": Way(plain, lambda: run("mount", "--bind", plain, mount_point), lambda: run("umount", mount_point))}
    for name, image in (("squashfs, zstd -19", squashfs), ("erofs, lz4hc", erofs)):

        def mount(image=image):
            run("mount", "-o", "loop,ro", image, mount_point)

        made[name] = Way(image, mount, lambda: run("umount", mount_point))
    for name, options in (("mcwcfs, lossless", ["--lossless"]), ("mcwcfs, 4.2 bits", ["--bpp", "4.2"])):
        packed = work / name
        mcwcfs.pack(plain, packed, *options)

        def mount(packed=packed):
            mcwcfs.run("mount", packed, mount_point)

        made[name] = Way(packed, mount, lambda: mcwcfs.run("umount", mount_point))
    return made


def size(path):
    """Bytes of a file, or of all below a directory."""
    return (
        sum(file.stat().st_size for file in path.rglob("*") if file.is_file()) if path.is_dir() else path.stat().st_size
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, metavar="FILE.safetensors")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--binary", default=DEFAULT_BINARY, help="mcwcfs (target/release/mcwcfs)")
    arguments = parser.parse_args()
    mcwcfs = Mcwcfs(arguments.binary)
    with tempfile.TemporaryDirectory(prefix="mcwcfs-bench-", dir="/dev/shm") as work:
        work = Path(work)
        mount_point, plain = work / "mnt", work / "plain"
        mount_point.mkdir()
        plain.mkdir()
        (plain / "model.safetensors").write_bytes(arguments.file.read_bytes())
        found = ways(mcwcfs, work, mount_point)
        for _ in range(arguments.rounds):
            for way in found.values():
                way.mount()
                try:
                    way.seconds.append(seconds_to_read(mount_point / "model.safetensors"))
                finally:
                    way.unmount()
        length, fastest = size(plain), min(found["plain"].seconds)
        rows = []
        for name, way in found.items():
            share, seconds = size(way.stored) / length, min(way.seconds)
            rows.append([name, f"{100 * share:.1f} %", f"{length / seconds / 1e9:.2f}", f"{fastest / seconds:.2f}"])
    print(page.table(["way", "of the file's size", "cold read, GB/s", "x tmpfs"], rows))


if __name__ == "__main__":
    main()
