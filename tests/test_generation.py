"""Generation: cached decoding says what the full steered forward pass says, and rows of a batch do not meet."""

import copy
import dataclasses

import jax
import numpy as np
import pytest

from hypersteer_jax.config import HypernetConfig, RunConfig, SelectionConfig, SteeringConfig
from hypersteer_jax.data.batch import SteeringBatch
from hypersteer_jax.data.prompts import Prompter
from hypersteer_jax.generation import Decoding, Request, Steered, complete, left_pad, make_batches
from hypersteer_jax.models.lm import LM
from hypersteer_jax.steering import steered_logits
from tests.conftest import random_hypernet
from tests.data.test_prompts import IDS, VOCABULARY, tokenizer
from tests.models.tiny import CONFIGS, random_lm

BASE = random_lm(dataclasses.replace(CONFIGS["gemma2"], vocab=len(VOCABULARY), tied=False), seed=4)  # says many words
NEW, WIDTH = 8, 32
GREEDY = Decoding(max_new=NEW, batch=4)
REQUESTS = [
    Request("say hello", "sea", 0.3),
    Request("a b c d a", "b c d hello a", -0.6),
    Request("sea", "d", 0.9),
    Request("c", "say sea sea", 0.0),
]
logits = jax.jit(steered_logits, static_argnames="config")
forward = jax.jit(LM.__call__)


def steered(variant: str = "cross_attention", selection: SelectionConfig | None = None, **steering: str) -> Steered:
    net = HypernetConfig(variant, blocks=1)
    prompter = Prompter(tokenizer())
    prompter.end_id = None  # a random LM would end early; `test_end` gives it an end
    config = RunConfig(hypernet=net, steering=SteeringConfig(layers=(1,), **steering))
    return Steered(BASE, prompter, random_hypernet(net, BASE.config, selection=selection), config)


MODEL = steered()


def naive(model: Steered, requests: list[Request]) -> list[list[int]]:
    """Greedy tokens, each by a whole steered forward pass over right-padded rows."""
    prompter, rows, column = model.prompter, np.arange(len(requests)), np.arange(WIDTH)
    in_context = model.config.hypernet.variant == "in_context"
    prompts = prompter.prompt_tokens([request.prompt for request in requests])
    texts = [request.steering_prompt for request in requests]
    concepts = prompter.concept_tokens(texts, [request.prompt for request in requests] if in_context else None)
    skip = prompter.prefix if model.config.steering.inference_positions == "after_prefix" else 0
    tokens, starts = np.zeros((len(rows), WIDTH), np.int32), np.array([len(prompt) for prompt in prompts])
    concept_tokens, concept_lengths = np.zeros((len(rows), 16), np.int32), np.array([len(each) for each in concepts])
    for row in rows:
        tokens[row, : starts[row]] = prompts[row]
        concept_tokens[row, 16 - concept_lengths[row] :] = concepts[row]
    for done in range(NEW):
        mask = column < starts[:, None] + done
        batch = SteeringBatch(
            tokens=tokens,
            segments=mask.astype(np.int32),
            steer_mask=mask & (column >= skip),
            context_index=np.broadcast_to(column, mask.shape),
            context_mask=column < starts[:, None],
            response_index=starts[:, None] + done - 1,
            response_tokens=np.zeros((len(rows), 1), np.int32),
            response_share=np.ones((len(rows), 1), np.float32),
            concept_tokens=concept_tokens,
            concept_mask=np.arange(16) >= 16 - concept_lengths[:, None],
            concept_row=rows,
            factor=np.array([request.factor for request in requests], np.float32),
            row=rows,
        )
        following = np.asarray(logits(model.hypernet, model.lm, batch, config=model.config.steering))[:, 0].argmax(1)
        tokens[rows, starts + done] = following
    return [tokens[row, starts[row] : starts[row] + NEW].tolist() for row in rows]


def text_of(ids: list[int]) -> str:
    return MODEL.prompter.tokenizer.decode(ids, skip_special_tokens=True).strip()


@pytest.fixture(scope="module")
def tokens() -> list[list[int]]:
    found = naive(MODEL, REQUESTS)
    assert len({tuple(row) for row in found}) == 4  # else little would be compared below
    assert min(len(set(row)) for row in found) >= 5
    return found


def test_greedy_text_is_that_of_full_forward_passes(tokens: list[list[int]]) -> None:
    assert complete(MODEL, REQUESTS, GREEDY) == [text_of(row) for row in tokens]


