"""Meshes, and where weights and batches lie on them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from hypersteer_jax.sharding import (
    BATCH,
    batch_spec,
    gather,
    make_mesh,
    mesh_is_set,
    shard_batch,
    shard_weights,
    weight_spec,
)


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


@pytest.mark.parametrize(
    ("shape", "spec"),
    [
        ((97, 32), P(None, "fsdp")),  # 97 is not divisible
        ((4, 32, 48), P(None, None, "fsdp")),  # the largest
        ((4, 64, 48), P(None, "fsdp", None)),
        ((2, 8, 8), P(None, "fsdp", None)),  # the first of the largest
        ((97, 30), P()),
        ((1, 1), P()),
        ((), P()),
    ],
)
def test_weight_is_split_along_its_largest_divisible_axis(shape: tuple[int, ...], spec: P) -> None:
    assert weight_spec(shape, make_mesh(data=2, fsdp=4)) == spec
    assert weight_spec(shape, make_mesh(data=8)) == P()


def test_shard_weights_and_batch_place_every_array() -> None:
    mesh, table = make_mesh(data=2, fsdp=4), np.arange(8 * 12.0).reshape(8, 12)
    weights = shard_weights({"w": table, "step": np.zeros(())}, mesh)
    assert weights["w"].sharding.spec == P(None, "fsdp")
    assert weights["w"].addressable_shards[0].data.shape == (8, 3)
    assert weights["step"].sharding.spec == P()
    batch = shard_batch({"tokens": table}, mesh)["tokens"]
    assert batch.sharding.spec == BATCH == P(("data", "fsdp"))
    assert batch.addressable_shards[0].data.shape == (1, 12)
    for placed in (weights["w"], batch):
        np.testing.assert_array_equal(placed, table)


def test_without_a_mesh_nothing_moves() -> None:
    tree = {"w": jnp.ones((4, 4))}
    assert gather(tree) is tree
    assert not mesh_is_set()
    assert batch_spec() is None


def test_gather_makes_weights_whole_and_scatters_their_gradient() -> None:
    mesh = make_mesh(data=2, fsdp=4)
    with jax.set_mesh(mesh):
        assert mesh_is_set()
        assert batch_spec() == BATCH
        stored = shard_weights(np.arange(32.0).reshape(4, 8), mesh)
        whole = gather({"w": stored})["w"]
        assert whole.sharding.spec == P(None, None)
        gradient = jax.jit(jax.grad(lambda w: jnp.sum(jnp.square(gather(w)))))(stored)
    np.testing.assert_array_equal(whole, stored)
    np.testing.assert_array_equal(gradient, 2 * np.arange(32.0).reshape(4, 8))
    assert gradient.sharding.spec == stored.sharding.spec == P(None, "fsdp")
