"""The ledger: rows without gaps, what is lost when a run goes back, and sums."""

import subprocess
import sys
import time
from pathlib import Path

import pytest
from etils import epath

from hypersteer_jax.training import ledger as module
from hypersteer_jax.training.checkpoint import CheckpointError
from hypersteer_jax.training.ledger import LEDGER, Ledger, account, process_start, show
from hypersteer_jax.training.metrics import read_rows


class Clock:
    """Seconds of a day, as the test says."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.now = 1000.0
        monkeypatch.setattr(module.time, "time", lambda: self.now)

    def book(self, ledger: Ledger, *phases: tuple) -> None:
        """Phases as (seconds, kind, first, last)."""
        for seconds, *phase in phases:
            self.now += seconds
            ledger.ended(*phase)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


@pytest.fixture
def path(tmp_path: Path) -> epath.Path:
    return epath.Path(tmp_path / LEDGER)


def test_rows_are_on_disk_and_follow_one_another(clock: Clock, path: epath.Path) -> None:
    ledger = Ledger(path, 998.0)
    clock.book(ledger, (0.5, "init"), (0.25, "save", 0), (4, "compile"), (8, "step", 0, 10), (1, "eval", 10))
    assert read_rows(path) == [
        {"attempt": 1, "kind": "init", "start": 998.0, "seconds": 2.5},
        {"attempt": 1, "kind": "save", "start": 1000.5, "seconds": 0.25, "first": 0, "last": 0},
        {"attempt": 1, "kind": "compile", "start": 1000.75, "seconds": 4.0},
        {"attempt": 1, "kind": "step", "start": 1004.75, "seconds": 8.0, "first": 0, "last": 10},
        {"attempt": 1, "kind": "eval", "start": 1012.75, "seconds": 1.0, "first": 10, "last": 10},
    ]
    ledger.close()


def test_what_is_done_again_and_the_time_between_attempts_are_lost(clock: Clock, path: epath.Path) -> None:
    ledger = Ledger(path, clock.now)
    clock.book(ledger, (3, "init"), (5, "compile"), (10, "step", 0, 10), (1, "save", 10))
    clock.book(ledger, (6, "step", 10, 16), (2, "eval", 16), (4, "step", 16, 20), (1, "save", 20))
    ledger.close()
    with path.open("a") as file:
        file.write('{"attempt": 1, "kind": "st')  # killed, and the save of step 20 was never committed
    clock.now += 100
    ledger = Ledger(path, clock.now - 20)
    clock.book(ledger, (7, "init"))
    ledger.went_back(10)
    clock.book(ledger, (2, "restore", 10), (5, "compile"), (20, "step", 10, 20))
    ledger.close()
    found = account(path.parent)
    again = 6 + 2 + 4 + 1
    assert found.seconds == {
        "init": 3 + 20 + 7,
        "restore": 2,
        "compile": 10,
        "step": 10 + 20,
        "eval": 0,
        "save": 1,
        "lost": again + 80,
    }
    assert sum(found.seconds.values()) == found.wall == clock.now - 1000
    assert found.attempts == 2
    assert found.goodput == 30 / found.wall
    assert [row["kind"] for row in read_rows(path) if row["attempt"] == 1] == [
        *("init", "compile", "step", "save"),
        *("lost", "lost", "lost", "lost"),
    ]


def test_times_add_up_though_they_are_rounded(clock: Clock, path: epath.Path) -> None:
    ledger = Ledger(path, clock.now)
    clock.book(ledger, *[(0.0014, "step", index, index + 1) for index in range(1000)])
    ledger.close()
    found = account(path.parent)
    assert found.seconds["step"] == pytest.approx(1.4, abs=1e-3)
    assert found.wall == pytest.approx(1.4, abs=1e-3)


def test_attempt_that_starts_before_the_last_one_ended_counts_no_time_twice(clock: Clock, path: epath.Path) -> None:
    ledger = Ledger(path, clock.now)
    clock.book(ledger, (10, "init"))
    ledger.close()
    ledger = Ledger(path, clock.now - 5)  # on a machine whose clock is behind
    clock.book(ledger, (3, "init"))
    assert account(path.parent).seconds["init"] == account(path.parent).wall == 13
    ledger.close()


def test_without_a_path_nothing_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    ledger = Ledger(None, time.time())
    ledger.ended("init")
    ledger.went_back(0)
    ledger.close()
    assert list(tmp_path.iterdir()) == []


def test_table_shows_every_kind_and_the_goodput(
    clock: Clock, path: epath.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ledger = Ledger(path, clock.now)
    clock.book(ledger, (25, "init"), (75, "step", 0, 10))
    ledger.close()
    show(Path(path.parent))
    shown = capsys.readouterr().out
    assert all(kind in shown for kind in module.KINDS)
    assert "25.0%" in shown
    assert "goodput 75.0%" in shown


def test_folder_without_a_run_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"nowhere: no ledger\.jsonl, so no run is stored here"):
        account(tmp_path / "nowhere")


def test_process_starts_when_it_is_started() -> None:
    code = (
        "import time; time.sleep(1)\nfrom hypersteer_jax.training.ledger import process_start; print(process_start())"
    )
    begin = time.time()
    started = float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
    assert begin - 0.05 < started < begin + 1  # before the sleep and the imports
    assert process_start() < begin
