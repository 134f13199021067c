"""Measurements that are kept: a peer's point on a given checkpoint never changes, and takes a minute to make."""

import json
from dataclasses import asdict

from .curve import Point


class Store:
    """Points by what made them, in a JSON file each."""

    def __init__(self, directory):
        self.directory = directory
        directory.mkdir(parents=True, exist_ok=True)

    def points(self, key, measure):
        """The points kept under `key`; measured, and kept, where there are none."""
        path = self.directory / f"{key}.json"
        if path.exists():
            return [Point(**point) for point in json.loads(path.read_text())]
        points = measure()
        unfinished = path.with_suffix(".part")
        unfinished.write_text(json.dumps([asdict(point) for point in points], indent=1))
        unfinished.rename(path)
        return points
