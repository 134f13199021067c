"""What transformers computes, for the program to compute too: small random checkpoints, inputs, and the models' outputs.

    python forward.py DIRECTORY

makes for each family the checkpoint DIRECTORY/FAMILY/, the inputs DIRECTORY/FAMILY.safetensors, and DIRECTORY/FAMILY.npy:
logits of every token or image, or where there is no head the last hidden states, one row each.
"""

import sys
from pathlib import Path

import numpy
from safetensors.numpy import save_file

import checkpoints

FAMILIES = ["bert", "gpt-neox", "llama-gqa", "llama-mqa", "mistral-gqa", "opt", "vit"]


def main(directory):
    for family in FAMILIES:
        model = checkpoints.make(family, directory / family)
        inputs = {name: tensor.numpy() for name, tensor in checkpoints.model_input(model).items()}
        outputs = checkpoints.forward(model).numpy().astype(numpy.float32)
        save_file(inputs, directory / f"{family}.safetensors")
        numpy.save(directory / f"{family}.npy", outputs.reshape(-1, outputs.shape[-1]))


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: forward.py DIRECTORY")
    main(Path(sys.argv[1]))
