#!/usr/bin/env python3
"""What each stage of mcwcfs is worth: bits per matrix weight at equal error with the stage switched off alone.

    cargo build --release
    python3 benches/ablations.py [--eval DIR] [--models NAME ...] [--rates BITS ...]

Needs numpy (benches/setup's environment has it) and an evaluation folder with models/. Each row packs a model with one
stage off, to the error that all stages reach at the rate of the column, and says what that costs: positive where the
stage helps. Small differences of the error reached are made up for at the slope of the curve, half a bit per factor of
two. The last row is of a stage that mcwcfs does not have: what codes of a scalar quantizer with the same error would
save, were the table chosen by the scales of row and column instead of the row's, each column's scale paid for.
"""

import argparse
import math
from pathlib import Path

from measure import checkpoint, theory
from measure.ours import DEFAULT_BINARY, RESULTS, Mcwcfs
from measure.results import Results

RATES = (2.0, 3.0, 4.0, 5.0)
STAGES = {
    "trellis-coded quantization (plain scalar)": ("--quantization", "scalar"),
    "an entropy table for each quantizer of the trellis": ("--quantization", "trellis-shared"),
    "rate-aware rounding": ("--no-rate-aware-rounding",),
    "more than 8 states of the trellis": ("--trellis-states", "8"),
    "a table per row scale (one table per tensor)": ("--entropy-model", "iid"),
    "one step per tensor (a step per row)": ("--steps", "per-run"),
    "one step per tensor (a step per 128 columns of a row)": ("--steps", "per-group"),
    "one step for all columns (a step per column, by its scale)": ("--column-scales", "energy"),
    "alignment": ("--alignment", "none"),
    "alignment (at random instead)": ("--alignment", "random"),
    "prediction, and with it alignment": ("--predictor", "none"),
}
"""What a row switches off, and how."""
RATED = {
    "entropy coding (codes of fixed length)": ("--entropy-model", "fixed-length"),
    "codes (residual vectors, two stages of 1024)": ("--quantization", "residual-vector"),
}
"""What is given a rate in place of an error: with codes of fixed length a finer step clips more, so few errors can be met."""


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--eval", metavar="DIR", help="evaluation folder; MCWCFS_EVAL without it")
    parser.add_argument("--models", nargs="+", default=[checkpoint.MINILM], metavar="NAME", help="these models")
    parser.add_argument("--rates", nargs="+", type=float, default=RATES, metavar="BITS", help="bits per matrix weight")
    parser.add_argument("--binary", default=DEFAULT_BINARY, help="mcwcfs (target/release/mcwcfs)")
    parser.add_argument("--results", type=Path, default=RESULTS / "rate_distortion.json", help="kept results")
    arguments = parser.parse_args()
    folder = checkpoint.evaluation_folder(arguments.eval)
    if folder is None:
        return
    mcwcfs, results = Mcwcfs(arguments.binary), Results(arguments.results)
    for model in checkpoint.open_models(folder, arguments.models):
        weights = checkpoint.matrices(model.files())
        columns = []
        for rate in arguments.rates:
            # As in rate_distortion.py, so that its measurements serve here.
            target = (
                "--max-rel-mse",
                f"{theory.gaussian_bound(weights, rate - 0.1):.6g}",
                "--embedding-refinement",
                "1",
            )
            columns.append((target, mcwcfs.kept_point(results, model, weights, *target)))
        print(f"### {model.name}: bits per matrix weight at equal error\n")
        print("| off | " + " | ".join(f"at {whole.bits:.2f} bits" for _, whole in columns) + " |")
        print("|---|" + "---|" * len(columns))
        for stage, options in STAGES.items():
            cells = []
            for target, whole in columns:
                point = mcwcfs.kept_point(results, model, weights, *target, *options)
                cost = point.bits - whole.bits + math.log2(point.error / whole.error) / 2
                cells.append(f"{cost:+.3f}")
            print(f"| {stage} | {' | '.join(cells)} |", flush=True)
        for stage, options in RATED.items():
            cells = []
            for rate, (_, whole) in zip(arguments.rates, columns, strict=True):
                rated = ("--bpp", f"{rate}", "--embedding-refinement", "1", *options)
                point = mcwcfs.kept_point(results, model, weights, *rated)
                cells.append(f"{point.bits - whole.bits + math.log2(point.error / whole.error) / 2:+.3f}")
            print(f"| {stage} | {' | '.join(cells)} |", flush=True)
        gains = [f"{theory.column_context_gain(weights, whole.error):+.3f}" for _, whole in columns]
        print(f"| *not built:* tables by row and column scale would gain | {' | '.join(gains)} |\n", flush=True)


if __name__ == "__main__":
    main()
