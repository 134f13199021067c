"""mcwcfs, through its command line: packs a checkpoint, takes it apart again and measures what came back."""

import json
import math
import re
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path

from . import calibration
from .checkpoint import fingerprint, matrices, relative_squared_error, weight_count
from .curve import Point
from .evaluation import TaskPoint

REPOSITORY = Path(__file__).resolve().parents[2]
DEFAULT_BINARY = REPOSITORY / "target" / "release" / "mcwcfs"
RESULTS = REPOSITORY / "benches" / "results"
"""Where results are kept."""


def say(text):
    """Tells who waits."""
    print(text, file=sys.stderr, flush=True)


class Mcwcfs:
    """The binary."""

    def __init__(self, binary):
        self.binary = Path(binary).resolve()
        if not self.binary.is_file():
            raise SystemExit(f"{self.binary}: not there; build it with cargo build --release, or name it with --binary")
        self.digest = fingerprint([self.binary])

    def run(self, *arguments):
        """Runs a subcommand to its end and returns its standard output."""
        command = [str(argument) for argument in (self.binary, *arguments)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode != 0:
            raise SystemExit(f"{' '.join(command)}: exit status {done.returncode}\n{done.stderr.strip()}")
        return done.stdout

    def pack(self, source, destination, *options):
        """Packs and returns the report."""
        return json.loads(self.run("pack", source, destination, "--force", "--json", *options))

    @contextmanager
    def mounted(self, source, mount_point):
        """The directory `source`, mounted at `mount_point`."""
        self.run("mount", source, mount_point)
        try:
            yield mount_point
        finally:
            self.run("umount", mount_point)

    def evaluated(self, evaluation, model, work, *options):
        """Packs `model` with `options` into `work`, and evaluates it through a mount: the report and the outcome."""
        packed, mount_point = work / "packed", work / "mnt"
        mount_point.mkdir()
        report = self.pack(model.directory, packed / model.name, *options)
        with self.mounted(packed, mount_point):
            return report, evaluation.of(mount_point / model.name)

    def point(self, weights, source, work, *options):
        """Packs `source`, the files of `weights`, with `options`, and decodes it into the directory `work`.

        Bits per matrix weight: those of the whole archive, headers, tables and checksums included, less the stored
        elements of tensors that are no matrices; over the matrix weights.
        """
        archive, unpacked = work / "packed", work / "unpacked"
        report = self.pack(source, archive, *options)
        archives = list(archive.rglob("*.mcwc"))
        others = 0
        for path in archives:
            inspected = json.loads(self.run("inspect", "--json", "--parts", path))
            others += sum(part["bytes"] for part in inspected["parts"] if part["tensor"] not in weights)
        self.run("unpack", archive, unpacked, "--force")
        decoded = matrices(sorted(unpacked.rglob("*.safetensors")))
        return Point(
            bits=8 * (report["archive_bytes"] - others) / weight_count(weights),
            error=relative_squared_error(weights, decoded),
            label=" ".join(options),
            whole_file_bits=report["bits_per_parameter"],
        )

    def kept_point(self, results, model, weights, *options):
        """The same of the safetensors files of `model` alone, kept for this binary."""

        def measure():
            with tempfile.TemporaryDirectory(prefix="mcwcfs-bench-") as work:
                source = Path(work) / "source"
                source.mkdir()
                for file in model.files():
                    (source / file.name).symlink_to(file.resolve())
                return [self.point(weights, source, Path(work), *options)]

        made_with = {"model": fingerprint(model.files()), "codec": self.digest}
        return results.points(f"{model.name}/mcwcfs/{' '.join(options)}", made_with, measure)[0]


BESIDE_THE_ENCODER = ("embeddings.*=lossless", "pooler.*=lossless")
ENCODER_MATRICES = re.compile(r"encoder\.layer\..*\.(dense|query|key|value)\.weight")


class OnTask:
    """What our archives of one model score, evaluated through the mount; kept for this binary."""

    def __init__(self, mcwcfs, results, evaluation, folder, model):
        self.mcwcfs, self.results, self.evaluation, self.folder, self.model = mcwcfs, results, evaluation, folder, model
        self.made_with = {
            "model": fingerprint(model.files()),
            "evaluation": evaluation.fingerprint,
            "codec": mcwcfs.digest,
        }

    def lossless(self):
        """The original's score, by the bytes that a lossless archive gives."""
        return self.at("mcwcfs", "lossless", "--lossless")

    def uncalibrated(self, rate):
        """Packed at `rate` bits per parameter, by the weights alone."""
        return self.at("mcwcfs", f"{rate:g}", "--bpp", f"{rate:g}")

    def calibrated(self, rate):
        """The same on the evaluation folder's calibration inputs; None where it has none for this model."""
        return self.at_calibrated("mcwcfs calibrated", f"{rate:g}", "--bpp", f"{rate:g}")

    def encoder(self, rate):
        """The matrices of a BERT encoder at `rate` bits, all else bit-exact: uncalibrated and calibrated, and their bits."""
        keep = [argument for rule in BESIDE_THE_ENCODER for argument in ("--keep", rule)]
        weights, others, parameters = self.bits_beside_the_encoder()
        for codec, at in (("mcwcfs", self.at), ("mcwcfs calibrated", self.at_calibrated)):
            asked = rate
            for setting in (f"{rate:g}", f"{rate:g}, asked again"):
                whole_file = f"{(others + asked * weights) / parameters:.4f}"
                point = at(f"{codec}, encoder alone", setting, "--bpp", whole_file, *keep)
                if point is None:
                    yield None
                    break
                bits = (point.bits * parameters - others) / weights
                if abs(bits / rate - 1) < 0.003 or asked != rate:
                    yield bits, point
                    break
                # Half a percent of the whole file is much of the encoder: what the first try missed is asked for as well.
                asked += rate - bits

    def bits_beside_the_encoder(self):
        """Matrix weights of the encoder, bits of all else in a bit-exact archive, and parameters."""
        with tempfile.TemporaryDirectory(prefix="mcwcfs-bench-") as work:
            report = self.mcwcfs.pack(self.model.directory, Path(work) / "packed", "--lossless")
        found = [tensor for tensor in report["tensors"] if ENCODER_MATRICES.fullmatch(tensor["name"])]
        elements = [math.prod(tensor["shape"]) for tensor in found]
        taken = sum(count * tensor["bits_per_element"] for count, tensor in zip(elements, found))
        return sum(elements), 8 * report["archive_bytes"] - taken, report["parameters"]

    def trained(self, rate):
        """Calibrated and trained through the decoded model."""
        return self.at_calibrated("mcwcfs trained", f"{rate:g}", "--bpp", f"{rate:g}", "--train", "on")

    def at_calibrated(self, codec, setting, *options):
        """Packed with `options` on the evaluation folder's calibration inputs; None where it has none for this model."""
        with tempfile.TemporaryDirectory(prefix="mcwcfs-bench-") as work:
            inputs = calibration.inputs(self.folder, self.model, Path(work))
            if inputs is None:
                return None
            return self.at(codec, setting, *options, "--calibration", inputs)

    def at(self, codec, setting, *options):
        """Packed with `options`."""

        def measure():
            with tempfile.TemporaryDirectory(prefix="mcwcfs-bench-") as work:
                report, outcome = self.mcwcfs.evaluated(self.evaluation, self.model, Path(work), *options)
            if report["target_missed"]:
                say(f"{self.model.name}, {codec} {setting}: {report['target_missed']}")
            bits, error = report["bits_per_parameter"], report["relative_squared_error"]
            return TaskPoint(codec, "", bits, error, outcome).to_json()

        name = f"{self.model.name}/{codec}/{setting}"
        return TaskPoint.of_json(self.results.kept(name, self.made_with, measure))
