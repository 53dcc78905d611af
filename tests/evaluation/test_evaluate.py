"""`hypersteer evaluate` on the tiny world, with a hypernetwork of random weights and very short texts."""

import dataclasses
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pyarrow.parquet as pq
import pytest
from rich.console import Console

from hypersteer_jax import cli
from hypersteer_jax.config import (
    ConfigError,
    DataConfig,
    EvaluateConfig,
    HypernetConfig,
    JudgeConfig,
    RunConfig,
    SteeringConfig,
)
from hypersteer_jax.data.sources import base_shape, load_splits
from hypersteer_jax.data.splits import HELD_IN, HELD_OUT, TRAIN
from hypersteer_jax.evaluation import evaluate as module
from hypersteer_jax.evaluation.cases import METHODS, Case, make_cases
from hypersteer_jax.evaluation.evaluate import DATA, check_trained_on, evaluate, write_part
from hypersteer_jax.evaluation.judges import rating_columns, read_texts
from hypersteer_jax.evaluation.measures import read_evaluation
from hypersteer_jax.evaluation.scores import choose_factors
from hypersteer_jax.training import checkpoint
from hypersteer_jax.training.launch import load_run_at
from hypersteer_jax.training.train import new_state
from tests.conftest import random_hypernet
from tests.evaluation.server import said, serving

CONFIG = EvaluateConfig(
    concepts=3,
    per_concept=2,
    factors=(2.0, 1.0),
    max_new=3,
    batch=40,
    part=3,
    judge=JudgeConfig(kind="rules"),
)
TEXTS = 3 * 2 * (4 + 2)  # of a group: concepts, instructions, methods without factors and factors


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "run"
    config = RunConfig(out=folder, hypernet=HypernetConfig(blocks=1), steering=SteeringConfig((1,)))
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, compute_dtype="float32"))
    state = new_state(random_hypernet(config.hypernet, base_shape("tinyworld")), config.train)
    state = state._replace(step=jnp.asarray(5, jnp.int32))
    checkpoint.write_config(folder, config)
    with checkpoint.open_checkpoints(folder) as checkpoints:
        checkpoint.save(checkpoints, 5, state, config=config)
    return folder


def settings(folder: Path, **changes) -> EvaluateConfig:
    judge = dataclasses.replace(CONFIG.judge, cache=folder / "judgements.sqlite")
    return dataclasses.replace(CONFIG, out=folder / "evaluation", judge=judge, **changes)


@pytest.fixture(scope="module")
def finished(run: Path, tmp_path_factory) -> Path:
    return evaluate(run, settings(tmp_path_factory.mktemp("whole")))


def test_texts_and_ratings_are_in_axbench_s_files(finished: Path) -> None:
    for group in (HELD_IN, HELD_OUT):
        table, items = read_texts(finished / group / "inference" / DATA)
        assert set(items) == set(METHODS)
        assert table["factor"].to_pylist() == [1.0, 2.0] * 6
        assert table["concept_id"].to_pylist() == [0] * 4 + [1] * 4 + [2] * 4
        assert table["input_id"].to_pylist() == [0, 0, 1, 1] * 3
        assert set(table["group"].to_pylist()) == {group}
        for method in METHODS:
            texts = [item.text for item in items[method]]
            assert (texts[::2] == texts[1::2]) == (method != "HyperSteer")
            assert all(value is None or value > 1 for value in table[f"{method}_perplexity"].to_pylist())
        assert items["WrongPrompt"] != items["HyperSteer"] != items["ShuffledPrompt"] != items["Unsteered"]
        assert table["HyperSteer_strength"] == table["factor"]
        strengths = [set(table[f"{method}_strength"].to_pylist()) for method in METHODS]
        assert strengths == [{0.0}, {1.0}, {1.0}, {0.0}, {1.0, 2.0}]


def test_eight_devices_write_what_one_does(run: Path, finished: Path) -> None:
    model, step = load_run_at(run)
    assert step == 5
    cases = make_cases(CONFIG, model.config)[HELD_IN]
    one = write_part(model, HELD_IN, 0, cases, CONFIG)
    eight = pq.read_table(finished / HELD_IN / "inference" / DATA)
    assert one.column_names == eight.column_names
    for name in one.column_names:
        if name.endswith("_perplexity"):
            np.testing.assert_allclose(*(np.array(table[name].to_pylist(), float) for table in (one, eight)), rtol=1e-5)
        else:
            assert one[name].to_pylist() == eight[name].to_pylist()


