"""What a training run needs of a TPU slice and how long it takes at least, found out on a CPU host.

    topology = find_topology("v6e-8")
    plan = make_plan(config, PRESETS["gemma-2-2b"], topology, TYPICAL)
    plan.fits, plan.result.needed, plan.bound.seconds
    find_change(plan, PRESETS["gemma-2-2b"])                   # if it does not fit

The step that is compiled is the real one, `train_step` with its real shardings, by the TPU's own compiler (libtpu) from
abstract arguments: no weight is allocated and nothing runs, so nothing is timed. Memory is the compiler's answer. Time
is a bound from below: what the arithmetic, the memory or the links take at the makers' figures, whichever is longest.

`lower_step` and `predict_memory` need no libtpu and no more than seconds; a prediction is a formula, not an answer, and
tends to be too high where the compiler need not make an array, too low where it keeps two copies.

Letters: T sequence, C context, R scored tokens of a sequence, P steering prompt, S slots of a cache.
"""

import dataclasses
import math
import re
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.experimental.topologies import get_topology_desc
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jax.stages import Lowered

from hypersteer_jax.config import ConfigError, LMConfig, MeshConfig, RunConfig, check
from hypersteer_jax.data.batch import SteeringBatch
from hypersteer_jax.data.pipeline import Bucket
from hypersteer_jax.data.prompts import Prompter, load_tokenizer
from hypersteer_jax.data.sources import TINYWORLD, base_shape, load_base, load_data
from hypersteer_jax.decoding import Decoding, Vectors, forward
from hypersteer_jax.hlo import Traffic, read_traffic
from hypersteer_jax.models.lm import LM, KVCache, cast, empty_cache
from hypersteer_jax.models.presets import PRESETS
from hypersteer_jax.sharding import AXES, BATCH, make_mesh, shardings
from hypersteer_jax.topologies import GRIDS, Topology, find_topology
from hypersteer_jax.training.flops import StepFlops, step_flops
from hypersteer_jax.training.loss import CHUNK
from hypersteer_jax.training.train import TrainState, init_state, objective, train_step

T = TypeVar("T")

# The longest shapes of AxBench's files (experiments/results/padding.md), two rows in a sequence and one: for plans
# without the data.
TYPICAL = Bucket(tokens=304, context=64, response=256, concept=64, rows=2)
TYPICAL_ALONE = Bucket(tokens=288, context=64, response=128, concept=64)

# The slice that each recipe is meant for: its config is compiled for it, and lowered for it in every test run. Batches
# are the papers', small ones, so that few chips can share their sequences.
PODS = {
    "tinyworld": ("v5e-1", MeshConfig()),
    "gemma2-2b": ("v5p-8", MeshConfig(fsdp=2, tensor=2)),
    "gemma2-9b": ("v5p-16", MeshConfig(fsdp=2, tensor=4)),
    "release": ("v6e-4", MeshConfig(fsdp=2, tensor=2)),
}
CONFIRMED = 3  # changes that are compiled at most, when a run does not fit


class Inputs(NamedTuple):
    """Abstract arguments of `train_step`, each with its sharding."""

    state: TrainState
    lm: LM
    batch: SteeringBatch


class Prediction(NamedTuple):
    """Bytes of one device by formula: what a step is given, and what it makes, as if all of it were there at once.

    The compiler's answer differs by arrays that it does not make, or whose places it uses twice.
    """

    lm: int  # stored weights of the base LM
    state: int  # stored weights of the hypernetwork and their two moments, float32
    batch: int
    saved: int  # what automatic differentiation keeps for the backward pass
    gradients: int  # float32, split like the weights
    logits: int  # of one chunk of positions and their gradient, and the gathered head

    @property
    def total(self) -> int:
        """All of it."""
        return sum(self)


class Compiled(NamedTuple):
    """The compiler's answer for one program; bytes are of one device."""

    seconds: float  # that it took to compile
    arguments: int
    outputs: int
    aliased: int  # of the outputs, in the place of arguments
    temporaries: int
    peak: int
    traffic: Traffic

    @property
    def needed(self) -> int:
        """Bytes that the program takes for itself: with what the compiler could not reuse, more than the peak."""
        return self.arguments + self.outputs - self.aliased + self.temporaries


class TooLarge(NamedTuple):
    """The compiler's refusal: arguments, outputs and temporaries of one device together are more than it has."""

    needed: int


