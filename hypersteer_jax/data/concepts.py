"""Concepts by name, by SAE feature, or by id: lists of them, and when two names say the same.

A feature is written as in the address of its page on Neuronpedia: "gemma-2-2b/20-gemmascope-res-16k/14877".
"""

import functools
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from hypersteer_jax.data.batch import DataError

NEURONPEDIA = "https://www.neuronpedia.org/"
LISTS = ("ho500", "ablations10")  # that come with the package, see axbench/README.md


class Concept(NamedTuple):
    """A concept; at least one of the three is known."""

    text: str = ""  # its name, the steering prompt
    feature: str = ""  # of the SAE
    concept_id: int | None = None  # its number in one data set; in another it means nothing


@functools.lru_cache(maxsize=2**16)  # a data set has many rows of few names
def normalised(text: str) -> str:
    """What is left of a name when letter case, punctuation and spacing do not count."""
    return " ".join(re.findall(r"\w+", text.casefold())) or text.strip()


def feature_of(address: str) -> str:
    """The feature of a page on Neuronpedia; a feature stays as it is."""
    return address.strip().removeprefix(NEURONPEDIA).strip("/")


def load_list(name: str) -> list[Concept]:
    """A list that comes with the package, by its name (`LISTS`), or one of the user's, by its path.

    Raises:
        DataError: there is no such list, or `read_concepts` does not understand it.
    """
    shipped = Path(__file__).parent / "axbench" / f"{name}.jsonl"
    if name in LISTS:
        return read_concepts(shipped)
    if not Path(name).is_file():
        raise DataError(f"{name}: neither a file nor one of {', '.join(LISTS)}; give a list of concepts")
    return read_concepts(Path(name))


def read_concepts(path: Path) -> list[Concept]:
    """Concepts of a list, in order, each once. Names lose the whitespace around them and inside it is one space.

    Three forms are known:

    - `.jsonl`, as AxBench's metadata.jsonl: one object per line with `concept` (name), `ref` or `feature` (SAE feature,
      or its page) and `concept_id`, at least one of them;
    - `.json`, as Neuronpedia exports explanations (GemmaScope): objects with `modelId`, `layer`, `index`,
      `description`. Of several descriptions of a feature the first is taken, as all 500 names of Concept500 were;
    - `.json`, a list of concept ids.

    Raises:
        DataError: no such file, another form, or a line that names no concept.
    """
    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".jsonl":
            lines = [(number, line) for number, line in enumerate(text.splitlines(), start=1) if line.strip()]
            return _each_once(_from_line(json.loads(line), f"{path}, line {number}") for number, line in lines)
        values = json.loads(text)
    except (OSError, ValueError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{path}: cannot be read as a list of concepts ({error}); give JSON or JSON lines") from error
    if not isinstance(values, list) or not values:
        raise DataError(f"{path}: not a list with entries; give Neuronpedia's explanations or a list of concept ids")
    if all(isinstance(value, int) for value in values):
        return _each_once(Concept(concept_id=value) for value in values)
    return _first_descriptions(values, path)


def _from_line(cells: Any, where: str) -> Concept:
    if not isinstance(cells, dict):
        raise DataError(f"{where}: not a JSON object; write one with concept, feature or concept_id")
    text, feature, concept_id = cells.get("concept"), cells.get("feature", cells.get("ref")), cells.get("concept_id")
    for name, value, kind in (("concept", text, str), ("feature", feature, str), ("concept_id", concept_id, int)):
        if value is not None and not isinstance(value, kind):
            raise DataError(f"{where}, key {name}: {value!r} is not of type {kind.__name__}")
    concept = Concept(_one_line(text or ""), feature_of(feature or ""), concept_id)
    if concept == Concept():
        raise DataError(f"{where}: names no concept; give concept, feature or concept_id")
    return concept


def _first_descriptions(entries: list[Any], path: Path) -> list[Concept]:
    """A concept for each feature, in the order of the list."""
    keys = ("modelId", "layer", "index", "description")
    first: dict[str, str] = {}
    for number, entry in enumerate(entries):
        missing = [key for key in keys if key not in entry] if isinstance(entry, dict) else list(keys)
        if missing:
            raise DataError(
                f"{path}, entry {number} (counted from 0): no {', '.join(missing)}; give a Neuronpedia export"
            )
        feature = f"{entry['modelId']}/{entry['layer']}/{entry['index']}"
        if text := _one_line(entry["description"]):
            first.setdefault(feature, text)
    return [Concept(text, feature) for feature, text in first.items()]


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _each_once(concepts: Iterable[Concept]) -> list[Concept]:
    return list(dict.fromkeys(concepts))
