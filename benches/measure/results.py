"""Results that are kept, with what they were made with: a run measures only what has changed since."""

import json


class Results:
    """Results by name in one JSON file, written after each: a run that was cut short goes on where it was."""

    def __init__(self, path):
        self.path = path
        self.entries = json.loads(path.read_text()) if path.exists() else {}

    def kept(self, name, made_with, measure):
        """The result `name`, measured where the file has none that was made with the same: digests and versions by name."""
        entry = self.entries.get(name)
        if entry is None or entry["made_with"] != made_with:
            entry = self.entries[name] = {"made_with": made_with, "result": measure()}
            self.write()
        return entry["result"]

    def write(self):
        """Writes the file; it has its name only when it is complete."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = self.path.with_suffix(".part")
        unfinished.write_text(json.dumps(self.entries, indent=1, sort_keys=True) + "\n")
        unfinished.rename(self.path)
