"""Scores and reports of ratings that are made up, so that every number is known."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hypersteer_jax.config import ConfigError, EvaluateConfig, RunConfig
from hypersteer_jax.evaluation.cases import HYPERSTEER, METHODS, PROMPTING, WRONG_PROMPT
from hypersteer_jax.evaluation.evaluate import make_record
from hypersteer_jax.evaluation.evaluate_report import write_report
from hypersteer_jax.evaluation.judges import rating_columns
from hypersteer_jax.evaluation.measures import (
    CHOSEN,
    Evaluation,
    Group,
    Ratings,
    against_stored,
    compare,
    failures,
    measure,
    read_evaluation,
    win_or_tie,
)

CONCEPTS, INSTRUCTIONS, FACTORS = 6, 4, [0.5, 1.0, 2.0]
FIXED = "HyperSteer, factor 1"


def rated(scores: dict[str, np.ndarray], name: str = "one") -> Group:
    """A group in which all three ratings are equal to the score; methods that are not named score 0."""
    shape = (CONCEPTS, INSTRUCTIONS, len(FACTORS))
    methods = {}
    for method in METHODS:
        score = np.broadcast_to(scores.get(method, np.zeros(1)), shape).astype(float)
        text = np.full(shape, f"{name}: a text | of {method}", object)
        methods[method] = Ratings(np.stack([score] * 4), np.full(shape, 7.5), text)
    concepts = [f"concept {number}" for number in range(CONCEPTS)]
    prompts = [tuple(f"Prompt {c}-{i}?" for i in range(INSTRUCTIONS)) for c in range(CONCEPTS)]
    return Group(concepts, prompts, FACTORS, methods, "a judge")


def swept() -> np.ndarray:
    """Every concept looks best at factor 2 where it is chosen; at the scoring half it is 1 there, and 2 at factor 1."""
    score = np.zeros((CONCEPTS, INSTRUCTIONS, 3))
    score[:, :2, 2] = 2.0
    score[:, 2:] = (0.0, 2.0, 1.0)
    return score


def evaluation(group: Group, name: str = "one") -> Evaluation:
    record = make_record(EvaluateConfig(factors=tuple(FACTORS)), RunConfig(), 5, {})
    return Evaluation(name, record, {"held-in": group})


def test_one_half_chooses_and_the_other_is_scored() -> None:
    lines = measure(rated({HYPERSTEER: swept(), PROMPTING: np.array(1.5), WRONG_PROMPT: np.array(0.5)}), 1.0)
    assert {name: line.score.mean for name, line in lines.items()} == {
        "unsteered": 0.0,
        "wrong prompt, factor 1": 0.5,
        "shuffled prompt, factor 1": 0.0,
        "prompting": 1.5,
        CHOSEN: 1.0,
        FIXED: 2.0,
    }
    assert lines[CHOSEN].score == (1.0, 1.0, 1.0, CONCEPTS)
    assert lines[CHOSEN][1:5] == (1.0, 1.0, 1.0, 7.5)
    assert lines[CHOSEN].wins.mean == 0.0
    assert lines[FIXED].wins.mean == 1.0
    assert lines["prompting"].wins is None


def test_ties_are_half_a_win_and_failures_are_nothing() -> None:
    found = win_or_tie(np.array([[2.0, 1.0, 0.0, np.nan]]), np.array([[1.0, 1.0 + 1e-9, 1.0, 1.0]]))
    np.testing.assert_array_equal(found, [[1.0, 0.5, 0.0, np.nan]])
    lines = measure(rated({HYPERSTEER: np.array(1.5), PROMPTING: np.array(1.5)}), 1.0)
    assert (lines[CHOSEN].wins.mean, lines[CHOSEN].ties) == (0.5, 1.0)
    assert (lines["unsteered"].wins.mean, lines["unsteered"].ties) == (0.0, 0.0)


def test_failed_ratings_are_counted_and_stay_out() -> None:
    group = rated({HYPERSTEER: swept(), PROMPTING: np.array(1.0)})
    group.methods[HYPERSTEER].rating[:, 0, 2:, 1] = np.nan  # a concept without a score at factor 1
    group.methods[HYPERSTEER].rating[:, 1, 3, 1] = np.nan
    group.methods[PROMPTING].rating[:, 2, 3] = np.nan
    line = measure(group, 1.0)[FIXED]
    assert line.score == (2.0, 2.0, 2.0, CONCEPTS - 1)
    assert line.wins.mean == 1.0
    asked = CONCEPTS * (2 * 3 + 2 * 2)  # two choose at all factors, two are scored at factors 2, the chosen one, and 1
    assert failures(group, 1.0)[HYPERSTEER] == (3 * 3, 3 * asked)
    assert failures(group, 2.0)[HYPERSTEER] == (0, 3 * (asked - CONCEPTS * 2))
    assert failures(group, 1.0)[PROMPTING] == (3, 3 * CONCEPTS * INSTRUCTIONS)
    group.methods[HYPERSTEER].rating[:, :, 2:, 0] = np.nan  # never asked for
    assert failures(group, 1.0)[HYPERSTEER] == (3 * 3, 3 * asked)


def stored_prompting(path: Path, scores: list[float]) -> Path:
    """AxBench's file of prompting alone: two concepts, two instructions, two factors; the second is better."""
    rows = [
        {
            "concept_id": c,
            "input_id": i,
            "factor": f,
            "input_concept": f"Concept {c}.",
            "original_prompt": f"Prompt {c}-{3 - i}?",
        }
        for c in (0, 1)
        for i in (0, 1)
        for f in (1.0, 2.0)
    ]
    for row, score in zip(rows, scores, strict=True):
        row |= {"PromptSteering_steered_generation": "a text", "PromptSteering_perplexity": 2.0}
        row |= dict.fromkeys(rating_columns(PROMPTING), score)
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


