"""Which texts of an evaluation are rated, and what that costs.

What counts is rated (AxBench): the first half of a concept's instructions at all factors, which chooses the best, and
the second half at that one and at the fixed one. HyperSteer's other texts have no rating.

Letters: C concepts, I instructions of a concept, F factors.
"""

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from jaxtyping import Int

from hypersteer_jax.config import EvaluateConfig
from hypersteer_jax.evaluation.cache import Cache
from hypersteer_jax.evaluation.cases import HYPERSTEER, METHODS, Case, all_factors
from hypersteer_jax.evaluation.judges import QUESTIONS, Ask, Item, Judge, Judgement, make_plan, run_judge
from hypersteer_jax.evaluation.scores import choose_factors, choosing

Items = Mapping[str, Sequence[Item]]  # of a table as `evaluate.write_part` makes it, by method
Rows = dict[str, list[int]]  # of such a table
UNRATED = Judgement(None, None, None)
WORD = "word "  # of a text that is not written yet: about a token, and long enough not to promise too little


def rate(
    items: Items, judge: Judge, cache: Cache, config: EvaluateConfig, say: Callable[[str], None]
) -> dict[str, list[Judgement]]:
    """Judgements of all rows, by method; those that do not count are `UNRATED`."""
    judgements = {method: [UNRATED] * len(each) for method, each in items.items()}

    def ask(rows: Rows) -> None:
        found = iter(run_judge(judge, pick(items, rows), cache, config.judge.retry_failures, say))
        for method, places in rows.items():
            for place in places:
                judgements[method][place] = next(found)

    ask(choosing_rows(items, config))
    ask(scoring_rows(best_factors(judgements[HYPERSTEER], config), config))
    return judgements


def pick(items: Items, rows: Rows) -> list[Item]:
    """Those items, method by method."""
    return [items[method][place] for method, places in rows.items() for place in places]


def choosing_rows(items: Items, config: EvaluateConfig) -> Rows:
    """What is rated first: HyperSteer at all factors on the instructions that choose one, and all other methods."""
    rows = {method: list(range(len(each))) for method, each in items.items()}
    half = choosing(config.per_concept)
    return rows | {HYPERSTEER: _places(len(items[HYPERSTEER]), config)[:, :half].ravel().tolist()}


def scoring_rows(best: Int[np.ndarray, " C"], config: EvaluateConfig) -> Rows:
    """What is rated then: HyperSteer on the other instructions, at its best and the fixed factor only (AxBench).

    At AxBench's numbers that is 10 texts of a concept instead of 70.

    Args:
        best: index of each concept's factor.
        config: of the evaluation.
    """
    factors, half = all_factors(config), choosing(config.per_concept)
    rows = _places(len(best) * config.per_concept * len(factors), config)[:, half:]
    fixed = rows[..., factors.index(config.fixed_factor)]
    return {HYPERSTEER: np.union1d(fixed, rows[np.arange(len(best)), :, best]).tolist()}


def best_factors(judgements: Sequence[Judgement], config: EvaluateConfig) -> Int[np.ndarray, " C"]:
    """Index of each concept's factor, by the ratings of HyperSteer's rows."""
    score = np.array([judgement.score for judgement in judgements], float)
    return choose_factors(score[_places(len(score), config)]).factor


def _places(count: int, config: EvaluateConfig) -> Int[np.ndarray, "C I F"]:
    """Row of each concept, instruction and factor, in a table of so many rows."""
    return np.arange(count).reshape(-1, config.per_concept, len(all_factors(config)))


def open_asks(parts: Sequence[Items], judge: Judge, cache: Cache, config: EvaluateConfig) -> list[Ask]:
    """What is still to be asked of parts; while their factors are not chosen, as if the longest texts had won."""
    items = {method: [item for part in parts for item in part[method]] for method in METHODS}
    steered, first = items[HYPERSTEER], pick(items, choosing_rows(items, config))
    plan = make_plan(judge, first, cache, config.judge.retry_failures)
    if plan.asks:
        length = np.array([len(item.text) for item in steered])[_places(len(steered), config)]
        best = np.argmax(length[:, choosing(config.per_concept) :].sum(axis=1), axis=1)
    else:
        judged = dict(zip(first, plan.judgements(), strict=True))
        best = best_factors([judged.get(item, UNRATED) for item in steered], config)
    rest = make_plan(judge, pick(items, scoring_rows(best, config)), cache, config.judge.retry_failures)
    return list((plan.asks | rest.asks).values())


def expected_asks(cases: Sequence[Case], judge: Judge, config: EvaluateConfig) -> list[Ask]:
    """What will be asked of texts that are not written yet, taken to be as long as they may."""
    text, half = WORD * config.max_new, choosing(config.per_concept)
    factors, twice = len(all_factors(config)), min(2, len(all_factors(config)))
    asks: list[Ask] = []
    for case in cases:
        for number, instruction in enumerate(case.instructions):
            item = Item(case.concept, instruction, text)
            once = [Ask(question, item, judge.prompt(question, item)) for question in QUESTIONS]
            asks += once * (len(METHODS) - 1 + (factors if number < half else twice))
    return asks