def test_rated_is_what_chooses_a_factor_and_what_is_scored_at_it(finished: Path) -> None:
    for group in (HELD_IN, HELD_OUT):
        table = pq.read_table(finished / group / "evaluate" / DATA)
        for method in METHODS:
            for column in rating_columns(method):
                rating = np.array(table[column].to_pylist(), float).reshape(3, 2, 2)  # concepts, instructions, factors
                if method == "HyperSteer":
                    scores = np.array(table["HyperSteer_LMJudgeEvaluator"].to_pylist(), float).reshape(3, 2, 2)
                    best = choose_factors(scores).factor
                    np.testing.assert_array_equal(np.isnan(rating[:, 1, 1]), best == 0)  # factor 2, where 1 is chosen
                    rating = np.delete(rating.reshape(3, 4), 3, axis=1)
                assert np.isfinite(rating).all()


def test_methods_get_what_is_theirs(run: Path, monkeypatch, tmp_path: Path) -> None:
    asked = []
    monkeypatch.setattr(
        module, "complete", lambda _, requests, decoding: asked.extend(requests) or ["x"] * len(requests)
    )
    evaluate(run, settings(tmp_path))
    table = pq.read_table(tmp_path / "evaluation" / HELD_IN / "inference" / DATA)
    rows = [row for row in table.to_pylist() if row["factor"] == 1.0]
    blocks = [asked[start : start + 6] for start in range(0, TEXTS, 6)]
    for row, unsteered, wrong, shuffled, prompting, one, two in zip(rows, *blocks, strict=True):
        prompt, seed = row["original_prompt"], unsteered.seed
        assert unsteered == (prompt, "", 0.0, seed)
        assert wrong == (prompt, row["wrong_concept"], 1.0, seed)
        assert shuffled == (prompt, row["shuffled_concept"], 1.0, seed)
        assert prompting == (row["steered_input"], "", 0.0, seed)
        assert one == (prompt, row["input_concept"], 1.0, seed)
        assert two == (prompt, row["input_concept"], 2.0, seed)
    assert len({request.seed for request in asked[:TEXTS]}) == 6


CHILD = """
import sys
from pathlib import Path
from tests.evaluation.test_evaluate import evaluate, settings
evaluate(Path(sys.argv[1]), settings(Path(sys.argv[2])))
"""


def test_killed_and_continued_without_generating_or_judging_twice(
    run: Path, finished: Path, tmp_path: Path, monkeypatch
) -> None:
    parts = [tmp_path / "evaluation" / group / "inference/parts" for group in (HELD_IN, HELD_OUT)]
    killed = subprocess.Popen([sys.executable, "-c", CHILD, str(run), str(tmp_path)], env=os.environ)
    while not list(parts[0].glob("*.parquet")):
        assert killed.poll() is None
        time.sleep(0.002)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    kept = {path: path.read_bytes() for folder in parts for path in folder.glob("*.parquet")}
    assert len(kept) == 1
    rows = []
    real = module.complete

    def counting(model, requests, decoding):
        rows.append(len(requests))
        if len(rows) == 1:
            raise KeyboardInterrupt  # stopped once more
        return real(model, requests, decoding)

    monkeypatch.setattr(module, "complete", counting)
    with pytest.raises(KeyboardInterrupt):
        evaluate(run, settings(tmp_path))
    evaluate(run, settings(tmp_path))
    assert rows == [TEXTS, TEXTS]  # the stopped one, and the same again: nothing of the part that was kept
    assert {path: path.read_bytes() for path in kept} == kept
    for group in (HELD_IN, HELD_OUT):
        for folder in ("inference", "evaluate"):
            assert pq.read_table(tmp_path / "evaluation" / group / folder / DATA) == pq.read_table(
                finished / group / folder / DATA
            )


