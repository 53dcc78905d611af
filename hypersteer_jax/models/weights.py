"""Weights by their names elsewhere, both ways.

The base LM's in Hugging Face directories (and llama2.c's, for reading), the hypernetwork's in the releases. One table
per layout names every tensor of the file, its place in the model, and how its axes lie in each:

    "self_attn.o_proj.weight": ("attention.o", "D NH -> N H D")

reads "the file has [D, N*H], the model has [N, H, D]". Loading follows the table to the right, saving to the left.

Letters: V vocabulary, D width, O the head's output width (= D), N query heads, K key/value heads, H head width, F MLP
width; P pairs and R real and imaginary parts of a rotated head, H = 2P; E residual and vector together, E = 2D; U = 1.
"""

import json
import math
import zipfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError
from jax import Array
from jax.sharding import Mesh, NamedSharding
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from hypersteer_jax.config import HypernetConfig, LMConfig, SelectionConfig, hypernet_shape
from hypersteer_jax.models.hypernet import NO_SELECTION, Hypernet
from hypersteer_jax.models.lm import LM
from hypersteer_jax.models.presets import from_hugging_face, from_llama2c, to_hugging_face
from hypersteer_jax.sharding import weight_spec

MAX_SHARD = 4_000_000_000  # bytes of one safetensors file
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"

Layout = dict[str, tuple[str, str]]  # name in the file -> path in the model, axes there and here
Form = Literal["release", "regression"]  # of a hypernetwork's file: the AxBench release's, HyperStuff's regression

