"""Which concepts meet which instructions, and what every method is given.

AxBench draws the instructions of concept number n with pandas, `DataFrame.sample(10, random_state=n)` (`dataset.py`);
`draw` draws the same ones. On the tiny world each concept has a pool of its own: the subjects it was not trained on.
"""

import json
import random
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import NamedTuple

import numpy as np

from hypersteer_jax.config import ConfigError, EvaluateConfig, RunConfig
from hypersteer_jax.data import concepts as lists
from hypersteer_jax.data.batch import DataError
from hypersteer_jax.data.concepts import load_list, normalised
from hypersteer_jax.data.sources import TINYWORLD
from hypersteer_jax.data.splits import HELD_IN, HELD_OUT
from hypersteer_jax.data.tinyworld.world import (
    INSTRUCTIONS,
    Concept,
    load_world,
    prompted,
    scoring_subjects,
    steering_concepts,
    steering_prompt,
)
from hypersteer_jax.evaluation.judges import read_table
from hypersteer_jax.evaluation.protocol import mixture, unrelated

HYPERSTEER, PROMPTING, UNSTEERED = "HyperSteer", "PromptSteering", "Unsteered"  # AxBench's names where it has them
WRONG_PROMPT, SHUFFLED_PROMPT = "WrongPrompt", "ShuffledPrompt"
METHODS = (UNSTEERED, WRONG_PROMPT, SHUFFLED_PROMPT, PROMPTING, HYPERSTEER)
FINE = tuple(round(0.7 + 0.05 * step, 2) for step in range(17))
TINYWORLD_CONCEPTS = 200  # of each group, if `concepts` does not say
# AxBench has gpt-4o-mini write a prompt for each concept, which `prompting` takes from a file of AxBench's; this fixed
# one is like its simple form, which needs no model.
PROMPTED = "Work the following into your answer, in content or in manner: {concept}\n\n{instruction}"


class Case(NamedTuple):
    """One concept and the instructions it meets."""

    concept_id: int  # its number in its group, which draws the instructions
    concept: str  # the steering prompt
    wrong: str  # steering prompt of another concept
    shuffled: str  # the words of `concept` in another order
    instructions: list[str]
    prompting: list[str]  # the instructions with the steering prompt in them


Cases = dict[str, list[Case]]  # by group, "held-in" and "held-out"


def make_cases(config: EvaluateConfig, run: RunConfig) -> Cases:
    """The cases of an evaluation, a pure function of its arguments and of the files that they name.

    Raises:
        ConfigError, DataError: a list or the instructions cannot be used; names what to change.
    """
    listed = {HELD_IN: config.held_in, HELD_OUT: config.held_out}
    if any(listed.values()):
        pool = read_instructions(config.instructions)
        prompts = None if config.prompting is None else read_prompting(config.prompting)
        named = {group: _named(name, config.concepts) for group, name in listed.items() if name is not None}
        _refuse_shared(named)
        return {group: _listed_cases(each, pool, prompts, config) for group, each in named.items()}
    files = {"instructions": config.instructions, "prompting": config.prompting}
    given = [f"{name} is {path}" for name, path in files.items() if path is not None]
    if run.data.source != TINYWORLD or given:
        what = given[0] if given else f"it learned {run.data.source}"
        raise ConfigError(
            f"neither held_in nor held_out is given, and {what}; give lists of concepts (only a run on the tiny world "
            "has concepts and instructions of its own)"
        )
    return _tinyworld_cases(config, run)


def all_factors(config: EvaluateConfig) -> list[float]:
    """The factors, ascending."""
    return sorted({*config.factors, *(FINE if config.fine else ())})


def draw(size: int, count: int, seed: int) -> list[int]:
    """Rows that pandas' `DataFrame.sample(count, random_state=seed)` takes from a table of `size` rows, in its order.

    numpy has promised never to change `RandomState`.
    """
    return np.random.RandomState(seed).choice(size, count, replace=False).tolist()


def read_instructions(path: Path | None) -> list[str]:
    """Instructions in the order of a file; without one, those that come with the package.

    Args:
        path: a JSON list of objects with `instruction`, as AlpacaEval's `alpaca_eval.json`, or one such object a line.

    Raises:
        DataError: no such file, another form, or an entry without text.
    """
    try:
        source = path or resources.files(__package__).joinpath("instructions.jsonl")
        text = source.read_text(encoding="utf-8")
        rows = json.loads(text) if text.lstrip().startswith("[") else [json.loads(t) for t in text.split("\n") if t]
        found = [row["instruction"] for row in rows]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f'instructions {path} cannot be read ({error!r}); write a JSON list, or lines, of {{"instruction": ...}}'
        ) from error
    for number, instruction in enumerate(found):
        if not isinstance(instruction, str) or not instruction.strip():
            raise DataError(f"instructions {path}, entry {number} (counted from 0): {instruction!r}; give text")
    return found


