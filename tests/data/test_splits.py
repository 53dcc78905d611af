"""Splits by concept: what is held out stays out, and what leaks all the same is found and refused."""

import itertools
import random

import pytest

from hypersteer_jax.data.batch import DataError, SteeringExample
from hypersteer_jax.data.concepts import Concept
from hypersteer_jax.data.readers import read
from hypersteer_jax.data.splits import (
    HELD_IN,
    HELD_IN_ROWS,
    HELD_OUT,
    TRAIN,
    Leak,
    find_listed,
    leaks,
    refuse_leaks,
    sample_held_in,
    split_concepts,
)


def examples_of(concepts: int, rows: int) -> list[SteeringExample]:
    return [SteeringExample(f"c{i % concepts}", f"p{i}", f"r{i}", f"c{i % concepts}") for i in range(concepts * rows)]


def example(name: str, prompt: str = "p", response: str = "r", feature: str = "") -> SteeringExample:
    return SteeringExample(name, prompt, response, name, feature=feature)


def test_split_keeps_held_out_concepts_apart():
    examples = examples_of(concepts=10, rows=9)
    splits = split_concepts(examples, held_out=3, seed=0)
    assert sorted(itertools.chain(*splits.values())) == sorted(examples)
    unseen, seen = {e.concept for e in splits[HELD_OUT]}, {e.concept for e in splits[TRAIN]}
    assert (len(unseen), len(splits[HELD_OUT])) == (3, 27)
    assert not unseen & seen
    assert {e.concept for e in splits[HELD_IN]} <= seen
    assert len(splits[HELD_IN]) == 6  # a tenth of 63 rows
    assert split_concepts(examples, held_out=3, seed=0) == splits
    assert split_concepts(examples, held_out=3, seed=1) != splits
    assert leaks(splits) == []


def test_held_in_sample_is_bounded_and_leaves_every_concept_a_row():
    splits = split_concepts(examples_of(concepts=20, rows=100), held_out=0, seed=0)
    assert (len(splits[HELD_IN]), splits[HELD_OUT]) == (HELD_IN_ROWS, [])
    lonely = examples_of(concepts=40, rows=1)
    assert split_concepts(lonely, held_out=0, seed=0) == {TRAIN: lonely, HELD_IN: [], HELD_OUT: []}


def test_split_needs_a_concept_to_train_on():
    with pytest.raises(DataError, match=r"data\.held_out_concepts is 2, but the data has 2 concepts; give 0 to 1"):
        split_concepts(examples_of(concepts=2, rows=1), held_out=2, seed=0)


@pytest.mark.parametrize("seed", range(8))
def test_spellings_of_a_name_and_twins_are_not_torn_apart(seed):
    examples = [
        example(name, f"p{i}") for i in range(10) for name in ("ships", "Ships.", "the  sea", "The sea", "bees")
    ]
    twins = [example(name, "same", " same\n response") for name in ("ships", "SHIPS", "bees", "bees")] * 8
    splits = split_concepts(examples + twins, held_out=1, seed=seed)
    assert splits[HELD_OUT]
    assert leaks(splits) == []


def test_no_twin_is_in_the_held_in_sample():
    rows = [example("ships", f"p{i % 8}") for i in range(16)] + [example("ships", f"q{i}") for i in range(4)]
    for seed in range(20):
        assert sample_held_in(rows, 2, random.Random(seed)) <= set(range(16, 20))


def test_listed_concepts_are_met_by_feature_name_or_id():
    rows = [
        example("ships", feature="m/s/1"),
        example("bees", feature="m/s/2"),
        example("tea", feature="m/s/3"),
        example("moon"),
        example("Ships!", "q"),
    ]
    ids = [0, 1, 2, 3, None]

    def found(*listed: Concept) -> list[int]:
        return [index for index, out in enumerate(find_listed(rows, ids, listed)) if out]

    assert found() == []
    assert found(Concept(feature="m/s/2")) == [1]
    assert found(Concept(feature="m/other/2")) == []
    assert found(Concept("SHIPS")) == [0, 4]
    assert found(Concept(concept_id=3)) == [3]
    assert found(Concept("tea", concept_id=3)) == [2]  # the id is of another data set
    assert found(Concept("unheard of"), Concept(concept_id=77)) == []
    assert found(Concept(feature="m/s/1"), Concept(concept_id=3)) == [0, 3, 4]  # and its other spelling


def test_listed_concepts_take_along_names_and_features_step_by_step():
    rows = [
        example("a", feature="f/1"),
        example("b", feature="f/1"),
        example("b", feature="f/2"),
        example("c", feature="f/2"),
        example("d", feature="f/3"),
    ]
    assert find_listed(rows, [0, 1, 1, 2, 3], [Concept("a")]) == [True] * 4 + [False]


def test_each_kind_of_leak_is_found():
    train = [example("ships", "p", "r", "m/s/1"), example("bees", "p", "r")]
    same_name = leaks({TRAIN: train, HELD_OUT: [example("SHIPS", "q")]})
    assert same_name == [Leak(HELD_OUT, "steering prompt", ["SHIPS"])]
    assert str(same_name[0]) == "train and held-out share 1 steering prompt: 'SHIPS'"
    assert leaks({TRAIN: train, HELD_OUT: [example("boats", "q", feature="m/s/1")]}) == [
        Leak(HELD_OUT, "SAE feature", ["m/s/1"])
    ]
    assert leaks({TRAIN: train, HELD_IN: [example("Bees", "p ", "r\n")]}) == [Leak(HELD_IN, "row", ["Bees / p "])]
    assert [leak.kind for leak in leaks({TRAIN: train, HELD_OUT: [train[0]]})] == [
        "steering prompt",
        "SAE feature",
        "row",
    ]


def test_what_is_no_leak():
    train = [example("ships", "1 + 1?", "2", "m/s/1")]
    held_in = [example("ships", "2 + 2?", "4", "m/s/1")]  # a concept that is trained on, another row
    held_out = [example("bees", "1 + 1?", "2")]  # the same answer, another concept, no feature on both sides
    assert leaks({TRAIN: train, HELD_IN: held_in, HELD_OUT: held_out}) == []


def test_refusal_names_what_leaks_and_where():
    splits = {TRAIN: examples_of(9, 1), HELD_IN: [], HELD_OUT: examples_of(5, 1)}
    with pytest.raises(DataError, match=r"mine: evaluation data leaks into training") as error:
        refuse_leaks(splits, "mine")
    assert "train and held-out share 5 steering prompts: 'c0'; 'c1'; 'c2'; ..." in str(error.value)
    refuse_leaks(splits | {HELD_OUT: []}, "mine")


def test_pooled_release_data_does_not_leak(shared_data):
    examples, _ = read(shared_data / "axbench" / "pooled_train.parquet")
    splits = split_concepts(examples, held_out=10, seed=0)
    assert [len({e.concept for e in rows}) for rows in (splits[TRAIN], splits[HELD_OUT])] == [130, 10]
    assert sum(map(len, splits.values())) == 10_295
    assert leaks(splits) == []