NORMS: dict[bool, Layout] = {  # by `sandwich_norms`: the same name stands for different norms
    False: {
        "input_layernorm.weight": ("pre_attention", "D -> D"),
        "post_attention_layernorm.weight": ("pre_mlp", "D -> D"),
    },
    True: {
        "input_layernorm.weight": ("pre_attention", "D -> D"),
        "post_attention_layernorm.weight": ("post_attention", "D -> D"),
        "pre_feedforward_layernorm.weight": ("pre_mlp", "D -> D"),
        "post_feedforward_layernorm.weight": ("post_mlp", "D -> D"),
    },
}
HUGGING_FACE_BLOCK: Layout = {
    "self_attn.q_proj.weight": ("attention.q", "NH D -> D N H"),
    "self_attn.k_proj.weight": ("attention.k", "KH D -> D K H"),
    "self_attn.v_proj.weight": ("attention.v", "KH D -> D K H"),
    "self_attn.o_proj.weight": ("attention.o", "D NH -> N H D"),
    "self_attn.q_proj.bias": ("attention.q_bias", "NH -> N H"),
    "self_attn.k_proj.bias": ("attention.k_bias", "KH -> K H"),
    "self_attn.v_proj.bias": ("attention.v_bias", "KH -> K H"),
    "self_attn.q_norm.weight": ("attention.q_norm", "H -> H"),
    "self_attn.k_norm.weight": ("attention.k_norm", "H -> H"),
    "mlp.gate_proj.weight": ("mlp.gate", "F D -> D F"),
    "mlp.up_proj.weight": ("mlp.up", "F D -> D F"),
    "mlp.down_proj.weight": ("mlp.down", "D F -> F D"),
}
HUGGING_FACE: Layout = {
    "model.embed_tokens.weight": ("embedding", "V D -> V D"),
    "model.norm.weight": ("final_norm", "D -> D"),
    "lm_head.weight": ("head", "V D -> D V"),
}
LLAMA2C_BLOCK: Layout = {
    "wq": ("attention.q", "NPR D -> D N RP"),  # rotates neighbouring channels; `rope` rotates halves
    "wk": ("attention.k", "KPR D -> D K RP"),
    "wv": ("attention.v", "KH D -> D K H"),
    "wo": ("attention.o", "D NH -> N H D"),
    "w1": ("mlp.gate", "F D -> D F"),
    "w2": ("mlp.down", "D F -> F D"),
    "w3": ("mlp.up", "F D -> D F"),
    "attention_norm": ("pre_attention", "D -> D"),
    "ffn_norm": ("pre_mlp", "D -> D"),
}
LLAMA2C: Layout = {
    "tok_embeddings": ("embedding", "V D -> V D"),
    "norm": ("final_norm", "D -> D"),
    "output": ("head", "V D -> D V"),
}
RELEASE_BLOCK: Layout = {
    "cross_attention.q_proj.weight": ("cross.q", "NH D -> D N H"),
    "cross_attention.k_proj.weight": ("cross.k", "KH D -> D K H"),
    "cross_attention.v_proj.weight": ("cross.v", "KH D -> D K H"),
    "cross_attention.o_proj.weight": ("cross.o", "D NH -> N H D"),
    "pre_cross_attention_layernorm.weight": ("pre_cross", "D -> D"),
    "post_cross_attention_layernorm.weight": ("post_cross", "D -> D"),
}
RELEASE: Layout = {  # AxBench at dc57b9b, `modeling_hypernet.py`
    "embed_tokens.weight": ("embedding", "V D -> V D"),
    "norm.weight": ("final_norm", "D -> D"),
    "regression_head.weight": ("head", "O D -> D O"),
    "regression_head.bias": ("head_bias", "O -> O"),
}
REGRESSION: Layout = {  # HyperStuff/hypersteer, `hypersteer_regression.py`
    "base_model.model.embed_tokens.weight": ("embedding", "V D -> V D"),
    "base_model.model.norm.weight": ("final_norm", "D -> D"),
    "base_model.lm_head.weight": ("lm_head", "V D -> D V"),  # not in a hypernetwork; `models.convert` looks at it
    "regression_head.weight": ("head", "O D -> D O"),
    "regression_head.bias": ("head_bias", "O -> O"),
}
SELECTION_HEAD = "selection_head."  # HyperStuff's prefix of the head among other weights; its own file leaves it out
SELECTION: Layout = {
    f"{SELECTION_HEAD}proj.weight": ("selection.weight", "U E -> E U"),
    f"{SELECTION_HEAD}proj.bias": ("selection.bias", "U -> U"),
    f"{SELECTION_HEAD}ln.weight": ("selection.norm_weight", "E -> E"),
    f"{SELECTION_HEAD}ln.bias": ("selection.norm_bias", "E -> E"),
    f"{SELECTION_HEAD}_temperature": ("selection.temperature", " -> "),
}
HYPERNETS: dict[Form, tuple[Layout, str]] = {  # what is not in blocks, and where the blocks are
    "release": (RELEASE | SELECTION, "layers"),
    "regression": (REGRESSION | SELECTION, "base_model.model.layers"),
}


class WeightsError(ValueError):
    """Weights are missing, damaged or do not fit; the message names the file, everything wrong in it, and the fix."""


class Slot(NamedTuple):
    """Where one tensor of a file belongs."""

    path: str  # in the model
    block: int | None  # its number, where the model stacks the blocks
    there: str  # axes in the file
    here: str  # axes in the model, the stack left out

    def of(self, arrays: dict[str, np.ndarray]) -> np.ndarray:
        """This tensor's part of the arrays of the model, a view."""
        return arrays[self.path] if self.block is None else arrays[self.path][self.block]


class Stored(NamedTuple):
    """A tensor that has not been read yet."""

    shape: tuple[int, ...]
    read: Callable[[tuple[slice, ...]], np.ndarray]  # a part of it, one slice for each axis

    def whole(self) -> np.ndarray:
        """All of it."""
        return self.read((slice(None),) * len(self.shape))


