"""Checkpoints of a run: train state and place in the data, with Orbax; config and versions beside them.

RUN/config.json             written before the first step
RUN/checkpoints/STEP/       state (hypernetwork, optimizer, step) and data (iterator); never the base LM
"""

import json
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding
from orbax.checkpoint import v1 as ocp

from hypersteer_jax.config import ConfigError, RunConfig, from_dict, to_dict
from hypersteer_jax.sharding import shardings

KEEP = 3  # checkpoints
PACKAGES = ("jax", "flax", "optax", "orbax-checkpoint", "hypersteer_jax")


class CheckpointError(RuntimeError):
    """A run cannot be read or written; the message names the path and the fix."""


def write_config(run: Path, config: RunConfig) -> None:
    """Writes RUN/config.json, config and package versions.

    Raises:
        CheckpointError: the folder cannot be written, which is better known now than after the first hour.
    """
    versions = {name: metadata.version(name) for name in PACKAGES}
    try:
        run.mkdir(parents=True, exist_ok=True)
        text = json.dumps({"config": to_dict(config), "versions": versions}, indent=1)
        part = run / "config.json.part"
        part.write_text(text + "\n")
        part.replace(run / "config.json")
    except OSError as error:
        raise CheckpointError(f"out is {run}, which cannot be written ({error}); give another folder") from error


def read_config(run: Path) -> RunConfig:
    """The config of a run.

    Raises:
        CheckpointError: there is no run in this folder, or its config cannot be read.
    """
    path = run / "config.json"
    if not path.is_file():
        raise CheckpointError(
            f"{run}: no config.json, so no run is stored here; give the `out` folder of a training run"
        )
    try:
        return from_dict(RunConfig, json.loads(path.read_text())["config"], str(path))
    except (json.JSONDecodeError, KeyError, TypeError, ConfigError) as error:
        raise CheckpointError(f"{path}: not a config of this version ({error})") from error


def open_checkpoints(run: Path) -> ocp.training.Checkpointer:
    """The checkpoints of a run; the newest few are kept. Close it, or use it in a `with`."""
    policy = ocp.training.preservation_policies.LatestN(KEEP)
    directory = (run / "checkpoints").absolute()
    return ocp.training.Checkpointer(directory, preservation_policy=policy, cleanup_tmp_directories=True)


def save(checkpoints: ocp.training.Checkpointer, step: int, state: Any, data: Any = None) -> None:
    """Starts saving in the background; the arrays are copied before it returns, so they may be donated.

    Without `data`, a Grain iterator, the checkpoint can be used, but training cannot be resumed from it.
    """
    parts = {"state": state} | ({} if data is None else {"data": data})
    checkpoints.save_checkpointables_async(step, parts, force=True)


def restore(checkpoints: ocp.training.Checkpointer, abstract: Any, mesh: Mesh, data: Any = None) -> Any:
    """The newest state, placed on `mesh`; `data`, a Grain iterator, is moved to the place it was saved at.

    Args:
        checkpoints: from `open_checkpoints`.
        abstract: the state's shapes and dtypes, from `jax.eval_shape`.
        mesh: any mesh, not only the one it was saved from.
        data: the iterator to move, or None to restore the state alone.

    Raises:
        CheckpointError: there is no checkpoint, or it does not have these shapes.
    """
    if checkpoints.latest is None:
        raise CheckpointError(f"{checkpoints.directory}: no checkpoint yet; train first, or leave out --resume")
    step = checkpoints.latest.step

    def concrete(x: Any, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    wanted = {"state": jax.tree.map(concrete, abstract, shardings(abstract, mesh))} | (
        {} if data is None else {"data": data}
    )
    try:
        stored = _shapes(ocp.metadata(checkpoints.directory / str(step), "state").metadata)
        if differences := _differences(_shapes(abstract), stored):
            raise CheckpointError(f"{checkpoints.directory}: step {step} is of another network: {differences}")
        return checkpoints.load_checkpointables(step, wanted)["state"]
    except (ValueError, KeyError, OSError) as error:
        raise CheckpointError(f"{checkpoints.directory}: step {step} cannot be restored: {error}") from error


def _shapes(state: Any) -> dict[str, tuple[int, ...]]:
    """Shape of every array by its path; Orbax stores modules as dictionaries, so only the dotted names agree."""
    leaves = jax.tree_util.tree_leaves_with_path(state)
    return {jax.tree_util.keystr(path, simple=True, separator="."): tuple(leaf.shape) for path, leaf in leaves}


def _differences(wanted: dict[str, tuple[int, ...]], stored: dict[str, tuple[int, ...]]) -> str:
    """What is stored otherwise than wanted, three of them in full."""
    names = [name for name in sorted(wanted | stored) if wanted.get(name) != stored.get(name)]
    shown = [f"{name} is {stored.get(name, 'absent')}, wanted {wanted.get(name, 'absent')}" for name in names[:3]]
    return "; ".join(shown + ([f"and {len(names) - 3} more"] if len(names) > 3 else []))
