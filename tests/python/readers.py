"""Unmodified readers see in a mounted directory exactly what they see in the original one.

    python readers.py ORIGINAL MOUNTED [ORIGINAL MOUNTED...]

ORIGINAL holds the files that MOUNTED must equal: the checkpoint that was packed, or for a lossy archive what
`mcwcfs unpack` wrote. Every check reads MOUNTED through one reader's own path into the kernel: safetensors over a
private memory map, safetensors over `pread`, slices, four threads that fault pages of one map, `transformers`, mlx
(whole tensors by `pread` from several threads, out of order), a conversion to GGUF (a private map per tensor at unaligned
offsets, as llama.cpp's convert_hf_to_gguf does), and plain `read`. Prints one line per check; the exit status is 1 if any byte, name or size differs.
"""

import hashlib
import json
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import gguf
import mlx.core
import numpy as np
import torch
from gguf.utility import SafetensorsLocal
from safetensors import SafetensorError, safe_open


class Differs(Exception):
    """What differs, and where."""


def same_bits(tensor, reference):
    """Bit for bit, so that NaNs and signed zeros count."""
    return (
        tensor.dtype == reference.dtype
        and tensor.shape == reference.shape
        and torch.equal(tensor.contiguous().reshape(-1).view(torch.uint8), reference.contiguous().reshape(-1).view(torch.uint8))
    )


def relative_files(directory):
    return sorted(str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file())


def weight_files(directory):
    return [name for name in relative_files(directory) if name.endswith(".safetensors")]


def compare_listing(original, mounted):
    expected, got = relative_files(original), relative_files(mounted)
    if expected != got:
        raise Differs(f"files: only in the original {set(expected) - set(got)}, only in the mount {set(got) - set(expected)}")
    for name in expected:
        sizes = (original / name).stat().st_size, (mounted / name).stat().st_size
        if sizes[0] != sizes[1]:
            raise Differs(f"{name}: {sizes[1]} bytes, expected {sizes[0]}")
    return f"{len(expected)} files with the original's names and sizes"


def compare_tensors(original, mounted, backend):
    tensors = 0
    for file in weight_files(original):
        with safe_open(original / file, "pt") as expected, safe_open(mounted / file, "pt", backend=backend) as got:
            if expected.keys() != got.keys() or expected.metadata() != got.metadata():
                raise Differs(f"{file}: tensor names or metadata")
            for name in expected.keys():
                if not same_bits(got.get_tensor(name), expected.get_tensor(name)):
                    raise Differs(f"{file}: {name}")
                tensors += 1
    return f"{tensors} tensors equal"