def load_lm(path: Path, dtype: jnp.dtype, mesh: Mesh | None = None) -> LM:
    """Reads a base LM from a directory as Hugging Face or llama2.c write it.

    Each process reads only what its own devices hold, one array after the other.

    Args:
        path: a directory with config.json and model.safetensors, its shards and their index, or (llama2.c) one .npz.
        dtype: of the weights, whatever the file has.
        mesh: places each array by `sharding.weight_spec`; without it everything goes to the default device.

    Raises:
        WeightsError: a file is missing or damaged, or tensors are missing, extra or misshapen: all of them are listed.
        ConfigError: config.json describes a model that is not supported.
    """
    path = Path(path)
    if not path.is_dir():
        raise WeightsError(f"{path} is not a directory; give one that holds config.json and {SINGLE}")
    values = read_json(path / "config.json")
    if "dim" in values:
        config = from_llama2c(values)
        return _assemble(_lm(config), _whole(LLAMA2C, "layers", LLAMA2C_BLOCK), _npz(path), dtype, str(path), mesh)
    config = from_hugging_face(values)
    return _assemble(_lm(config), _hugging_face(config), open_directory(path), dtype, str(path), mesh)


def lm_from_tensors(config: LMConfig, tensors: Mapping[str, np.ndarray], dtype: jnp.dtype) -> LM:
    """Builds a base LM from tensors by their Hugging Face names, as `lm_tensors` gives them.

    Raises:
        WeightsError: tensors are missing, extra or misshapen: all of them are listed.
    """
    found = {name: _in_memory(tensor) for name, tensor in tensors.items()}
    return _assemble(_lm(config), _hugging_face(config), found, dtype, "tensors", None)


def lm_tensors(lm: LM) -> dict[str, np.ndarray]:
    """All weights by their Hugging Face names, as its files have them (views: make them contiguous to write them)."""
    return _tensors(lm, lm.config, lm.config.layers, _hugging_face(lm.config))


def hypernet_from_tensors(
    config: HypernetConfig,
    lm: LMConfig,
    tensors: Mapping[str, np.ndarray],
    where: str = "tensors",
    selection: SelectionConfig = NO_SELECTION,
    form: Form = "release",
) -> Hypernet:
    """Builds a float32 hypernetwork from tensors by their names in a release.

    Args:
        config: of the hypernetwork.
        lm: shape of the base LM.
        tensors: all weights.
        where: they are, for messages.
        selection: of its selection head.
        form: whose names these are.

    Raises:
        WeightsError: tensors are missing, extra or misshapen: all of them are listed.
    """
    found = {name: _in_memory(tensor) for name, tensor in tensors.items()}
    shape = hypernet_shape(config, lm)
    skeleton = Skeleton(lambda: Hypernet(config, lm, nnx.Rngs(0), selection), shape, config.blocks)
    return _assemble(skeleton, _release(shape, form), found, jnp.float32, where, None)


def hypernet_tensors(hypernet: Hypernet, form: Form = "release") -> dict[str, np.ndarray]:
    """All weights (or gradients) by their names in a release (views where possible)."""
    return _tensors(hypernet, hypernet.lm_config, hypernet.config.blocks, _release(hypernet.lm_config, form))


def save_lm(lm: LM, path: Path, max_shard: int = MAX_SHARD) -> None:
    """Writes a directory that `load_lm` and transformers read, in the dtype of the weights.

    Weights of an earlier save in the same directory are replaced. config.json is written last: a directory without it
    is an interrupted save.

    Args:
        lm: its weights must be addressable from this process.
        path: made if missing.
        max_shard: bytes of weights in one file; above it there are several and an index.

    Raises:
        ConfigError: the family's Hugging Face code cannot express a setting of `lm`; nothing is written.
    """
    values = to_hugging_face(lm.config)
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    for old in (path / "config.json", *path.glob("model*.safetensors"), path / INDEX):
        old.unlink(missing_ok=True)
    save_tensors(lm_tensors(lm), values, path, max_shard)


