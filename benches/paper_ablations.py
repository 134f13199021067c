#!/usr/bin/env python3
"""Tables 14 and 15 of the paper on an open language model: every switch near 4.2 bits per parameter, beside its figures.

    benches/setup
    cargo build --release
    .bench-venv/bin/python benches/paper_ablations.py [--eval DIR] [--model NAME]

Each row packs the model with the options of ROWS below, mounts the archive, evaluates it on the mounted files, and asks
`mcwcfs inspect` where the bits went and `mcwcfs bench` how long one thread decodes. *Full* is the paper's default
configuration (its Table 3), alignment and prediction forced whether they pay or not, with two differences: our quantizer is
trellis-coded, and calibration by closed-loop quantization stands for the paper's distillation. *mcwcfs* is our own default.
Rows that the paper compares at one rate are packed at 4.2 bits per parameter; those whose point is the rate (keyframes,
entropy model, coding of permutations) at its squared error, and compared with the full configuration packed so too.

*Nats lost* is the KL divergence from the original's predictions; for the paper ln(perplexity / 15.31), 15.31 being the
perplexity at 22.1 bits in its Table 6. Calibration is on 6,144 tokens, a quarter of what the other drivers give, so that an
hour is enough for all rows. *Residual entropy* is bits per code of predicted parts, *permutations* their share of
the archive. The last column compares what the row costs over the full configuration, there and here. Decode times are of
one thread on this machine and 8.4 M parameters; the paper's are of 1.4 G on theirs.

An option that the binary does not know is an error before anything is measured. Results are kept in
benches/results/paper_ablations.json.
"""

import argparse
import json
import math
import statistics
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from measure import calibration, checkpoint, page
from measure.evaluation import Evaluation
from measure.ours import DEFAULT_BINARY, RESULTS, Mcwcfs, say
from measure.results import Results

MODEL = "neox-8x256-tinystories"
RATE = 4.2
CALIBRATION = "CALIBRATION"
"""Stands for the file of calibration inputs in options."""
CALIBRATION_TOKENS = 6144
PAPER_ORIGINAL = 15.31
REPEATS = 3
"""Decodings of which the fastest counts."""


@dataclass(frozen=True)
class InPaper:
    """A row of the paper: Pythia-1.4B on WikiText-103."""

    bits: float
    perplexity: float
    residual_entropy: float
    permutations: float | None
    """Share of the bits, in percent; Table 14 does not have it."""
    seconds: float

    @property
    def nats(self):
        """Nats per prediction lost."""
        return math.log(self.perplexity / PAPER_ORIGINAL)


@dataclass(frozen=True)
class Row:
    """A switch."""

    name: str
    in_paper: InPaper | None
    change: dict | None
    """Options that differ from FULL; None for an option takes it away. None where there is no such switch."""
    error_of: str | None = None
    """Packed to the squared error of this row, not to the rate."""
    repeated: tuple = ()
    """An option, and its values over which the mean is taken."""
    beside: str = "Full, K = 4"
    """The row that this one's cost is over."""
    note: str = ""
    """Why there is no such switch, or where ours is another."""


@dataclass(frozen=True)
class Section:
    """A heading between rows."""

    name: str


