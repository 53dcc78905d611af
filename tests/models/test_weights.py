import dataclasses
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors.numpy import load_file, save_file

from hypersteer_jax.config import ConfigError
from hypersteer_jax.models import weights
from hypersteer_jax.models.lm import LM, cast
from hypersteer_jax.models.presets import PRESETS
from hypersteer_jax.models.weights import WeightsError, lm_from_tensors, lm_tensors, load_lm, resolve, save_lm
from hypersteer_jax.sharding import make_mesh, shardings
from tests.models.tiny import CONFIGS, random_lm

SHARD = 20_000  # bytes; each tiny LM becomes several files


def assert_same(a: LM, b: LM) -> None:
    """Bit for bit, and in the same dtype."""
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(x, y)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    save_lm(random_lm(CONFIGS["gemma2"]), tmp_path / "lm")
    return tmp_path / "lm"


@pytest.mark.parametrize("max_shard", [weights.MAX_SHARD, SHARD], ids=["single", "sharded"])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", CONFIGS)
def test_round_trip_through_files_is_exact(name: str, dtype: jnp.dtype, max_shard: int, tmp_path: Path) -> None:
    lm = cast(random_lm(CONFIGS[name]), dtype)
    save_lm(lm, tmp_path, max_shard)
    assert (tmp_path / "model.safetensors").exists() == (max_shard != SHARD)
    loaded = load_lm(tmp_path, dtype)
    assert loaded.config == lm.config
    assert_same(loaded, lm)
    assert_same(lm_from_tensors(lm.config, lm_tensors(lm), dtype), lm)


def test_names_and_axes_are_those_of_hugging_face() -> None:
    lm = random_lm(dataclasses.replace(CONFIGS["qwen3"], qkv_bias=True, tied=False))
    tensors, block, h = lm_tensors(lm), jax.tree.map(np.asarray, lm.blocks), lm.config.head_dim
    attention = "model.layers.2.self_attn"
    for n, i, d in [(0, 0, 0), (3, 5, 7), (1, 15, 31)]:
        kv = n // 2
        assert tensors[f"{attention}.q_proj.weight"][n * h + i, d] == block.attention.q[...][2, d, n, i]
        assert tensors[f"{attention}.k_proj.weight"][kv * h + i, d] == block.attention.k[...][2, d, kv, i]
        assert tensors[f"{attention}.v_proj.weight"][kv * h + i, d] == block.attention.v[...][2, d, kv, i]
        assert tensors[f"{attention}.o_proj.weight"][d, n * h + i] == block.attention.o[...][2, n, i, d]
        assert tensors[f"{attention}.q_proj.bias"][n * h + i] == block.attention.q_bias[...][2, n, i]
        assert tensors[f"{attention}.k_proj.bias"][kv * h + i] == block.attention.k_bias[...][2, kv, i]
        assert tensors[f"{attention}.v_proj.bias"][kv * h + i] == block.attention.v_bias[...][2, kv, i]
    np.testing.assert_array_equal(tensors[f"{attention}.q_norm.weight"], block.attention.q_norm[...][2])
    np.testing.assert_array_equal(tensors[f"{attention}.k_norm.weight"], block.attention.k_norm[...][2])
    np.testing.assert_array_equal(tensors["model.layers.0.mlp.gate_proj.weight"], block.mlp.gate[...][0].T)
    np.testing.assert_array_equal(tensors["model.layers.0.mlp.up_proj.weight"], block.mlp.up[...][0].T)
    np.testing.assert_array_equal(tensors["model.layers.3.mlp.down_proj.weight"], block.mlp.down[...][3].T)
    np.testing.assert_array_equal(tensors["model.layers.1.input_layernorm.weight"], block.pre_attention[...][1])
    np.testing.assert_array_equal(tensors["model.layers.1.post_attention_layernorm.weight"], block.pre_mlp[...][1])
    np.testing.assert_array_equal(tensors["model.embed_tokens.weight"], lm.embedding[...])
    np.testing.assert_array_equal(tensors["model.norm.weight"], lm.final_norm[...])
    np.testing.assert_array_equal(tensors["lm_head.weight"], lm.head[...].T)
    assert len(tensors) == 3 + 4 * 14


def test_gemma2_has_four_norms_in_each_block() -> None:
    lm = random_lm(CONFIGS["gemma2"])
    tensors = lm_tensors(lm)
    names = {
        "input_layernorm": lm.blocks.pre_attention,
        "post_attention_layernorm": lm.blocks.post_attention,
        "pre_feedforward_layernorm": lm.blocks.pre_mlp,
        "post_feedforward_layernorm": lm.blocks.post_mlp,
    }
    for name, weight in names.items():
        np.testing.assert_array_equal(tensors[f"model.layers.3.{name}.weight"], weight[...][3])
    assert "lm_head.weight" not in tensors


