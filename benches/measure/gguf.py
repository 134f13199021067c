"""GGUF's quantizers, llama.cpp's own code: llama-cpp-cffi's wheel carries ggml as a shared library with its symbols.

Weights are quantized without an importance matrix and in blocks along reading order, whatever the length of a row.
llama.cpp itself takes a coarser format for a matrix whose rows are no multiple of 256, so this is the kinder reading.
"""

import ctypes
import importlib.util
import os
from pathlib import Path

import numpy as np

from .checkpoint import relative_squared_error, weight_count
from .curve import Point

VERSION = "llama-cpp-cffi 0.4.42"
TYPES = {"Q2_K": 10, "Q3_K": 11, "Q4_K": 12, "Q4_0": 2, "Q5_K": 13, "Q6_K": 14, "Q8_0": 8}
"""Formats, with their number in `enum ggml_type`."""
BLOCK = 256
BLOCK_BYTES = {"Q2_K": 84, "Q3_K": 110, "Q4_K": 144, "Q4_0": 144, "Q5_K": 176, "Q6_K": 210, "Q8_0": 272}
"""What a block takes."""


class Unavailable(Exception):
    """There is no ggml here."""


class InitParameters(ctypes.Structure):
    """`struct ggml_init_params`."""

    _fields_ = [("mem_size", ctypes.c_size_t), ("mem_buffer", ctypes.c_void_p), ("no_alloc", ctypes.c_bool)]


class Ggml:
    """The library."""

    def __init__(self):
        package = importlib.util.find_spec("llama")
        places = package.submodule_search_locations if package else []
        libraries = [path for place in places for path in Path(place).glob("_llama_cpp_cpu*.so")]
        if not libraries:
            raise Unavailable(f"{VERSION} has no wheel for this Python and machine")
        self.library = open_lazily(libraries[0])
        # Making a context fills ggml's table of F16 values.
        self.library.ggml_init.restype = ctypes.c_void_p
        self.library.ggml_init.argtypes = [InitParameters]
        self.library.ggml_free.argtypes = [ctypes.c_void_p]
        self.library.ggml_free(self.library.ggml_init(InitParameters(1 << 16, None, False)))
        self.library.ggml_quantize_chunk.restype = ctypes.c_size_t
        self.library.ggml_quantize_chunk.argtypes = (
            [ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p] + [ctypes.c_int64] * 3 + [ctypes.c_void_p]
        )

    def round_trip(self, format_name, values):
        """Bytes it takes, and the values that come back."""
        padded = np.zeros(-(-values.size // BLOCK) * BLOCK, np.float32)
        padded[: values.size] = values.ravel()
        stored = np.empty(4 * padded.size, np.uint8)
        blocks = padded.size // BLOCK
        taken = self.library.ggml_quantize_chunk(
            TYPES[format_name], padded.ctypes.data, stored.ctypes.data, 0, blocks, BLOCK, None
        )
        decoded = np.empty_like(padded)
        dequantize = getattr(self.library, f"dequantize_row_{format_name[0].lower()}{format_name[1:]}")
        dequantize.restype = None
        dequantize.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64]
        dequantize(stored.ctypes.data, decoded.ctypes.data, padded.size)
        return taken, decoded[: values.size].reshape(values.shape)


def open_lazily(path):
    """Loads a library whose functions are looked up when they are called.

    The wheel was built with a newer libstdc++ than many machines have, and lacks one symbol there, of no use to the
    quantizers; Python's own loading insists on all of them.
    """
    loader = ctypes.CDLL(None)
    loader.dlopen.restype, loader.dlerror.restype = ctypes.c_void_p, ctypes.c_char_p
    handle = loader.dlopen(str(path).encode(), os.RTLD_LAZY)
    if not handle:
        raise Unavailable(loader.dlerror().decode())
    return ctypes.CDLL(str(path), handle=handle)


def nearest(bits):
    """The format whose bits per weight are nearest; of Q4_K and Q4_0, which take as many, the better."""
    return min(TYPES, key=lambda name: abs(8 * BLOCK_BYTES[name] / BLOCK - bits))


def round_trip(ggml, weights, format_name):
    """Bytes that all matrices take in one format, and the values that come back."""
    taken, decoded = 0, {}
    for name, values in weights.items():
        size, decoded[name] = ggml.round_trip(format_name, values)
        taken += size
    return taken, decoded


def point(ggml, weights, format_name):
    """Rate and error of one format over all matrices."""
    taken, decoded = round_trip(ggml, weights, format_name)
    return Point(8 * taken / weight_count(weights), relative_squared_error(weights, decoded), format_name)
