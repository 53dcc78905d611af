"""Files of examples, checked cell by cell, and the split into training and held-out concepts."""

import difflib
import json
import math
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from hypersteer_jax.data.batch import DataError, SteeringExample

AXBENCH_COLUMNS = ("input", "output", "output_concept", "category")
AXBENCH_CATEGORIES = ("positive", "negative", "hard negative")
NO_CONCEPT = "EEEEE"  # AxBench's name for "no concept", on negatives
SHOWN = 5  # bad rows in an error message; the rest are counted
HELD_IN_ROWS = 128  # rows of the held-in sample at most, and never more than a tenth of the training rows


def read(path: Path, skip_bad_rows: bool = False) -> tuple[list[SteeringExample], list[str]]:
    """Examples of a .parquet (AxBench train_data) or .jsonl file; see `read_axbench` and `read_jsonl`."""
    readers = {".parquet": read_axbench, ".jsonl": read_jsonl}
    if path.suffix not in readers:
        raise DataError(
            f"{path}: the name ends in {path.suffix!r}; give a .parquet (AxBench train_data) or .jsonl file"
        )
    return readers[path.suffix](path, skip_bad_rows)


def read_axbench(path: Path, skip_bad_rows: bool = False) -> tuple[list[SteeringExample], list[str]]:
    """Positive rows of an AxBench parquet file.

    Columns `input` (instruction), `output` (response), `output_concept` (steering prompt) and `category` are needed,
    others are ignored. Negatives and rows without a concept ("EEEEE") are left out, as in the release. The concept is
    its text, not `concept_id`: AxBench has equal texts under two ids, and a held-out text must not be trained on.

    Returns:
        The examples, and one line for each bad row left out (always empty without `skip_bad_rows`).

    Raises:
        DataError: no such file, not parquet, a missing column, a bad row (unless skipped), or no usable row.
    """
    _check_exists(path)
    try:
        schema = pyarrow.parquet.read_schema(path)
        missing = [name for name in AXBENCH_COLUMNS if name not in schema.names]
        if missing:
            raise DataError(
                f"{path}: no column {', '.join(missing)}; the file has {', '.join(schema.names)}; "
                f"AxBench train_data has {', '.join(AXBENCH_COLUMNS)}"
            )
        columns = pyarrow.parquet.read_table(path, columns=list(AXBENCH_COLUMNS)).to_pydict()
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path}: cannot be read as parquet ({error}); give AxBench's train_data.parquet") from error
    examples, problems = [], []
    for index, row in enumerate(zip(*(columns[name] for name in AXBENCH_COLUMNS), strict=True)):
        cells: dict[str, Any] = dict(zip(AXBENCH_COLUMNS, row, strict=True))
        where = f"{path}, row {index} (counted from 0)"
        category = cells["category"]
        if category not in AXBENCH_CATEGORIES:
            choices = ", ".join(AXBENCH_CATEGORIES)
            problems.append(f"{where}, column category: {_shown(category)} is unknown; use one of {choices}")
        elif category == "positive" and cells["output_concept"] != NO_CONCEPT:
            problem = _text_problem(cells, ("input", "output", "output_concept"))
            if problem:
                problems.append(f"{where}, column {problem}")
            else:
                concept = cells["output_concept"]
                examples.append(SteeringExample(concept, cells["input"], cells["output"], concept))
    return _checked(path, examples, problems, skip_bad_rows, f"it has {len(columns['category'])} rows, none positive")


def read_jsonl(path: Path, skip_bad_rows: bool = False) -> tuple[list[SteeringExample], list[str]]:
    """One JSON object per line: `steering_prompt`, `prompt`, `response`, optionally `factor` (1) and `concept`.

    `concept` defaults to the steering prompt. Other keys and blank lines are ignored.

    Returns:
        The examples, and one line for each bad line left out (always empty without `skip_bad_rows`).

    Raises:
        DataError: no such file, a bad line (unless skipped), or no usable line.
    """
    _check_exists(path)
    examples, problems = [], []
    with path.open("rb") as lines:  # bytes: text that is not UTF-8 is then a bad line like any other
        for number, line in enumerate(lines, start=1):
            if line.strip():
                example = _parse_line(line)
                if isinstance(example, str):
                    problems.append(f"{path}, line {number}{example}")
                else:
                    examples.append(example)
    return _checked(path, examples, problems, skip_bad_rows, "the file is empty")


