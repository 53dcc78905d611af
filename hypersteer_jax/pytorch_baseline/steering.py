"""The passes of one training step, in either form. See the package's docstring for what the forms do differently.

Letters: B batch, T prompt, response and padding, P steering prompt, S steered positions of the longest row, D width,
V vocabulary.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, embedding
from transformers import Gemma2Config, Gemma2ForCausalLM

from hypersteer_jax.data.batch import SteeringBatch
from hypersteer_jax.models import hypernet as ours
from hypersteer_jax.models.lm import LM
from hypersteer_jax.models.presets import to_hugging_face
from hypersteer_jax.models.weights import hypernet_tensors, lm_tensors
from hypersteer_jax.pytorch_baseline.hypernet import Hypernet, hypernet_config, load_hypernet, load_lm
from hypersteer_jax.pytorch_baseline.selection import SelectionHead, penalty

IGNORED = -100  # label of a token that is not scored


class Batch(NamedTuple):
    """One batch as the releases' collators pad it. Integers are int64, `factor` is float32."""

    tokens: Tensor  # [B, T], prompt and response, at least one pad on the right
    mask: Tensor  # [B, T], 1 at real tokens
    labels: Tensor  # [B, T], the token itself in the response, -100 elsewhere
    locations: Tensor  # [B, S], columns that are steered; unused slots name the row's first pad
    concept_tokens: Tensor  # [B, P], steering prompts, padded on the left
    concept_mask: Tensor  # [B, P]
    factor: Tensor  # [B]

    @property
    def prompt_mask(self) -> Tensor:
        """`[B, T]`, 1 at the prompt's tokens."""
        return self.mask * (self.labels == IGNORED)


class Form(NamedTuple):
    """What one release does otherwise than the other."""

    prompt_only: bool  # the context pass sees prompt tokens only
    unsteered_pass: bool  # there is a pass that nothing reads
    lm_embedding: bool  # the base LM's table embeds the steering prompt
    clip: float  # global norm of the gradients at most
    clips: int  # passes over all gradients to get there


FORMS = {
    "release": Form(prompt_only=True, unsteered_pass=False, lm_embedding=False, clip=1.0, clips=1),
    "hyperstuff": Form(prompt_only=False, unsteered_pass=True, lm_embedding=True, clip=100.0, clips=2),
}


class Baseline(NamedTuple):
    """One release on one base LM."""

    form: Form
    lm: Gemma2ForCausalLM
    hypernet: Hypernet
    layer: int  # the block whose input is the context and whose output is steered


def baseline_of(form: str, lm: LM, hypernet: ours.Hypernet, layer: int, dtype: torch.dtype = torch.float32) -> Baseline:
    """One release with copies of our weights; a table of embeddings that our hypernetwork has not is zero."""
    copied = load_lm(Gemma2Config(**to_hugging_face(lm.config)), lm_tensors(lm), dtype)
    table = {"embed_tokens.weight": np.zeros((lm.config.vocab, lm.config.width), np.float32)}
    config = hypernet_config(copied.config, hypernet.config.blocks)
    return Baseline(FORMS[form], copied, load_hypernet(config, table | hypernet_tensors(hypernet), dtype), layer)


class Outputs(NamedTuple):
    """All results of the passes; they live until the step is over, as in the releases."""

    context: Tensor  # [B, T, D]
    vector: Tensor  # [B, D]
    unsteered_logits: Tensor | None  # [B, T, V] float32
    logits: Tensor  # [B, T, V] float32
    loss: Tensor  # [], with the selection head's penalty if there is one


def forward(baseline: Baseline, batch: Batch) -> Outputs:
    """The passes of one step: context, vector, perhaps the unsteered pass, steered pass, loss (paper, eq. 4)."""
    form, lm = baseline.form, baseline.lm
    context = read_context(baseline, batch)
    vector = write_vector(baseline, batch, context)
    unsteered_logits = base_pass(lm, batch.tokens, batch.mask).logits if form.unsteered_pass else None
    head = baseline.hypernet.selection_head
    with steered(lm.model.layers[baseline.layer], vector, batch.factor, batch.locations, head):
        logits = base_pass(lm, batch.tokens, batch.mask).logits
    loss = response_loss(logits, batch.labels)
    if head is not None:
        loss = loss + head.settings.sparsity * penalty(head.gates, batch.locations, batch.mask)
    return Outputs(context, vector, unsteered_logits, logits, loss)


class Pass(NamedTuple):
    """What one pass of the base LM gives."""

    logits: Tensor  # [B, T, V] float32
    states: tuple[Tensor, ...]  # [B, T, D] each: residual entering every block, and the last; empty if not wanted


