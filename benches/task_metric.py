#!/usr/bin/env python3
"""What a rate costs on the task: packs every model, mounts the archives and runs the evaluation on the mounted files.

    cargo build --release
    .bench-venv/bin/python benches/task_metric.py [--eval DIR] [--models NAME ...] [--rates BITS ...] [--no-peers]

Needs benches/setup's environment and an evaluation folder: models/, and eval.py, which reads a checkpoint directory by
plain open, seek and read, and prints its task metric and the distance to the original as JSON. Beside each rate stand
NNCodec and GGUF's format at the rate nearest to it: their decoded matrices in a copy of the checkpoint, everything
else as it was and counted as it was. Where the folder has calibration inputs for a model there is a calibrated archive
too; a model of images is calibrated on every fourth image, and all its lines are of the others. Prints one Markdown table,
a line for each model and rate; a cell has the bits per parameter of the whole file, the metric and the distance. The
lossless archive's metric is the original's. Every point is told on standard error as soon as it is known, with its squared
error.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from measure import calibration, checkpoint, gguf, rewritten
from measure.ours import DEFAULT_BINARY, REPOSITORY, Mcwcfs
from measure.store import Store

RATES = (8.0, 5.0, 4.2, 3.3, 2.8, 2.1)
CODECS = ("mcwcfs", "mcwcfs calibrated", "NNCodec", "GGUF")


@contextmanager
def mounted(mcwcfs, source, mount_point):
    """The directory `source`, mounted at `mount_point`."""
    mcwcfs.run("mount", source, mount_point)
    try:
        yield mount_point
    finally:
        mcwcfs.run("umount", mount_point)


@dataclass
class Evaluation:
    """How a model is evaluated."""

    script: Path
    original: Path
    data: Path | None

    def of(self, directory):
        """The JSON line of the evaluation of `directory`, with its distance to the original."""
        command = [sys.executable, str(self.script), str(directory), "--ref", str(self.original)]
        if self.data is not None:
            command += ["--data", str(self.data)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode != 0:
            raise SystemExit(f"{' '.join(command)}: exit status {done.returncode}\n{done.stderr.strip()}")
        return json.loads(done.stdout)


def distance(result):
    """How far the outputs are from the original's, in words."""
    task = result[result["primary"]["task"]]
    if "mean_cos_to_ref" in task:
        return f"1 - cosine {1 - task['mean_cos_to_ref']:.5f}"
    return f"KL {task['kl_to_ref']:.4f}"


@dataclass
class Point:
    """One codec at one rate."""

    codec: str
    detail: str
    bits: float
    result: dict

    def cell(self):
        """The table's cell."""
        detail = f" ({self.detail})" if self.detail else ""
        return f"{self.bits:.2f}, {self.result['primary']['value']:.4g}, {distance(self.result)}{detail}"


def told(model, asked, point, error):
    """The point, once it is told."""
    print(f"{model.name}, {asked}: {point.codec} {point.cell()}, squared error {error:.2e}", file=sys.stderr, flush=True)
    return point


class Peers:
    """What the other codecs make of one model."""

    def __init__(self, ggml, store, evaluation, model):
        from measure import nncodec  # only where it is installed

        self.nncodec = nncodec
        self.ggml, self.store, self.evaluation, self.model = ggml, store, evaluation, model
        self.weights = checkpoint.matrices(model.files())
        self.fingerprint = checkpoint.fingerprint(model.files())
        self.parameters = rewritten.parameters(model)
        self.other_bits = rewritten.other_bits(model, self.weights)
        self.formats = {}

    def at(self, rate):
        """The point of each codec at the rate nearest to `rate` bits per parameter."""
        matrix_bits = (rate * self.parameters - self.other_bits) / checkpoint.weight_count(self.weights)
        key = f"{self.fingerprint}-nncodec-{self.nncodec.VERSION}-{matrix_bits:.3f}"
        points = self.store.points(key, lambda: self.nncodec.around(self.weights, matrix_bits))
        nearest = min(points, key=lambda point: abs(point.bits - matrix_bits))
        bitstream = self.nncodec.encode(self.weights, self.nncodec.quantization_parameter_of(nearest))
        yield self.point(rate, "NNCodec", "", 8 * len(bitstream), self.nncodec.decode(bitstream))
        if self.ggml is not None:
            if not self.formats:
                self.formats = {name: gguf.round_trip(self.ggml, self.weights, name) for name in gguf.TYPES}
            aim = matrix_bits * checkpoint.weight_count(self.weights)
            name = min(self.formats, key=lambda name: abs(8 * self.formats[name][0] - aim))
            taken, decoded = self.formats[name]
            yield self.point(rate, "GGUF", name, 8 * taken, decoded)

    def point(self, rate, codec, detail, bits, decoded):
        """The point of a codec that takes `bits` for the matrices."""
        with tempfile.TemporaryDirectory(prefix="mcwcfs-bench-") as work:
            directory = Path(work) / self.model.name
            rewritten.write(self.model, directory, decoded)
            result = self.evaluation.of(directory)
        error = checkpoint.relative_squared_error(self.weights, decoded)
        point = Point(codec, detail, (bits + self.other_bits) / self.parameters, result)
        return told(self.model, f"{rate:g}", point, error)


