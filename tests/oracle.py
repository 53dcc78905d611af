"""The training step as eager code has it: nothing shared, nothing left out, each piece a program of its own.

    base pass ──► context ──► hypernetwork ──► vector ──► steered pass ──► logits ──► loss
     all blocks                 each row              from the embeddings   everywhere

The vector-Jacobian products of the pieces are programs, too, and are chained by hand, so the compiler cannot find the
work that `steering.py` and `loss.py` share by design. Both have to give what comes out here, to the bit.

Letters: B rows, S sequences, T their length, D width, V vocabulary, L blocks.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from jaxtyping import Float

from hypersteer_jax.config import RunConfig
from hypersteer_jax.data.batch import SteeringBatch
from hypersteer_jax.models.hypernet import Hypernet
from hypersteer_jax.models.lm import LM, ranks

# The bits of a float32 sum depend on its order, and the compiler chooses the order by the size of the array. A position
# has to round the same among few and among many: large products and sums must not go to a library, long sums must not
# be made in parts, and what is summed must not be laid out anew. (`conftest.py` has to keep multiply-adds out, too.)
EXACT = {
    "xla_disable_hlo_passes": "dot-library-rewriter,tree_reduction_rewriter,algsimp",
    "xla_backend_optimization_level": 0,
}


def program(function: Callable[..., Any], *static: str) -> Callable[..., Any]:
    """`function`, compiled so that its bits do not depend on what else is compiled with it."""
    return jax.jit(function, static_argnames=static, compiler_options=EXACT)


def differentiable(function: Callable[..., Any]) -> Callable[..., Any]:
    """Gives its vector-Jacobian product with respect to its first argument beside its value."""
    return lambda x, *rest, **settings: jax.vjp(lambda x: function(x, *rest, **settings), x)


def loss_and_gradient(hypernet: Hypernet, lm: LM, batch: SteeringBatch, config: RunConfig) -> tuple[Array, Hypernet]:
    """Loss in nats and its gradient with respect to the hypernetwork."""
    context = base_pass(lm, batch)[config.steering.layers[0] + (config.steering.context == "leaving")]
    vector, to_hypernet = write(hypernet, lm, batch, context)
    logits, to_vector = steered_pass(vector, lm, batch, layers=config.steering.layers)
    loss, to_logits = cross_entropy(logits, batch, mean=config.train.loss)
    return loss, pull(to_hypernet, pull(to_vector, pull(to_logits, jnp.ones_like(loss))))


def _base_pass(lm: LM, batch: SteeringBatch) -> list[Float[Array, "S T D"]]:
    """The residual entering each block, and the one leaving the last."""
    residuals = [lm.embed(batch.tokens)]
    for block in range(lm.config.layers):
        residuals.append(_block(lm, batch, residuals[-1], block))
    return residuals


def _write(hypernet: Hypernet, lm: LM, batch: SteeringBatch, residual: Float[Array, "S T D"]) -> Float[Array, "B D"]:
    """Steering vectors, each row's from its own reading of its steering prompt."""
    rows = len(batch.factor)
    sequence = np.arange(rows)[:, None] * len(residual) // rows
    return hypernet(
        batch.concept_tokens[batch.concept_row],
        batch.concept_mask[batch.concept_row],
        residual[sequence, batch.context_index],
        batch.context_mask,
        lm.embedding[...],
    )


def _steered_pass(
    vector: Float[Array, "B D"], lm: LM, batch: SteeringBatch, layers: tuple[int, ...]
) -> Float[Array, "S T V"]:
    """Logits at every position."""
    residual = lm.embed(batch.tokens)
    each = len(vector) // len(residual)
    for block in range(lm.config.layers):
        residual = _block(lm, batch, residual, block)
        if block in layers:
            for row in range(each):
                where = batch.steer_mask & (batch.segments == row + 1)
                scaled = batch.factor[row::each, None] * vector[row::each]
                residual = residual + where[:, :, None] * scaled[:, None, :]
    return lm.unembed(residual)


def _cross_entropy(logits: Float[Array, "S T V"], batch: SteeringBatch, mean: str) -> Float[Array, ""]:
    """Every token from the logits before it, and all but the responses' masked."""
    weights = batch.response_share if mean == "example" else (batch.response_share > 0).astype(jnp.float32)
    sequence = np.arange(len(logits))[:, None]
    spread = jnp.zeros(logits.shape[:2]).at[sequence, batch.response_index].add(weights / jnp.sum(weights))
    nll = optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], batch.tokens[:, 1:])
    return jnp.sum(nll * spread[:, :-1])


def _block(lm: LM, batch: SteeringBatch, residual: Float[Array, "S T D"], block: int) -> Float[Array, "S T D"]:
    return lm.run(residual, ranks(batch.segments), batch.segments, block, block + 1)


base_pass = program(_base_pass)
write = program(differentiable(_write))
steered_pass = program(differentiable(_steered_pass), "layers")
cross_entropy = program(differentiable(_cross_entropy), "mean")
pull = program(lambda vjp, cotangent: vjp(cotangent)[0])
