"""The releases' hypernetwork, and weights from outside for it and for the base LM.

Letters: B batch, P steering-prompt length, T length of the base LM's rows, D width.
"""

import copy
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor, nn
from transformers import Gemma2Config, Gemma2ForCausalLM
from transformers.models.gemma2.modeling_gemma2 import (
    Gemma2Attention,
    Gemma2DecoderLayer,
    Gemma2RMSNorm,
    Gemma2RotaryEmbedding,
    eager_attention_forward,
    rotate_half,
)

from hypersteer_jax.pytorch_baseline.selection import SelectionHead, Settings

Turns = tuple[Tensor, Tensor]  # cosine and sine of the rotary embedding, [1, P, H] each

# HyperStuff/hypersteer sets the width and takes the rest from its config class, which is shaped like Gemma-7B.
HYPERSTUFF_SIZES = {
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "intermediate_size": 24_576,
    "query_pre_attn_scalar": 224,
}


def hypernet_config(lm: Gemma2Config, blocks: int, **sizes: int) -> Gemma2Config:
    """Shape of a hypernetwork: that of the base LM, whose loaded config `lm` is, but for the blocks and `sizes`."""
    config = copy.deepcopy(lm)
    # No steering prompt is as long as Gemma-2's window of 4096, so all blocks are alike.
    settings = {"num_hidden_layers": blocks, "layer_types": ["full_attention"] * blocks, **sizes}
    for name, value in settings.items():
        setattr(config, name, value)
    return config


class CrossAttention(Gemma2Attention):
    """Attention to the context. Only queries are rotated (AxBench at dc57b9b)."""

    def forward(self, x: Tensor, context: Tensor, turns: Turns, mask: Tensor) -> Tensor:
        """What to add to the residual, `[B, P, D]`; `context [B, T, D]`, `mask [B, 1, P, T]` is added to the scores."""
        q, k, v = (
            heads.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for heads in (self.q_proj(x), self.k_proj(context), self.v_proj(context))
        )
        cos, sin = turns
        q = q * cos + rotate_half(q) * sin
        out, _ = eager_attention_forward(
            self, q, k, v, mask, scaling=self.scaling, softcap=self.config.attn_logit_softcapping
        )
        return self.o_proj(out.flatten(-2))


class HyperBlock(Gemma2DecoderLayer):
    """A Gemma-2 block with cross-attention between self-attention and MLP, under sandwich norms like theirs."""

    def __init__(self, config: Gemma2Config, index: int):
        super().__init__(config, index)
        self.cross_attention = CrossAttention(config, index)
        self.pre_cross_attention_layernorm = Gemma2RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_cross_attention_layernorm = Gemma2RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x: Tensor, context: Tensor, turns: Turns, causal: Tensor, seen: Tensor) -> Tensor:
        """Residual `[B, P, D]` after the block; `causal [B, 1, P, P]` and `seen [B, 1, P, T]` are added to scores."""
        normed = self.input_layernorm(x)
        attended, _ = self.self_attn(hidden_states=normed, position_embeddings=turns, attention_mask=causal)
        x = x + self.post_attention_layernorm(attended)
        attended = self.cross_attention(self.pre_cross_attention_layernorm(x), context, turns, seen)
        x = x + self.post_cross_attention_layernorm(attended)
        return x + self.post_feedforward_layernorm(self.mlp(self.pre_feedforward_layernorm(x)))


class Hypernet(nn.Module):
    """Steering prompt and context to steering vector; parameters are named as in the releases' checkpoints.

    The selection head of a run that has one is part of it, so that it is trained with it.
    """

    def __init__(self, config: Gemma2Config, selection: Settings | None = None):
        super().__init__()
        width = config.hidden_size
        self.embed_tokens = nn.Embedding(config.vocab_size, width)
        self.layers = nn.ModuleList(HyperBlock(config, index) for index in range(config.num_hidden_layers))
        self.norm = Gemma2RMSNorm(width, config.rms_norm_eps)  # in every checkpoint, never applied
        self.regression_head = nn.Linear(width, width)
        self.rotary_emb = Gemma2RotaryEmbedding(config)
        self.selection_head = None if selection is None else SelectionHead(width, selection)

    def forward(self, embedded: Tensor, mask: Tensor, context: Tensor, context_mask: Tensor) -> Tensor:
        """Steering vectors `[B, D]`, in the dtype of the weights (paper, eq. 3; AxBench at dc57b9b).

        Args:
            embedded: `[B, P, D]`, steering prompts, left-padded, as they are in a table of embeddings.
            mask: `[B, P]`, not 0 at real tokens.
            context: `[B, T, D]`, residual of the base LM, read without a norm.
            context_mask: `[B, T]`, not 0 at the prompt's tokens.
        """
        real, index = mask.bool(), torch.arange(mask.shape[1], device=mask.device)
        turns = self.rotary_emb(embedded, index[None])  # by place in the padded row: padding changes the vector
        causal = _additive((index[:, None] >= index) & real[:, None, :], embedded.dtype)
        seen = _additive(real[:, :, None] & context_mask.bool()[:, None, :], embedded.dtype)
        x = embedded * torch.tensor(embedded.shape[-1] ** 0.5, dtype=embedded.dtype)  # rounded as Gemma rounds it
        for block in self.layers:
            x = block(x, context, turns, causal, seen)
        return self.regression_head(x[:, -1])


def _additive(allowed: Tensor, dtype: torch.dtype) -> Tensor:
    """`[B, 1, P, S]`, to be added to scores of all heads: 0 where allowed, else the lowest number."""
    return torch.where(allowed, 0.0, torch.finfo(dtype).min).to(dtype)[:, None]


def load_hypernet(
    config: Gemma2Config,
    tensors: Mapping[str, np.ndarray],
    dtype: torch.dtype = torch.float32,
    selection: Settings | None = None,
) -> Hypernet:
    """A hypernetwork with copies of these weights, named and laid out as in the releases' checkpoints.

    Raises:
        RuntimeError: tensors are missing, extra or misshapen; the message lists them.
    """
    hypernet = Hypernet(config, selection)
    # Assigned, the weights bring their dtype; `.to(dtype)` would also round the rotary embedding's frequencies.
    hypernet.load_state_dict(_copies(tensors, dtype), assign=True)
    return hypernet


def load_lm(
    config: Gemma2Config, tensors: Mapping[str, np.ndarray], dtype: torch.dtype = torch.float32
) -> Gemma2ForCausalLM:
    """The frozen base LM with copies of these weights, by their Hugging Face names; its head is its embedding.

    Attention is eager, transformers' own choice for Gemma-2, since SDPA has no soft-cap.

    Raises:
        RuntimeError: tensors are missing, extra or misshapen; the message lists them.
    """
    lm = Gemma2ForCausalLM(config)
    values = _copies(tensors, dtype)
    lm.load_state_dict({**values, "lm_head.weight": values["model.embed_tokens.weight"]}, assign=True)
    return lm.eval().requires_grad_(False)


def _copies(tensors: Mapping[str, np.ndarray], dtype: torch.dtype) -> dict[str, Tensor]:
    """Copies in this dtype, by way of float32, because PyTorch does not know numpy's bfloat16."""
    return {name: torch.tensor(np.asarray(value, np.float32)).to(dtype) for name, value in tensors.items()}