def test_an_endpoint_is_paid_once_and_previewed_before_any_text(run: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    pytest.importorskip("openai", reason="not run: judges behind an endpoint; install the extra [endpoint]")

    def judged(url: str, **changes) -> EvaluateConfig:
        judge = JudgeConfig("endpoint", "m", url, cache=tmp_path / "judgements.sqlite", price=(0.0, 10.0), **changes)
        return dataclasses.replace(settings(tmp_path), judge=judge)

    with serving(lambda *_: said("Rating: [[1]]")) as server:
        evaluate(run, judged(server.url), preview=True)
        # 2 groups of 36 texts, 3 questions each, 512 reply tokens at most
        assert f"{2 * TEXTS} texts to generate, 0 are there" in (shown := capsys.readouterr().out)
        assert f"{2 * TEXTS * 3} calls" in shown
        assert "1.11 dollars at most" in shown
        with monkeypatch.context() as patch:
            patch.setattr(module, "load_run_at", lambda *_: pytest.fail("generated before it was refused"))
            with pytest.raises(ConfigError, match="max_cost is 1 dollars"):
                evaluate(run, judged(server.url, max_cost=1.0))
            with pytest.raises(ConfigError, match="NO_SUCH_KEY is not set"):
                evaluate(run, judged(server.url, key_variable="NO_SUCH_KEY"))
        assert server.calls.total() == 0
        assert not (tmp_path / "evaluation").exists()
        evaluate(run, judged(server.url))
        paid = server.calls.total()
        assert 0 < paid <= 2 * TEXTS * 3
        evaluate(run, judged(server.url))
        assert server.calls.total() == paid
    assert {line for line in capsys.readouterr().out.splitlines() if "0 texts to generate, 72 are there" in line}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"per_concept": 1}, "per_concept is 1; give at least 2"),
        ({"max_new": 0}, "max_new is 0"),
        ({"concepts": 0}, "concepts is 0"),
        ({"temperature": -1.0}, "temperature is -1.0"),
        ({"batch": 12}, "batch is 12; give a multiple of 8"),
        ({"tensor": 0}, "tensor is 0; give at least 1"),
        ({"tensor": 3}, "tensor is 3; give a divisor of the number of devices, 8"),
        ({"factors": (1.0, 1.0)}, "each once"),
        ({"factors": ()}, "give one or more"),
        ({"fixed_factor": 1.5}, "fixed_factor is 1.5; give one of the factors"),
        ({"held_in": "ablations10"}, "judge.kind is rules"),
        ({"judge": JudgeConfig("proxy")}, "model is not given"),
    ],
)
def test_settings_are_refused_before_any_work(run: Path, tmp_path: Path, changes: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        evaluate(run, dataclasses.replace(settings(tmp_path), **changes))
    assert not (tmp_path / "evaluation").exists()


def test_another_evaluation_in_the_folder_is_refused(run: Path, finished: Path, tmp_path: Path) -> None:
    same = dataclasses.replace(settings(finished.parent), batch=8)
    assert evaluate(run, same, preview=True) == finished  # texts do not depend on it
    for change in ({"seed": 1}, {"max_new": 4}, {"concepts": 2}):
        with pytest.raises(ConfigError, match=f"another .*{next(iter(change))}.*; give another folder as out"):
            evaluate(run, dataclasses.replace(same, **change))
    longer = tmp_path / "longer"
    shutil.copytree(run, longer)
    (longer / "checkpoints/5").rename(longer / "checkpoints/7")
    with pytest.raises(ConfigError, match="another step"):
        evaluate(longer, same)


def test_held_out_is_what_the_run_never_saw(tmp_path: Path) -> None:
    source, lines = tmp_path / "rows.jsonl", []
    for concept in ("gold", "Ships at sea", "bees", "rain"):
        lines += [json.dumps({"steering_prompt": concept, "prompt": f"Say {n}.", "response": "Yes."}) for n in range(3)]
    source.write_text("\n".join(lines))
    trained = RunConfig(data=DataConfig(source=str(source), held_out_concepts=1))
    unseen = {example.concept for example in load_splits(trained, print)[HELD_OUT]}
    seen = min({"gold", "Ships at sea", "bees", "rain"} - unseen)

    def told(held_in: str, held_out: str, run: RunConfig = trained) -> str:
        cases = {
            group: [Case(0, concept, "", "", [], [])] for group, concept in ((HELD_IN, held_in), (HELD_OUT, held_out))
        }
        console = Console(file=io.StringIO(), width=400)
        check_trained_on(cases, run, console)
        return console.file.getvalue()

    assert told(f"{seen.upper()}!", *unseen) == ""
    assert "1 of 1 held-in concepts are not in the run's training data, such as 'new'" in told("new", *unseen)
    with pytest.raises(ConfigError, match=f"1 of 1 concepts of held_out are in .* training data, such as '{seen}'"):
        told(seen, seen)
    source.unlink()
    assert "its data is not here" in told(seen, seen)
    tinyworld = RunConfig()
    with pytest.raises(ConfigError, match="held_out are in the run's training data"):
        told("", load_splits(tinyworld, print)[TRAIN][0].steering_prompt, tinyworld)


def test_no_checkpoint_no_evaluation(run: Path, tmp_path: Path) -> None:
    shutil.copy(run / "config.json", tmp_path)
    with pytest.raises(checkpoint.CheckpointError, match="no checkpoint is stored here; train the run first"):
        evaluate(tmp_path, settings(tmp_path))


def test_the_commands(run: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(run, "mine")
    short = ["--concepts", 2, "--per-concept", 2, "--factors", 1, "--max-new", 2, "--part", 2]
    for words in (
        ["evaluate", "mine", *short, "--judge.kind", "rules"],
        ["report", "mine", "--out", "page"],
    ):
        monkeypatch.setattr(sys, "argv", ["hypersteer", *map(str, words)])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        assert stop.value.code == 0
    assert "HyperSteer, chosen factor" in capsys.readouterr().out
    assert read_evaluation(Path("mine")).groups.keys() == {HELD_IN, HELD_OUT}
    assert (tmp_path / "page/report.md").exists()
