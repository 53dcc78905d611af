"""The training loss: cross-entropy of the steered base LM on the response (paper, eq. 4)."""

import math
from typing import Literal

import jax
import jax.numpy as jnp
import optax
from jax import Array
from jaxtyping import Bool, Float, Int

from hypersteer_jax.models.lm import LM

CHUNK = 8  # response positions whose logits exist at a time; batches round R up to a multiple of it


def response_nll(lm: LM, residual: Float[Array, "B R D"], tokens: Int[Array, "B R"]) -> Float[Array, "B R"]:
    """Negative log-likelihood of each response token in nats, float32.

    The vocabulary may have 256,000 words, so logits are made for a few positions at a time and made again in the
    backward pass, instead of being kept.
    """
    rows, length = tokens.shape
    chunk = math.gcd(length, CHUNK)

    @jax.checkpoint
    def nll(part: tuple[Array, Array]) -> Array:
        x, target = part
        return optax.softmax_cross_entropy_with_integer_labels(lm.unembed(x), target)

    def split(x: Array) -> Array:
        return jnp.moveaxis(x.reshape(rows, length // chunk, chunk, *x.shape[2:]), 1, 0)

    return jnp.moveaxis(jax.lax.map(nll, (split(residual), split(tokens))), 0, 1).reshape(rows, length)


def response_loss(
    nll: Float[Array, "B R"], mask: Bool[Array, "B R"], mean: Literal["token", "example"] = "token"
) -> tuple[Float[Array, ""], Int[Array, ""]]:
    """Mean negative log-likelihood in nats, and the number of tokens it is over.

    "token" averages over all response tokens of the batch (release), so long responses weigh more; "example" averages
    within each row first. Rows without response tokens count for nothing.
    """
    nll = jnp.where(mask, nll, 0.0)
    lengths = jnp.sum(mask, axis=1)
    count = jnp.sum(lengths)
    if mean == "token":
        return jnp.sum(nll) / jnp.maximum(count, 1), count
    rows = jnp.sum(nll, axis=1) / jnp.maximum(lengths, 1)
    return jnp.sum(rows) / jnp.maximum(jnp.sum(lengths > 0), 1), count