def test_index_names_every_tensor_and_keeps_to_the_limit(tmp_path: Path) -> None:
    lm = random_lm(CONFIGS["gemma2"])
    save_lm(lm, tmp_path, SHARD)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    tensors = lm_tensors(lm)
    assert index["weight_map"].keys() == tensors.keys()
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())
    files = sorted(set(index["weight_map"].values()))
    assert files == [f"model-{i:05}-of-{len(files):05}.safetensors" for i in range(1, len(files) + 1)]
    for file in files:
        shard = load_file(tmp_path / file)
        assert sum(tensor.nbytes for tensor in shard.values()) <= SHARD
        for name, tensor in shard.items():
            assert index["weight_map"][name] == file
            np.testing.assert_array_equal(tensor, tensors[name])


def test_saving_again_leaves_nothing_of_the_old_weights(tmp_path: Path) -> None:
    old, new = random_lm(CONFIGS["gemma2"], seed=1), random_lm(CONFIGS["gemma2"], seed=2)
    (tmp_path / "tokenizer.json").write_text("{}")
    for sizes in [(SHARD, weights.MAX_SHARD), (weights.MAX_SHARD, SHARD)]:
        save_lm(old, tmp_path, sizes[0])
        save_lm(new, tmp_path, sizes[1])
        np.testing.assert_array_equal(load_lm(tmp_path, jnp.float32).embedding[...], new.embedding[...])
        assert (tmp_path / "model.safetensors").exists() != (tmp_path / "model.safetensors.index.json").exists()
    assert (tmp_path / "tokenizer.json").exists()


def test_an_lm_that_hugging_face_cannot_express_is_not_written(tmp_path: Path) -> None:
    lm = random_lm(dataclasses.replace(CONFIGS["llama"], qk_norm=True))
    with pytest.raises(ConfigError, match="qk_norm"):
        save_lm(lm, tmp_path / "lm")
    assert not (tmp_path / "lm").exists()


def test_dtype_is_the_one_asked_for(tmp_path: Path) -> None:
    lm = random_lm(CONFIGS["qwen2"])
    save_lm(lm, tmp_path)
    assert_same(load_lm(tmp_path, jnp.bfloat16), cast(load_lm(tmp_path, jnp.float32), jnp.bfloat16))
    save_lm(cast(lm, jnp.bfloat16), tmp_path)
    assert_same(load_lm(tmp_path, jnp.float32), cast(load_lm(tmp_path, jnp.bfloat16), jnp.float32))
    assert json.loads((tmp_path / "config.json").read_text())["torch_dtype"] == "bfloat16"


