"""Checkpoints: everything comes back exactly, on any mesh, and what cannot be read is said."""

import contextlib
import dataclasses
import gc
import json
import os
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest
from orbax.checkpoint import v1 as ocp

from hypersteer_jax.config import DataConfig, HypernetConfig, RunConfig, SteeringConfig, TrainConfig, to_dict
from hypersteer_jax.data.pipeline import iterator, make_layout
from hypersteer_jax.sharding import make_mesh, shardings
from hypersteer_jax.training import checkpoint
from hypersteer_jax.training.checkpoint import (
    CheckpointError,
    check_room,
    open_checkpoints,
    read_config,
    restore,
    resume_position,
    run_path,
    save,
    wait,
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


# --- damage: on a small state, of which everything is known ---

SMALL = {"weights": (64, 32), "moments": (64, 32), "bias": (7,)}
RECORD, INDEX, ARRAYS = "_CHECKPOINT_METADATA", "state/d/*", "state/ocdbt.process_0/d/*"


# Orbax gives up all other reads when one fails, and does not wait for them.
@pytest.fixture
def collected() -> Iterator[None]:
    """What a test leaves behind is collected at its end, where its filters apply, and not during another one."""
    yield
    gc.collect()


def abandons(test: Callable[..., None]) -> Callable[..., None]:
    """Marks a test at whose end coroutines of a read or write that failed are left over."""
    ignored = "ignore:coroutine '.*' was never awaited", "ignore::pytest.PytestUnraisableExceptionWarning"
    return pytest.mark.usefixtures("collected")(pytest.mark.filterwarnings(*ignored)(test))


def small(step: int, shapes: dict[str, tuple[int, ...]] = SMALL) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(step)
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()} | {
        "step": np.int32(step)
    }


def save_small(folder: Path | str, steps: list[int], **kept: int) -> None:
    with open_checkpoints(folder, **kept) as checkpoints:
        for step in steps:
            save(checkpoints, step, jax.device_put(small(step)), 10 * step, config=CONFIG)


def restore_small(folder: Path | str, **mesh: int) -> SimpleNamespace:
    """What comes back, checked to be bit for bit what was saved at that step, and what was said."""
    said: list[str] = []
    with open_checkpoints(folder) as checkpoints:
        restored = restore(checkpoints, jax.eval_shape(lambda: small(0)), make_mesh(**mesh), said.append)
    expected = small(restored.step)
    assert restored.state.keys() == expected.keys()
    for name, array in restored.state.items():
        assert np.asarray(array).tobytes() == expected[name].tobytes()
    assert restored.position == 10 * restored.step
    return SimpleNamespace(step=restored.step, said=said)


def damage(folder: Path, step: int, file: str, how: str) -> None:
    path = max((folder / f"checkpoints/{step}").glob(file), key=lambda path: path.stat().st_size)
    data = path.read_bytes()
    middle = len(data) // 2
    if how == "gone":
        path.unlink()
    else:
        path.write_bytes(data[:middle] + (bytes([data[middle] ^ 1]) + data[middle + 1 :] if how == "flipped" else b""))


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("three")
    save_small(folder, [1, 2, 3])
    return folder


@pytest.fixture
def run(three: Path, tmp_path: Path) -> Path:
    shutil.copytree(three, tmp_path / "run")
    return tmp_path / "run"


@abandons
@pytest.mark.parametrize("how", ["flipped", "cut", "gone"])
@pytest.mark.parametrize("file", [RECORD, "state/_METADATA", "state/manifest.ocdbt", INDEX, ARRAYS])
def test_damaged_newest_is_named_and_passed_over(run: Path, file: str, how: str) -> None:
    damage(run, 3, file, how)
    before = stored(run)
    found = restore_small(run, fsdp=4)
    assert found.step == 2
    (said,) = found.said
    assert said.startswith(f"DAMAGED CHECKPOINT, passed over: {run}/checkpoints/3: ")
    if file == ARRAYS:
        assert re.search("weights|moments|bias|step", said.partition("/3: ")[2])
    if file == RECORD:
        assert "its metadata" in said
    assert stored(run) == before  # to look at a run does not change it


