"""Files of examples, checked cell by cell."""

import difflib
import json
import math
from collections import Counter
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar, get_args

import pyarrow
import pyarrow.parquet

from hypersteer_jax.data.batch import DataError, SteeringExample
from hypersteer_jax.data.concepts import feature_of

AXBENCH_COLUMNS = ("input", "output", "output_concept", "category")
AXBENCH_EXTRA_COLUMNS = ("concept_id", "concept_genre", "sae_link")  # read where they are
AXBENCH_CATEGORIES = ("positive", "negative", "hard negative")
Genre = Literal["text", "code", "math"]
GENRES: tuple[Genre, ...] = get_args(Genre)
NO_CONCEPT = "EEEEE"  # AxBench's name for "no concept", on negatives
SHOWN = 5  # bad rows in an error message; the rest are counted


def read(path: Path, skip_bad_rows: bool = False) -> tuple[list[SteeringExample], list[str]]:
    """Examples of a .parquet (AxBench train_data) or .jsonl file; see `read_axbench` and `read_jsonl`."""
    readers = {".parquet": read_axbench, ".jsonl": read_jsonl}
    if path.suffix not in readers:
        raise DataError(
            f"{path}: the name ends in {path.suffix!r}; give a .parquet (AxBench train_data) or .jsonl file"
        )
    return readers[path.suffix](path, skip_bad_rows)


class AxbenchRow(NamedTuple):
    """A positive row of an AxBench file."""

    example: SteeringExample
    concept_id: int | None  # the concept's number in this data set
    genre: str  # "text", "code" or "math"; empty if the file does not tell


def read_axbench(path: Path, skip_bad_rows: bool = False) -> tuple[list[SteeringExample], list[str]]:
    """Examples of the rows that `read_axbench_rows` gives."""
    rows, problems = read_axbench_rows(path, skip_bad_rows)
    return [row.example for row in rows], problems


def read_axbench_rows(path: Path, skip_bad_rows: bool = False) -> tuple[list[AxbenchRow], list[str]]:
    """Positive rows of an AxBench parquet file.

    Columns `input` (instruction), `output` (response), `output_concept` (steering prompt) and `category` are needed;
    `concept_id`, `concept_genre` and `sae_link` are read where they are, others are ignored. Negatives and rows without
    a concept ("EEEEE") are left out, as in the release. The concept is its text, not `concept_id`: AxBench has equal
    texts under two ids, and a held-out text must not be trained on.

    Returns:
        The rows, and one line for each bad row left out (always empty without `skip_bad_rows`).

    Raises:
        DataError: no such file, not parquet, a missing column, a bad row (unless skipped), or no usable row.
    """
    columns = _columns(path, AXBENCH_COLUMNS, AXBENCH_EXTRA_COLUMNS)
    rows, problems = [], []
    for index, values in enumerate(zip(*columns.values(), strict=True)):
        cells: dict[str, Any] = dict(zip(columns, values, strict=True))
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
                concept, feature = cells["output_concept"], feature_of(cells.get("sae_link") or "")
                example = SteeringExample(concept, cells["input"], cells["output"], concept, feature=feature)
                rows.append(AxbenchRow(example, cells.get("concept_id"), cells.get("concept_genre") or ""))
    return _checked(path, rows, problems, skip_bad_rows, f"it has {len(columns['category'])} rows, none positive")


def read_categories(path: Path) -> Counter[str]:
    """How many rows of each category an AxBench parquet file has.

    Raises:
        DataError: no such file, not parquet, or without the columns of AxBench.
    """
    return Counter(_columns(path, ("category",))["category"])


def read_instructions(path: Path) -> list[tuple[Genre, str]]:
    """Genre and instruction of every row: a .jsonl file with `genre` and `instruction`, or a parquet file of AxBench.

    Raises:
        DataError: no such file, another form, no text, or a genre that is none of `GENRES`.
    """
    if path.suffix == ".parquet":
        columns = _columns(path, ("concept_genre", "input"))
        found = list(zip(columns["concept_genre"], columns["input"], strict=True))
    else:
        _check_exists(path)
        try:
            lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
            found = [(line["genre"], line["instruction"]) for line in lines]
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f'{path}: {error!r}; write {{"genre": ..., "instruction": ...}} on each line') from error
    for number, (genre, instruction) in enumerate(found):
        if genre not in GENRES or not isinstance(instruction, str) or not instruction.strip():
            raise DataError(
                f"{path}, row {number} (counted from 0): genre {_shown(genre)}, instruction {_shown(instruction)}; "
                f"give text, and one of {', '.join(GENRES)}"
            )
    return found


def _columns(path: Path, needed: tuple[str, ...], extra: tuple[str, ...] = ()) -> dict[str, list[Any]]:
    """Columns of an AxBench parquet file: all that are needed, and those of `extra` that are there."""
    _check_exists(path)
    try:
        schema = pyarrow.parquet.read_schema(path)
        missing = [name for name in needed if name not in schema.names]
        if missing:
            raise DataError(
                f"{path}: no column {', '.join(missing)}; the file has {', '.join(schema.names)}; "
                f"AxBench train_data has {', '.join(AXBENCH_COLUMNS)}"
            )
        names = [*needed, *(name for name in extra if name in schema.names)]
        return pyarrow.parquet.read_table(path, columns=names).to_pydict()
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path}: cannot be read as parquet ({error}); give AxBench's train_data.parquet") from error


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


Read = TypeVar("Read")


def _checked(
    path: Path, found: list[Read], problems: list[str], skip_bad_rows: bool, empty: str
) -> tuple[list[Read], list[str]]:
    """Both lists, or DataError if there are bad rows that may not be skipped or nothing is left."""
    if problems and not (skip_bad_rows and found):
        fix = "no good row is left" if skip_bad_rows else "mend them or set data.skip_bad_rows"
        more = [f"... and {len(problems) - SHOWN} more"] if len(problems) > SHOWN else []
        raise DataError(
            "\n".join([f"{path}: {len(problems)} bad row{'s' * (len(problems) > 1)}; {fix}", *problems[:SHOWN], *more])
        )
    if not found:
        raise DataError(f"{path}: no rows to train on; {empty}")
    return found, problems
