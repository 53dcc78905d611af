"""Checkpoints of the PyTorch releases and ours: there and back to the bit, and nothing is made of damaged ones."""

import dataclasses
import json
import shutil
from functools import partial
from importlib import resources
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console
from safetensors.numpy import load_file, save_file

from hypersteer_jax.config import ConfigError, HypernetConfig, RunConfig, SelectionConfig, SteeringConfig, TrainConfig
from hypersteer_jax.models.convert import (
    Converted,
    check_expressible,
    read_hyperstuff,
    read_release,
    write_regression,
    write_release,
)
from hypersteer_jax.models.hypernet import Hypernet
from hypersteer_jax.models.lm import cast
from hypersteer_jax.models.presets import to_hugging_face
from hypersteer_jax.models.weights import WeightsError, hypernet_tensors, save_lm
from hypersteer_jax.training import checkpoint, launch
from hypersteer_jax.training.train import TrainState, new_state
from tests.conftest import random_hypernet
from tests.models.tiny import CONFIGS, random_lm

# Both releases are Gemma-2 networks with heads of 256, which no tensor shows; the rest is as small as can be.
LM = dataclasses.replace(
    CONFIGS["gemma2"],
    vocab=6000,  # more than the tiny world's tokenizer has
    layers=3,
    width=16,
    heads=2,
    kv_heads=1,
    head_dim=256,
    mlp_width=24,
    attention_scale=256**-0.5,
    attention_softcap=50.0,
    final_softcap=30.0,
    sliding_window=4096,
)
OWN_SIZES: dict[str, Any] = {"heads": 4, "kv_heads": 4, "mlp_width": 40, "attention_scale": 224**-0.5}
NET = HypernetConfig(blocks=2, init="random")
STUFF = dataclasses.replace(NET, embedding="shared", **OWN_SIZES)
REGRESSION = HypernetConfig("no_context", blocks=3, init="random", final_norm=True)
REGRESSION_OF = partial(dataclasses.replace, REGRESSION)
HEAD_FILE, WEIGHTS_FILE = "train/HyperSteer_selection_head.safetensors", "train/HyperSteer_weight.safetensors"
SHARD = 50_000  # bytes


def bfloat16_net(config: HypernetConfig = NET, seed: int = 1) -> Hypernet:
    """Random weights, float32, each of which bfloat16 holds exactly."""
    return cast(cast(random_hypernet(config, LM, seed), jnp.bfloat16), jnp.float32)


def bare(hypernet: Hypernet) -> Hypernet:
    """The same weights without the selection head."""
    plain = jax.tree.map(jnp.copy, hypernet)
    plain.selection = None
    return plain


def head_tensors(layer_norm: bool = True, dtype: Any = np.float32) -> dict[str, np.ndarray]:
    """A head as HyperStuff keeps it: float32 beside a bfloat16 hypernetwork, its count an int32."""
    rng = np.random.default_rng(6)
    shapes = {"proj.weight": (1, 32), "proj.bias": (1,), "_temperature": ()}
    shapes |= {"ln.weight": (32,), "ln.bias": (32,)} if layer_norm else {}
    tensors = {name: np.asarray(rng.uniform(0.1, 0.9, shape), dtype) for name, shape in shapes.items()}
    return tensors | {"_step": np.asarray(1234, np.int32)}


def assert_same(one: Any, two: Any) -> None:
    for left, right in zip(jax.tree.leaves(one), jax.tree.leaves(two), strict=True):
        assert left.dtype == right.dtype
        np.testing.assert_array_equal(left, right)


def vectors(hypernet: Hypernet, table: jax.Array) -> np.ndarray:
    rng = np.random.default_rng(0)
    context = jnp.asarray(rng.normal(size=(3, 5, LM.width)), jnp.float32)
    tokens = jnp.asarray(rng.integers(1, LM.vocab, (3, 4)))
    return np.asarray(
        Hypernet.__call__(hypernet, tokens, jnp.ones((3, 4), bool), context, jnp.ones((3, 5), bool), table)
    )


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def tensors_of(folder: Path) -> dict[str, np.ndarray]:
    return {
        name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(folder / file.name).items()
    }


