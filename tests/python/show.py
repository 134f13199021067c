"""Says in plain words what an unmodified reader sees in a mounted checkpoint: the last step of `tests/demo`.

    python show.py ORIGINAL PACKED MOUNTED

Reads every tensor of every mounted `.safetensors` file through a memory map, compares whole files by SHA-256 with the
original's and with what the archive promises (`user.mcwc.sha256`), and prints sizes, bits per parameter, errors and a few
values. The exit status is 1 if a byte is not what the archive promises, or if a bit-exact one has another hash than the
original.
"""

import hashlib
import os
import sys
from pathlib import Path

from safetensors import safe_open


def sha256(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def attribute(path, name):
    return os.getxattr(path, f"user.mcwc.{name}").decode()


def compare_tensors(file, original):
    """Parameters, squared error, energy, and the first values of the first matrix on both sides."""
    parameters, error, energy, shown = 0, 0.0, 0.0, None
    with safe_open(file, "pt") as ours, safe_open(original, "pt") as theirs:
        for name in ours.keys():
            got, expected = ours.get_tensor(name), theirs.get_tensor(name)
            parameters += got.numel()
            if got.is_floating_point():
                error += (got.double() - expected.double()).square().sum().item()
                energy += expected.double().square().sum().item()
            if shown is None and got.ndim == 2 and got.is_floating_point():
                values = [", ".join(f"{value:+.6f}" for value in side.flatten()[:4].tolist()) for side in (got, expected)]
                shown = f"{name} {list(got.shape)} starts {values[0]} (original: {values[1]})"
    return parameters, error, energy, shown


def main(original, packed, mounted):
    files = sorted(mounted.rglob("*.safetensors"))
    if not files:
        print(f"{mounted}: no .safetensors file to be seen")
        return 1
    print(f"\n{mounted.name}")
    served, parameters, wrong = 0, 0, []
    for file in files:
        name = file.relative_to(mounted)
        elements, error, energy, shown = compare_tensors(file, original / name)
        parameters += elements
        served += file.stat().st_size
        got, promised, source = sha256(file), attribute(file, "sha256"), sha256(original / name)
        print(f"  {name}: {file.stat().st_size:,} bytes, {elements:,} parameters")
        if shown:
            print(f"    {shown}")
        if attribute(file, "lossy") in ("0", "false"):
            print(f"    SHA-256 {got}, the original's: {'equal' if got == source else 'DIFFERENT'}")
            wrong += [] if got == source else [str(name)]
        else:
            print(f"    SHA-256 {got}, as the archive promises: {'equal' if got == promised else 'DIFFERENT'}")
            print(f"    squared error over squared weights: {error / energy if energy else 0.0:.2e}")
        wrong += [] if got == promised else [str(name)]
    stored = sum(path.stat().st_size for path in packed.rglob("*.mcwc"))
    print(
        f"  {served:,} bytes as safetensors, {stored:,} as .mcwc ({stored / served:.1%}): "
        f"{8 * stored / max(parameters, 1):.2f} bits per parameter instead of {8 * served / max(parameters, 1):.2f}"
    )
    if wrong:
        print(f"  WRONG: {', '.join(sorted(set(wrong)))}")
    return 1 if wrong else 0


if __name__ == "__main__":
    if len(sys.argv) != 4:
        sys.exit(__doc__)
    sys.exit(main(*map(Path, sys.argv[1:])))
