"""Loads a mounted checkpoint with transformers, cold, again and again until standard input ends.

    python cold_loads.py ORIGINAL MOUNTED

Says `ready` when the loads begin, so that whoever started it can meanwhile do what readers must not notice, and compares
every parameter of every load with ORIGINAL's. The exit status is 1 if a bit differs or a load fails.
"""

import os
import select
import sys
from pathlib import Path

import torch
from transformers import AutoModel


def forget_pages(directory):
    """Has the kernel drop what it cached, so that the next load asks the file system again."""
    for path in directory.rglob("*.safetensors"):
        descriptor = os.open(path, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def main(original, mounted):
    expected = AutoModel.from_pretrained(original).state_dict()
    print("ready", flush=True)
    loads = 0
    while not (loads and select.select([sys.stdin], [], [], 0)[0]):
        forget_pages(mounted)
        got = AutoModel.from_pretrained(mounted).state_dict()
        if expected.keys() != got.keys():
            sys.exit("other parameters")
        for name, parameter in expected.items():
            if not torch.equal(parameter, got[name]):
                sys.exit(f"{name} differs in load {loads}")
        loads += 1
    print(f"{loads} loads", flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
