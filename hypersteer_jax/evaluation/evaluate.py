"""AxBench's steering evaluation of a run: texts, then ratings, both on disk as they come (`hypersteer evaluate`).

    OUT/evaluation.json                         what was asked of which checkpoint
    OUT/GROUP/inference/parts/00000.parquet     texts of a few concepts, each file there whole or not at all
    OUT/GROUP/inference/steering_data.parquet   all of them, in AxBench's columns
    OUT/GROUP/evaluate/steering_data.parquet    with ratings

GROUP is held-in or held-out. A killed evaluation goes on with the same command: finished parts are kept, and so is
every rating, in the cache of judgements.

Every concept meets its instructions at every factor. Beside HyperSteer there are always the unsteered base LM,
prompting, and two controls at one fixed factor: the steering prompt of another concept, which shows what a vector does
that knows nothing of the concept, and the concept's own with its words shuffled, which shows what their order is worth.
A method without factors has the same text in all rows of an instruction. All texts of an instruction share their seed.
"""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jax.sharding import Mesh
from rich.console import Console
from rich.progress import track

from hypersteer_jax.config import ConfigError, EvaluateConfig, RunConfig, to_dict
from hypersteer_jax.data.batch import DataError
from hypersteer_jax.data.concepts import normalised
from hypersteer_jax.data.sources import TINYWORLD, load_splits
from hypersteer_jax.data.splits import HELD_OUT, TRAIN
from hypersteer_jax.data.tinyworld.judge import mean_nll
from hypersteer_jax.decoding import Decoding
from hypersteer_jax.evaluation.cache import Cache
from hypersteer_jax.evaluation.cases import HYPERSTEER, METHODS, Case, Cases, all_factors, make_cases
from hypersteer_jax.evaluation.judge_file import make_judge, with_ratings, write_parquet
from hypersteer_jax.evaluation.judges import TEXT, Judge, read_texts
from hypersteer_jax.evaluation.rating import expected_asks, open_asks, rate
from hypersteer_jax.generation import Request, Steered, complete
from hypersteer_jax.sharding import make_mesh
from hypersteer_jax.training import checkpoint
from hypersteer_jax.training.launch import load_run_at

RECORD, DATA = "evaluation.json", "steering_data.parquet"


def evaluate(run: Path, config: EvaluateConfig, preview: bool = False, console: Console | None = None) -> Path:
    """Evaluates the newest checkpoint of a run, or goes on with it.

    Args:
        run: folder of a training run.
        config: what is asked, and who rates.
        preview: say what there is to do and what it would cost, and stop.
        console: where to say it.

    Returns:
        The folder of the evaluation.

    Raises:
        ConfigError, DataError, CheckpointError, WeightsError: before anything is generated, naming what to change.
    """
    console = console or Console()
    check(config)
    mesh = devices(config)
    trained = checkpoint.read_config(run)
    step = newest_step(run)
    cases = make_cases(config, trained)
    if config.judge.kind == "rules" and (trained.lm != TINYWORLD or config.held_in or config.held_out):
        raise ConfigError("judge.kind is rules, which knows the tiny world's own concepts only; choose another judge")
    if config.held_in or config.held_out:
        check_trained_on(cases, trained, console)
    out = config.out or run / "evaluation"
    record = make_record(config, trained, step, cases)
    check_same(out, record)
    parts = [(group, number, part) for group, each in cases.items() for number, part in chunks(each, config.part)]
    missing = [(*found, path) for found in parts if not (path := part_path(out, *found[:2])).exists()]
    judge = make_judge(config.judge)
    list(judge.rate([]))  # rates nothing, and raises what would come only after hours: a key that is not set
    with Cache(config.judge.cache) as cache:
        console.print(_outlook(config, cases, parts, missing, out, judge, cache), highlight=False, soft_wrap=True)
        if preview:
            return out
        if missing:
            model, loaded = load_run_at(run, mesh)
            if loaded != step:
                raise ConfigError(f"{run}: the checkpoint of step {step} is damaged; move it away to evaluate {loaded}")
            out.mkdir(parents=True, exist_ok=True)
            write_record(out, record)
            for group, number, part, path in track(missing, "generating", console=console):
                path.parent.mkdir(parents=True, exist_ok=True)
                with jax.set_mesh(mesh):
                    table = write_part(model, group, number, part, config)
                write_parquet(table, path)
        for group in cases:
            rate_group(out, group, [found[:2] for found in parts if found[0] == group], config, judge, cache, console)
    return out