def save_tensors(tensors: Mapping[str, np.ndarray], config: dict[str, Any], path: Path, max_shard: int) -> None:
    """Writes model.safetensors, or shards of at most `max_shard` bytes and their index, and config.json.

    config.json names the dtype of the first tensor (`torch_dtype`), which is that of all but a selection head's.
    """
    shards: list[list[str]] = [[]]
    size = 0
    for name, tensor in tensors.items():
        if shards[-1] and size + tensor.nbytes > max_shard:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += tensor.nbytes
    several = len(shards) > 1
    files = [f"model-{i:05}-of-{len(shards):05}.safetensors" if several else SINGLE for i in range(1, len(shards) + 1)]
    for file, names in zip(files, shards, strict=True):
        write_file({name: tensors[name] for name in names}, path / file)
    if several:
        total = sum(tensor.nbytes for tensor in tensors.values())
        where = {name: file for file, names in zip(files, shards, strict=True) for name in names}
        _write_json(path / INDEX, {"metadata": {"total_size": total}, "weight_map": where})
    dtype = next(iter(tensors.values())).dtype
    _write_json(path / "config.json", config | {"torch_dtype": str(dtype)})


def write_file(tensors: Mapping[str, np.ndarray], path: Path) -> None:
    """Writes one safetensors file that PyTorch reads."""
    whole = {name: np.asarray(tensor, order="C") for name, tensor in tensors.items()}  # views would stay as they lie
    save_file(whole, path, metadata={"format": "pt"})


def resolve(name: str) -> Path:
    """The directory of a base LM that is named by a directory, or by a Hugging Face hub id (then it is downloaded).

    Raises:
        WeightsError: it is neither, or the hub cannot be reached and has not been before.
    """
    if Path(name).is_dir():
        return Path(name)
    patterns = ["*.json", "*.safetensors", "tokenizer*", "*.model", "*.jinja", "merges.txt", "vocab.txt"]
    try:
        return Path(snapshot_download(name, allow_patterns=patterns))
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise WeightsError(
            f"{name!r} is not a directory, and as a hub id it could not be had: {error}\n"
            "Give a directory with weights, or a hub id that exists; for a gated model accept its licence on the hub "
            "and run `hf auth login`; without a network, download it elsewhere and give the directory."
        ) from error


class Skeleton(NamedTuple):
    """A module that is to be filled with weights."""

    make: Callable[[], Any]
    config: LMConfig
    blocks: int


def _lm(config: LMConfig) -> Skeleton:
    return Skeleton(lambda: LM(config, nnx.Rngs(0)), config, config.layers)


def _assemble(
    module: Skeleton, layout: Layout, found: dict[str, Stored], dtype: jnp.dtype, where: str, mesh: Mesh | None
) -> Any:
    """The module made of `found`. Every shape is checked before the first tensor is read."""
    config = module.config
    skeleton, structure = _leaves(jax.eval_shape(module.make))  # shapes only, nothing is drawn
    slots = _slots(module.blocks, layout, set(skeleton))
    sizes = _sizes(config)
    redundant = {name for name, (_, axes) in layout.items() if axes == "V D -> D V"}  # a tied head: the embedding again
    problems = []
    for name, slot in slots.items():
        expected = _shape(slot.there, sizes)
        if name not in found:
            problems.append(f"missing    {name}: expected {expected}")
        elif found[name].shape != expected:
            problems.append(f"misshapen  {name}: expected {expected}, found {found[name].shape}")
    for name in found.keys() - slots.keys() - redundant:
        problems.append(f"extra      {name}: {found[name].shape}")
    if problems:
        raise WeightsError(
            f"{where}: {len(problems)} tensors do not fit a {config.family} model of {module.blocks} blocks; "
            "use the config.json that belongs to these weights\n  " + "\n  ".join(sorted(problems))
        )
    tensors: dict[str, list[tuple[Slot, Stored]]] = {}
    for name, slot in slots.items():
        tensors.setdefault(slot.path, []).append((slot, found[name]))  # by ascending block

    def array(path: str, leaf: Any) -> Array:
        read = partial(_read, tensors[path], leaf.shape, jnp.dtype(dtype), sizes)
        if mesh is None:
            return jnp.asarray(read((slice(None),) * leaf.ndim))
        return jax.make_array_from_callback(leaf.shape, NamedSharding(mesh, weight_spec(path, leaf.shape, mesh)), read)

    return jax.tree.unflatten(structure, [array(path, leaf) for path, leaf in skeleton.items()])