class Bound(NamedTuple):
    """Seconds that one step takes at least, by what it would be waiting for."""

    math: float  # FLOPs of the formula, at the peak of bfloat16
    memory: float  # traffic of the compiled program with main memory
    interconnect: float  # bytes that a device sends in its slice, over all of its links
    network: float  # bytes that a device sends to other slices

    @property
    def seconds(self) -> float:
        """The longest: as if the others were hidden behind it."""
        return max(self)

    @property
    def binds(self) -> str:
        """Which one it is."""
        return self._fields[self.index(self.seconds)]


class Plan(NamedTuple):
    """A training run on a slice."""

    config: RunConfig
    topology: Topology
    shape: Bucket
    sizes: tuple[int, int, int]  # devices along data, fsdp and tensor
    prediction: Prediction
    result: Compiled | TooLarge
    flops: StepFlops
    largest: tuple[tuple[str, int], ...]  # largest arguments by name, and their bytes on one device

    @property
    def bound(self) -> Bound | None:
        """Of one step, if it could be compiled."""
        return step_bound(self.flops.total, self.result, self.topology)

    @property
    def fits(self) -> bool:
        """Whether the compiler could place everything."""
        return fits(self.result, self.topology)


class DecodePlan(NamedTuple):
    """Generation on a slice: one more token for each row."""

    rows: int  # over all devices
    slots: int  # of the cache, for each row
    sizes: tuple[int, int, int]
    result: Compiled | TooLarge
    bound: Bound | None


def fits(result: Compiled | TooLarge, topology: Topology) -> bool:
    """Whether the compiler could place everything."""
    return isinstance(result, Compiled) and result.needed <= topology.kind.memory


def step_bound(flops: float, result: Compiled | TooLarge, topology: Topology) -> Bound | None:
    """Seconds of one step from FLOPs of all devices and the traffic of one; None for what could not be compiled."""
    if isinstance(result, TooLarge):
        return None
    kind, traffic = topology.kind, result.traffic
    return Bound(
        math=flops / (topology.devices * kind.flops),
        memory=traffic.memory / kind.bandwidth,
        interconnect=traffic.ici / topology.interconnect if traffic.ici else 0.0,
        network=traffic.dcn / topology.network,
    )


def lm_shape(name: str) -> LMConfig:
    """Shape of a base LM by its directory, its hub id or its preset; no weight is read, nothing is downloaded.

    Raises:
        ConfigError: it is neither a directory nor the name of a known model.
    """
    if name == TINYWORLD or Path(name).is_dir():
        return base_shape(name)
    known = re.sub(r"-(it|instruct)$", "", name.rpartition("/")[2].lower())
    if known not in PRESETS:
        raise ConfigError(
            f"lm is {name!r}, whose shape is not known here; give a directory with its config.json, or one of "
            f"{', '.join(PRESETS)}"
        )
    return PRESETS[known]


def run_shape(config: RunConfig, lengths: tuple[int, int, int, int] | None, say: Callable[[str], None]) -> Bucket:
    """The shape to plan for: the given lengths T, C, R and P, or the longest of the data's, or AxBench's.

    The data's are known where the base LM's folder is here, for its tokenizer, and the data are. Every batch of another
    shape is shorter, needs less memory and less time.
    """
    rows = 2 if config.data.pack else 1
    if lengths is not None:
        return Bucket(*lengths, rows)
    folder, source = Path(config.lm), config.data.source
    if (config.lm == TINYWORLD or folder.is_dir()) and (source == TINYWORLD or Path(source).exists()):
        here = config.lm != TINYWORLD
        prompter = Prompter(load_tokenizer(folder)) if here else load_base(TINYWORLD, "bfloat16")[1]
        return load_data(config, prompter, say).layout.buckets[-1]  # the last holds every sequence
    say("neither the base LM's folder nor the data are here: lengths as in AxBench's files; give others with --shape")
    usual = TYPICAL if config.data.pack else TYPICAL_ALONE
    reads_prompt = config.hypernet.variant == "in_context"  # behind the steering prompt
    return usual._replace(concept=usual.concept + usual.context) if reads_prompt else usual


