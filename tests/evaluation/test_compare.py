"""Our training beside the PyTorch baseline's: agreement is found, a wrong weight is found out, torch is asked for."""

import dataclasses
import json
import sys
from pathlib import Path

import numpy as np
import pytest

from hypersteer_jax import cli
from hypersteer_jax.config import HypernetConfig
from hypersteer_jax.data.pipeline import Bucket, collate
from hypersteer_jax.data.sources import TrainData
from tests.conftest import random_rows
from tests.models.tiny import CONFIGS, random_lm

LM = random_lm(dataclasses.replace(CONFIGS["gemma2"], sliding_window=64))
ROWS = random_rows([4, 7, 5], [9, 12, 13], [3, 6, 4])
BATCH = collate(ROWS, np.arange(3)[:, None], Bucket(tokens=16, context=8, response=8, concept=8))


class Tokenizer:
    def decode(self, ids, skip_special_tokens):
        return " ".join(map(str, ids))


class Words:
    """As much of a Prompter as a comparison needs."""

    tokenizer, pad_id, end_id, prefix = Tokenizer(), 0, None, 2


def compared(form: str, out: Path, wrong: float = 0.0) -> tuple[bool, dict]:
    from hypersteer_jax.evaluation import compare

    config = compare.comparison_config(form, steps=3, seed=0)
    config = dataclasses.replace(config, hypernet=dataclasses.replace(config.hypernet, blocks=2))
    assert config.hypernet == HypernetConfig(
        blocks=2,
        cross_init=config.hypernet.cross_init,
        positions="padded",
        embedding="own" if form == "release" else "shared",
    )
    sides = compare.make_sides(config, LM, form)
    sides.baseline.hypernet.regression_head.weight.data[0, 0] += wrong
    found = compare.compare(sides, TrainData(ROWS, None, iter([BATCH] * 3), {"held-in": [BATCH]}), Words())
    compare.write_report(form, config, LM.config, found._replace(memory=(2_500_000, None)), out)
    return found.agrees, json.loads((out / f"{form}.json").read_text())


@pytest.mark.parametrize("form", ["release", "hyperstuff"])
def test_agreement_and_three_files(form: str, tmp_path: Path) -> None:
    pytest.importorskip("torch", reason="not run: the comparison with the PyTorch baseline")
    agrees, values = compared(form, tmp_path)
    assert agrees, values["rows"]
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"{form}.json", f"{form}.md", f"{form}.png"]
    assert len(values["rows"]) == 7
    assert len(values["losses"]) == 3
    assert min(values["cosines"]) > 1 - 5e-7
    assert [text["differs"] for text in values["texts"]] == [None] * 3
    text = (tmp_path / f"{form}.md").read_text()
    assert "Everything agrees." in text
    assert "1.0000000" in text
    assert "| 2.5 MB |" in text
    assert "| not measured |" in text
    assert values["speeds"]["pytorch"]["flops"] > values["speeds"]["jax"]["flops"] > 1e6
    assert "DIFFERS" not in text


def test_a_wrong_weight_is_found_out(tmp_path: Path) -> None:
    pytest.importorskip("torch", reason="not run: the comparison with the PyTorch baseline")
    agrees, values = compared("release", tmp_path, wrong=0.05)
    assert not agrees
    verdicts = {row["name"]: row["agrees"] for row in values["rows"]}
    assert verdicts["context at prompt positions"]
    assert not verdicts["vector"]
    assert "**DIFFERS**" in (tmp_path / "release.md").read_text()


@pytest.mark.parametrize("agrees", [True, False])
def test_exit_status(agrees: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torch", reason="not run: the comparison with the PyTorch baseline")
    monkeypatch.setattr("hypersteer_jax.evaluation.compare.run_comparison", lambda *_: agrees)
    monkeypatch.setattr(sys, "argv", ["hypersteer", "compare"])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == (0 if agrees else 1)


def test_without_torch_the_extra_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.setattr(sys, "argv", ["hypersteer", "compare"])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == 1
    error = capsys.readouterr().err
    assert error.startswith("error: torch is not installed")
    assert "[torch]" in error
    assert len(error.splitlines()) == 1