def check(config: EvaluateConfig) -> None:
    """Settings that can be known to be wrong.

    Raises:
        ConfigError: naming the setting, its value and the fix.
    """
    for name, least in {"per_concept": 2, "max_new": 1, "batch": 1, "part": 1, "concepts": 1, "tensor": 1}.items():
        value = getattr(config, name)
        if value is not None and value < least:
            raise ConfigError(f"{name} is {value}; give at least {least}")
    if not config.temperature >= 0:
        raise ConfigError(f"temperature is {config.temperature}; give 0 (greedy) or a value above 0")
    if len(set(config.factors)) < len(config.factors) or not config.factors:
        raise ConfigError(f"factors are {config.factors}; give one or more, each once")
    if config.fixed_factor not in all_factors(config):
        raise ConfigError(f"fixed_factor is {config.fixed_factor:g}; give one of the factors, or add it to them")


def devices(config: EvaluateConfig) -> Mesh:
    """All devices: `tensor` of them share a copy of the weights, and the copies share the texts.

    Raises:
        ConfigError: they cannot.
    """
    copies, rest = divmod(jax.device_count(), config.tensor)
    if rest:
        raise ConfigError(f"tensor is {config.tensor}; give a divisor of the number of devices, {jax.device_count()}")
    if config.batch % copies:
        raise ConfigError(f"batch is {config.batch}; give a multiple of {copies}, for as many copies of the base LM")
    return make_mesh(data=copies, tensor=config.tensor)


def check_trained_on(cases: Cases, run: RunConfig, console: Console) -> None:
    """Whether held-out concepts are; says so if held-in ones are not trained on, or if the data is not here to tell.

    Raises:
        ConfigError: held-out concepts are in the training data.
    """
    try:
        rows = load_splits(run, lambda _: None)[TRAIN]
    except DataError as error:
        console.print(f"not checked what the run was trained on, for its data is not here: {error}", highlight=False)
        return
    seen = {normalised(text) for row in rows for text in (row.concept, row.steering_prompt)}
    for group, members in cases.items():
        concepts = [case.concept for case in members]
        odd = [each for each in concepts if (normalised(each) in seen) == (group == HELD_OUT)]
        if odd and group == HELD_OUT:
            raise ConfigError(
                f"{len(odd)} of {len(concepts)} concepts of held_out are in the run's training data, such as "
                f"{odd[0]!r}; take them out of the list, or give it as held_in"
            )
        if odd:
            of = f"{len(odd)} of {len(concepts)} held-in concepts"
            console.print(f"{of} are not in the run's training data, such as {odd[0]!r}", highlight=False)


def newest_step(run: Path) -> int:
    """Step of the newest checkpoint.

    Raises:
        CheckpointError: there is none.
    """
    with checkpoint.open_checkpoints(run) as checkpoints:
        steps = checkpoint.stored(checkpoints)
    if not steps:
        raise checkpoint.CheckpointError(f"{run}: no checkpoint is stored here; train the run first")
    return steps[-1]


def make_record(config: EvaluateConfig, run: RunConfig, step: int, cases: Cases) -> dict[str, Any]:
    """All that the texts depend on, and what a report says of the run."""
    settings, trained = to_dict(config), to_dict(run)
    for name in ("out", "judge", "batch", "tensor"):  # a text depends on neither
        del settings[name]
    del trained["out"]
    digest = hashlib.sha256(json.dumps(cases).encode()).hexdigest()
    return {"step": step, "settings": settings, "cases": digest, "run": trained}


def check_same(out: Path, record: dict[str, Any]) -> None:
    """Whether a folder that is there holds this evaluation.

    Raises:
        ConfigError: it holds another one.
    """
    path = out / RECORD
    if not path.exists():
        return
    stored = json.loads(path.read_text(encoding="utf-8"))
    changed = [name for name in ("step", "cases") if stored[name] != record[name]]
    for group in ("settings", "run"):
        changed += [name for name, value in record[group].items() if stored[group].get(name) != value]
    if changed:
        raise ConfigError(f"{out} holds an evaluation with another {', '.join(changed)}; give another folder as out")


def write_record(out: Path, record: dict[str, Any]) -> None:
    """Writes OUT/evaluation.json, whole or not at all."""
    part = out / f"{RECORD}.part"
    part.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    part.replace(out / RECORD)


def chunks(cases: Sequence[Case], size: int) -> list[tuple[int, Sequence[Case]]]:
    """Number and cases of each part."""
    return [(number, cases[start : start + size]) for number, start in enumerate(range(0, len(cases), size))]


def part_path(out: Path, group: str, number: int) -> Path:
    """Where a part's texts are."""
    return out / group / "inference" / "parts" / f"{number:05}.parquet"


