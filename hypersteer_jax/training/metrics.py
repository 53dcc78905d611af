"""Metrics of a run: one JSON object per line in RUN/metrics.jsonl."""

import json
import os
from pathlib import Path
from typing import Any, TextIO


class MetricsLog:
    """Appends rows to a JSONL file, each written through at once, so that a killed run keeps them."""

    def __init__(self, path: Path | None, first_step: int):
        """Opens `path`; rows of steps from `first_step` on, left by a run that got further than its checkpoint, go.

        Without a path nothing is written: of several processes only one keeps the log.
        """
        self._kept = [row for row in read_rows(path) if row["step"] < first_step] if path else []
        self._file = open_rows(path, self._kept)

    def evaluated(self, step: int) -> bool:
        """Whether the log had an evaluation after this step when it was opened."""
        return any(row["step"] == step and "evaluation" in row for row in self._kept)

    def write(self, step: int, values: dict[str, Any]) -> None:
        """One row; `values` are scalars or nested dictionaries of scalars."""
        self._file.write(json.dumps({"step": step, **values}) + "\n")

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Rows of a JSONL file, none if there is no such file, without the line that a killed process was writing."""
    rows = []
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return rows


def open_rows(path: Path | None, rows: list[dict[str, Any]]) -> TextIO:
    """A JSONL file that holds these rows instead of what it held, open for more, each line written through at once."""
    if path is None:
        return open(os.devnull, "w")
    part = path.with_suffix(".part")
    part.write_text("".join(json.dumps(row) + "\n" for row in rows))
    part.replace(path)
    return path.open("a", buffering=1)