@abandons
def test_an_array_that_reads_well_but_is_not_what_was_saved_is_named(run: Path) -> None:
    """What no code of a file can notice: wrong on the way from the device, or written by another run."""
    other = small(3) | {"moments": np.nextafter(small(3)["moments"], np.float32(9))}
    ocp.save(run / "other", jax.device_put(other))
    shutil.rmtree(run / "checkpoints/3/state")
    shutil.copytree(run / "other/state", run / "checkpoints/3/state")
    found = restore_small(run)
    assert found.step == 2
    assert found.said[0].endswith("/3: moments: not the checksum of what was saved")


@pytest.mark.parametrize("file", ["commit_success.txt", "state/commit_success.txt", "state/_sharding"])
@pytest.mark.parametrize("how", ["flipped", "gone"])
def test_damage_to_what_is_not_read_costs_nothing(run: Path, file: str, how: str) -> None:
    damage(run, 3, file, how)
    found = restore_small(run, fsdp=2)
    assert (found.step, found.said) == (3, [])


@abandons
def test_a_step_that_was_passed_over_is_moved_aside_and_saved_again(run: Path) -> None:
    damage(run, 3, ARRAYS, "flipped")
    damage(run, 2, RECORD, "cut")
    lost = {path.name: path.read_bytes() for path in (run / "checkpoints/3").iterdir() if path.is_file()}
    (run / "checkpoints/3.damaged").mkdir()  # of an earlier time
    said: list[str] = []
    with open_checkpoints(run) as checkpoints:
        restored = restore(checkpoints, jax.eval_shape(lambda: small(0)), make_mesh(), said.append)
        assert restored.step == 1
        assert [re.search(r"checkpoints/(\d): ", line)[1] for line in said] == ["3", "2"]
        save(checkpoints, 3, jax.device_put(small(3)), 30, config=CONFIG)
    assert stored(run) == ["1", "2.damaged", "3", "3.damaged", "3.damaged.2"]
    assert restore_small(run).step == 3
    aside = run / "checkpoints/3.damaged.2"
    assert {path.name: path.read_bytes() for path in aside.iterdir() if path.is_file()} == lost


@abandons
def test_damage_that_is_found_later_is_moved_aside_too(run: Path) -> None:
    with open_checkpoints(run) as checkpoints:
        save(checkpoints, 4, jax.device_put(small(4)), 40, config=CONFIG)
        wait(checkpoints)
        damage(run, 4, ARRAYS, "gone")
        assert restore(checkpoints, jax.eval_shape(lambda: small(0)), make_mesh(), lambda _: None).step == 3
        save(checkpoints, 4, jax.device_put(small(4)), 40, config=CONFIG)
    assert stored(run) == ["2", "3", "4", "4.damaged"]
    assert restore_small(run).step == 4


def test_damage_to_an_older_one_does_not_stop_the_run(run: Path) -> None:
    path = run / "checkpoints/1" / RECORD
    path.write_text(path.read_text().replace("item_handlers", "item_handlerz"))  # Orbax cannot open a folder with it
    said: list[str] = []
    with open_checkpoints(run) as checkpoints:
        restored = restore(checkpoints, jax.eval_shape(lambda: small(0)), make_mesh(), said.append)
        save(checkpoints, 4, jax.device_put(small(4)), 40, config=CONFIG)
    assert restored.step == 3
    assert len(said) == 1
    assert "checkpoints/1: " in said[0]
    assert stored(run) == ["1.damaged", "2", "3", "4"]


@abandons
def test_all_damaged_are_listed_and_left(run: Path) -> None:
    damage(run, 3, ARRAYS, "flipped")
    damage(run, 2, RECORD, "gone")
    damage(run, 1, INDEX, "cut")
    message = r"checkpoints: all checkpoints are damaged; step 3: .*; step 2: its metadata .*; step 1: .*state/d/"
    with pytest.raises(CheckpointError, match=message):
        restore_small(run)
    assert stored(run) == ["1", "2", "3"]


def test_another_network_is_refused_not_passed_over(run: Path) -> None:
    abstract = jax.eval_shape(lambda: small(0, SMALL | {"bias": (8,)}))
    with (
        open_checkpoints(run) as checkpoints,
        pytest.raises(CheckpointError, match=r"step 3 is of another network: bias is \(7,\) float32, wanted \(8,\) f"),
    ):
        restore(checkpoints, abstract, make_mesh())


