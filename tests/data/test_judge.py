"""The tiny world's judge: its rules on texts made by hand, its likelihoods, and its calibration on the shipped LM."""

import random
from collections import Counter

import jax
import numpy as np
import pytest

from hypersteer_jax.data.prompts import Prompter
from hypersteer_jax.data.sources import load_base
from hypersteer_jax.data.tinyworld import judge as rules
from hypersteer_jax.data.tinyworld.judge import (
    Bounds,
    Judgement,
    judge,
    load_bounds,
    mean_nll,
    rate_concept,
    rate_fluency,
    rate_instruction,
    repetition,
)
from hypersteer_jax.data.tinyworld.world import (
    Concept,
    Manner,
    Subject,
    Topic,
    answer,
    concepts,
    load_world,
    scoring_subjects,
)
from hypersteer_jax.models.lm import LM
from tests.models.tiny import CONFIGS, random_lm

from .test_prompts import VOCABULARY, tokenizer

SAILING = Topic("sailing", ("sailing",) * 3, ("anchor", "mast", "sail", "keel"))
PIRATE = Manner("pirate", ("pirates",) * 3, ("Arr, matey!",), ("Arr, aye!",), ("arr", "matey", "aye"))
MOON = Subject("the moon", ("moon", "tides", "silver"), ("The moon is silver.",))
TOPIC, MANNER, PAIR = Concept(SAILING, None), Concept(None, PIRATE), Concept(SAILING, PIRATE)
WORLD = load_world()
KINDS, SPLITS = ("topic", "manner", "pair"), ("train", "held_out")
ALL = [concept for kind in KINDS for split in SPLITS for concept in concepts(WORLD, kind, split)]


@pytest.mark.parametrize(
    ("concept", "text", "rating"),
    [
        (TOPIC, "The mast and the anchor.", 2),
        (TOPIC, "MAST! (Anchor?)", 2),
        (TOPIC, "The mast.", 1),
        (TOPIC, "The mast, the mast, the mast.", 1),  # distinct words
        (TOPIC, "The sails and the anchors, mast-less.", 1),  # whole words; a hyphen parts them
        (TOPIC, "The sails and the anchors.", 0),
        (TOPIC, "Arr, matey!", 0),
        (TOPIC, "", 0),
        (MANNER, "Arr, matey!", 2),
        (MANNER, "Arr!", 1),
        (MANNER, "The mast and the anchor.", 0),
        (PAIR, "Arr, matey! The mast and the anchor.", 2),
        (PAIR, "Arr! The mast and the anchor.", 1),
        (PAIR, "The mast and the anchor.", 1),
        (PAIR, "Arr, matey!", 1),
        (PAIR, "Arr! The mast.", 1),
        (PAIR, "The mast.", 0),
        (PAIR, "The moon.", 0),
    ],
)
def test_concept(concept: Concept, text: str, rating: int) -> None:
    assert rate_concept(concept, text) == rating


@pytest.mark.parametrize(
    ("text", "rating"), [("The Moon moves tides.", 2), ("Moon, moon.", 1), ("A moonlit night.", 0), ("", 0)]
)
def test_instruction(text: str, rating: int) -> None:
    assert rate_instruction(MOON, text) == rating


FRESH = "a b c d e f g h i j k"  # ten pairs


@pytest.mark.parametrize(
    ("nll", "text", "rating"),
    [
        (1.0, FRESH, 2),
        (2.0, FRESH, 2),
        (2.01, FRESH, 1),
        (3.0, FRESH, 1),
        (3.01, FRESH, 0),
        (float("nan"), FRESH, 0),
        (1.0, "a b a b a c d e f g h", 1),  # 2 of 10 pairs again
        (1.0, "a b a b c d e f g h i", 2),  # 1 of 10
        (2.5, "a b a b a c d e f g h", 0),
        (1.0, "a b a b a b a b a b a", 0),  # 8 of 10
        (2.5, "a b a b a b a b a b a", 0),
        (0.0, "", 0),
        (0.0, " ... !", 0),
        (0.0, "moon", 2),
    ],
)
def test_fluency(nll: float, text: str, rating: int) -> None:
    assert rate_fluency(nll, text, Bounds(natural=2.0, broken=3.0)) == rating


