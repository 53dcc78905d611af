"""The chaos experiment in its short form: a run is hit by both signals and comes out as if it had been left alone."""

from pathlib import Path

from experiments import chaos


def test_killed_run_comes_out_equal(tmp_path: Path) -> None:
    found = chaos.experiment(chaos.Setup(tmp_path, processes=1, steps=10, seed=0), kills=2)
    assert [kill["signal"] for kill in found["kills"]] == ["SIGTERM", "SIGKILL"]
    assert found["wall_error"] < 0.01
    assert "2 kills in" in chaos.report(found)
