"""What the linear maps of a model see: statistics of their inputs, by a forward pass of transformers on calibration inputs.

The inputs are the file that `mcwc-pack --calibration` is given, and as much of it as it takes: at most 24,576 tokens or 96
images, spread evenly over the file.
"""

import json
import re
from dataclasses import dataclass

import numpy as np
import torch
import transformers

TOKENS, IMAGES, WINDOW = 24576, 96, 256
BATCH = 8
LAYER = re.compile(r"\.(\d+)\.")
CLASSES = {
    "gpt_neox": transformers.AutoModelForCausalLM,
    "llama": transformers.AutoModelForCausalLM,
    "vit": transformers.AutoModelForImageClassification,
    "bert": transformers.AutoModel,
}

transformers.utils.logging.disable_progress_bar()


class _Stop(Exception):
    """The layer that was asked for has been run."""


@dataclass
class Inputs:
    """Statistics of the inputs of one linear map, each `[inputs]` or `[inputs, inputs]`."""

    count: int
    second_moment: np.ndarray
    """Mean of x x^T: half the Hessian of the squared error of an output."""
    mean_magnitude: np.ndarray
    greatest_magnitude: np.ndarray


class Calibrated:
    """A model of transformers, its linear maps by the names of their tensors in the checkpoint."""

    def __init__(self, model, weights, inputs):
        configuration = json.loads((model.directory / "config.json").read_text())
        loader = CLASSES[configuration["model_type"]]
        self.model = loader.from_pretrained(model.directory, dtype=torch.float32, attn_implementation="eager").eval()
        self.linears = dict(self._by_value(weights))
        self.batches = list(batches(configuration["model_type"], inputs))
        self.mask = None

    def _by_value(self, weights):
        """Linear maps have other names in transformers than in a file; their values tell which is which."""
        of_shape = {}
        for name, values in weights.items():
            of_shape.setdefault(values.shape, []).append(name)
        for module in self.model.modules():
            if isinstance(module, torch.nn.Linear):
                held = module.weight.detach().numpy()
                for name in of_shape.get(held.shape, []):
                    if np.array_equal(weights[name], held):
                        yield name, module

    def layers(self):
        """Names of linear maps, a list for each layer in the order they run, those of no layer last."""
        grouped = {}
        for name in self.linears:
            found = LAYER.search(name)
            grouped.setdefault(int(found[1]) if found else None, []).append(name)
        outside = grouped.pop(None, [])
        return [grouped[layer] for layer in sorted(grouped)] + ([outside] if outside else [])

    def statistics(self, names):
        """What the maps `names` see, with the weights as they are set now."""
        sums, handles, remaining = {}, [], set()

        def hook(name):
            def add(_, arguments):
                seen = arguments[0].detach()
                if self.mask is not None and seen.shape[:2] == self.mask.shape:
                    seen = seen[self.mask]
                rows = seen.reshape(-1, seen.shape[-1]).numpy()
                of_batch = (len(rows), rows.T @ rows, np.abs(rows).sum(0), np.abs(rows).max(0))
                known = sums.get(name)
                if known is None:
                    sums[name] = of_batch
                else:
                    sums[name] = (
                        *(a + b for a, b in zip(known[:3], of_batch[:3], strict=True)),
                        np.maximum(known[3], of_batch[3]),
                    )
                remaining.discard(name)

            return add

        def stop(*_):
            if not remaining:
                raise _Stop

        for name in names:
            handles.append(self.linears[name].register_forward_pre_hook(hook(name)))
            handles.append(self.linears[name].register_forward_hook(stop))
        try:
            with torch.inference_mode():
                for arguments, mask in self.batches:
                    self.mask = mask
                    remaining.update(names)
                    try:
                        self.model(**arguments)
                    except _Stop:
                        pass
        finally:
            for handle in handles:
                handle.remove()
        return {
            name: Inputs(count, moment / count, magnitude / count, greatest)
            for name, (count, moment, magnitude, greatest) in sums.items()
        }

    def set(self, name, values):
        """Gives a linear map other weights."""
        with torch.no_grad():
            self.linears[name].weight.copy_(torch.from_numpy(np.ascontiguousarray(values)))


def batches(model_type, path):
    """Arguments of the model, and the mask of what is no padding or None, batch by batch."""
    if path.suffix == ".npy" and model_type == "vit":
        pixels = torch.from_numpy(evenly(np.load(path), IMAGES))
        yield from (({"pixel_values": images}, None) for images in pixels.split(BATCH))
    elif path.suffix == ".npy":
        flat = np.load(path).ravel()
        windows = flat[: len(flat) // WINDOW * WINDOW].reshape(-1, WINDOW).astype(np.int64)
        ids = torch.from_numpy(evenly(windows, TOKENS // WINDOW))
        yield from (({"input_ids": rows}, None) for rows in ids.split(BATCH))
    else:
        tensors = read_tensors(path)
        mean_length = (tensors["attention_mask"] > 0).sum(1).mean()
        ids, mask = (
            torch.from_numpy(evenly(tensors[name].astype(np.int64), int(TOKENS / mean_length)))
            for name in ("input_ids", "attention_mask")
        )
        for rows, seen in zip(ids.split(8 * BATCH), mask.split(8 * BATCH), strict=True):
            yield {"input_ids": rows, "attention_mask": seen}, seen > 0


def evenly(rows, most):
    """At most so many of the rows, spread evenly."""
    kept = min(len(rows), most)
    return np.ascontiguousarray(rows[np.arange(kept) * len(rows) // kept])


def read_tensors(path):
    """The integer tensors of a safetensors file."""
    content = path.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    types = {"U8": np.uint8, "U16": np.uint16}
    found = {}
    for name, tensor in json.loads(content[8:start]).items():
        first, end = tensor["data_offsets"]
        found[name] = np.frombuffer(content[start + first : start + end], types[tensor["dtype"]]).reshape(
            tensor["shape"]
        )
    return found