FULL = {
    "--force-prediction": "",
    "--alignment": "hybrid",
    "--calibration": CALIBRATION,
    "--assignment": "exact",
    "--predictor": "network",
    "--steps": "per-run",
    "--permutations": "lehmer",
    "--keyframe-interval": "4",
}
"""The paper's default (its Table 3) with our quantizer: an option without a value has an empty one."""
UNCALIBRATED = {"--calibration": None, "--alignment": "weights"}
"""What scalar and vector quantizers need: calibration is within the search of the trellis. And tables that do not reach far:
its targets move beyond them."""
OURS = dict.fromkeys(FULL)
FULL_IN_PAPER = InPaper(4.2, 15.95, 2.05, 5.4, 2.5)
FULL_NAME = "Full, K = 4"
BASE_NAME = "Full without calibration (weight similarity)"
FULL_BY_ERROR = "Full, packed to its own squared error"
BASE_BY_ERROR = "Full without calibration, to its own squared error"
BESIDE_FULL = {"error_of": FULL_NAME, "beside": FULL_BY_ERROR}
BESIDE_BASE = {"error_of": BASE_NAME, "beside": BASE_BY_ERROR}
"""Where the point is the rate: rate control by error ends at other rates than the one that gave the error."""
ROWS = [
    Row(FULL_NAME, FULL_IN_PAPER, {}),
    Row(BASE_NAME, None, UNCALIBRATED),
    Row(FULL_BY_ERROR, None, {}, error_of=FULL_NAME),
    Row(BASE_BY_ERROR, None, UNCALIBRATED, error_of=BASE_NAME),
    Row("*mcwcfs, our default*", None, OURS),
    Row("*mcwcfs, our default, calibrated*", None, {**OURS, "--calibration": CALIBRATION}),
    Section("Table 14"),
    Row("Residual-energy alignment", InPaper(4.2, 15.85, 1.98, 5.4, 2.6), {"--alignment": "residual-energy"}),
    Row(
        "Permutations delta-coded across depth",
        InPaper(4.1, 15.95, 2.05, 3.8, 2.5),
        {"--permutations": "delta"},
        **BESIDE_FULL,
    ),
    Row("No alignment", InPaper(4.2, 16.55, 2.42, None, 2.4), {"--alignment": "none"}),
    Row("Random alignment", InPaper(4.2, 16.80, 2.55, None, 2.4), {"--alignment": "random"}),
    Row(
        "No predictor (direct coding)",
        InPaper(4.2, 16.70, 2.50, None, 2.3),
        {"--predictor": "none", "--force-prediction": None},
    ),
    Row(
        "No entropy model (fixed length)",
        InPaper(5.1, 15.97, 2.05, None, 2.4),
        {**UNCALIBRATED, "--entropy-model": "fixed-length"},
        **BESIDE_BASE,
    ),
    Row("Keyframes K = 2", InPaper(4.6, 15.80, 1.95, None, 2.7), {"--keyframe-interval": "2"}, **BESIDE_FULL),
    Row("Keyframes K = 8", InPaper(3.9, 16.10, 2.12, None, 2.4), {"--keyframe-interval": "8"}, **BESIDE_FULL),
    Row("Keyframes K = 16", InPaper(3.6, 16.35, 2.18, None, 2.3), {"--keyframe-interval": "16"}, **BESIDE_FULL),
    Section("Table 15: alignment objective and similarity"),
    Row("Weight-only similarity", InPaper(4.2, 16.20, 2.18, 5.4, 2.5), {"--alignment": "weights"}),
    Row("Activation-only similarity", InPaper(4.2, 16.30, 2.22, 5.4, 2.6), {"--alignment": "activations"}),
    Row("FFN-only alignment", InPaper(4.2, 16.12, 2.15, 3.1, 2.5), {"--alignment": "ffn"}, note="ours by weights"),
    Row("Head-only alignment", InPaper(4.2, 16.28, 2.23, 2.2, 2.5), {"--alignment": "heads"}, note="ours by weights"),
    Row(
        "Coarse blocks (pairs)", InPaper(4.2, 16.35, 2.26, 3.0, 2.4), {"--alignment": "coarse"}, note="ours by weights"
    ),
    Section("Table 15: alignment solver"),
    Row("Screened greedy, 16, refined", InPaper(4.2, 16.00, 2.08, 5.4, 2.3), {"--assignment": "screened"}),
    Row("Screened greedy, 8", InPaper(4.2, 16.10, 2.12, 5.4, 2.2), {"--assignment": "screened-unrefined"}),
    Row(
        "Random tie-breaking (mean of 5)",
        InPaper(4.2, 16.02, 2.09, 5.4, 2.5),
        {},
        repeated=("--alignment-seed", ("1", "2", "3", "4", "5")),
    ),
    Section("Table 15: predictor"),
    Row("Linear predictor", InPaper(4.2, 16.55, 2.40, 5.4, 2.3), {"--predictor": "network-linear"}),
    Row("MLP without embeddings", InPaper(4.2, 16.18, 2.20, 5.4, 2.4), {"--predictor": "network-bare"}),
    Row("MLP of width 128", InPaper(4.2, 16.03, 2.09, 5.4, 2.4), {"--predictor": "network-narrow"}),
    Row("Two-step context", InPaper(4.2, 15.88, 2.00, 5.4, 2.6), {"--predictor": "network-two-step"}),
    Row("No layer embeddings", InPaper(4.2, 16.12, 2.15, 5.4, 2.5), {"--predictor": "network-type-only"}),
    Section("Table 15: quantizer and entropy model"),
    Row("Shared step sizes", InPaper(4.2, 16.10, 2.12, 5.4, 2.5), {"--steps": "shared"}, note="ours one per tensor"),
    Row(
        "Groupwise steps",
        InPaper(4.2, 16.22, 2.20, 5.4, 2.5),
        {**UNCALIBRATED, "--steps": "per-group"},
        beside=BASE_NAME,
        note="the paper's of 8 channels, ours of 128 columns of a row",
    ),
    Row("*Scalar quantizer*", None, {**UNCALIBRATED, "--quantization": "scalar"}, beside=BASE_NAME),
    Row(
        "Residual VQ (1024 entries, 2 stages)",
        InPaper(4.2, 15.92, 2.02, 5.4, 2.8),
        {**UNCALIBRATED, "--quantization": "residual-vector"},
        beside=BASE_NAME,
    ),
    Row(
        "Entropy model without context (IID)",
        InPaper(4.9, 15.96, 2.05, 5.4, 2.4),
        {**UNCALIBRATED, "--entropy-model": "iid"},
        **BESIDE_BASE,
    ),
    Section("Table 15: side information"),
    Row(
        "Permutations of fixed length",
        InPaper(4.5, 15.95, 2.05, 10.6, 2.5),
        {"--permutations": "raw"},
        **BESIDE_FULL,
    ),
    Row(
        "No permutation transmission (recomputed at decoding)",
        InPaper(4.2, 15.95, 2.05, 0.0, 9.8),
        None,
        note="not offered: a decoder would find permutations by floating-point sums, whose last bits differ between "
        "machines; it would save the permutations' share of the full configuration",
    ),
]


