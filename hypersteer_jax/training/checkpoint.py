"""Checkpoints of a run, with Orbax, on a disk or in a bucket.

RUN/config.json                config and package versions, written before the first step
RUN/checkpoints/STEP/          the state (hypernetwork, optimizer, step), never the base LM; in its metadata the record:
                               place in the data, config, versions; shape, dtype and checksum of every array
RUN/checkpoints/STEP.damaged/  one that could not be restored, out of the way of a new one

A checkpoint counts only if the record is as it was written and every array has the checksum that it had on the devices
when it was saved. A damaged one is named and the one before it is taken. Only saving changes what is stored: opening
and restoring write nothing, so a run can be looked at while it goes on.

On several processes every function has to be called by all of them, and all of them do the same: what goes wrong on one
goes wrong on all.
"""

import contextlib
import hashlib
import json
import math
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding
from orbax.checkpoint import path as orbax_path
from orbax.checkpoint import v1 as ocp

from hypersteer_jax.config import ConfigError, RunConfig, from_dict, to_dict
from hypersteer_jax.sharding import shardings
from hypersteer_jax.training.checksum import checksums

PACKAGES = ("jax", "flax", "optax", "orbax-checkpoint", "hypersteer_jax")
REASON = 400  # characters of what went wrong that are passed on
MOST = 1_000  # checkpoints that processes agree on
UNFINISHED = "*.orbax-checkpoint-tmp*"  # what a save that was interrupted leaves on a disk


class CheckpointError(RuntimeError):
    """A run cannot be read or written; the message names the path and the fix."""


class _DamagedError(Exception):
    """A checkpoint cannot be restored as it was saved; the message is the reason."""


class Restored(NamedTuple):
    """What a checkpoint holds."""

    state: Any  # TrainState
    position: int | None  # batches taken from the data; None: the run was converted and has no place in any data
    step: int


@dataclass
class Checkpoints:
    """The checkpoints of a run, from `open_checkpoints`."""

    directory: epath.Path
    policy: ocp.training.preservation_policies.PreservationPolicy
    damaged: set[int] = field(default_factory=set)  # steps that `restore` passed over; the next save moves them aside
    writer: ocp.training.Checkpointer | None = None  # from the first save on
    saving: int | None = None  # step of a save that `wait` has not seen the end of

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_: Any) -> None:
        wait(self)
        if self.writer is not None:
            self.writer.close()


def run_path(out: Path | str) -> epath.Path:
    """The folder of a run, absolute: of a disk, or of a bucket, `gs://...`, for which `gcsfs` has to be installed.

    `pathlib` drops one slash of `gs://`, so a `RunConfig.out` has to pass through here; it is put back.
    """
    text = str(out)
    if text.startswith("gs:/"):
        return epath.Path("gs://" + text.removeprefix("gs:/").lstrip("/"))
    return epath.Path(text).resolve()


def write_config(run: Path | str, config: RunConfig) -> None:
    """Writes RUN/config.json, config and package versions.

    Raises:
        CheckpointError: the folder cannot be written, which is better known now than after the first hour.
    """
    folder = run_path(run)
    text = json.dumps({"config": to_dict(config), "versions": _versions()}, indent=1)
    with _as_one(f"out is {folder}, which cannot be written ({{}}); give another folder", CheckpointError):
        if jax.process_index() == 0:
            folder.mkdir(parents=True, exist_ok=True)
            part = folder / "config.json.part"
            part.write_text(text + "\n")
            part.replace(folder / "config.json")


def read_config(run: Path | str) -> RunConfig:
    """The config of a run.

    Raises:
        CheckpointError: there is no run in this folder, or its config cannot be read.
    """
    path = run_path(run) / "config.json"
    if not path.exists():
        raise CheckpointError(
            f"{path.parent}: no config.json, so no run is stored here; give the `out` folder of a training run"
        )
    try:
        return from_dict(RunConfig, json.loads(path.read_text())["config"], str(path))
    except (ValueError, KeyError, TypeError, ConfigError) as error:
        raise CheckpointError(f"{path}: not a config of this version ({error})") from error


