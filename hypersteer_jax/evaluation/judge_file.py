"""From settings to a judge, and from a file of texts to a file of ratings (`hypersteer judge`)."""

import os
from importlib.util import find_spec
from pathlib import Path
from typing import TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from hypersteer_jax.config import ConfigError, JudgeConfig
from hypersteer_jax.data.sources import load_base
from hypersteer_jax.data.tinyworld.judge import load_bounds
from hypersteer_jax.evaluation.cache import Cache
from hypersteer_jax.evaluation.judges import (
    PAPER_MODEL,
    Judge,
    Judgement,
    endpoint_judge,
    load_rubric,
    make_plan,
    rating_columns,
    read_ratings,
    read_texts,
    replay_judge,
    run_judge,
    table_name,
)
from hypersteer_jax.evaluation.lm_judges import local_judge, proxy_judge, rules_judge

ASKED, COMPUTED = ("paper", "endpoint"), ("local", "proxy")
USED_BY = {  # kinds of judges that a setting is for
    "model": ("endpoint", *COMPUTED),
    "base_url": ("endpoint",),
    "key_variable": ASKED,
    "price": ASKED,
    "max_cost": ASKED,
    "rubric_file": (*ASKED, "local"),
    "table": ("replay",),
}
T = TypeVar("T")


def make_judge(config: JudgeConfig) -> Judge:
    """The judge that the settings describe.

    Raises:
        ConfigError: a setting is missing, of no use to this kind of judge, or the extra [endpoint] is not installed.
        JudgeError, WeightsError, DataError: a file that a setting names cannot be used.
    """
    for name, kinds in USED_BY.items():
        value = getattr(config, name)
        if value is not None and config.kind not in kinds:
            raise ConfigError(f"{name} is {value} and kind is {config.kind}, which has no use for it; {_kinds(name)}")
    match config.kind:
        case "paper" | "endpoint":
            return _endpoint_judge(config)
        case "local":
            model = _given(config.model, "model", config)
            return local_judge(*load_base(model, "bfloat16"), load_rubric(config.rubric_file), model)
        case "proxy":
            model = _given(config.model, "model", config)
            return proxy_judge(*load_base(model, "float32"), model)
        case "rules":
            return rules_judge(*load_base("tinyworld", "float32"), load_bounds())
        case "replay":
            table = _given(config.table, "table", config)
            return replay_judge(read_ratings(table), table_name(table))


def _kinds(name: str) -> str:
    return f"{name} is for {' and '.join(USED_BY[name])}"


def _given(value: T | None, name: str, config: JudgeConfig) -> T:
    if value is None:
        raise ConfigError(
            f"{name} is not given and kind is {config.kind}, which needs it; give --{name.replace('_', '-')}"
        )
    return value


def _endpoint_judge(config: JudgeConfig) -> Judge:
    paper, rubric = config.kind == "paper", load_rubric(config.rubric_file)
    model = PAPER_MODEL if paper else _given(config.model, "model", config)
    url = None if paper else _given(config.base_url, "base_url", config)
    if find_spec("openai") is None or find_spec("tenacity") is None:
        raise ConfigError(f'kind is {config.kind}, which needs openai; pip install -e ".[endpoint]" in a clone')
    from hypersteer_jax.evaluation.endpoint import OPENAI, Endpoint, Price

    endpoint = Endpoint(
        model=model,
        base_url=url or OPENAI,
        key_variable=config.key_variable,
        temperature=config.temperature,
        price=None if config.price is None else Price(*config.price, date="as given"),
        workers=config.workers,
    )
    return endpoint_judge(endpoint, rubric, config.max_cost)


def judge_file(source: Path, out: Path, config: JudgeConfig, preview: bool = False) -> None:
    """Rates all texts of an AxBench `steering_data.parquet` and writes it with the ratings, in AxBench's columns.

    Args:
        source: has input_concept, original_prompt and *_steered_generation.
        out: gets them and the ratings; null where the judge failed.
        config: who rates.
        preview: say what it would cost, and stop.

    Raises:
        ConfigError: a setting or file cannot be used, or it would cost too much.
    """
    table, items = read_texts(source)
    judge = make_judge(config)
    with Cache(config.cache) as cache:
        every = [item for rows in items.values() for item in rows]
        if preview:
            asks = make_plan(judge, every, cache, config.retry_failures).asks
            print(f"{judge.name}: {judge.preview(list(asks.values()))}")
            return
        found = iter(run_judge(judge, every, cache, config.retry_failures, print))
    judgements = {method: [next(found) for _ in rows] for method, rows in items.items()}
    write_parquet(with_ratings(table, judgements, judge), out)


def with_ratings(table: pa.Table, judgements: dict[str, list[Judgement]], judge: Judge) -> pa.Table:
    """The table with each method's ratings and their harmonic means, in AxBench's columns; what failed is null.

    The judge's name is in its metadata as `judge`.
    """
    for method, judged in judgements.items():
        columns = dict(zip(rating_columns(method), zip(*judged, strict=True), strict=True))
        columns[f"{method}_LMJudgeEvaluator"] = tuple(judgement.score for judgement in judged)
        for name, values in columns.items():
            if name in table.column_names:
                table = table.drop_columns([name])
            table = table.append_column(name, pa.array(values, pa.float64()))
    return table.replace_schema_metadata({"judge": judge.name})


def write_parquet(table: pa.Table, path: Path) -> None:
    """Writes a file that is there whole or not at all."""
    part = path.with_name(path.name + ".part")
    pq.write_table(table, part)
    os.replace(part, path)
