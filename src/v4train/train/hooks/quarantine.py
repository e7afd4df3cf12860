"""Writes down the documents that could not be read and became padding: a run survives them, but somebody should mend the store."""

import pathlib

from v4train.data import collate
from v4train.train import state as state_lib
from v4train.train import step as step_lib
from v4train.train.hooks import record


class BadRecords:
    """Appends each new bad document of the data pipeline to a file, a line each, once in the life of the run."""

    def __init__(self, quarantine: collate.Quarantine, *, path: pathlib.Path):
        self._quarantine, self._path = quarantine, path
        self._known = {(r["source"], r["document"]) for r in record.read(path)}
        self._looked_at = 0

    def before(self, step: int, state: state_lib.State) -> None:
        """Nothing: what a batch met is known after it."""

    def after(self, step: int, report: step_lib.Report) -> None:
        """Looks for new ones."""
        self.write()

    def write(self) -> int:
        """Writes what is new; returns how many bad documents the run has met so far."""
        found = self._quarantine.records
        new = [bad for bad in found[self._looked_at :] if (bad.source, bad.document) not in self._known]
        self._looked_at = len(found)
        if new:
            self._known |= {(bad.source, bad.document) for bad in new}
            lines = record.JsonLines(self._path)
            for bad in new:
                lines(bad._asdict())
            lines.close()
        return len(self._known)