def _read(
    tensors: list[tuple[Slot, Stored]],
    shape: tuple[int, ...],
    dtype: np.dtype,
    sizes: dict[str, int],
    index: tuple[slice, ...],
) -> np.ndarray:
    """A part of one array of the model, from the tensor, or the blocks' tensors, that it is made of."""
    cuts = [range(*cut.indices(length)) for cut, length in zip(index, shape, strict=True)]
    part = np.empty([len(cut) for cut in cuts], dtype)
    if tensors[0][0].block is None:
        [(slot, stored)] = tensors
        part[...] = _read_tensor(stored, slot, cuts, sizes)
    else:
        for place, block in enumerate(cuts[0]):
            slot, stored = tensors[block]
            part[place] = _read_tensor(stored, slot, cuts[1:], sizes)
    return part


def _read_tensor(stored: Stored, slot: Slot, cuts: list[range], sizes: dict[str, int]) -> np.ndarray:
    """A part of one tensor, as the model has it.

    Where a part of an axis is a run of an axis of the file, only that is read; else the whole axis is, and then cut.
    """
    wanted = dict(zip(slot.here.split(), cuts, strict=True))
    runs = {axis[0]: wanted[axis[0]] for axis in slot.there.split() if axis[0] in wanted}
    source = []
    for axis in slot.there.split():
        each = math.prod(sizes[letter] for letter in axis[1:])
        run = runs.get(axis[0], range(sizes[axis[0]]))
        source.append(slice(run.start * each, run.stop * each))
    read = sizes | {letter: len(run) for letter, run in runs.items()}
    whole = _rearrange(stored.read(tuple(source)), slot.there, slot.here, read)
    return whole[tuple(slice(None) if axis in runs else slice(cut.start, cut.stop) for axis, cut in wanted.items())]


def _tensors(module: nnx.Module, config: LMConfig, blocks: int, layout: Layout) -> dict[str, np.ndarray]:
    arrays = {path: np.asarray(leaf) for path, leaf in _leaves(module)[0].items()}
    slots, sizes = _slots(blocks, layout, set(arrays)), _sizes(config)
    return {name: _rearrange(slot.of(arrays), slot.here, slot.there, sizes) for name, slot in slots.items()}


def _leaves(lm: nnx.Module) -> tuple[dict[str, Any], Any]:
    """Weights by their path, such as "blocks.attention.q", in the order of the tree, and the tree's structure."""
    leaves, structure = jax.tree_util.tree_flatten_with_path(lm)
    name = partial(jax.tree_util.keystr, simple=True, separator=".")
    return {name(path).removesuffix(".value"): leaf for path, leaf in leaves}, structure


def _slots(blocks: int, layout: Layout, paths: set[str]) -> dict[str, Slot]:
    """Every tensor of a file of this model; rows of the table whose weight the model does not have fall away."""
    slots = {}
    for index in (None, *range(blocks)):
        for name, (path, axes) in layout.items():
            if path in paths and path.startswith("blocks.") == (index is not None):
                slots[name.format(index)] = Slot(path, index, *axes.split(" -> "))
    return slots


def _whole(outer: Layout, prefix: str, block: Layout) -> Layout:
    """One table of a whole model; the number of a block is left open in its names."""
    return outer | {f"{prefix}.{{}}.{name}": (f"blocks.{path}", axes) for name, (path, axes) in block.items()}


def _hugging_face(config: LMConfig) -> Layout:
    return _whole(HUGGING_FACE, "model.layers", NORMS[config.sandwich_norms] | HUGGING_FACE_BLOCK)


