"""What an evaluation's ratings amount to: scores with intervals, win rates, and the difference between two runs.

A concept's factor is chosen on the first half of its instructions; everything in `measure` is of the second half.
Ratings that failed or were not asked for are NaN and stay out of every mean. Intervals are bootstrapped over concepts.

Letters: C concepts, I instructions of a concept, F factors, R 4: score, concept, instruction, fluency.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int

from hypersteer_jax.config import ConfigError
from hypersteer_jax.data.concepts import normalised
from hypersteer_jax.data.splits import HELD_IN, HELD_OUT
from hypersteer_jax.evaluation.cases import HYPERSTEER, METHODS, PROMPTING, SHUFFLED_PROMPT, UNSTEERED, WRONG_PROMPT
from hypersteer_jax.evaluation.evaluate import DATA, RECORD
from hypersteer_jax.evaluation.judges import TEXT, Judgement, rating_columns, read_table
from hypersteer_jax.evaluation.scores import Score, choose_factors, choosing, interval, mean

TIE = 1e-6  # scores that differ by no more are equal (AxBench, `evaluate.py`)
CHOSEN = "HyperSteer, chosen factor"


class Ratings(NamedTuple):
    """What a method's texts got, NaN where they got none; a method without factors has the same at all of them."""

    rating: Float[np.ndarray, "R C I F"]
    perplexity: Float[np.ndarray, "C I F"]
    text: np.ndarray  # of str, C I F

    @property
    def score(self) -> Float[np.ndarray, "C I F"]:
        """Harmonic mean of the three ratings."""
        return self.rating[0]


class Group(NamedTuple):
    """One group of concepts, held-in or held-out."""

    concepts: list[str]  # steering prompts
    instructions: list[tuple[str, ...]]  # of each concept
    factors: list[float]  # ascending
    methods: dict[str, Ratings]
    judge: str
    rival: Float[np.ndarray, "C I"] | None = None  # stored scores of prompting, NaN where there is none; None: our own

    @property
    def selecting(self) -> slice:
        """Instructions that choose the factor."""
        return slice(choosing(len(self.instructions[0])))

    @property
    def scoring(self) -> slice:
        """Instructions that do not choose the factor."""
        return slice(choosing(len(self.instructions[0])), None)


class Evaluation(NamedTuple):
    """One evaluation as it lies on disk."""

    name: str
    record: dict[str, Any]  # evaluation.json
    groups: dict[str, Group]

    @property
    def fixed_factor(self) -> float:
        """The factor that is the same for all concepts."""
        return self.record["settings"]["fixed_factor"]


class Line(NamedTuple):
    """What one method comes to on the scoring half."""

    score: Score
    concept: float
    instruction: float
    fluency: float
    perplexity: float  # median over texts, under the unsteered base LM
    wins: Score | None  # against prompting, a tie being half a win; None for prompting itself, if it is our own
    ties: float | None  # share of texts


def read_evaluation(path: Path) -> Evaluation:
    """An evaluation, by its folder or by that of the run it is in.

    Raises:
        ConfigError: there is none, or it is not finished.
    """
    folder = path if (path / RECORD).exists() else path / "evaluation"
    if not (folder / RECORD).exists():
        raise ConfigError(f"{path}: no {RECORD} here or in evaluation/; give a folder that `hypersteer evaluate` made")
    record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    settings = record["settings"]
    tinyworld = settings["held_in"] is None and settings["held_out"] is None
    asked = [group for group, key in ((HELD_IN, "held_in"), (HELD_OUT, "held_out")) if tinyworld or settings[key]]
    files = {group: folder / group / "evaluate" / DATA for group in asked}
    missing = [group for group, file in files.items() if not file.exists()]
    if missing:
        raise ConfigError(f"{folder}: {' and '.join(missing)} not rated yet; run `hypersteer evaluate` to its end")
    return Evaluation(path.name, record, {group: read_group(file) for group, file in files.items()})