def base_pass(lm: Gemma2ForCausalLM, tokens: Tensor, mask: Tensor, states: bool = False) -> Pass:
    """One whole pass of the base LM: all blocks, the logits of all positions, and the states of all blocks if wanted.

    The logits are float32 whether anything reads them or not, as in transformers 4.45.1, which the releases pin.
    """
    output = lm(input_ids=tokens, attention_mask=mask, output_hidden_states=states)
    return Pass(output.logits.float(), output.hidden_states or ())


def read_context(baseline: Baseline, batch: Batch) -> Tensor:
    """Residual entering the steered block, `[B, T, D]`; the releases agree at the prompt's tokens only."""
    mask = batch.prompt_mask if baseline.form.prompt_only else batch.mask
    return base_pass(baseline.lm, batch.tokens, mask, states=True).states[baseline.layer]


def write_vector(baseline: Baseline, batch: Batch, context: Tensor) -> Tensor:
    """Steering vectors `[B, D]`."""
    table = baseline.lm.model.embed_tokens if baseline.form.lm_embedding else baseline.hypernet.embed_tokens
    embedded = embedding(batch.concept_tokens, table.weight)
    return baseline.hypernet(embedded, batch.concept_mask, context, batch.prompt_mask)


def steer(
    residual: Tensor, vector: Tensor, factor: Tensor, locations: Tensor, head: SelectionHead | None = None
) -> Tensor:
    """The residual with `factor * vector` added at `locations` (paper, eq. 1): gathered, added to, scattered back.

    A column that `locations` names twice is written twice with the same value, so the vector is added to it once. A
    selection head gates what is added.
    """
    index = locations[:, :, None].expand(-1, -1, residual.shape[-1])
    taken, added = residual.gather(1, index), (factor[:, None] * vector).to(residual.dtype)[:, None]
    if head is not None:
        added = head(taken, vector)[..., None] * added
    return residual.scatter(1, index, taken + added)


@contextmanager
def steered(
    block: nn.Module, vector: Tensor, factor: Tensor, locations: Tensor, head: SelectionHead | None = None
) -> Iterator[None]:
    """Within it, the output of `block` is steered."""
    handle = block.register_forward_hook(lambda module, inputs, output: steer(output, vector, factor, locations, head))
    try:
        yield
    finally:
        handle.remove()


def response_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy in nats, the mean over all response tokens of the batch; `logits [B, T, V]`, `labels [B, T]`."""
    predicting = logits[:, :-1].contiguous()
    return cross_entropy(predicting.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED)


def release_batch(batch: SteeringBatch) -> Batch:
    """The same rows as the releases' collators pad them: to the longest, and one pad more on the right."""
    batch = SteeringBatch(*(np.asarray(x) for x in batch))
    sequences, column = np.arange(len(batch.tokens))[:, None], np.arange(batch.tokens.shape[1])
    first = batch.segments != np.pad(batch.segments, ((0, 0), (1, 0)))[:, :-1]
    position = column - np.maximum.accumulate(np.where(first, column, 0), axis=1)  # in its row
    row = sequences * (len(batch.factor) // len(batch.tokens)) + batch.segments - 1
    at = row[batch.mask], position[batch.mask]
    scored = np.nonzero(batch.response_mask)
    answered = scored[0], batch.response_index[scored] + 1
    lengths = np.bincount(at[0])
    shape, longest = (len(lengths), lengths.max() + 1), batch.concept_mask.sum(1).max()
    padded, labels, steered = np.zeros(shape, np.int64), np.full(shape, IGNORED), np.zeros(shape, bool)
    padded[at], steered[at] = batch.tokens[batch.mask], batch.steer_mask[batch.mask]
    labels[row[answered], position[answered]] = batch.response_tokens[scored]
    counts = steered.sum(1)
    columns = np.argsort(~steered, axis=1, kind="stable")[:, : counts.max()]
    unused = np.arange(counts.max()) >= counts[:, None]
    mask = np.arange(shape[1]) < lengths[:, None]
    return Batch(
        tokens=torch.tensor(padded),
        mask=torch.tensor(mask.astype(np.int64)),
        labels=torch.tensor(labels),
        locations=torch.tensor(np.where(unused, lengths[:, None], columns)),
        concept_tokens=torch.tensor(batch.concept_tokens[batch.concept_row, -longest:].astype(np.int64)),
        concept_mask=torch.tensor(batch.concept_mask[batch.concept_row, -longest:].astype(np.int64)),
        factor=torch.tensor(batch.factor),
    )
