"""The numbers of the PyTorch release, and that a difference, or a damaged case, does not pass."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from hypersteer_jax.evaluation import golden
from hypersteer_jax.evaluation.golden import GoldenError, Row, compare, load_golden, print_comparison, relative_error
from hypersteer_jax.models.weights import WeightsError


@pytest.fixture
def case(golden_dir: Path, tmp_path: Path) -> Path:
    """A copy that may be damaged."""
    folder = tmp_path / "case"
    folder.mkdir()
    for file in golden_dir.iterdir():
        shutil.copyfile(file, folder / file.name)
    return folder


def without(case: Path, name: str) -> None:
    tensors = load_file(case / "golden.safetensors")
    del tensors[name]
    save_file(tensors, case / "golden.safetensors")


def test_everything_agrees_with_the_release(golden_dir: Path) -> None:
    rows = compare(load_golden(golden_dir))
    assert len(rows) == 11
    assert all(row.agrees for row in rows), rows
    by_name = {row.name: row for row in rows}
    assert by_name["gradients of step 0"].tensors == 37  # each of them, but the norm that is never applied
    assert by_name["gradient of unused parameters"].tensors == 1
    assert by_name["weights after one step"].tensors == 38
    assert by_name["losses of the run"].tensors == 20
    assert max(row.allowed for row in rows) <= 1e-4


def test_one_weight_that_is_a_thousandth_off_is_seen(
    case: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(golden, "_training", lambda _: [])  # the forward pass shows it, and compiles faster
    tensors = load_file(case / "golden.safetensors")
    weight = tensors["hypernet.init.layers.0.cross_attention.q_proj.weight"]
    weight += 1e-3 * np.abs(weight) * np.random.default_rng(0).choice([-1, 1], weight.shape)
    save_file(tensors, case / "golden.safetensors")
    assert print_comparison(case) is False
    lines = capsys.readouterr().out.splitlines()
    names = ("context", "vector, padded", "vector, true", "base", "factor 1")
    said = {name: line for line in lines for name in names if name in line}
    assert "agrees" in said["context"]  # the base LM is as it was
    assert "agrees" in said["base"]
    for name in ("vector, padded", "vector, true", "factor 1"):
        assert "DIFFERS" in said[name], said


@pytest.mark.parametrize(
    ("name", "error", "match"),
    [
        ("lm.model.layers.2.mlp.up_proj.weight", WeightsError, r"missing +model\.layers\.2\.mlp\.up_proj\.weight"),
        ("labels", GoldenError, "lacks 'labels'; record it again"),
    ],
)
def test_missing_tensor(case: Path, name: str, error: type[Exception], match: str) -> None:
    without(case, name)
    with pytest.raises(error, match=match):
        load_golden(case)


def test_missing_weight_of_the_hypernetwork(case: Path) -> None:
    without(case, "hypernet.init.regression_head.bias")
    with pytest.raises(WeightsError, match=r"missing +regression_head\.bias"):
        load_golden(case).hypernet()


def test_missing_field(case: Path) -> None:
    meta = json.loads((case / "golden.json").read_text())
    del meta["steering_layer"]
    (case / "golden.json").write_text(json.dumps(meta))
    with pytest.raises(GoldenError, match="lacks 'steering_layer'"):
        load_golden(case)


@pytest.mark.parametrize("name", ["golden.json", "golden.safetensors"])
def test_truncated_file(case: Path, name: str) -> None:
    whole = (case / name).read_bytes()
    (case / name).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(GoldenError, match=r"case: not a golden case .*give a directory with golden\.json"):
        load_golden(case)


@pytest.mark.parametrize("name", ["golden.json", "golden.safetensors"])
def test_missing_file(case: Path, name: str) -> None:
    (case / name).unlink()
    with pytest.raises(GoldenError, match="not a golden case"):
        load_golden(case)


def test_missing_directory(tmp_path: Path) -> None:
    with pytest.raises(GoldenError, match=r"nowhere: not a golden case .*golden\.json"):
        load_golden(tmp_path / "nowhere")


def test_relative_error_by_hand() -> None:
    assert relative_error(np.array([3.0, 4.5]), np.array([3.0, 4.0])) == pytest.approx(0.1)
    assert relative_error(np.zeros(2), np.zeros(2)) == 0


def test_not_a_number_never_agrees() -> None:
    assert Row("x", 1e-5, 1e-5, 1).agrees
    assert not Row("x", 1.1e-5, 1e-5, 1).agrees
    assert not Row("x", float("nan"), 1e-5, 1).agrees
