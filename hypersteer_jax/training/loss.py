"""The training loss: cross-entropy of the steered base LM on the response (paper, eq. 4)."""

from typing import Literal

import jax.numpy as jnp
import optax
from jax import Array
from jaxtyping import Bool, Float, Int


def response_loss(
    logits: Float[Array, "B R V"],
    tokens: Int[Array, "B R"],
    mask: Bool[Array, "B R"],
    mean: Literal["token", "example"] = "token",
) -> tuple[Float[Array, ""], Int[Array, ""]]:
    """Mean negative log-likelihood in nats, and the number of tokens it is over.

    "token" averages over all response tokens of the batch (release), so long responses weigh more; "example" averages
    within each row first. Rows without response tokens count for nothing.
    """
    nll = jnp.where(mask, optax.softmax_cross_entropy_with_integer_labels(logits, tokens), 0.0)
    lengths = jnp.sum(mask, axis=1)
    count = jnp.sum(lengths)
    if mean == "token":
        return jnp.sum(nll) / jnp.maximum(count, 1), count
    rows = jnp.sum(nll, axis=1) / jnp.maximum(lengths, 1)
    return jnp.sum(rows) / jnp.maximum(jnp.sum(lengths > 0), 1), count
