#!/usr/bin/env python3
"""Table 2 and Figure 3 of the paper on open models: every baseline that needs no training, beside mcwcfs, on one evaluation.

    benches/setup
    cargo build --release
    .bench-venv/bin/python benches/paper_baselines.py [--eval DIR] [--models NAME ...] [--plot FILE]

A language model and a model of images stand for the paper's Pythia-1.4B and ViT-B/16, whose figures are printed beside
ours: other models on other data, so only what a method loses can be compared, not the scores. All matrices are quantized,
embeddings and heads included, as the paper's rates imply; where a method needs inputs that embeddings do not have they are
rounded to nearest in its own format. Everything else is counted as it is stored. What needs calibration inputs gets those
that `mcwc-pack --calibration` gets. The baselines are small references of our own (measure/weight_only.py and
measure/entropy_coded.py); NNCodec and GGUF are their own software. Not here: the three that are trained with quantization
in the loop (QAT INT8, QAT INT4, mixed-precision QAT), for 10,000 to 20,000 steps in the paper.

Prints a table and with --plot draws Figure 3. All results are kept, with what they were made with, in
benches/results/task_metric.json, which this shares with task_metric.py.
"""

import argparse
import functools
import tempfile
from dataclasses import dataclass
from pathlib import Path

from measure import activations, calibration, checkpoint, entropy_coded, page, plot, rewritten, weight_only
from measure.curve import Curve, Point
from measure.evaluation import Evaluation, Rewriter, TaskPoint
from measure.ours import DEFAULT_BINARY, RESULTS, Mcwcfs, OnTask, say
from measure.peers import Peers
from measure.results import Results

MODELS = ("neox-8x256-tinystories", "vit-tiny-imagenet")
PAPER_MODELS = ("Pythia-1.4B, ppl", "ViT-B/16, top-1 %")
RATES = (8.3, 5.5, 4.2, 3.3, 2.8, 2.1)

OURS_IN_PAPER = {
    8.3: ((8.3, 15.46), (8.3, 81.45)),
    5.5: ((5.5, 15.72), (5.5, 81.08)),
    4.2: ((4.2, 15.95), (4.2, 80.92)),
    3.3: ((3.3, 16.18), (3.3, 80.54)),
    2.8: ((2.8, 16.40), (2.8, 80.15)),
    2.1: ((2.1, 17.05), (2.1, 79.10)),
}
"""MCWC in Tables 2 and 6: bits per parameter and score, of both models."""


@dataclass(frozen=True)
class Baseline:
    """A method at one setting."""

    codec: str
    setting: str
    quantize: object
    """Of a rewriter and calibration inputs: the bits of all matrices, and the values that come back."""
    in_paper: tuple | None = None
    """As in OURS_IN_PAPER."""

    def point(self, rewriter, inputs):
        """What it makes of a model, evaluated."""
        bits, given_back = self.quantize(rewriter, inputs)
        return rewriter.point(self.codec, self.setting, bits, given_back)


def each_matrix(quantizer, rewriter, _):
    """A quantizer that looks at one matrix and nothing else."""
    found = {name: quantizer(values) for name, values in rewriter.weights.items()}
    return sum(one.bits for one in found.values()), {name: one.values for name, one in found.items()}


def all_matrices(codec, rewriter, _):
    """A codec of all matrices together."""
    return codec(rewriter.weights)


def by_inputs(quantizer, fallback, rewriter, inputs):
    """A quantizer that looks at what each linear map sees once the layers before are quantized; `fallback` for the rest."""
    reference = activations.Calibrated(rewriter.model, rewriter.weights, inputs)
    bits, given_back = 0.0, {}
    for names in reference.layers():
        statistics = reference.statistics(names)
        for name in names:
            quantized = quantizer(rewriter.weights[name], statistics[name])
            reference.set(name, quantized.values)
            bits, given_back[name] = bits + quantized.bits, quantized.values
    for name, values in rewriter.weights.items():
        if name not in given_back:
            quantized = fallback(values)
            bits, given_back[name] = bits + quantized.bits, quantized.values
    return bits, given_back