def test_win_rates_against_stored_ratings(tmp_path: Path) -> None:
    ours = evaluation(rated({HYPERSTEER: np.array(1.5), PROMPTING: np.array(0.5)}))
    # By rows: concept 0 has 2 at its better factor, concept 1 has 1, but for a rating that failed.
    scores = [0.0, 2.0, 0.0, 2.0, 0.0, 1.0, 0.0, np.nan]
    found = against_stored(ours, stored_prompting(tmp_path / "a.parquet", scores))
    lines = measure(found.groups["held-in"], 1.0)
    assert lines[CHOSEN].wins == pytest.approx((0.5, 0.0, 1.0, 2))  # loses to 2, twice, and wins against 1
    assert lines["prompting"].wins.mean == 0.0  # ours against the stored one
    assert lines[CHOSEN].score.concepts == CONCEPTS


def test_stored_ratings_of_something_else_are_refused(tmp_path: Path) -> None:
    ours = evaluation(rated({}))
    other = ours._replace(groups={"held-in": ours.groups["held-in"]._replace(concepts=["else"] * CONCEPTS)})
    path = stored_prompting(tmp_path / "a.parquet", [1.0] * 8)
    with pytest.raises(ConfigError, match="no rating of prompting for what one was scored on, such as 'else'"):
        against_stored(other, path)
    pq.write_table(pq.read_table(path).slice(1), tmp_path / "b.parquet")
    with pytest.raises(ConfigError, match="7 rows of 2 concepts and 2 factors; give a whole file"):
        against_stored(ours, tmp_path / "b.parquet")
    pq.write_table(pq.read_table(path).drop_columns([rating_columns(PROMPTING)[0]]), tmp_path / "c.parquet")
    with pytest.raises(
        ConfigError, match=r"c\.parquet lacks the columns PromptSteering.*relevance_concept_ratings; give"
    ):
        against_stored(ours, tmp_path / "c.parquet")


def test_runs_are_compared_concept_by_concept() -> None:
    rng = np.random.default_rng(0)
    easy = rng.uniform(0, 1, (CONCEPTS, 1, 1))  # concepts differ far more than the runs do
    one, other = rated({HYPERSTEER: easy}), rated({HYPERSTEER: easy[::-1] + 0.25})
    order = slice(None, None, -1)
    other = other._replace(concepts=one.concepts[order], instructions=one.instructions[order])
    found = compare(evaluation(one), evaluation(other), "held-in")
    assert found[CHOSEN] == pytest.approx((0.25, 0.25, 0.25, CONCEPTS))
    assert found.keys() == {CHOSEN, FIXED}
    asked_else = [("Else?", *rest) for _, *rest in one.instructions[:2]]
    other = other._replace(instructions=[*other.instructions[:4], *asked_else])
    assert compare(evaluation(one), evaluation(other), "held-in")[FIXED].concepts == CONCEPTS - 2


def test_a_report_of_two_evaluations(tmp_path: Path, monkeypatch) -> None:
    score = swept()
    score[0, 2:], score[1, 3] = 0.0, np.nan
    groups = {
        "one": rated({HYPERSTEER: score, PROMPTING: np.array(1.5)}, "one"),
        "other": rated({HYPERSTEER: np.array(2.0)}, "other"),
    }
    monkeypatch.setattr(
        "hypersteer_jax.evaluation.evaluate_report.read_evaluation",
        lambda path: evaluation(groups[path.name], path.name),
    )
    write_report([Path("a/one"), Path("b/other")], tmp_path / "page")
    page = (tmp_path / "page/report.md").read_text()
    for name in ("factors.png", "concepts.png"):
        assert f"({name})" in page
        assert (tmp_path / "page" / name).read_bytes().startswith(b"\x89PNG")
    for words in ("## one", "## other", "shuffled prompt, factor 1", "wrong prompt, factor 1", "a judge"):
        assert words in page
    assert "6 of 468 ratings failed, and their texts have no score: HyperSteer 6 of 180." in page
    assert "| other over one | held-in | HyperSteer, factor 1 | 6 | +0.33 " in page
    assert "### one, held-in: worst" in page
    assert "**0.00** (concept 0, instruction 0, fluency 0), factor 2, steered to **concept 0**: Prompt 0-" in page
    assert "> one: a text \\| of HyperSteer" in page
    found = json.loads((tmp_path / "page/report.json").read_text())
    assert [each["name"] for each in found["evaluations"]] == ["one", "other"]
    lines = found["evaluations"][0]["groups"]["held-in"]["methods"]
    assert lines["HyperSteer, factor 1"]["score"]["concepts"] == 6
    assert found["evaluations"][1]["groups"]["held-in"]["concepts"][0] == {
        "concept": "concept 0",
        "factor": 0.5,
        "HyperSteer, chosen factor": 2.0,
        "HyperSteer, factor 1": 2.0,
        "prompting": 0.0,
    }


def test_what_cannot_be_reported(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no evaluation is given"):
        write_report([], tmp_path / "page")
    with pytest.raises(ConfigError, match=r"no evaluation\.json here or in evaluation/"):
        write_report([tmp_path], tmp_path / "page")
    record = make_record(EvaluateConfig(), RunConfig(), 5, {})
    (tmp_path / "evaluation.json").write_text(json.dumps(record))
    with pytest.raises(ConfigError, match="held-in and held-out not rated yet"):
        read_evaluation(tmp_path)
    assert not (tmp_path / "page").exists()
