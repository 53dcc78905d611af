"""The heart: from a steering prompt to the logits of the steered base LM, as pure functions.

    steering prompt ──► hypernetwork ──► vector ─┐
                             ▲ context           ▼
    tokens ──► blocks 0..ℓ-1 ─► block ℓ ──► residual + factor · vector ──► blocks ℓ+1..L-1 ──► response logits

One pass through the lower blocks serves both the context and the residual that is steered, since neither depends on the
vector. Freezing the base LM is its being another argument: `jax.grad` differentiates the hypernetwork, and no gradient
or optimizer state of the LM can exist.

Letters: B rows, S sequences of one or two rows, T their length, C context length, R scored tokens of a sequence, D
width, V vocabulary.
"""

from collections.abc import Callable

import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, Int

from hypersteer_jax.config import AttentionName, SteeringConfig
from hypersteer_jax.data.batch import SteeringBatch
from hypersteer_jax.models.attention import Segments
from hypersteer_jax.models.hypernet import Hypernet
from hypersteer_jax.models.lm import LM, ranks
from hypersteer_jax.sharding import batch_spec, regroup

Run = Callable[[Array, int, int], Array]  # (residual, start, stop) -> residual
Add = Callable[[Array, int], tuple[Array, Array]]  # (residual, layer) -> steered residual, gate of each token


def steer(
    residual: Float[Array, "B T D"],
    vector: Float[Array, "B D"],
    factor: Float[Array, " B"],
    gate: Bool[Array, "B T"] | Float[Array, "B T"],
) -> Float[Array, "B T D"]:
    """The residual with `gate * factor * vector` added (paper, eq. 1, where the gate is True or False).

    The factor has no default: a factor that is forgotten must not pass silently as 1. At factor 0, and where the gate
    is 0 or False, the residual is unchanged to the bit.
    """
    added = factor[:, None, None] * vector[:, None, :] * gate[:, :, None]
    return residual + added.astype(residual.dtype)


def lower_blocks(config: SteeringConfig) -> int:
    """How many blocks the context has passed: up to, or including, the first steered one."""
    return config.layers[0] + (config.context == "leaving")


def upper_pass(
    run: Run, add: Add, residual: Array, layers: int, config: SteeringConfig
) -> tuple[Float[Array, "B T D"], list[Array]]:
    """From the context's residual to the last block's; `add` steers the output of each steered block, by its gates."""
    at, gates = lower_blocks(config), []
    for layer in config.layers:
        residual, gate = add(run(residual, at, layer + 1), layer)
        gates.append(gate)
        at = layer + 1
    return run(residual, at, layers), gates


def read_context(
    lm: LM,
    tokens: Int[Array, "B T"],
    segments: Segments,
    config: SteeringConfig,
    attention: AttentionName = "einsum",
) -> Array:
    """Residual `[B, T, D]` that the hypernetwork reads and that `upper_pass` continues from."""
    return lm.run(lm.embed(tokens), ranks(segments), segments, 0, lower_blocks(config), attention=attention)


def write_vectors(
    hypernet: Hypernet,
    lm: LM,
    batch: SteeringBatch,
    residual: Float[Array, "S T D"],
    remat: bool = False,
    attention: AttentionName = "einsum",
) -> Float[Array, "B D"]:
    """The steering vector of each row, from `read_context`'s residual."""
    context = _at(residual, regroup(batch.context_index, len(residual), -1))
    context = regroup(context, *batch.context_index.shape, -1)
    vector = hypernet(
        batch.concept_tokens, batch.concept_mask, context, batch.context_mask, lm.embedding[...], remat, attention
    )
    if hypernet.config.variant == "cross_attention":
        return vector
    # Without a context the vector is the steering prompt's alone, so each prompt was read once, whoever shares it.
    return vector.at[batch.concept_row].get(out_sharding=batch_spec())


def steered_residual(
    hypernet: Hypernet,
    lm: LM,
    batch: SteeringBatch,
    config: SteeringConfig,
    remat: bool = False,
    residual: Float[Array, "S T D"] | None = None,
    attention: AttentionName = "einsum",
    key: Array | None = None,
) -> tuple[Float[Array, "S R D"], list[Array]]:
    """Last residual at the positions that predict the response tokens, under steering; gates `[S, T]` of each layer.

    Args:
        hypernet: the trained network; gradients are taken with respect to it.
        lm: the frozen base LM.
        batch: see `SteeringBatch`; the vector is scaled by its `factor`.
        config: where to read and write.
        remat: recompute block activations in the backward pass.
        residual: what `read_context` gives for this batch, if it is known already.
        attention: how both networks compute their self-attention (see `models/attention.py`).
        key: in training, of a selection head's noise; without it such a head does as at inference.
    """
    if residual is None:
        residual = read_context(lm, batch.tokens, batch.segments, config, attention)
    sequences = len(residual)
    vector = write_vectors(hypernet, lm, batch, residual, remat, attention)
    vector = regroup(vector, sequences, -1, residual.shape[-1])
    factor, positions, head = regroup(batch.factor, sequences, -1), ranks(batch.segments), hypernet.selection

    def run(x: Array, start: int, stop: int) -> Array:
        return lm.run(x, positions, batch.segments, start, stop, remat, attention)

    def add(x: Array, layer: int) -> tuple[Array, Array]:
        gates = jnp.zeros_like(batch.steer_mask)
        for row in range(factor.shape[1]):
            own = batch.steer_mask & (batch.segments == row + 1)
            gate = own if head is None else own * head(x, vector[:, row], layer, key)
            x = steer(x, vector[:, row], factor[:, row], gate)
            gates = jnp.where(own, gate, gates)
        return x, gates

    residual, gates = upper_pass(run, add, residual, lm.config.layers, config)
    return _at(residual, batch.response_index), gates


def steered_logits(hypernet: Hypernet, lm: LM, batch: SteeringBatch, config: SteeringConfig) -> Float[Array, "S R V"]:
    """Logits that predict the response tokens, float32; training never holds them whole (`loss.response_loss`)."""
    residual, _ = steered_residual(hypernet, lm, batch, config)
    return lm.unembed(residual)


def _at(residual: Float[Array, "S T D"], columns: Int[Array, "S N"]) -> Float[Array, "S N D"]:
    return jnp.take_along_axis(residual, columns[..., None], axis=1)
