"""mcwcfs, through its command line: packs a checkpoint, takes it apart again and measures what came back."""

import hashlib
import json
import subprocess
import tempfile
from pathlib import Path

from .checkpoint import fingerprint, matrices, relative_squared_error, weight_count
from .curve import Point

REPOSITORY = Path(__file__).resolve().parents[2]
DEFAULT_BINARY = REPOSITORY / "target" / "release" / "mcwcfs"


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

    def kept_point(self, store, weights, files, *options):
        """The same of the safetensors `files` alone, kept for this binary, these files and options."""

        def measure():
            with tempfile.TemporaryDirectory(prefix="mcwcfs-bench-") as work:
                source = Path(work) / "source"
                source.mkdir()
                for file in files:
                    (source / file.name).symlink_to(file.resolve())
                return [self.point(weights, source, Path(work), *options)]

        spelled = hashlib.sha256(" ".join(options).encode()).hexdigest()[:16]
        return store.points(f"{fingerprint(files)}-ours-{self.digest}-{spelled}", measure)[0]
