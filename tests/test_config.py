"""Configs: read back as they were written, and every mistake named before any work starts."""

import dataclasses
import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from hypersteer_jax.config import (
    RECIPES,
    ConfigError,
    DataConfig,
    HypernetConfig,
    LMConfig,
    MeshConfig,
    RunConfig,
    SelectionConfig,
    SteeringConfig,
    TrainConfig,
    check,
    from_dict,
    to_dict,
)
from hypersteer_jax.models.presets import PRESETS
from tests.models.tiny import CONFIGS

TINY = CONFIGS["llama"]  # four blocks, and a `rope_scaling`
OWN_SIZES = partial(HypernetConfig, blocks=2, init="random")
HEAD = partial(SelectionConfig, on=True)
GOOD = RunConfig(hypernet=HypernetConfig(blocks=2), steering=SteeringConfig(layers=(1,)))


def changed(config: Any, path: str, value: Any) -> Any:
    """The config with one field changed, such as "train.steps"."""
    name, _, rest = path.partition(".")
    return dataclasses.replace(config, **{name: changed(getattr(config, name), rest, value) if rest else value})


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_is_read_back_as_it_was_written(name: str) -> None:
    config = RECIPES[name][1]
    assert from_dict(RunConfig, json.loads(json.dumps(to_dict(config)))) == config


@pytest.mark.parametrize("config", [TINY, *PRESETS.values()], ids=["tiny", *PRESETS])
def test_lm_config_is_read_back_as_it_was_written(config: LMConfig) -> None:
    assert from_dict(LMConfig, json.loads(json.dumps(to_dict(config)))) == config


def test_every_field_survives() -> None:
    config = RunConfig(
        lm="some/where",
        out=Path("a/b"),
        hypernet=HypernetConfig(
            "in_context", 7, "random", "zero", "shared", "mlp", True, True, "padded", 6, 3, 40, 0.1
        ),
        steering=SteeringConfig((1, 5), "leaving", "response", "after_prefix"),
        selection=SelectionConfig(True, False, False, 0.9, 0.1, True, 0.2, True, 0.3, True),
        data=DataConfig("x.jsonl", 3, 8, 100, 50, 20, False, 2, True, True),
        train=TrainConfig(
            *(5, 2, 1.0, "cosine", 1, 2.0, 0.1, "example", (-1.0, 2.0), 4, "float32"),
            *(7, 8, 0.5, 9, 2, 30, 60.0, 3, True, "disk", Path("c"), "splash"),
        ),
        mesh=MeshConfig(4, 2, 3, 2),
    )
    for part in (config, config.hypernet, config.steering, config.selection, config.mesh, config.data, config.train):
        for field in dataclasses.fields(part):  # else a field could be lost without a difference
            if field.default is not dataclasses.MISSING:
                assert getattr(part, field.name) != field.default, field.name
    read = from_dict(RunConfig, json.loads(json.dumps(to_dict(config))))
    assert read == config
    assert isinstance(read.out, Path)
    assert isinstance(read.steering.layers, tuple)
    assert isinstance(read.train.factor_range, tuple)


