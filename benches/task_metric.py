#!/usr/bin/env python3
"""What a rate costs on the task: packs every model, mounts the archives and runs the evaluation on the mounted files.

    cargo build --release
    python3 benches/task_metric.py [--eval DIR] [--models NAME ...] [--rates BITS ...]

Needs numpy (benches/setup's environment has it) and an evaluation folder: models/, and eval.py, which reads a
checkpoint directory by plain open, seek and read, and prints its task metric and the distance to the original as JSON.
Prints one Markdown table. The first row of a model is the lossless archive: its metric is the original's.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path

from measure import checkpoint
from measure.ours import DEFAULT_BINARY, Mcwcfs

RATES = (8.0, 5.0, 4.2)


@contextmanager
def mounted(mcwcfs, source, mount_point):
    """The directory `source`, mounted at `mount_point`."""
    mcwcfs.run("mount", source, mount_point)
    try:
        yield mount_point
    finally:
        mcwcfs.run("umount", mount_point)


def evaluate(script, directory, original):
    """The JSON line of the evaluation of `directory`, with its distance to `original`."""
    command = [sys.executable, str(script), str(directory), "--ref", str(original)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise SystemExit(f"{' '.join(command)}: exit status {done.returncode}\n{done.stderr.strip()}")
    return json.loads(done.stdout)


def distance(result):
    """How far the outputs are from the original's, in words."""
    task = result[result["primary"]["task"]]
    if "mean_cos_to_ref" in task:
        return f"1 - cosine {1 - task['mean_cos_to_ref']:.5f}"
    return f"KL {task['kl_to_ref']:.5f} nats, top-1 agreement {task['top1_agree']:.2%}"


def measure(mcwcfs, script, model, rates, work):
    """Rows of the table for one model."""
    packed, mount_point = work / "packed", work / "mnt"
    packed.mkdir()
    mount_point.mkdir()
    choices = [("lossless", ["--lossless"]), *((f"{rate:g}", ["--bpp", str(rate)]) for rate in rates)]
    reports = {}
    for name, options in choices:
        reports[name] = mcwcfs.pack(model.directory, packed / name, *options)
        if reports[name]["target_missed"]:
            print(f"{model.name}, {name}: {reports[name]['target_missed']}", file=sys.stderr)
    rows = []
    with mounted(mcwcfs, packed, mount_point):
        for name, _ in choices:
            result = evaluate(script, mount_point / name, model.directory)
            primary, report = result["primary"], reports[name]
            rows.append(
                f"| {model.name} | {name} | {report['bits_per_parameter']:.3f} "
                f"| {report['relative_squared_error']:.2e} "
                f"| {primary['task']} {primary['metric']} | {primary['value']:.4f} | {distance(result)} |"
            )
            print(rows[-1], file=sys.stderr, flush=True)
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--eval", metavar="DIR", help="evaluation folder; MCWCFS_EVAL without it")
    parser.add_argument("--models", nargs="+", default=[], metavar="NAME", help="only these")
    parser.add_argument(
        "--rates", nargs="+", type=float, default=RATES, metavar="BITS", help="bits per parameter of the file"
    )
    parser.add_argument("--binary", default=DEFAULT_BINARY, help="mcwcfs (target/release/mcwcfs)")
    arguments = parser.parse_args()
    folder = checkpoint.evaluation_folder(arguments.eval)
    if folder is None:
        return
    mcwcfs = Mcwcfs(arguments.binary)
    rows = []
    for model in checkpoint.open_models(folder, arguments.models):
        with tempfile.TemporaryDirectory(prefix="mcwcfs-bench-") as work:
            rows += measure(mcwcfs, folder / "eval.py", model, arguments.rates, Path(work))
    print(
        "| model | asked | bits per parameter | relative squared error "
        "| metric | through the mount | distance to the original |"
    )
    print("|---|---|---|---|---|---|---|")
    print("\n".join(rows))


if __name__ == "__main__":
    main()
