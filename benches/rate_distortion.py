#!/usr/bin/env python3
"""Rate and error of mcwcfs beside its peers, on the real checkpoints of an evaluation folder.

    benches/setup
    .bench-venv/bin/python benches/rate_distortion.py [--eval DIR] [--models NAME ...] [--plot FILE] [--summary]

For every model: relative squared error over its two-dimensional tensors against bits per matrix weight, for mcwcfs
(packed and unpacked by the release binary, every tensor at one step: --embedding-refinement 1), NNCodec with dependent
quantization, GGUF's formats, round to nearest in groups of 128, ideal entropy-coded scalar quantization, and the
Gaussian rate-distortion bound with row scales. Prints Markdown tables, with --plot a figure of them. See measure/
for what each means exactly.

Measurements are kept in benches/results/rate_distortion.json: a second run measures only what is new.
--summary prints one table for all models.
"""

import argparse
import functools
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from measure import checkpoint, gguf, nncodec, page, plot, theory
from measure.curve import Curve
from measure.ours import DEFAULT_BINARY, RESULTS, Mcwcfs, say
from measure.results import Results

RATES = (2.0, 3.0, 4.0, 5.0, 5.9)
SUMMARY_RATES = (2.0, 4.0)
"""Of those, what the short table has."""
MARGIN = 0.25
"""Bits beyond the first and last rate: the curves must reach both."""


@dataclass
class Result:
    """What was measured on one model."""

    model: checkpoint.Model
    weights: int
    bound: Curve
    curves: dict
    formats: list

    def over_bound(self, point):
        """Bits above the bound at equal error."""
        return point.bits - self.bound.bits_at(point.error)


def measure(model, mcwcfs, ggml, kept, rates):
    """Everything on one model."""
    files = model.files()
    weights = checkpoint.matrices(files)
    count = checkpoint.weight_count(weights)
    fingerprint = checkpoint.fingerprint(files)
    say(f"{model.name}: {len(weights)} matrices, {count:,} weights")
    asked = [min(rates) - MARGIN, *rates, max(rates) + MARGIN]

    bound_rates = np.arange(0.25, 12, 0.05)
    bound = Curve([theory.Point(rate, theory.gaussian_bound(weights, rate)) for rate in bound_rates])

    def pack(rate):
        """An error near that of this rate; what rate it takes is then measured."""
        target = f"{theory.gaussian_bound(weights, rate - 0.1):.6g}"
        point = mcwcfs.kept_point(kept, model, weights, "--max-rel-mse", target, "--embedding-refinement", "1")
        say(f"  ours {point.bits:.3f} bits, error {point.error:.4g}")
        return point

    ours = [pack(rate) for rate in asked]
    # On a small model headers and tables can put even the first point above the first rate.
    coarser = asked[0] - MARGIN
    while ours[0].bits > min(rates) and coarser > 0.5:
        ours.insert(0, pack(coarser))
        coarser -= MARGIN

    peers, scalar = {}, theory.ScalarQuantization(weights)
    for rate in (*rates, asked[-1]):
        measure_peer = functools.partial(nncodec.around, weights, rate)
        made_with = {"model": fingerprint, "codec": f"nncodec {nncodec.VERSION}"}
        for point in kept.points(f"{model.name}/NNCodec/{rate:g}", made_with, measure_peer):
            peers[point.label] = point
        say(f"  NNCodec around {rate} bits")
    formats = [theory.round_to_nearest(weights, 4), theory.round_to_nearest(weights, 8)]
    if ggml:
        made_with = {"model": fingerprint, "codec": gguf.VERSION}
        formats += kept.points(
            f"{model.name}/GGUF", made_with, lambda: [gguf.point(ggml, weights, name) for name in gguf.TYPES]
        )
    curves = {
        "ours": Curve(ours),
        "NNCodec": Curve(peers.values()),
        "ideal scalar": Curve([scalar.near(rate) for rate in asked]),
    }
    return Result(model, count, bound, curves, sorted(formats, key=lambda point: point.bits))


def cell(value, form="{:.2e}"):
    return "" if value is None else form.format(value)


