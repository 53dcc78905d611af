"""The hypernetwork: reads a steering prompt (and the base LM's context) and writes a steering vector.

Each block is a block of the base LM's shape (unless the config has sizes of its own) with a cross-attention sub-block
between self-attention and MLP:

    h = h + norm(self_attention(norm(h)))
    h = h + norm(cross_attention(norm(h), context))      # `cross_attention` variant only
    h = h + norm(mlp(norm(h)))

The last position is read by one linear layer (HyperSteer, arXiv 2506.03292, eq. 3 and A.3; the order of sub-blocks, the
context without a norm and the rotation of queries only are the AxBench release's, `modeling_hypernet.py` at dc57b9b).
Variants without context are the same network without the cross-attention sub-block; `in_context` differs from
`no_context` only in the text it reads.

Letters: B batch, P steering-prompt length, C context length, D width, N blocks (in `HypernetConfig`) or query heads.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jaxtyping import Bool, Float, Int

from hypersteer_jax.config import AttentionName, HypernetConfig, LMConfig, SelectionConfig, hypernet_shape
from hypersteer_jax.models.attention import Mask, rms_norm, rope, rope_frequencies, row_mask
from hypersteer_jax.models.lm import LM, MLP, Attention, Block, cast, constant, embed, for_backward, normal, ranks
from hypersteer_jax.models.selection import Selection
from hypersteer_jax.sharding import gather

NO_SELECTION = SelectionConfig()


class HyperBlock(Block):
    """A block of the base LM with a cross-attention sub-block (`cross` is None in variants without context)."""

    def __init__(self, config: LMConfig, cross: bool, rngs: nnx.Rngs):
        super().__init__(config, rngs)
        one = 1 - config.norm_offset
        # Queries and keys of the cross-attention have neither biases nor norms, whatever the family.
        plain = dataclasses.replace(config, qkv_bias=False, qk_norm=False)
        self.cross = Attention(plain, rngs) if cross else None
        self.pre_cross = constant(one, config.width) if cross else None
        self.post_cross = constant(one, config.width) if cross and config.sandwich_norms else None

    def __call__(self, x: Array, positions: Array, mask: Mask, context: Array, seen: Array) -> Array:
        """Residual `[B, P, D]` after the block; `mask` of P by P, `context [B, C, D]`, `seen [B, 1, C]`."""
        x = self.self_attention(x, *self.heads(x, positions), mask)
        if self.cross is not None:
            q = self.cross.queries(self.norm(x, self.pre_cross))
            # Keys stay unrotated (release), so these logits depend on the query's own position.
            q = rope(q, positions, rope_frequencies(self.config))
            x = x + self.norm(self.cross.attend(q, *self.cross.keys_values(context), seen), self.post_cross)
        return self.feed_forward(x)


class Hypernet(nnx.Module):
    """Steering prompt (and context) to steering vector. Weights are float32; `__call__` computes in any dtype.

    All that is trained is here, so `selection`, the head that gates the vector where it is added, is too (or is None).
    """

    def __init__(
        self, config: HypernetConfig, lm_config: LMConfig, rngs: nnx.Rngs, selection: SelectionConfig = NO_SELECTION
    ):
        self.config = config
        self.lm_config = lm_config = hypernet_shape(config, lm_config)
        d, cross = lm_config.width, config.variant == "cross_attention"
        self.embedding = normal(rngs, lm_config.vocab, d) if config.embedding == "own" else None
        keys = jax.random.split(rngs.params(), config.blocks)
        self.blocks = jax.vmap(lambda key: HyperBlock(lm_config, cross, nnx.Rngs(key)))(keys)
        one = 1 - lm_config.norm_offset
        self.memory_norm = constant(one, d) if cross and config.memory_norm else None
        self.final_norm = constant(one, d)  # kept when unused, for the release's checkpoints hold it
        self.head_mlp = MLP(dataclasses.replace(lm_config, mlp_width=d), rngs) if config.head == "mlp" else None
        self.head = normal(rngs, d, d)
        self.head_bias = constant(0.0, d)
        if cross and config.cross_init == "zero":
            self._silence_cross()
        self.selection = Selection(selection, d, rngs) if selection.on else None

    def _silence_cross(self) -> None:
        """Makes every cross-attention sub-block add nothing, while its gradient is not zero."""
        scale, cross = self.blocks.post_cross, self.blocks.cross
        if scale is not None:
            scale[...] = jnp.full_like(scale[...], -self.lm_config.norm_offset)
        elif cross is not None:
            cross.o[...] = jnp.zeros_like(cross.o[...])

    def __call__(
        self,
        tokens: Int[Array, "B P"],
        mask: Bool[Array, "B P"],
        context: Float[Array, "B C D"],
        context_mask: Bool[Array, "B C"],
        lm_embedding: Float[Array, "V D"],
        remat: bool = False,
        attention: AttentionName = "einsum",
    ) -> Float[Array, "B D"]:
        """Steering vectors, float32, computed in the dtype of `context`.

        Args:
            tokens: steering prompts, left-padded, so that the last column is the last real token of every row.
            mask: True at real tokens.
            context: residual of the base LM; read by the `cross_attention` variant only.
            context_mask: True at the positions that may be read (prompt tokens, never the response).
            lm_embedding: the base LM's table, used when `embedding` is "shared".
            remat: recompute each block in the backward pass.
            attention: how the self-attention is computed (see `attention.py`); the cross-attention is always einsum.
        """
        dtype = context.dtype
        table = lm_embedding if self.embedding is None else self.embedding[...]
        x = embed(table.astype(dtype), tokens, self.lm_config)
        true, padded = ranks(mask), jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        positions = true if self.config.positions == "true" else padded
        causal = row_mask(positions, mask, self.lm_config.sliding_window, attention)
        if self.memory_norm is not None:
            context = self._norm(context, self.memory_norm)
        seen = context_mask[:, None, :]

        def body(x: Array, block: HyperBlock) -> tuple[Array, None]:
            return gather(block)(x, positions, causal, context, seen), None

        x = jax.lax.scan(for_backward(body, remat), x, cast(self.blocks, dtype))[0][:, -1]
        if self.config.final_norm:
            x = self._norm(x, self.final_norm)
        if self.head_mlp is not None:
            x = gather(cast(self.head_mlp, dtype))(x)
        weight, bias = gather((self.head[...], self.head_bias[...]))
        return x.astype(jnp.float32) @ weight + bias

    def _norm(self, x: Array, weight: nnx.Param) -> Array:
        return rms_norm(x, gather(weight[...]), self.lm_config.norm_eps, self.lm_config.norm_offset)


def init_hypernet(
    config: HypernetConfig, lm: LM, rngs: nnx.Rngs, selection: SelectionConfig = NO_SELECTION
) -> Hypernet:
    """A new hypernetwork for `lm`: random, or with the base LM's first N blocks and embedding copied in.

    Cross-attention and head are N(0, 0.02) in either case, the head's bias 0 (AxBench release). A selection head is
    drawn last, so that all else starts as it would without it.
    """
    hypernet = Hypernet(config, lm.config, rngs, selection)
    if config.init == "random":
        return hypernet
    copied = jax.tree.map(lambda w: w[: config.blocks].astype(jnp.float32), lm.blocks)
    for name in ("attention", "mlp", "pre_attention", "post_attention", "pre_mlp", "post_mlp"):
        setattr(hypernet.blocks, name, getattr(copied, name))
    if hypernet.embedding is not None:
        hypernet.embedding = jax.tree.map(lambda w: w.astype(jnp.float32), lm.embedding)
    return hypernet
