"""How much arithmetic a training step needs, and how much ours does on top of it, part by part.

    flops = step_flops(PRESETS["gemma-2-2b"], config, Bucket(tokens=192, context=64, response=128, concept=48))
    flops.minimal / seconds / peak        # utilisation in useful arithmetic
    flops.total                           # what the step really executes

A product of [m, k] and [k, n] counts 2·m·n·k. Only such products are counted: norms, softmax, rotary positions,
embedding look-ups, a selection head, the optimizer and everything else that is linear in the activations or the weights
is left out (it is bound by memory, not by arithmetic). Lengths are the padded ones of the batch. The minimum takes
every block at every position: that the last hypernetwork block is read at one position only, and the last LM block at
the scored ones, is not taken off, nor is a sliding window that binds, nor what two rows of one sequence do not see of
each other.

Letters: T sequence, C context, P steering prompt, R scored tokens of a sequence, D width, V vocabulary, L and N blocks,
ℓ the first steered block.
"""

import math
from typing import NamedTuple

import numpy as np

from hypersteer_jax.config import HypernetConfig, LMConfig, RunConfig, hypernet_shape
from hypersteer_jax.data.batch import SteeringBatch
from hypersteer_jax.data.pipeline import Bucket, Layout
from hypersteer_jax.steering import lower_blocks


class StepFlops(NamedTuple):
    """FLOPs of one step over the whole batch, by part. The base LM is frozen: no part is a gradient of its weights."""

    lower: int  # blocks 0 to ℓ of the base LM, once for the context and the steered residual
    upper: int  # blocks ℓ+1 to L-1, forward
    upper_backward: int  # the same, backward through the activations
    hypernet: int  # self-attention, MLP and head of the hypernetwork, forward
    hypernet_backward: int  # through activations and to weights
    cross: int  # cross-attention sub-blocks, forward
    cross_backward: int  # as above, without a gradient of the context
    unembed: int  # logits of the scored positions, forward
    unembed_backward: int  # through activations
    masked: int  # overhead: the half of the self-attention squares that the causal mask throws away
    blocks_again: int  # overhead: activations made again in the backward pass (`train.remat`)

    @property
    def minimal(self) -> int:
        """What the method needs, without the overhead."""
        return self.total - self.masked - self.blocks_again

    @property
    def total(self) -> int:
        """What our step executes."""
        return sum(self)


def evaluation_interval(
    lm: LMConfig, config: RunConfig, layout: Layout, evaluation: dict[str, list[SteeringBatch]]
) -> int:
    """Steps from one evaluation to the next: `train.eval_every`, or more if these would exceed `train.eval_share`.

    Both sides are counted in FLOPs, not in seconds, so that a run evaluates at the same steps wherever it runs. There
    is always one evaluation, at the end. 0 is "never", as in `train.eval_every`.
    """
    train = config.train
    cost = 0
    for batches in evaluation.values():
        tokens, context, response, concept = (
            array.shape[1]
            for batch in batches[:1]
            for array in (batch.tokens, batch.context_mask, batch.response_tokens, batch.concept_tokens)
        )
        once = step_flops(lm, config, Bucket(tokens, context, response, concept))
        cost += len(batches) * (once.lower + once.upper + once.hypernet + once.cross + once.unembed)
    if not (train.eval_every and cost):
        return train.eval_every
    shapes = [step_flops(lm, config, bucket, cached=train.cache != "off").minimal for bucket in layout.buckets]
    total = train.steps * np.mean([shapes[bucket] for bucket in layout.bucket_of])
    affordable = max(1, int(train.eval_share * total / cost))
    return max(train.eval_every, math.ceil(train.steps / affordable))


class Products(NamedTuple):
    """Forward FLOPs of one sub-network by what they cost in the backward pass."""

    weights: int  # activations times weights: once more for each of the two gradients
    pairs: int  # queries times keys, and attention times values, for the pairs that the mask lets through: twice more
    masked: int  # the same for all other pairs

    @property
    def forward(self) -> int:
        """What the forward pass needs."""
        return self.weights + self.pairs


