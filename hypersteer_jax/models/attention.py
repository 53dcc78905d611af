"""Attention, rotary positions and RMSNorm: the arithmetic shared by the base LM and the hypernetwork.

Attention has one signature, `attend`, and the form of its mask says how it is computed: a written-out mask by einsum,
the reference that serves every use; `WholeRows` by the TPU's splash kernel, which never holds the logits in memory and
serves only self-attention over whole rows. The einsum is the default: over the 200 tokens or so of a training row,
attention is 1 to 2 % of the FLOPs, so the kernel has little to win, and it is for a TPU profile to show that it does.

Letters: B batch, T query length, S key length, N query heads, K key/value heads, H head width.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental.pallas.ops.tpu.splash_attention import LocalMask, MultiHeadMask, SegmentIds, make_splash_mha
from jaxtyping import Bool, Float, Int

from hypersteer_jax.config import AttentionName, LMConfig
from hypersteer_jax.sharding import on_own_part

Segments = Int[Array, "B T"] | Bool[Array, "B T"]  # 0 (False) at padding; a mask is one segment per row

SPLASH_BLOCK = 128  # lengths are padded to a multiple of it: a TPU register has 128 lanes


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


class WholeRows(NamedTuple):
    """The causal mask of whole rows, not written out.

    The tokens of a segment stand together, so later by index is later by position.
    """

    segments: Segments
    window: int | None  # in tokens, None for no limit; compiled into the kernel


Mask = Bool[Array, "B #T S"] | WholeRows


def row_mask(positions: Int[Array, "B T"], segments: Segments, window: int | None, attention: AttentionName) -> Mask:
    """Mask of causal self-attention within the segments of whole rows, in the form that leads to `attention`."""
    if attention == "splash":
        return WholeRows(segments, window)
    own = segments[:, :, None] == segments[:, None, :]
    return causal_mask(positions, positions, own & (segments != 0)[:, None, :], window)


def attend(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    mask: Mask,
    scale: float,
    softcap: float | None,
) -> Float[Array, "B T N H"]:
    """Grouped-query attention with an optional tanh soft-cap, softmax in float32.

    Query head n reads key/value head n // (N // K). The soft-cap comes before the mask (Gemma-2). What a padding query
    gets is finite, differs between the two forms of `mask`, and is read by nothing.
    """
    if isinstance(mask, WholeRows):
        return _splash(q, k, v, mask, scale, softcap)
    b, t, n, h = q.shape
    grouped = q.reshape(b, t, k.shape[2], n // k.shape[2], h)
    logits = jnp.einsum("btkgh,bskh->bkgts", grouped, k, preferred_element_type=jnp.float32) * scale
    if softcap is not None:
        logits = jnp.tanh(logits / softcap) * softcap
    logits = jnp.where(mask[:, None, None], logits, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(logits, axis=-1).astype(v.dtype)
    return jnp.einsum("bkgts,bskh->btkgh", weights, v).reshape(b, t, n, h)


def _splash(q: Array, k: Array, v: Array, rows: WholeRows, scale: float, softcap: float | None) -> Array:
    """`attend` by the TPU kernel of `jax.experimental.pallas.ops.tpu.splash_attention`.

    A query sees its own segment only, and padding is one: at least itself, so that every softmax is defined. The kernel
    has no scale, so the queries bring it: in bfloat16 they are rounded once more, unless it is a power of two, as in
    Gemma-2-2B and 9B.
    """
    length = q.shape[1]
    missing = -length % SPLASH_BLOCK
    left = None if rows.window is None or length <= rows.window else rows.window - 1
    mask = LocalMask((length + missing,) * 2, (left, 0), offset=0)  # nothing to the right of a query: causal

    def heads_first(x: Array) -> Array:
        return jnp.pad(x, ((0, 0), (0, missing), (0, 0), (0, 0))).swapaxes(1, 2)

    def local(q: Array, k: Array, v: Array, segments: Array) -> Array:
        kernel = make_splash_mha(
            MultiHeadMask([mask] * q.shape[2]), head_shards=1, q_seq_shards=1, attn_logits_soft_cap=softcap
        )
        segments = jnp.pad(segments.astype(jnp.int32), ((0, 0), (0, missing)))
        rows = (heads_first(q * scale), heads_first(k), heads_first(v), segments)
        out = jax.vmap(lambda q, k, v, segment: kernel(q, k, v, SegmentIds(segment, segment)))(*rows)
        return out.swapaxes(1, 2)[:, :length]

    return on_own_part(local, q, k, v, rows.segments)
