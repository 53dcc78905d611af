"""Checkpoints: everything comes back exactly, on any mesh, and what cannot be read is said."""

import dataclasses
import json
from functools import partial
from pathlib import Path

import jax
import numpy as np
import pytest

from hypersteer_jax.config import DataConfig, HypernetConfig, RunConfig, SteeringConfig, TrainConfig
from hypersteer_jax.data.pipeline import iterator, make_layout
from hypersteer_jax.sharding import make_mesh, shardings
from hypersteer_jax.training import checkpoint
from hypersteer_jax.training.checkpoint import (
    CheckpointError,
    open_checkpoints,
    read_config,
    restore,
    resume_position,
    save,
    write_config,
)
from hypersteer_jax.training.train import TrainState, init_state
from tests.conftest import random_rows
from tests.models.tiny import CONFIGS, random_lm

LM = random_lm(CONFIGS["gemma2"])
CONFIG = RunConfig(hypernet=HypernetConfig(blocks=2), steering=SteeringConfig(layers=(1,)))
ROWS = random_rows([4] * 8, [10, 11, 12, 13] * 2, [3] * 8)  # four batches of two an epoch


def abstract(config: RunConfig = CONFIG) -> TrainState:
    return jax.eval_shape(partial(init_state, config), LM)


@pytest.fixture(scope="module")
def state() -> TrainState:
    """A state in which every number is another, the moments and counters, too."""
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda x: jax.numpy.asarray(rng.normal(size=x.shape) if x.shape else rng.integers(1, 99), x.dtype), abstract()
    )


def batches():
    return iterator(ROWS, make_layout(ROWS, DataConfig(buckets=1), seed=3), 2, seed=3)


def stored(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


def saved(folder: Path, state: TrainState, steps: list[int]) -> None:
    with open_checkpoints(folder) as checkpoints:
        for step in steps:
            save(checkpoints, step, state._replace(step=state.step * 0 + step), 5, config=CONFIG)


@pytest.mark.parametrize("axes", [{}, {"fsdp": 4}, {"data": 2, "fsdp": 2}], ids=str)
def test_state_comes_back_exactly_on_any_mesh(tmp_path: Path, state: TrainState, axes: dict[str, int]) -> None:
    saved(tmp_path, state, [7])
    mesh = make_mesh(**axes)
    with open_checkpoints(tmp_path) as checkpoints:
        back = restore(checkpoints, abstract(), mesh).state
    assert int(back.step) == 7
    assert jax.tree.structure(back) == jax.tree.structure(state)
    wanted = jax.tree.leaves(shardings(back[1:], mesh))
    for ours, theirs, at in zip(jax.tree.leaves(back[1:]), jax.tree.leaves(state[1:]), wanted, strict=True):
        np.testing.assert_array_equal(ours, theirs)
        assert ours.dtype == theirs.dtype
        assert ours.sharding == at
    split = [leaf for leaf in jax.tree.leaves(back) if not leaf.sharding.is_fully_replicated]
    assert bool(split) == ("fsdp" in axes)


def test_newest_of_the_last_three_comes_back(tmp_path: Path, state: TrainState) -> None:
    saved(tmp_path, state, [1, 2, 5, 9])
    with open_checkpoints(tmp_path) as checkpoints:
        assert int(restore(checkpoints, abstract(), make_mesh()).state.step) == 9
    assert stored(tmp_path) == ["2", "5", "9"]


def test_data_goes_on_where_it_was(tmp_path: Path, state: TrainState) -> None:
    data = batches()
    for _ in range(3):
        next(data)
    with open_checkpoints(tmp_path) as checkpoints:
        save(checkpoints, 3, state, data.get_state()["next_index"], config=CONFIG)
        expected = [next(data) for _ in range(4)]  # through the end of an epoch
    again = batches()
    with open_checkpoints(tmp_path) as checkpoints:
        again.set_state({"next_index": resume_position(restore(checkpoints, abstract(), make_mesh()))})
    for one, two in zip(expected, (next(again) for _ in range(4)), strict=True):
        for left, right in zip(one, two, strict=True):
            np.testing.assert_array_equal(left, right)
    assert len({batch.tokens.tobytes() for batch in expected}) > 1


def test_saving_does_not_wait_and_does_not_mind_donation(tmp_path: Path, state: TrainState) -> None:
    copy = jax.tree.map(lambda x: x.copy(), state)
    with open_checkpoints(tmp_path) as checkpoints:
        save(checkpoints, 1, copy, config=CONFIG)
        jax.tree.map(lambda x: x.delete(), copy)  # what a step does to the buffers it is given
    with open_checkpoints(tmp_path) as checkpoints:
        back = restore(checkpoints, abstract(), make_mesh()).state
    np.testing.assert_array_equal(back.hypernet.head[...], state.hypernet.head[...])


def test_nothing_to_restore(tmp_path: Path) -> None:
    with (
        open_checkpoints(tmp_path) as checkpoints,
        pytest.raises(CheckpointError, match=r"checkpoints: no checkpoint yet"),
    ):
        restore(checkpoints, abstract(), make_mesh())


@pytest.mark.parametrize(
    ("hypernet", "why"),
    [
        (
            HypernetConfig(blocks=3),
            r"hypernet\.blocks\.attention\.k\.value is \(2, .*, wanted \(3, .*; and \d+ more$",
        ),
        (HypernetConfig(blocks=2, memory_norm=True), r"hypernet\.memory_norm\.value is absent, wanted \(32,\) float32"),
        (
            HypernetConfig(blocks=2, embedding="shared"),
            r"hypernet\.embedding\.value is \(97, 32\) .*, wanted absent",
        ),
    ],
)
def test_another_network_is_refused_by_name(
    tmp_path: Path, state: TrainState, hypernet: HypernetConfig, why: str
) -> None:
    saved(tmp_path, state, [4])
    other = dataclasses.replace(CONFIG, hypernet=hypernet)
    message = rf"checkpoints: step 4 is of another network: {why}"
    with open_checkpoints(tmp_path) as checkpoints, pytest.raises(CheckpointError, match=message):
        restore(checkpoints, abstract(other), make_mesh())


def test_config_is_read_back_equal(tmp_path: Path) -> None:
    config = dataclasses.replace(
        CONFIG, out=tmp_path / "run", train=TrainConfig(factor_range=(0.5, 2.0), schedule="cosine")
    )
    write_config(config.out, config)
    assert read_config(config.out) == config
    versions = json.loads((config.out / "config.json").read_text())["versions"]
    assert set(versions) == set(checkpoint.PACKAGES)
    assert versions["jax"] == jax.__version__
    assert [path.name for path in config.out.iterdir()] == ["config.json"]  # no half-written file beside it


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ('{"config": {"lm": ', "Expecting value"),
        ('{"versions": {}}', "'config'"),
        ("[1, 2]", "list indices"),
        ('{"config": {"train": {"momentum": 0.9}}}', "unknown key momentum; TrainConfig has steps"),
        ('{"config": {"train": {"steps": "many"}}}', r"train\.steps is 'many'"),
    ],
)
def test_damaged_config(tmp_path: Path, text: str, why: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=rf"config\.json: not a config of this version .*{why}"):
        read_config(tmp_path)


def test_folder_without_a_run(tmp_path: Path) -> None:
    with pytest.raises(
        CheckpointError, match=r"nowhere: no config\.json, so no run is stored here; give the `out` folder"
    ):
        read_config(tmp_path / "nowhere")


def test_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"out is .*file/run, which cannot be written .*give another folder"):
        write_config(tmp_path / "file/run", CONFIG)
