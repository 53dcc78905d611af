"""AxBench's steering protocol in short, on the tiny world, for a run of minutes: trials, texts, ratings, scores.

Every concept meets a few instructions. Half of them choose the factor, the other half score it (AxBench).
Always beside HyperSteer: the unsteered base LM, prompting (the steering prompt put into the instruction, no steering),
and the wrong-prompt control (HyperSteer given another concept's steering prompt), which shows what a vector does that
knows nothing of the concept.
"""

import random
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Float, Int

from hypersteer_jax.data.tinyworld.judge import Judgement, judge, load_bounds
from hypersteer_jax.data.tinyworld.world import (
    Concept,
    Kind,
    Subject,
    concepts,
    instruction,
    load_world,
    prompted,
    scoring_subjects,
    steering_prompt,
)
from hypersteer_jax.decoding import Decoding
from hypersteer_jax.evaluation.scores import Score, interval
from hypersteer_jax.generation import Request, Steered, complete

Group = Literal["held-in", "unseen topics", "unseen pairs", "unseen phrasings"]
KINDS: tuple[Kind, ...] = ("topic", "manner", "pair")
GROUPS: tuple[Group, ...] = ("held-in", "unseen topics", "unseen pairs", "unseen phrasings")
UNSTEERED, PROMPTING, WRONG_PROMPT = "unsteered", "prompting", "wrong prompt"
HYPERSTEER_CHOSEN, HYPERSTEER_ONE = "HyperSteer, chosen factor", "HyperSteer, factor 1"
FACTORS = (0.75, 1.0, 1.25, 1.5, 2.0)
DECODING = Decoding(max_new=48, temperature=1.0)  # AxBench's temperature; answers have at most 40 tokens


class Trial(NamedTuple):
    """One concept meeting one instruction."""

    group: Group
    concept: Concept
    subject: Subject
    steering_prompt: str
    wrong_prompt: str  # of a training concept of the same kind that shares nothing with this one
    prompt: str
    prompting: str  # the instruction with the steering prompt in it
    seed: int


def make_trials(per_group: int, instructions: int, seed: int = 0) -> list[Trial]:
    """`per_group` concepts of each group, each with `instructions` instructions about subjects it was not trained on.

    "held-in" and "unseen phrasings" are mixtures of topics, manners and pairs of the training set, half of them topics.
    """
    world, rng = load_world(), random.Random(seed)
    kinds = {kind: concepts(world, kind, "train") for kind in KINDS}

    def sample(pool: list[Concept]) -> list[Concept]:
        return rng.sample(pool, min(per_group, len(pool)))

    chosen: dict[Group, list[Concept]] = {
        "held-in": mixture(kinds, per_group, rng),
        "unseen topics": sample(concepts(world, "topic", "held_out")),
        "unseen pairs": sample(concepts(world, "pair", "held_out")),
        "unseen phrasings": mixture(kinds, per_group, rng),
    }
    trials: list[Trial] = []
    for group, members in chosen.items():
        phrasings: Literal["held_out", "known"] = "held_out" if group == "unseen phrasings" else "known"
        for concept in members:
            other = rng.choice(unrelated(concept, kinds[concept.kind]))
            text, wrong = (steering_prompt(c, rng, phrasings) for c in (concept, other))
            subjects = scoring_subjects(world, concept)
            for subject in rng.sample(subjects, min(instructions, len(subjects))):
                prompt = instruction(subject, rng)
                asked = prompted(prompt, text, rng)
                trials.append(Trial(group, concept, subject, text, wrong, prompt, asked, len(trials)))
    return trials