@dataclass(frozen=True)
class Measured:
    """What a row gives here; means over its runs."""

    bits: float
    score: float
    nats: float
    residual_entropy: float | None
    """None where nothing is predicted."""
    permutations: float
    seconds: float
    squared_error: float


def spelled(options, inputs):
    """Options as arguments."""
    arguments = []
    for option, value in options.items():
        if value is not None:
            arguments += [option] if value == "" else [option, str(inputs) if value == CALIBRATION else value]
    return arguments


def runs(row):
    """The options of every run of a row; none where there is no such switch."""
    if isinstance(row, Section) or row.change is None:
        return []
    options = {**FULL, **row.change}
    if not row.repeated:
        return [options]
    option, values = row.repeated
    return [{**options, option: value} for value in values]


def check(mcwcfs, rows):
    """Fails on the first row with options that the binary does not know. Options are read before --help is obeyed."""
    for row in rows:
        for options in runs(row):
            command = [str(mcwcfs.binary), "pack", "IN", "OUT", *spelled(options, "inputs"), "--help"]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode != 0:
                raise SystemExit(f"row {row.name!r}: {' '.join(command[1:-1])}\n{done.stderr.strip()}")


class Bench:
    """Measures rows on one model; results are kept for this binary."""

    def __init__(self, mcwcfs, results, evaluation, model, inputs):
        self.mcwcfs, self.results, self.evaluation, self.model, self.inputs = mcwcfs, results, evaluation, model, inputs
        self.made_with = {
            "model": checkpoint.fingerprint(model.files()),
            "evaluation": evaluation.fingerprint,
            "codec": mcwcfs.digest,
        }

    def row(self, row, target):
        """What a row gives, packed to `target`."""
        return mean([self.kept(f"{row.name}/{index}", target, options) for index, options in enumerate(runs(row))])

    def kept(self, name, target, options):
        """One run, measured where the same was not before."""
        made_with = {
            **self.made_with,
            "options": " ".join([*target, *spelled(options, CALIBRATION)]),
            "calibration_tokens": CALIBRATION_TOKENS,
        }
        arguments = [*target, *spelled(options, self.inputs)]
        return self.results.kept(f"{self.model.name}/{name}", made_with, lambda: self.measure(arguments))

    def measure(self, arguments):
        """Packed with `arguments`, evaluated through a mount, inspected and timed."""
        with tempfile.TemporaryDirectory(prefix="mcwcfs-bench-") as work:
            report, outcome = self.mcwcfs.evaluated(self.evaluation, self.model, Path(work), *arguments)
            inspected = json.loads(self.mcwcfs.run("inspect", "--json", "--parts", report["archive"]))
            timed = json.loads(self.mcwcfs.run("bench", "--json", "--repeat", REPEATS, report["archive"]))
        predicted = sum(math.prod(part["shape"]) for part in inspected["parts"] if part["mode"].startswith("predicted"))
        streams = inspected["stream_bytes"]
        return {
            "bits": report["bits_per_parameter"],
            "score": outcome.score,
            "nats": outcome.distance,
            "residual_entropy": 8 * streams["residual_codes"] / predicted if predicted else None,
            "permutations": 100 * streams["permutations"] / inspected["stored_bytes"],
            "seconds": timed["decode_seconds"],
            "squared_error": report["relative_squared_error"],
        }


