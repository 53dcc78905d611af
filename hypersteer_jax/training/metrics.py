"""Metrics of a run: one JSON object per line in RUN/metrics.jsonl."""

import json
from pathlib import Path
from typing import Any


class MetricsLog:
    """Appends rows to a JSONL file, each written through at once, so that a killed run keeps them."""

    def __init__(self, path: Path, first_step: int):
        """Opens `path`; rows of steps from `first_step` on, left by a run that got further than its checkpoint, go."""
        kept = []
        if path.exists():
            for line in path.read_text().splitlines():
                try:
                    row = json.loads(line)
                except json.JSONDecodeError:
                    continue  # the last line of a run that was killed while writing it
                if row["step"] < first_step:
                    kept.append(line)
        part = path.with_suffix(".part")
        part.write_text("".join(f"{line}\n" for line in kept))
        part.replace(path)
        self._file = path.open("a", buffering=1)

    def write(self, step: int, values: dict[str, Any]) -> None:
        """One row; `values` are scalars or nested dictionaries of scalars."""
        self._file.write(json.dumps({"step": step, **values}) + "\n")

    def close(self) -> None:
        """Closes the file."""
        self._file.close()
