"""The judges that read ratings from replies and tables, and the runner that never pays twice."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hypersteer_jax.evaluation.cache import Cache, Rating
from hypersteer_jax.evaluation.judges import (
    QUESTIONS,
    Ask,
    Item,
    Judge,
    JudgeError,
    Judgement,
    endpoint_judge,
    fill,
    load_rubric,
    parse_rating,
    plain_prompt,
    rating_columns,
    read_ratings,
    replay_judge,
    run_judge,
    table_name,
)
from tests.evaluation.server import Answer, failure, said, serving

RUBRIC = load_rubric()
ITEMS = [Item(f"concept {row % 3}", f"request {row % 4}", f"text {row}") for row in range(12)]


@pytest.fixture
def cache(tmp_path: Path) -> Iterator[Cache]:
    with Cache(tmp_path / "judgements.sqlite") as opened:
        yield opened


@pytest.mark.parametrize(
    ("reply", "rating"),
    [
        ("It is there.\nRating: [[2]]", 2),
        ("Rating: [[0]]", 0),
        ("Rating: 1", 1),
        ("Rating: 1.5", 1.5),
        ("**Rating: [[1]]**", 1),
        ("**Rating:** 2", 2),
        ('rating: "2".', 2),
        ("Rating: [[0]]\nOn reflection:\nRating: [[2]]\n", 2),
        ("Rating: [[3]]", None),
        ("Rating: [[-1]]", None),
        ("Rating: [[2.1]]", None),
        ("Rating: [[]]", None),
        ("Rating: [[number]]", None),
        ("Rating: 1 or 2", None),
        ("Rating: [[1]]\nRating: none", None),
        ("Rating:\n", None),
        ("I give it a 2.", None),
        ("", None),
    ],
)
def test_ratings_in_replies(reply: str, rating: float | None) -> None:
    assert parse_rating(reply) == rating


@pytest.mark.parametrize(
    ("ratings", "score"),
    [((2, 2, 2), 2), ((1, 2, 2), 1.5), ((1, 1, 2), 1.2), ((0, 2, 2), 0), ((0, 0, 0), 0), ((None, 2, 2), None)],
)
def test_score_is_the_harmonic_mean(ratings: tuple, score: float | None) -> None:
    assert Judgement(*ratings).score == (score if score is None else pytest.approx(score))


def test_own_rubric_says_what_each_question_is_about() -> None:
    item = Item("THE-CONCEPT", "THE-REQUEST", "THE-TEXT {concept} \\1")
    for question in QUESTIONS:
        prompt = fill(RUBRIC, question, item)
        assert item.text in prompt  # nothing within it is filled in
        assert (item.concept in prompt) == (question == "concept")
        assert (item.instruction in prompt) == (question == "instruction")
        assert "Rating: [[number]]" in prompt


def test_rubric_of_a_file(tmp_path: Path) -> None:
    path = tmp_path / "rubric.toml"
    path.write_text("concept = '{concept} in {text}?'\ninstruction = '{instruction}: {text}'\nfluency = '{text} {x}'")
    rubric = load_rubric(path)
    assert fill(rubric, "concept", Item("a", "b", "c")) == "a in c?"
    assert fill(rubric, "fluency", Item("a", "b", "c")) == "c {x}"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("concept = ", "cannot be read"),
        ("", "has nothing; it needs concept, instruction, fluency"),
        ("concept = '{concept} {text}'\nfluency = '{text}'", "has concept, fluency; it needs"),
        ("concept = '{text}'\ninstruction = '{instruction} {text}'\nfluency = '{text}'", r"concept lacks {concept}"),
        ("concept = '{concept} {text}'\ninstruction = ''\nfluency = '{text}'", "instruction lacks {instruction} and"),
        ("concept = '{concept} {text}'\ninstruction = '{instruction} {text}'\nfluency = 1", "fluency lacks {text}"),
    ],
)
def test_a_rubric_that_cannot_work(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "rubric.toml"
    path.write_text(text)
    with pytest.raises(JudgeError, match=message):
        load_rubric(path)
    with pytest.raises(JudgeError, match="cannot be read"):
        load_rubric(tmp_path / "none.toml")


def test_each_rating_is_stored_before_the_next_is_asked_for(cache: Cache) -> None:
    stored = []

    def rate(asks: Sequence[Ask]) -> Iterator[tuple[int, Rating]]:
        for index in reversed(range(len(asks))):
            yield index, Rating(float(asks[index].item.text[-1]) % 3, asks[index].question)
            stored.append(len(cache.scores("fake")))

    judgements = run_judge(Judge("fake", plain_prompt, rate), ITEMS, cache)
    assert stored == list(range(1, 37))
    assert [judgement.concept for judgement in judgements] == [int(item.text[-1]) % 3 for item in ITEMS]


def test_the_same_question_is_asked_once(cache: Cache) -> None:
    asked: list[Ask] = []

    def rate(asks: Sequence[Ask]) -> Iterator[tuple[int, Rating]]:
        asked.extend(asks)
        yield from ((index, Rating(1.0, "")) for index in range(len(asks)))

    twins = [Item("a", "b", "c"), Item("a", "b", "c"), Item("other", "b", "c")]
    judge = Judge("fake", lambda question, item: fill(RUBRIC, question, item), rate)
    assert run_judge(judge, twins, cache) == [(1, 1, 1)] * 3
    assert [ask.question for ask in asked] == ["concept", "instruction", "fluency", "concept"]
    assert run_judge(judge, [], cache) == []


def test_endpoint_judge_against_a_server_that_misbehaves(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    module = pytest.importorskip("hypersteer_jax.evaluation.endpoint", reason="not run: judges behind an endpoint")
    monkeypatch.setattr(module, "FIRST_WAIT", 0.001)
    good = said("Rating: [[2]]")
    behaviour = {
        "text 0": lambda _: said("Rating: [[3]]"),
        "text 1": lambda before: failure(500) if before == 0 else good,
        "text 2": lambda before: failure(429, retry_after="0.01") if before == 0 else good,
        "text 3": lambda _: Answer(good.body[:50]),
        "text 4": lambda _: Answer('{"choices": []}'),
        "text 5": lambda _: said("I would rather not."),
        "text 6": lambda _: failure(400),
    }
    items = [Item("a", "b", f"text {row}") for row in range(9)]
    texts = {fill(RUBRIC, question, item): item.text for item in items for question in QUESTIONS}
    lines: list[str] = []
    with serving(lambda prompt, before: behaviour.get(texts[prompt], lambda _: good)(before)) as server:
        judge = endpoint_judge(module.Endpoint("m", server.url, tries=2), RUBRIC)
        judgements = run_judge(judge, items, cache, say=lines.append)
        calls = server.calls.total()
        assert run_judge(judge, items, cache) == judgements
        assert server.calls.total() == calls  # nothing is asked again, failures neither
        assert run_judge(judge, items, cache, retry_failures=True) == judgements
        assert server.calls.total() == calls + 3 * (1 + 2 + 2 + 1 + 1)
    assert judgements == [(2, 2, 2) if row in (1, 2, 7, 8) else (None, None, None) for row in range(9)]
    assert calls == 3 * (1 + 2 + 2 + 2 + 2 + 1 + 1 + 1 + 1)
    assert "27 calls" in lines[0]
    assert lines[1].endswith("15 of 27 ratings failed; their texts have no score")


def test_a_failure_is_mended_on_request(cache: Cache) -> None:
    module = pytest.importorskip("hypersteer_jax.evaluation.endpoint", reason="not run: judges behind an endpoint")
    with serving(lambda _, before: said("hm") if before == 0 else said("Rating: [[1]]")) as server:
        judge = endpoint_judge(module.Endpoint("m", server.url), RUBRIC)
        assert run_judge(judge, ITEMS[:2], cache) == [(None, None, None)] * 2
        assert run_judge(judge, ITEMS[:2], cache, retry_failures=True) == [(1, 1, 1)] * 2


def test_a_run_that_is_too_dear_is_refused_before_its_first_call(cache: Cache) -> None:
    module = pytest.importorskip("hypersteer_jax.evaluation.endpoint", reason="not run: judges behind an endpoint")
    with serving(lambda *_: said("Rating: [[1]]")) as server:
        endpoint = module.Endpoint("m", server.url, max_tokens=100, price=module.Price(0, 1e4, "today"))
        with pytest.raises(module.EndpointError, match="max_cost is 35 dollars"):
            run_judge(endpoint_judge(endpoint, RUBRIC, max_cost=35), ITEMS, cache)  # 36 calls of at most a dollar
        assert server.calls.total() == 0
        run_judge(endpoint_judge(endpoint, RUBRIC), ITEMS[:4], cache)
        run_judge(endpoint_judge(endpoint, RUBRIC, max_cost=24), ITEMS, cache)  # what is known costs nothing
        assert server.calls.total() == 36


CHILD = """
import sys
from pathlib import Path
from hypersteer_jax.evaluation.cache import Cache
from hypersteer_jax.evaluation.endpoint import Endpoint
from hypersteer_jax.evaluation.judges import Item, endpoint_judge, load_rubric, run_judge
items = [Item(f"concept {row}", f"request {row}", f"text {row}") for row in range(40)]
judge = endpoint_judge(Endpoint("m", sys.argv[1], workers=4), load_rubric())
with Cache(Path(sys.argv[2])) as cache:
    print(sum(judgement.score for judgement in run_judge(judge, items, cache)))