def mixture(pools: dict[Kind, list[Concept]], count: int, rng: random.Random) -> list[Concept]:
    """`count` concepts, or all there are: half of them topics, an eighth manners, the rest pairs, as in training."""
    counts: dict[Kind, int] = {"topic": count // 2, "manner": count // 8}
    counts["pair"] = count - sum(counts.values())
    return [c for kind, n in counts.items() for c in rng.sample(pools[kind], min(n, len(pools[kind])))]


def unrelated(concept: Concept, pool: list[Concept]) -> list[Concept]:
    """Those of the pool that share neither topic nor manner with the concept."""
    return [other for other in pool if not set(other) & set(concept) - {None}]


class Results(NamedTuple):
    """Texts and ratings of every trial under every condition; a factor's condition is named "factor 0.5" and so on."""

    trials: list[Trial]
    texts: dict[str, list[str]]
    judgements: dict[str, list[Judgement]]


def factor_name(factor: float) -> str:
    """Name of the condition "HyperSteer at this factor"."""
    return f"factor {factor:g}"


def run_trials(
    model: Steered,
    trials: list[Trial],
    factors: Sequence[float] = FACTORS,
    decoding: Decoding = DECODING,
    report: Callable[[str], None] | None = None,
) -> Results:
    """Generates and judges everything. The wrong-prompt control runs at factor 1."""
    requests = {
        UNSTEERED: [Request(t.prompt, seed=t.seed) for t in trials],
        PROMPTING: [Request(t.prompting, seed=t.seed) for t in trials],
        WRONG_PROMPT: [Request(t.prompt, t.wrong_prompt, 1.0, t.seed) for t in trials],
    }
    for factor in factors:
        requests[factor_name(factor)] = [Request(t.prompt, t.steering_prompt, factor, t.seed) for t in trials]
    bounds, cases = load_bounds(), [(t.concept, t.subject) for t in trials]
    texts, judgements = {}, {}
    for name, rows in requests.items():
        if report is not None:
            report(name)
        texts[name] = complete(model, rows, decoding)
        judgements[name] = judge(model.lm, model.prompter, bounds, cases, texts[name])
    return Results(trials, texts, judgements)


def summarise(results: Results, factors: Sequence[float] = FACTORS, seed: int = 0) -> dict[Group, dict[str, Score]]:
    """Scores by group and method, all on the scoring half of the instructions."""
    summary: dict[Group, dict[str, Score]] = {}
    for group in GROUPS:
        rows = [index for index, trial in enumerate(results.trials) if trial.group == group]
        if not rows:
            continue
        concept, scoring = _halves(results.trials, rows)
        means = {name: _concept_means(judged, rows, concept, scoring) for name, judged in results.judgements.items()}
        # One factor for the group, where AxBench takes one per concept: two instructions are too few to choose by, and
        # most of a concept's factors would tie at 0. max takes the first of equals, the smallest factor, as there.
        names = [factor_name(factor) for factor in sorted(factors)]
        choose = {name: _concept_means(results.judgements[name], rows, concept, ~scoring).mean() for name in names}
        methods = {name: means[name] for name in (UNSTEERED, WRONG_PROMPT, PROMPTING)}
        methods |= {HYPERSTEER_CHOSEN: means[max(choose, key=lambda name: choose[name])]}
        methods |= {HYPERSTEER_ONE: means[factor_name(1.0)]}
        summary[group] = {name: interval(values, seed) for name, values in methods.items()}
    return summary


def _concept_means(
    judged: list[Judgement], rows: list[int], concept: Int[np.ndarray, " R"], half: np.ndarray
) -> Float[np.ndarray, " concepts"]:
    """Mean score of each concept over the rows of one half."""
    scores = np.array([judged[row].score for row in rows])
    return np.bincount(concept[half], scores[half]) / np.bincount(concept[half])


def _halves(trials: list[Trial], rows: list[int]) -> tuple[Int[np.ndarray, " R"], np.ndarray]:
    """Number of each row's concept, and whether the row scores (every second instruction of a concept) or selects."""
    keys = [(trials[row].concept.key, trials[row].steering_prompt) for row in rows]
    number = {key: index for index, key in enumerate(dict.fromkeys(keys))}
    seen: dict[tuple[str, str], int] = {}
    scoring = []
    for key in keys:
        seen[key] = seen.get(key, 0) + 1
        scoring.append(seen[key] % 2 == 0)
    return np.array([number[key] for key in keys]), np.array(scoring)
