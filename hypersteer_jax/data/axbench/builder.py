"""A tensorflow-datasets builder of AxBench's positive rows with fixed splits; ArrayRecord, without TensorFlow.

A prepared directory is an ordinary one of tensorflow-datasets:

    tfds.builder_from_directory("runs/data/axbench/concept10_2b_l20/1.0.0").as_data_source("train")
"""

import functools
import hashlib
import logging
import random
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
from rich.console import Console

from hypersteer_jax.data.axbench.files import SETS, Files, locate
from hypersteer_jax.data.batch import DataError, SteeringExample
from hypersteer_jax.data.concepts import load_list, normalised, read_concepts
from hypersteer_jax.data.readers import AxbenchRow, read_axbench_rows, read_categories
from hypersteer_jax.data.splits import HELD_IN, HELD_OUT, TRAIN, Splits, find_listed, sample_held_in

try:
    import tensorflow_datasets as tfds
except ModuleNotFoundError as error:
    raise DataError(
        f'{error.name} is not installed, and prepared data needs it; pip install -e ".[axbench]" in a clone'
    ) from error

SPLITS = {TRAIN: "train", HELD_IN: "dev", HELD_OUT: "held_out"}  # names here, and there
CELLS = ("steering_prompt", "prompt", "response", "feature")  # text of a row, as in `SteeringExample`

CHUNK = 1024  # rows read at once; one by one they take six times as long


class Recipe(NamedTuple):
    """Where the rows of a set come from, and into which splits they go."""

    source: str | None = None  # see `files.locate`
    held_out: tuple[str, ...] = ("ho500", "ablations10")  # lists of concepts, see `concepts.load_list`
    dev_rows: int = 1000  # rows of held-in concepts that are not trained on; at most a tenth of them
    seed: int = 0  # which these are
    skip_bad_rows: bool = False  # as `DataConfig.skip_bad_rows`


FROM_THE_HUB = Recipe()


class Contents(NamedTuple):
    """What goes into a prepared directory."""

    splits: dict[str, list[AxbenchRow]]
    about: dict[str, Any]  # JSON that is stored beside it


class Axbench(tfds.core.GeneratorBasedBuilder):
    """Positive rows: steering prompt, prompt, response, SAE feature (empty if unknown), genre, id (-1 if unknown)."""

    VERSION = tfds.core.Version("1.0.0")
    BUILDER_CONFIGS: ClassVar = [tfds.core.BuilderConfig(name=name) for name in SETS]

    def __init__(self, recipe: Recipe = FROM_THE_HUB, **kwargs: Any):
        """As any builder, by a recipe."""
        self.recipe = recipe
        super().__init__(**kwargs)

    def _info(self) -> tfds.core.DatasetInfo:
        texts = {name: tfds.features.Text() for name in (*CELLS, "genre")}
        return tfds.core.DatasetInfo(
            builder=self,
            features=tfds.features.FeaturesDict(texts | {"concept_id": tfds.features.Scalar(np.int64)}),
            metadata=tfds.core.MetadataDict(),
            disable_shuffling=True,  # rows keep the order of the file; training shuffles by itself
        )

    @functools.cached_property
    def contents(self) -> Contents:
        """All rows by split, read when first asked for. Raises what `read_contents` does."""
        return read_contents(self.builder_config.name, self.recipe)

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator[tuple[int, dict[str, Any]]]]:
        self.info.metadata.update(self.contents.about)
        return {SPLITS[name]: self._generate_examples(rows) for name, rows in self.contents.splits.items() if rows}

    def _generate_examples(self, rows: list[AxbenchRow]) -> Iterator[tuple[int, dict[str, Any]]]:
        for index, row in enumerate(rows):
            cells = {name: getattr(row.example, name) for name in CELLS}
            concept_id = -1 if row.concept_id is None else row.concept_id
            yield index, cells | {"genre": row.genre, "concept_id": concept_id}


def read_contents(name: str, recipe: Recipe) -> Contents:
    """Rows of the recipe's source, by split.

    Raises:
        DataError: the source or a list cannot be had or is damaged, or everything is held out.
    """
    listed = [concept for each in recipe.held_out for concept in load_list(each)]
    files = locate(name, recipe.source)
    rows, problems = _read(files, recipe.skip_bad_rows)
    is_held_out = find_listed([row.example for row in rows], [row.concept_id for row in rows], listed)
    seen = [row for row, out in zip(rows, is_held_out, strict=True) if not out]
    if not seen:
        raise DataError(f"{name}: every concept is on one of the lists {', '.join(recipe.held_out)}; give fewer lists")
    sample = sample_held_in([row.example for row in seen], recipe.dev_rows, random.Random(recipe.seed))
    splits = {
        TRAIN: [row for index, row in enumerate(seen) if index not in sample],
        HELD_IN: [seen[index] for index in sorted(sample)],
        HELD_OUT: [row for row, out in zip(rows, is_held_out, strict=True) if out],
    }
    concepts = {name: len({normalised(row.example.concept) for row in found}) for name, found in splits.items()}
    about = {
        "recipe": recipe._asdict(),
        "files": {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files.tables},
        "categories": dict(sum(map(read_categories, files.tables), Counter())),
        "concepts": {SPLITS[name]: count for name, count in concepts.items()},
        "bad_rows": problems,
    }
    return Contents(splits, about)