"""


def test_killed_and_resumed_without_paying_twice(tmp_path: Path) -> None:
    pytest.importorskip("hypersteer_jax.evaluation.endpoint", reason="not run: judges behind an endpoint")

    def slow(*_: object) -> Answer:
        time.sleep(0.02)
        return said("Rating: [[2]]")

    path = tmp_path / "judgements.sqlite"
    with serving(slow) as server:
        command = [sys.executable, "-c", CHILD, server.url, str(path)]
        killed = subprocess.Popen(command, stdout=subprocess.PIPE, env=os.environ)
        while server.calls.total() < 30:
            assert killed.poll() is None
            time.sleep(0.005)
        killed.send_signal(signal.SIGKILL)
        killed.communicate()
        time.sleep(0.1)  # calls under way arrive
        paid = server.calls.total()
        with Cache(path) as cache:
            kept = len(cache.scores(f"m at {server.url}, temperature 0"))
        assert 0 < paid - 4 <= kept <= paid < 120  # of four workers
        resumed = subprocess.run(command, capture_output=True, text=True, check=True)
        assert resumed.stdout == "80.0\n"
        assert server.calls.total() == paid + 120 - kept
        assert sum(count > 1 for count in server.calls.values()) == paid - kept


def axbench_table(path: Path) -> list[Item]:
    """Two methods, as AxBench writes them."""
    columns: dict[str, list] = {
        "concept_id": [0, 0],
        "input_concept": ["gold", "gold"],
        "original_prompt": ["Why?", "How?"],
        "A_steered_generation": ["x", "y"],
        "A_LMJudgeEvaluator_relevance_concept_ratings": [2.0, 1.0],
        "A_LMJudgeEvaluator_relevance_instruction_ratings": [1.0, float("nan")],
        "A_LMJudgeEvaluator_fluency_ratings": [1.0, 3.0],
    }
    columns |= {name.replace("A_", "B_", 1): values[::-1] for name, values in columns.items() if name.startswith("A_")}
    columns["B_steered_generation"] = ["x", "z"]
    pq.write_table(pa.table(columns), path)
    return [Item("gold", "Why?", "x"), Item("gold", "How?", "y"), Item("gold", "How?", "z"), Item("gold", "How?", "x")]


def test_replay_of_an_axbench_table(tmp_path: Path, cache: Cache) -> None:
    items = axbench_table(tmp_path / "steering_data.parquet")
    judge = replay_judge(
        read_ratings(tmp_path / "steering_data.parquet"), table_name(tmp_path / "steering_data.parquet")
    )
    lines: list[str] = []
    judgements = run_judge(judge, items, cache, say=lines.append)
    assert judgements == [(2, 1, 1), (1, None, None), (2, 1, 1), (None, None, None)]
    assert judgements[0].score == pytest.approx(1.2)
    assert lines[-1].endswith("5 of 12 ratings failed; their texts have no score")
    (tmp_path / "other.parquet").write_bytes((tmp_path / "steering_data.parquet").read_bytes() + b" ")
    assert table_name(tmp_path / "other.parquet")[-12:] != judge.name[-12:]


def test_of_equal_texts_those_without_ratings_do_not_count(tmp_path: Path) -> None:
    path = tmp_path / "t.parquet"
    columns = {"input_concept": ["gold"] * 3, "original_prompt": ["Why?"] * 3, "A_steered_generation": ["x"] * 3}
    for name, ratings in zip(rating_columns("A"), ([None, 2.0, 0.0], [None, 1.0, 0.0], [1.0, 0.0, 0.0]), strict=True):
        columns[name] = ratings
    pq.write_table(pa.table(columns), path)
    assert read_ratings(path) == {Item("gold", "Why?", "x"): Judgement(2.0, 1.0, 0.0)}


def test_a_table_that_cannot_be_replayed(tmp_path: Path) -> None:
    path = tmp_path / "t.parquet"
    with pytest.raises(JudgeError, match=r"t\.parquet cannot be read"):
        read_ratings(path)
    path.write_text("not parquet")
    with pytest.raises(JudgeError, match=r"t\.parquet cannot be read"):
        read_ratings(path)
    axbench_table(path)
    whole = pq.read_table(path)
    for column in ("original_prompt", "B_LMJudgeEvaluator_fluency_ratings"):
        pq.write_table(whole.drop_columns([column]), path)
        with pytest.raises(JudgeError, match=f"lacks the columns {column}"):
            read_ratings(path)
    pq.write_table(whole.select(["input_concept", "original_prompt"]), path)
    with pytest.raises(JudgeError, match=r"has no column \*_steered_generation"):
        read_ratings(path)


def test_plain_prompts_differ_where_questions_do() -> None:
    keys = {plain_prompt(question, Item(c, i, "t")) for question in QUESTIONS for c in "ab" for i in "ab"}
    assert len(keys) == 12
    assert all(json.loads(key) for key in keys)
