"""Inputs to calibrate the open models with, from an evaluation folder, as mcwc-pack reads them."""

import json
import struct

import numpy as np

IMAGES_STEP = 4
SENTENCES = 2400


def inputs(folder, model, work):
    """A file of calibration inputs for `model`, in `work` where it has to be made; `None` where there are none."""
    config = json.loads((model.directory / "config.json").read_text())
    if config["model_type"] == "vit":
        return images(folder / "data" / "imagenet_sample.npz", work / "pixels.npy")
    if config["model_type"] == "bert":
        return sentences(folder / "calibration" / "stsb_wordpiece.npz", work / "sentences.safetensors")
    for task in config.get("eval_tasks", []):
        for name in {"tinystories": ["tinystories_bpe4096"], "tinystories_tok512": ["books_tok512"]}.get(task, []):
            if (folder / "calibration" / f"{name}.npy").exists():
                return folder / "calibration" / f"{name}.npy"
    return None


def images(source, path):
    """Every fourth image as normed pixels, [images, channels, height, width]."""
    if not source.exists():
        return None
    pixels = np.load(source)["x"][::IMAGES_STEP].astype(np.float32) / 255
    np.save(path, np.ascontiguousarray(((pixels - 0.5) / 0.5).transpose(0, 3, 1, 2)))
    return path


def held_out(folder, model, work):
    """A folder of evaluation data without what `inputs` takes of it; `None` where it takes nothing."""
    source = folder / "data" / "imagenet_sample.npz"
    if json.loads((model.directory / "config.json").read_text())["model_type"] != "vit" or not source.exists():
        return None
    data = work / "data"
    data.mkdir()
    sample = np.load(source)
    rest = np.arange(len(sample["y"])) % IMAGES_STEP != 0
    np.savez(data / source.name, x=sample["x"][rest], y=sample["y"][rest])
    return data


def sentences(source, path):
    """Padded token ids and their mask, as a safetensors file."""
    if not source.exists():
        return None
    stored = np.load(source)
    flat, offsets = stored["ids"], stored["off"][: SENTENCES + 1]
    lengths = np.diff(offsets)
    mask = (np.arange(lengths.max()) < lengths[:, None]).astype(np.uint8)
    ids = np.zeros(mask.shape, np.uint16)
    ids[mask > 0] = flat[: offsets[-1]]
    header = json.dumps({
        "attention_mask": {"dtype": "U8", "shape": mask.shape, "data_offsets": [0, mask.nbytes]},
        "input_ids": {"dtype": "U16", "shape": ids.shape, "data_offsets": [mask.nbytes, mask.nbytes + ids.nbytes]},
    }).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + mask.tobytes() + ids.tobytes())
    return path
