"""Hypernetworks of the PyTorch releases: read as ours, and ours written as theirs.

- AxBench release (dc57b9b): a directory with config.json in Gemma-2's names and model.safetensors, or its shards and
  their index. Read and written.
- HyperStuff run: train/HyperSteer_weight.safetensors and no config. Its sizes are read off the tensors; what no tensor
  shows (head width 256, query scale 224^-1/2, soft-cap 50, ...) is that code's class default. It embeds steering
  prompts with the base LM's table; its own table is random, unused, and dropped. Read only.

A weight keeps its bits: bfloat16 becomes the float32 of the same value, and is written as bfloat16 again. Regression
hypernetworks and selection heads are refused. Where a release leaves a point open: positions are true ones, which is
what either release does to a single unpadded steering prompt, and `init` is "random", for nothing is copied any more.
"""

import contextlib
import dataclasses
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from hypersteer_jax.config import SIZES, ConfigError, HypernetConfig, LMConfig, RunConfig
from hypersteer_jax.models.hypernet import Hypernet
from hypersteer_jax.models.presets import from_hugging_face, to_hugging_face
from hypersteer_jax.models.weights import (
    MAX_SHARD,
    Stored,
    WeightsError,
    hypernet_from_tensors,
    hypernet_tensors,
    open_directory,
    open_file,
    read_json,
    save_tensors,
)

TABLE = "embed_tokens.weight"
HYPERSTUFF_WEIGHTS = "HyperSteer_weight.safetensors"
HYPERSTUFF_HEAD = "HyperSteer_selection_head.safetensors"
HYPERSTUFF: dict[str, Any] = {  # defaults of its `HypernetConfig` that no tensor shows
    "family": "gemma2",
    "head_dim": 256,
    "norm_eps": 1e-6,
    "activation": "gelu_tanh",
    "attention_scale": 224**-0.5,
    "attention_softcap": 50.0,
    "sliding_window": 4096,
    "rope_theta": 10_000.0,
}
SHARED = (  # what the hypernetwork cannot have of its own; width and vocabulary are seen in the tensors as well
    "family",
    "width",
    "vocab",
    "head_dim",
    "norm_eps",
    "activation",
    "attention_softcap",
    "sliding_window",
    "rope_theta",
    "rope_scaling",
)
NUMBERS = (  # config.json must give them: transformers' defaults for Gemma-2 are not the release's
    "head_dim",
    "num_key_value_heads",
    "rms_norm_eps",
    "query_pre_attn_scalar",
    "attn_logit_softcapping",
    "sliding_window",
    "rope_theta",
)
EXPRESSIBLE: dict[tuple[str, str], Any] = {  # settings of a run that the release has only one value for
    ("hypernet", "variant"): "cross_attention",
    ("hypernet", "head"): "linear",
    ("hypernet", "final_norm"): False,
    ("hypernet", "memory_norm"): False,
    ("steering", "context"): "entering",
}
SELECTION_HEAD = {"proj.weight", "proj.bias", "ln.weight", "ln.bias", "_temperature", "_step"}


def read_release(path: Path, lm: LMConfig) -> Hypernet:
    """The float32 hypernetwork of an AxBench release directory, trained for a base LM of this shape.

    Raises:
        WeightsError: a file is missing or damaged, or tensors are missing, extra, misshapen or of another network.
        ConfigError: config.json lacks a number, or does not go with this base LM.
    """
    tensors = open_directory(path)
    _refuse_others(tensors, path)
    values = read_json(path / "config.json")
    for name in NUMBERS:
        if not isinstance(values.get(name), int | float):
            raise ConfigError(
                f"{path / 'config.json'}: {name} is {values.get(name)!r}; give the number it was trained at"
            )
    try:
        shape = from_hugging_face(values | {"model_type": "gemma2"})
    except ConfigError as error:
        raise ConfigError(f"{path / 'config.json'}: {error}") from error
    embedding: Literal["own", "shared"] = "shared" if values.get("use_target_model_embedding") else "own"
    return _hypernet(path, tensors, shape, lm, embedding)


def hyperstuff_weights(path: Path) -> Path | None:
    """The weights of a HyperStuff run, given its folder or the folder `train` in it; None if it is no such run."""
    files = [folder / HYPERSTUFF_WEIGHTS for folder in (path, path / "train")]
    return next((file for file in files if file.is_file()), None)


