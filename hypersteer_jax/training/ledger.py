"""Where the time of a run went: RUN/ledger.jsonl, one row for each phase as it ends.

    {"attempt": 1, "kind": "step", "start": 1767225600.0, "seconds": 81.3, "first": 0, "last": 200}

    init      from the start of the process to the state of step 0, or to where the stored one is read
    restore   reading it
    compile   all shapes
    step      a stretch of steps, up to the next save or evaluation
    eval      an evaluation
    save      as long as training is held up; the rest of it goes on in the background
    lost      steps done again by a later attempt, with their evaluations and saves; from the last row of an attempt to
              the start of the next: what a killed process was at, and waiting for another

`first` and `last` count the steps done when a phase began and ended. A row begins where the one before it ended, so the
seconds of all rows sum to the time from the start of the first attempt to the last row of the last.
"""

import os
import time
from pathlib import Path
from typing import Any, NamedTuple

from etils import epath
from rich.console import Console
from rich.table import Table

from hypersteer_jax.training.checkpoint import CheckpointError, run_path
from hypersteer_jax.training.metrics import JsonLines, read_rows

LEDGER = "ledger.jsonl"
KINDS = ("init", "restore", "compile", "step", "eval", "save", "lost")


class Ledger:
    """The ledger of one attempt, behind the rows of those before it."""

    def __init__(self, path: epath.Path | None, started: float):
        """Opens the ledger.

        Args:
            path: of the file; None keeps none: of several processes only one does.
            started: when this attempt did, as unix time in seconds.
        """
        self._path, self._rows = path, read_rows(path)
        self._attempt = 1 + max((row["attempt"] for row in self._rows), default=0)
        self._lines = JsonLines(path, self._rows)
        self._clock = round(started, 3)
        if self._rows:
            self._clock = _end(self._rows[-1])
            self.ended("lost", at=max(started, self._clock))

    def ended(self, kind: str, first: int | None = None, last: int | None = None, at: float | None = None) -> None:
        """Books the time since the last row.

        Args:
            kind: of the phase that has ended.
            first: steps done when it began, if it stands at any.
            last: steps done when it ended; `first` if not given.
            at: unix time when it ended; now if not given.
        """
        start, self._clock = self._clock, round(time.time() if at is None else at, 3)
        row: dict[str, Any] = {"attempt": self._attempt, "kind": kind, "start": start}
        row["seconds"] = round(self._clock - start, 3)
        if first is not None:
            row |= {"first": first, "last": first if last is None else last}
        self._rows.append(row)
        self._lines.write(row)
        self._lines.flush()

    def went_back(self, step: int) -> None:
        """Books what was done beyond a step as lost, because it is done again from there."""
        for row in self._rows:
            if row["kind"] in ("step", "eval", "save") and row["last"] > step:
                row["kind"] = "lost"
        self._lines.close()
        self._lines = JsonLines(self._path, self._rows)

    def close(self) -> None:
        """Closes the file."""
        self._lines.close()


class Account(NamedTuple):
    """A ledger, summed up."""

    seconds: dict[str, float]  # by kind, all kinds
    wall: float  # seconds from the start of the first attempt to the last row of the last
    attempts: int

    @property
    def goodput(self) -> float:
        """Share of the wall time that went into steps that counted."""
        return self.seconds["step"] / self.wall if self.wall else 0.0


def account(run: Path | str) -> Account:
    """Sums up the ledger of a run, which may be going on.

    Raises:
        CheckpointError: no ledger is kept in this folder.
    """
    path = run_path(run) / LEDGER
    if not path.exists():
        raise CheckpointError(
            f"{path.parent}: no {LEDGER}, so no run is stored here; give the `out` folder of a training run"
        )
    rows, seconds = read_rows(path), dict.fromkeys(KINDS, 0.0)
    for row in rows:
        seconds[row["kind"]] += row["seconds"]
    wall = _end(rows[-1]) - rows[0]["start"] if rows else 0.0
    return Account(seconds, wall, rows[-1]["attempt"] if rows else 0)


def account_table(account: Account) -> Table:
    """Seconds and share of the wall time by kind, and the goodput."""
    table = Table("phase", "seconds", "share")
    for column in table.columns[1:]:
        column.justify = "right"
    for kind, seconds in account.seconds.items():
        table.add_row(kind, f"{seconds:,.1f}", f"{seconds / max(account.wall, 1e-3):.1%}")
    table.add_section()
    table.add_row(f"wall, {account.attempts} attempts", f"{account.wall:,.1f}", f"goodput {account.goodput:.1%}")
    return table


def show(run: Path) -> None:
    """Prints where the time of a run went."""
    Console().print(account_table(account(run)))


def process_start() -> float:
    """Unix time in seconds at which this process started, before its imports; now where the system does not tell."""
    try:
        fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
        age = time.clock_gettime(time.CLOCK_BOOTTIME) - int(fields[19]) / os.sysconf("SC_CLK_TCK")
    except (OSError, AttributeError):
        return time.time()
    return time.time() - age


def _end(row: dict[str, Any]) -> float:
    """Unix time, to the millisecond, as all times in a ledger."""
    return round(row["start"] + row["seconds"], 3)