def difference(one, other):
    return None if one is None or other is None else one - other


def report(result, rates):
    """The tables of one model, in Markdown."""
    ours, peer, scalar = (result.curves[name] for name in ("ours", "NNCodec", "ideal scalar"))
    lines = [
        f"### {result.model.name} ({result.weights:,} matrix weights)",
        "",
        "| bits per matrix weight | bound | ours | NNCodec | ideal scalar "
        "| ours above the bound, bits | ours below NNCodec, bits |",
        "|---|---|---|---|---|---|---|",
    ]
    for rate in rates:
        error = ours.error_at(rate)
        above = None if error is None else rate - result.bound.bits_at(error)
        saved = None if error is None else difference(peer.bits_at(error), rate)
        lines.append(
            f"| {rate:g} | {cell(result.bound.error_at(rate))} | {cell(error)} | {cell(peer.error_at(rate))} "
            f"| {cell(scalar.error_at(rate))} | {cell(above, '{:.3f}')} | {cell(saved, '{:.3f}')} |"
        )
    lines += [
        "",
        "| format | bits per matrix weight | error | ours at that error, bits | saved |",
        "|---|---|---|---|---|",
    ]
    for point in result.formats:
        bits = ours.bits_at(point.error)
        saved = difference(point.bits, bits)
        lines.append(
            f"| {point.label} | {point.bits:.3f} | {point.error:.2e} "
            f"| {cell(bits, '{:.3f}')} | {cell(saved, '{:.3f}')} |"
        )
    packed = ", ".join(f"{point.bits:.3f} ({point.whole_file_bits:.3f})" for point in ours.points)
    lines += ["", f"Ours as packed, bits per matrix weight (whole file, bits per parameter): {packed}", ""]
    return "\n".join(lines)


def summary(results, rates):
    """One table: the errors of ours and of the best peer at the rates, and what the difference is worth in bits."""
    rows = []
    for result in results:
        ours, peer = result.curves["ours"], result.curves["NNCodec"]
        for rate in rates:
            error = ours.error_at(rate)
            if error is None:
                continue
            above, saved = rate - result.bound.bits_at(error), difference(peer.bits_at(error), rate)
            peer_error = cell(peer.error_at(rate))
            rows.append([result.model.name, f"{rate:g}", cell(result.bound.error_at(rate)), cell(error), peer_error])
            rows[-1] += [cell(above, "{:.3f}"), cell(saved, "{:.3f}")]
    columns = ["model", "bits per matrix weight", "bound", "mcwcfs", "NNCodec"]
    return page.table([*columns, "above the bound, bits", "below NNCodec, bits"], rows)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--eval", metavar="DIR", help="evaluation folder; MCWCFS_EVAL without it")
    parser.add_argument("--models", nargs="+", default=[], metavar="NAME", help="only these")
    parser.add_argument("--rates", nargs="+", type=float, default=RATES, metavar="BITS", help="bits per matrix weight")
    parser.add_argument("--binary", default=DEFAULT_BINARY, help="mcwcfs (target/release/mcwcfs)")
    parser.add_argument("--plot", type=Path, help="write the curves there")
    parser.add_argument("--results", type=Path, default=RESULTS / "rate_distortion.json", help="kept results")
    parser.add_argument("--summary", action="store_true", help="print one short table")
    arguments = parser.parse_args()
    folder = checkpoint.evaluation_folder(arguments.eval)
    if folder is None:
        return
    mcwcfs, kept = Mcwcfs(arguments.binary), Results(arguments.results)
    rates = sorted(arguments.rates)
    try:
        ggml = gguf.Ggml()
    except gguf.Unavailable as why:
        ggml = None
        print(f"GGUF is not measured: {why}")
    results = []
    for model in checkpoint.open_models(folder, arguments.models):
        results.append(measure(model, mcwcfs, ggml, kept, rates))
        if not arguments.summary:
            print(report(results[-1], rates), flush=True)
    if arguments.summary:
        print(summary(results, [rate for rate in rates if rate in SUMMARY_RATES]))
    if arguments.plot:
        plot.draw(results, arguments.plot)


if __name__ == "__main__":
    main()