def _read(files: Files, skip_bad_rows: bool) -> tuple[list[AxbenchRow], list[str]]:
    """Rows of all files, and what is wrong with those left out. Features that rows lack come from the metadata."""
    rows, problems = [], []
    for path in files.tables:
        more, wrong = read_axbench_rows(path, skip_bad_rows)
        rows += more
        problems += wrong
    if files.metadata is None:
        return rows, problems
    described = {concept.concept_id: concept for concept in read_concepts(files.metadata)}
    for index, (example, concept_id, genre) in enumerate(rows):
        concept = described.get(concept_id)
        if concept is None or example.feature:
            continue
        if normalised(concept.text) != normalised(example.concept):
            raise DataError(
                f"{files.metadata}: concept_id {concept_id} is {concept.text!r}, but {example.concept!r} in "
                f"{files.tables[0].name}; they are of different data sets, move one of them away"
            )
        rows[index] = AxbenchRow(example._replace(feature=concept.feature), concept_id, genre)
    return rows, problems


def prepare(name: str, recipe: Recipe, out: Path, console: Console) -> Path:
    """Builds a set below `out`, prints what is in it and returns its directory, which `train` takes as data.source.

    Args:
        name: one of `files.SETS`, or another for data of one's own.
        recipe: source and splits.
        out: `data_dir` of tensorflow-datasets.
        console: where to print.

    Raises:
        DataError: it is there already, or its source cannot be had, is damaged or is held out altogether.
    """
    logging.getLogger("absl").setLevel(logging.ERROR)  # or it warns of data of one's own
    config = name if name in SETS else tfds.core.BuilderConfig(name=name)
    builder = Axbench(recipe, config=config, data_dir=out, file_format="array_record")
    path = Path(builder.data_path)
    if path.exists():
        raise DataError(f"{path}: prepared already; give another folder as out, or remove it")
    about = builder.contents.about  # before anything is written
    with tempfile.TemporaryDirectory() as downloads:  # stays empty: files come from the disk or the hub's own cache
        builder.download_and_prepare(download_dir=downloads)
    for problem in about["bad_rows"]:
        console.print(f"bad row skipped: {problem}", markup=False)
    rows = ", ".join(f"{count:,} {category}" for category, count in about["categories"].items())
    console.print(f"{sum(about['categories'].values()):,} rows ({rows}); positive ones are kept:")
    for split, info in builder.info.splits.items():
        console.print(f"  {split}: {info.num_examples:,} rows of {about['concepts'][split]:,} concepts")
    if not builder.contents.splits[HELD_OUT]:
        console.print(f"  nothing is held out: no row is of a concept on a list ({', '.join(recipe.held_out)})")
    console.print(f"train with --data.source {path}", soft_wrap=True)
    return path


def read_prepared(path: Path) -> Splits:
    """The splits of a prepared directory.

    Raises:
        DataError: it is none, or lacks a training split or a part of the rows.
    """
    if not (path / "dataset_info.json").is_file():
        raise DataError(f"{path}: no dataset_info.json here; give the folder that `hypersteer data prepare` printed")
    builder = tfds.builder_from_directory(path)
    missing = [name for name in CELLS if name not in builder.info.features]
    if missing or SPLITS[TRAIN] not in builder.info.splits:
        what = f"its rows have no {', '.join(missing)}" if missing else f"it has no split {SPLITS[TRAIN]}"
        raise DataError(f"{path}: {what}; prepare it again")
    return {
        split: _examples(builder.as_data_source(stored)) if stored in builder.info.splits else []
        for split, stored in SPLITS.items()
    }


def _examples(source: Any) -> list[SteeringExample]:
    chunks = (range(start, min(start + CHUNK, len(source))) for start in range(0, len(source), CHUNK))
    return [_example(cells) for chunk in chunks for cells in source.__getitems__(chunk)]


def _example(cells: dict[str, bytes]) -> SteeringExample:
    steering_prompt, prompt, response, feature = (cells[name].decode() for name in CELLS)
    return SteeringExample(steering_prompt, prompt, response, steering_prompt, feature=feature)
