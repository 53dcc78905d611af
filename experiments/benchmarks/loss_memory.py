"""Memory of the training loss and its gradient, in chunks and with whole logits, as compiled; nothing is run.

    python experiments/benchmarks/loss_memory.py

A minute on a CPU. 16 rows of 128 scored tokens, Gemma-2-2B's width and vocabulary. The last column makes all logits at
once and differentiates the loss as usual. Both are compiled for the machine's default device from abstract arguments,
so not even the head's weights exist. Counted are the temporaries of the compiled program, not arguments and results. A
CPU converts bfloat16 weights to float32 before it multiplies: 2.4 GB of temporaries in either column, and 1.2 GB more in
a loop, which an accelerator does not need. The rows in float32 show the loss alone.

Found on an x86 CPU with JAX 0.10.2, in GB:

    | dtype | in chunks | whole logits |
    | --- | ---: | ---: |
    | float32 | 1.61 | 6.29 |
    | bfloat16 | 5.14 | 8.67 |
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax import Array

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


def temporaries(loss: Callable[..., tuple[Array, Array]], dtype: jnp.dtype) -> int:
    """Bytes of temporaries of a loss and its gradient with respect to the residual."""
    lm = jax.eval_shape(lambda: cast(LM(LM_CONFIG, nnx.Rngs(0)), dtype))
    residual = jax.ShapeDtypeStruct((ROWS, RESPONSE, LM_CONFIG.width), dtype)
    tokens, share = (jax.ShapeDtypeStruct((ROWS, RESPONSE), kind) for kind in (jnp.int32, jnp.float32))
    step = jax.jit(jax.value_and_grad(loss, argnums=1, has_aux=True))
    return step.lower(lm, residual, tokens, share).compile().memory_analysis().temp_size_in_bytes


def main() -> None:
    """Prints the table."""
    print("| dtype | in chunks | whole logits |\n| --- | ---: | ---: |")
    for dtype in (jnp.float32, jnp.bfloat16):
        chunked, whole = (temporaries(loss, jnp.dtype(dtype)) for loss in (response_loss, whole_loss))
        print(f"| {jnp.dtype(dtype)} | {chunked / 1e9:.2f} | {whole / 1e9:.2f} |", flush=True)


if __name__ == "__main__":
    main()
