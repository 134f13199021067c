"""Results that are kept, with what they were made with: a run measures only what has changed since."""

import fcntl
import json
import os
from contextlib import contextmanager
from dataclasses import asdict

from .curve import Point


class Results:
    """Results by name in one JSON file, written after each: a run that was cut short goes on where it was, and several may
    use the file at once.
    """

    def __init__(self, path):
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)

    def kept(self, name, made_with, measure):
        """The result `name`, measured where the file has none that was made with the same: digests and versions by name."""
        entry = self.read().get(name)
        if entry is None or entry["made_with"] != made_with:
            entry = {"made_with": made_with, "result": measure()}
            self.add(name, entry)
        return entry["result"]

    def points(self, name, made_with, measure):
        """The same of points of rate and error."""
        found = self.kept(name, made_with, lambda: [asdict(point) for point in measure()])
        return [Point(**point) for point in found]

    def read(self):
        """All entries."""
        return json.loads(self.path.read_text()) if self.path.exists() else {}

    def add(self, name, entry):
        """Adds an entry to those that are in the file by now; it has its name only when it is complete."""
        with locked(self.path.parent):
            entries = {**self.read(), name: entry}
            unfinished = self.path.with_suffix(".part")
            unfinished.write_text(json.dumps(entries, indent=1, sort_keys=True) + "\n")
            unfinished.rename(self.path)


@contextmanager
def locked(directory):
    """Keeps other runs out."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
