"""What `data describe` counts, measures, draws and exits with."""

import json
from itertools import chain

import numpy as np
import pytest
from rich.console import Console

from hypersteer_jax.data import describe as describing
from hypersteer_jax.data.batch import DataError, SteeringExample
from hypersteer_jax.data.describe import ALL, Counts, characters, count, describe, length_table, tokens
from hypersteer_jax.data.splits import HELD_IN, HELD_OUT, TRAIN
from tests.test_cli import run

from .test_prompts import tokenizer

ROWS = [
    SteeringExample("ships", "a", "b", "ships", feature="m/s/1"),
    SteeringExample("Ships!", "a", "b ", "Ships!", feature="m/s/1"),  # the first one again
    SteeringExample("bees", "a", "b", "bees", feature="m/s/2"),  # its answer under another name
    SteeringExample("tea", "a", "c", "tea"),
]


def said(console: Console) -> str:
    return " ".join(console.export_text().split())


def test_counts():
    assert count(ROWS) == Counts(rows=4, concepts=3, features=2, twins=1, same_answers=1)


def test_lengths_in_characters_and_in_tokens():
    rows = [SteeringExample("a b", "c", "d a", concept="x"), SteeringExample("d", "c c c", "b", concept="y")]
    assert {part: list(values) for part, values in characters(rows).items()} == {
        "steering prompt": [3, 1],
        "prompt": [1, 5],
        "response": [3, 1],
    }
    assert {part: list(values) for part, values in tokens(tokenizer())(rows).items()} == {
        "steering prompt": [3, 2],  # with BOS
        "prompt": [10, 12],  # with the chat template
        "response": [2, 1],
    }


def test_quantiles_in_the_table():
    values = np.arange(1, 101)
    console = Console(record=True, width=160)
    console.print(
        length_table({ALL: {"steering prompt": values, "prompt": values * 100, "response": values}}, "tokens")
    )
    assert "51 / 96 / 100 │ 5,100 / 9,600 / 10,000 │" in said(console)


def test_a_file_has_no_splits_that_could_leak(tmp_path):
    lines = [
        {"steering_prompt": e.steering_prompt, "prompt": e.prompt, "response": e.response, "concept": e.concept}
        for e in ROWS
    ]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, lines)))
    console = Console(record=True, width=160)
    assert describe(tmp_path / "a.jsonl", tmp_path / "deep" / "a.png", None, console)
    assert (tmp_path / "deep" / "a.png").read_bytes().startswith(b"\x89PNG")
    assert "│ all rows │ 4 │ 3 │ 0 │ 1 │ 1 │" in said(console)
    with pytest.raises(DataError, match=r"b\.jsonl: no such file; did you mean a\.jsonl"):
        describe(tmp_path / "b.jsonl", tmp_path / "b.png", None, console)


def test_a_leak_is_said_and_exits_1(tmp_path, monkeypatch, capsys):
    splits = {TRAIN: ROWS[:3], HELD_IN: ROWS[3:], HELD_OUT: [SteeringExample("BEES", "q", "r", "BEES")]}
    monkeypatch.setattr(describing, "read_source", lambda source: splits)
    monkeypatch.chdir(tmp_path)
    assert run(monkeypatch, "data", "describe", "anywhere", "--out", "a.png") == 1
    assert "LEAK: train and held-out share 1 steering prompt: 'BEES'" in capsys.readouterr().out
    splits[HELD_OUT] = [SteeringExample("the moon", "q", "r", "the moon")]
    assert run(monkeypatch, "data", "describe", "anywhere", "--out", "a.png") == 0
    assert "nothing leaks from training into evaluation" in capsys.readouterr().out


def test_pictured_shares_add_up(monkeypatch, tmp_path):
    drawn = []
    monkeypatch.setattr("matplotlib.axes.Axes.stairs", lambda axis, values, edges, **_: drawn.append((values, edges)))
    lengths = {
        name: {part: np.array(values) for part in describing.PARTS}
        for name, values in ((TRAIN, [1, 5, 300]), (HELD_OUT, [7]))
    }
    describing.plot_lengths(lengths, "characters", tmp_path / "a.png")
    assert len(drawn) == 6
    assert all(values.sum() == pytest.approx(100) for values, _ in drawn)
    assert all(len(values) == len(edges) - 1 <= describing.BINS + 1 for values, edges in drawn)
    assert len(set(chain.from_iterable(map(tuple, (edges for _, edges in drawn))))) == len(drawn[0][1])  # the same bins


def test_release_file(shared_data, tmp_path):
    console = Console(record=True, width=160)
    folder = shared_data / "axbench"
    assert describe(folder / "pooled_train.parquet", tmp_path / "a.png", None, console)
    shown = said(console)
    assert "12,308 rows: 10,295 positive, 2,013 negative" in shown
    assert "│ all rows │ 10,295 │ 140 │ 0 │ 0 │ 62 │" in shown  # 53 to the letter, 9 more but for spacing
    assert describe(folder / "concept10" / "2b_l20" / "latent_eval_data.parquet", tmp_path / "a.png", None, console)
    shown = said(console)
    assert "755 rows: 360 positive, 360 negative, 35 hard negative" in shown
    assert "│ all rows │ 360 │ 10 │ 10 │ 0 │" in shown
