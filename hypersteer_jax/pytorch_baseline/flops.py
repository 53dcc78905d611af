"""How much arithmetic the baseline's step does, by part; `training/flops.py` counts ours in the same way.

A product of [m, k] and [k, n] counts 2·m·n·k, as in PyTorch's own counter, and only such products are counted: what is
linear in the activations or the weights is left out, as are the optimizer and the rotary angles (a product of a column
and a row, which PyTorch runs as a multiplication). Attention computes its whole squares.

Letters: B batch, T prompt, response and padding, P steering prompt, D width, V vocabulary.
"""

from typing import NamedTuple

from transformers import Gemma2Config

from hypersteer_jax.pytorch_baseline.steering import Batch, Form


class BaselineFlops(NamedTuple):
    """FLOPs of one step over the whole batch."""

    passes: int  # two or three of the base LM: all blocks and the logits of all positions
    backward: int  # through the activations of the blocks above the steered one, and of all logits
    hypernet: int  # forward; keys and values are those of all T positions
    hypernet_backward: int  # through activations and to weights, without a gradient of the context

    @property
    def total(self) -> int:
        """What the step executes."""
        return sum(self)


def baseline_flops(form: Form, lm: Gemma2Config, hypernet: Gemma2Config, layer: int, batch: Batch) -> BaselineFlops:
    """FLOPs of `train_step`.

    Args:
        form: says how many passes there are.
        lm: shape of the base LM.
        hypernet: shape of the hypernetwork's blocks, and how many there are.
        layer: the steered block.
        batch: its padded lengths T and P count.
    """
    rows, tokens = batch.tokens.shape
    concept = batch.concept_tokens.shape[1]
    width, above = lm.hidden_size, lm.num_hidden_layers - layer - 1
    linear, pairs = _linear(lm, tokens, tokens) + _mlp(lm, tokens), _pairs(lm, tokens, tokens)
    logits = 2 * tokens * width * lm.vocab_size
    block = _linear(hypernet, concept, concept) + _pairs(hypernet, concept, concept) + _mlp(hypernet, concept)
    cross = _linear(hypernet, concept, tokens) + _pairs(hypernet, concept, tokens)
    forward = hypernet.num_hidden_layers * (block + cross) + 2 * width**2
    context_gradient = _linear(hypernet, 0, tokens)  # of keys and values, which would go on to the frozen base LM
    parts = BaselineFlops(
        passes=(2 + form.unsteered_pass) * (lm.num_hidden_layers * (linear + pairs) + logits),
        backward=above * (linear + 2 * pairs) + logits,
        hypernet=forward,
        hypernet_backward=2 * forward - hypernet.num_hidden_layers * context_gradient,
    )
    return BaselineFlops(*(rows * part for part in parts))


def _linear(config: Gemma2Config, queries: int, keys: int) -> int:
    """Projections of one attention: query and output at `queries` positions, key and value at `keys`."""
    heads = config.num_attention_heads * queries + config.num_key_value_heads * keys
    return 2 * 2 * config.hidden_size * config.head_dim * heads


def _pairs(config: Gemma2Config, queries: int, keys: int) -> int:
    """Scores, and weighted sums of values, of all pairs."""
    return 2 * 2 * config.num_attention_heads * config.head_dim * queries * keys


def _mlp(config: Gemma2Config, positions: int) -> int:
    """Gate, up and down."""
    return 3 * 2 * positions * config.hidden_size * config.intermediate_size
