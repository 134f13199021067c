#!/usr/bin/env python3
"""Lossless, in bits per parameter: mcwcfs beside zipnn, pcodec and zstd on byte planes.

    benches/setup
    cargo build --release
    .bench-venv/bin/python benches/lossless.py [--eval DIR] [--models NAME ...]

Every model as it is, and models of F32 rounded to BF16 too. Ours is the whole archive, with headers, checksums and digests;
the others are their streams alone. Speed is `decode_speed.py`'s question. DFloat11 decodes on a GPU only, and the Xet
storage of Hugging Face compresses on its way to a server: neither can be had here. The peers' sizes are kept, by the digest
of the file and their version, in benches/results/lossless.json.
"""

import argparse
import functools
import tempfile
from pathlib import Path

from measure import checkpoint, lossless, page
from measure.ours import DEFAULT_BINARY, RESULTS, Mcwcfs, say
from measure.results import Results

PEERS = {
    "zipnn": (lossless.VERSION, lossless.zipnn_bytes),
    "pcodec": (lossless.PCODEC_VERSION, lossless.pcodec_bytes),
    "zstd -3, byte planes": (lossless.ZSTD_VERSION, functools.partial(lossless.zstd_bytes, level=3)),
    "zstd -19, byte planes": (lossless.ZSTD_VERSION, functools.partial(lossless.zstd_bytes, level=19)),
}


def measure(mcwcfs, results, title, file, work):
    """A line of the table: one file."""
    count, digest = lossless.parameters(file), checkpoint.fingerprint([file])
    cells = [title]
    for name, (version, codec) in PEERS.items():
        made_with = {"file": digest, "codec": version}
        taken = results.kept(f"{title}/{name}", made_with, functools.partial(codec, file))
        cells.append(f"{8 * taken / count:.3f}")
    made_with = {"file": digest, "codec": mcwcfs.digest}
    taken = results.kept(f"{title}/mcwcfs", made_with, lambda: lossless.ours_bytes(mcwcfs, file, work))
    say(f"{title}: {8 * taken / count:.3f}, {', '.join(cells[1:])}")
    return [*cells, f"{8 * taken / count:.3f}"]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--eval", metavar="DIR", help="evaluation folder; MCWCFS_EVAL without it")
    parser.add_argument("--models", nargs="+", default=[], metavar="NAME", help="only these")
    parser.add_argument("--results", type=Path, default=RESULTS / "lossless.json", help="kept results")
    parser.add_argument("--binary", default=DEFAULT_BINARY, help="mcwcfs (target/release/mcwcfs)")
    arguments = parser.parse_args()
    folder = checkpoint.evaluation_folder(arguments.eval)
    if folder is None:
        return
    mcwcfs, results, lines = Mcwcfs(arguments.binary), Results(arguments.results), []
    for model in checkpoint.open_models(folder, arguments.models):
        for file in model.files():
            with tempfile.TemporaryDirectory(prefix="mcwcfs-bench-") as work:
                rounded = Path(work) / "rounded.safetensors"
                lines.append(measure(mcwcfs, results, model.name, file, Path(work)))
                if lossless.write_as_bf16(file, rounded):
                    lines.append(measure(mcwcfs, results, f"{model.name}, rounded to BF16", rounded, Path(work)))
    print(page.table(["model", *PEERS, "mcwcfs"], lines))


if __name__ == "__main__":
    main()