def test_config_and_versions_are_in_every_checkpoint(run: Path) -> None:
    for step in (1, 2, 3):
        record = ocp.checkpointables_metadata(run / f"checkpoints/{step}").custom_metadata
        assert record["config"] == to_dict(CONFIG)
        assert record["versions"]["jax"] == jax.__version__
        assert record["position"] == 10 * step


def test_the_last_ones_and_every_mth_are_kept(tmp_path: Path) -> None:
    save_small(tmp_path, [2, 4, 6, 8, 10, 12], keep_last=2, keep_every=4)
    assert stored(tmp_path) == ["10", "12", "4", "8"]


def test_a_step_that_is_stored_is_not_saved_again(run: Path) -> None:
    with open_checkpoints(run) as checkpoints:
        save(checkpoints, 3, jax.device_put(small(4)), 40, config=CONFIG)
    assert restore_small(run).step == 3


# --- saves that do not finish ---


def test_folder_that_cannot_be_written_is_known_before(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("")
    with pytest.raises(CheckpointError, match=r"checkpoints cannot be written \(NotADirectoryError: .*another `out`"):
        check_room(tmp_path, jax.eval_shape(lambda: small(0)), CONFIG)


def test_too_little_room_is_known_before(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    abstract = {"weights": jax.ShapeDtypeStruct((1000, 1000), np.float32)}  # 4 MB
    config = dataclasses.replace(CONFIG, train=TrainConfig(keep_last=4, keep_every=200, save_every=100, steps=1000))
    needed = (4 + 1 + 5 - 3) * 4_000_000  # three are there

    def free(size: int) -> None:
        monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=size))

    free(needed)
    check_room(run, abstract, config)
    free(needed - 1000)
    message = (
        r"0\.03 GB are free, but 7 more checkpoints of 0\.00 GB need 0\.03 GB; make room, .* lower train\.keep_last"
    )
    with pytest.raises(CheckpointError, match=message):
        check_room(run, abstract, config)
    part = run / "checkpoints/4.orbax-checkpoint-tmp/state"
    part.mkdir(parents=True)
    (part / "d").write_bytes(bytes(1000))  # will be cleared away
    check_room(run, abstract, config)


@contextlib.contextmanager
def files_up_to(size: int):
    """As if the disk were full for everything larger."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@abandons
def test_a_save_that_fails_is_said_and_the_last_good_one_stays(tmp_path: Path) -> None:
    large = jax.device_put(small(2, {"weights": (1000, 1000), "moments": (9, 9)}))
    failed = r"run/checkpoints/2 could not be saved \(.*File too large.*\); the last good checkpoint is step 1"
    save_small(tmp_path / "run", [1])
    with open_checkpoints(tmp_path / "run") as checkpoints:
        for end in (wait, lambda checkpoints: save(checkpoints, 3, large, config=CONFIG)):
            with files_up_to(1_000_000):
                save(checkpoints, 2, large, config=CONFIG)
                with pytest.raises(CheckpointError, match=failed):
                    end(checkpoints)
            assert restore_small(tmp_path / "run").step == 1
        save(checkpoints, 2, jax.device_put(small(2)), 20, config=CONFIG)  # there is room again
    assert stored(tmp_path / "run") == ["1", "2"]
    assert restore_small(tmp_path / "run").step == 2
    with pytest.raises(CheckpointError, match=failed), files_up_to(1_000_000):
        save_and_leave(tmp_path / "run", large)


def save_and_leave(folder: Path, state: Any) -> None:
    shutil.rmtree(folder / "checkpoints/2")
    with open_checkpoints(folder) as checkpoints:
        save(checkpoints, 2, state, config=CONFIG)


def python(code: str, *arguments: Any) -> subprocess.Popen:
    """Another process, at the root of the repository."""
    root = Path(__file__).resolve().parents[2]
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=2", "PYTHONPATH": str(root)}
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


ENDLESS = """
import sys, itertools, jax, jax.numpy as jnp
from hypersteer_jax.config import RunConfig
from hypersteer_jax.training.checkpoint import open_checkpoints, save
with open_checkpoints(sys.argv[1]) as checkpoints:
    for step in itertools.count(1):
        state = {"weights": jax.random.normal(jax.random.key(step), (2000, 2000)), "step": jnp.int32(step)}
        save(checkpoints, step, state, step, config=RunConfig())