@pytest.fixture(scope="module")
def lm_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base LM with the tiny world's tokenizer."""
    folder = tmp_path_factory.mktemp("lm")
    save_lm(random_lm(LM), folder)
    with resources.as_file(resources.files("hypersteer_jax.data.tinyworld") / "lm") as path:
        for file in (*path.glob("tokenizer*"), path / "chat_template.jinja"):
            shutil.copy(file, folder / file.name)
    return folder


@pytest.fixture
def release(tmp_path: Path) -> Path:
    """An AxBench release directory in shards, as its trainer leaves it: bfloat16, tokenizer files beside it."""
    folder = tmp_path / "release"
    folder.mkdir()
    write_release(Converted(bfloat16_net(), 0), jnp.zeros(0), folder, SHARD)
    (folder / "tokenizer_config.json").write_text("{}")
    return folder


@pytest.fixture
def stuff(tmp_path: Path) -> Path:
    """A HyperStuff run: bfloat16, sizes of its own, a table that nothing uses, and no config.json."""
    folder = tmp_path / "stuff"
    (folder / "train").mkdir(parents=True)
    (folder / "config.yaml").write_text("model: hypersteer\n")
    tensors = hypernet_tensors(bfloat16_net(STUFF)) | {
        "embed_tokens.weight": np.random.default_rng(5).normal(size=(LM.vocab, LM.width))
    }
    save(tensors, folder / WEIGHTS_FILE)
    return folder


@pytest.fixture
def regression(tmp_path: Path) -> Path:
    """A HyperStuff regression run: a whole LM in bfloat16, its head a copy of its table."""
    folder = tmp_path / "regression"
    (folder / "train").mkdir(parents=True)
    net = bfloat16_net(REGRESSION)
    lm = {f"base_model.model.{name}": tensor for name, tensor in hypernet_tensors(net).items() if "head" not in name}
    tensors = lm | {"base_model.lm_head.weight": lm["base_model.model.embed_tokens.weight"]}
    tensors |= {name: tensor for name, tensor in hypernet_tensors(net).items() if "head" in name}
    save(tensors, folder / WEIGHTS_FILE)
    return folder


def save(tensors: dict[str, np.ndarray], file: Path) -> None:
    save_file({name: np.asarray(tensor.astype(jnp.bfloat16), order="C") for name, tensor in tensors.items()}, file)


def convert(source: Path, target: Path, lm: Path | None = None, layer: int = 1) -> None:
    launch.convert(source, target, None if lm is None else str(lm), layer, Console(quiet=True))


# Shape and names


def test_release_directory_is_what_the_release_writes(release: Path) -> None:
    config = json.loads((release / "config.json").read_text())
    expected = {
        "model_type": "hypernet",
        "architectures": ["HypernetModel"],
        "use_target_model_embedding": False,
        "vocab_size": 6000,
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 256,
        "intermediate_size": 24,
        "query_pre_attn_scalar": 256,
        "attn_logit_softcapping": 50.0,
        "rope_theta": 10_000.0,
        "rms_norm_eps": 1e-6,
        "sliding_window": 4096,
        "hidden_activation": "gelu_pytorch_tanh",
        "torch_dtype": "bfloat16",
    }
    assert {name: config.get(name) for name in expected} == expected
    index = json.loads((release / "model.safetensors.index.json").read_text())["weight_map"]
    assert len(set(index.values())) > 2
    tensors, net = tensors_of(release), bfloat16_net()
    assert index.keys() == tensors.keys()
    assert len(tensors) == 4 + 2 * 17
    np.testing.assert_array_equal(tensors["regression_head.weight"].T, net.head[...])
    np.testing.assert_array_equal(
        tensors["layers.1.cross_attention.o_proj.weight"][3, 256 + 7], net.blocks.cross.o[...][1, 1, 7, 3]
    )