def _parse_line(line: bytes) -> SteeringExample | str:
    """The example, or what is wrong with the line, to be written behind its number."""
    try:
        cells = json.loads(line)
    except ValueError as error:  # bad JSON or bad UTF-8
        return f": {error}; write one JSON object per line, UTF-8"
    if not isinstance(cells, dict):
        return f': {_shown(cells)} is not a JSON object; write {{"steering_prompt": ..., ...}}'
    names = ("steering_prompt", "prompt", "response")
    problem = _text_problem(cells, (*names, "concept") if "concept" in cells else names)
    if problem:
        return f", key {problem}"
    factor = cells.get("factor", 1.0)
    if isinstance(factor, bool) or not isinstance(factor, int | float) or not math.isfinite(factor):
        return f", key factor: {_shown(factor)} is not a finite number; give one, or leave the key out for 1"
    steering_prompt, prompt, response = (cells[name] for name in names)
    return SteeringExample(steering_prompt, prompt, response, cells.get("concept", steering_prompt), float(factor))


def _text_problem(cells: dict[str, Any], names: tuple[str, ...]) -> str | None:
    """What is wrong with the first of these cells that is not text, starting with its name."""
    for name in names:
        if name not in cells:
            return f"{name}: missing; the line has {', '.join(cells)}"
        if not isinstance(cells[name], str):
            return f"{name}: {_shown(cells[name])} is not text; give text"
        if not cells[name].strip():
            return f"{name}: {_shown(cells[name])} is empty; give text"
    return None


def _shown(value: Any) -> str:
    """`value` in an error message: null as in the file, long values cut."""
    text = "null" if value is None else repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _check_exists(path: Path) -> None:
    """Raises DataError with close names of the same folder if `path` is not a file."""
    if path.is_file():
        return
    if not path.parent.is_dir():
        raise DataError(f"{path}: no such file, nor a folder {path.parent}; check data.source")
    near = difflib.get_close_matches(path.name, sorted(entry.name for entry in path.parent.iterdir()), cutoff=0.5)
    hint = f"did you mean {' or '.join(near)}?" if near else "check data.source"
    raise DataError(f"{path}: no such file; {hint}")


def _checked(
    path: Path, examples: list[SteeringExample], problems: list[str], skip_bad_rows: bool, empty: str
) -> tuple[list[SteeringExample], list[str]]:
    """Both lists, or DataError if there are bad rows that may not be skipped or nothing is left."""
    if problems and not (skip_bad_rows and examples):
        fix = "no good row is left" if skip_bad_rows else "mend them or set data.skip_bad_rows"
        more = [f"... and {len(problems) - SHOWN} more"] if len(problems) > SHOWN else []
        raise DataError(
            "\n".join([f"{path}: {len(problems)} bad row{'s' * (len(problems) > 1)}; {fix}", *problems[:SHOWN], *more])
        )
    if not examples:
        raise DataError(f"{path}: no rows to train on; {empty}")
    return examples, problems


def split_concepts(
    examples: list[SteeringExample], held_out: int, seed: int
) -> tuple[list[SteeringExample], list[SteeringExample], list[SteeringExample]]:
    """Splits by concept into (train, held_in_eval, held_out_eval), a pure function of its arguments.

    All rows of `held_out` concepts, drawn by `seed`, form held_out_eval: none of them is ever trained on. held_in_eval
    is a small sample of rows of the other concepts, taken out of train; every concept keeps at least one row there.

    Raises:
        DataError: fewer than `held_out` + 1 concepts.
    """
    concepts = list(dict.fromkeys(example.concept for example in examples))
    if not 0 <= held_out < len(concepts):
        raise DataError(
            f"data.held_out_concepts is {held_out}, but the data has {len(concepts)} concepts; "
            f"give 0 to {len(concepts) - 1}"
        )
    draw = random.Random(seed)
    unseen = set(draw.sample(concepts, held_out))
    seen = [example for example in examples if example.concept not in unseen]
    left = Counter(example.concept for example in seen)
    sample: set[int] = set()
    for index in draw.sample(range(len(seen)), len(seen)):
        if len(sample) >= min(HELD_IN_ROWS, len(seen) // 10):
            break
        if left[seen[index].concept] > 1:
            left[seen[index].concept] -= 1
            sample.add(index)
    train = [example for index, example in enumerate(seen) if index not in sample]
    return train, [seen[index] for index in sorted(sample)], [e for e in examples if e.concept in unseen]
