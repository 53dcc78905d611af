import subprocess
import sys

import pytest

from hypersteer_jax import cli


def run(monkeypatch, *words: str) -> int:
    monkeypatch.setattr(sys, "argv", ["hypersteer", *map(str, words)])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    return stop.value.code


def test_help_imports_no_jax():
    # What makes `hypersteer --help` quick is that nothing heavy is imported for it.
    code = (
        "import sys; sys.argv = ['hypersteer', '--help']\n"
        "from hypersteer_jax.cli import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "print(sorted({'jax', 'flax', 'transformers', 'grain', 'orbax'} & set(sys.modules)))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.splitlines()[-1] == "[]"
    named = "quickstart train steer convert check-golden compare goodput data judge evaluate report"
    for command in named.split():
        assert command in out


def test_a_typo_in_a_key_names_what_was_meant(monkeypatch, capsys):
    assert run(monkeypatch, "train", "tinyworld", "--train.step", "5") != 0
    err = capsys.readouterr().err
    assert "--train.step" in err
    assert "--train.steps" in err


def test_an_unknown_recipe_lists_the_known_ones(monkeypatch, capsys):
    assert run(monkeypatch, "train", "gemma3") != 0
    assert "gemma2-2b" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["steer", "--prompt", "Hi.", "--concept", "tea", "--run", "nowhere"], "no run is stored here"),
        (["convert", "nowhere", "x"], "neither a run nor a release"),
        (["check-golden", "nowhere"], "not a golden case"),
        (["train", "tinyworld", "--lm", "no/such-model", "--out", "x"], "not a directory"),
        (["train", "tinyworld", "--data.source", "train.parquet", "--out", "x"], "no such file"),
        (["train", "tinyworld", "--data.source", ".", "--out", "x"], "no dataset_info.json here"),
        (["data", "prepare", "mine", "--out", "x"], "mine: not a set of AxBench"),
        (["data", "prepare", "concept500_2b_l20", "--out", "x"], "as a dataset of the hub it could not be had"),
        (["data", "describe", "nowhere.parquet", "--out", "x"], "no such file"),
        (["data", "make", "ho50", "--instructions", "pool.jsonl", "--out", "x"], "neither a file nor one of ho500"),
        (["train", "tinyworld", "--hypernet.blocks", "9", "--out", "x"], "hypernet.blocks is 9"),
        (["train", "tinyworld", "--steering.layers", "7", "--out", "x"], "the base LM has blocks 0 to"),
        (["train", "tinyworld", "--train.attention", "splash", "--out", "x"], "train.attention is splash"),
        (["train", "tinyworld", "--out", "x", "--resume"], "no run is stored here"),
        (["judge", "nowhere.parquet", "--out", "x", "--kind", "rules"], "nowhere.parquet cannot be read"),
        (["evaluate", "nowhere", "--out", "x"], "no run is stored here"),
        (["report", "nowhere", "--out", "x"], "no evaluation.json here"),
    ],
)
def test_what_the_user_can_mend_is_one_message(monkeypatch, capsys, tmp_path, words, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert run(monkeypatch, *words) == 1
    err = capsys.readouterr().err
    assert err.startswith("error: ")
    assert message in err
    assert "Traceback" not in err
    assert not (tmp_path / "x").exists()  # nothing was written before the check


def test_train_resume_and_steer(monkeypatch, capsys, tmp_path):
    # The whole way of a user on the embedded world, with a run as short as can be.
    out = tmp_path / "run"
    common = (
        "--out",
        out,
        "--train.batch",
        16,
        "--train.save-every",
        1,
        "--train.eval-batches",
        1,
        "--data.buckets",
        1,
    )
    assert run(monkeypatch, "train", "tinyworld", "--train.steps", 2, *common) == 0
    assert run(monkeypatch, "train", "tinyworld", "--train.steps", 2, *common) == 1
    assert "holds a run" in capsys.readouterr().err
    assert run(monkeypatch, "train", "tinyworld", "--train.steps", 3, *common, "--resume") == 1
    assert "train.steps is 3 here and 2 there" in capsys.readouterr().err
    assert run(monkeypatch, "train", "tinyworld", "--train.steps", 2, *common, "--resume") == 0
    steer = ("--prompt", "Describe the moon.", "--concept", "references to bees", "--factor", 0, 1, "--max-new", 4)
    assert run(monkeypatch, "steer", "--run", out, *steer) == 0
    shown = capsys.readouterr().out
    assert "factor 0: base LM" in shown
    assert "factor 1" in shown
