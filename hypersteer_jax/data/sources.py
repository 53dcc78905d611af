"""From names in a config to what a run needs: the base LM with its tokenizer, and batches."""

import random
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax.sharding import Mesh

from hypersteer_jax.config import DataConfig, LMConfig, RunConfig
from hypersteer_jax.data.batch import DataError, SteeringBatch, SteeringExample
from hypersteer_jax.data.pipeline import (
    ALL,
    Layout,
    Rows,
    encode,
    evaluation_batches,
    iterator,
    make_layout,
    padding_report,
)
from hypersteer_jax.data.prompts import Prompter, load_tokenizer
from hypersteer_jax.data.readers import read
from hypersteer_jax.data.splits import HELD_IN, HELD_OUT, TRAIN, Splits, refuse_leaks, split_concepts
from hypersteer_jax.data.tinyworld.world import training_examples
from hypersteer_jax.models.lm import LM
from hypersteer_jax.models.presets import from_hugging_face
from hypersteer_jax.models.weights import load_lm, read_json, resolve
from hypersteer_jax.sharding import Share

TINYWORLD = "tinyworld"
TINYWORLD_ROWS = 24_000  # steering examples drawn for training
TINYWORLD_EVALUATION = 192  # and for each evaluation loss


class TrainData(NamedTuple):
    """Batches to train on, and batches to measure, by name (such as "held-in" and "held-out")."""

    rows: Rows  # that are trained on
    layout: Layout  # of these rows
    batches: Any  # Grain iterator of SteeringBatch
    evaluation: dict[str, list[SteeringBatch]]


def load_base(name: str, dtype: str, mesh: Mesh | None = None) -> tuple[LM, Prompter]:
    """The base LM, on a mesh if one is given, and its tokenizer: "tinyworld", a directory, or a Hugging Face hub id.

    Raises:
        WeightsError, DataError: weights or tokenizer are missing, damaged or do not fit.
    """
    if name == TINYWORLD:
        with resources.as_file(resources.files("hypersteer_jax.data.tinyworld") / "lm") as path:
            return load_lm(path, jnp.dtype(dtype), mesh), Prompter(load_tokenizer(path))
    path = resolve(name)
    return load_lm(path, jnp.dtype(dtype), mesh), Prompter(load_tokenizer(path))


def base_shape(name: str) -> LMConfig:
    """Shape of a base LM that `load_base` loads; of a directory, only config.json is read.

    Raises:
        WeightsError, ConfigError: there is no such LM, or it is not supported.
    """
    if name == TINYWORLD:
        with resources.as_file(resources.files("hypersteer_jax.data.tinyworld") / "lm") as path:
            return from_hugging_face(read_json(path / "config.json"))
    return from_hugging_face(read_json(resolve(name) / "config.json"))


def load_data(config: RunConfig, prompter: Prompter, say: Callable[[str], None], share: Share = ALL) -> TrainData:
    """Training and evaluation batches; `say` is told of every row that was dropped, and how much is padding.

    All processes read all rows, a few hundred bytes each, and each makes its own `share` of every batch.

    Raises:
        DataError: the source cannot be read, holds bad rows, leaks held-out data, or is too small for one batch.
    """
    data, train = config.data, config.train
    rows, encoded = load_splits(config, say), {}
    for name, examples in rows.items():
        if not examples:
            continue  # no concept is held out, or the file is too small for a held-in sample
        encoded[name] = encode(examples, prompter, data, config.steering, config.hypernet.variant)
        for notice in encoded[name].notices:
            say(f"{name}: {notice}")
    layout = make_layout(encoded[TRAIN], data, train.seed)
    shares = padding_report(encoded[TRAIN], layout)
    concepts = len({example.concept for example in rows[TRAIN]})
    shapes = ", ".join(f"{bucket.tokens}+{bucket.concept}" for bucket in layout.buckets)
    say(
        f"{len(encoded[TRAIN])} rows of {concepts} concepts; lengths {shapes}: {shares[0]:.1%} of the tokens and "
        f"{shares[1]:.1%} of the steering prompts' are real"
    )
    evaluation: dict[str, list[SteeringBatch]] = {
        name: evaluation_batches(encoded[name], train.batch, train.eval_batches, share)
        for name in (HELD_IN, HELD_OUT)
        if name in encoded
    }
    batches = iterator(encoded[TRAIN], layout, train.batch, train.seed, share)
    return TrainData(encoded[TRAIN], layout, batches, evaluation)


def load_splits(config: RunConfig, say: Callable[[str], None]) -> Splits:
    """What a run is trained on, and what is held in and out; `say` is told of rows that were dropped.

    Raises:
        DataError: the source cannot be read, holds bad rows, or leaks held-out data.
    """
    data, seed = config.data, config.train.seed
    if data.source == TINYWORLD:
        return {
            TRAIN: training_examples(TINYWORLD_ROWS, seed, data.max_concepts),
            HELD_IN: training_examples(TINYWORLD_EVALUATION, seed + 1, data.max_concepts),
            HELD_OUT: training_examples(TINYWORLD_EVALUATION, seed, held_out=True),
        }
    rows = _stored_splits(data, seed, say)
    refuse_leaks(rows, data.source)
    return rows | {TRAIN: limit_concepts(rows[TRAIN], data.max_concepts, seed)}


def _stored_splits(data: DataConfig, seed: int, say: Callable[[str], None]) -> Splits:
    """Splits of a prepared directory, or those that are drawn from a file."""
    path = Path(data.source)
    if path.is_dir():
        from hypersteer_jax.data.axbench.builder import read_prepared  # needs [axbench]

        return read_prepared(path)
    examples, problems = read(path, data.skip_bad_rows)
    if problems:
        say(f"{len(problems)} bad rows skipped:")
        for problem in problems:
            say(f"  {problem}")
    return split_concepts(examples, data.held_out_concepts, seed)


def limit_concepts(examples: list[SteeringExample], count: int | None, seed: int) -> list[SteeringExample]:
    """The examples of `count` concepts drawn by `seed`; all of them if `count` is None.

    Raises:
        DataError: there are fewer concepts.
    """
    if count is None:
        return examples
    concepts = list(dict.fromkeys(example.concept for example in examples))
    if not 0 < count <= len(concepts):
        raise DataError(f"data.max_concepts is {count}; there are {len(concepts)} concepts to train on")
    chosen = set(random.Random(seed).sample(concepts, count))
    return [example for example in examples if example.concept in chosen]
