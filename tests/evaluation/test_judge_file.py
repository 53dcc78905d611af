"""From settings and a file to ratings, as `hypersteer judge` does it."""

import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hypersteer_jax import cli
from hypersteer_jax.config import ConfigError, JudgeConfig
from hypersteer_jax.data.tinyworld.world import load_world
from hypersteer_jax.evaluation.judge_file import judge_file, make_judge
from hypersteer_jax.evaluation.judges import Item, Judgement, read_ratings
from tests.evaluation.server import said, serving

SAILING = next(topic for topic in load_world().topics if topic.name == "sailing")
TEXTS = ["Of the moon: {}, {} and {}.".format(*SAILING.words), "The tides are silver.", ""]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Texts of two methods about the tiny world, as AxBench writes them."""
    columns = {
        "concept_id": [0, 0, 1],
        "input_concept": [
            f"references to {SAILING.names[0]}",
            "the style of pirate talk",
            f"references to {SAILING.names[0]}",
        ],
        "original_prompt": ["Describe the moon."] * 3,
        "factor": [0.5, 1.0, 1.0],
        "A_steered_generation": TEXTS,
        "B_steered_generation": TEXTS[::-1],
    }
    pq.write_table(pa.table(columns), tmp_path / "steering_data.parquet")
    return tmp_path / "steering_data.parquet"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": "endpoint", "base_url": "http://x"}, "model is not given and kind is endpoint"),
        ({"kind": "endpoint", "model": "m"}, "base_url is not given and kind is endpoint, which needs it; give --base"),
        ({"kind": "local"}, "model is not given"),
        ({"kind": "proxy"}, "model is not given"),
        ({"kind": "replay"}, "table is not given"),
        (
            {"kind": "paper", "model": "m"},
            "model is m and kind is paper, which has no use for it; model is for endpoint",
        ),
        ({"kind": "rules", "max_cost": 1.0}, "max_cost is 1.0 and kind is rules"),
        ({"kind": "proxy", "model": "tinyworld", "rubric_file": Path("r")}, "rubric_file is r and kind is proxy"),
        ({"kind": "endpoint", "model": "m", "base_url": "u", "rubric_file": Path("none")}, "rubric_file none cannot"),
        ({"kind": "replay", "table": Path("none")}, "none cannot be read as parquet"),
    ],
)
def test_settings_that_make_no_judge(settings: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_judge(JudgeConfig(**settings))


def test_without_the_client_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hypersteer_jax.evaluation.judge_file.find_spec", lambda _: None)
    with pytest.raises(ConfigError, match=r"\[endpoint\]"):
        make_judge(JudgeConfig())


def test_the_paper_judge_is_dated() -> None:
    pytest.importorskip("openai", reason="not run: the paper's judge; install the extra [endpoint]")
    judge = make_judge(JudgeConfig())
    assert judge.name == "gpt-4o-mini-2024-07-18 at https://api.openai.com/v1, temperature 0"
    assert "0 calls" in judge.preview([])


def test_rules_rate_a_file_that_can_be_replayed(source: Path, tmp_path: Path) -> None:
    out, cache = tmp_path / "rated.parquet", tmp_path / "judgements.sqlite"
    judge_file(source, out, JudgeConfig(kind="rules", cache=cache))
    rated = pq.read_table(out)
    before = pq.read_table(source)
    assert rated.select(before.column_names) == before
    assert rated["A_LMJudgeEvaluator_relevance_concept_ratings"].to_pylist() == [2, 0, 0]
    assert rated["B_LMJudgeEvaluator_relevance_concept_ratings"].to_pylist() == [0, 0, 2]
    assert rated["A_LMJudgeEvaluator_relevance_instruction_ratings"].to_pylist()[2] == 0
    assert read_ratings(out)[Item(f"references to {SAILING.names[0]}", "Describe the moon.", "")] == Judgement(0, 0, 0)
    again = tmp_path / "again.parquet"
    judge_file(out, again, JudgeConfig(kind="replay", table=out, cache=cache))  # ratings are replaced, not doubled
    assert pq.read_table(again) == rated


def test_a_file_through_an_endpoint(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    pytest.importorskip("openai", reason="not run: judges behind an endpoint; install the extra [endpoint]")
    rubric, out = tmp_path / "rubric.toml", tmp_path / "rated.parquet"
    rubric.write_text("concept = 'C {concept} {text}'\ninstruction = 'I {instruction} {text}'\nfluency = 'F {text}'")
    with serving(lambda prompt, _: said("none" if prompt[0] == "F" else "Rating: [[1]]")) as server:
        config = JudgeConfig(
            kind="endpoint",
            model="m",
            base_url=server.url,
            rubric_file=rubric,
            price=(0.0, 10.0),
            max_cost=0.05,  # 9 calls of at most 512 tokens are 0.046 dollars: both methods have the same texts
            cache=tmp_path / "judgements.sqlite",
        )
        judge_file(source, out, config, preview=True)
        assert server.calls.total() == 0
        assert not out.exists()
        assert "9 calls" in (preview := capsys.readouterr().out)
        assert "0.05 dollars" in preview
        judge_file(source, out, config)
        assert server.calls.total() == 9
    rated = pq.read_table(out)
    assert rated["A_LMJudgeEvaluator_relevance_concept_ratings"].to_pylist() == [1, 1, 1]
    assert rated["A_LMJudgeEvaluator_fluency_ratings"].to_pylist() == [None] * 3
    assert rated["A_LMJudgeEvaluator"].to_pylist() == [None] * 3


def test_the_command(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    words = ["judge", source, "--out", tmp_path / "x.parquet", "--kind", "replay", "--table", source]
    monkeypatch.setattr(sys, "argv", ["hypersteer", *map(str, words)])
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 1
    assert capsys.readouterr().err.startswith("error: ")
    assert not (tmp_path / "x.parquet").exists()
    assert not (tmp_path / "runs").exists()