def mesh_sizes(mesh: MeshConfig, devices: int) -> tuple[int, int, int]:
    """Devices along data, fsdp and tensor, all of them used.

    Raises:
        ConfigError: they are more or fewer than there are.
    """
    fsdp = max(1, devices // (mesh.data * mesh.tensor)) if mesh.fsdp is None else mesh.fsdp
    if mesh.data * fsdp * mesh.tensor != devices:
        raise ConfigError(
            f"a mesh of data={mesh.data} x fsdp={fsdp} x tensor={mesh.tensor} is of {mesh.data * fsdp * mesh.tensor} "
            f"devices, and the topology has {devices}; change mesh.*"
        )
    return mesh.data, fsdp, mesh.tensor


def abstract_mesh(config: RunConfig, devices: int) -> AbstractMesh:
    """The run's mesh over so many devices that need not exist."""
    return AbstractMesh(mesh_sizes(config.mesh, devices), AXES, axis_types=(AxisType.Explicit,) * len(AXES))


def abstract_inputs(config: RunConfig, lm: LMConfig, shape: Bucket, mesh: Mesh | AbstractMesh) -> Inputs:
    """Arguments of `train_step` for a batch of one shape, as they would lie on the mesh.

    Raises:
        ConfigError: the settings are wrong, or the devices cannot share the batch.
    """
    check(config, lm)
    rows, ways = config.train.batch, math.prod(mesh.shape[axis] for axis in BATCH[0])
    if rows % (shape.rows * ways):
        raise ConfigError(
            f"train.batch is {rows}, which {ways} devices (mesh.data x mesh.fsdp) cannot share in sequences of "
            f"{shape.rows}; give a multiple of {shape.rows * ways}, or set mesh.tensor"
        )
    base = jax.eval_shape(lambda: cast(LM(lm, nnx.Rngs(0)), jnp.dtype(config.train.compute_dtype)))
    state = jax.eval_shape(partial(init_state, config), base)
    split = NamedSharding(mesh, BATCH)
    batch = jax.tree.map(lambda leaf: _place(leaf, split), _batch(rows, shape))
    return Inputs(_stored(state, mesh), _stored(base, mesh), batch)


def _stored(tree: T, mesh: Mesh | AbstractMesh) -> T:
    """The same abstract weights or state, as they lie on the mesh."""
    return jax.tree.map(_place, tree, shardings(tree, mesh))


def _place(leaf: jax.ShapeDtypeStruct, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _batch(rows: int, shape: Bucket) -> SteeringBatch:
    """A batch of one shape, with a steering prompt for each row."""
    i, f, b = (partial(jax.ShapeDtypeStruct, dtype=dtype) for dtype in (jnp.int32, jnp.float32, jnp.bool))
    sequences = rows // shape.rows
    tokens, context = (sequences, shape.tokens), (rows, shape.context)
    scored, concept = (sequences, shape.response), (rows, shape.concept)
    return SteeringBatch(
        tokens=i(tokens),
        segments=i(tokens),
        steer_mask=b(tokens),
        context_index=i(context),
        context_mask=b(context),
        response_index=i(scored),
        response_tokens=i(scored),
        response_share=f(scored),
        concept_tokens=i(concept),
        concept_mask=b(concept),
        concept_row=i((rows,)),
        factor=f((rows,)),
        row=i((rows,)),
    )


def lower_step(config: RunConfig, inputs: Inputs) -> Lowered:
    """The train step, lowered for TPUs under the mesh of its arguments, with its state donated as in `train`."""
    step = jax.jit(partial(train_step, config=config), donate_argnums=0)
    with jax.sharding.use_abstract_mesh(_mesh_of(inputs)):
        return step.trace(*inputs).lower(lowering_platforms=("tpu",))


def _mesh_of(inputs: Inputs) -> AbstractMesh:
    return inputs.batch.factor.sharding.mesh.abstract_mesh


def predict_memory(config: RunConfig, lm: LMConfig, inputs: Inputs) -> Prediction:
    """Bytes of one device from abstract shapes and shardings alone, in about a second.

    What is saved for the backward pass is what `jax.vjp` of the objective says, without the arguments themselves.
    """
    state, base, batch = inputs

    def saved(hypernet: Any, base: LM, batch: SteeringBatch) -> Any:
        return jax.vjp(lambda hypernet: objective(hypernet, base, batch, config)[0], hypernet)[1]

    with jax.sharding.use_abstract_mesh(_mesh_of(inputs)):
        kept = jax.tree.leaves(jax.eval_shape(saved, state.hypernet, base, batch))
    given = {(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves((state.hypernet, base, batch))}
    data, fsdp, tensor = _mesh_of(inputs).axis_sizes
    positions = min(CHUNK, batch.response_tokens.size // (data * fsdp))
    itemsize = jnp.dtype(config.train.compute_dtype).itemsize
    return Prediction(
        lm=tree_bytes(base),
        state=tree_bytes(state),
        batch=tree_bytes(batch),
        saved=sum(map(device_bytes, (leaf for leaf in kept if (leaf.shape, leaf.dtype) not in given))),
        gradients=tree_bytes(state.hypernet),
        logits=lm.vocab * (2 * 4 * positions + lm.width * itemsize) // tensor,
    )


def device_bytes(leaf: Any) -> int:
    """Bytes of an abstract array that one device holds, without the padding of its tiles."""
    shape = leaf.shape if leaf.sharding is None else leaf.sharding.shard_shape(leaf.shape)
    return math.prod(shape) * leaf.dtype.itemsize


def tree_bytes(tree: Any) -> int:
    """Bytes that one device holds of all arrays of a tree."""
    return sum(map(device_bytes, jax.tree.leaves(tree)))


def largest_arrays(inputs: Inputs, count: int = 5) -> tuple[tuple[str, int], ...]:
    """Names of the largest arguments, and their bytes on one device."""
    leaves = [
        (jax.tree_util.keystr(path, simple=True, separator=".").removesuffix(".value"), device_bytes(leaf))
        for path, leaf in jax.tree_util.tree_leaves_with_path(inputs._asdict())
    ]
    return tuple(sorted(leaves, key=lambda leaf: leaf[1], reverse=True)[:count])


def compile_for(lowered: Lowered, slices: int) -> Compiled | TooLarge:
    """The TPU compiler's answer. It takes a minute or several."""
    start = time.perf_counter()
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        found = re.search(r"RESOURCE_EXHAUSTED.*?\(([\d.]+)([KMGT])\) exceeds", str(error), re.DOTALL)
        if found is None:
            raise
        return TooLarge(int(float(found[1]) * 2 ** {"K": 10, "M": 20, "G": 30, "T": 40}[found[2]]))
    memory: Any = compiled.memory_analysis()
    return Compiled(
        seconds=round(time.perf_counter() - start, 1),
        arguments=memory.argument_size_in_bytes,
        outputs=memory.output_size_in_bytes,
        aliased=memory.alias_size_in_bytes,
        temporaries=memory.temp_size_in_bytes,
        peak=memory.peak_memory_in_bytes,
        traffic=read_traffic(str(compiled.as_text()), slices),
    )


def topology_mesh(sizes: tuple[int, int, int], topology: Topology) -> Mesh:
    """A mesh over the devices of a slice that is not there: for shardings and the compiler only."""
    devices = get_topology_desc(**topology.libtpu()).devices
    return make_mesh(*sizes, slices=topology.slices, devices=devices)


def make_plan(config: RunConfig, lm: LMConfig, topology: Topology, shape: Bucket) -> Plan:
    """Compiles the train step of a run for a slice.

    Raises:
        ConfigError: the settings are wrong, or the devices cannot share the batch.
    """
    sizes = mesh_sizes(config.mesh, topology.devices)
    predicted = predict_memory(config, lm, abstract_inputs(config, lm, shape, abstract_mesh(config, topology.devices)))
    inputs = abstract_inputs(config, lm, shape, topology_mesh(sizes, topology))
    return Plan(
        config,
        topology,
        shape,
        sizes,
        predicted,
        compile_for(lower_step(config, inputs), topology.slices),
        step_flops(lm, config, shape),
        largest_arrays(inputs),
    )


def find_change(plan: Plan, lm: LMConfig) -> Plan | None:
    """The plan of the smallest change that fits, the plainest kind of change first; None if none of those tried does.

    Changes are picked by `predict_memory`, scaled so that it would have been right for the plan that does not fit, and
    then compiled, at most `CONFIRMED` of them.
    """
    scale = plan.result.needed / plan.prediction.total
    compiled = 0
    for config in changes(plan.config, lm, plan.topology, plan.shape):
        inputs = abstract_inputs(config, lm, plan.shape, abstract_mesh(config, plan.topology.devices))
        if scale * predict_memory(config, lm, inputs).total > plan.topology.kind.memory:
            continue
        changed = make_plan(config, lm, plan.topology, plan.shape)
        if changed.fits:
            return changed
        compiled += 1
        if compiled == CONFIRMED:
            break
    return None


def changes(config: RunConfig, lm: LMConfig, topology: Topology, shape: Bucket) -> Iterator[RunConfig]:
    """Other settings that need less memory: fewer rows, then other meshes, then remat, then remat with fewer rows."""
    data, fsdp, _ = mesh_sizes(config.mesh, topology.devices)
    least = shape.rows * data * fsdp
    kinds = [config.mesh]
    if data > topology.slices:
        kinds.append(dataclasses.replace(config.mesh, data=topology.slices, fsdp=None))
    for tensor in (2, 4, 8):
        if lm.kv_heads % tensor == 0 and topology.devices % (tensor * topology.slices) == 0:
            kinds.append(dataclasses.replace(config.mesh, data=topology.slices, fsdp=None, tensor=tensor))

    def fewer(config: RunConfig) -> Iterator[RunConfig]:
        rows = config.train.batch
        while (rows := rows // 2 // least * least) > 0:
            yield _with(config, batch=rows)

    again = _with(config, remat=True)
    yield from fewer(config)
    yield from (dataclasses.replace(config, mesh=mesh) for mesh in kinds[1:])
    if not config.train.remat:
        yield from (dataclasses.replace(again, mesh=mesh) for mesh in kinds)
        yield from fewer(again)


def _with(config: RunConfig, **train: Any) -> RunConfig:
    return dataclasses.replace(config, train=dataclasses.replace(config.train, **train))


def larger_slice(plan: Plan, lm: LMConfig) -> Topology | None:
    """The smallest slice of the same kind that should hold the run as it is, by the prediction; not compiled."""
    scale = plan.result.needed / plan.prediction.total
    mesh = dataclasses.replace(plan.config.mesh, fsdp=None)
    for chips in GRIDS[plan.topology.kind.axes]:
        name = f"{plan.topology.generation}-{chips * plan.topology.kind.cores}"
        topology = find_topology(name, plan.topology.slices)
        if topology.chips <= plan.topology.chips:
            continue
        rows = plan.config.train.batch * topology.chips // plan.topology.chips  # as many on each device
        config = _with(dataclasses.replace(plan.config, mesh=mesh), batch=rows)
        inputs = abstract_inputs(config, lm, plan.shape, abstract_mesh(config, topology.devices))
        if scale * predict_memory(config, lm, inputs).total <= topology.kind.memory:
            return topology
    return None


def lower_decode(config: RunConfig, lm: LMConfig, rows: int, slots: int, mesh: Mesh | AbstractMesh) -> Lowered:
    """One token for each of `rows` rows, steered, with the keys and values of up to `slots` tokens in the cache."""
    dtype = jnp.dtype(config.train.compute_dtype)
    split, tensor = NamedSharding(mesh, BATCH), mesh.axis_sizes[-1]
    heads = NamedSharding(mesh, P(None, *BATCH, None, AXES[-1] if tensor > 1 else None))
    base = jax.eval_shape(lambda: cast(LM(lm, nnx.Rngs(0)), dtype))
    cache: Any = jax.eval_shape(lambda: empty_cache(lm, rows, slots, dtype))
    places: Any = (heads, heads, split, split, NamedSharding(mesh, P()))
    cache = jax.tree.map(_place, cache, KVCache(*places))

    def one_token(
        lm: LM, cache: KVCache, token: Array, alive: Array, vector: Array, factor: Array
    ) -> tuple[Array, KVCache]:
        logits, cache = forward(lm, cache, token, alive, alive, Vectors(vector, factor), config.steering)
        return jnp.argmax(logits, axis=-1), cache

    def given(dtype: Any, *shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((rows, *shape), dtype, sharding=split)

    arguments = (
        _stored(base, mesh),
        cache,
        given(jnp.int32, 1),
        given(jnp.bool, 1),
        given(jnp.float32, lm.width),
        given(jnp.float32),
    )
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        return jax.jit(one_token, donate_argnums=1).trace(*arguments).lower(lowering_platforms=("tpu",))


def plan_decode(config: RunConfig, lm: LMConfig, topology: Topology, shape: Bucket) -> DecodePlan:
    """Compiles one step of generation for a slice, each device group with a batch of its own and whole weights.

    A group is as small as leaves half of the memory to the cache: weights that are gathered for each token would take
    far longer than reading them.
    """
    decoding = Decoding()
    weights = tree_bytes(jax.eval_shape(lambda: cast(LM(lm, nnx.Rngs(0)), jnp.dtype(config.train.compute_dtype))))
    tensor = 1
    while weights // tensor > topology.kind.memory // 2 and lm.kv_heads % (2 * tensor) == 0:
        tensor *= 2
    sizes = topology.devices // tensor, 1, tensor
    rows, slots = decoding.batch * sizes[0], shape.context + decoding.max_new
    result = compile_for(lower_decode(config, lm, rows, slots, topology_mesh(sizes, topology)), topology.slices)
    flops = rows * 2 * weights / jnp.dtype(config.train.compute_dtype).itemsize
    return DecodePlan(rows, slots, sizes, result, step_bound(flops, result, topology))
