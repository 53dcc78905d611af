"""What the TPU compiler makes of both attentions: memory and FLOPs of Gemma-2-2B blocks, no TPU needed.

    pip install -e ".[tpu]"
    python experiments/benchmarks/splash_aot.py

12 minutes on two busy CPU cores (x86, as libtpu is). Compiles forward and backward passes of the five blocks above the
paper's steering layer for the four chips of a v5e:2x2, 2,048 tokens a chip, bfloat16, and prints one row of the table
in experiments/results/splash.md for each. Nothing is run, so nothing is timed.

The compiler counts a scan's body once, so the FLOPs are one block's, and it counts nothing inside a kernel: what the
splash rows lack is the attention itself.
"""

import dataclasses
import os
from functools import partial

os.environ |= {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1"}  # before jax starts: neither look nor ask for a TPU

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.experimental.topologies import get_topology_desc
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jax.stages import Compiled

from hypersteer_jax.config import AttentionName
from hypersteer_jax.models.lm import LM, ranks
from hypersteer_jax.models.presets import PRESETS
from hypersteer_jax.sharding import BATCH, make_mesh

BLOCKS = 5
CONFIG = dataclasses.replace(PRESETS["gemma-2-2b"], layers=BLOCKS)
CHIPS, TOKENS = 4, 2048  # of the topology; on each chip


def blocks_and_back(residual: Array, lm: LM, mask: Array, attention: AttentionName, remat: bool) -> tuple[Array, Array]:
    """A number that depends on the last residual, and its gradient with respect to the first."""

    def loss(residual: Array) -> Array:
        out = lm.run(residual, ranks(mask), mask, 0, BLOCKS, remat, attention)
        return jnp.sum(jnp.square(out.astype(jnp.float32)))

    return jax.value_and_grad(loss)(residual)


def compile_for(mesh: Mesh, length: int, attention: AttentionName, remat: bool) -> Compiled:
    """`blocks_and_back` for rows of `length` tokens, split over the mesh, and weights held by every chip."""

    def abstract(shape: tuple[int, ...], dtype: jnp.dtype, spec: P) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))

    rows = CHIPS * TOKENS // length
    lm = jax.tree.map(lambda w: abstract(w.shape, jnp.bfloat16, P()), jax.eval_shape(lambda: LM(CONFIG, nnx.Rngs(0))))
    residual = abstract((rows, length, CONFIG.width), jnp.bfloat16, BATCH)
    with jax.set_mesh(mesh):
        step = jax.jit(partial(blocks_and_back, attention=attention, remat=remat))
        return step.lower(residual, lm, abstract((rows, length), jnp.bool_, BATCH)).compile()


def main() -> None:
    """Compiles all cases and prints the table."""
    mesh = make_mesh(data=CHIPS, devices=get_topology_desc("v5e:2x2", "tpu").devices)
    print("| tokens a row | remat | attention | temporary, MiB a chip | peak, MiB a chip | GFLOPs a chip | kernels |")
    print("|---|---|---|---|---|---|---|")
    for length, remat in ((256, False), (256, True), (1024, False), (2048, False)):
        for attention in ("einsum", "splash"):
            compiled = compile_for(mesh, length, attention, remat)
            memory = compiled.memory_analysis()
            sizes = [size / 2**20 for size in (memory.temp_size_in_bytes, memory.peak_memory_in_bytes)]
            gflops = compiled.cost_analysis()["flops"] / 1e9
            kernels = compiled.as_text().count('custom_call_target="tpu_custom_call"')
            cells = [str(length), "yes" if remat else "no", attention, *(f"{x:,.0f}" for x in sizes)]
            print("|", " | ".join([*cells, f"{gflops:,.1f}", str(kernels)]), "|", flush=True)


if __name__ == "__main__":
    main()
