"""Metrics of a run: one JSON object per line in RUN/metrics.jsonl; and such files, on a disk or in a bucket."""

import json
from typing import Any

from etils import epath

from hypersteer_jax.training.checkpoint import in_bucket


class JsonLines:
    """A file of JSON objects, one per line, that grows.

    On a disk every row is written through at once, so that a killed process leaves it there. Nothing can be appended to
    an object in a bucket: `flush` writes it anew.
    """

    def __init__(self, path: epath.Path | None, rows: list[dict[str, Any]]):
        """What `path` holds is replaced by these rows. Without a path nothing is written: another process does."""
        self._path, self._lines = path, [json.dumps(row) + "\n" for row in rows]
        self._file = None
        self.flush()
        if path is not None and not in_bucket(path):
            self._file = path.open("a")

    def write(self, row: dict[str, Any]) -> None:
        """Appends a row."""
        line = json.dumps(row) + "\n"
        if self._file is not None:
            self._file.write(line)
            self._file.flush()
        elif self._path is not None:
            self._lines.append(line)

    def flush(self) -> None:
        """Rows written so far are safe from here on, in a bucket, too."""
        if self._path is not None and self._file is None:
            part = self._path.with_suffix(".part")
            part.write_text("".join(self._lines))
            part.replace(self._path)

    def close(self) -> None:
        """Closes the file."""
        self.flush()
        if self._file is not None:
            self._file.close()


def read_rows(path: epath.Path | None) -> list[dict[str, Any]]:
    """Rows of a file, if there is one, without the line that a killed process was writing."""
    rows = []
    for line in path.read_text().splitlines() if path is not None and path.exists() else ():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return rows


class MetricsLog:
    """The metrics of a run: a row for each step and for each evaluation."""

    def __init__(self, path: epath.Path | None, first_step: int):
        """Opens `path`; rows of steps from `first_step` on, left by a run that got further than its checkpoint, go."""
        self._kept = [row for row in read_rows(path) if row["step"] < first_step]
        self._lines = JsonLines(path, self._kept)
        self.flush, self.close = self._lines.flush, self._lines.close

    def evaluated(self, step: int) -> bool:
        """Whether there was an evaluation after this step when the log was opened."""
        return any(row["step"] == step and "evaluation" in row for row in self._kept)

    def write(self, step: int, values: dict[str, Any]) -> None:
        """One row; `values` are scalars or nested dictionaries of scalars."""
        self._lines.write({"step": step, **values})
