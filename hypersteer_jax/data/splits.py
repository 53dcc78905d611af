"""What is trained on, what is held out, and whether one leaks into the other."""

import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from hypersteer_jax.data.batch import DataError, SteeringExample
from hypersteer_jax.data.concepts import Concept, normalised

TRAIN, HELD_IN, HELD_OUT = "train", "held-in", "held-out"  # held-in: rows not trained on, of concepts that are
HELD_IN_ROWS = 128  # rows of the held-in sample at most, and never more than a tenth of the training rows
SHOWN = 3  # of the concepts or rows that leak, in a message

Splits = dict[str, list[SteeringExample]]


def split_concepts(examples: list[SteeringExample], held_out: int, seed: int) -> Splits:
    """Splits by concept, a pure function of its arguments.

    All rows of `held_out` concepts, drawn by `seed`, are held out: none of them is ever trained on. Concepts whose
    names differ in letter case, punctuation or spacing only are one. Held in is a small sample of rows of the other
    concepts, taken out of train; every concept keeps at least one row there.

    Raises:
        DataError: fewer than `held_out` + 1 concepts.
    """
    concepts = list(dict.fromkeys(normalised(example.concept) for example in examples))
    if not 0 <= held_out < len(concepts):
        raise DataError(
            f"data.held_out_concepts is {held_out}, but the data has {len(concepts)} concepts; "
            f"give 0 to {len(concepts) - 1}"
        )
    draw = random.Random(seed)
    unseen = set(draw.sample(concepts, held_out))
    seen = [example for example in examples if normalised(example.concept) not in unseen]
    sample = sample_held_in(seen, HELD_IN_ROWS, draw)
    return {
        TRAIN: [example for index, example in enumerate(seen) if index not in sample],
        HELD_IN: [seen[index] for index in sorted(sample)],
        HELD_OUT: [example for example in examples if normalised(example.concept) in unseen],
    }


def sample_held_in(seen: Sequence[SteeringExample], limit: int, draw: random.Random) -> set[int]:
    """Indices of at most `limit` rows and a tenth: no concept's only row, and none that is there twice."""
    left = Counter(example.concept for example in seen)
    twins = Counter(map(row_key, seen))
    sample: set[int] = set()
    for index in draw.sample(range(len(seen)), len(seen)):
        if len(sample) >= min(limit, len(seen) // 10):
            break
        if left[seen[index].concept] > 1 and twins[row_key(seen[index])] == 1:
            left[seen[index].concept] -= 1
            sample.add(index)
    return sample


def find_listed(
    examples: Sequence[SteeringExample], concept_ids: Sequence[int | None], listed: Sequence[Concept]
) -> list[bool]:
    """Whether each row is of a listed concept, or shares its name or SAE feature with one that is.

    A listed concept is met by its feature or its name; by its `concept_id` only where it has neither. Concepts that the
    rows do not have are ignored.

    Args:
        examples: the rows.
        concept_ids: of each row in its data set, None where it has none.
        listed: concepts to find.
    """
    ids = {concept.concept_id for concept in listed if not concept.text and not concept.feature} - {None}
    names = {normalised(concept.text) for concept in listed if concept.text}
    features = {concept.feature for concept in listed if concept.feature}
    present = {(normalised(e.concept), e.feature, i) for e, i in zip(examples, concept_ids, strict=True)}
    found: set[tuple[str, str, int | None]] = set()
    while more := {c for c in present - found if c[0] in names or c[1] in features or c[2] in ids}:
        found |= more  # a feature may have a second name, which another feature has, and so on
        names |= {name for name, _, _ in more}
        features |= {feature for _, feature, _ in more if feature}
    return [normalised(example.concept) in names for example in examples]


class Leak(NamedTuple):
    """What training shares with an evaluation split, and must not."""

    split: str  # of evaluation
    kind: str
    found: list[str]  # each once

    def __str__(self) -> str:
        """One line."""
        shown = "; ".join(map(repr, self.found[:SHOWN])) + ("; ..." if len(self.found) > SHOWN else "")
        return f"{TRAIN} and {self.split} share {len(self.found)} {self.kind}{'s' * (len(self.found) > 1)}: {shown}"


def leaks(splits: Mapping[str, Sequence[SteeringExample]]) -> list[Leak]:
    """What is both in training and in an evaluation split. Held-in rows may share concepts with training, but no rows.

    Steering prompts are compared without letter case, punctuation and spacing, rows without spacing. The same answer to
    the same prompt under two steering prompts is no leak: short answers to sums do that.
    """
    kinds: dict[str, tuple[Callable[[SteeringExample], Any], Callable[[SteeringExample], str]]] = {
        "steering prompt": (lambda e: normalised(e.steering_prompt), lambda e: e.steering_prompt),
        "SAE feature": (lambda e: e.feature, lambda e: e.feature),
        "row": (row_key, lambda e: f"{e.steering_prompt} / {e.prompt[:60]}"),
    }
    found = []
    for kind, (key, show) in kinds.items():
        trained = {key(example) for example in splits[TRAIN]} - {""}
        for split, rows in splits.items():
            if split == TRAIN or (split == HELD_IN and kind != "row"):
                continue
            if shared := {key(example): show(example) for example in rows if key(example) in trained}:
                found.append(Leak(split, kind, list(shared.values())))
    return found


def row_key(example: SteeringExample) -> tuple[str, str, str]:
    """Steering prompt, prompt and response, which are equal where two rows count as the same."""
    prompt, response = (" ".join(text.split()) for text in (example.prompt, example.response))
    return normalised(example.steering_prompt), prompt, response


def refuse_leaks(splits: Mapping[str, Sequence[SteeringExample]], source: str) -> None:
    """Stops a run whose held-out scores would mean nothing.

    Raises:
        DataError: something leaks; names what and between which splits.
    """
    if found := leaks(splits):
        lines = "\n".join(f"  {leak}" for leak in found)
        raise DataError(f"{source}: evaluation data leaks into training; keep it in one of the splits only\n{lines}")