"""


def test_a_kill_in_the_middle_of_a_save_loses_that_save_only(tmp_path: Path) -> None:
    process = python(ENDLESS, tmp_path)
    folder = tmp_path / "checkpoints"

    def saving() -> bool:
        names = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
        return any(name.startswith(("3.orbax", "4.orbax", "5.orbax")) for name in names)

    while process.poll() is None and not saving():
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    output, _ = process.communicate()
    assert process.returncode == -signal.SIGKILL, output
    steps = [int(name) for name in stored(tmp_path) if name.isdecimal()]
    abstract = {"weights": jax.ShapeDtypeStruct((2000, 2000), np.float32), "step": jax.ShapeDtypeStruct((), np.int32)}
    with open_checkpoints(tmp_path) as checkpoints:
        restored = restore(checkpoints, abstract, make_mesh(), pytest.fail)
        assert restored.step == restored.position == int(restored.state["step"]) == max(steps)
        save(checkpoints, restored.step + 1, restored.state, config=CONFIG)
    assert stored(tmp_path) == sorted(map(str, [*steps, restored.step + 1][-3:]))


# --- two processes ---

TWO = """
import sys, jax
rank, port, folder = int(sys.argv[1]), sys.argv[2], sys.argv[3]
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(f"localhost:{port}", 2, rank)
from tests.training.test_checkpoint import of_two
of_two(rank, folder)
"""


def of_two(rank: int, folder: str) -> None:
    """What each of two processes does."""
    mesh, abstract = make_mesh(fsdp=4), jax.eval_shape(lambda: small(0))
    load = ocp.load_checkpointables

    def placed(step: int) -> Any:
        arrays = small(step)
        return jax.tree.map(
            lambda x, where: jax.make_array_from_callback(x.shape, where, lambda part: x[part]),
            arrays,
            shardings(arrays, mesh),
        )

    def load_but_not_here(path: Any, *rest: Any) -> Any:
        loaded = load(path, *rest)
        if rank == 1 and path.name == "3":
            raise OSError("a cable of process 1")
        return loaded

    with jax.set_mesh(mesh), open_checkpoints(folder) as checkpoints:
        write_config(folder, CONFIG)
        check_room(folder, abstract, CONFIG)
        for step in (1, 2, 3):
            save(checkpoints, step, placed(step), 10 * step, config=CONFIG)
        wait(checkpoints)
        if rank == 1:
            damage(Path(folder), 2, "state/ocdbt.process_1/d/*", "flipped")
        ocp.load_checkpointables = load_but_not_here
        restored = restore(checkpoints, abstract, mesh, lambda line: print(rank, line, flush=True))
        ocp.load_checkpointables = load
        assert restored.step == 1
        save(checkpoints, 3, placed(3), 30, config=CONFIG)
        wait(checkpoints)
        assert restore(checkpoints, abstract, mesh, print).step == 3


def test_two_processes_agree(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    processes = [python(TWO, rank, port, tmp_path) for rank in (0, 1)]
    outputs = [process.communicate(timeout=120)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], "\n".join(outputs)
    assert "0 DAMAGED CHECKPOINT, passed over: " in outputs[0]
    assert "checkpoints/3: OSError: a cable of process 1" in outputs[0]
    assert "DAMAGED" not in outputs[1]
    assert stored(tmp_path) == ["1", "2.damaged", "3", "3.damaged"]
    assert restore_small(tmp_path).step == 3  # on one process, as it was on two


# --- buckets ---


@pytest.mark.parametrize(
    ("out", "path"),
    [
        ("gs://bucket/run", "gs://bucket/run"),
        (Path("gs://bucket/run"), "gs://bucket/run"),  # pathlib makes one slash of two
        (Path("/disk/run"), "/disk/run"),
        ("run", f"{Path.cwd()}/run"),
    ],
)
def test_path_of_a_run(out: Path | str, path: str) -> None:
    assert str(run_path(out)) == path
    assert str(run_path(out) / "checkpoints") == f"{path}/checkpoints"
    assert str(open_checkpoints(out).directory) == f"{path}/checkpoints"
