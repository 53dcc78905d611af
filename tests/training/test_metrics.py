"""The metrics file: one JSON object per line, also after a crash."""

import json
from pathlib import Path

from hypersteer_jax.training.metrics import MetricsLog


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_rows_are_on_disk_as_soon_as_they_are_written(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "metrics.jsonl", 0)
    log.write(0, {"loss": 1.5})
    log.write(0, {"evaluation": {"held-in": {"steered": 1.0}}})
    assert rows(tmp_path / "metrics.jsonl") == [
        {"step": 0, "loss": 1.5},
        {"step": 0, "evaluation": {"held-in": {"steered": 1.0}}},
    ]
    log.close()
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_rows_beyond_the_checkpoint_go_and_the_others_stay(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps({"step": step, "loss": step / 2}) + "\n" for step in range(5)))
    log = MetricsLog(path, 3)
    log.write(3, {"loss": 9.0})
    log.close()
    assert rows(path) == [{"step": step, "loss": step / 2} for step in range(3)] + [{"step": 3, "loss": 9.0}]


def test_half_written_last_line_goes(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 0, "loss": 1.0}\n{"step": 1, "lo')
    log = MetricsLog(path, 5)
    log.write(5, {"loss": 2.0})
    log.close()
    assert rows(path) == [{"step": 0, "loss": 1.0}, {"step": 5, "loss": 2.0}]
