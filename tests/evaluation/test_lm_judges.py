"""Judges that compute: expected ratings, the tiny world's rules, proxies."""

import random
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
import pytest

from hypersteer_jax.data.prompts import Prompter
from hypersteer_jax.data.sources import load_base
from hypersteer_jax.data.tinyworld import judge as rules
from hypersteer_jax.data.tinyworld.judge import load_bounds, mean_nll
from hypersteer_jax.data.tinyworld.world import (
    answer,
    concepts,
    instruction,
    load_world,
    scoring_subjects,
    steering_prompt,
)
from hypersteer_jax.evaluation import lm_judges
from hypersteer_jax.evaluation.cache import Cache
from hypersteer_jax.evaluation.judges import Item, JudgeError, run_judge
from hypersteer_jax.evaluation.lm_judges import find_concept, local_judge, proxy_judge, rules_judge
from tests.data.test_prompts import IDS, VOCABULARY, tokenizer
from tests.models.tiny import CONFIGS, random_lm

WORLD = load_world()
RUBRIC = {"concept": "say {concept} {text}", "instruction": "say {instruction} {text}", "fluency": "say {text}"}
DIGITS = {word: index for index, word in enumerate([*VOCABULARY, "0", "Rating:", "[[0", "[[1", "[[2"])}
LM = random_lm(CONFIGS["gemma2"])


@pytest.fixture
def cache(tmp_path: Path) -> Iterator[Cache]:
    with Cache(tmp_path / "judgements.sqlite") as opened:
        yield opened


@pytest.fixture(scope="module")
def tinyworld():
    return load_base("tinyworld", "float32")


def test_local_judge_gives_the_expected_rating(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    # This tokenizer has "[[0" and so on as one token, as a real one may: the rating is still found.
    monkeypatch.setattr(lm_judges, "BATCH", 4)
    prompter = Prompter(tokenizer(vocabulary=DIGITS))
    words = ["a", "b c", "d sea hello a b c d", "sea " * 40]
    items = [Item(concept, "hello", text) for concept in ("sea", "a b") for text in words]
    judge = local_judge(LM, prompter, RUBRIC, "tiny")
    judgements = run_judge(judge, items, cache)
    plain = jax.jit(lambda lm, tokens, mask: lm(tokens, mask))
    for item, judgement in zip(items, judgements, strict=True):
        [tokens] = prompter.tokenize([prompter.render(f"say {item.concept} {item.text}") + "Rating:"])
        padded = np.pad(tokens, (0, 64 - len(tokens)))  # on the right, where the judge pads on the left
        logits = plain(LM, padded[None], (np.arange(64) < len(tokens))[None])[0, len(tokens) - 1]
        three = np.asarray(jax.nn.softmax(logits))[[DIGITS["[[0"], DIGITS["[[1"], DIGITS["[[2"]]]
        assert judgement.concept == pytest.approx(three @ np.arange(3) / three.sum(), rel=1e-4)
    assert len({judgement.concept for judgement in judgements}) == len(items)
    assert len({judgement.fluency for judgement in judgements}) == len(words)


def test_a_tokenizer_without_ratings_is_refused() -> None:
    assert "0" not in IDS
    with pytest.raises(JudgeError, match="no different tokens for 0, 1, 2"):
        local_judge(LM, Prompter(tokenizer()), RUBRIC, "tiny")


def test_a_model_that_gives_no_probability_has_failed() -> None:
    assert lm_judges._expected(np.zeros(3)).score is None
    assert lm_judges._expected(np.array([0.0, 0.1, 0.3])).score == pytest.approx(1.75)
    assert lm_judges._expected(np.full(3, np.nan)).score is None


def test_rules_are_those_of_the_tiny_world(cache: Cache, tinyworld) -> None:
    lm, prompter = tinyworld
    rng = random.Random(0)
    cases, items = [], []
    for kind in ("topic", "manner", "pair"):
        for concept in rng.sample(concepts(WORLD, kind, "train"), 4):
            subject = rng.choice(scoring_subjects(WORLD, concept))
            other = rng.choice(WORLD.subjects)
            for text in (answer(concept, subject, rng), answer(None, other, rng), ""):
                cases.append((concept, subject))
                items.append(Item(steering_prompt(concept, rng, "all"), instruction(subject, rng), text))
    judgements = run_judge(rules_judge(lm, prompter, load_bounds()), items, cache)
    nlls = mean_nll(lm, prompter, [item.instruction for item in items], [item.text for item in items])
    for (concept, subject), item, nll, judgement in zip(cases, items, nlls, judgements, strict=True):
        assert judgement.concept == rules.rate_concept(concept, item.text)
        assert judgement.instruction == rules.rate_instruction(subject, item.text)
        assert judgement.fluency == rules.rate_fluency(nll, item.text, load_bounds())
    assert {judgement.concept for judgement in judgements} >= {0, 2}
    assert {judgement.instruction for judgement in judgements} >= {0, 2}
    assert {judgement.fluency for judgement in judgements} >= {0, 2}


def test_what_the_tiny_world_lacks_is_a_failure(cache: Cache, tinyworld) -> None:
    [judgement] = run_judge(rules_judge(*tinyworld, load_bounds()), [Item("taxes", "Why?", "The moon.")], cache)
    assert judgement.concept is None
    assert judgement.instruction is None


def test_every_steering_prompt_is_understood() -> None:
    rng = random.Random(1)
    for kind in ("topic", "manner", "pair"):
        for split in ("train", "held_out"):
            for concept in concepts(WORLD, kind, split)[:50]:
                assert find_concept(steering_prompt(concept, rng, "all")) == concept
    assert find_concept("references to nothing, in the style of nobody") is None


def test_proxies_by_hand(cache: Cache) -> None:
    prompter = Prompter(tokenizer())
    items = [Item("a b", "say hello", "a c"), Item("sea", "a", "d d sea"), Item("a", "say", "")]
    judgements = run_judge(proxy_judge(LM, prompter, "tiny"), items, cache)
    table = np.asarray(LM.embedding[...])
    table = table / np.linalg.norm(table, axis=1, keepdims=True)
    b_to_text = max(table[IDS["b"]] @ table[IDS["a"]], table[IDS["b"]] @ table[IDS["c"]])
    assert judgements[0].concept == pytest.approx(2 * max(0, (1 + b_to_text) / 2), rel=1e-5)
    assert judgements[1].concept == pytest.approx(2, rel=1e-5)  # the concept itself is in the text
    nlls = mean_nll(LM, prompter, [item.instruction for item in items], [item.text for item in items])
    assert judgements[0].fluency == pytest.approx(2 * np.exp(-nlls[0]), rel=1e-4)
    assert judgements[2] == (0, 0, 0)


def test_proxy_finds_a_natural_text_more_fluent_than_its_words_shuffled(cache: Cache, tinyworld) -> None:
    rng = random.Random(0)
    subjects = WORLD.subjects[:6]
    texts = [answer(None, subject, rng) for subject in subjects]
    shuffled = [" ".join(rng.sample(text.split(), len(text.split()))) for text in texts]
    items = [Item("x", instruction(s, rng), t) for s, t in zip((*subjects, *subjects), texts + shuffled, strict=True)]
    fluency = [judgement.fluency for judgement in run_judge(proxy_judge(*tinyworld, "tinyworld"), items, cache)]
    assert min(fluency[:6]) > max(fluency[6:])
