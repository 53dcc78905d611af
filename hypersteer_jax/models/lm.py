"""The base LM: one decoder whose families (Gemma-2, Llama, Qwen) differ by `LMConfig` values only.

    residual = lm.embed(tokens)                                # [B, T, D]
    residual = lm.run(residual, positions, mask, 0, layer)     # blocks 0 .. layer-1
    logits = lm.unembed(residual)                              # [B, T, V], float32

The blocks are one stack of weights, run by a scan over block *indices*. Slicing the stack would copy the weights of the
slice; an index costs nothing, and the LM need not know at which layer it will be steered.

Letters: B batch, T length, S cache length, L blocks, D width, N query heads, K key/value heads, H head width, F MLP
width, V vocabulary.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jaxtyping import Bool, Float, Int

from hypersteer_jax.config import AttentionName, LMConfig
from hypersteer_jax.models.attention import (
    Mask,
    Segments,
    WholeRows,
    attend,
    causal_mask,
    rms_norm,
    rope,
    rope_frequencies,
    row_mask,
)
from hypersteer_jax.sharding import batch_spec, cache_spec, gather, gather_vocabulary, look_up, take

INIT_STD = 0.02  # of every random weight matrix; Gemma's and the release's `initializer_range`


def normal(rngs: nnx.Rngs, *shape: int) -> nnx.Param:
    """A weight drawn from N(0, 0.02), float32."""
    return nnx.Param(INIT_STD * jax.random.normal(rngs.params(), shape))


def constant(value: float, *shape: int) -> nnx.Param:
    """A weight with one value everywhere, float32."""
    return nnx.Param(jnp.full(shape, value, jnp.float32))


class KVCache(NamedTuple):
    """Keys and values of the tokens seen so far, for all blocks."""

    k: Float[Array, "L B S K H"]
    v: Float[Array, "L B S K H"]
    positions: Int[Array, "B S"]
    valid: Bool[Array, "B S"]  # slots that hold a real token
    length: Int[Array, ""]  # slots written so far, the same in every row


class Attention(nnx.Module):
    """Projections of one attention; `qk_norm` and `qkv_bias` exist only in the families that have them."""

    def __init__(self, config: LMConfig, rngs: nnx.Rngs):
        self.config = config
        d, n, k, h = config.width, config.heads, config.kv_heads, config.head_dim
        self.q = normal(rngs, d, n, h)
        self.k = normal(rngs, d, k, h)
        self.v = normal(rngs, d, k, h)
        self.o = normal(rngs, n, h, d)
        self.q_bias = constant(0.0, n, h) if config.qkv_bias else None
        self.k_bias = constant(0.0, k, h) if config.qkv_bias else None
        self.v_bias = constant(0.0, k, h) if config.qkv_bias else None
        self.q_norm = constant(1 - config.norm_offset, h) if config.qk_norm else None
        self.k_norm = constant(1 - config.norm_offset, h) if config.qk_norm else None

    def queries(self, x: Float[Array, "B T D"]) -> Float[Array, "B T N H"]:
        """Queries before rotation."""
        return self._head(x, self.q, self.q_bias, self.q_norm)

    def keys_values(self, x: Float[Array, "B S D"]) -> tuple[Float[Array, "B S K H"], Float[Array, "B S K H"]]:
        """Keys before rotation, and values."""
        return self._head(x, self.k, self.k_bias, self.k_norm), self._head(x, self.v, self.v_bias, None)

    def _head(self, x: Array, weight: nnx.Param, bias: nnx.Param | None, norm: nnx.Param | None) -> Array:
        y = jnp.einsum("btd,dnh->btnh", x, weight[...])
        if bias is not None:
            y = y + bias[...]
        return y if norm is None else rms_norm(y, norm[...], self.config.norm_eps, self.config.norm_offset)

    def attend(self, q: Array, k: Array, v: Array, mask: Mask) -> Float[Array, "B T D"]:
        """Attention over given heads, projected back to the residual width."""
        heads = attend(q, k, v, mask, self.config.query_scale, self.config.attention_softcap)
        return jnp.einsum("btnh,nhd->btd", heads, self.o[...], out_sharding=batch_spec())


class MLP(nnx.Module):
    """Gated MLP."""

    def __init__(self, config: LMConfig, rngs: nnx.Rngs):
        self.activation = config.activation
        self.gate = normal(rngs, config.width, config.mlp_width)
        self.up = normal(rngs, config.width, config.mlp_width)
        self.down = normal(rngs, config.mlp_width, config.width)

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        gate = x @ self.gate[...]
        gate = jax.nn.silu(gate) if self.activation == "silu" else jax.nn.gelu(gate, approximate=True)
        return jnp.matmul(gate * (x @ self.up[...]), self.down[...], out_sharding=batch_spec())


class Block(nnx.Module):
    """One decoder block. `post_*` norms exist only with `sandwich_norms`."""

    def __init__(self, config: LMConfig, rngs: nnx.Rngs):
        self.config = config
        one = 1 - config.norm_offset
        self.attention = Attention(config, rngs)
        self.mlp = MLP(config, rngs)
        self.pre_attention = constant(one, config.width)
        self.pre_mlp = constant(one, config.width)
        self.post_attention = constant(one, config.width) if config.sandwich_norms else None
        self.post_mlp = constant(one, config.width) if config.sandwich_norms else None

    def norm(self, x: Array, weight: nnx.Param | None) -> Array:
        """RMSNorm with this family's constants; the identity where the family has no such norm."""
        return x if weight is None else rms_norm(x, weight[...], self.config.norm_eps, self.config.norm_offset)

    def heads(self, x: Float[Array, "B T D"], positions: Int[Array, "B T"]) -> tuple[Array, Array, Array]:
        """Rotated queries and keys, and values, of the self-attention."""
        x = self.norm(x, self.pre_attention)
        frequencies = rope_frequencies(self.config)
        q = rope(self.attention.queries(x), positions, frequencies)
        k, v = self.attention.keys_values(x)
        return q, rope(k, positions, frequencies), v

    def self_attention(self, x: Float[Array, "B T D"], q: Array, k: Array, v: Array, mask: Mask) -> Array:
        """Residual after the self-attention sub-block."""
        return x + self.norm(self.attention.attend(q, k, v, mask), self.post_attention)

    def feed_forward(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """Residual after the MLP sub-block."""
        return x + self.norm(self.mlp(self.norm(x, self.pre_mlp)), self.post_mlp)


class Unembedding(NamedTuple):
    """What makes logits of the last residual, gathered."""

    norm: Float[Array, " D"]
    head: Float[Array, "V D"] | Float[Array, "D V"]  # the embedding table, where it is tied


class LM(nnx.Module):
    """Decoder-only language model. Weights are float32 at creation; `cast` gives another dtype."""

    def __init__(self, config: LMConfig, rngs: nnx.Rngs):
        self.config = config
        self.embedding = normal(rngs, config.vocab, config.width)
        keys = jax.random.split(rngs.params(), config.layers)
        self.blocks = jax.vmap(lambda key: Block(config, nnx.Rngs(key)))(keys)
        self.final_norm = constant(1 - config.norm_offset, config.width)
        self.head = None if config.tied else normal(rngs, config.width, config.vocab)

    def embed(self, tokens: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        """Token embeddings in the dtype of the weights, scaled where the family does."""
        return embed(self.embedding[...], tokens, self.config)

    def run(
        self,
        residual: Float[Array, "B T D"],
        positions: Int[Array, "B T"],
        segments: Segments,
        start: int,
        stop: int,
        remat: bool = False,
        attention: AttentionName = "einsum",
    ) -> Float[Array, "B T D"]:
        """Residual stream after blocks `start` to `stop - 1`.

        Args:
            residual: the residual entering block `start`.
            positions: rank of each token in its segment (see `ranks`).
            segments: not 0 at real tokens; a token sees its own segment only, so several texts can share a sequence.
            start: first block run.
            stop: one past the last block run.
            remat: recompute each block in the backward pass instead of keeping its activations.
            attention: how the self-attention is computed (see `attention.py`).
        """
        masks = self._masks(partial(row_mask, positions, segments, attention=attention), positions.shape[1])

        def body(x: Array, index: Array) -> tuple[Array, None]:
            block = self._block(index)
            x = self._self_attention(block, x, block.heads(x, positions), masks, index)
            return block.feed_forward(x), None  # only the carry: returning weights would stack them again

        return jax.lax.scan(for_backward(body, remat), residual, jnp.arange(start, stop))[0]

    def extend(
        self, residual: Float[Array, "B T D"], cache: KVCache, positions: Int[Array, "B T"], start: int, stop: int
    ) -> tuple[Float[Array, "B T D"], KVCache]:
        """As `run`, for tokens whose slots `reserve` has just opened: they see the cache, and are written into it."""
        slot = cache.length - residual.shape[1]
        valid = cache.valid[:, None, :]
        masks = self._masks(partial(causal_mask, positions, cache.positions, valid), valid.shape[2])

        def body(carry: tuple[Array, Array, Array], index: Array) -> tuple[tuple[Array, Array, Array], None]:
            x, keys, values = carry
            block = self._block(index)
            q, k, v = block.heads(x, positions)
            keys = jax.lax.dynamic_update_slice(keys, k[None].astype(keys.dtype), (index, 0, slot, 0, 0))
            values = jax.lax.dynamic_update_slice(values, v[None].astype(values.dtype), (index, 0, slot, 0, 0))
            k, v = (jax.lax.dynamic_index_in_dim(heads, index, keepdims=False) for heads in (keys, values))
            x = self._self_attention(block, x, (q, k, v), masks, index)
            return (block.feed_forward(x), keys, values), None

        carry, _ = jax.lax.scan(body, (residual, cache.k, cache.v), jnp.arange(start, stop))
        return carry[0], cache._replace(k=carry[1], v=carry[2])

    def unembedding(self) -> Unembedding:
        """Weights of `unembed`, which gathers them each time unless it is given them."""
        table = self.embedding[...] if self.head is None else self.head[...]
        vocabulary = 0 if self.head is None else 1
        return Unembedding(gather(self.final_norm[...]), gather_vocabulary(table, vocabulary))

    def unembed(self, residual: Float[Array, "... D"], weights: Unembedding | None = None) -> Float[Array, "... V"]:
        """Logits, float32, after the final norm and the final soft-cap."""
        norm, head = self.unembedding() if weights is None else weights
        x = rms_norm(residual, norm, self.config.norm_eps, self.config.norm_offset)
        axes = "...d,vd->...v" if self.head is None else "...d,dv->...v"
        logits = jnp.einsum(axes, x, head, preferred_element_type=jnp.float32)
        cap = self.config.final_softcap
        return logits if cap is None else jnp.tanh(logits / cap) * cap

    def __call__(self, tokens: Int[Array, "B T"], mask: Bool[Array, "B T"]) -> Float[Array, "B T V"]:
        """Logits of a plain forward pass."""
        residual = self.run(self.embed(tokens), ranks(mask), mask, 0, self.config.layers)
        return self.unembed(residual)

    def _block(self, index: Array) -> Block:
        """Whole weights of one block, taken from the stack."""
        return gather(jax.tree.map(lambda w: jax.lax.dynamic_index_in_dim(w, index, keepdims=False), self.blocks))

    def _masks(self, of_window: Callable[..., Mask], keys: int) -> tuple[Mask, Mask]:
        """Masks of even and odd blocks over `keys` tokens; they differ only where a sliding window can bind."""
        full, window = of_window(window=None), self.config.sliding_window
        return (full, full) if window is None or keys <= window else (of_window(window=window), full)

    @staticmethod
    def _self_attention(
        block: Block, x: Array, heads: tuple[Array, Array, Array], masks: tuple[Mask, Mask], index: Array
    ) -> Array:
        """Residual after the self-attention of block `index`, under its own one of the masks."""
        even, odd = masks
        if even is odd:
            return block.self_attention(x, *heads, even)
        if isinstance(even, WholeRows) or isinstance(odd, WholeRows):  # a window is compiled into its kernel
            under = partial(block.self_attention, x, *heads)
            return jax.lax.cond(index % 2 == 0, lambda: under(even), lambda: under(odd))
        return block.self_attention(x, *heads, jnp.where(index % 2 == 0, even, odd))


def for_backward(body: Callable[..., Any], remat: bool) -> Callable[..., Any]:
    """`body` of a scan over blocks, and what the backward pass finds of each: its activations, or with `remat` nothing.

    Never its weights: they are taken from the stack, and gathered, again. Otherwise the scan would keep a copy of each
    block's, whole on every device.
    """

    def keeps(primitive: Any, *_: Any, **__: Any) -> bool:
        return not remat and primitive.name not in ("dynamic_slice", "squeeze", "reshard")

    return jax.checkpoint(body, policy=keeps, prevent_cse=False)


def embed(table: Float[Array, "V D"], tokens: Int[Array, "B T"], config: LMConfig) -> Float[Array, "B T D"]:
    """Rows of an embedding table, times sqrt(D) rounded to the table's dtype where the family scales."""
    x = look_up(table, tokens)
    return x * jnp.asarray(config.width**0.5, x.dtype) if config.scale_embedding else x


def ranks(segments: Segments) -> Int[Array, "B T"]:
    """True positions: how many tokens of its segment stand before each. Padding is counted likewise; nothing reads it.

    Every segment is contiguous.
    """
    column = jnp.broadcast_to(jnp.arange(segments.shape[1], dtype=jnp.int32), segments.shape)
    first = jnp.pad(segments[:, 1:] != segments[:, :-1], ((0, 0), (1, 0)))
    return column - jax.lax.cummax(jnp.where(first, column, 0), axis=1)


def empty_cache(config: LMConfig, batch: int, slots: int, dtype: jnp.dtype) -> KVCache:
    """A cache for `slots` tokens per row, nothing written yet."""
    shape, rows, heads = (config.layers, batch, slots, config.kv_heads, config.head_dim), batch_spec(), cache_spec()
    return KVCache(
        k=jnp.zeros(shape, dtype, out_sharding=heads),
        v=jnp.zeros(shape, dtype, out_sharding=heads),
        positions=jnp.zeros((batch, slots), jnp.int32, out_sharding=rows),
        valid=jnp.zeros((batch, slots), bool, out_sharding=rows),
        length=jnp.zeros((), jnp.int32),
    )


def reserve(cache: KVCache, mask: Bool[Array, "B T"]) -> tuple[KVCache, Int[Array, "B T"]]:
    """Opens slots for T more tokens per row and returns their true positions.

    The caller sees to it that the slots suffice; `lax.dynamic_update_slice` would otherwise overwrite the last ones.
    """
    before = jnp.sum(cache.valid, axis=1, dtype=jnp.int32, keepdims=True)
    positions = jnp.maximum(before + jnp.cumsum(mask, axis=1, dtype=jnp.int32) - 1, 0)
    at = (0, cache.length)
    opened = cache._replace(
        positions=jax.lax.dynamic_update_slice(cache.positions, positions, at),
        valid=jax.lax.dynamic_update_slice(cache.valid, mask, at),
        length=cache.length + mask.shape[1],
    )
    return opened, positions


def spread(cache: KVCache, rows: Int[Array, " B"], layers: int, slots: int) -> KVCache:
    """A cache of these rows of `cache`, in any order and number, with room for `layers` blocks and `slots` tokens."""

    def heads(x: Float[Array, "l U s K H"]) -> Float[Array, "L B S K H"]:
        room = ((0, layers - x.shape[0]), (0, 0), (0, slots - x.shape[2]), (0, 0), (0, 0))
        return jnp.pad(x.at[:, rows].get(out_sharding=cache_spec()), room)

    def tokens(x: Array) -> Array:
        return jnp.pad(take(x, rows), ((0, 0), (0, slots - x.shape[1])))

    return KVCache(heads(cache.k), heads(cache.v), tokens(cache.positions), tokens(cache.valid), cache.length)


def cast(module: nnx.Module, dtype: jnp.dtype) -> nnx.Module:
    """The same module with every weight in `dtype`."""
    return jax.tree.map(lambda w: w.astype(dtype), module)
