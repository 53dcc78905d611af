"""The heart: from a steering prompt to the logits of the steered base LM, as pure functions.

    steering prompt ──► hypernetwork ──► vector ─┐
                             ▲ context           ▼
    tokens ──► blocks 0..ℓ-1 ─► block ℓ ──► residual + factor · vector ──► blocks ℓ+1..L-1 ──► response logits

One pass through the lower blocks serves both the context and the residual that is steered, since neither depends on the
vector. Freezing the base LM is its being another argument: `jax.grad` differentiates the hypernetwork, and no gradient
or optimizer state of the LM can exist.

Letters: B batch, T length, C context length, R scored tokens, D width, V vocabulary.
"""

from collections.abc import Callable

import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, Int

from hypersteer_jax.config import AttentionName, SteeringConfig
from hypersteer_jax.data.batch import SteeringBatch
from hypersteer_jax.models.hypernet import Hypernet
from hypersteer_jax.models.lm import LM, ranks

Run = Callable[[Array, int, int], Array]  # (residual, start, stop) -> residual


def steer(
    residual: Float[Array, "B T D"], vector: Float[Array, "B D"], factor: Float[Array, " B"], where: Bool[Array, "B T"]
) -> Float[Array, "B T D"]:
    """The residual with `factor * vector` added at the positions where `where` is True (paper, eq. 1).

    The factor has no default: a factor that is forgotten must not pass silently as 1. At factor 0, and at positions
    outside `where`, the residual is unchanged to the bit.
    """
    added = factor[:, None, None] * vector[:, None, :] * where[:, :, None]
    return residual + added.astype(residual.dtype)


def lower_blocks(config: SteeringConfig) -> int:
    """How many blocks the context has passed: up to, or including, the first steered one."""
    return config.layers[0] + (config.context == "leaving")


def upper_pass(
    run: Run,
    residual: Float[Array, "B T D"],
    layers: int,
    vector: Float[Array, "B D"],
    factor: Float[Array, " B"],
    where: Bool[Array, "B T"],
    config: SteeringConfig,
) -> Float[Array, "B T D"]:
    """From the context's residual to the last block's, the vector added to the output of each steered block."""
    at = lower_blocks(config)
    for layer in config.layers:
        residual = steer(run(residual, at, layer + 1), vector, factor, where)
        at = layer + 1
    return run(residual, at, layers)


def read_context(
    lm: LM,
    tokens: Int[Array, "B T"],
    mask: Bool[Array, "B T"],
    config: SteeringConfig,
    attention: AttentionName = "einsum",
) -> Array:
    """Residual `[B, T, D]` that the hypernetwork reads and that `upper_pass` continues from."""
    return lm.run(lm.embed(tokens), ranks(mask), mask, 0, lower_blocks(config), attention=attention)


def steered_residual(
    hypernet: Hypernet,
    lm: LM,
    batch: SteeringBatch,
    config: SteeringConfig,
    remat: bool = False,
    attention: AttentionName = "einsum",
) -> Float[Array, "B R D"]:
    """Last residual at the positions that predict the response tokens, under steering.

    Args:
        hypernet: the trained network; gradients are taken with respect to it.
        lm: the frozen base LM.
        batch: see `SteeringBatch`; the vector is scaled by its `factor`.
        config: where to read and write.
        remat: recompute block activations in the backward pass.
        attention: how both networks compute their self-attention (see `models/attention.py`).
    """
    residual = read_context(lm, batch.tokens, batch.mask, config, attention)
    context = residual[:, : batch.context_mask.shape[1]]  # rows start with their prompt
    vector = hypernet(
        batch.concept_tokens, batch.concept_mask, context, batch.context_mask, lm.embedding[...], remat, attention
    )
    positions = ranks(batch.mask)

    def run(x: Array, start: int, stop: int) -> Array:
        return lm.run(x, positions, batch.mask, start, stop, remat, attention)

    residual = upper_pass(run, residual, lm.config.layers, vector, batch.factor, batch.steer_mask, config)
    return jnp.take_along_axis(residual, batch.response_index[..., None], axis=1)


def steered_logits(hypernet: Hypernet, lm: LM, batch: SteeringBatch, config: SteeringConfig) -> Float[Array, "B R V"]:
    """Logits that predict the response tokens, float32; training never holds them whole (`loss.response_nll`)."""
    return lm.unembed(steered_residual(hypernet, lm, batch, config))