def read_group(path: Path, of: Sequence[str] = METHODS) -> Group:
    """The rated texts of a group, from a file such as `hypersteer evaluate` writes.

    Args:
        path: the file.
        of: methods.

    Raises:
        ConfigError: no such file, a column is missing, or a concept lacks an instruction at some factor.
    """
    places = ("concept_id", "input_id", "factor", "input_concept", "original_prompt")
    needed = [*places, *(name for m in of for name in (*rating_columns(m), f"{m}_perplexity", m + TEXT))]
    table = read_table(path, needed)
    table = table.sort_by([(name, "ascending") for name in ("concept_id", "input_id", "factor")])
    factors = sorted(set(table["factor"].to_pylist()))
    count = len(set(table["concept_id"].to_pylist()))
    if not table.num_rows or table.num_rows % (count * len(factors)):
        raise ConfigError(
            f"{path} has {table.num_rows} rows of {count} concepts and {len(factors)} factors; give a whole file"
        )
    shape = (count, -1, len(factors))
    prompts = np.array(table["original_prompt"].to_pylist(), object).reshape(shape)
    methods = {}
    for method in of:
        columns = zip(*(table[name].to_pylist() for name in rating_columns(method)), strict=True)
        rating = np.array([(judged.score, *judged) for judged in map(Judgement._make, columns)], float)
        methods[method] = Ratings(
            rating.T.reshape(4, *shape),
            np.array(table[f"{method}_perplexity"].to_pylist(), float).reshape(shape),
            np.array(table[method + TEXT].to_pylist(), object).reshape(shape),
        )
    concepts = np.array(table["input_concept"].to_pylist(), object).reshape(shape)[:, 0, 0].tolist()
    instructions = [tuple(row) for row in prompts[:, :, 0]]
    judge = (table.schema.metadata or {}).get(b"judge", b"unknown").decode()
    return Group(concepts, instructions, factors, methods, judge)


def chosen_factors(group: Group) -> Int[np.ndarray, " C"]:
    """Index of each concept's factor, chosen on the first half of its instructions."""
    return choose_factors(group.methods[HYPERSTEER].score).factor


def at(values: Float[np.ndarray, "... C I F"], factor: Int[np.ndarray, " C"]) -> Float[np.ndarray, "... C I"]:
    """Values at each concept's factor."""
    concepts, instructions = np.arange(len(factor))[:, None], np.arange(values.shape[-2])
    return values[..., concepts, instructions, factor[:, None]]


def measure(group: Group, fixed_factor: float) -> dict[str, Line]:
    """A line for each method; HyperSteer has two, at its chosen factors and at the fixed one."""
    count, half = len(group.concepts), group.scoring
    fixed = np.full(count, group.factors.index(fixed_factor))
    rows = {
        "unsteered": (UNSTEERED, fixed),
        f"wrong prompt, factor {fixed_factor:g}": (WRONG_PROMPT, fixed),
        f"shuffled prompt, factor {fixed_factor:g}": (SHUFFLED_PROMPT, fixed),
        "prompting": (PROMPTING, fixed),
        CHOSEN: (HYPERSTEER, chosen_factors(group)),
        f"HyperSteer, factor {fixed_factor:g}": (HYPERSTEER, fixed),
    }
    rival = (at(group.methods[PROMPTING].score, fixed) if group.rival is None else group.rival)[:, half]
    lines = {}
    for name, (method, factor) in rows.items():
        ratings = group.methods[method]
        values = at(ratings.rating, factor)[..., half]
        wins, ties = None, None
        if method != PROMPTING or group.rival is not None:
            won = win_or_tie(values[0], rival)
            wins, ties = interval(mean(won, axis=1)), float(mean(np.where(np.isnan(won), won, won == 0.5), axis=(0, 1)))
        concept, instruction, fluency = (float(mean(part, axis=(0, 1))) for part in values[1:])
        perplexity = at(ratings.perplexity, factor)[:, half]
        median = float(np.nanmedian(perplexity)) if np.isfinite(perplexity).any() else np.nan
        lines[name] = Line(interval(mean(values[0], axis=1)), concept, instruction, fluency, median, wins, ties)
    return lines