def test_golden_hypernetwork_of_the_release(golden_dir: Path, tmp_path: Path) -> None:
    # Names, shapes and values that the release's own code has written.
    meta = json.loads((golden_dir / "golden.json").read_text())
    golden = load_file(golden_dir / "golden.safetensors")
    prefix = "hypernet.init."
    tensors = {name.removeprefix(prefix): tensor for name, tensor in golden.items() if name.startswith(prefix)}
    config = meta["base_config"] | meta["hypernet"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file(tensors, tmp_path / "model.safetensors")
    lm = launch.base_shape("tinyworld")
    lm = dataclasses.replace(lm, vocab=320, width=64, heads=4, kv_heads=2, head_dim=16, mlp_width=160)
    hypernet, _ = read_release(tmp_path, dataclasses.replace(lm, attention_scale=16**-0.5))
    assert hypernet.config == NET
    ours = hypernet_tensors(hypernet)
    assert ours.keys() == tensors.keys()
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(ours[name], tensor)


# There and back


def test_release_to_run_and_back_is_the_same_files(release: Path, lm_folder: Path, tmp_path: Path) -> None:
    convert(release, tmp_path / "run", lm_folder)
    model = launch.load_run(tmp_path / "run")
    assert_same(model.hypernet, bfloat16_net())
    assert model.hypernet.config == NET
    assert model.config.lm == str(lm_folder)
    assert model.config.steering == SteeringConfig(layers=(1,))
    convert(tmp_path / "run", tmp_path / "back")
    back, there = tensors_of(tmp_path / "back"), tensors_of(release)
    assert back.keys() == there.keys()
    for name, tensor in there.items():
        assert back[name].dtype == tensor.dtype == jnp.bfloat16
        assert back[name].tobytes() == tensor.tobytes()
    assert json.loads((tmp_path / "back/config.json").read_text()) == json.loads((release / "config.json").read_text())


def test_run_to_release_and_back_is_the_same_hypernetwork(lm_folder: Path, tmp_path: Path) -> None:
    hypernet = random_hypernet(NET, LM)  # not one bfloat16 number in it
    write_run(tmp_path / "run", hypernet, lm_folder)
    convert(tmp_path / "run", tmp_path / "release")
    assert tensors_of(tmp_path / "release")["norm.weight"].dtype == np.float32
    assert json.loads((tmp_path / "release/config.json").read_text())["torch_dtype"] == "float32"
    assert_same(read_release(tmp_path / "release", LM).hypernet, hypernet)


def write_run(folder: Path, hypernet: Hypernet, lm_folder: Path, **settings: Any) -> None:
    config = RunConfig(
        lm=str(lm_folder),
        out=folder,
        hypernet=hypernet.config,
        steering=SteeringConfig((1,)),
        train=TrainConfig(compute_dtype="float32"),
    )
    config = dataclasses.replace(config, **settings)
    checkpoint.write_config(folder, config)
    with checkpoint.open_checkpoints(folder) as checkpoints:
        state = new_state(hypernet, config.train)._replace(step=jnp.asarray(7))
        checkpoint.save(checkpoints, 7, state, config=config)


def test_hyperstuff_to_run_to_release_gives_the_same_vectors(stuff: Path, lm_folder: Path, tmp_path: Path) -> None:
    convert(stuff, tmp_path / "run", lm_folder)
    model, expected = launch.load_run(tmp_path / "run"), bfloat16_net(STUFF)
    assert model.config.hypernet == STUFF
    assert model.config.steering.train_positions == "after_bos"
    assert_same(model.hypernet, expected)
    convert(tmp_path / "run", tmp_path / "release")
    config = json.loads((tmp_path / "release/config.json").read_text())
    assert (config["query_pre_attn_scalar"], config["intermediate_size"]) == (224, 40)
    released, table = read_release(tmp_path / "release", LM).hypernet, model.lm.embedding[...].astype(jnp.float32)
    assert released.config == dataclasses.replace(STUFF, embedding="own")
    np.testing.assert_array_equal(vectors(released, jnp.zeros_like(table)), vectors(expected, table))


def test_sizes_and_scale_of_its_own_are_used(stuff: Path) -> None:
    hypernet, table = read_hyperstuff(stuff / WEIGHTS_FILE, LM).hypernet, random_lm(LM).embedding[...]
    assert hypernet.blocks.mlp.gate[...].shape == (2, 16, 40)
    assert hypernet.blocks.cross.k[...].shape == (2, 16, 4, 256)
    expected = vectors(bfloat16_net(STUFF), table)
    np.testing.assert_array_equal(vectors(hypernet, table), expected)
    unscaled = bfloat16_net(dataclasses.replace(STUFF, attention_scale=None))  # the same weights
    assert np.abs(vectors(unscaled, table) - expected).max() > 1e-3


def test_a_release_may_embed_with_the_lms_table(release: Path) -> None:
    config = json.loads((release / "config.json").read_text())
    (release / "config.json").write_text(json.dumps(config | {"use_target_model_embedding": True}))
    hypernet, _ = read_release(release, LM)
    assert hypernet.config == dataclasses.replace(NET, embedding="shared")
    assert hypernet.embedding is None


def test_a_hyperstuff_run_without_its_unused_table(stuff: Path) -> None:
    file = stuff / WEIGHTS_FILE
    edit(file, lambda tensors: tensors.pop("embed_tokens.weight"))
    assert_same(read_hyperstuff(file, LM).hypernet, bfloat16_net(STUFF))


def test_a_converted_run_steers_but_has_nothing_to_resume(release: Path, lm_folder: Path, tmp_path: Path) -> None:
    convert(release, tmp_path / "run", lm_folder)
    launch.show_steered(tmp_path / "run", "Describe the moon.", "bees", (0.0, 1.0), 2, 0.0, 0)
    state = new_state(bfloat16_net(), TrainConfig())
    with checkpoint.open_checkpoints(tmp_path / "run") as checkpoints:
        back = checkpoint.restore(checkpoints, jax.eval_shape(lambda: state), launch.make_mesh())
    assert isinstance(back.state, TrainState)
    assert_same(back.state, state)
    with pytest.raises(checkpoint.CheckpointError, match="no place in the data, so it can be steered with but not"):
        checkpoint.resume_position(back)


def test_regression_to_run_and_back_is_the_same_file(regression: Path, lm_folder: Path, tmp_path: Path) -> None:
    convert(regression, tmp_path / "run", lm_folder)
    model = launch.load_run(tmp_path / "run")
    assert_same(model.hypernet, bfloat16_net(REGRESSION))
    assert model.config.hypernet == REGRESSION
    assert model.config.selection == SelectionConfig()
    assert model.config.steering == SteeringConfig(layers=(1,), train_positions="after_bos")
    convert(tmp_path / "run", tmp_path / "back")
    assert files(tmp_path / "back").keys() == {WEIGHTS_FILE}
    assert_same_file(tmp_path / "back" / WEIGHTS_FILE, regression / WEIGHTS_FILE)


def assert_same_file(one: Path, two: Path) -> None:
    back, there = load_file(one), load_file(two)
    assert back.keys() == there.keys()
    for name, tensor in there.items():
        assert (back[name].dtype, back[name].shape) == (tensor.dtype, tensor.shape), name
        assert back[name].tobytes() == tensor.tobytes(), name


@pytest.mark.parametrize("embedding", ["own", "shared"])
def test_run_to_regression_and_back_gives_the_same_vectors(embedding: str, lm_folder: Path, tmp_path: Path) -> None:
    hypernet = random_hypernet(dataclasses.replace(REGRESSION, embedding=embedding), LM)
    write_run(tmp_path / "run", hypernet, lm_folder)
    convert(tmp_path / "run", tmp_path / "back")
    tensors, table = load_file(tmp_path / "back" / WEIGHTS_FILE), random_lm(LM).embedding[...]
    assert {str(tensor.dtype) for tensor in tensors.values()} == {"float32"}
    np.testing.assert_array_equal(tensors["base_model.lm_head.weight"], tensors["base_model.model.embed_tokens.weight"])
    read, step = read_hyperstuff(tmp_path / "back" / WEIGHTS_FILE, LM)
    assert (read.config, step) == (REGRESSION, 0)
    np.testing.assert_array_equal(vectors(read, 0 * table), vectors(hypernet, table))


def test_a_regression_run_without_the_copy_of_its_table(regression: Path) -> None:
    edit(regression / WEIGHTS_FILE, lambda tensors: tensors.pop("base_model.lm_head.weight"))
    assert_same(read_hyperstuff(regression / WEIGHTS_FILE, LM).hypernet, bfloat16_net(REGRESSION))


@pytest.mark.parametrize("layer_norm", [True, False])
def test_selection_head_of_a_regression_run_and_back(
    layer_norm: bool, regression: Path, lm_folder: Path, tmp_path: Path
) -> None:
    save_file(head_tensors(layer_norm), regression / HEAD_FILE)
    convert(regression, tmp_path / "run", lm_folder)
    model, tensors = launch.load_run(tmp_path / "run"), head_tensors(layer_norm)
    temperature = float(tensors["_temperature"])
    assert model.config.selection == SelectionConfig(
        True, layer_norm, temperature_start=temperature, temperature_end=temperature
    )
    selection = model.hypernet.selection
    assert selection.config == model.config.selection
    np.testing.assert_array_equal(selection.weight[..., 0], tensors["proj.weight"][0])
    np.testing.assert_array_equal(selection.temperature[...], tensors["_temperature"])
    assert_same(bare(model.hypernet), bfloat16_net(REGRESSION))
    convert(tmp_path / "run", tmp_path / "back")
    for file in (HEAD_FILE, WEIGHTS_FILE):
        assert_same_file(tmp_path / "back" / file, regression / file)


@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
def test_selection_head_within_a_release_and_back(dtype: Any, release: Path, lm_folder: Path, tmp_path: Path) -> None:
    head = {f"selection_head.{name}": tensor for name, tensor in head_tensors(dtype=dtype).items()}
    shard = shard_with(release, "regression_head.bias")
    edit(shard, lambda tensors: tensors.update(head))
    convert(release, tmp_path / "run", lm_folder)
    launch.show_steered(tmp_path / "run", "Describe the moon.", "bees", (0.0, 1.0), 2, 0.0, 0)
    convert(tmp_path / "run", tmp_path / "back")
    back, there = tensors_of(tmp_path / "back"), tensors_of(release)
    assert back.keys() == there.keys()
    for name, tensor in there.items():
        assert (back[name].dtype, back[name].shape) == (tensor.dtype, tensor.shape), name
        assert back[name].tobytes() == tensor.tobytes(), name
    assert json.loads((tmp_path / "back/config.json").read_text())["torch_dtype"] == "bfloat16"


def test_selection_head_of_a_cross_attention_run_goes_into_the_release(
    stuff: Path, lm_folder: Path, tmp_path: Path
) -> None:
    save_file(head_tensors(), stuff / HEAD_FILE)
    convert(stuff, tmp_path / "run", lm_folder)
    convert(tmp_path / "run", tmp_path / "release")
    read, step = read_release(tmp_path / "release", LM)
    assert step == 1234
    assert_same(read.selection, read_hyperstuff(stuff / WEIGHTS_FILE, LM).hypernet.selection)
    tensors = tensors_of(tmp_path / "release")
    for name, tensor in head_tensors().items():
        assert tensors[f"selection_head.{name}"].tobytes() == tensor.tobytes()


# The regression hypernetwork against transformers


@pytest.mark.parametrize("padded", [False, True])
def test_regression_vectors_are_those_of_transformers(padded: bool, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch", reason="not run: the regression hypernetwork against Hugging Face")
    transformers = pytest.importorskip("transformers", reason="not run: as above")
    # The window, which the hypernetwork has on all blocks and Gemma-2 on the even ones, is longer than any real text.
    lm = dataclasses.replace(CONFIGS["gemma2"], sliding_window=64)
    config = dataclasses.replace(REGRESSION, blocks=lm.layers)
    write_regression(Converted(random_hypernet(config, lm), 0), jnp.zeros(0), tmp_path)
    tensors = {name: torch.tensor(tensor) for name, tensor in load_file(tmp_path / WEIGHTS_FILE).items()}
    theirs = transformers.Gemma2ForCausalLM(transformers.Gemma2Config(**to_hugging_face(lm))).eval()
    theirs.set_attn_implementation("eager")
    weights = {name.removeprefix("base_model."): tensors[name] for name in tensors if name.startswith("base_model.")}
    theirs.load_state_dict(weights)

    rng = np.random.default_rng(0)
    tokens, pads = rng.integers(1, lm.vocab, (3, 9)), np.array([0, 2, 5]) * padded
    mask = np.arange(9) >= pads[:, None]
    with torch.no_grad():
        states = theirs(torch.tensor(tokens), attention_mask=torch.tensor(mask).long(), output_hidden_states=True)
        last = states.hidden_states[-1][:, -1]
        expected = (last @ tensors["regression_head.weight"].T + tensors["regression_head.bias"]).numpy()
    hypernet, _ = read_hyperstuff(tmp_path / WEIGHTS_FILE, lm)
    unused = jnp.zeros((3, 1, lm.width))
    with jax.default_matmul_precision("highest"):
        found = hypernet(tokens, mask, unused, jnp.ones((3, 1), bool), jnp.zeros((lm.vocab, lm.width)))
    assert np.abs(expected).max() > 0.5
    np.testing.assert_allclose(found, expected, atol=1e-5, rtol=1e-5)


# What cannot be converted leaves nothing behind


def edit(file: Path, change: Any) -> None:
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


def shard_with(release: Path, name: str) -> Path:
    index = json.loads((release / "model.safetensors.index.json").read_text())
    return release / index["weight_map"][name]


def refused(source: Path, lm_folder: Path | None, message: str, error: type[Exception] = WeightsError) -> None:
    """An error with this message, and neither the target nor anything beside it."""
    place = source.parent / "place"
    place.mkdir()
    before = files(source)
    with pytest.raises(error, match=message):
        convert(source, place / "run", lm_folder)
    assert list(place.iterdir()) == []
    assert files(source) == before


def test_a_missing_tensor_is_named(release: Path, lm_folder: Path) -> None:
    name = "layers.1.cross_attention.k_proj.weight"
    edit(shard_with(release, name), lambda tensors: tensors.pop(name))
    refused(release, lm_folder, rf"{release}: 1 tensors do not fit .*\n  missing +{name}: expected \(256, 16\)")


def test_a_misshapen_tensor_is_named(release: Path, lm_folder: Path) -> None:
    name = "layers.0.mlp.down_proj.weight"
    edit(shard_with(release, name), lambda tensors: tensors.update({name: tensors[name].T.copy()}))
    refused(release, lm_folder, rf"misshapen +{name}: expected \(16, 24\), found \(24, 16\)")


def test_a_truncated_shard_is_named(release: Path, lm_folder: Path) -> None:
    shard = shard_with(release, "regression_head.bias")
    shard.write_bytes(shard.read_bytes()[:-1])
    refused(release, lm_folder, rf"{shard} cannot be read")


def test_a_missing_shard_is_named(release: Path, lm_folder: Path) -> None:
    shard = shard_with(release, "regression_head.bias")
    shard.unlink()
    refused(release, lm_folder, rf"{shard} cannot be read")


def test_a_hyperstuff_tensor_that_is_missing_is_named(stuff: Path, lm_folder: Path) -> None:
    file = stuff / WEIGHTS_FILE
    edit(file, lambda tensors: tensors.pop("layers.1.mlp.up_proj.weight"))
    refused(stuff, lm_folder, rf"{file}: 1 tensors do not fit .*\n  missing +layers\.1\.mlp\.up_proj\.weight")


def test_a_hyperstuff_tensor_that_shows_a_size_is_needed(stuff: Path, lm_folder: Path) -> None:
    file = stuff / WEIGHTS_FILE
    edit(file, lambda tensors: tensors.pop("layers.0.self_attn.q_proj.weight"))
    refused(stuff, lm_folder, rf"{file}: layers\.0\.self_attn\.q_proj\.weight is missing")


def test_a_truncated_hyperstuff_file_is_named(stuff: Path, lm_folder: Path) -> None:
    file = stuff / WEIGHTS_FILE
    file.write_bytes(file.read_bytes()[:-1])
    refused(stuff, lm_folder, rf"{file} cannot be read")


REGRESSION_DAMAGES: dict[str, tuple[Any, str]] = {
    "missing": (
        lambda tensors: tensors.pop("base_model.model.layers.1.mlp.up_proj.weight"),
        r"missing +base_model\.model\.layers\.1\.mlp\.up_proj\.weight: expected \(24, 16\)",
    ),
    "misshapen": (
        lambda tensors: tensors.update({"regression_head.weight": np.zeros((8, 16), np.float32)}),
        r"misshapen +regression_head\.weight: expected \(16, 16\), found \(8, 16\)",
    ),
    "a block too many": (
        lambda tensors: tensors.update({"base_model.model.layers.3.mlp.up_proj.weight": np.zeros((24, 16))}),
        r"extra +base_model\.model\.layers\.3\.mlp\.up_proj\.weight",
    ),
    "no table": (
        lambda tensors: tensors.pop("base_model.model.embed_tokens.weight"),
        r"base_model\.model\.embed_tokens\.weight is missing or no matrix",
    ),
    "untied": (
        lambda tensors: tensors["base_model.lm_head.weight"].__setitem__((5, 3), 7.0),
        r"base_model\.lm_head\.weight is not a copy of base_model\.model\.embed_tokens\.weight, but Gemma-2 has one",
    ),
    "another dtype": (
        lambda tensors: tensors.update(
            {"base_model.lm_head.weight": tensors["base_model.lm_head.weight"].astype(np.float32)}
        ),
        r"base_model\.lm_head\.weight is not a copy of",
    ),
}


@pytest.mark.parametrize("damage", REGRESSION_DAMAGES)
def test_a_damaged_regression_hypernetwork(regression: Path, lm_folder: Path, damage: str) -> None:
    change, message = REGRESSION_DAMAGES[damage]
    edit(regression / WEIGHTS_FILE, change)
    refused(regression, lm_folder, f"(?s){regression / WEIGHTS_FILE}: .*{message}")


def test_a_truncated_regression_hypernetwork(regression: Path, lm_folder: Path) -> None:
    file = regression / WEIGHTS_FILE
    file.write_bytes(file.read_bytes()[:-1])
    refused(regression, lm_folder, rf"{file} cannot be read")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"width": 32}, "width is 16, but the base LM's is 32; give --lm the one"),
        ({"family": "llama"}, "family is 'ge"),
    ],
)
def test_a_regression_hypernetwork_of_another_lm(regression: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_hyperstuff(regression / WEIGHTS_FILE, dataclasses.replace(LM, **change))


HEAD_DAMAGES: dict[str, tuple[Any, str]] = {
    "missing": (lambda tensors: tensors.pop("proj.bias"), r"missing +selection_head\.proj\.bias: expected \(1,\)"),
    "half a norm": (lambda tensors: tensors.pop("ln.bias"), r"missing +selection_head\.ln\.bias: expected \(32,\)"),
    "of another width": (
        lambda tensors: tensors.update({"proj.weight": np.zeros((1, 64), np.float32)}),
        r"misshapen +selection_head\.proj\.weight: expected \(1, 32\), found \(1, 64\)",
    ),
    "extra": (lambda tensors: tensors.update({"proj.scale": np.zeros(1)}), r"extra +selection_head\.proj\.scale"),
    "no count": (lambda tensors: tensors.pop("_step"), r"selection_head\._step is missing; copy"),
    "two temperatures": (
        lambda tensors: tensors.update({"_temperature": np.ones(2, np.float32)}),
        r"selection_head\._temperature has shape \(2,\), expected \(\)",
    ),
}


@pytest.mark.parametrize("damage", HEAD_DAMAGES)
def test_a_damaged_selection_head(stuff: Path, lm_folder: Path, damage: str) -> None:
    tensors = head_tensors()
    change, message = HEAD_DAMAGES[damage]
    change(tensors)
    save_file(tensors, stuff / HEAD_FILE)
    refused(stuff, lm_folder, rf"(?s){stuff / WEIGHTS_FILE} and HyperSteer_selection_head\.safetensors: .*{message}")


def test_a_truncated_selection_head(regression: Path, lm_folder: Path) -> None:
    save_file(head_tensors(), regression / HEAD_FILE)
    (regression / HEAD_FILE).write_bytes((regression / HEAD_FILE).read_bytes()[:-1])
    refused(regression, lm_folder, rf"{regression / HEAD_FILE} cannot be read")


def test_a_temperature_that_cannot_be(stuff: Path, lm_folder: Path) -> None:
    save_file(head_tensors() | {"_temperature": np.asarray(-0.5, np.float32)}, stuff / HEAD_FILE)
    refused(stuff, lm_folder, r"selection\.temperature_end is -0\.5; give a value above 0", ConfigError)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"query_pre_attn_scalar": None}, r"config\.json: query_pre_attn_scalar is None; give the number"),
        ({"num_hidden_layers": "two"}, r"config\.json: num_hidden_layers is 'two'"),
        ({"attn_logit_softcapping": 30.0}, r"attention_softcap is 30\.0, but the base LM's is 50\.0; give --lm"),
        ({"hidden_size": 32}, r"width is 32, but the base LM's is 16; give --lm"),
    ],
    ids=["missing", "no number", "other arithmetic", "other width"],
)
def test_a_config_that_does_not_fit(release: Path, lm_folder: Path, change: dict[str, Any], message: str) -> None:
    values = json.loads((release / "config.json").read_text()) | change
    (release / "config.json").write_text(json.dumps(values))
    refused(release, lm_folder, message, ConfigError)


