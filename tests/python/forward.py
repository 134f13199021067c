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

FAMILIES = [
    "bert", "gpt2", "gpt-neox", "llama-gqa", "llama-linear", "llama-long", "llama-mqa", "mistral-gqa", "opt", "vit", "vit-timm",
]
# Rotary positions scaled for longer contexts; of these only the fastest pair turns more than once in 16 positions.
SCALED = {
    "llama-linear": dict(rope_type="linear", factor=2.0),
    "llama-long": dict(
        rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=16
    ),
}
# As the program reads them; timm has another name.
NAMES = {"x": "pixel_values"}


def main(directory):
    for family, scaling in SCALED.items():
        rotary = dict(rope_theta=10_000.0, **scaling)
        checkpoints.FAMILIES[family] = lambda rotary=rotary: checkpoints.llama(2, rope_parameters=rotary)
    for family in FAMILIES:
        model = checkpoints.make(family, directory / family)
        inputs = {NAMES.get(name, name): tensor.numpy() for name, tensor in checkpoints.model_input(model).items()}
        outputs = checkpoints.forward(model).numpy().astype(numpy.float32)
        save_file(inputs, directory / f"{family}.safetensors")
        numpy.save(directory / f"{family}.npy", outputs.reshape(-1, outputs.shape[-1]))


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: forward.py DIRECTORY")
    main(Path(sys.argv[1]))
