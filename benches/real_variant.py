#!/usr/bin/env python3
"""A real fine-tune packed against its base and alone, in bits per parameter, and what it scores through the mount.

    cargo build --release
    .bench-venv/bin/python benches/real_variant.py [--eval DIR] [--base NAME] [--variant NAME]

The evaluation folder's pair of a language model and the same after training on books: every weight changed. The base is
there as a lossless archive, and as one of 4.2 bits per parameter, which is what a lossy variant is packed against.
"""

import argparse
import tempfile
from pathlib import Path

from measure import checkpoint, page
from measure.evaluation import Evaluation
from measure.ours import DEFAULT_BINARY, Mcwcfs

LOSSY_BASE = ("--bpp", "4.2")
WAYS = {
    "lossless, alone": (None, ("--lossless",)),
    "lossless, against the lossless base": (("--lossless",), ("--lossless",)),
    "4.2 bits, alone": (None, ("--bpp", "4.2")),
    "2 bits, alone": (None, ("--bpp", "2")),
    "2 bits, against the base at 4.2 bits": (LOSSY_BASE, ("--bpp", "2")),
}
"""How the base is packed, where there is one, and how the variant is."""


def measure(mcwcfs, evaluation, base, variant, base_options, options):
    """Bits per parameter of the variant's archive, and its outcome."""
    with tempfile.TemporaryDirectory(prefix="mcwcfs-bench-") as work:
        packed, mount_point = Path(work) / "packed", Path(work) / "mnt"
        packed.mkdir()
        mount_point.mkdir()
        if base_options is not None:
            mcwcfs.pack(base.directory, packed / "base", *base_options)
            options = [*options, "--base", packed / "base"]
        report = mcwcfs.pack(variant.directory, packed / "variant", *options)
        with mcwcfs.mounted(packed, mount_point):
            return report["bits_per_parameter"], evaluation.of(mount_point / "variant")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--eval", metavar="DIR", help="evaluation folder; MCWCFS_EVAL without it")
    parser.add_argument("--base", default="neox-8x256-tinystories", metavar="NAME")
    parser.add_argument("--variant", default="neox-8x256-books-ft", metavar="NAME")
    parser.add_argument("--binary", default=DEFAULT_BINARY, help="mcwcfs (target/release/mcwcfs)")
    arguments = parser.parse_args()
    folder = checkpoint.evaluation_folder(arguments.eval)
    if folder is None:
        return
    mcwcfs = Mcwcfs(arguments.binary)
    base, variant = checkpoint.open_models(folder, [arguments.base, arguments.variant])
    rows = []
    with tempfile.TemporaryDirectory(prefix="mcwcfs-bench-") as work:
        evaluation = Evaluation(folder, variant, Path(work))
        for name, (base_options, options) in WAYS.items():
            bits, outcome = measure(mcwcfs, evaluation, base, variant, base_options, options)
            rows.append([name, f"{bits:.2f}", f"{outcome.metric} {outcome.words()}"])
    print(page.table([variant.name, "bits per parameter", "score and distance"], rows))


if __name__ == "__main__":
    main()
