#!/usr/bin/env python3
"""What a rate costs on the task: packs every model, mounts the archives and runs the evaluation on the mounted files.

    cargo build --release
    .bench-venv/bin/python benches/task_metric.py [--eval DIR] [--models NAME ...] [--rates BITS ...] [--plot FILE]

Needs benches/setup's environment and an evaluation folder: models/, and eval.py, which reads a checkpoint directory by
plain open, seek and read, and prints its task metric and the distance to the original as JSON. Beside each rate stand
NNCodec and GGUF's format at the rate nearest to it: their decoded matrices in a copy of the checkpoint, everything
else as it was and counted as it was. Where the folder has calibration inputs for a model there is a calibrated archive
too; a model of images is calibrated on every fourth image, and all its lines are of the others. Prints one Markdown table,
a line for each model and rate; a cell has the bits per parameter of the whole file, the metric and the distance. The
lossless archive's metric is the original's.

--encoder prints another table instead, of all-MiniLM-L6-v2 with only the matrices of its encoder quantized, and --training
one of calibrated archives at low rates, with training through the decoded model and without.

Results are kept in benches/results/task_metric.json: those of mcwcfs are measured again for another binary, those of the
peers for another version of theirs, and all for another model or evaluation.
"""

import argparse
import tempfile
from dataclasses import dataclass
from pathlib import Path

from measure import checkpoint, page, plot
from measure.evaluation import Evaluation, Rewriter, TaskPoint
from measure.ours import DEFAULT_BINARY, RESULTS, Mcwcfs, OnTask, say
from measure.peers import Peers
from measure.results import Results

RATES = (8.3, 8.0, 5.5, 5.0, 4.2, 3.3, 2.8, 2.1)
ENCODER_RATES = (4.2, 2.8, 2.1)
TRAINED_RATES = (2.8, 2.1)
CODECS = ("mcwcfs", "mcwcfs calibrated", "NNCodec", "GGUF")


@dataclass
class Line:
    """One model at one rate."""

    model: str
    original: TaskPoint | None
    rate: float
    points: dict
    """By codec."""

    def title(self):
        """The model, and the original's score."""
        if self.original is None:
            return self.model
        outcome = self.original.outcome
        return f"{self.model}, {outcome.task} {outcome.metric} {outcome.score:.4g}"


def measure(folder, model, rates, mcwcfs, results, peers_too):
    """The lines of one model; without `mcwcfs` the peers alone."""
    with tempfile.TemporaryDirectory(prefix="mcwcfs-bench-") as work:
        evaluation = Evaluation(folder, model, Path(work))
        ours = OnTask(mcwcfs, results, evaluation, folder, model) if mcwcfs else None
        peers = Peers(results, Rewriter(evaluation, model)) if peers_too else None
        original = ours.lossless() if ours else None
        for rate in rates:
            found = [ours.uncalibrated(rate), ours.calibrated(rate)] if ours else []
            found += peers.at(rate) if peers else []
            for point in filter(None, found):
                say(f"{model.name}, {rate:g}: {point.codec} {point.cell()}, squared error {point.squared_error:.2e}")
            yield Line(model.name, original, rate, {point.codec: point for point in found if point})


def encoder_table(folder, model, mcwcfs, results):
    """What the matrices of a BERT encoder lose at each rate, everything else bit-exact."""
    rows = []
    with tempfile.TemporaryDirectory(prefix="mcwcfs-bench-") as work:
        ours = OnTask(mcwcfs, results, Evaluation(folder, model, Path(work)), folder, model)
        for rate in ENCODER_RATES:
            found = ours.encoder(rate)
            cells = [f"{bits[0]:.2f}, {bits[1].outcome.words()}" if bits else None for bits in found]
            rows.append([f"{rate:g}", *cells])
            say(f"{model.name}, encoder alone at {rate:g}: {cells}")
    return page.table([f"{model.name}: bits per encoder weight", "mcwcfs", "mcwcfs calibrated"], rows)


def training_table(folder, models, mcwcfs, results):
    """What training through the decoded model is worth at the lowest rates."""
    rows = []
    for model in models:
        with tempfile.TemporaryDirectory(prefix="mcwcfs-bench-") as work:
            ours = OnTask(mcwcfs, results, Evaluation(folder, model, Path(work)), folder, model)
            for rate in TRAINED_RATES:
                cells = [point.cell() if point else None for point in (ours.calibrated(rate), ours.trained(rate))]
                rows.append([model.name, f"{rate:g}", *cells])
                say(f"{model.name}, {rate:g}, calibrated, and trained too: {cells}")
    return page.table(["model", "asked", "mcwcfs calibrated", "trained too"], rows)


def table(lines):
    """All lines in Markdown."""
    rows = []
    for line in lines:
        cells = [line.points[codec].cell() if codec in line.points else None for codec in CODECS]
        rows.append([line.title(), f"{line.rate:g}", *cells])
    return page.table(["model, metric of the original", "asked", *CODECS], rows)


def panels(lines):
    """By model, what each codec's points are."""
    found = {}
    for line in lines:
        of_model = found.setdefault(line.model, {})
        for codec, point in line.points.items():
            of_model.setdefault(codec, []).append(point)
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--eval", metavar="DIR", help="evaluation folder; MCWCFS_EVAL without it")
    parser.add_argument("--models", nargs="+", default=[], metavar="NAME", help="only these")
    parser.add_argument(
        "--rates", nargs="+", type=float, default=RATES, metavar="BITS", help="bits per parameter of the file"
    )
    alone = parser.add_mutually_exclusive_group()
    alone.add_argument("--no-peers", action="store_true", help="mcwcfs alone")
    alone.add_argument("--only-peers", action="store_true", help="without mcwcfs")
    alone.add_argument("--encoder", action="store_true", help=f"{checkpoint.MINILM}, all but its encoder bit-exact")
    alone.add_argument("--training", action="store_true", help="calibrated archives, and trained ones")
    parser.add_argument("--results", type=Path, default=RESULTS / "task_metric.json", help="kept results")
    parser.add_argument("--plot", type=Path, help="write the curves there")
    parser.add_argument("--binary", default=DEFAULT_BINARY, help="mcwcfs (target/release/mcwcfs)")
    arguments = parser.parse_args()
    folder = checkpoint.evaluation_folder(arguments.eval)
    if folder is None:
        return
    mcwcfs = None if arguments.only_peers else Mcwcfs(arguments.binary)
    results, lines = Results(arguments.results), []
    if arguments.encoder:
        [model] = checkpoint.open_models(folder, [checkpoint.MINILM])
        print(encoder_table(folder, model, mcwcfs, results))
        return
    models = checkpoint.open_models(folder, arguments.models)
    if arguments.training:
        print(training_table(folder, models, mcwcfs, results))
        return
    for model in models:
        lines += measure(folder, model, arguments.rates, mcwcfs, results, not arguments.no_peers)
    print(table(lines))
    if arguments.plot:
        plot.draw_on_task(panels(lines), arguments.plot)


if __name__ == "__main__":
    main()
