"""Memory of the training loss and its gradient, in chunks and with whole logits, as compiled; nothing is run.

    python experiments/benchmarks/loss_memory.py
    python experiments/benchmarks/loss_memory.py --topology v5e:2x2  # one chip of it; needs the extra [tpu], but no TPU

A minute each. 16 rows of 128 scored tokens, Gemma-2-2B's width and vocabulary. The last column makes all logits at once
and differentiates the loss as usual. Both are compiled from abstract arguments, so not even the head's weights exist.
Counted are the temporaries of the compiled program, not its arguments and results. A CPU converts bfloat16 weights to
float32 before it multiplies: 2.4 GB of temporaries in either column, and 1.2 GB more in a loop.

Found with JAX 0.10.2, in GB:

    | compiled for | dtype | in chunks | whole logits |
    | --- | --- | ---: | ---: |
    | x86 CPU | float32 | 1.61 | 6.29 |
    | x86 CPU | bfloat16 | 5.14 | 8.67 |
    | TPU v5e | float32 | 2.27 | 4.20 |
    | TPU v5e | bfloat16 | 1.07 | 4.20 |
"""

import argparse
import os
from collections.abc import Callable

os.environ |= {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1"}  # before jax starts: neither look nor ask for a TPU

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax import Array
from jax.experimental.topologies import get_topology_desc
from jax.sharding import Sharding, SingleDeviceSharding

from hypersteer_jax.models.lm import LM, cast
from hypersteer_jax.models.presets import PRESETS
from hypersteer_jax.training.loss import response_loss

ROWS, RESPONSE = 16, 128
LM_CONFIG = PRESETS["gemma-2-2b"]


def whole_loss(lm: LM, residual: Array, tokens: Array, share: Array) -> tuple[Array, Array]:
    """`response_loss` with all logits at once."""
    nll = optax.softmax_cross_entropy_with_integer_labels(lm.unembed(residual), tokens)
    real = share > 0
    return jnp.sum(jnp.where(real, nll, 0)) / jnp.sum(real), jnp.sum(real)


def temporaries(loss: Callable[..., tuple[Array, Array]], dtype: jnp.dtype, where: Sharding) -> int:
    """Bytes of temporaries of a loss and its gradient with respect to the residual."""

    def array(shape: tuple[int, ...], dtype: jnp.dtype) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=where)

    lm = jax.eval_shape(lambda: cast(LM(LM_CONFIG, nnx.Rngs(0)), dtype))
    lm = jax.tree.map(lambda leaf: array(leaf.shape, leaf.dtype), lm)
    residual = array((ROWS, RESPONSE, LM_CONFIG.width), dtype)
    tokens, share = (array((ROWS, RESPONSE), jnp.dtype(kind)) for kind in (jnp.int32, jnp.float32))
    step = jax.jit(jax.value_and_grad(loss, argnums=1, has_aux=True))
    return step.lower(lm, residual, tokens, share).compile().memory_analysis().temp_size_in_bytes


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--topology", help="of TPUs, as JAX names it; left out, compiles for this machine's CPU")
    topology = parser.parse_args().topology
    device = get_topology_desc(topology, "tpu").devices[0] if topology else jax.devices()[0]
    print("| compiled for | dtype | in chunks | whole logits |\n| --- | --- | ---: | ---: |")
    for dtype in map(jnp.dtype, (jnp.float32, jnp.bfloat16)):
        chunked, whole = (
            temporaries(loss, dtype, SingleDeviceSharding(device)) for loss in (response_loss, whole_loss)
        )
        print(f"| {device.device_kind} | {dtype} | {chunked / 1e9:.2f} | {whole / 1e9:.2f} |", flush=True)


if __name__ == "__main__":
    main()
