#!/usr/bin/env python3
"""Table 10 and Figure 4 of the paper on open models: how alike adjacent layers are, before and after alignment.

    cargo build --release
    .bench-venv/bin/python benches/predictability.py [--eval DIR] [--models NAME ...]

`mcwcfs analyze` of every model, by block type, beside the paper's figures for its models. Behind each figure stands that of a
Gaussian control: independent weights of the same shape, where alignment finds only what choosing the best of many finds.
Residual energy is what one scaled copy of the layer before leaves; 1 is no prediction at all.
"""

import argparse
import json

from measure import checkpoint, page
from measure.ours import DEFAULT_BINARY, Mcwcfs

IN_PAPER = {
    "Pythia-1.4B": (0.28, 0.67, 0.74, 0.39),
    "OPT-1.3B": (0.24, 0.63, 0.77, 0.42),
    "ViT-B/16": (0.21, 0.54, 0.81, 0.51),
    "Swin-T": (0.19, 0.49, 0.84, 0.56),
}
"""Cosine before and after, residual energy before and after."""
FIELDS = ("cosine_before", "cosine_after", "nre_before", "nre_after")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--eval", metavar="DIR", help="evaluation folder; MCWCFS_EVAL without it")
    parser.add_argument("--models", nargs="+", default=[], metavar="NAME", help="only these")
    parser.add_argument("--binary", default=DEFAULT_BINARY, help="mcwcfs (target/release/mcwcfs)")
    arguments = parser.parse_args()
    folder = checkpoint.evaluation_folder(arguments.eval)
    if folder is None:
        return
    mcwcfs, rows = Mcwcfs(arguments.binary), []
    for model in checkpoint.open_models(folder, arguments.models):
        report = json.loads(mcwcfs.run("analyze", "--json", model.directory))
        for block_type in report["block_types"]:
            found, control = block_type["weights_found"], block_type["gaussian_control"]
            cells = [f"{found[field]['mean']:.3f} ({control[field]['mean']:.3f})" for field in FIELDS]
            rows.append([f"{model.name}, {block_type['block_type']}", *cells])
    rows += [[f"*the paper:* {name}", *(f"{value:.2f}" for value in values)] for name, values in IN_PAPER.items()]
    columns = ["blocks (control)", "cosine before", "after", "residual energy before", "after"]
    print(page.table(columns, rows))


if __name__ == "__main__":
    main()