def win_or_tie(score: Float[np.ndarray, "C I"], rival: Float[np.ndarray, "C I"]) -> Float[np.ndarray, "C I"]:
    """1 where a text beats the rival's, 0.5 where they are equal, 0 where it loses; NaN where either has no score."""
    difference = score - rival
    won = np.where(np.abs(difference) <= TIE, 0.5, difference > 0)
    return np.where(np.isnan(difference), np.nan, won)


def scores_by_concept(group: Group, fixed_factor: float) -> dict[str, Float[np.ndarray, " C"]]:
    """Each concept's score on the scoring half: at its chosen factor, at the fixed one, and prompting's."""
    score, half = group.methods[HYPERSTEER].score, group.scoring
    fixed = group.factors.index(fixed_factor)
    return {
        CHOSEN: mean(at(score, chosen_factors(group))[:, half], axis=1),
        f"HyperSteer, factor {fixed_factor:g}": mean(score[:, half, fixed], axis=1),
        "prompting": mean(group.methods[PROMPTING].score[:, half, fixed], axis=1),
    }


def compare(one: Evaluation, other: Evaluation, group: str) -> dict[str, Score]:
    """By how much the second evaluation is ahead, concept by concept, over those that both asked the same of.

    A concept is the same if steering prompt and instructions are; what is fixed at different factors is not compared,
    nor is prompting, which no run changes.
    """
    sides = []
    for evaluation in (one, other):
        found = evaluation.groups[group]
        keys = list(zip(found.concepts, found.instructions, strict=True))
        scores = scores_by_concept(found, evaluation.fixed_factor)
        sides.append({name: dict(zip(keys, values, strict=True)) for name, values in scores.items()})
    first, second = sides
    differences = {}
    for name in [name for name in first if name in second and name != "prompting"]:
        shared = [key for key in first[name] if key in second[name]]
        differences[name] = interval(np.array([second[name][key] - first[name][key] for key in shared]))
    return differences


def failures(group: Group, fixed_factor: float) -> dict[str, tuple[int, int]]:
    """Failed ratings of each method, and how many were asked for (`rating.py`)."""
    shape = group.methods[HYPERSTEER].score.shape
    asked = {method: np.arange(shape[2]) == np.zeros(shape) for method in METHODS}  # the one text without factors
    asked[HYPERSTEER] = np.zeros(shape, bool)
    asked[HYPERSTEER][:, group.selecting] = True
    asked[HYPERSTEER][:, group.scoring, group.factors.index(fixed_factor)] = True
    asked[HYPERSTEER][np.arange(shape[0]), group.scoring, chosen_factors(group)] = True
    values = {method: group.methods[method].rating[1:, where] for method, where in asked.items()}
    return {method: (int(np.isnan(each).sum()), each.size) for method, each in values.items()}


def against_stored(evaluation: Evaluation, path: Path) -> Evaluation:
    """The evaluation with win rates against prompting as it was rated before, in AxBench's `evaluate/` or by us.

    Texts are matched by steering prompt and instruction. Where the file has several factors, prompting has its best
    one, too, chosen as ours is (AxBench).

    Raises:
        ConfigError: the file cannot be used, or it has nothing that was asked here.
    """
    stored = read_group(path, (PROMPTING,))
    score = stored.methods[PROMPTING].score
    best = at(score, choose_factors(score).factor)
    known = {
        (normalised(concept), instruction): value
        for concept, asked, values in zip(stored.concepts, stored.instructions, best, strict=True)
        for instruction, value in zip(asked, values, strict=True)
    }
    groups, found = {}, 0
    for name, group in evaluation.groups.items():
        pairs = zip(group.concepts, group.instructions, strict=True)
        rival = np.array([[known.get((normalised(c), each), np.nan) for each in asked] for c, asked in pairs], float)
        found += int(np.isfinite(rival[:, group.scoring]).sum())
        groups[name] = group._replace(rival=rival)
    if not found:
        example = f"{group.concepts[0]!r} with {group.instructions[0][-1]!r}"
        raise ConfigError(
            f"{path} has no rating of prompting for what {evaluation.name} was scored on, such as {example}; give "
            "ratings of the same concepts and instructions"
        )
    return evaluation._replace(groups=groups)
