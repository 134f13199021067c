"""Checkpoints on disk: which models are open to measure, and their matrices as numpy arrays.

Reads safetensors with numpy alone, so that what is measured depends on no reader.
"""

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

MINILM = "all-MiniLM-L6-v2"


@dataclass(frozen=True)
class Model:
    """A checkpoint directory."""

    name: str
    directory: Path

    def files(self):
        """Its safetensors files."""
        return sorted(self.directory.glob("*.safetensors"))


def evaluation_folder(argument):
    """The evaluation folder, from the command line or MCWCFS_EVAL; None, with one line said, where there is none."""
    folder = argument or os.environ.get("MCWCFS_EVAL")
    if not folder:
        print("no evaluation folder: name it with --eval DIR or MCWCFS_EVAL (models/, eval.py); nothing measured")
        return None
    if not (Path(folder) / "models").is_dir():
        print(f"{folder}: has no models/, expected an evaluation folder (models/, eval.py); nothing measured")
        return None
    return Path(folder).resolve()


def open_models(folder, wanted):
    """The models of `folder`, and all-MiniLM-L6-v2 where tests/setup put it; only those in `wanted`, if any are."""
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "mcwcfs" / MINILM
    directories = [cache, *sorted((folder / "models").iterdir())]
    models = {path.name: Model(path.name, path) for path in directories if any(path.glob("*.safetensors"))}
    if MINILM not in models:
        print(f"{MINILM}: not at {cache}; tests/setup fetches it")
    unknown = [name for name in wanted if name not in models]
    if unknown:
        raise SystemExit(f"no such model: {', '.join(unknown)}; there are {', '.join(models)}")
    return [models[name] for name in wanted or models]


def matrices(files, folded=False):
    """Name and values, as float32, of every two-dimensional floating-point tensor in `files`.

    `folded` takes tensors of more axes too, where two of them are longer than one: as the first such axis by all the rest.
    """
    found = {}
    for file in files:
        mapped = np.memmap(file, np.uint8, "r")
        header_bytes = int(mapped[:8].view("<u8")[0])
        header = json.loads(mapped[8 : 8 + header_bytes].tobytes())
        for name, tensor in header.items():
            if name == "__metadata__" or 0 in tensor["shape"]:
                continue
            shape = folded_shape(tensor["shape"]) if folded else tensor["shape"]
            if len(shape) != 2:
                continue
            start, end = (8 + header_bytes + offset for offset in tensor["data_offsets"])
            values = as_float32(tensor["dtype"], mapped[start:end])
            if values is not None:
                found[name] = values.reshape(shape)
    return found


def folded_shape(shape):
    """A tensor's shape as that of a matrix; shorter where it has fewer than two axes longer than one."""
    long = [length for length in shape if length > 1]
    return [long[0], int(np.prod(long[1:]))] if len(long) > 1 else long


def as_float32(dtype, stored):
    """The values of a float tensor's bytes; None for any other type."""
    stored = np.frombuffer(stored.tobytes(), np.uint8)  # a tensor may start at any byte; a copy is aligned
    match dtype:
        case "F32":
            return stored.view("<f4")
        case "F16" | "F64":
            return stored.view({"F16": "<f2", "F64": "<f8"}[dtype]).astype(np.float32)
        case "BF16":
            return (stored.view("<u2").astype(np.uint32) << 16).view(np.float32)
    return None


def weight_count(weights):
    """Matrix weights."""
    return sum(values.size for values in weights.values())


def energy(weights):
    """Sum of squares over all matrices."""
    return sum(float(np.square(values, dtype=np.float64).sum()) for values in weights.values())


def relative_squared_error(weights, decoded):
    """Squared error over squared weights, over all matrices together. `decoded` has every matrix, in the same shape."""
    squared = 0.0
    for name, values in weights.items():
        if decoded[name].shape != values.shape:
            raise ValueError(f"{name}: decoded to {decoded[name].shape}, expected {values.shape}")
        squared += float(np.square(decoded[name].astype(np.float64) - values).sum())
    return squared / energy(weights)


def fingerprint(files):
    """Enough of the SHA-256 of the files to keep measurements under."""
    digest = hashlib.sha256()
    for file in files:
        with open(file, "rb") as opened:
            digest.update(hashlib.file_digest(opened, "sha256").digest())
    return digest.hexdigest()[:16]