def test_missing_keys_are_defaults_and_integers_serve_as_floats() -> None:
    assert from_dict(RunConfig, {}) == RunConfig()
    read = from_dict(TrainConfig, {"clip": 2, "factor_range": [0, 1]})
    assert read == TrainConfig(clip=2.0, factor_range=(0.0, 1.0))
    assert isinstance(read.clip, float)
    assert isinstance(read.factor_range[0], float)
    assert from_dict(TrainConfig, {"factor_range": None}).factor_range is None


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"step": 3},
            r"config: unknown key step; RunConfig has lm, out, hypernet, steering, selection, mesh, data, train",
        ),
        ({"train": {"stepz": 3, "lr": 1}}, r"config\.train: unknown key lr, stepz; TrainConfig has steps, batch"),
        ({"train": {"steps": "10"}}, r"config\.train\.steps is '10'; give a value of type int"),
        ({"train": {"steps": 10.0}}, r"config\.train\.steps is 10\.0; give a value of type int"),
        ({"train": {"steps": True}}, r"config\.train\.steps is True; give a value of type int"),
        ({"train": {"learning_rate": True}}, r"config\.train\.learning_rate is True; give a value of type float"),
        ({"train": {"learning_rate": "1e-3"}}, r"config\.train\.learning_rate is '1e-3'; give a value of type float"),
        ({"train": {"remat": 1}}, r"config\.train\.remat is 1; give a value of type bool"),
        ({"train": {"schedule": "step"}}, r"schedule is 'step'; choose one of 'linear', 'cosine', 'constant'"),
        ({"hypernet": {"variant": None}}, r"variant is None; choose one of 'no_context', 'in_context', "),
        ({"train": {"factor_range": [1.0]}}, r"config\.train\.factor_range is \[1\.0\]; give exactly 2 values"),
        ({"train": {"factor_range": [1.0, "b"]}}, r"config\.train\.factor_range is 'b'; give a value of type float"),
        ({"train": {"factor_range": 1.0}}, r"config\.train\.factor_range is 1\.0; give a list"),
        ({"steering": {"layers": 20}}, r"config\.steering\.layers is 20; give a list"),
        ({"steering": {"layers": [1, 2.5]}}, r"config\.steering\.layers is 2\.5; give a value of type int"),
        ({"data": [1]}, r"config\.data: expected a mapping of DataConfig fields, got \[1\]"),
        ({"data": {"max_concepts": "all"}}, r"config\.data\.max_concepts is 'all'; give a value of type int"),
    ],
)
def test_mistake_is_named(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        from_dict(RunConfig, values)


def test_missing_field_without_default_is_named() -> None:
    values = to_dict(TINY)
    del values["width"]
    with pytest.raises(ConfigError, match=r"config: .*missing .*'width'"):
        from_dict(LMConfig, values)


def test_where_stands_in_front_of_the_message() -> None:
    with pytest.raises(ConfigError, match=r"^run/config\.json\.train\.batch is"):
        from_dict(RunConfig, {"train": {"batch": "x"}}, "run/config.json")


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("steering.layers", (), r"steering\.layers is \(\); give one or more layers"),
        ("steering.layers", (2, 1), r"steering\.layers is \(2, 1\); .*ascending"),
        ("steering.layers", (1, 1), r"steering\.layers is \(1, 1\); .*each once"),
        ("steering.layers", (1, 4), r"steering\.layers is \(1, 4\); the base LM has blocks 0 to 3"),
        ("steering.layers", (-1, 2), r"steering\.layers is \(-1, 2\); the base LM has blocks 0 to 3"),
        ("hypernet.blocks", 0, r"hypernet\.blocks is 0; give at least 1"),
        ("hypernet.blocks", 5, r"hypernet\.blocks is 5, but only the base LM's 4 .*set hypernet\.init to random"),
        ("hypernet.heads", 2, r"hypernet\.heads is 2, but the blocks copied from the base LM have 4; .*init to random"),
        ("hypernet", OWN_SIZES(kv_heads=0), r"hypernet\.kv_heads is 0; give at least 1"),
        ("hypernet", OWN_SIZES(heads=5), r"hypernet\.heads is 5; give a multiple of the 2 key/value heads"),
        ("train.steps", 0, r"train\.steps is 0; give a value above 0"),
        ("train.batch", -1, r"train\.batch is -1; give a value above 0"),
        ("train.learning_rate", 0.0, r"train\.learning_rate is 0\.0; give a value above 0"),
        ("train.learning_rate", float("nan"), r"train\.learning_rate is nan; give a value above 0"),
        ("train.clip", 0.0, r"train\.clip is 0\.0; give a value above 0"),
        ("data.buckets", 0, r"data\.buckets is 0; give a value above 0"),
        ("data.max_prompt", 0, r"data\.max_prompt is 0; give a value above 0"),
        ("data.max_response", 0, r"data\.max_response is 0; give a value above 0"),
        ("data.max_concept", 0, r"data\.max_concept is 0; give a value above 0"),
        ("train.eval_every", -1, r"train\.eval_every is -1; give 0 \(off\)"),
        ("train.save_every", -5, r"train\.save_every is -5; give 0 \(off\)"),
        ("train.keep_last", 0, r"train\.keep_last is 0; give a value above 0"),
        ("train.keep_every", -1, r"train\.keep_every is -1; give 0 \(off\)"),
        ("train.stuck_after", -1.0, r"train\.stuck_after is -1\.0; give 0 \(off\) or seconds"),
        ("mesh.fsdp", 0, r"mesh\.fsdp is 0; give at least 1"),
        ("mesh.tensor", 4, r"mesh\.tensor is 4, which does not divide the base LM's kv_heads = 2; give a divisor"),
        (
            "",
            dataclasses.replace(GOOD, hypernet=OWN_SIZES(mlp_width=45), mesh=MeshConfig(tensor=2)),
            r"mesh\.tensor is 2, which does not divide the hypernetwork's mlp_width = 45",
        ),
        ("train.warmup", 1000, r"train\.warmup is 1000; give 0 to 999 \(below train\.steps\)"),
        ("train.warmup", -1, r"train\.warmup is -1; give 0 to 999"),
        ("train.factor_range", (2.0, 1.0), r"train\.factor_range is \(2\.0, 1\.0\); give the lower end first"),
        ("selection.sparsity", 0.3, r"selection\.sparsity is 0\.3, but there is no head; set selection\.on to True"),
        ("selection.hard_inference", True, r"selection\.hard_inference is True, but there is no head"),
        ("selection", HEAD(temperature_end=0.0), r"selection\.temperature_end is 0\.0; give a value above 0"),
        ("selection", HEAD(temperature_learning_rate=0.0), r"selection\.temperature_learning_rate is 0\.0; give a v"),
        ("selection", HEAD(temperature_start=0.04), r"selection\.temperature_start is 0\.04; give at least .* 0\.05"),
        ("selection", HEAD(temperature_start=float("nan")), r"selection\.temperature_start is nan; give at least"),
        ("selection", HEAD(sparsity=-0.1), r"selection\.sparsity is -0\.1; give 0 \(off\) or a value above 0"),
    ],
)
def test_check_names_what_cannot_work(path: str, value: Any, message: str) -> None:
    check(GOOD, TINY)
    with pytest.raises(ConfigError, match=message):
        check(changed(GOOD, path, value) if path else value, TINY)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("steering.layers", (0, 1, 2, 3)),
        ("hypernet.blocks", 4),
        ("hypernet", HypernetConfig(blocks=9, init="random")),
        ("hypernet", OWN_SIZES(heads=6, kv_heads=3, mlp_width=1)),
        ("hypernet.attention_scale", 0.1),
        ("train.warmup", 999),
        ("train.eval_every", 0),
        ("train.save_every", 0),
        ("train.factor_range", (-1.0, -1.0)),
        ("selection", HEAD(temperature_start=0.05, sparsity=0.0)),
    ],
)
def test_check_lets_the_edge_cases_through(path: str, value: Any) -> None:
    check(changed(GOOD, path, value), TINY)


@pytest.mark.parametrize(
    ("name", "lm", "blocks", "layers"),
    [
        ("gemma2-2b", "gemma-2-2b", 22, (20,)),
        ("gemma2-9b", "gemma-2-9b", 34, (20,)),
        ("release", "gemma-2-2b", 4, (20,)),
    ],
)
def test_recipes_of_the_paper(name: str, lm: str, blocks: int, layers: tuple[int, ...]) -> None:
    config = RECIPES[name][1]
    check(config, PRESETS[lm])
    assert config.hypernet == HypernetConfig("cross_attention", blocks)
    assert config.lm == f"google/{lm}-it"
    assert config.steering.layers == layers
    assert config.train.learning_rate == (5e-6 if "9b" in name else 8e-5)
    assert (config.train.schedule, config.train.warmup, config.train.clip) == ("linear", 0, 1.0)


def test_recipes_do_not_share_a_folder() -> None:
    assert len({config.out for _, config in RECIPES.values()}) == len(RECIPES)
    assert all(text for text, _ in RECIPES.values())
