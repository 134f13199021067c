"""Says in plain words what an unmodified reader sees in a mounted checkpoint: the last step of `tests/demo`.

    python show.py ORIGINAL PACKED MOUNTED

Reads every tensor of every mounted `.safetensors` file through a memory map, compares whole files by SHA-256 with the
original, and prints sizes, bits per parameter and a few values. The exit status is 1 if a lossless file differs.
"""

import hashlib
import sys
from pathlib import Path

from safetensors import safe_open


def sha256(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def main(original, packed, mounted):
    files = sorted(mounted.rglob("*.safetensors"))
    if not files:
        print(f"{mounted}: no .safetensors file to be seen")
        return 1
    parameters, shown, different = 0, None, []
    for file in files:
        name = file.relative_to(mounted)
        with safe_open(file, "pt") as opened:
            for tensor_name in opened.keys():
                tensor = opened.get_tensor(tensor_name)
                parameters += tensor.numel()
                if shown is None and tensor.ndim == 2:
                    shown = tensor_name, tensor.dtype, tuple(tensor.shape), tensor.flatten()[:4].float().tolist()
            count = len(opened.keys())
        ours, theirs = sha256(file), sha256(original / name)
        print(f"  {name}: {count} tensors, {file.stat().st_size:,} bytes")
        print(f"    SHA-256 of the original  {theirs}")
        print(f"    SHA-256 through the mount {ours}: {'equal' if ours == theirs else 'DIFFERENT'}")
        if ours != theirs:
            different.append(str(name))
    if shown:
        values = ", ".join(f"{value:.6f}" for value in shown[3])
        print(f"  {shown[0]} ({str(shown[1]).removeprefix('torch.')}, {list(shown[2])}) starts {values}")
    served = sum(file.stat().st_size for file in files)
    stored = sum(path.stat().st_size for path in packed.rglob("*.mcwc"))
    print(
        f"\n{parameters:,} parameters: {served:,} bytes as safetensors, {stored:,} bytes as .mcwc "
        f"({stored / served:.1%}), {8 * stored / max(parameters, 1):.2f} bits per parameter instead of "
        f"{8 * served / max(parameters, 1):.2f}."
    )
    if different:
        print(f"Not what was packed: {', '.join(different)}")
        return 1
    print("Every byte read through the mount is the original's.")
    return 0


if __name__ == "__main__":
    if len(sys.argv) != 4:
        sys.exit(__doc__)
    sys.exit(main(*map(Path, sys.argv[1:])))
