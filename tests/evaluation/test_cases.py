import dataclasses
import json
import random
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hypersteer_jax.config import ConfigError, DataConfig, EvaluateConfig, RunConfig, TrainConfig
from hypersteer_jax.data.batch import DataError
from hypersteer_jax.data.splits import HELD_IN, HELD_OUT
from hypersteer_jax.data.tinyworld.world import Concept, in_corpus, split_of, training_examples
from hypersteer_jax.evaluation.cases import all_factors, draw, make_cases, read_instructions, shuffled
from hypersteer_jax.evaluation.lm_judges import _names, find_concept


# pandas 3.1.1: DataFrame({"i": range(size)}).sample(10, random_state=seed)["i"].tolist()
@pytest.mark.parametrize(
    ("size", "seed", "expected"),
    [
        (805, 0, [8, 258, 172, 317, 294, 251, 609, 331, 775, 320]),
        (805, 1, [8, 262, 117, 309, 747, 314, 437, 766, 47, 148]),
        (805, 499, [454, 593, 744, 79, 99, 183, 599, 603, 474, 67]),
        (12, 7, [7, 10, 2, 5, 0, 1, 11, 8, 3, 6]),
    ],
)
def test_instructions_are_drawn_as_pandas_draws_them(size: int, seed: int, expected: list[int]) -> None:
    assert draw(size, 10, seed) == expected


