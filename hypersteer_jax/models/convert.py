"""Hypernetworks of the PyTorch releases: read as ours, and ours written as theirs.

- AxBench release (dc57b9b): a directory with config.json in Gemma-2's names and model.safetensors, or its shards and
  their index. Read and written.
- HyperStuff run: train/HyperSteer_weight.safetensors and no config.
  - Its cross-attention hypernetwork: sizes are read off the tensors; what no tensor shows (head width 256, query scale
    224^-1/2, soft-cap 50, ...) is that code's class default. It embeds steering prompts with the base LM's table; its
    own table is random, unused, and dropped. Read only; written, it is an AxBench release.
  - Its regression hypernetwork: a causal LM of the base LM's shape, all of it trained, and a linear layer on what its
    final norm gives at the last position. Here that is the variant `no_context` with `final_norm` and all blocks. Read
    and written; the LM's head is tied to its table, so it must be a copy of that. That release can divide vectors by
    their length (off by default, and no file tells), which is not supported: they are as the linear layer gives them.
- Selection head: HyperSteer_selection_head.safetensors beside such weights, or `selection_head.*` among the tensors of
  an AxBench directory. Read and written with either. Files do not tell how it was trained: what is read is taken to be
  soft, without straight-through, and at the one temperature that is stored, start and end alike. For a head that was
  trained with straight-through, set `selection.straight_through` to true in the run's config.json.

A weight keeps its bits: bfloat16 becomes the float32 of the same value, and is written as bfloat16 again. Where a
release leaves a point open: positions are true ones, which is what either release does to a single unpadded steering
prompt, and `init` is "random", for nothing is copied any more.
"""

import contextlib
import dataclasses
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from hypersteer_jax.config import (
    SIZES,
    ConfigError,
    HypernetConfig,
    LMConfig,
    RunConfig,
    SelectionConfig,
    hypernet_shape,
)
from hypersteer_jax.models.hypernet import NO_SELECTION, Hypernet
from hypersteer_jax.models.presets import from_hugging_face, to_hugging_face
from hypersteer_jax.models.weights import (
    MAX_SHARD,
    SELECTION_HEAD,
    Form,
    Stored,
    WeightsError,
    hypernet_from_tensors,
    hypernet_tensors,
    open_directory,
    open_file,
    read_json,
    save_tensors,
    write_file,
)

TABLE = "embed_tokens.weight"
REGRESSION = "base_model."  # how names of a regression hypernetwork's LM begin
REGRESSION_TABLE, REGRESSION_HEAD = f"{REGRESSION}model.{TABLE}", f"{REGRESSION}lm_head.weight"
TEMPERATURE, STEP = f"{SELECTION_HEAD}_temperature", f"{SELECTION_HEAD}_step"
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
EXPRESSIBLE: dict[str, dict[tuple[str, str], Any]] = {  # variant -> settings that a release has only one value for
    "cross_attention": {
        ("hypernet", "head"): "linear",
        ("hypernet", "final_norm"): False,
        ("hypernet", "memory_norm"): False,
        ("steering", "context"): "entering",
    },
    "no_context": {("hypernet", "head"): "linear", ("hypernet", "final_norm"): True},
}


class Converted(NamedTuple):
    """What a release's files hold."""

    hypernet: Hypernet  # float32
    step: int  # what its selection head has counted; 0 without one


def read_release(path: Path, lm: LMConfig) -> Converted:
    """The hypernetwork of an AxBench release directory, trained for a base LM of this shape.

    Raises:
        WeightsError: a file is missing or damaged, or tensors are missing, extra, misshapen or of another network.
        ConfigError: config.json lacks a number, or does not go with this base LM.
    """
    tensors = open_directory(path)
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
    return _cross_attention(str(path), tensors, shape, lm, embedding)


def hyperstuff_weights(path: Path) -> Path | None:
    """The weights of a HyperStuff run, given its folder or the folder `train` in it; None if it is no such run."""
    files = [folder / HYPERSTUFF_WEIGHTS for folder in (path, path / "train")]
    return next((file for file in files if file.is_file()), None)


