"""Meshes, and where weights and batches lie on them."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from hypersteer_jax.config import ConfigError, HypernetConfig
from hypersteer_jax.models.hypernet import Hypernet
from hypersteer_jax.sharding import (
    BATCH,
    SPLIT,
    Share,
    batch_spec,
    gather,
    look_up,
    make_mesh,
    mesh_is_set,
    shard_batch,
    shard_weights,
    shardings,
    share_of,
    weight_spec,
)
from tests.models.tiny import CONFIGS


def spec4(axis: str, at: int) -> P:
    return P(*(axis if place == at else None for place in range(4)))


def test_mesh_has_three_explicit_axes() -> None:
    mesh = make_mesh(data=2, fsdp=4)
    assert dict(mesh.shape) == {"data": 2, "fsdp": 4, "tensor": 1}
    assert set(mesh.axis_types) == {AxisType.Explicit}
    assert make_mesh().size == 1  # the default needs no more than one device


def test_mesh_takes_the_devices_it_is_given() -> None:
    chosen = jax.devices()[5:7]
    assert make_mesh(fsdp=2, devices=chosen).devices.ravel().tolist() == chosen


def test_mesh_that_needs_more_devices_than_there_are() -> None:
    with pytest.raises(ValueError, match="data=2 x fsdp=8 x tensor=1 needs 16 devices, 8 found"):
        make_mesh(data=2, fsdp=8)
    with pytest.raises(ValueError, match="needs 2 devices, 1 found"):
        make_mesh(tensor=2, devices=jax.devices()[:1])


def test_fsdp_takes_what_is_left() -> None:
    assert dict(make_mesh(data=2, fsdp=None, tensor=2).shape) == {"data": 2, "fsdp": 2, "tensor": 2}
    assert dict(make_mesh(fsdp=None, devices=jax.devices()[:1]).shape) == {"data": 1, "fsdp": 1, "tensor": 1}


@dataclasses.dataclass(frozen=True)
class Chip:
    """A device of a pod, as far as making a mesh looks at it."""

    id: int
    process_index: int
    slice_index: int
    platform: str = "cpu"
    device_kind: str = "cpu"
    client: str = "pod"


def test_slices_are_crossed_by_the_data_axis_only() -> None:
    chips = [Chip(index, index // 4, index % 2) for index in range(8)]
    mesh = make_mesh(data=4, fsdp=2, slices=2, devices=chips)
    assert dict(mesh.shape) == {"data": 4, "fsdp": 2, "tensor": 1}
    slices = np.array([chip.slice_index for chip in mesh.devices.ravel()]).reshape(4, 2)
    np.testing.assert_array_equal(slices, [[0, 0], [0, 0], [1, 1], [1, 1]])
    for data, slices in ((4, 4), (1, 3)):
        with pytest.raises(ConfigError, match=rf"mesh.slices is {slices} and mesh.data {data}; the devices are in 2"):
            make_mesh(data=data, fsdp=None, slices=slices, devices=chips)


def test_idle_devices_of_several_processes_are_refused() -> None:
    chips = [Chip(index, index // 4, 0) for index in range(8)]
    with pytest.raises(ConfigError, match=r"data=2 x fsdp=2 x tensor=1 leaves 4 of 8 devices idle; use all"):
        make_mesh(data=2, fsdp=2, devices=chips)


@pytest.mark.parametrize(
    ("name", "shape", "specs"),  # for fsdp=4, for tensor=4, for both at 2
    [
        ("hypernet.head", (98, 32), (P(None, "fsdp"), P(None, "tensor"), P(None, ("fsdp", "tensor")))),
        ("head", (64, 32), (P("fsdp", None), P("tensor", None), P(("fsdp", "tensor"), None))),
        ("head", (34, 33), (P(), P(), P("fsdp", None))),  # 34 is divided by 2 only
        ("mu.embedding", (96, 32), (P(None, "fsdp"), P(None, "tensor"), P(None, ("fsdp", "tensor")))),
        ("embedding", (96, 30), (P(), P(), P(None, "fsdp"))),
        ("blocks.attention.q", (8, 32, 4, 16), (spec4("fsdp", 1), spec4("tensor", 2), P(None, "fsdp", "tensor", None))),
        ("blocks.cross.v", (8, 32, 4, 64), (spec4("fsdp", 3), spec4("tensor", 2), P(None, None, "tensor", "fsdp"))),
        ("blocks.attention.o", (8, 4, 16, 32), (spec4("fsdp", 3), spec4("tensor", 1), P(None, "tensor", None, "fsdp"))),
        ("blocks.mlp.gate", (2, 32, 48), (P(None, None, "fsdp"), P(None, None, "tensor"), P(None, "fsdp", "tensor"))),
        ("head_mlp.down", (48, 32), (P("fsdp", None), P("tensor", None), P("tensor", "fsdp"))),
        (
            "blocks.attention.k_bias",
            (64, 4, 8),
            (P(None, None, "fsdp"), P(None, "tensor", None), P(None, "tensor", "fsdp")),
        ),
        ("blocks.post_mlp", (64, 32), (P(), P(), P())),  # the stack is not an axis, and a vector stays whole
        ("final_norm", (32,), (P(), P(), P())),
        ("step", (), (P(), P(), P())),
    ],
)
def test_where_a_weight_is_split(name: str, shape: tuple[int, ...], specs: tuple[P, P, P]) -> None:
    meshes = make_mesh(data=2, fsdp=4), make_mesh(data=2, tensor=4), make_mesh(data=2, fsdp=2, tensor=2)
    assert tuple(weight_spec(name, shape, mesh) for mesh in meshes) == specs
    assert weight_spec(name, shape, make_mesh(data=8)) == P()


def test_every_weight_that_tensor_splits_is_one() -> None:
    config = dataclasses.replace(CONFIGS["qwen2"], qk_norm=True)  # with biases
    hypernet = jax.eval_shape(lambda: Hypernet(HypernetConfig(blocks=2, head="mlp"), config, nnx.Rngs(0)))
    placed = jax.tree_util.tree_leaves_with_path(shardings(hypernet, make_mesh(tensor=2)))
    split = {jax.tree_util.keystr(path, simple=True, separator=".") for path, at in placed if "tensor" in at.spec}
    found = {end for end in SPLIT if any(name.removesuffix(".value").endswith(end) for name in split)}
    assert found == set(SPLIT) - {"cross.q_bias", "cross.k_bias", "cross.v_bias"}  # which no family has


def test_shard_weights_and_batch_place_every_array() -> None:
    mesh, table = make_mesh(data=2, fsdp=4), np.arange(8 * 12.0).reshape(8, 12)
    weights = shard_weights({"head": table, "step": np.zeros(())}, mesh)
    assert weights["head"].sharding.spec == P(None, "fsdp")
    assert weights["head"].addressable_shards[0].data.shape == (8, 3)
    assert weights["step"].sharding.spec == P()
    batch = shard_batch({"tokens": table}, mesh)["tokens"]
    assert batch.sharding.spec == BATCH == P(("data", "fsdp"))
    assert batch.addressable_shards[0].data.shape == (1, 12)
    for placed in (weights["head"], batch):
        np.testing.assert_array_equal(placed, table)


def test_one_process_holds_all_parts_of_a_batch() -> None:
    assert share_of(make_mesh(data=2, fsdp=2, tensor=2)) == Share(4, (0, 1, 2, 3))
    assert Share(4, (1, 3)).of(np.arange(8)).tolist() == [2, 3, 6, 7]


def test_without_a_mesh_nothing_moves() -> None:
    tree = {"w": jnp.ones((4, 4))}
    assert gather(tree) is tree
    assert not mesh_is_set()
    assert batch_spec() is None


def test_gather_makes_weights_whole_and_scatters_their_gradient() -> None:
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    with jax.set_mesh(mesh):
        assert mesh_is_set()
        assert batch_spec() == BATCH
        stored = shard_weights({"head": np.arange(32.0).reshape(4, 8), "mlp.up": np.arange(16.0).reshape(4, 4)}, mesh)
        whole = gather(stored)
        assert whole["head"].sharding.spec == P(None, None)
        assert whole["mlp.up"].sharding.spec == P(None, "tensor")  # used as it is split
        gradient = jax.jit(jax.grad(lambda w: sum(jnp.sum(jnp.square(x)) for x in gather(w).values())))(stored)
    for name, weight in stored.items():
        np.testing.assert_array_equal(whole[name], weight)
        np.testing.assert_array_equal(gradient[name], 2 * weight)
        assert gradient[name].sharding.spec == weight.sharding.spec


@pytest.mark.parametrize("width", [16, 4, 5])  # over eight devices, over four, and not
def test_looking_up_moves_tokens_not_the_table(width: int) -> None:
    rng = np.random.default_rng(0)
    table, tokens = rng.normal(size=(50, width)), rng.integers(0, 50, (8, 5))

    def loss(table: jax.Array, tokens: jax.Array) -> jax.Array:
        return jnp.sum(jnp.square(look_up(table, tokens)))

    alone = jax.grad(loss)(jnp.asarray(table), tokens)
    mesh = make_mesh(fsdp=4, tensor=2)
    with jax.set_mesh(mesh):
        placed, shards = shard_weights({"embedding": table}, mesh)["embedding"], shard_batch(tokens, mesh)
        found = jax.jit(look_up)(placed, shards)
        gradient = jax.jit(jax.grad(loss))(placed, shards)
        text = jax.jit(jax.grad(loss)).lower(placed, shards).compile().as_text()
    np.testing.assert_array_equal(found, table.astype(np.float32)[tokens])
    assert found.sharding.spec[0] == BATCH[0]
    np.testing.assert_allclose(gradient, alone, rtol=1e-6)
    assert gradient.sharding.is_equivalent_to(placed.sharding, 2)
    moved = re.findall(r"f32\[50,\d+\]\S* (?:all-gather|all-reduce|all-to-all|collective-permute)", text)
    assert bool(moved) == (width == 5)