@pytest.mark.parametrize("axes", [{"fsdp": 8}, {"data": 2, "tensor": 2}, {"data": 2, "fsdp": 2, "tensor": 2}], ids=str)
@pytest.mark.parametrize("name", ["gemma2", "qwen2"])  # a tied head, and a head and biases
def test_weights_are_read_straight_into_their_places(
    name: str, axes: dict[str, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_lm(random_lm(CONFIGS[name]), tmp_path)
    whole, mesh, read = load_lm(tmp_path, jnp.float32), make_mesh(**axes), []

    def watched(handle, name, index):
        found = handle.get_slice(name)[index] if index else handle.get_tensor(name)
        read.append((name, found.size / np.prod(handle.get_slice(name).get_shape())))
        return found

    monkeypatch.setattr(weights, "_slice", watched)
    split = load_lm(tmp_path, jnp.float32, mesh)
    assert_same(split, whole)
    for leaf, wanted in zip(jax.tree.leaves(split), jax.tree.leaves(shardings(split, mesh)), strict=True):
        assert leaf.sharding == wanted
    parts = axes.get("fsdp", 1) * axes.get("tensor", 1)
    for tensor in ("mlp.gate_proj", "mlp.down_proj", "self_attn.q_proj", "self_attn.o_proj"):
        assert {share for name, share in read if tensor in name and "bias" not in name} == {1 / parts}, tensor


def test_part_of_an_axis_that_is_no_run_in_the_file() -> None:
    """The channels of a head lie together only within it, so whole heads are read, and then cut."""
    lm = random_lm(CONFIGS["llama"])
    sizes, tensors = weights._sizes(lm.config), lm_tensors(lm)
    for name, path, here, there in (
        ("q_proj", lm.blocks.attention.q, "D N H", "NH D"),
        ("o_proj", lm.blocks.attention.o, "N H D", "D NH"),
    ):
        array = np.asarray(path[...])[1]
        cuts = {"D": range(8, 24), "N": range(1, 3), "H": range(3, 9)}
        slot = weights.Slot("", None, there, here)
        stored = weights._in_memory(tensors[f"model.layers.1.self_attn.{name}.weight"])
        found = weights._read_tensor(stored, slot, [cuts[axis] for axis in here.split()], sizes)
        np.testing.assert_array_equal(found, array[tuple(slice(cuts[a].start, cuts[a].stop) for a in here.split())])


def test_a_tied_lm_may_bring_its_head_twice(saved: Path) -> None:
    tensors = load_file(saved / "model.safetensors")
    save_file(tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"]}, saved / "model.safetensors")
    assert load_lm(saved, jnp.float32).head is None


def test_an_untied_lm_needs_its_head() -> None:
    tensors = lm_tensors(random_lm(CONFIGS["llama"]))
    del tensors["lm_head.weight"]
    with pytest.raises(WeightsError, match=r"1 tensors do not fit.*\n  missing +lm_head.weight: expected \(97, 32\)$"):
        lm_from_tensors(CONFIGS["llama"], tensors, jnp.float32)


def test_everything_wrong_is_listed_at_once(saved: Path) -> None:
    tensors = load_file(saved / "model.safetensors")
    del tensors["model.norm.weight"], tensors["model.layers.3.mlp.up_proj.weight"]
    tensors["model.layers.4.mlp.up_proj.weight"] = np.zeros((48, 32), np.float32)
    tensors["model.layers.0.self_attn.q_proj.weight"] = np.zeros((32, 64), np.float32)  # the wrong way round
    tensors["model.layers.0.self_attn.q_proj.bias"] = np.zeros(64, np.float32)
    save_file(tensors, saved / "model.safetensors")
    with pytest.raises(WeightsError) as error:
        load_lm(saved, jnp.float32)
    first, *rest = str(error.value).splitlines()
    assert first.startswith(f"{saved}: 5 tensors do not fit a gemma2 model of 4 blocks")
    assert rest == [
        "  extra      model.layers.0.self_attn.q_proj.bias: (64,)",
        "  extra      model.layers.4.mlp.up_proj.weight: (48, 32)",
        "  misshapen  model.layers.0.self_attn.q_proj.weight: expected (64, 32), found (32, 64)",
        "  missing    model.layers.3.mlp.up_proj.weight: expected (48, 32)",
        "  missing    model.norm.weight: expected (32,)",
    ]


def test_shapes_are_checked_before_anything_is_allocated() -> None:
    # 109 GB in float32: a skeleton of real arrays would not fit here
    with pytest.raises(WeightsError, match="508 tensors do not fit a gemma2 model of 46 blocks"):
        lm_from_tensors(PRESETS["gemma-2-27b"], {}, jnp.float32)


@pytest.mark.parametrize("keep", [0, 5, 1000, -1], ids=["empty", "no header", "half a header", "last byte missing"])
def test_a_truncated_file_is_named(saved: Path, keep: int) -> None:
    file = saved / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(WeightsError, match=rf"{file} cannot be read: .*copy it again"):
        load_lm(saved, jnp.float32)


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    save_lm(random_lm(CONFIGS["gemma2"]), tmp_path, SHARD)
    shard = sorted(tmp_path.glob("model-00002-*"))[0]
    shard.unlink()
    with pytest.raises(WeightsError, match=rf"{shard} cannot be read"):
        load_lm(tmp_path, jnp.float32)


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        (".", "lm is not a directory"),
        ("config.json", "config.json cannot be read.*Hugging Face or llama2.c"),
        ("model.safetensors", "neither model.safetensors nor model.safetensors.index.json.*save_pretrained"),
    ],
)
def test_what_is_missing_is_named(saved: Path, missing: str, message: str) -> None:
    if missing == ".":
        shutil.rmtree(saved)
    else:
        (saved / missing).unlink()
    with pytest.raises(WeightsError, match=message):
        load_lm(saved, jnp.float32)


def test_a_damaged_config_is_named(saved: Path) -> None:
    (saved / "config.json").write_text('{"model_type": "gem')
    with pytest.raises(WeightsError, match=r"config.json is not JSON"):
        load_lm(saved, jnp.float32)


def test_resolve_prefers_a_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "snapshot_download", lambda name, allow_patterns: f"/hub/{name}/{len(allow_patterns)}")
    assert resolve(str(tmp_path)) == tmp_path
    assert resolve("google/gemma-2-2b").parent == Path("/hub/google/gemma-2-2b")