def concept_list(path: Path, *names: str, first: int | None = None) -> str:
    rows = [{"concept": name} | ({} if first is None else {"concept_id": first + n}) for n, name in enumerate(names)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_a_finer_grid_around_one() -> None:
    grid = all_factors(EvaluateConfig(fine=True))
    assert grid == sorted(grid)
    assert len(grid) == len(set(grid)) == 14 + 17 - 4
    assert {0.7, 0.95, 1.0, 1.05, 1.5} < set(grid)
    assert all_factors(EvaluateConfig()) == list(EvaluateConfig().factors)


def test_listed_concepts_meet_the_instructions_that_their_numbers_draw(tmp_path: Path) -> None:
    pool = [f"Question {number}?" for number in range(805)]
    (tmp_path / "alpaca_eval.json").write_text(json.dumps([{"instruction": text, "output": "x"} for text in pool]))
    config = EvaluateConfig(
        held_in=concept_list(tmp_path / "in.jsonl", "gold", "ships at sea", "bees", first=498),
        held_out=concept_list(tmp_path / "out.jsonl", "the colour of old paper", "rain"),
        instructions=tmp_path / "alpaca_eval.json",
        concepts=2,
    )
    cases = make_cases(config, RunConfig(lm="x", data=DataConfig("train.parquet")))
    assert [case.concept_id for case in cases[HELD_IN]] == [498, 499]
    assert [case.concept_id for case in cases[HELD_OUT]] == [0, 1]
    assert cases[HELD_IN][1].instructions == [pool[row] for row in draw(805, 10, 499)]
    assert [(case.concept, case.wrong) for case in cases[HELD_IN]] == [
        ("gold", "ships at sea"),
        ("ships at sea", "gold"),
    ]
    for case in cases[HELD_OUT]:
        assert sorted(case.shuffled.split()) == sorted(case.concept.split()) or case.concept == "rain"
        assert case.shuffled != case.concept
        assert all(case.concept in asked for asked in case.prompting)
        assert all(plain in asked for plain, asked in zip(case.instructions, case.prompting, strict=True))
    assert make_cases(config, RunConfig(lm="x")) == cases


def test_prompting_takes_the_prompts_of_axbench_s_file(tmp_path: Path) -> None:
    config = EvaluateConfig(held_in=concept_list(tmp_path / "in.jsonl", "gold", "bees"), per_concept=2)
    plain = make_cases(config, RunConfig())[HELD_IN]
    rows = [
        {
            "input_concept": case.concept.upper(),
            "original_prompt": text,
            "steered_input": f"About {case.concept}: {text}",
        }
        for case in plain
        for text in case.instructions
    ]
    path = tmp_path / "steering_data.parquet"
    pq.write_table(pa.Table.from_pylist(rows), path)
    config = dataclasses.replace(config, prompting=path)
    for case in make_cases(config, RunConfig())[HELD_IN]:
        assert case.prompting == [f"About {case.concept}: {text}" for text in case.instructions]
    pq.write_table(pa.Table.from_pylist(rows[:-1]), path)
    with pytest.raises(DataError, match=r"steering_data\.parquet has nothing for 'bees' with '"):
        make_cases(config, RunConfig())
    pq.write_table(pa.Table.from_pylist([{"input_concept": "gold"}]), path)
    with pytest.raises(ConfigError, match="lacks the columns original_prompt, steered_input; give a steering_data"):
        make_cases(config, RunConfig())


def test_shuffled_words_are_the_same_in_another_order() -> None:
    for seed in range(20):
        found = shuffled("references to ships", random.Random(seed))
        assert found != "references to ships"
        assert sorted(found.split()) == ["references", "ships", "to"]
    assert sorted(shuffled("rain", random.Random(0))) == sorted("rain")
    assert shuffled("oo", random.Random(0)) == "oo"
    assert shuffled("very very", random.Random(0)) == "very very"


def test_the_tiny_world_has_concepts_of_its_own() -> None:
    run = RunConfig(data=DataConfig(max_concepts=16), train=TrainConfig(seed=3))
    cases = make_cases(EvaluateConfig(concepts=24), run)
    trained = {example.concept for example in training_examples(4000, 3, 16)}
    assert [len(cases[group]) for group in (HELD_IN, HELD_OUT)] == [24, 24]
    for group, members in cases.items():
        for case in members:
            concept, wrong = find_concept(case.concept), find_concept(case.wrong)
            assert isinstance(concept, Concept)
            assert isinstance(wrong, Concept)
            assert (concept.key in trained) == (group == HELD_IN)
            assert split_of(concept) == ("train" if group == HELD_IN else "held_out")
            assert not set(concept) & set(wrong) - {None}
            assert len(set(case.instructions)) == 10
            assert not any(in_corpus(concept, _names().subjects[text]) for text in case.instructions)
            assert all(case.concept in asked for asked in case.prompting)
    assert {find_concept(case.concept).kind for case in cases[HELD_OUT]} == {"topic", "pair"}
    assert make_cases(EvaluateConfig(concepts=24, seed=1), run) != cases


def test_the_default_instructions_are_those_of_the_package() -> None:
    found = read_instructions(None)
    assert len(found) == len(set(found)) == 332


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"held_in": "nowhere"}, "nowhere: neither a file nor one of ho500"),
        ({"held_in": "one.jsonl"}, "has 1 concepts; the wrong-prompt control needs two"),
        ({"held_in": "two.jsonl", "held_out": "two.jsonl"}, "held_in and held_out share 2 concepts, such as 'gold'"),
        ({"held_in": "ids.json"}, "7 has no name"),
        ({"held_in": "same.jsonl"}, "bees has number 4; give each its own"),
        ({"held_in": "two.jsonl", "instructions": Path("none.json")}, "instructions none.json cannot be read"),
        ({"held_in": "two.jsonl", "instructions": Path("two.jsonl")}, "instructions two.jsonl cannot be read"),
        ({"held_in": "two.jsonl", "instructions": Path("blank.jsonl")}, "entry 1 .counted from 0.: ' '; give text"),
        ({"held_in": "two.jsonl", "per_concept": 400}, "per_concept is 400, and there are 332 instructions"),
        ({"per_concept": 60}, "per_concept is 60"),
        ({"prompting": Path("two.jsonl")}, "neither held_in nor held_out is given, and prompting is two.jsonl"),
        ({"held_in": "two.jsonl", "prompting": Path("two.jsonl")}, "two.jsonl cannot be read as parquet"),
        ({"instructions": Path("two.jsonl")}, "neither held_in nor held_out is given, and instructions is two.jsonl"),
    ],
)
def test_lists_that_cannot_be_used(tmp_path: Path, monkeypatch, settings: dict, message: str) -> None:
    monkeypatch.chdir(tmp_path)
    concept_list(Path("one.jsonl"), "gold")
    concept_list(Path("two.jsonl"), "gold", "bees")
    Path("ids.json").write_text("[7, 8]")
    Path("same.jsonl").write_text('{"concept": "gold", "concept_id": 4}\n{"concept": "bees", "concept_id": 4}\n')
    Path("blank.jsonl").write_text('{"instruction": "Why?"}\n{"instruction": " "}\n')
    with pytest.raises((ConfigError, DataError), match=message):
        make_cases(EvaluateConfig(**settings), RunConfig())


def test_a_run_on_other_data_needs_lists() -> None:
    with pytest.raises(ConfigError, match=r"and it learned train\.parquet; give lists of concepts"):
        make_cases(EvaluateConfig(), RunConfig(data=DataConfig("train.parquet")))
