"""The tiny world's judge: AxBench's three ratings, by rules.

Each rating is 0, 1 or 2, and the score of a text is their harmonic mean, 0 if any is 0 (AxBench, `lm_judge.py`).

- concept: a topic is rated by how many of its words occur, a manner by how many of its markers: two or more distinct
  ones give 2, one gives 1. A pair gets half of what its topic and manner get together, rounded down: 2 takes both in
  full, 1 takes one of them, or a trace of both.
- instruction: two or more distinct keywords of the subject give 2, one gives 1.
- fluency: the text's mean negative log-likelihood per token under the unsteered base LM, given the instruction. Its
  answers wander to any topic and manner, so a fluent text is not blamed for having the concept. Up to `natural` it gets
  2, up to `broken` 1, above 0. Both bounds were measured on unsteered text (`experiments/tinyworld_pretrain.py`):
  `natural` is a third of the way, `broken` two thirds, from the typical unsteered text to the same texts with
  their words shuffled. Repetition lowers the rating: by 1 if more than 15 % of the text's word pairs have occurred in
  it before, by 2 if more than 40 % have. An empty text gets 0.

Words are compared in lower case and whole: "sails" is not "sail".
"""

import json
import random
import re
from collections.abc import Sequence
from functools import partial
from importlib import resources
from itertools import pairwise
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from hypersteer_jax.data.prompts import Prompter
from hypersteer_jax.data.tinyworld.world import Concept, Subject, instruction
from hypersteer_jax.models.lm import LM, ranks
from hypersteer_jax.sharding import batch_ways, split
from hypersteer_jax.training.loss import token_nll

REPEATED, STUCK = 0.15, 0.40  # shares of word pairs seen before; unsteered text stays below the first
BATCH, MULTIPLE = 64, 16


class Bounds(NamedTuple):
    """Fluency bounds in nats per token."""

    natural: float
    broken: float


class Judgement(NamedTuple):
    """Ratings of one text, each 0 to 2."""

    concept: int
    instruction: int
    fluency: int

    @property
    def score(self) -> float:
        """Harmonic mean of the three, 0 if any is 0."""
        return 3 / sum(1 / rating for rating in self) if all(self) else 0.0


def load_bounds() -> Bounds:
    """The bounds that belong to the shipped base LM."""
    text = resources.files(__package__).joinpath("lm/fluency.json").read_text("utf-8")
    return Bounds(**json.loads(text))


def judge(
    lm: LM, prompter: Prompter, bounds: Bounds, cases: Sequence[tuple[Concept, Subject]], texts: Sequence[str]
) -> list[Judgement]:
    """Ratings of texts that were meant to bring a concept into an answer about a subject."""
    rng = random.Random(0)
    prompts = [instruction(subject, rng) for _, subject in cases]
    nlls = mean_nll(lm, prompter, prompts, texts)
    return [
        Judgement(rate_concept(concept, text), rate_instruction(subject, text), rate_fluency(nll, text, bounds))
        for (concept, subject), text, nll in zip(cases, texts, nlls, strict=True)
    ]


def rate_concept(concept: Concept, text: str) -> int:
    """How far the concept is present, 0 to 2."""
    parts = []
    if concept.topic is not None:
        parts.append(_found(concept.topic.words, text))
    if concept.manner is not None:
        parts.append(_found(concept.manner.markers, text))
    return sum(parts) // len(parts)


def rate_instruction(subject: Subject, text: str) -> int:
    """How far the text is about the subject, 0 to 2."""
    return _found(subject.keywords, text)


def rate_fluency(nll: float, text: str, bounds: Bounds) -> int:
    """How natural the text is, 0 to 2; see the module's rules."""
    if not _words(text):
        return 0
    rating = 2 if nll <= bounds.natural else 1 if nll <= bounds.broken else 0
    repeated = repetition(text)
    return max(0, rating - (repeated > REPEATED) - (repeated > STUCK))


def repetition(text: str) -> float:
    """Share of the text's word pairs that have occurred in it before."""
    words = _words(text)
    pairs = list(pairwise(words))
    return 1 - len(set(pairs)) / len(pairs) if pairs else 0.0


def _words(text: str) -> list[str]:
    return re.findall(r"[a-z']+", text.lower())


def _found(words: Sequence[str], text: str) -> int:
    return min(2, len(set(words) & set(_words(text))))


def mean_nll(lm: LM, prompter: Prompter, prompts: Sequence[str], texts: Sequence[str]) -> list[float]:
    """Mean negative log-likelihood per token, in nats, of each text as the answer to its prompt; 0 if it is empty."""
    before = prompter.prompt_tokens(prompts)
    whole = prompter.tokenize([prompter.render(p) + t for p, t in zip(prompts, texts, strict=True)])
    length = -(-max(map(len, whole)) // MULTIPLE) * MULTIPLE
    means: list[float] = []
    batch = -(-BATCH // batch_ways()) * batch_ways()
    for start in range(0, len(whole), batch):
        rows = np.resize(np.arange(start, min(start + batch, len(whole))), batch)
        tokens = np.zeros((batch, length), np.int32)
        mask, scored = np.zeros((2, batch, length), bool)
        for row, index in enumerate(rows):
            count, first = len(whole[index]), len(before[index])
            tokens[row, :count], mask[row, :count], scored[row, first:count] = whole[index], True, True
        totals = np.asarray(_total_nll(lm, tokens, mask, scored)) / np.maximum(scored.sum(1), 1)
        means.extend(totals[: min(batch, len(whole) - start)].tolist())
    return means


@partial(jax.jit)
def _total_nll(lm: LM, tokens: Array, mask: Array, scored: Array) -> Array:
    """Negative log-likelihood `[B]` summed over the scored tokens `[B, T]`."""
    tokens, mask, scored = split((tokens, mask, scored))
    residual = lm.run(lm.embed(tokens), ranks(mask), mask, 0, lm.config.layers)
    target, weight = (jnp.roll(x, -1, axis=1) for x in (tokens, scored.astype(jnp.float32).at[:, 0].set(0.0)))
    return jnp.sum(token_nll(lm, residual, target, weight), axis=1)