def plain(quantizer, **options):
    return functools.partial(each_matrix, functools.partial(quantizer, **options))


def whole(codec, **options):
    return functools.partial(all_matrices, functools.partial(codec, **options))


def calibrated(quantizer, fallback):
    return functools.partial(by_inputs, quantizer, fallback)


PER_CHANNEL_INT8 = functools.partial(weight_only.symmetric, bits=8, per_channel=True)
BASELINES = [
    Baseline("uniform INT8", "", plain(weight_only.symmetric, bits=8, per_channel=False), ((8.6, 15.92), (8.6, 80.95))),
    Baseline("uniform INT4", "", plain(weight_only.symmetric, bits=4, per_channel=False), ((4.3, 16.85), (4.3, 79.35))),
    Baseline("per-channel INT8", "", plain(PER_CHANNEL_INT8), ((8.4, 15.78), (8.4, 81.05))),
    Baseline("per-channel INT4", "", plain(weight_only.symmetric, bits=4, per_channel=True)),
    Baseline(
        "SmoothQuant INT8", "", calibrated(weight_only.smooth_quant, PER_CHANNEL_INT8), ((8.4, 15.70), (8.4, 81.12))
    ),
    Baseline("round to nearest W4", "g128", plain(weight_only.nearest_in_groups)),
    Baseline(
        "GPTQ W4", "g128", calibrated(weight_only.gptq, weight_only.nearest_in_groups), ((4.3, 16.40), (4.3, 80.10))
    ),
    Baseline(
        "AWQ W4", "g128", calibrated(weight_only.awq, weight_only.nearest_in_groups), ((4.2, 16.25), (4.2, 80.25))
    ),
    *(
        Baseline(
            "RVQ + entropy",
            f"{stages} x {1 << index_bits}, vectors of {length}",
            whole(entropy_coded.residual_vectors, stages=stages, index_bits=index_bits, length=length),
        )
        for stages, index_bits, length in ((3, 10, 4), (2, 10, 4), (2, 8, 4), (1, 12, 4), (1, 10, 4))
    ),
    Baseline("prune 50 % + quantize", "INT8", whole(entropy_coded.pruned, bits_kept=8), ((2.7, 18.10), (2.7, 77.60))),
    Baseline("prune 50 % + quantize", "INT6", whole(entropy_coded.pruned, bits_kept=6)),
    Baseline("prune 50 % + quantize", "INT4", whole(entropy_coded.pruned, bits_kept=4)),
]
SQ = "learned SQ + entropy"
SQ_OPTIONS = ("--quantization", "scalar", "--alignment", "none", "--predictor", "none")
SQ_IN_PAPER = {2.8: ((2.9, 17.30), (2.9, 78.70))}
"""The paper's own definition: the codec with neither alignment nor prediction. Ours is fitted to weights, not distilled."""
REFERENCES = [Path(module.__file__) for module in (weight_only, entropy_coded, activations)]


@dataclass
class Row:
    """A method at one setting, on every model."""

    codec: str
    setting: str
    in_paper: tuple | None
    points: list


def measure(folder, model, mcwcfs, results):
    """Rows of one model; without `mcwcfs` the baselines alone."""
    with tempfile.TemporaryDirectory(prefix="mcwcfs-bench-") as work:
        evaluation = Evaluation(folder, model, Path(work))
        rewriter = Rewriter(evaluation, model)
        inputs = calibration.inputs(folder, model, Path(work))
        if inputs is None:
            raise SystemExit(f"{model.name}: the evaluation folder has no calibration inputs for it")
        if mcwcfs:
            yield from measure_ours(OnTask(mcwcfs, results, evaluation, folder, model))
        made_with = rewriter.made_with(checkpoint.fingerprint(REFERENCES))
        for baseline in BASELINES:
            name = f"{model.name}/{baseline.codec}/{baseline.setting}"
            quantize = functools.partial(baseline.point, rewriter, inputs)
            point = TaskPoint.of_json(results.kept(name, made_with, lambda quantize=quantize: quantize().to_json()))
            say(f"{model.name}: {baseline.codec} {point.cell()}")
            yield Row(baseline.codec, baseline.setting, baseline.in_paper, [point])
        peers = Peers(results, rewriter)
        for rate in RATES:
            for point in peers.at(rate):
                yield Row(point.codec, f"near {rate:g}", None, [point])