def compare_slices(original, mounted):
    """A middle slice of every dimension, last tensor first, as a sharding loader would ask for."""
    slices = 0
    for file in weight_files(original):
        with safe_open(original / file, "pt") as expected, safe_open(mounted / file, "pt") as got:
            for name in reversed(list(expected.keys())):
                lazy = got.get_slice(name)
                shape = lazy.get_shape()
                whole = expected.get_tensor(name)
                for axis in range(len(shape)):
                    window = tuple([slice(None)] * axis + [slice(shape[axis] // 3, 2 * shape[axis] // 3 + 1)])
                    if 0 in shape:
                        continue
                    if not same_bits(lazy[window], whole[window]):
                        raise Differs(f"{file}: {name}, slice {window}")
                    slices += 1
    return f"{slices} slices equal"


def compare_with_threads(original, mounted):
    """The loader of transformers 5: threads that fault pages of one map at once, in no particular order."""
    tensors = 0
    for file in weight_files(original):
        with safe_open(original / file, "pt") as expected, safe_open(mounted / file, "pt") as got:
            names = list(expected.keys())
            interleaved = [name for start in range(7) for name in names[start::7]]
            with ThreadPoolExecutor(max_workers=4) as pool:
                # A clone reads every page in the worker; the map alone would leave that to the comparison.
                copies = list(pool.map(lambda name: got.get_tensor(name).clone(), interleaved))
            for name, copy in zip(interleaved, copies):
                if not same_bits(copy, expected.get_tensor(name)):
                    raise Differs(f"{file}: {name}")
                tensors += 1
    return f"{tensors} tensors equal"


def compare_models(original, mounted):
    """`from_pretrained` on both directories, where there is a model to build."""
    configuration = original / "config.json"
    architectures = json.loads(configuration.read_text()).get("architectures") if configuration.exists() else None
    if not architectures:
        return "not a directory that transformers can load: no config.json with architectures"
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    model_class = getattr(transformers, architectures[0])
    expected, got = (
        model_class.from_pretrained(directory, dtype="auto", local_files_only=True).state_dict()
        for directory in (original, mounted)
    )
    if expected.keys() != got.keys():
        raise Differs(f"parameters {expected.keys() ^ got.keys()}")
    for name, parameter in expected.items():
        if not same_bits(got[name], parameter):
            raise Differs(f"parameter {name}")
    return f"{architectures[0]}: {len(expected)} parameters equal"


def compare_arrays(original, mounted):
    tensors = 0
    for file in weight_files(original):
        expected, got = (mlx.core.load(str(directory / file)) for directory in (original, mounted))
        if expected.keys() != got.keys():
            raise Differs(f"{file}: tensor names")
        for name, array in expected.items():
            arrays = [np.array(one.reshape(-1).view(mlx.core.uint8)) for one in (array, got[name])]
            if array.dtype != got[name].dtype or array.shape != got[name].shape or not np.array_equal(*arrays):
                raise Differs(f"{file}: {name}")
            tensors += 1
    return f"{tensors} arrays equal"


def convert_to_gguf(directory, file, output):
    writer = gguf.GGUFWriter(output, "none")
    tensors = SafetensorsLocal(directory / file).tensors
    for name, tensor in tensors.items():
        stored = tensor.mmap_bytes()
        if tensor.dtype == "BF16":
            rows = stored.reshape(*tensor.shape[:-1], 2 * tensor.shape[-1])
            writer.add_tensor(name, rows, raw_dtype=gguf.GGMLQuantizationType.BF16)
        else:
            numbers = stored.view({"F32": np.float32, "F16": np.float16, "I64": np.int64}[tensor.dtype])
            writer.add_tensor(name, numbers.reshape(tensor.shape))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return len(tensors)


def compare_conversions(original, mounted):
    tensors = 0
    with tempfile.TemporaryDirectory() as work:
        outputs = Path(work, "original.gguf"), Path(work, "mounted.gguf")
        for file in weight_files(original):
            for directory, output in zip((original, mounted), outputs):
                converted = convert_to_gguf(directory, file, output)
            if outputs[0].read_bytes() != outputs[1].read_bytes():
                raise Differs(f"{file}: converted to GGUF")
            tensors += converted
    return f"{tensors} tensors converted alike"


def compare_digests(original, mounted):
    for name in relative_files(original):
        digests = []
        for directory in (original, mounted):
            with open(directory / name, "rb") as file:
                digests.append(hashlib.file_digest(file, "sha256").hexdigest())
        if digests[0] != digests[1]:
            raise Differs(f"{name}: SHA-256 {digests[1]}, expected {digests[0]}")
    return "every file has the original's SHA-256"


# Digests last: they read whole files, and the readers before them are to find nothing in the page cache.
CHECKS = {
    "listing": compare_listing,
    "slices": compare_slices,
    "mmap": lambda original, mounted: compare_tensors(original, mounted, "mmap"),
    "pread": lambda original, mounted: compare_tensors(original, mounted, "pread"),
    "threads": compare_with_threads,
    "transformers": compare_models,
    "mlx": compare_arrays,
    "gguf": compare_conversions,
    "digests": compare_digests,
}


def main(pairs):
    torch.set_num_threads(1)
    failures = 0
    for original, mounted in pairs:
        print(f"{mounted}:", flush=True)
        for check, compare in CHECKS.items():
            try:
                print(f"  {check}: {compare(original, mounted)}", flush=True)
            except (Differs, SafetensorError, OSError, RuntimeError) as error:
                failures += 1
                print(f"  {check}: FAILED: {error}", flush=True)
    return 1 if failures else 0


if __name__ == "__main__":
    paths = [Path(argument) for argument in sys.argv[1:]]
    if not paths or len(paths) % 2:
        sys.exit(__doc__)
    sys.exit(main(zip(paths[::2], paths[1::2])))