def test_a_config_that_is_cut_short(release: Path, lm_folder: Path) -> None:
    (release / "config.json").write_text('{"model_type": "hyp')
    refused(release, lm_folder, r"config\.json is not JSON")


def test_hyperstuff_with_another_kind_of_lm(stuff: Path) -> None:
    lm = dataclasses.replace(LM, head_dim=128)
    with pytest.raises(ConfigError, match="head_dim is 256, but the base LM's is 128; give --lm"):
        read_hyperstuff(stuff / WEIGHTS_FILE, lm)


def test_a_release_needs_its_lm_named(release: Path) -> None:
    refused(release, None, "--lm is not given, and .*release does not name its base LM", ConfigError)


def test_a_layer_that_the_lm_does_not_have(release: Path, lm_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"steering\.layers is \(20,\); the base LM has blocks 0 to 2"):
        convert(release, tmp_path / "run", lm_folder, layer=20)
    assert not (tmp_path / "run").exists()


def test_what_is_neither(tmp_path: Path, lm_folder: Path) -> None:
    (tmp_path / "empty").mkdir()
    refused(
        tmp_path / "empty", lm_folder, "neither a run nor a release; give a folder with config.json and checkpoints"
    )


def test_a_target_that_exists_is_left_alone(release: Path, lm_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run/mine").write_text("kept")
    with pytest.raises(WeightsError, match="run exists; give a name that is free"):
        convert(release, tmp_path / "run", lm_folder)
    assert files(tmp_path / "run") == {"mine": b"kept"}


def test_a_write_that_fails_leaves_nothing(
    release: Path, lm_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(checkpoint, "save", full)
    refused(release, lm_folder, r"run cannot be written \(no space left on device\)")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hypernet": HypernetConfig("in_context")}, r"hypernet\.variant is 'in_context'; the releases have cross_att"),
        ({"hypernet": HypernetConfig("no_context")}, r"hypernet\.final_norm is False; the release has True only"),
        ({"hypernet": REGRESSION_OF(blocks=2)}, r"hypernet\.blocks is 2; the release has 3 only"),
        ({"hypernet": REGRESSION_OF(heads=4)}, r"hypernet\.heads is 4; the release has 2 only"),
        ({"hypernet": REGRESSION_OF(attention_scale=0.5)}, r"hypernet\.attention_scale is 0\.5; the release has 0\.06"),
        ({"hypernet": REGRESSION_OF(head="mlp")}, r"hypernet\.head is 'mlp'; the release has 'linear' only"),
        ({"hypernet": HypernetConfig(head="mlp")}, r"hypernet\.head is 'mlp'; the release has 'linear' only"),
        ({"hypernet": HypernetConfig(final_norm=True)}, r"hypernet\.final_norm is True"),
        ({"hypernet": HypernetConfig(memory_norm=True)}, r"hypernet\.memory_norm is True"),
        ({"steering": SteeringConfig(context="leaving")}, r"steering\.context is 'leaving'"),
    ],
    ids=lambda value: None if isinstance(value, str) else "-".join(value),
)
def test_a_run_that_the_release_cannot_express(change: dict[str, Any], message: str) -> None:
    check_expressible(RunConfig(), LM)
    check_expressible(RunConfig(hypernet=REGRESSION), LM)
    with pytest.raises(ConfigError, match=message):
        check_expressible(RunConfig(**change), LM)


def test_a_run_of_another_family_stays() -> None:
    with pytest.raises(ConfigError, match="family llama; the release has gemma2 only"):
        check_expressible(RunConfig(), dataclasses.replace(LM, family="llama"))


def test_a_run_that_is_refused_leaves_nothing(lm_folder: Path, tmp_path: Path) -> None:
    config = HypernetConfig(blocks=1, init="random", final_norm=True)
    write_run(tmp_path / "run", random_hypernet(config, LM), lm_folder)
    refused(tmp_path / "run", None, r"hypernet\.final_norm is True", ConfigError)