def measure_ours(ours):
    """Rows of one model that our binary makes."""
    yield Row("mcwcfs", "lossless", None, [ours.lossless()])
    for rate in RATES:
        yield Row("mcwcfs", f"{rate:g}", OURS_IN_PAPER[rate], [ours.uncalibrated(rate)])
    for rate in RATES:
        yield Row("mcwcfs calibrated", f"{rate:g}", OURS_IN_PAPER[rate], [ours.calibrated(rate)])
    for rate in RATES:
        point = ours.at(SQ, f"{rate:g}", "--bpp", f"{rate:g}", *SQ_OPTIONS)
        yield Row(SQ, f"{rate:g}", SQ_IN_PAPER.get(rate), [point])


def joined(by_model):
    """The rows of all models side by side: they have the same methods in the same order."""
    for rows in zip(*by_model, strict=True):
        yield Row(rows[0].codec, rows[0].setting, rows[0].in_paper, [row.points[0] for row in rows])


def curve(rows, codec, model):
    """Distance over bits of one codec on the model of this index."""
    points = [row.points[model] for row in rows if row.codec == codec and row.setting != "lossless"]
    return Curve([Point(point.bits, point.outcome.distance) for point in points])


def table(rows, models):
    """All rows in Markdown. Beside each baseline stands the distance of ours at its bits, between the measured points."""
    columns = ["method"]
    for model in models:
        columns += [f"{model}: bits", "MB", "score, distance", "mcwcfs at these bits", "calibrated"]
    columns += [f"paper: {name}" for name in PAPER_MODELS]
    lines = []
    for row in rows:
        cells = [f"{row.codec} {row.setting}".strip()]
        for index, point in enumerate(row.points):
            megabytes = point.bits * models[index].parameters / 8e6
            cells += [f"{point.bits:.2f}", f"{megabytes:.2f}", point.outcome.words()]
            for codec in ("mcwcfs", "mcwcfs calibrated"):
                at_these = None if row.codec.startswith("mcwcfs") else curve(rows, codec, index).error_at(point.bits)
                cells.append(None if at_these is None else f"{at_these:.4f}")
        in_paper = row.in_paper or ((None, None), (None, None))
        cells += [f"{score:g} at {bits:g} bits" if bits else None for bits, score in in_paper]
        lines.append(cells)
    return page.table(columns, lines)


@dataclass(frozen=True)
class Sized:
    """A model's name and size, for a column."""

    name: str
    parameters: int

    def __str__(self):
        return self.name


def panels(rows, models):
    """By model, the points of every codec."""
    found = {model.name: {} for model in models}
    for row in rows:
        if row.setting == "lossless":
            continue
        for model, point in zip(models, row.points, strict=True):
            found[model.name].setdefault(row.codec, []).append(point)
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--eval", metavar="DIR", help="evaluation folder; MCWCFS_EVAL without it")
    parser.add_argument("--models", nargs="+", default=MODELS, metavar="NAME", help="these")
    parser.add_argument("--only-peers", action="store_true", help="without mcwcfs")
    parser.add_argument("--results", type=Path, default=RESULTS / "task_metric.json", help="kept results")
    parser.add_argument("--plot", type=Path, help="write the curves there")
    parser.add_argument("--binary", default=DEFAULT_BINARY, help="mcwcfs (target/release/mcwcfs)")
    arguments = parser.parse_args()
    folder = checkpoint.evaluation_folder(arguments.eval)
    if folder is None:
        return
    mcwcfs = None if arguments.only_peers else Mcwcfs(arguments.binary)
    results = Results(arguments.results)
    models = checkpoint.open_models(folder, arguments.models)
    rows = list(joined([list(measure(folder, model, mcwcfs, results)) for model in models]))
    sized = [Sized(model.name, rewritten.parameters(model)) for model in models]
    print(table(rows, sized))
    if arguments.plot:
        plot.draw_on_task(panels(rows, sized), arguments.plot)


if __name__ == "__main__":
    main()