def read_hyperstuff(file: Path, lm: LMConfig) -> Hypernet:
    """The float32 hypernetwork of a HyperStuff run's weights, trained for a base LM of this shape.

    Raises:
        WeightsError: the file is damaged, or tensors are missing, extra, misshapen or of another network.
        ConfigError: the base LM has not the settings that this code always has.
    """
    head = file.with_name(HYPERSTUFF_HEAD)
    if head.exists():
        _refuse_others(open_file(head), head)
    tensors = open_file(file)
    _refuse_others(tensors, file)

    def rows(name: str) -> int:
        if name not in tensors:
            raise WeightsError(f"{file}: {name} is missing, so the sizes are not known; copy the file again")
        return tensors[name].shape[0]

    shape = dataclasses.replace(
        lm,
        **HYPERSTUFF,
        layers=len({name.split(".")[1] for name in tensors if name.startswith("layers.")}),
        heads=rows("layers.0.self_attn.q_proj.weight") // HYPERSTUFF["head_dim"],
        kv_heads=rows("layers.0.self_attn.k_proj.weight") // HYPERSTUFF["head_dim"],
        mlp_width=rows("layers.0.mlp.gate_proj.weight"),
    )
    return _hypernet(file, tensors, shape, lm, "shared")


def check_expressible(config: RunConfig, lm: LMConfig) -> None:
    """Whether a release directory can hold the hypernetwork of this run.

    Raises:
        ConfigError: naming the setting.
    """
    if lm.family != "gemma2":
        raise ConfigError(f"the base LM is of the family {lm.family}; the release has gemma2 only")
    for (group, name), only in EXPRESSIBLE.items():
        value = getattr(getattr(config, group), name)
        if value != only:
            raise ConfigError(f"{group}.{name} is {value!r}; the release has {only!r} only, so this run stays here")


def write_release(hypernet: Hypernet, lm_embedding: jax.Array, path: Path, max_shard: int = MAX_SHARD) -> None:
    """Writes an AxBench release directory that gives the same vectors; bfloat16 if that is exact, else float32.

    Args:
        hypernet: of a run that `check_expressible` lets through.
        lm_embedding: the base LM's table `[V, D]`, written where the hypernetwork shares it.
        path: an existing, empty directory.
        max_shard: bytes of weights in one file.
    """
    tensors = hypernet_tensors(hypernet)
    if hypernet.embedding is None:
        tensors[TABLE] = np.asarray(lm_embedding, np.float32)
    values = to_hugging_face(dataclasses.replace(hypernet.lm_config, layers=hypernet.config.blocks))
    values |= {"architectures": ["HypernetModel"], "model_type": "hypernet", "use_target_model_embedding": False}
    save_tensors(_narrow(tensors), values, path, max_shard)


@contextlib.contextmanager
def new_directory(path: Path) -> Iterator[Path]:
    """A directory to write to, which becomes `path` if nothing goes wrong, and else vanishes.

    Raises:
        WeightsError: `path` exists or cannot be written.
    """
    if path.exists():
        raise WeightsError(f"{path} exists; give a name that is free")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{path.name}-", dir=path.parent) as folder:
            part = Path(folder) / path.name
            part.mkdir()
            yield part
            part.rename(path)
    except OSError as error:
        raise WeightsError(f"{path} cannot be written ({error}); give another name") from error


def _hypernet(
    path: Path, tensors: dict[str, Stored], shape: LMConfig, lm: LMConfig, embedding: Literal["own", "shared"]
) -> Hypernet:
    """The hypernetwork of blocks of this shape; everything in it that is not the base LM's becomes a setting."""
    for name in SHARED:
        value, expected = getattr(shape, name), getattr(lm, name)
        if value != expected:
            raise ConfigError(
                f"{path}: {name} is {value!r}, but the base LM's is {expected!r}; give --lm the one it was trained for"
            )
    sizes = {name: getattr(shape, name) for name in SIZES if getattr(shape, name) != getattr(lm, name)}
    config = HypernetConfig(
        blocks=shape.layers,
        init="random",
        embedding=embedding,
        attention_scale=None if shape.query_scale == lm.query_scale else shape.query_scale,
        **sizes,
    )
    used = {name: stored.read() for name, stored in tensors.items() if embedding == "own" or name != TABLE}
    return hypernet_from_tensors(config, lm, used, str(path))


def _refuse_others(tensors: Iterable[str], path: Path) -> None:
    """Networks of the same producers that are not the cross-attention hypernetwork."""
    others = {
        "a regression hypernetwork": [name for name in tensors if name.startswith("base_model.")],
        "a selection head": [name for name in tensors if name.removeprefix("selection_head.") in SELECTION_HEAD],
    }
    for network, names in others.items():
        if names:
            more = f" and {len(names) - 6} more" if len(names) > 6 else ""
            raise WeightsError(
                f"{path}: {', '.join(sorted(names)[:6])}{more} belong to {network}, which cannot be converted; "
                "give a cross-attention hypernetwork without one"
            )


def _narrow(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """All tensors in bfloat16, if not one of them loses anything by it."""
    narrow = {name: tensor.astype(jnp.bfloat16) for name, tensor in tensors.items()}
    exact = all(np.array_equal(narrow[name].astype(np.float32), tensor) for name, tensor in tensors.items())
    return narrow if exact else tensors