def read_hyperstuff(file: Path, lm: LMConfig) -> Converted:
    """The hypernetwork of a HyperStuff run's weights, of either kind, trained for a base LM of this shape.

    Raises:
        WeightsError: a file is damaged, or tensors are missing, extra, misshapen or of another network.
        ConfigError: the base LM has not the settings that this code always has.
    """
    tensors, where, head = open_file(file), str(file), file.with_name(HYPERSTUFF_HEAD)
    if head.exists():
        tensors |= {f"{SELECTION_HEAD}{name}": stored for name, stored in open_file(head).items()}
        where = f"{file} and {head.name}"
    if any(name.startswith(REGRESSION) for name in tensors):
        return _regression(where, tensors, lm)

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
    return _cross_attention(where, tensors, shape, lm, "shared")


def check_expressible(config: RunConfig, lm: LMConfig) -> None:
    """Whether a release can hold the hypernetwork of this run: with cross-attention AxBench's, without HyperStuff's.

    Raises:
        ConfigError: naming the setting.
    """
    variant = config.hypernet.variant
    if lm.family != "gemma2":
        raise ConfigError(f"the base LM is of the family {lm.family}; the release has gemma2 only")
    if variant not in EXPRESSIBLE:
        raise ConfigError(f"hypernet.variant is {variant!r}; the releases have {' and '.join(EXPRESSIBLE)} only")
    wanted = [
        (f"{group}.{name}", getattr(getattr(config, group), name), only)
        for (group, name), only in EXPRESSIBLE[variant].items()
    ]
    if variant == "no_context":  # an LM of the base LM's shape
        shape = hypernet_shape(config.hypernet, lm)
        wanted.append(("hypernet.blocks", config.hypernet.blocks, lm.layers))
        wanted.append(("hypernet.attention_scale", shape.query_scale, lm.query_scale))
        wanted += [(f"hypernet.{name}", getattr(shape, name), getattr(lm, name)) for name in SIZES]
    for name, value, only in wanted:
        if value != only:
            raise ConfigError(f"{name} is {value!r}; the release has {only!r} only, so this run stays here")


def write_release(converted: Converted, lm_embedding: jax.Array, path: Path, max_shard: int = MAX_SHARD) -> None:
    """Writes an AxBench release directory that gives the same vectors; bfloat16 if that is exact, else float32.

    Args:
        converted: of a run with cross-attention that `check_expressible` lets through.
        lm_embedding: the base LM's table `[V, D]`, written where the hypernetwork shares it.
        path: an existing, empty directory.
        max_shard: bytes of weights in one file.
    """
    hypernet = converted.hypernet
    values = to_hugging_face(dataclasses.replace(hypernet.lm_config, layers=hypernet.config.blocks))
    values |= {"architectures": ["HypernetModel"], "model_type": "hypernet", "use_target_model_embedding": False}
    network, head = _tensors(converted, "release", TABLE, lm_embedding)
    save_tensors(network | head, values, path, max_shard)


def write_regression(converted: Converted, lm_embedding: jax.Array, path: Path) -> None:
    """Writes the weights of a HyperStuff regression run, in its folder `train`; the same vectors and dtypes as above.

    Its config.yaml, which names the models and the data, is not written.

    Args:
        converted: of a run without context that `check_expressible` lets through.
        lm_embedding: the base LM's table `[V, D]`, written where the hypernetwork shares it.
        path: an existing, empty directory.
    """
    network, head = _tensors(converted, "regression", REGRESSION_TABLE, lm_embedding)
    (path / "train").mkdir()
    write_file(network | {REGRESSION_HEAD: network[REGRESSION_TABLE]}, path / "train" / HYPERSTUFF_WEIGHTS)
    if head:
        bare = {name.removeprefix(SELECTION_HEAD): tensor for name, tensor in head.items()}
        write_file(bare, path / "train" / HYPERSTUFF_HEAD)


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