def measure(mcwcfs, evaluation, model, rates, work, peers, inputs):
    """The lines of the table for one model."""
    packed, mount_point = work / "packed", work / "mnt"
    packed.mkdir()
    mount_point.mkdir()
    choices = [("lossless", "mcwcfs", ["--lossless"])]
    for rate in rates:
        choices.append((f"{rate:g}", "mcwcfs", ["--bpp", str(rate)]))
        if inputs is not None:
            choices.append((f"{rate:g}", "mcwcfs calibrated", ["--bpp", str(rate), "--calibration", inputs]))
    reports = {}
    for asked, codec, options in choices:
        name = f"{asked} {codec}"
        reports[name] = mcwcfs.pack(model.directory, packed / name, *options)
        if reports[name]["target_missed"]:
            print(f"{model.name}, {name}: {reports[name]['target_missed']}", file=sys.stderr)
    points = {}
    with mounted(mcwcfs, packed, mount_point):
        for asked, codec, _ in choices:
            name = f"{asked} {codec}"
            result = evaluation.of(mount_point / name)
            report = reports[name]
            point = Point(codec, "", report["bits_per_parameter"], result)
            points.setdefault(asked, []).append(told(model, asked, point, report["relative_squared_error"]))
    for rate in rates if peers else ():
        points[f"{rate:g}"] += peers.at(rate)
    primary = points["lossless"][0].result["primary"]
    title = f"{model.name}, {primary['task']} {primary['metric']} {primary['value']:.4g}"
    for name, of_rate in points.items():
        cells = {point.codec: point.cell() for point in of_rate}
        yield f"| {title} | {name} | " + " | ".join(cells.get(codec, "") for codec in CODECS) + " |"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--eval", metavar="DIR", help="evaluation folder; MCWCFS_EVAL without it")
    parser.add_argument("--models", nargs="+", default=[], metavar="NAME", help="only these")
    parser.add_argument(
        "--rates", nargs="+", type=float, default=RATES, metavar="BITS", help="bits per parameter of the file"
    )
    parser.add_argument("--no-peers", action="store_true", help="mcwcfs alone: needs numpy and nothing else")
    parser.add_argument("--no-calibration", action="store_true", help="leave the calibrated archives out")
    parser.add_argument(
        "--keep", type=Path, default=REPOSITORY / "target" / "rate_distortion", help="kept measurements"
    )
    parser.add_argument("--binary", default=DEFAULT_BINARY, help="mcwcfs (target/release/mcwcfs)")
    arguments = parser.parse_args()
    folder = checkpoint.evaluation_folder(arguments.eval)
    if folder is None:
        return
    mcwcfs, store = Mcwcfs(arguments.binary), Store(arguments.keep)
    ggml = None
    if not arguments.no_peers:
        try:
            ggml = gguf.Ggml()
        except gguf.Unavailable as why:
            print(f"GGUF is not measured: {why}", file=sys.stderr)
    rows = []
    for model in checkpoint.open_models(folder, arguments.models):
        with tempfile.TemporaryDirectory(prefix="mcwcfs-bench-") as work:
            work = Path(work)
            inputs = None if arguments.no_calibration else calibration.inputs(folder, model, work)
            evaluation = Evaluation(folder / "eval.py", model.directory, calibration.held_out(folder, model, work))
            peers = None if arguments.no_peers else Peers(ggml, store, evaluation, model)
            rows += measure(mcwcfs, evaluation, model, arguments.rates, work, peers, inputs)
    print("| model, metric of the original | asked | " + " | ".join(CODECS) + " |")
    print("|---" * (2 + len(CODECS)) + "|")
    print("\n".join(rows))


if __name__ == "__main__":
    main()
