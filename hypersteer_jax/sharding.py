"""The mesh and the named specs: the only place that knows axis names.

Axes are Explicit, so an array's type carries its sharding and Adam's moments inherit the parameters'. Batches are split
over `data` and `fsdp`; weights are stored split over `fsdp` and gathered just before use (`gather`), one block at a
time inside the scan over blocks.
"""

import math
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Int

T = TypeVar("T")
F = TypeVar("F", bound=Callable[..., Any])

AXES = ("data", "fsdp", "tensor")
BATCH = P(("data", "fsdp"))  # the leading axis of every array of a SteeringBatch


def make_mesh(data: int = 1, fsdp: int = 1, tensor: int = 1, devices: list[Any] | None = None) -> Mesh:
    """A mesh with Explicit axes.

    Raises:
        ValueError: there are fewer devices than data * fsdp * tensor.
    """
    devices = list(jax.devices() if devices is None else devices)
    size = data * fsdp * tensor
    if size > len(devices):
        raise ValueError(
            f"a mesh of data={data} x fsdp={fsdp} x tensor={tensor} needs {size} devices, {len(devices)} found"
        )
    kinds = (jax.sharding.AxisType.Explicit,) * 3
    return jax.make_mesh((data, fsdp, tensor), AXES, axis_types=kinds, devices=devices[:size])


def mesh_is_set() -> bool:
    """Whether code runs under `jax.set_mesh`; models also work without any mesh."""
    return not jax.sharding.get_abstract_mesh().empty


def weight_spec(shape: tuple[int, ...], mesh: Mesh) -> P:
    """Spec of a stored weight: its largest axis that `fsdp` divides is split, everything else whole."""
    ways = mesh.shape["fsdp"]
    axes = [axis for axis in range(len(shape)) if shape[axis] % ways == 0 and shape[axis] > 1]
    if ways == 1 or not axes:
        return P()
    split = max(axes, key=lambda axis: shape[axis])
    return P(*("fsdp" if axis == split else None for axis in range(len(shape))))


def shard_weights(tree: T, mesh: Mesh) -> T:
    """Places every array of a module or optimizer state by `weight_spec`."""
    return jax.tree.map(lambda x: jax.device_put(x, NamedSharding(mesh, weight_spec(x.shape, mesh))), tree)


def shard_batch(batch: T, mesh: Mesh) -> T:
    """Places every array of a host batch with its leading axis over `data` and `fsdp`."""
    return jax.tree.map(lambda x: jax.device_put(x, NamedSharding(mesh, BATCH)), batch)


def agreement(mesh: Mesh) -> Callable[[bool], Int[Array, ""]]:
    """A function that all processes of a mesh call with a yes or no, and that gives all of them 1 if one said yes.

    The devices work it out in turn with everything else, so all processes hear it at the same step, and asking does not
    wait for the answer.
    """
    sharding = NamedSharding(mesh, P(mesh.axis_names))

    def everywhere(value: int) -> Array:
        return jax.make_array_from_callback((mesh.size,), sharding, lambda _: np.full(1, value, np.int32))

    no, yes, largest = everywhere(0), everywhere(1), jax.jit(jnp.max)
    return lambda mine: largest(yes if mine else no)


def gather(weights: T) -> T:
    """Whole weights from stored ones, for the computation that follows. The gradient is scattered back by itself."""
    if not mesh_is_set():
        return weights
    return jax.tree.map(lambda w: jax.sharding.reshard(w, P()), weights)


def batch_spec() -> P | None:
    """Output spec for gathers whose result has a leading batch axis; None without a mesh."""
    return BATCH if mesh_is_set() else None


def batch_ways() -> int:
    """Among how many devices a batch is split; 1 without a mesh."""
    shape = jax.sharding.get_abstract_mesh().shape
    return math.prod(shape[axis] for axis in BATCH[0]) if mesh_is_set() else 1


def regroup(x: Array, *shape: int) -> Array:
    """`x` in another shape that has a leading batch axis, too: rows of a sequence apart, or together."""
    return jnp.reshape(x, shape, out_sharding=batch_spec())


def on_own_rows(function: F) -> F:
    """`function` of arrays with a leading batch axis, run by each device on its own rows.

    For kernels: the compiler cannot split them over a mesh, and they do not say along which axes their results vary.
    """
    if not mesh_is_set():
        return function
    return jax.shard_map(function, in_specs=BATCH, out_specs=BATCH, check_vma=False)
