"""The metrics file: one JSON object per line, also after a crash, and also in a bucket."""

import json
from pathlib import Path

import pytest
from etils import epath

from hypersteer_jax.training import metrics
from hypersteer_jax.training.metrics import MetricsLog, read_rows


@pytest.fixture
def path(tmp_path: Path) -> epath.Path:
    return epath.Path(tmp_path / "metrics.jsonl")


def test_rows_are_on_disk_as_soon_as_they_are_written(path: epath.Path) -> None:
    log = MetricsLog(path, 0)
    log.write(0, {"loss": 1.5})
    log.write(0, {"evaluation": {"held-in": {"steered": 1.0}}})
    assert read_rows(path) == [
        {"step": 0, "loss": 1.5},
        {"step": 0, "evaluation": {"held-in": {"steered": 1.0}}},
    ]
    log.close()
    assert [path.name for path in path.parent.iterdir()] == ["metrics.jsonl"]


def test_rows_beyond_the_checkpoint_go_and_the_others_stay(path: epath.Path) -> None:
    path.write_text("".join(json.dumps({"step": step, "loss": step / 2}) + "\n" for step in range(5)))
    log = MetricsLog(path, 3)
    log.write(3, {"loss": 9.0})
    log.close()
    assert read_rows(path) == [{"step": step, "loss": step / 2} for step in range(3)] + [{"step": 3, "loss": 9.0}]


def test_half_written_last_line_goes(path: epath.Path) -> None:
    path.write_text('{"step": 0, "loss": 1.0}\n{"step": 1, "lo')
    log = MetricsLog(path, 5)
    log.write(5, {"loss": 2.0})
    log.close()
    assert path.read_text() == '{"step": 0, "loss": 1.0}\n{"step": 5, "loss": 2.0}\n'


def test_evaluation_that_was_made_is_known(path: epath.Path) -> None:
    rows = [{"step": 1, "loss": 1.0}, {"step": 1, "evaluation": {}}, {"step": 2, "loss": 1.0}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    log = MetricsLog(path, 3)
    assert [log.evaluated(step) for step in range(4)] == [False, True, False, False]
    log.close()


def test_in_a_bucket_rows_are_written_together(path: epath.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "in_bucket", lambda _: True)
    path.write_text('{"step": 0, "loss": 1.0}\n')
    log = MetricsLog(path, 1)
    log.write(1, {"loss": 2.0})
    assert read_rows(path) == [{"step": 0, "loss": 1.0}]
    log.flush()
    assert read_rows(path) == [{"step": 0, "loss": 1.0}, {"step": 1, "loss": 2.0}]
    log.write(2, {"loss": 3.0})
    log.close()
    assert [row["step"] for row in read_rows(path)] == [0, 1, 2]


def test_without_a_path_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    log = MetricsLog(None, 0)
    log.write(0, {"loss": 1.0})
    log.close()
    assert list(tmp_path.iterdir()) == []