def read_prompting(path: Path) -> dict[tuple[str, str], str]:
    """What prompting gives the base LM in place of an instruction, by concept (see `normalised`) and instruction.

    Args:
        path: an AxBench `steering_data.parquet`; read are input_concept, original_prompt and steered_input.

    Raises:
        JudgeError: no such file, not parquet, or a column is missing.
    """
    names = ("input_concept", "original_prompt", "steered_input")
    columns = read_table(path, names)
    rows = zip(*(columns[name].to_pylist() for name in names), strict=True)
    return {(normalised(concept), instruction): text for concept, instruction, text in rows}


def shuffled(text: str, rng: random.Random) -> str:
    """The words of a text in another order; of a single word, its letters. Unchanged where there is no other order."""
    parts, glue = (text.split(), " ") if len(text.split()) > 1 else (list(text), "")
    if len(set(parts)) < 2:
        return text
    while (other := rng.sample(parts, len(parts))) == parts:
        pass
    return glue.join(other)


def _named(name: str, limit: int | None) -> dict[int, str]:
    """Names of a list's concepts by number: their concept_id, or their place in the list."""
    named: dict[int, str] = {}
    for place, concept in enumerate(load_list(name)[:limit]):
        number = place if concept.concept_id is None else concept.concept_id
        if not concept.text:
            raise DataError(f"{name}: {_shown(concept)} has no name, which is its steering prompt; give the text")
        if number < 0 or number in named:
            raise DataError(f"{name}: {_shown(concept)} has number {number}; give each its own, from 0")
        named[number] = concept.text
    if len({normalised(text) for text in named.values()}) < 2:
        raise DataError(f"{name} has {len(named)} concepts; the wrong-prompt control needs two of different names")
    return named


def _shown(concept: lists.Concept) -> str:
    return concept.text or concept.feature or str(concept.concept_id)


def _refuse_shared(named: dict[str, dict[int, str]]) -> None:
    groups = [{normalised(text): text for text in each.values()} for each in named.values()]
    if len(groups) == 2 and (shared := [text for key, text in groups[1].items() if key in groups[0]]):
        raise DataError(f"held_in and held_out share {len(shared)} concepts, such as {shared[0]!r}; list each once")


def _listed_cases(
    named: dict[int, str], pool: Sequence[str], prompts: dict[tuple[str, str], str] | None, config: EvaluateConfig
) -> list[Case]:
    rng, cases = random.Random(config.seed), []
    for number, concept in named.items():
        wrong = rng.choice([text for text in named.values() if normalised(text) != normalised(concept)])
        instructions = _drawn(pool, config.per_concept, number)
        if prompts is None:
            prompting = [PROMPTED.format(concept=concept, instruction=instruction) for instruction in instructions]
        else:
            keys = [(normalised(concept), instruction) for instruction in instructions]
            if missing := [
                instruction for key, instruction in zip(keys, instructions, strict=True) if key not in prompts
            ]:
                raise DataError(
                    f"prompting {config.prompting} has nothing for {concept!r} with {missing[0]!r}; give a file of the "
                    "same concepts and instructions"
                )
            prompting = [prompts[key] for key in keys]
        cases.append(Case(number, concept, wrong, shuffled(concept, rng), instructions, prompting))
    return cases


def _drawn(pool: Sequence[str], count: int, number: int) -> list[str]:
    if len(pool) < count:
        raise DataError(f"per_concept is {count}, and there are {len(pool)} instructions; give a smaller one, or more")
    return [pool[row] for row in draw(len(pool), count, number)]


def _tinyworld_cases(config: EvaluateConfig, run: RunConfig) -> Cases:
    """Concepts that the run was trained on, mixed as in training, and held-out ones, half of them topics if so many."""
    world, rng = load_world(), random.Random(config.seed)
    count = TINYWORLD_CONCEPTS if config.concepts is None else config.concepts
    trained = steering_concepts(run.train.seed, run.data.max_concepts, held_out=False)
    unseen = steering_concepts(run.train.seed, None, held_out=True)
    topics = rng.sample(unseen["topic"], min(count // 2, len(unseen["topic"])))
    pairs = rng.sample(unseen["pair"], min(count - len(topics), len(unseen["pair"])))
    chosen = {HELD_IN: mixture(trained, count, rng), HELD_OUT: topics + pairs}
    others = steering_concepts(run.train.seed, None, held_out=False)

    def case(number: int, concept: Concept) -> Case:
        wrong = rng.choice(unrelated(concept, others[concept.kind]))
        text, other = (steering_prompt(each, rng, "known") for each in (concept, wrong))
        pool = [frame.format(s.name) for s in scoring_subjects(world, concept) for frame in INSTRUCTIONS]
        instructions = _drawn(pool, config.per_concept, number)
        prompting = [prompted(instruction, text, rng) for instruction in instructions]
        return Case(number, text, other, shuffled(text, rng), instructions, prompting)

    return {group: [case(number, concept) for number, concept in enumerate(each)] for group, each in chosen.items()}