@pytest.mark.parametrize(
    "model",
    [
        steered("in_context"),
        steered(inference_positions="after_prefix", context="leaving"),
        steered(selection=SelectionConfig(on=True)),
        steered(selection=SelectionConfig(on=True, hard_inference=True), inference_positions="after_prefix"),
    ],
    ids=["in_context", "after_prefix, leaving", "selection", "hard selection"],
)  # fmt: skip
def test_other_settings_too(model: Steered, tokens: list[list[int]]) -> None:
    expected = naive(model, REQUESTS)
    assert expected != tokens
    assert complete(model, REQUESTS, GREEDY) == [text_of(row) for row in expected]


@pytest.mark.parametrize(("positions", "first"), [("all", 0), ("after_prefix", 4)])
def test_positions_of_inference(positions: str, first: int) -> None:
    [(_, batch)] = make_batches(steered(inference_positions=positions), REQUESTS, 4)
    np.testing.assert_array_equal(batch.where, batch.mask & (np.cumsum(batch.mask, axis=1) - 1 >= first))
    assert batch.mask.sum(1).tolist() == [10, 10, 11, 14]


def test_without_factor_or_concept_the_base_lm_answers() -> None:
    requests = [
        Request("say hello", "sea", 0.0),
        Request("say hello"),
        Request("say hello", factor=5.0),  # nothing to steer to
        Request("say hello", "sea", 5.0),
    ]
    [prompt] = MODEL.prompter.prompt_tokens(["say hello"])
    ids = np.zeros((1, WIDTH), np.int32)
    ids[0, : len(prompt)] = prompt
    for end in range(len(prompt), len(prompt) + NEW):
        ids[0, end] = np.asarray(forward(BASE, ids, np.arange(WIDTH)[None] < end))[0, end - 1].argmax()
    base = text_of(ids[0, len(prompt) : len(prompt) + NEW].tolist())
    texts = complete(MODEL, requests, GREEDY)
    assert texts[:3] == [base] * 3
    assert texts[3] != base


def test_end_stops_a_row_and_is_left_out(tokens: list[list[int]]) -> None:
    def cut_at(end: int) -> list[list[int]]:
        return [row[: row.index(end)] if end in row else row for row in tokens]

    def lengths(end: int) -> list[int]:
        return sorted(len(row) for row in cut_at(end))

    # one row ends at once, one later, and one not at all
    end = next(token for token in range(len(VOCABULARY)) if lengths(token)[0] == 0 < lengths(token)[1] < NEW)
    cut = cut_at(end)
    assert lengths(end)[-1] == NEW
    model = MODEL._replace(prompter=copy.copy(MODEL.prompter))
    model.prompter.end_id = end
    assert complete(model, REQUESTS, GREEDY) == [text_of(row) for row in cut]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_text_does_not_depend_on_the_batch(temperature: float) -> None:
    decoding = GREEDY._replace(temperature=temperature)
    requests = [request._replace(seed=7 + index) for index, request in enumerate(REQUESTS)]
    texts = complete(MODEL, requests, decoding)
    assert complete(MODEL, requests[::-1], decoding) == texts[::-1]
    assert complete(MODEL, requests[2:3], decoding) == texts[2:3]  # a short batch
    assert complete(MODEL, requests + requests[2:], decoding) == texts + texts[2:]  # two batches
    longer = Request("a b c d a b c d a b", "a b c d a b c d a b", 1.0)  # more padding for all others
    assert complete(MODEL, [requests[1], longer, requests[0]], decoding)[::2] == [texts[1], texts[0]]


def test_samples_differ_by_seed_only() -> None:
    decoding = GREEDY._replace(temperature=1.0)
    texts = complete(MODEL, [Request("say hello", "sea", 1.0, seed) for seed in (0, 0, 1, 2)], decoding)
    assert texts[0] == texts[1]
    assert len(set(texts)) == 3
    assert complete(MODEL, [Request("say hello", "sea", 1.0)], GREEDY)[0] not in texts


def test_nothing_to_do() -> None:
    assert complete(MODEL, [], GREEDY) == []


def test_left_pad() -> None:
    ids, mask = left_pad([np.array([5, 6]), np.array([7] * 9)], pad_id=1)
    assert ids.tolist() == [[1] * 14 + [5, 6], [1] * 7 + [7] * 9]
    assert mask.sum(1).tolist() == [2, 9]
    assert mask[:, -2:].all()
    assert IDS["<pad>"] == MODEL.prompter.pad_id