def step_flops(
    lm: LMConfig, config: RunConfig, shape: Bucket, prompts: int | None = None, cached: bool = False
) -> StepFlops:
    """FLOPs of `train_step` for `config.train.batch` rows of one shape, over all devices.

    Args:
        lm: the base LM's shape.
        config: its `hypernet`, `steering`, `train.batch` and `train.remat` count.
        shape: lengths T, C, R and P in tokens, and rows in a sequence.
        prompts: steering prompts of a batch, U, where rows share them; None for one to each row.
        cached: whether the step is given the residual that the hypernetwork reads.
    """
    hypernet, rows = config.hypernet, config.train.batch
    sequences, prompts = rows // shape.rows, rows if prompts is None else prompts
    below = config.steering.layers[0] + 1
    above = lm.layers - below
    run = below - lower_blocks(config.steering) if cached else below
    reader = hypernet_shape(hypernet, lm)
    block, concept = _block(lm, shape.tokens), _block(reader, shape.concept)
    cross, head = _cross(hypernet, reader, shape), _head(hypernet, reader)
    logits = sequences * 2 * shape.response * lm.width * lm.vocab
    again = sequences * above * _again(lm, shape.tokens)
    again += hypernet.blocks * (prompts * _again(reader, shape.concept) + rows * cross.forward)
    return StepFlops(
        lower=sequences * run * block.forward,
        upper=sequences * above * block.forward,
        upper_backward=sequences * above * (block.weights + 2 * block.pairs),
        hypernet=prompts * (hypernet.blocks * concept.forward + head),
        hypernet_backward=prompts * 2 * (hypernet.blocks * concept.forward + head),
        cross=rows * hypernet.blocks * cross.forward,
        cross_backward=rows * hypernet.blocks * (2 * cross.forward - _context_gradient(hypernet, reader, shape)),
        unembed=logits,
        unembed_backward=logits,
        masked=sequences * (run + 3 * above) * block.masked + prompts * 3 * hypernet.blocks * concept.masked,
        blocks_again=again if config.train.remat else 0,
    )


def _block(lm: LMConfig, length: int) -> Products:
    """Self-attention and MLP of one block on one row of `length` tokens."""
    attention = 2 * lm.width * (lm.heads + lm.kv_heads) * lm.head_dim  # queries and output, keys and values
    mlp = 3 * lm.width * lm.mlp_width  # gate, up and down
    pair = 4 * lm.heads * lm.head_dim  # one query and one key: their product, and the value's share of the output
    seen = length * (length + 1) // 2
    return Products(2 * length * (attention + mlp), pair * seen, pair * (length**2 - seen))


def _cross(config: HypernetConfig, lm: LMConfig, shape: Bucket) -> Products:
    """Cross-attention of one hypernetwork block on one row: P queries, C keys and values, nothing masked."""
    if config.variant != "cross_attention":
        return Products(0, 0, 0)
    weights = 2 * 2 * lm.width * lm.head_dim * (lm.heads * shape.concept + lm.kv_heads * shape.context)
    return Products(weights, 4 * lm.heads * lm.head_dim * shape.concept * shape.context, 0)


def _context_gradient(config: HypernetConfig, lm: LMConfig, shape: Bucket) -> int:
    """What one block saves because nothing behind its keys and values is trained; a norm of the context is."""
    if config.variant != "cross_attention" or config.memory_norm:
        return 0
    return 2 * 2 * lm.width * lm.head_dim * lm.kv_heads * shape.context


def _head(config: HypernetConfig, lm: LMConfig) -> int:
    """Forward FLOPs of the read-out of one row's last position."""
    matrices = 4 if config.head == "mlp" else 1
    return matrices * 2 * lm.width**2


def _again(lm: LMConfig, length: int) -> int:
    """A block's forward pass when it is made again. The backward pass asks for the MLP's output only to undo a norm."""
    block = _block(lm, length)
    down = 0 if lm.sandwich_norms else 2 * length * lm.mlp_width * lm.width
    return block.forward + block.masked - down
