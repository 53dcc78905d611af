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
from functools import partial

import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, Int

from hypersteer_jax.config import SteeringConfig
from hypersteer_jax.data.batch import SteeringBatch
from hypersteer_jax.models.hypernet import Hypernet
from hypersteer_jax.models.lm import LM, ranks

Run = Callable[[Array, int, int], Array]  # (residual, start, stop) -> residual
Select = Callable[[Array, Array, int], Array]  # (residual, vector, layer) -> how much of it each token takes, [B, T]


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
    run: Run,
    residual: Float[Array, "B T D"],
    layers: int,
    vector: Float[Array, "B D"],
    factor: Float[Array, " B"],
    where: Bool[Array, "B T"],
    config: SteeringConfig,
    select: Select | None,
) -> tuple[Float[Array, "B T D"], list[Array]]:
    """From the context's residual to the last block's, the vector added to the output of each steered block.

    The gate of a block is `where`, or with a selection head what that says there; the gates are returned as well.
    """
    at, gates = lower_blocks(config), []
    for layer in config.layers:
        residual = run(residual, at, layer + 1)
        gates.append(where if select is None else where * select(residual, vector, layer))
        residual = steer(residual, vector, factor, gates[-1])
        at = layer + 1
    return run(residual, at, layers), gates


def read_context(lm: LM, tokens: Int[Array, "B T"], mask: Bool[Array, "B T"], config: SteeringConfig) -> Array:
    """Residual `[B, T, D]` that the hypernetwork reads and that `upper_pass` continues from."""
    return lm.run(lm.embed(tokens), ranks(mask), mask, 0, lower_blocks(config))


def steered_residual(
    hypernet: Hypernet,
    lm: LM,
    batch: SteeringBatch,
    config: SteeringConfig,
    remat: bool = False,
    key: Array | None = None,
) -> tuple[Float[Array, "B R D"], list[Array]]:
    """Last residual at the positions that predict the response tokens, under steering, and the gates `[B, T]`.

    Args:
        hypernet: the trained network; gradients are taken with respect to it.
        lm: the frozen base LM.
        batch: see `SteeringBatch`; the vector is scaled by its `factor`.
        config: where to read and write.
        remat: recompute block activations in the backward pass.
        key: in training, of a selection head's noise; without it such a head does as at inference.
    """
    residual = read_context(lm, batch.tokens, batch.mask, config)
    context = residual[:, : batch.context_mask.shape[1]]  # rows start with their prompt
    vector = hypernet(
        batch.concept_tokens, batch.concept_mask, context, batch.context_mask, lm.embedding[...], remat=remat
    )
    positions = ranks(batch.mask)

    def run(x: Array, start: int, stop: int) -> Array:
        return lm.run(x, positions, batch.mask, start, stop, remat)

    select = None if hypernet.selection is None else partial(hypernet.selection, key=key)
    layers = lm.config.layers
    residual, gates = upper_pass(run, residual, layers, vector, batch.factor, batch.steer_mask, config, select)
    return jnp.take_along_axis(residual, batch.response_index[..., None], axis=1), gates


def steered_logits(hypernet: Hypernet, lm: LM, batch: SteeringBatch, config: SteeringConfig) -> Float[Array, "B R V"]:
    """Logits that predict the response tokens, float32; training never holds them whole (`loss.response_nll`)."""
    residual, _ = steered_residual(hypernet, lm, batch, config)
    return lm.unembed(residual)