def mean(found):
    """The mean of several runs."""

    def of(field):
        values = [one[field] for one in found if one[field] is not None]
        return statistics.fmean(values) if values else None

    return Measured(**{field: of(field) for field in found[0]})


def verdict(row, measured, full):
    """What the row costs over `full`, the row it stands beside, there and here, in a few words."""
    if row.in_paper is None or row.name == row.beside:
        return row.note
    bits = row.in_paper.bits - FULL_IN_PAPER.bits
    if abs(bits) >= 0.05:
        unit, there, here = "bits", bits, measured.bits - full.bits
        least = 0.005
    else:
        unit, there, here = "nats", row.in_paper.nats - FULL_IN_PAPER.nats, measured.nats - full.nats
        least = 0.02 * full.nats
    if abs(there) < 1e-9:
        words = "no difference there"
    elif abs(here) < least:
        words = "disagrees: none here"
    elif here * there < 0:
        words = "disagrees: the other way here"
    elif not 1 / 3 <= here / there <= 3:
        words = f"same sign, {here / there:.2g} times as much here"
    else:
        words = "agrees"
    numbers = f"{there:+.3f} {unit} there, {here:+.4f} here"
    return "; ".join(filter(None, [f"{words} ({numbers})", row.note]))


def both(here, there, form):
    """A cell with our figure and the paper's."""
    ours = "none" if here is None else f"{here:{form}}"
    return f"{ours} ({there:g})" if there is not None else ours


def line(row, found):
    """A row of the table, after the rows found."""
    if isinstance(row, Section):
        return [f"**{row.name}**", *[""] * 7]
    if row.change is None:
        full = found[row.beside]
        return [row.name, *[""] * 6, f"{row.note}: {full.bits * full.permutations / 100:.4f} bits per parameter"]
    measured, paper = found[row.name], row.in_paper
    return [
        row.name,
        both(measured.bits, paper and paper.bits, ".3f"),
        both(measured.score, paper and paper.perplexity, ".3f"),
        both(measured.nats, paper and round(paper.nats, 4), ".5f"),
        both(measured.residual_entropy, paper and paper.residual_entropy, ".2f"),
        both(measured.permutations, paper and paper.permutations, ".2f"),
        both(1000 * measured.seconds, paper and 1000 * paper.seconds, ".1f"),
        verdict(row, measured, found[row.beside]),
    ]


def shortened(inputs, path):
    """The first of some token ids."""
    np.save(path, np.load(inputs)[:CALIBRATION_TOKENS])
    return path


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--eval", metavar="DIR", help="evaluation folder; MCWCFS_EVAL without it")
    parser.add_argument("--model", default=MODEL, metavar="NAME", help="this one (%(default)s)")
    parser.add_argument("--results", type=Path, default=RESULTS / "paper_ablations.json", help="kept results")
    parser.add_argument("--binary", default=DEFAULT_BINARY, help="mcwcfs (target/release/mcwcfs)")
    arguments = parser.parse_args()
    folder = checkpoint.evaluation_folder(arguments.eval)
    if folder is None:
        return
    mcwcfs, results = Mcwcfs(arguments.binary), Results(arguments.results)
    check(mcwcfs, ROWS)
    [model] = checkpoint.open_models(folder, [arguments.model])
    found, lines = {}, []
    with tempfile.TemporaryDirectory(prefix="mcwcfs-bench-") as work:
        evaluation = Evaluation(folder, model, Path(work))
        inputs = shortened(calibration.inputs(folder, model, Path(work)), Path(work) / "tokens.npy")
        bench = Bench(mcwcfs, results, evaluation, model, inputs)
        for row in ROWS:
            if runs(row):
                target = ["--bpp", f"{RATE}"]
                if row.error_of is not None:
                    target = ["--max-rel-mse", f"{found[row.error_of].squared_error:.6g}"]
                found[row.name] = bench.row(row, target)
            lines.append(line(row, found))
            say(" | ".join(lines[-1]))
    columns = [
        f"{model.name} (the paper's Pythia-1.4B)",
        "bits per parameter",
        "perplexity",
        "nats lost",
        "residual entropy, bits",
        "permutations, %",
        "decoding, ms",
        "the paper and we",
    ]
    print(page.table(columns, lines))


if __name__ == "__main__":
    main()
