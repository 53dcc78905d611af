"""The training loss: cross-entropy of the steered base LM on the response (paper, eq. 4)."""

from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

from hypersteer_jax.models.lm import LM, Unembedding
from hypersteer_jax.sharding import batch_ways

# Tokens of a device whose logits exist at a time: with Gemma-2's vocabulary 0.5 GB of float32. Far fewer would leave an
# accelerator waiting for the head's weights, which each chunk reads anew.
CHUNK = 512


def response_loss(
    lm: LM,
    residual: Float[Array, "S R D"],
    tokens: Int[Array, "S R"],
    share: Float[Array, "S R"],
    mean: Literal["token", "example"] = "token",
) -> tuple[Float[Array, ""], Int[Array, ""]]:
    """Mean negative log-likelihood of the response tokens in nats, and the number of tokens it is over.

    "token" averages over all response tokens of the batch (release), so long responses weigh more; "example" averages
    within each row first. Rows without response tokens count for nothing. Differentiable in `residual` only, for the
    base LM is frozen.

    Args:
        lm: base LM, whose head makes the logits.
        residual: last residual at the positions that predict the tokens.
        tokens: response tokens.
        share: 1 / number of response tokens of the token's row; 0 in padding.
        mean: what is averaged over.
    """
    real = share > 0
    weights = real.astype(jnp.float32) if mean == "token" else share
    return weighted_nll(lm, residual, tokens, weights / jnp.maximum(jnp.sum(weights), 1)), jnp.sum(real)


@jax.custom_vjp
def weighted_nll(
    lm: LM, residual: Float[Array, "S R D"], tokens: Int[Array, "S R"], weights: Float[Array, "S R"]
) -> Float[Array, ""]:
    """Sum of `weights` times negative log-likelihoods in nats; a weight of 0 hides whatever is there.

    The vocabulary may have 256,000 words, so logits are made for a few positions at a time. Where a gradient is wanted
    it is made beside them, from the same logits: they are neither kept nor made twice.
    """
    return jnp.sum(token_nll(lm, residual, tokens, weights))


def token_nll(
    lm: LM, residual: Float[Array, "S R D"], tokens: Int[Array, "S R"], weights: Float[Array, "S R"]
) -> Float[Array, "S R"]:
    """`weights` times negative log-likelihoods in nats, whose sum `weighted_nll` is."""
    return _chunks(partial(_nll, lm, lm.unembedding()), residual, tokens, weights)


def _forward(lm: LM, residual: Array, tokens: Array, weights: Array) -> tuple[Array, Array]:
    head = lm.unembedding()  # gathered once for all chunks

    def nll_and_gradient(x: Array, target: Array, weight: Array) -> tuple[Array, Array]:
        nll, pull = jax.vjp(lambda x: _nll(lm, head, x, target, weight), x)
        return nll, pull(jnp.ones_like(nll))[0]

    nll, gradient = _chunks(nll_and_gradient, residual, tokens, weights)
    return jnp.sum(nll), gradient


def _backward(gradient: Array, cotangent: Array) -> tuple[None, Array, None, None]:
    return None, (cotangent * gradient).astype(gradient.dtype), None, None


weighted_nll.defvjp(_forward, _backward)


def _nll(
    lm: LM,
    head: Unembedding,
    x: Float[Array, "S c D"],
    target: Int[Array, "S c"],
    weight: Float[Array, "S c"],
) -> Float[Array, "S c"]:
    logits = lm.unembed(x, head)
    # The vocabulary may be split over devices: a sum over it is, too, while picking one of its places would gather it.
    own = jnp.sum(jnp.where(jnp.arange(logits.shape[-1]) == target[..., None], logits, 0.0), axis=-1)
    return weight * jnp.where(weight > 0, jax.nn.logsumexp(logits, axis=-1) - own, 0.0)


def _chunks(function: Any, *arrays: Array) -> Any:
    """`function` of a few positions at a time; all arrays and results are `[S, R, ...]`."""
    rows, length = arrays[1].shape
    most = max(1, CHUNK * batch_ways() // rows)
    chunk = max(size for size in range(1, min(length, most) + 1) if length % size == 0)
    split = [jnp.moveaxis(x.reshape(rows, length // chunk, chunk, *x.shape[2:]), 1, 0) for x in arrays]
    parts = jax.lax.map(lambda part: function(*part), tuple(split))
    return jax.tree.map(lambda y: jnp.moveaxis(y, 0, 1).reshape(rows, length, *y.shape[3:]), parts)