def _cross_attention(
    where: str, tensors: dict[str, Stored], shape: LMConfig, lm: LMConfig, embedding: Literal["own", "shared"]
) -> Converted:
    """The hypernetwork of blocks of this shape; everything in it that is not the base LM's becomes a setting."""
    _check_shared(where, shape, lm)
    sizes = {name: getattr(shape, name) for name in SIZES if getattr(shape, name) != getattr(lm, name)}
    config = HypernetConfig(
        blocks=shape.layers,
        init="random",
        embedding=embedding,
        attention_scale=None if shape.query_scale == lm.query_scale else shape.query_scale,
        **sizes,
    )
    used = {name: stored for name, stored in tensors.items() if embedding == "own" or name != TABLE}
    return _converted(where, used, config, lm, "release")


def _regression(where: str, tensors: dict[str, Stored], lm: LMConfig) -> Converted:
    """The hypernetwork that is an LM of the base LM's shape."""
    table, tied = tensors.get(REGRESSION_TABLE), tensors.get(REGRESSION_HEAD)
    if table is None or len(table.shape) != 2:
        raise WeightsError(f"{where}: {REGRESSION_TABLE} is missing or no matrix; copy the file again")
    vocab, width = table.shape
    _check_shared(where, dataclasses.replace(lm, family="gemma2", vocab=vocab, width=width), lm)
    if tied is not None and not _same_bits(table.whole(), tied.whole()):
        raise WeightsError(
            f"{where}: {REGRESSION_HEAD} is not a copy of {REGRESSION_TABLE}, but Gemma-2 has one table for both; "
            "copy the file again"
        )
    config = HypernetConfig("no_context", blocks=lm.layers, init="random", final_norm=True)
    return _converted(where, tensors, config, lm, "regression")


def _check_shared(where: str, shape: LMConfig, lm: LMConfig) -> None:
    for name in SHARED:
        value, expected = getattr(shape, name), getattr(lm, name)
        if value != expected:
            raise ConfigError(
                f"{where}: {name} is {value!r}, but the base LM's is {expected!r}; give --lm the one it was trained for"
            )


def _converted(where: str, tensors: dict[str, Stored], config: HypernetConfig, lm: LMConfig, form: Form) -> Converted:
    """The hypernetwork, with a selection head if there is one among the tensors."""
    selection, step = _selection(where, tensors)
    values = {name: stored.whole() for name, stored in tensors.items() if name != STEP}
    return Converted(hypernet_from_tensors(config, lm, values, where, selection, form), step)


def _selection(where: str, tensors: dict[str, Stored]) -> tuple[SelectionConfig, int]:
    """What the tensors tell of a selection head's settings, and what it has counted."""
    if not any(name.startswith(SELECTION_HEAD) for name in tensors):
        return NO_SELECTION, 0
    for name in (TEMPERATURE, STEP):
        if name not in tensors:
            raise WeightsError(f"{where}: {name} is missing; copy the file again")
        if tensors[name].shape != ():
            raise WeightsError(f"{where}: {name} has shape {tensors[name].shape}, expected (); copy the file again")
    layer_norm = any(name.startswith(f"{SELECTION_HEAD}ln.") for name in tensors)
    temperature = float(tensors[TEMPERATURE].whole())
    selection = SelectionConfig(True, layer_norm, temperature_start=temperature, temperature_end=temperature)
    return selection, int(tensors[STEP].whole())


def _tensors(
    converted: Converted, form: Form, table: str, lm_embedding: jax.Array
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """The network's tensors and the selection head's, both as narrow as they are exact."""
    network = hypernet_tensors(converted.hypernet, form)
    if converted.hypernet.embedding is None:
        network[table] = np.asarray(lm_embedding, np.float32)
    head = {name: network.pop(name) for name in list(network) if name.startswith(SELECTION_HEAD)}
    if head:
        head = _narrow(head) | {STEP: np.asarray(converted.step, np.int32)}
    return _narrow(network), head


def _same_bits(one: np.ndarray, two: np.ndarray) -> bool:
    same_kind = one.dtype == two.dtype and one.shape == two.shape
    return same_kind and np.array_equal(one.view(np.uint8), two.view(np.uint8))


def _narrow(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """All tensors in bfloat16, if not one of them loses anything by it."""
    narrow = {name: tensor.astype(jnp.bfloat16) for name, tensor in tensors.items()}
    exact = all(np.array_equal(narrow[name].astype(np.float32), tensor) for name, tensor in tensors.items())
    return narrow if exact else tensors