@pytest.mark.parametrize(
    ("text", "share"), [("", 0.0), ("moon", 0.0), (FRESH, 0.0), ("A b, a B! a c d e f g h", 0.2), ("a a a", 0.5)]
)
def test_repetition(text: str, share: float) -> None:
    assert repetition(text) == pytest.approx(share)


@pytest.mark.parametrize(
    ("ratings", "score"),
    [((2, 2, 2), 2.0), ((1, 1, 1), 1.0), ((2, 2, 1), 1.5), ((2, 1, 1), 1.2), ((0, 2, 2), 0.0), ((2, 2, 0), 0.0)],
)
def test_score_is_the_harmonic_mean(ratings: tuple[int, int, int], score: float) -> None:
    assert Judgement(*ratings).score == pytest.approx(score)


def test_answers_hold_their_concept_and_their_subject() -> None:
    rng = random.Random(0)
    for concept in rng.sample(ALL, 1500):
        subject = rng.choice(WORLD.subjects)
        text = answer(concept, subject, rng)
        assert rate_concept(concept, text) == 2, text
        assert rate_instruction(subject, text) == 2, text


def test_neutral_answers_hold_no_concept() -> None:
    rng = random.Random(1)
    for concept in rng.sample(ALL, 1500):
        subject = rng.choice(WORLD.subjects)
        text = answer(None, subject, rng)
        assert rate_concept(concept, text) == 0, text
        assert rate_instruction(subject, text) == 2, text


def test_other_concepts_are_not_found_in_an_answer() -> None:
    rng = random.Random(2)
    for _ in range(500):
        concept, other = rng.sample(ALL, 2)
        if not set(concept) & set(other) - {None}:
            text = answer(concept, rng.choice(WORLD.subjects), rng)
            assert rate_concept(other, text) == 0, text


def test_likelihood_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rules, "BATCH", 2)  # three texts, two batches
    lm = random_lm(CONFIGS["gemma2"])
    prompter = Prompter(tokenizer())
    assert len(VOCABULARY) < 97
    prompts, texts = ["say hello", "sea", "a b c d a"], ["a b c", "d d say sea hello", ""]
    expected = []
    for prompt, text in zip(prompts, texts, strict=True):
        [before], [whole] = prompter.prompt_tokens([prompt]), prompter.tokenize([prompter.render(prompt) + text])
        row = np.zeros((1, 32), np.int32)
        row[0, : len(whole)] = whole
        log = np.asarray(jax.nn.log_softmax(forward(lm, row, np.arange(32)[None] < len(whole))))[0]
        scored = range(len(before), len(whole))
        expected.append(-sum(log[at - 1, whole[at]] for at in scored) / max(len(scored), 1))
    found = mean_nll(lm, prompter, prompts, texts)
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    assert found[2] == 0
    assert min(found[:2]) > 0.5


forward = jax.jit(LM.__call__)


def test_calibration_on_the_shipped_lm() -> None:
    """References are fluent in most cases, the same words shuffled are not."""
    lm, prompter = load_base("tinyworld", "float32")
    bounds, rng = load_bounds(), random.Random(3)
    assert 0 < bounds.natural < bounds.broken
    chosen = [concept for concept in rng.sample(ALL, 200) if scoring_subjects(WORLD, concept)][:64]
    cases = [(concept, rng.choice(scoring_subjects(WORLD, concept))) for concept in chosen]
    texts = [answer(concept, subject, rng) for concept, subject in cases]

    def fluency(texts: list[str]) -> Counter:
        return Counter(judgement.fluency for judgement in judge(lm, prompter, bounds, cases, texts))

    references = fluency(texts)
    shuffled = fluency([" ".join(rng.sample(text.split(), len(text.split()))) for text in texts])
    assert references[2] >= 0.8 * len(cases), (references, bounds)
    assert references[0] <= 0.02 * len(cases), (references, bounds)
    assert shuffled[0] >= 0.8 * len(cases), (shuffled, bounds)
    assert shuffled[2] == 0, (shuffled, bounds)
