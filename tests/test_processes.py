"""Runs on more devices, and on more processes, are the same run."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from hypersteer_jax.training.train import TrainState
from tests.processes import rows_of, run

MESHES = [{"fsdp": 2, "tensor": 2}, {"data": 2, "fsdp": 2, "tensor": 2}]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> tuple[TrainState, list[dict[str, Any]]]:
    out = tmp_path_factory.mktemp("alone") / "run"
    return run(out, {"fsdp": 1}), rows_of(out)


def assert_same_run(rows: list[dict[str, Any]], others: list[dict[str, Any]]) -> None:
    """The same losses, within 1e-5 relative, over 100 steps and two evaluations."""
    assert [row["step"] for row in rows] == [row["step"] for row in others]
    for kind in ("loss", "grad_norm"):
        one, two = ([row[kind] for row in run if kind in row] for run in (rows, others))
        assert len(one) == 100
        assert np.ptp(one) > 0.1 * np.mean(one)  # it learns, and batches differ
        np.testing.assert_allclose(two, one, rtol=1e-5 if kind == "loss" else 1e-3)
    one, two = ([row["evaluation"]["held-in"] for row in run if "evaluation" in row] for run in (rows, others))
    assert len(one) == 2
    for ours, theirs in zip(one, two, strict=True):
        assert theirs == pytest.approx(ours, rel=1e-5)


@pytest.mark.parametrize("axes", MESHES, ids=str)
def test_more_devices_are_the_same_run(axes: dict[str, int], alone: Any, tmp_path: Path) -> None:
    run(tmp_path / "run", axes)
    assert_same_run(alone[1], rows_of(tmp_path / "run"))


def test_two_processes_are_the_same_run(alone: Any, tmp_path: Path) -> None:
    """Two processes of four devices each, as if they were two slices: `data` crosses between them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    out, mesh = tmp_path / "run", json.dumps({"data": 2, "fsdp": 4, "slices": 2})
    workers = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.processes", str(out), mesh],
            env=os.environ
            | {
                "XLA_FLAGS": os.environ["XLA_FLAGS"].replace("device_count=8", "device_count=4"),
                "JAX_COORDINATOR_ADDRESS": address,
                "JAX_NUM_PROCESSES": "2",
                "JAX_PROCESS_ID": str(index),
            },
            cwd=Path(__file__).parents[1],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in range(2)
    ]
    texts = [worker.communicate(timeout=400) for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0], texts
    reports = [json.loads(text.splitlines()[-1]) for text, _ in texts]
    state, rows = alone
    whole = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    for report in reports:
        assert (report["processes"], report["devices"]) == (2, 4)
        assert report["bytes"] < 1.15 * whole  # a copy to a slice, spread over its devices; vectors are not
    assert_same_run(rows, rows_of(out))