def check_room(run: Path | str, abstract: Any, config: RunConfig) -> None:
    """Whether the checkpoints of a run can be written, as far as that can be known before it starts.

    A disk must have room for `keep_last` + 1 checkpoints (the next is finished before the oldest goes) and for those
    that are kept for good; a bucket has room.

    Args:
        run: its folder.
        abstract: the state's shapes and dtypes, from `jax.eval_shape`.
        config: of the run.

    Raises:
        CheckpointError: the folder cannot be written, or its disk has too little room.
    """
    directory, train = run_path(run) / "checkpoints", config.train
    with _as_one(f"{directory} cannot be written ({{}}); give another `out`", CheckpointError):
        directory.parent.mkdir(parents=True, exist_ok=True)
        existing = directory if directory.exists() else directory.parent
        probe = existing / f"probe.{jax.process_index()}"
        probe.write_text("")
        probe.unlink()
    if in_bucket(directory):
        return
    size = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(abstract))
    kept = train.steps // math.lcm(train.save_every, train.keep_every) if train.save_every * train.keep_every else 0
    count = max(1, train.keep_last + 1 + kept - len(_finished(directory)))
    parts = [path for part in Path(directory).glob(UNFINISHED) for path in part.rglob("*")]
    unfinished = sum(path.stat().st_size for path in parts if path.is_file())  # will be cleared away
    free = shutil.disk_usage(existing).free + unfinished
    with _as_one("{}", CheckpointError):
        if count * size > free:
            raise CheckpointError(
                f"{directory}: {free / 1e9:.2f} GB are free, but {count} more checkpoints of {size / 1e9:.2f} GB need "
                f"{count * size / 1e9:.2f} GB; make room, give another `out`, or lower train.keep_last (now "
                f"{train.keep_last})"
            )


def open_checkpoints(run: Path | str, keep_last: int = 3, keep_every: int = 0) -> Checkpoints:
    """The checkpoints of a run, to be used in a `with`, which ends when the last save is committed.

    Args:
        run: its folder.
        keep_last: how many of the newest are kept.
        keep_every: steps; checkpoints at multiples of it are kept for good. 0: none.
    """
    policies = ocp.training.preservation_policies
    kept = [policies.LatestN(keep_last)] + ([policies.EveryNSteps(keep_every)] if keep_every else [])
    return Checkpoints(run_path(run) / "checkpoints", policies.AnyPreservationPolicy(kept))


def stored(checkpoints: Checkpoints) -> list[int]:
    """Steps of all finished checkpoints, ascending; the same on all processes."""
    return _agreed(_finished(checkpoints.directory))


def save(checkpoints: Checkpoints, step: int, state: Any, position: int | None = None, *, config: RunConfig) -> None:
    """Starts saving in the background; the arrays are copied before it returns, so they may be donated.

    A step that is stored already stays as it is.

    Args:
        checkpoints: from `open_checkpoints`.
        step: of the state; the name of the checkpoint.
        state: TrainState.
        position: batches taken from the data. Without it, the checkpoint can be used, but not resumed from.
        config: of the run.

    Raises:
        CheckpointError: this save cannot start, or the one before it has failed.
    """
    wait(checkpoints)
    record = {"position": position, "config": to_dict(config), "versions": _versions(), "arrays": _arrays(state)}
    try:
        writer = _writer(checkpoints)
        if step not in stored(checkpoints):
            sealed = record | {"digest": _digest(record)}
            writer.save_checkpointables_async(step, {"state": state}, force=True, custom_metadata=sealed)
            checkpoints.saving = step
    except Exception as error:  # Orbax has no type of its own for it
        raise _failed(checkpoints, step, error) from error


def wait(checkpoints: Checkpoints) -> None:
    """Until the save in progress is committed.

    Raises:
        CheckpointError: it failed; names the path, the reason and the last good step.
    """
    step, checkpoints.saving = checkpoints.saving, None
    if step is None or checkpoints.writer is None:
        return
    try:
        checkpoints.writer.wait()
    except Exception as error:  # Orbax has no type of its own for it
        raise _failed(checkpoints, step, error) from error


