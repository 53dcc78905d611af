"""Greedy steered texts of the baseline, by whole passes and without a cache: slow, and nothing to go wrong."""

import torch

from hypersteer_jax.pytorch_baseline.steering import (
    IGNORED,
    Baseline,
    Batch,
    base_pass,
    read_context,
    steered,
    write_vector,
)


@torch.no_grad()
def greedy(
    baseline: Baseline, prompt: list[int], concept: list[int], pads: int, prefix: int, max_new: int, end_id: int
) -> list[int]:
    """The tokens that follow a prompt, at factor 1; every position from `prefix` on is steered.

    Args:
        baseline: a release on its base LM.
        prompt: tokens of the base prompt.
        concept: tokens of the steering prompt.
        pads: how many pads stand before them; the releases' vector depends on it.
        prefix: leading tokens that are not steered.
        max_new: tokens to generate at most.
        end_id: token that ends the text; it is not part of it.
    """
    batch = Batch(
        tokens=torch.tensor([prompt]),
        mask=torch.ones(1, len(prompt), dtype=torch.int64),
        labels=torch.full((1, len(prompt)), IGNORED),
        locations=torch.arange(prefix, len(prompt))[None],
        concept_tokens=torch.tensor([[0] * pads + concept]),
        concept_mask=torch.tensor([[0] * pads + [1] * len(concept)]),
        factor=torch.ones(1),
    )
    vector = write_vector(baseline, batch, read_context(baseline, batch))
    tokens = list(prompt)
    while len(tokens) < len(prompt) + max_new:
        row, where = torch.tensor([tokens]), torch.arange(prefix, len(tokens))[None]
        block, head = baseline.lm.model.layers[baseline.layer], baseline.hypernet.selection_head
        with steered(block, vector, batch.factor, where, head):
            token = int(base_pass(baseline.lm, row, torch.ones_like(row)).logits[0, -1].argmax())
        if token == end_id:
            break
        tokens.append(token)
    return tokens[len(prompt) :]
