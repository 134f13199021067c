"""What the rest of a checkpoint's life would say of it: its task metric, and the distance of its outputs to the original's.

An evaluation folder has an `eval.py` that reads a checkpoint directory by plain open, seek and read, and prints one JSON
line.
"""

import json
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

from . import calibration, checkpoint, rewritten


@dataclass(frozen=True)
class Outcome:
    """What an evaluation says of one checkpoint."""

    task: str
    metric: str
    score: float
    distance_kind: str
    """`KL`, nats per prediction, or `1 - cosine` of embeddings."""
    distance: float
    """From the original's outputs; far less noisy than the score."""

    def words(self):
        """Score and distance."""
        digits = ".4f" if self.distance_kind == "KL" else ".5f"
        return f"{self.score:.4g}, {self.distance_kind} {self.distance:{digits}}"


@dataclass(frozen=True)
class TaskPoint:
    """One codec at one setting."""

    codec: str
    setting: str
    bits: float
    """Bits per parameter of the whole checkpoint, everything that decoding needs included."""
    squared_error: float
    """Relative, over what was quantized."""
    outcome: Outcome

    @classmethod
    def of_json(cls, stored):
        """As `to_json` wrote it."""
        return cls(**{**stored, "outcome": Outcome(**stored["outcome"])})

    def to_json(self):
        """Plain values."""
        return asdict(self)

    def cell(self):
        """A table's cell."""
        setting = f" ({self.setting})" if self.setting else ""
        return f"{self.bits:.2f}, {self.outcome.words()}{setting}"


class Evaluation:
    """How one model is evaluated: on data that it was not calibrated with."""

    def __init__(self, folder, model, work):
        self.script, self.original = folder / "eval.py", model.directory
        self.tasks = json.loads((model.directory / "config.json").read_text()).get("eval_tasks", [])
        self.held_out = calibration.held_out(folder, model, work)
        data = self.held_out or folder / "data"
        self.fingerprint = checkpoint.fingerprint([self.script, *sorted(data.glob("*.np[yz]"))])

    def of(self, directory):
        """The outcome of the checkpoint in `directory`."""
        command = [sys.executable, str(self.script), str(directory), "--ref", str(self.original)]
        if self.tasks:
            command += ["--task", self.tasks[0]]
        if self.held_out is not None:
            command += ["--data", str(self.held_out)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode != 0:
            raise SystemExit(f"{' '.join(command)}: exit status {done.returncode}\n{done.stderr.strip()}")
        result = json.loads(done.stdout)
        primary = result["primary"]
        task = result[primary["task"]]
        kind, distance = ("KL", "kl_to_ref") if "kl_to_ref" in task else ("1 - cosine", "mean_cos_to_ref")
        value = task[distance] if kind == "KL" else 1 - task[distance]
        return Outcome(primary["task"], primary["metric"], primary["value"], kind, value)


class Rewriter:
    """Evaluates what another codec makes of a model's matrices: in a copy of the checkpoint, everything else as it was and
    counted as it was.

    A matrix here is any tensor with two axes longer than one, kernels of convolutions and position embeddings included:
    were they counted as stored, a codec of matrices would be charged for what its users would quantize too.
    """

    def __init__(self, evaluation, model):
        self.evaluation, self.model = evaluation, model
        self.weights = checkpoint.matrices(model.files(), folded=True)
        self.weight_count = checkpoint.weight_count(self.weights)
        self.fingerprint = checkpoint.fingerprint(model.files())
        self.parameters = rewritten.parameters(model)
        self.other_bits = rewritten.other_bits(model, self.weights)

    def made_with(self, codec):
        """What a point of `codec`, its version included, depends on."""
        return {"model": self.fingerprint, "evaluation": self.evaluation.fingerprint, "codec": codec}

    def matrix_bits(self, bits):
        """Bits that are left per matrix weight at `bits` per parameter."""
        return (bits * self.parameters - self.other_bits) / self.weight_count

    def point(self, codec, setting, bits, decoded):
        """The point of a codec whose matrices take `bits` and become `decoded`."""
        with tempfile.TemporaryDirectory(prefix="mcwcfs-bench-") as work:
            directory = Path(work) / self.model.name
            rewritten.write(self.model, directory, decoded)
            outcome = self.evaluation.of(directory)
        error = checkpoint.relative_squared_error(self.weights, decoded)
        return TaskPoint(codec, setting, (bits + self.other_bits) / self.parameters, error, outcome)
