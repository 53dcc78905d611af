"""The mesh and the named specs: the only place that knows axis names.

Axes are Explicit, so an array's type carries its sharding and Adam's moments inherit the parameters'. Three ways of
splitting, any of which may be 1:

    data      copies of everything but the batch; over several TPU slices it is the axis that crosses between them
    fsdp      the batch, and every stored weight, gathered one block at a time just before use (`gather`)
    tensor    heads and MLP width of each block, and the vocabulary of the logits; never the batch
"""

import math
import os
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.experimental.mesh_utils import create_device_mesh, create_hybrid_device_mesh
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Float, Int

from hypersteer_jax.config import ConfigError

T = TypeVar("T")
F = TypeVar("F", bound=Callable[..., Any])

COORDINATOR_PORT = 8476
SHUTDOWN = 60  # seconds that processes wait for each other at the end

AXES = ("data", "fsdp", "tensor")
BATCH_AXES = ("data", "fsdp")
BATCH = P(BATCH_AXES)  # the leading axis of every array of a SteeringBatch

# The axis that `tensor` splits, counted from the end, because blocks are stacked in front: heads, or MLP width. All
# other weights are whole where they are used.
SPLIT = {
    **{
        f"{part}.{name}": -2
        for part in ("attention", "cross")
        for name in ("q", "k", "v", "q_bias", "k_bias", "v_bias")
    },
    **{f"{part}.o": -3 for part in ("attention", "cross")},
    **{f"mlp.{name}": axis for name, axis in (("gate", -1), ("up", -1), ("down", -2))},
}


def join_processes() -> None:
    """Makes this process one of several that train together; before anything else touches a device.

    TPU pods, GKE and Slurm say who is who. Elsewhere JAX_COORDINATOR_ADDRESS (host:port of process 0),
    JAX_NUM_PROCESSES and JAX_PROCESS_ID do. Process 0 listens at port JAX_COORDINATOR_PORT, 8476 if it is not set:
    jax's own choice, 8482, is closed in the default firewall of v6e machines, where starting would hang
    (jax-ml/jax#35905).

    Raises:
        ConfigError: nothing says who is who, or the other processes do not come.
    """
    os.environ.setdefault("JAX_COORDINATOR_PORT", str(COORDINATOR_PORT))
    names = {"num_processes": "JAX_NUM_PROCESSES", "process_id": "JAX_PROCESS_ID"}
    by_hand: dict[str, Any] = {
        name: int(os.environ[variable]) for name, variable in names.items() if variable in os.environ
    }
    # A run listens to SIGTERM itself (`training.preemption`); jax's service would take the signal away.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(**by_hand, shutdown_timeout_seconds=SHUTDOWN)
    except ValueError as error:
        raise ConfigError(
            f"--multihost: this is no TPU pod, GKE or Slurm job ({error}); set JAX_COORDINATOR_ADDRESS (host:port), "
            "JAX_NUM_PROCESSES and JAX_PROCESS_ID, or leave --multihost out"
        ) from error
    except RuntimeError as error:
        raise ConfigError(
            f"--multihost: not all processes have come ({error}); start the command on all hosts, and see that port "
            f"{os.environ['JAX_COORDINATOR_PORT']} of the first is open (JAX_COORDINATOR_PORT)"
        ) from error


