"""Generation: cached decoding says what the full steered forward pass says, and rows of a batch do not meet."""

import copy
import dataclasses
import itertools

import jax
import numpy as np
import pytest

from hypersteer_jax.config import ConfigError, HypernetConfig, RunConfig, SelectionConfig, SteeringConfig
from hypersteer_jax.data.batch import SteeringBatch
from hypersteer_jax.data.prompts import Prompter
from hypersteer_jax.decoding import Decoding, candidates, generate, likeliest, pick
from hypersteer_jax.generation import Request, Steered, complete, left_pad, make_batches, stream
from hypersteer_jax.models.lm import LM, cast
from hypersteer_jax.sharding import make_mesh, shard_weights
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


FACTORS = (0.2, -0.4, 0.7)
SWEEP = [
    Request(prompt, concept, factor, seed=index)
    for index, (prompt, concept, factor) in enumerate(
        itertools.product(("say hello", "a b c d a"), ("sea", "b c d hello a"), FACTORS)
    )
]


@pytest.mark.parametrize("context", ["entering", "leaving"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_what_rows_share_changes_no_text(context: str, temperature: float) -> None:
    model, decoding = steered(context=context), GREEDY._replace(temperature=temperature)
    together = complete(model, SWEEP, decoding._replace(batch=12))
    assert len(set(together)) > 8
    assert together == [text for request in SWEEP for text in complete(model, [request], decoding._replace(batch=1))]


def test_prompts_are_read_and_vectors_written_once() -> None:
    [(rows, batch)] = make_batches(MODEL, SWEEP, 12)
    assert sorted(rows) == list(range(12))
    assert len(batch.tokens) == 2  # base prompts
    assert len(batch.steering.tokens) == 4  # pairs, whatever the number of factors
    for row, request in enumerate(SWEEP[index] for index in rows):
        pair = batch.steering.pair[row]
        [prompt] = MODEL.prompter.prompt_tokens([request.prompt])
        [concept] = MODEL.prompter.concept_tokens([request.steering_prompt])
        of_row, of_pair = batch.prompt[row], batch.steering.prompt[pair]
        assert batch.tokens[of_row][batch.mask[of_row]].tolist() == prompt.tolist()
        assert of_pair == of_row
        assert batch.steering.tokens[pair][batch.steering.mask[pair]].tolist() == concept.tolist()


@pytest.mark.parametrize("axes", [{"data": 2, "fsdp": 2}, {"fsdp": 2, "tensor": 2}], ids=str)
def test_devices_share_the_rows(axes: dict[str, int]) -> None:
    decoding = GREEDY._replace(batch=12)
    alone = complete(MODEL, SWEEP, decoding)
    mesh = make_mesh(**axes)
    with jax.set_mesh(mesh):
        model = MODEL._replace(lm=shard_weights(MODEL.lm, mesh), hypernet=shard_weights(MODEL.hypernet, mesh))
        assert complete(model, SWEEP, decoding) == alone


@pytest.mark.parametrize("every", [1, 3, NEW])
def test_stream_gives_the_texts_piece_by_piece(every: int) -> None:
    decoding = GREEDY._replace(batch=2, temperature=1.0)
    pieces = list(stream(MODEL, REQUESTS, decoding, every))
    texts = ["".join(piece.text for piece in pieces if piece.request == index) for index in range(len(REQUESTS))]
    assert texts == complete(MODEL, REQUESTS, decoding)
    for index in range(len(REQUESTS)):
        own = [piece for piece in pieces if piece.request == index]
        assert [piece.done for piece in own] == [False] * (len(own) - 1) + [True]
        assert len(own) == -(-NEW // every)
        assert all(len(piece.tokens) <= every for piece in own)
        assert text_of([token for piece in own for token in piece.tokens]) == texts[index]


def test_any_of_the_stop_tokens_ends_a_row(tokens: list[list[int]]) -> None:
    stop = (tokens[0][2], tokens[1][4])
    cut = [next((row[:at] for at, token in enumerate(row) if token in stop), row) for row in tokens]
    assert complete(MODEL, REQUESTS, GREEDY._replace(stop=stop)) == [text_of(row) for row in cut]


def test_candidates() -> None:
    probabilities = np.array([0.05, 0.4, 0.1, 0.3, 0.15], np.float32)

    def kept(top_k: int, top_p: float) -> list[int]:
        return np.flatnonzero(np.isfinite(candidates(np.log(probabilities), top_k, top_p))).tolist()

    assert kept(0, 1.0) == kept(9, 1.0) == [0, 1, 2, 3, 4]
    assert kept(2, 1.0) == [1, 3]
    assert kept(0, 0.39) == [1]
    assert kept(0, 0.41) == kept(0, 0.69) == [1, 3]  # the fewest that reach it
    assert kept(0, 0.71) == [1, 3, 4]
    assert kept(2, 0.6) == [1, 3]  # after top_k the two hold 0.57 and 0.43
    assert kept(2, 0.5) == [1]


def test_the_likeliest_is_the_first_of_equals() -> None:
    logits = np.random.default_rng(0).integers(-3, 3, (50, 40)).astype(np.float32)
    np.testing.assert_array_equal(likeliest(logits), np.argmax(logits, axis=1))
    assert likeliest(np.full((1, 3), -np.inf, np.float32)) == 0


def test_a_draw_is_jax_s_own() -> None:
    logits = np.random.default_rng(0).normal(size=(8, 40)).astype(np.float32)
    decoding = GREEDY._replace(temperature=0.7)
    found = pick(logits, np.arange(8, dtype=np.uint32), 5, decoding)
    keys = [jax.random.fold_in(jax.random.key(seed), 5) for seed in range(8)]
    drawn = [jax.random.categorical(key, row / 0.7) for key, row in zip(keys, logits, strict=True)]
    np.testing.assert_array_equal(found, drawn)
    assert (np.array(drawn) != np.argmax(logits, axis=1)).any()


def test_samples_are_drawn_among_the_candidates() -> None:
    requests = [Request("say hello", "sea", 1.0, seed) for seed in range(4)]
    greedy = complete(MODEL, requests, GREEDY)
    assert complete(MODEL, requests, GREEDY._replace(temperature=1.0, top_k=1)) == greedy
    assert complete(MODEL, requests, GREEDY._replace(temperature=1.0, top_p=1e-6)) == greedy
    assert complete(MODEL, requests, GREEDY._replace(temperature=1.0, top_p=0.9)) != greedy


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_new": 0}, r"decoding\.max_new is 0; give at least 1"),
        ({"temperature": -1.0}, r"decoding\.temperature is -1\.0; give 0 \(greedy\)"),
        ({"batch": 0}, r"decoding\.batch is 0; give a multiple of 1"),
        ({"top_k": -1}, r"decoding\.top_k is -1; give 0 \(off\)"),
        ({"top_p": 0.0}, r"decoding\.top_p is 0\.0; give a value above 0"),
    ],
)
def test_settings_that_cannot_work(settings: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        complete(MODEL, REQUESTS, GREEDY._replace(**settings))


def test_bfloat16() -> None:
    model = MODEL._replace(lm=cast(BASE, jax.numpy.bfloat16))
    texts = complete(model, REQUESTS, GREEDY)
    assert len(set(texts)) == 4
    [(_, batch)] = make_batches(model, REQUESTS, 4)
    state = generate(model.lm, batch, NEW, model.config.steering, GREEDY, ())
    assert state.cache.k.dtype == jax.numpy.bfloat16


def test_nothing_to_do() -> None:
    assert complete(MODEL, [], GREEDY) == []


def test_left_pad() -> None:
    ids, mask = left_pad([np.array([5, 6]), np.array([7] * 9)], pad_id=1)
    assert ids.tolist() == [[1] * 14 + [5, 6], [1] * 7 + [7] * 9]
    assert mask.sum(1).tolist() == [2, 9]
    assert mask[:, -2:].all()
    assert IDS["<pad>"] == MODEL.prompter.pad_id