def write_part(model: Steered, group: str, number: int, cases: Sequence[Case], config: EvaluateConfig) -> pa.Table:
    """Generates all texts of a part: a row for each concept, instruction and factor, in this order."""
    factors, fixed = all_factors(config), config.fixed_factor
    asked = [(case, *pair) for case in cases for pair in zip(case.instructions, case.prompting, strict=True)]
    first = config.seed + number * config.part * config.per_concept
    rows = [(*row, first + place) for place, row in enumerate(asked)]
    blocks = [  # as METHODS, and the last for each factor
        [Request(prompt, seed=seed) for _, prompt, _, seed in rows],
        [Request(prompt, case.wrong, fixed, seed) for case, prompt, _, seed in rows],
        [Request(prompt, case.shuffled, fixed, seed) for case, prompt, _, seed in rows],
        [Request(prompting, seed=seed) for _, _, prompting, seed in rows],
        *([Request(prompt, case.concept, factor, seed) for case, prompt, _, seed in rows] for factor in factors),
    ]
    decoding = Decoding(max_new=config.max_new, temperature=config.temperature, batch=config.batch)
    texts = complete(model, [request for block in blocks for request in block], decoding)
    prompts = [prompt for _ in blocks for _, prompt, _ in asked]
    nll = np.where([bool(text) for text in texts], mean_nll(model.lm, model.prompter, prompts, texts), np.nan)
    shape = (len(blocks), len(asked))
    found = np.array(texts, object).reshape(shape).T, np.exp(nll).reshape(shape).T  # [rows, blocks]

    def column(values: Sequence[Any]) -> np.ndarray:
        return np.repeat(np.array(values, object), len(factors))

    columns: dict[str, Any] = {
        "group": column([group] * len(asked)),
        "concept_id": column([case.concept_id for case, *_ in asked]),
        "input_concept": column([case.concept for case, *_ in asked]),
        "input_id": column([row % config.per_concept for row in range(len(asked))]),
        "factor": np.tile(factors, len(asked)),
        "original_prompt": column([prompt for _, prompt, _ in asked]),
        "steered_input": column([prompt for *_, prompt in asked]),
        "wrong_concept": column([case.wrong for case, *_ in asked]),
        "shuffled_concept": column([case.shuffled for case, *_ in asked]),
    }
    none, alike = [[factor] * len(factors) for factor in (0.0, fixed)]
    strengths = none, alike, alike, none, factors
    for place, (method, strength) in enumerate(zip(METHODS, strengths, strict=True)):
        columns[f"{method}_strength"] = np.tile(strength, len(asked))
        swept = slice(place, None) if method == HYPERSTEER else [place] * len(factors)
        for name, values in zip((TEXT, "_perplexity"), found, strict=True):
            columns[method + name] = values[:, swept].ravel()
    return pa.table({name: pa.array(values.tolist(), from_pandas=True) for name, values in columns.items()})


def rate_group(
    out: Path,
    group: str,
    parts: Sequence[tuple[str, int]],
    config: EvaluateConfig,
    judge: Judge,
    cache: Cache,
    console: Console,
) -> None:
    """Puts the parts of a group together, and rates them (`rating.py`)."""
    texts, rated = (out / group / folder / DATA for folder in ("inference", "evaluate"))
    write_parquet(pa.concat_tables([pq.read_table(part_path(out, *part)) for part in parts]), texts)
    table, items = read_texts(texts)

    def say(line: str) -> None:
        console.print(f"{group}: {line}", highlight=False, soft_wrap=True)

    judgements = rate(items, judge, cache, config, say)
    rated.parent.mkdir(parents=True, exist_ok=True)
    write_parquet(with_ratings(table, judgements, judge), rated)


def _outlook(
    config: EvaluateConfig,
    cases: Cases,
    parts: Sequence[tuple[str, int, Sequence[Case]]],
    missing: Sequence[tuple[str, int, Sequence[Case], Path]],
    out: Path,
    judge: Judge,
    cache: Cache,
) -> str:
    """What there is to do; raises if rating it may be too dear."""
    each = config.per_concept * (len(METHODS) - 1 + len(all_factors(config)))  # texts of a concept
    left = sum(len(part) for _, _, part, _ in missing)
    whole = sum(map(len, cases.values()))
    counts = " and ".join(f"{len(members)} {group}" for group, members in cases.items())
    paths = [path for found in parts if (path := part_path(out, *found[:2])).exists()]
    asks = open_asks([read_texts(path)[1] for path in paths], judge, cache, config) if paths else []
    expected = expected_asks([case for _, _, part, _ in missing for case in part], judge, config)
    return (
        f"{counts} concepts: {left * each:,} texts to generate, {(whole - left) * each:,} are there\n"
        f"{judge.name}, at most: {judge.preview(asks + expected)}"
    )