def make_mesh(
    data: int = 1, fsdp: int | None = 1, tensor: int = 1, slices: int = 1, devices: list[Any] | None = None
) -> Mesh:
    """A mesh with Explicit axes.

    Args:
        data: devices of this axis, over all slices.
        fsdp: likewise; None takes all devices that are left.
        tensor: likewise.
        slices: TPU slices (or, on machines without, processes) that the data axis runs over, so that only its traffic,
            one sum of gradients a step, crosses between them.
        devices: all of all processes if not given.

    Raises:
        ConfigError: there are fewer devices, several processes of which some would be idle, or the slices do not fit.
    """
    devices = list(jax.devices() if devices is None else devices)
    if fsdp is None:
        fsdp = max(1, len(devices) // (data * tensor))
    shape = (data, fsdp, tensor)
    size = math.prod(shape)
    asked = f"a mesh of data={data} x fsdp={fsdp} x tensor={tensor}"
    if size > len(devices):
        raise ConfigError(f"{asked} needs {size} devices, {len(devices)} found; lower one of mesh.*")
    if size < len(devices) and len({device.process_index for device in devices}) > 1:
        raise ConfigError(f"{asked} leaves {len(devices) - size} of {len(devices)} devices idle; use all (mesh.*)")
    kinds = (AxisType.Explicit,) * 3
    # Splitting a physical axis of a slice costs some links; refusing the mesh would cost the run.
    if slices == 1:
        return Mesh(create_device_mesh(shape, devices[:size], allow_split_physical_axes=True), AXES, kinds)
    found = {each: len({getattr(device, each, 0) for device in devices}) for each in ("slice_index", "process_index")}
    if data % slices or slices not in found.values():
        raise ConfigError(
            f"mesh.slices is {slices} and mesh.data {data}; the devices are in {found['slice_index']} slices, and "
            "mesh.data has to be a multiple of them"
        )
    inside, across, by_process = (data // slices, fsdp, tensor), (slices, 1, 1), found["slice_index"] != slices
    laid = create_hybrid_device_mesh(
        inside, across, devices, process_is_granule=by_process, allow_split_physical_axes=True
    )
    return Mesh(laid, AXES, kinds)


def mesh_is_set() -> bool:
    """Whether code runs under `jax.set_mesh`; models also work without any mesh."""
    return not jax.sharding.get_abstract_mesh().empty


def weight_spec(name: str, shape: tuple[int, ...], mesh: Mesh | AbstractMesh) -> P:
    """Spec of a stored weight, or of a moment of Adam's.

    Weights of `SPLIT` are split there by `tensor`, and once more, along the largest other axis that it divides, by
    `fsdp`. All other matrices are split along their largest axis that both together divide, or one of them, or not at
    all; tables to look up in by their columns (`look_up`). The blocks of a stack stay together, for they are used one
    after the other, and vectors stay whole: each would cost an exchange of its own, and they are small.

    Args:
        name: path in the module, such as "blocks.attention.q"; whatever stands before it does not matter.
        shape: of the whole array.
        mesh: whose axis sizes count.
    """
    axes = list(range("blocks." in name, len(shape)))
    if len(axes) < 2:
        return P()
    if name.endswith("embedding"):
        axes = axes[-1:]
    ways = [axis for axis in ("fsdp", "tensor") if mesh.shape[axis] > 1]
    parts: dict[int, Any] = {}
    split = next((axis % len(shape) for end, axis in SPLIT.items() if name.endswith(end)), None)
    if split is not None and "tensor" in ways:
        ways.remove("tensor")
        axes.remove(split)
        parts[split] = "tensor"
    for names in (tuple(ways), *((way,) for way in ways)):
        count = math.prod(mesh.shape[way] for way in names)
        fitting = [axis for axis in axes if count > 1 and shape[axis] % count == 0]
        if fitting:
            parts[max(fitting, key=lambda axis: shape[axis])] = names if len(names) > 1 else names[0]
            break
    return P(*(parts.get(axis) for axis in range(len(shape)))) if parts else P()


def shardings(tree: T, mesh: Mesh | AbstractMesh) -> T:
    """The same tree with the NamedSharding of each array, by `weight_spec`; arrays may be abstract."""

    def place(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        name = jax.tree_util.keystr(path, simple=True, separator=".").removesuffix(".value")
        return NamedSharding(mesh, weight_spec(name, leaf.shape, mesh))

    return jax.tree_util.tree_map_with_path(place, tree)


def shard_weights(tree: T, mesh: Mesh) -> T:
    """Places every array of a module or optimizer state by `weight_spec`."""
    return jax.device_put(tree, shardings(tree, mesh))


class Share(NamedTuple):
    """What this process holds of every batch: some of the equal parts that it is split into, one part to a device."""

    ways: int = 1
    own: tuple[int, ...] = (0,)

    def of(self, array: np.ndarray) -> np.ndarray:
        """This process's parts of an array with a leading batch axis."""
        return np.concatenate([np.split(array, self.ways)[part] for part in self.own])


def share_of(mesh: Mesh) -> Share:
    """This process's share of the batches on a mesh."""
    ways = math.prod(mesh.shape[axis] for axis in BATCH_AXES)
    places = NamedSharding(mesh, BATCH).addressable_devices_indices_map((ways,)).values()
    return Share(ways, tuple(sorted({place[0].start or 0 for place in places if place is not None})))


def shard_batch(batch: T, mesh: Mesh) -> T:
    """Places every array of a batch with its leading axis over `data` and `fsdp`; of each, this process has its share.

    Raises:
        ValueError: a leading axis is not a multiple of the devices.
    """
    share, sharding = share_of(mesh), NamedSharding(mesh, BATCH)

    def place(x: np.ndarray) -> Array:
        whole = (len(x) * share.ways // len(share.own), *x.shape[1:])
        return jax.make_array_from_process_local_data(sharding, x, whole)

    return jax.tree.map(place, batch)


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
    """Weights as a computation uses them: whole, but for the heads and the MLP width that `tensor` splits.

    The gradient is scattered back by itself.
    """
    if not mesh_is_set():
        return weights
    return jax.tree.map(lambda w: jax.sharding.reshard(w, P(*(a if a == "tensor" else None for a in spec(w)))), weights)


def gather_vocabulary(head: Float[Array, "V D"] | Float[Array, "D V"], axis: int) -> Array:
    """The head as the logits use it: its vocabulary axis split by `tensor`, where that divides it, and else whole."""
    if not mesh_is_set():
        return head
    divides = head.shape[axis] % jax.sharding.get_abstract_mesh().shape["tensor"] == 0
    return jax.sharding.reshard(head, P(*("tensor" if divides and at == axis else None for at in range(2))))


def look_up(table: Float[Array, "V D"], tokens: Int[Array, "B T"]) -> Float[Array, "B T D"]:
    """Rows of a stored table. Its columns stay where they are: the tokens come to them, and what was read goes back.

    Moving the tokens and their embeddings is a small part of moving a table of 256,000 rows, and so for its gradient.
    """
    if not mesh_is_set():
        return table[tokens]
    columns = spec(table)[1]
    if columns is None:
        return gather(table).at[tokens].get(out_sharding=BATCH)
    rows = jax.sharding.reshard(tokens, P("data"))
    x = table.at[rows].get(out_sharding=P("data", None, columns))
    # In two steps, each of which is one exchange; from here to there at once, the compiler would replicate it.
    x = jax.sharding.reshard(x, P("data", None, "fsdp" if "fsdp" in columns else None))
    return jax.sharding.reshard(x, BATCH)


def spec(x: Array) -> P:
    """How an array is split, by its type, under `jax.set_mesh`: one entry for each axis."""
    return jax.typeof(x).sharding.spec


def batch_spec() -> P | None:
    """Output spec for operations whose result has a leading batch axis; None without a mesh."""
    return BATCH if mesh_is_set() else None


def cache_spec() -> P | None:
    """Spec of the keys and values `[L, B, S, K, H]` of a cache; None without a mesh."""
    if not mesh_is_set():
        return None
    return P(None, *BATCH, None, "tensor" if jax.sharding.get_abstract_mesh().shape["tensor"] > 1 else None)


def batch_ways() -> int:
    """Among how many devices a batch is split; 1 without a mesh."""
    shape = jax.sharding.get_abstract_mesh().shape
    return math.prod(shape[axis] for axis in BATCH_AXES) if mesh_is_set() else 1


def split(tree: T) -> T:
    """Arrays with a leading batch axis, split over `data` and `fsdp`, and whole otherwise; unchanged without a mesh."""
    return jax.tree.map(lambda x: jax.sharding.reshard(x, BATCH), tree) if mesh_is_set() else tree


def take(x: Float[Array, "U ..."], rows: Int[Array, " B"]) -> Float[Array, "B ..."]:
    """Some rows of a batch, in any order and number, as another batch."""
    return x.at[rows].get(out_sharding=batch_spec())


def regroup(x: Array, *shape: int) -> Array:
    """`x` in another shape that has a leading batch axis, too: rows of a sequence apart, or together."""
    return jnp.reshape(x, shape, out_sharding=batch_spec())


def on_own_part(function: F, *arrays: Array) -> Array:
    """`function` of these arrays, run by each device on its own part; the result is split like the first.

    For kernels: the compiler cannot split them over a mesh, and they do not say along which axes their results vary.
    """
    if not mesh_is_set():
        return function(*arrays)
    specs = tuple(map(spec, arrays))
    return jax.shard_map(function, in_specs=specs, out_specs=specs[0], check_vma=False)(*arrays)