def _release(config: LMConfig, form: Form) -> Layout:
    return _whole(*HYPERNETS[form], NORMS[config.sandwich_norms] | HUGGING_FACE_BLOCK | RELEASE_BLOCK)


def _sizes(config: LMConfig) -> dict[str, int]:
    """Length of each axis letter."""
    return {
        "V": config.vocab,
        "D": config.width,
        "O": config.width,
        "N": config.heads,
        "K": config.kv_heads,
        "H": config.head_dim,
        "P": config.head_dim // 2,
        "R": 2,
        "F": config.mlp_width,
        "E": 2 * config.width,
        "U": 1,
    }


def _rearrange(array: np.ndarray, before: str, after: str, sizes: dict[str, int]) -> np.ndarray:
    """Splits, permutes and merges axes: from "NH D" to "D N H" makes `[N*H, D]` into `[D, N, H]`."""
    letters = before.replace(" ", "")
    split = array.reshape([sizes[letter] for letter in letters])
    permuted = split.transpose([letters.index(letter) for letter in after.replace(" ", "")])
    return permuted.reshape(_shape(after, sizes))


def _shape(axes: str, sizes: dict[str, int]) -> tuple[int, ...]:
    return tuple(math.prod(sizes[letter] for letter in axis) for axis in axes.split())


def open_directory(path: Path) -> dict[str, Stored]:
    """Names and shapes of all tensors in a directory; the files stay mapped until the result is dropped.

    Raises:
        WeightsError: a file is missing or damaged.
    """
    if (path / SINGLE).exists():
        files = [SINGLE]
    elif (path / INDEX).exists():
        files = sorted(set(read_json(path / INDEX).get("weight_map", {}).values()))
    else:
        raise WeightsError(
            f"{path} has neither {SINGLE} nor {INDEX}; other formats are converted by transformers: "
            "AutoModelForCausalLM.from_pretrained(...).save_pretrained(...)"
        )
    return {name: stored for file in files for name, stored in open_file(path / file).items()}


def open_file(path: Path) -> dict[str, Stored]:
    """As `open_directory`, for one file."""
    try:
        handle = safe_open(path, framework="numpy")
    except (SafetensorError, OSError) as error:
        raise WeightsError(
            f"{path} cannot be read: {error}; it is missing, empty or cut short, copy it again"
        ) from error
    return {
        name: Stored(tuple(handle.get_slice(name).get_shape()), partial(_slice, handle, name))
        for name in sorted(handle.keys())
    }


def _slice(handle: Any, name: str, index: tuple[slice, ...]) -> np.ndarray:
    return handle.get_slice(name)[index] if index else handle.get_tensor(name)


def _npz(path: Path) -> dict[str, Stored]:
    """Tensors of the one .npz file of a llama2.c directory (such models are small)."""
    files = sorted(path.glob("*.npz"))
    if len(files) != 1:
        raise WeightsError(f"{path} has {len(files)} .npz files; a llama2.c directory has one")
    try:
        with files[0].open("rb") as file, np.load(file) as archive:
            return {name: _in_memory(archive[name]) for name in archive.files}
    except (zipfile.BadZipFile, OSError, ValueError, EOFError) as error:
        raise WeightsError(f"{files[0]} cannot be read: {error}; it is empty or cut short, copy it again") from error


def _in_memory(tensor: np.ndarray) -> Stored:
    return Stored(tensor.shape, tensor.__getitem__)


def read_json(path: Path) -> dict[str, Any]:
    """Content of a JSON file.

    Raises:
        WeightsError: it is missing or damaged.
    """
    try:
        return json.loads(path.read_text())
    except OSError as error:
        raise WeightsError(
            f"{path} cannot be read: {error}; give a directory that Hugging Face or llama2.c wrote"
        ) from error
    except ValueError as error:
        raise WeightsError(f"{path} is not JSON: {error}; copy it again") from error


def _write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n")