def restore(checkpoints: Checkpoints, abstract: Any, mesh: Mesh, say: Callable[[str], None] = print) -> Restored:
    """The newest checkpoint that is undamaged, its state placed on `mesh`.

    Args:
        checkpoints: from `open_checkpoints`.
        abstract: the state's shapes and dtypes, from `jax.eval_shape`.
        mesh: any mesh, not only the one it was saved from.
        say: is told of every damaged checkpoint that is passed over, and why; on the first process.

    Raises:
        CheckpointError: there is no checkpoint, all are damaged, or the newest is of another network.
    """

    def concrete(x: Any, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    wanted = jax.tree.map(concrete, abstract, shardings(abstract, mesh))
    restored, reasons = None, []
    for step in stored(checkpoints)[::-1]:
        path = checkpoints.directory / str(step)
        try:
            record = _record(path)
            if restored is None:
                restored = Restored(_state(path, wanted, record["arrays"]), record["position"], step)
        except _DamagedError as error:
            checkpoints.damaged.add(step)
            reasons.append(f"step {step}: {error}")
            if jax.process_index() == 0:
                say(f"DAMAGED CHECKPOINT, passed over: {path}: {error}")
    if restored is not None:
        return restored
    if reasons:
        raise CheckpointError(f"{checkpoints.directory}: all checkpoints are damaged; {'; '.join(reasons)}")
    raise CheckpointError(f"{checkpoints.directory}: no checkpoint yet; train first, or leave out --resume")


def resume_position(restored: Restored) -> int:
    """Batches that the run had taken from its data.

    Raises:
        CheckpointError: it has no place in any data, because it was converted.
    """
    if restored.position is None:
        raise CheckpointError(
            f"step {restored.step} has no place in the data, so it can be steered with but not resumed; train anew"
        )
    return restored.position


def _record(path: epath.Path) -> dict[str, Any]:
    """The record of a checkpoint.

    Raises:
        _DamagedError: on all processes, if it is not as it was written, or cannot be read, on one of them.
    """
    with _as_one("{}", _DamagedError):
        record = dict(ocp.checkpointables_metadata(path).custom_metadata or {})
        if not record:
            raise _DamagedError("its metadata cannot be read")
        if record.pop("digest", None) != _digest(record):
            raise _DamagedError("its metadata are not what was saved")
    return record


def _state(path: epath.Path, wanted: Any, stored: dict[str, list[Any]]) -> Any:
    """The state of a checkpoint, given the arrays of its record.

    Raises:
        _DamagedError: on all processes, if it cannot be restored as it was saved on one of them.
        CheckpointError: it is of another network.
    """
    if differences := _differences(_forms(wanted), {name: form for name, (form, _) in stored.items()}):
        raise CheckpointError(f"{path.parent}: step {path.name} is of another network: {differences}")
    # Each process loads for itself: the others would wait at a barrier for one that fails.
    alone = ocp.Context()
    alone.multiprocessing.primary_host = jax.process_index()
    alone.multiprocessing.active_processes = {jax.process_index()}
    with _as_one("{}", _DamagedError), alone:
        state = ocp.load_checkpointables(path, {"state": wanted})["state"]
    if changed := [name for name, found in _arrays(state).items() if found != stored[name]]:
        more = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
        raise _DamagedError(f"{', '.join(changed[:3])}{more}: not the checksum of what was saved")
    return state


def _writer(checkpoints: Checkpoints) -> ocp.training.Checkpointer:
    """What saves. Opening it clears away what an interrupted save left, and moves damaged checkpoints aside."""
    if checkpoints.writer is not None and checkpoints.damaged:
        checkpoints.writer.close()  # it knows the damaged ones as checkpoints
        checkpoints.writer = None
    if checkpoints.writer is None:
        with _as_one("{}", OSError):
            for step in checkpoints.damaged if jax.process_index() == 0 else ():
                _move_aside(checkpoints.directory / str(step))
        checkpoints.damaged.clear()
        checkpoints.writer = ocp.training.Checkpointer(
            checkpoints.directory, preservation_policy=checkpoints.policy, cleanup_tmp_directories=True
        )
    return checkpoints.writer


def _move_aside(path: epath.Path) -> None:
    target, count = path.parent / f"{path.name}.damaged", 1
    while target.exists():
        count += 1
        target = path.parent / f"{path.name}.damaged.{count}"
    path.rename(target)


def _failed(checkpoints: Checkpoints, step: int, error: Exception) -> CheckpointError:
    """What to raise after a failed save. The next save starts over."""
    writer, checkpoints.writer = checkpoints.writer, None
    if writer is not None:
        with contextlib.suppress(Exception):  # it tells of the same failure again
            writer.close()
    steps = _finished(checkpoints.directory)
    last = (
        f"the last good checkpoint is step {steps[-1]}: mend this, then --resume" if steps else "there is none before"
    )
    return CheckpointError(f"{checkpoints.directory / str(step)} could not be saved ({_reason(error)}); {last}")


def _finished(directory: epath.Path) -> list[int]:
    """Steps of all committed checkpoints, ascending."""
    if not directory.exists():
        return []
    paths = [path for path in directory.iterdir() if path.name.isdecimal() and orbax_path.step.is_path_finalized(path)]
    return sorted(int(path.name) for path in paths)


def _agreed(steps: list[int]) -> list[int]:
    """The newest steps as the first process sees them: a file system may show each process something else."""
    if jax.process_count() == 1:
        return steps
    padded = np.array([-1] * MOST + steps, np.int32)[-MOST:]
    return [int(step) for step in multihost_utils.broadcast_one_to_all(padded) if step >= 0]


def in_bucket(path: epath.Path) -> bool:
    """Whether a path is not of a disk."""
    return "://" in str(path)


def _versions() -> dict[str, str]:
    return {name: metadata.version(name) for name in PACKAGES}


def _digest(record: dict[str, Any]) -> str:
    """Of everything else in a record, so that a change of the record itself is noticed."""
    return hashlib.blake2b(json.dumps(record, sort_keys=True).encode(), digest_size=16).hexdigest()


def _forms(state: Any) -> dict[str, str]:
    """Shape and dtype of every array by its path; Orbax stores modules as dictionaries: only the dotted names agree."""
    leaves = jax.tree_util.tree_leaves_with_path(state)
    return {
        jax.tree_util.keystr(path, simple=True, separator="."): f"{tuple(leaf.shape)} {leaf.dtype}"
        for path, leaf in leaves
    }


def _arrays(state: Any) -> dict[str, list[Any]]:
    """Shape and dtype, and checksum, of every array by its path."""
    return {name: [form, each] for (name, form), each in zip(_forms(state).items(), checksums(state), strict=True)}


def _differences(wanted: dict[str, str], stored: dict[str, str]) -> str:
    """What is stored otherwise than wanted, three of them in full."""
    names = [name for name in sorted(wanted | stored) if wanted.get(name) != stored.get(name)]
    shown = [f"{name} is {stored.get(name, 'absent')}, wanted {wanted.get(name, 'absent')}" for name in names[:3]]
    return "; ".join(shown + ([f"and {len(names) - 3} more"] if len(names) > 3 else []))


def _reason(error: BaseException) -> str:
    """What the first error of a chain says, in one line; Orbax wraps those of file systems and codecs."""
    while error.__cause__ is not None:
        error = error.__cause__
    text = re.sub(r" \[(tensorstore_spec|source locations).*", "", " ".join(str(error).split()))
    return (text if isinstance(error, CheckpointError | _DamagedError) else f"{type(error).__name__}: {text}")[:REASON]


@contextlib.contextmanager
def _as_one(message: str, kind: type[Exception]) -> Iterator[None]:
    """Raises `kind` on all processes if the block raises on one; "{}" in the message becomes the reason."""
    reason = ""
    try:
        yield
    except Exception as error:  # whatever a damaged file makes of a reader
        reason = _reason(error)
    if jax.process_count() > 1:
        mine = np.zeros(4 * REASON, np.uint8)
        text = reason.encode()[: mine.size]
        mine[: len(text)] = np.frombuffer(text, np.uint8)
        rows = multihost_utils.process_allgather(mine)
        reason = next((bytes(row[row > 0]).decode(errors="replace") for row in rows if row.any()), "")
    if reason:
        raise kind(message.replace("{}", reason))
