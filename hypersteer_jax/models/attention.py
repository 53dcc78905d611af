"""Attention, rotary positions and RMSNorm: the arithmetic shared by the base LM and the hypernetwork.

Letters: B batch, T query length, S key length, N query heads, K key/value heads, H head width.
"""

import math

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, Int

from hypersteer_jax.config import LMConfig


def rms_norm(x: Float[Array, "... D"], weight: Float[Array, " D"], eps: float, offset: float) -> Float[Array, "... D"]:
    """Root-mean-square norm, computed in float32 and returned in the dtype of `x`.

    Args:
        x: any leading shape.
        weight: one multiplier per channel; the factor applied is `offset + weight` (Gemma stores weights around 0).
        eps: added to the mean square.
        offset: 1 for Gemma, 0 for the other families.
    """
    wide = x.astype(jnp.float32)
    scale = jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + eps)
    return (wide * scale * (offset + weight.astype(jnp.float32))).astype(x.dtype)


def rope_frequencies(config: LMConfig) -> Float[Array, " H2"]:
    """Angular frequency of each rotated pair, float32 `[H/2]`.

    With `rope_scaling` (factor, low, high, original length) the frequencies follow Llama-3.1: wavelengths longer than
    original/low are slowed down by `factor`, those shorter than original/high are kept, and between them the two are
    blended linearly in original/wavelength (Llama-3.1 model card and Hugging Face's `rope_type: llama3`).
    """
    half = jnp.arange(0, config.head_dim, 2, dtype=jnp.float32) / config.head_dim
    frequencies = 1.0 / (config.rope_theta**half)
    if config.rope_scaling is None:
        return frequencies
    factor, low, high, original = config.rope_scaling
    turns = original * frequencies / (2 * math.pi)  # full turns over the original context
    kept = jnp.clip((turns - low) / (high - low), 0.0, 1.0)
    return kept * frequencies + (1 - kept) * frequencies / factor


def rope(x: Float[Array, "B T N H"], positions: Int[Array, "B T"], frequencies: Array) -> Float[Array, "B T N H"]:
    """Rotates the halves of each head by position (half-split layout, as in Hugging Face and Gemma).

    Angles are float32 whatever the dtype of `x`: bfloat16 cannot tell position 256 from 257.
    """
    angles = positions.astype(jnp.float32)[..., None, None] * frequencies
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


def causal_mask(
    query_positions: Int[Array, "B T"],
    key_positions: Int[Array, "B S"],
    allowed: Bool[Array, "B #T S"],
    window: int | None = None,
) -> Bool[Array, "B T S"]:
    """Which keys each query sees: allowed ones, not later than itself, and within `window` tokens if one is given.

    Comparing true positions, not indices, makes the mask the same for left padding, right padding and a KV cache.
    """
    distance = query_positions[:, :, None] - key_positions[:, None, :]
    seen = (distance >= 0) & allowed
    return seen if window is None else seen & (distance < window)


def attend(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    mask: Bool[Array, "B #T S"],
    scale: float,
    softcap: float | None,
) -> Float[Array, "B T N H"]:
    """Grouped-query attention with an optional tanh soft-cap, softmax in float32.

    Query head n reads key/value head n // (N // K). The soft-cap comes before the mask (Gemma-2). A query that sees
    nothing (padding) gets the mean of all values, which nothing reads.
    """
    b, t, n, h = q.shape
    grouped = q.reshape(b, t, k.shape[2], n // k.shape[2], h)
    logits = jnp.einsum("btkgh,bskh->bkgts", grouped, k, preferred_element_type=jnp.float32) * scale
    if softcap is not None:
        logits = jnp.tanh(logits / softcap) * softcap
    logits = jnp.where(mask[:, None, None], logits, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(logits, axis=-1).astype(v.dtype)
    return jnp.einsum("bkgts,bskh->btkgh", weights, v).reshape(b, t, n, h)
