#!/usr/bin/env python3
"""What a really fine-tuned variant takes given its base, and how good both are, read through a mount.

    cargo build --release
    .venv/bin/python benches/real_variant.py [--eval DIR] [--base NAME] [--variant NAME] [--base-bpp BITS] [--bpp BITS]

Needs an evaluation folder (models/, eval.py). Packs the base and the variant without losses, each alone and the variant given the base,
then the base at one rate and the variant at another, alone and given the lossy base. All archives are mounted and evaluated in
the mount; of those without losses the mounted files are compared with the originals by SHA-256. Prints one Markdown table.
"""

import argparse
import tempfile
from pathlib import Path

from measure.checkpoint import evaluation_folder, sha256
from measure.ours import DEFAULT_BINARY, Mcwcfs
from task_metric import Evaluation, distance, mounted


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--eval", metavar="DIR", help="evaluation folder; MCWCFS_EVAL without it")
    parser.add_argument("--base", default="neox-8x256-tinystories", metavar="NAME")
    parser.add_argument("--variant", default="neox-8x256-books-ft", metavar="NAME")
    parser.add_argument("--base-bpp", default="4.2", metavar="BITS", help="bits per parameter of the lossy base")
    parser.add_argument("--bpp", default="2.0", metavar="BITS", help="bits per parameter of the lossy variant")
    parser.add_argument("--binary", type=Path, default=DEFAULT_BINARY)
    arguments = parser.parse_args()
    folder = evaluation_folder(arguments.eval)
    if folder is None:
        return
    mcwcfs = Mcwcfs(arguments.binary)
    base, variant = (folder / "models" / name for name in (arguments.base, arguments.variant))
    with tempfile.TemporaryDirectory(prefix="mcwcfs-variant-") as scratch:
        packed, mount_point = Path(scratch) / "packed", Path(scratch) / "mnt"
        packed.mkdir()
        mount_point.mkdir()
        at_base, at_variant = ["--bpp", arguments.base_bpp], ["--bpp", arguments.bpp]
        choices = {
            "base": (base, []),
            "variant, alone": (variant, []),
            "variant, given the base": (variant, ["--base", packed / "base"]),
            f"base at {arguments.base_bpp}": (base, at_base),
            f"variant at {arguments.bpp}, alone": (variant, at_variant),
            f"variant at {arguments.bpp}, given the base at {arguments.base_bpp}": (
                variant,
                [*at_variant, "--base", packed / f"base at {arguments.base_bpp}"],
            ),
        }
        reports = {
            name: mcwcfs.pack(source, packed / name, *options) for name, (source, options) in choices.items()
        }
        print("| what | bits per parameter | task | metric | distance to the original |\n|---|---|---|---|---|")
        with mounted(mcwcfs, packed, mount_point):
            for name, (source, _) in choices.items():
                for file in sorted(source.glob("*.safetensors")) if reports[name]["lossless"] else ():
                    if sha256(mount_point / name / file.name) != sha256(file):
                        raise SystemExit(f"{name}: {file.name} is other bytes in the mount")
                result = Evaluation(folder / "eval.py", source, None).of(mount_point / name)
                primary = result["primary"]
                print(
                    f"| {name} | {reports[name]['bits_per_parameter']:.3f} | {primary['task']} | "
                    f"{primary['metric']} {primary['value']:.4g} | {distance(result)} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
