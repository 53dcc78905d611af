"""How far judges that cost nothing agree with gpt-4o-mini: rank correlation per question.

    python experiments/calibration.py --texts axbench_llama31_8b_l20_lsreft_judged_texts.parquet \
        --scores axbench_llama31_8b_l20_judge_scores.parquet --lms tinyworld stories260K --cache runs/calibration.sqlite

The texts are 1,500 steered answers of Llama-3.1-8B (10 concepts × 10 instructions × 15 factors; AxBench's run
`lsreft_addition`) with gpt-4o-mini's three ratings. They answer AlpacaEval's instructions (CC BY-NC): research use.
The judges' ratings are kept in `--cache`, so a stopped run goes on. About 10 minutes on 2 cores.
Expected: nothing of small LMs, which follow no instructions; what matters is that the table says so.
What came out: experiments/results/calibration.md, which this script writes.
"""

import argparse
import re
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow.parquet as pq
from jaxtyping import Float, Int

from hypersteer_jax.data.sources import load_base
from hypersteer_jax.evaluation.cache import Cache, Rating
from hypersteer_jax.evaluation.judges import QUESTIONS, Ask, Item, Judge, load_rubric, plain_prompt, run_judge
from hypersteer_jax.evaluation.lm_judges import local_judge, proxy_judge
from hypersteer_jax.evaluation.scores import clustered_interval, mean, spearman

RUN = "lsreft_addition"
FRAME = "This neuron refers to concepts about "  # before every concept of these runs
LETTERS = 5  # words are compared by their first ones


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", type=Path, required=True)
    parser.add_argument("--scores", type=Path, required=True, help="the same texts' stored perplexities")
    parser.add_argument("--lms", nargs="+", default=["tinyworld"], help="base LMs of the judges that need one")
    parser.add_argument("--lm-instructions", type=int, default=1, help="of each concept, judged by these")
    parser.add_argument("--cache", type=Path, required=True)
    parser.add_argument("--report", type=Path, default=Path("experiments/results/calibration.md"))
    args = parser.parse_args()
    texts = ordered(pq.read_table(args.texts).to_pylist())
    stored = ordered([row for row in pq.read_table(args.scores).to_pylist() if row["run"] == RUN])
    items = [Item(row["concept"].removeprefix(FRAME), row["instruction"], row["generation"]) for row in texts]
    truth = np.array([[row[f"{name}_rating"] for name in ("concept", "instruct", "fluency")] for row in texts], float)
    concept, factor = (np.array([row[name] for row in texts]) for name in ("concept_id", "factor"))
    some = np.flatnonzero(np.array([row["input_id"] for row in texts]) < args.lm_instructions)
    every = np.arange(len(texts))
    perplexity = np.array([row["perplexity"] for row in stored])
    ratings: list[Rated] = [
        Rated("the factor alone, negated", every, np.tile(-factor, (3, 1)).T),
        Rated("perplexity under Llama-3.1-8B, negated", every, np.tile(-perplexity, (3, 1)).T),
    ]
    with Cache(args.cache) as cache:
        lexical = Judge("lexical", plain_prompt, rate_words)
        judges = [(lexical, every), (lexical, some)]
        for name in args.lms:
            lm, prompter = load_base(name, "float32")
            judges.append((proxy_judge(lm, prompter, Path(name).name), some))
            judges.append((local_judge(lm, prompter, load_rubric(), Path(name).name), some))
        for judge, rows in judges:
            judged = run_judge(judge, [items[row] for row in rows], cache, say=partial(print, flush=True))
            ratings.append(Rated(judge.name, rows, np.array(judged, float)))
    args.report.write_text(report(ratings, truth, concept, factor), encoding="utf-8")
    print(args.report.read_text(encoding="utf-8"))


class Rated(NamedTuple):
    """What one judge gave."""

    judge: str
    rows: Int[np.ndarray, " R"]  # of the texts it rated
    ratings: Float[np.ndarray, "R 3"]  # in the order of `QUESTIONS`; NaN where it failed


def ordered(rows: list[dict]) -> list[dict]:
    """Rows of either table in one order."""
    return sorted(rows, key=lambda row: (row["concept_id"], row["input_id"], row["factor"]))


def rate_words(asks: Sequence[Ask]) -> Iterator[tuple[int, Rating]]:
    """The simplest judge: words shared with concept or instruction, and for fluency the share of different words."""
    for index, (question, item, _) in enumerate(asks):
        words = re.findall(r"[a-z']+", item.text.lower())
        if question == "fluency":
            share = len(set(words)) / max(1, len(words))
        else:
            asked = stems(item.concept if question == "concept" else item.instruction)
            share = len(asked & stems(item.text)) / max(1, len(asked))
        yield index, Rating(2 * share, "words")


def stems(text: str) -> set[str]:
    """The beginnings of the words that have more than three letters."""
    return {word[:LETTERS] for word in re.findall(r"[a-z']+", text.lower()) if len(word) > 3}


def report(
    ratings: list[Rated],
    truth: Float[np.ndarray, "N 3"],
    concept: Int[np.ndarray, " N"],
    factor: Float[np.ndarray, " N"],
) -> str:
    """Markdown."""

    def table(within: bool) -> list[str]:
        lines = ["| judge | texts | " + " | ".join(QUESTIONS) + " |", "|---|---:" + "|---:" * 3 + "|"]
        for name, rows, values in ratings:
            cells = []
            for column in range(len(QUESTIONS)):
                pair = values[:, column], truth[rows, column]
                statistic = partial(correlation, *pair, factor[rows] if within else None)
                found = statistic(np.arange(len(rows)))
                low, high = clustered_interval(statistic, concept[rows]) if np.isfinite(found) else (np.nan, np.nan)
                cells.append(f"{found:+.2f} ({low:+.2f} to {high:+.2f})" if np.isfinite(found) else "–")
            lines.append(f"| {name} | {len(rows)} | " + " | ".join(cells) + " |")
        return lines

    lines = [
        "# Judges that cost nothing, against gpt-4o-mini",
        "",
        "`python experiments/calibration.py` on 1,500 steered answers of Llama-3.1-8B that AxBench had rated (10 "
        "concepts × 10 instructions × 15 factors).",
        "Spearman's rank correlation with gpt-4o-mini's rating of the same question; 95 % bootstrap intervals over the "
        "10 concepts, so they are rough.",
        "",
        "## Over all texts",
        "",
        *table(within=False),
        "",
        "## At equal factor",
        "",
        "A factor decides much of every rating, so a judge can look good by telling weak from strong steering. Here "
        "texts are compared within each",
        "factor only, and the correlations averaged over the factors at which both judges tell texts apart.",
        "",
        *table(within=True),
    ]
    return "\n".join(lines) + "\n"


def correlation(
    ours: Float[np.ndarray, " R"],
    theirs: Float[np.ndarray, " R"],
    factor: Float[np.ndarray, " R"] | None,
    rows: np.ndarray,
) -> float:
    """Spearman's over some rows, failures left out; averaged over factors if they are given."""
    rows = rows[np.isfinite(ours[rows])]
    if factor is None:
        return spearman(ours[rows], theirs[rows])
    groups = [rows[factor[rows] == value] for value in np.unique(factor)]
    return float(mean(np.array([spearman(ours[group], theirs[group]) for group in groups if len(group)]), axis=0))


if __name__ == "__main__":
    main()
