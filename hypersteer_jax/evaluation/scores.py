"""From ratings to figures: the factor chosen on half of the instructions, rank correlation, intervals over concepts.

Missing scores (a judge failed) are NaN and stay out of every mean.

Letters: C concepts, I instructions of a concept, F factors, R rows.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

RESAMPLES = 2000  # of the bootstrap


class Score(NamedTuple):
    """Mean over concepts with a 95 % bootstrap interval over concepts; of no concept NaN."""

    mean: float
    low: float
    high: float
    concepts: int


def interval(values: Float[np.ndarray, " C"], seed: int = 0) -> Score:
    """Mean and 95 % percentile bootstrap interval, resampling concepts; those with NaN are left out."""
    values = values[~np.isnan(values)]
    if not len(values):
        return Score(np.nan, np.nan, np.nan, 0)
    draws = np.random.default_rng(seed).integers(0, len(values), (RESAMPLES, len(values)))
    low, high = np.percentile(values[draws].mean(axis=1), [2.5, 97.5])
    return Score(float(values.mean()), float(low), float(high), len(values))


class Chosen(NamedTuple):
    """What choosing each concept's factor on half of its instructions gives."""

    factor: Int[np.ndarray, " C"]  # index of the chosen factor
    selection: Float[np.ndarray, " C"]  # score where it was chosen: too high, since it was picked for it
    score: Float[np.ndarray, " C"]  # score on the other half


def choosing(instructions: int) -> int:
    """How many of a concept's instructions, the first ones, choose its factor; of an odd number the larger half."""
    return instructions - round(instructions * 0.5)


def choose_factors(scores: Float[np.ndarray, "C I F"]) -> Chosen:
    """AxBench's choice (`evaluate.py`): the first half of the instructions choose, ties go to the smallest factor.

    Args:
        scores: harmonic means, 0 to 2, factors in ascending order.
    """
    half = choosing(scores.shape[1])
    selection, scoring = mean(scores[:, :half], axis=1), mean(scores[:, half:], axis=1)
    factor = np.argmax(np.where(np.isnan(selection), -np.inf, selection), axis=1)
    rows = np.arange(len(scores))
    return Chosen(factor, selection[rows, factor], scoring[rows, factor])


def mean(values: Float[np.ndarray, "..."], axis: int | tuple[int, ...]) -> Float[np.ndarray, "..."]:
    """Mean of what is not NaN; NaN where nothing is left."""
    count = np.sum(~np.isnan(values), axis=axis)
    return np.where(count > 0, np.nansum(values, axis=axis) / np.maximum(count, 1), np.nan)


def spearman(x: Float[np.ndarray, " R"], y: Float[np.ndarray, " R"]) -> float:
    """Rank correlation, equal values sharing their mean rank; NaN if one side is constant."""
    ranks = [_ranks(values) for values in (x, y)]
    centred = [rank - rank.mean() for rank in ranks]
    size = np.sqrt((centred[0] @ centred[0]) * (centred[1] @ centred[1]))
    return float(centred[0] @ centred[1] / size) if size > 0 else float("nan")


def _ranks(values: Float[np.ndarray, " R"]) -> Float[np.ndarray, " R"]:
    _, number, count = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(count) - (count - 1) / 2)[number]


def clustered_interval(
    statistic: Callable[[Int[np.ndarray, " R"]], float], clusters: Int[np.ndarray, " R"], seed: int = 0
) -> tuple[float, float]:
    """95 % percentile bootstrap interval of a statistic of rows, resampling whole clusters (concepts).

    Args:
        statistic: gets the indices of the rows it is to use, some of them several times.
        clusters: which cluster each row belongs to.
        seed: of the resampling.
    """
    members = [np.flatnonzero(clusters == cluster) for cluster in np.unique(clusters)]
    draws = np.random.default_rng(seed).integers(0, len(members), (RESAMPLES, len(members)))
    values = [statistic(np.concatenate([members[cluster] for cluster in draw])) for draw in draws]
    low, high = np.nanpercentile(values, [2.5, 97.5])
    return float(low), float(high)
