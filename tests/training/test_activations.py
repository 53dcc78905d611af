"""The activation cache: what it holds, what it is refused for, and that it needs room."""

import dataclasses
import json
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from hypersteer_jax.config import ConfigError, DataConfig, RunConfig, SteeringConfig, TrainConfig
from hypersteer_jax.data.pipeline import Rows, collate, make_layout
from hypersteer_jax.models.lm import LM, cast
from hypersteer_jax.sharding import make_mesh, shard_weights
from hypersteer_jax.steering import read_context
from hypersteer_jax.training import activations
from hypersteer_jax.training.activations import ActivationCache, fingerprint, open_cache
from hypersteer_jax.training.checksum import checksum
from tests.conftest import random_rows
from tests.models.tiny import CONFIGS, random_lm

BASE = random_lm(CONFIGS["gemma2"])
ROWS = random_rows([4, 5, 6, 7, 4] * 3, [9, 12, 14, 30, 20] * 3, [3] * 15)
CONFIG = RunConfig(steering=SteeringConfig(layers=(2,)), train=TrainConfig(cache="memory"))


def having(**settings: Any) -> RunConfig:
    return dataclasses.replace(CONFIG, train=dataclasses.replace(CONFIG.train, **settings))


def opened(config: RunConfig, lm: LM = BASE, rows: Rows = ROWS, template: str = "{{ x }}") -> ActivationCache:
    cache = open_cache(config, lm, rows, template, Console(quiet=True))
    assert cache is not None
    return cache


def test_off_is_none() -> None:
    assert open_cache(having(cache="off"), BASE, ROWS, "", Console(quiet=True)) is None


@pytest.mark.parametrize("pack", [False, True])
@pytest.mark.parametrize("context", ["entering", "leaving"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_holds_what_the_lower_blocks_give(dtype: str, context: str, pack: bool) -> None:
    config = dataclasses.replace(CONFIG, steering=SteeringConfig((1,), context))
    lm = cast(BASE, jnp.dtype(dtype))
    layout = make_layout(ROWS, DataConfig(buckets=1, pack=pack), seed=0)
    batch = collate(ROWS, layout.sequences[:6], layout.buckets[0])
    found = opened(config, lm).read(batch)
    expected = jax.jit(partial(read_context, config=config.steering))(lm, batch.tokens, batch.segments)
    assert found.dtype == expected.dtype == dtype
    tolerance = (
        1e-5 if dtype == "float32" else 2**-6
    )  # a unit of bfloat16 at the residual's size, rounded in each block
    one, two = (np.asarray(x, np.float32)[batch.mask] for x in (found, expected))
    np.testing.assert_allclose(one, two, atol=tolerance * np.abs(two).max())
    assert not found[~batch.mask].any()


def test_filling_does_not_depend_on_how_much_goes_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = opened(CONFIG)
    monkeypatch.setattr(activations, "FILL", 64)
    np.testing.assert_allclose(opened(CONFIG).residual, whole.residual, atol=1e-5)
    assert np.abs(whole.residual).max(axis=1).min() > 0.1  # every token of every row is there


def test_disk_is_filled_once_and_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = having(cache="disk", cache_dir=tmp_path / "cache")
    first = opened(config)
    np.testing.assert_array_equal(first.residual, opened(CONFIG).residual)
    monkeypatch.setattr(activations, "_fill", None)
    np.testing.assert_array_equal(opened(config).residual, first.residual)
    assert sorted(path.name for path in (tmp_path / "cache").iterdir()) == ["key.json", "residual.bin"]


def test_unfinished_folder_is_filled_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = having(cache="disk", cache_dir=tmp_path / "cache")

    def stop(cache: ActivationCache, *_: Any) -> None:
        cache.residual[:5] = 7
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(activations, "_fill", stop)
        with pytest.raises(KeyboardInterrupt):
            opened(config)
    np.testing.assert_array_equal(opened(config).residual, opened(CONFIG).residual)


def other_lm() -> LM:
    """One weight of one block is another."""
    return jax.tree_util.tree_map_with_path(
        lambda path, w: (
            w.at[(0,) * w.ndim].add(1e-3) if "mlp.up" in jax.tree_util.keystr(path, simple=True, separator=".") else w
        ),
        BASE,
    )


CHANGES: dict[str, dict[str, Any]] = {
    "base LM": {"lm": other_lm()},
    "base LM, dtype": {"lm": cast(BASE, jnp.dtype("bfloat16"))},
    "data": {"rows": random_rows([4, 5, 6, 7, 4] * 3, [9, 12, 14, 30, 20] * 3, [3] * 15, seed=1)},
    "chat template": {"template": "{{ y }}"},
    "layer": {"steering": SteeringConfig(layers=(1,))},
}


@pytest.mark.parametrize("what", CHANGES)
def test_another_key_is_refused_by_name(what: str, tmp_path: Path) -> None:
    config = having(cache="disk", cache_dir=tmp_path / "cache")
    opened(config)
    changed = dict(CHANGES[what])
    if "steering" in changed:
        config = dataclasses.replace(config, steering=changed.pop("steering"))
    with pytest.raises(ConfigError, match=f"was filled with another {what}; give another folder, or delete this one"):
        opened(config, **changed)


def test_damaged_key(tmp_path: Path) -> None:
    config = having(cache="disk", cache_dir=tmp_path / "cache")
    opened(config)
    (tmp_path / "cache" / "key.json").write_text("{")
    with pytest.raises(ConfigError, match=r"key\.json is damaged .*; delete "):
        opened(config)


def test_no_room_is_said_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    full = type("Usage", (), {"free": 1000})
    monkeypatch.setattr(activations.shutil, "disk_usage", lambda _: full)
    folder = tmp_path / "cache"
    with pytest.raises(ConfigError, match=r"train\.cache needs 0\.0 GB in .*cache, where 0\.0 GB are free"):
        opened(having(cache="disk", cache_dir=folder))
    assert not list(folder.iterdir())
    monkeypatch.setattr(activations.os, "sysconf", lambda _: 10)
    with pytest.raises(ConfigError, match=r"in memory, where .* take train\.cache disk, or off"):
        opened(CONFIG)


def test_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"train\.cache_dir is .*file/cache, which cannot be written"):
        opened(having(cache="disk", cache_dir=tmp_path / "file" / "cache"))


def test_checksum_by_hand_and_on_a_mesh() -> None:
    x = np.arange(32, dtype=np.float32).reshape(8, 4) - 7
    bits = x.view(np.uint32).astype(object)
    place = np.add.outer(np.arange(8).astype(object) * 2654435761, np.arange(4).astype(object) * 2 * 2654435761)
    expected = int((bits * (2 * place + 1)).sum() % 2**32)
    assert int(checksum(jnp.asarray(x))) == expected
    assert int(checksum(jnp.asarray(x[::-1]))) != expected  # place counts
    mesh = make_mesh(data=2, fsdp=4)
    with jax.set_mesh(mesh):
        assert int(jax.jit(checksum)(shard_weights(x, mesh))) == expected
        assert fingerprint(shard_weights(BASE, mesh)) == fingerprint(BASE)
    assert json.dumps(fingerprint(BASE)) != json.dumps(fingerprint(other_lm()))