def test_resolve_says_what_was_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(name: str, allow_patterns: list[str]) -> str:
        raise LocalEntryNotFoundError("no network, and not in the cache")

    monkeypatch.setattr(weights, "snapshot_download", offline)
    with pytest.raises(
        WeightsError, match=r"'google/gemma-2-2b' is not a directory.*not in the cache\nGive a directory"
    ):
        resolve("google/gemma-2-2b")
    monkeypatch.undo()
    with pytest.raises(WeightsError, match=r"'no/such/directory' is not a directory, and as a hub id"):
        resolve("no/such/directory")


def write_llama2c(path: Path, tensors: dict[str, np.ndarray]) -> None:
    config = {"dim": 16, "hidden_dim": 24, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "vocab_size": 11}
    (path / "config.json").write_text(json.dumps(config))
    np.savez(path / "tiny.npz", **tensors)


def llama2c_tensors() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    shapes = {
        "wq": (16, 16),
        "wk": (8, 16),
        "wv": (8, 16),
        "wo": (16, 16),
        "w1": (24, 16),
        "w2": (16, 24),
        "w3": (24, 16),
    }
    shapes |= {"attention_norm": (16,), "ffn_norm": (16,)}
    tensors = {f"layers.{i}.{name}": rng.normal(size=shape) for i in range(2) for name, shape in shapes.items()}
    tensors |= {"tok_embeddings": rng.normal(size=(11, 16)), "norm": rng.normal(size=16)}
    return {name: tensor.astype(np.float32) for name, tensor in tensors.items()}


def test_llama2c_pairs_become_halves(tmp_path: Path) -> None:
    tensors = llama2c_tensors()
    write_llama2c(tmp_path, tensors)
    lm = load_lm(tmp_path, jnp.float32)
    for block, name, ours in [(0, "wq", lm.blocks.attention.q), (1, "wk", lm.blocks.attention.k)]:
        for head in range(2):
            rows = tensors[f"layers.{block}.{name}"][4 * head : 4 * head + 4]  # two pairs of neighbours
            np.testing.assert_array_equal(ours[...][block, :, head].T, rows[[0, 2, 1, 3]])
    np.testing.assert_array_equal(lm.blocks.attention.v[...][1, :, 1].T, tensors["layers.1.wv"][4:])
    np.testing.assert_array_equal(lm.blocks.mlp.gate[...][0], tensors["layers.0.w1"].T)
    np.testing.assert_array_equal(lm.blocks.mlp.down[...][0], tensors["layers.0.w2"].T)
    np.testing.assert_array_equal(lm.blocks.mlp.up[...][0], tensors["layers.0.w3"].T)


def test_llama2c_errors(tmp_path: Path) -> None:
    tensors = llama2c_tensors()
    write_llama2c(tmp_path, {name: tensor for name, tensor in tensors.items() if name != "layers.1.wo"})
    with pytest.raises(WeightsError, match=r"missing +layers.1.wo: expected \(16, 16\)"):
        load_lm(tmp_path, jnp.float32)
    (tmp_path / "tiny.npz").write_bytes((tmp_path / "tiny.npz").read_bytes()[:500])
    with pytest.raises(WeightsError, match=r"tiny.npz cannot be read"):
        load_lm(tmp_path, jnp.float32)
    (tmp_path / "tiny.npz").unlink()
    with pytest.raises(WeightsError, match=r"has 0 .npz files"):
        load_lm(tmp_path, jnp.float32)


@pytest.mark.parametrize("name", ["stories260K", "babyllama_char361"])
def test_trained_llama2c_models_say_what_they_said(name: str, shared_data: Path) -> None:
    golden = json.loads((shared_data / "lm/golden.json").read_text())[name]
    lm = load_lm(shared_data / "lm" / name, jnp.float32)
    tokens = jnp.asarray([golden["prompt_ids"]])
    with jax.default_matmul_precision("highest"):
        logits = np.asarray(jax.jit(LM.__call__)(lm, tokens, jnp.ones_like(tokens, bool)))[0]
    top = np.argsort(-logits[-1])[:10]
    assert top.tolist() == golden["top10_ids"]
    np.testing.assert_allclose(logits[-1, top], golden["top10_logits"], atol=2e-4)  # given to four decimals
    assert np.linalg.norm(logits) == pytest.approx(golden["logits_l2"], abs=1e-2)
