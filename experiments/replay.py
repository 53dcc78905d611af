"""AxBench's stored ratings, replayed through our judges' interface and our choice of the factor.

    python experiments/replay.py --scores axbench_llama31_8b_l20_judge_scores.parquet

The table holds gpt-4o-mini's ratings of five runs of AxBench on Llama-3.1-8B, layer 20 (stanfordnlp/axbench at f9a6a59,
`axbench/output_llama`): 10 concepts, 10 instructions each, 10 to 16 factors. `PUBLISHED` holds what AxBench's own
`evaluate/steering.jsonl` of each run says about its first concept: means over the ten instructions, by factor.
Expected: the same means to rounding. What came out: experiments/results/replay.md, which this script writes.
"""

import argparse
import tempfile
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from jaxtyping import Float

from hypersteer_jax.evaluation.cache import Cache
from hypersteer_jax.evaluation.judges import Item, Judgement, replay_judge, run_judge
from hypersteer_jax.evaluation.scores import choose_factors, interval, mean

FOLDERS = {
    "lsreft_addition": "layer_20_concise/lsreft_addition",
    "lsreft_factor_trained": "test_gating/lsreft_200_factor_shuffle_1_20",
    "lsreft_suppress": "layer_20_concise/lsreft_20",
    "lora_suppress": "layer_20_concise/lora_20",
    "prompt_suppress": "layer_20_concise/prompt_20",
}
# Score (of the ratings as they were recorded), concept, instruction and fluency (of the judge's), by ascending factor.
PUBLISHED = {
    "lsreft_addition": (
        (1.62, 1.46, 1.51, 1.36, 1.12, 0.78, 0.56, 0.22, 0.12, 0, 0, 0, 0, 0, 0),
        (0.1, 0.4, 0.4, 0.5, 0.9, 1.2, 1.1, 1.1, 0.9, 0.9, 0.8, 1.0, 1.0, 1.0, 1.0),
        (1.8, 2.0, 2.0, 1.9, 1.7, 1.6, 0.8, 0.4, 0.4, 0, 0, 0, 0, 0, 0),
        (1.5, 1.2, 1.3, 1.1, 1.1, 0.9, 0.8, 0.3, 0.1, 0, 0, 0, 0, 0, 0),
    ),
    "lsreft_factor_trained": (
        (0.37, 0.1, 0.1, 0.37, 0.22, 0, 0.1, 0.1, 0.27, 0),
        (1.2, 1.0, 1.0, 1.0, 1.1, 1.0, 1.4, 1.2, 1.2, 1.1),
        (0.6, 0.2, 0.4, 0.5, 0.7, 0.2, 0.2, 0.5, 0.6, 0.4),
        (0.4, 0.3, 0.2, 0.5, 0.3, 0.2, 0.3, 0.3, 0.2, 0.2),
    ),
    "lsreft_suppress": (
        (0.57, 0.84, 1.01, 1.26, 1.33, 1.28, 1.1, 1.2, 0.93, 1.14, 0.78, 0.96, 0.71, 0.84, 0.24, 0.54),
        (0.2, 0.0, 0.1, 0.2, 0.3, 0.5, 0.8, 0.8, 1.1, 0.7, 1.3, 1.0, 1.3, 1.2, 1.8, 1.5),
        (1.6, 1.6, 1.7, 1.9, 1.7, 1.7, 1.7, 1.9, 1.9, 1.8, 1.8, 1.9, 1.9, 1.8, 1.8, 1.8),
        (0.4, 0.6, 0.8, 0.9, 1.0, 1.0, 1.0, 1.2, 1.1, 1.0, 1.2, 1.1, 1.2, 1.3, 1.2, 1.3),
    ),
    "lora_suppress": (
        (1.4, 1.41, 1.52, 1.57, 1.52, 1.47, 1.48, 1.52, 1.57, 1.56, 1.41, 1.41, 1.62, 1.38, 1.44, 1.41),
        (0.1, 0.2, 0.1, 0.1, 0.1, 0.0, 0.2, 0.0, 0.0, 0.0, 0.2, 0.0, 0.0, 0.1, 0.2, 0.1),
        (1.7, 1.8, 1.8, 1.9, 1.8, 1.8, 1.8, 1.9, 1.8, 1.7, 1.8, 1.7, 1.8, 1.7, 1.8, 1.8),
        (1.2, 1.1, 1.2, 1.3, 1.3, 1.1, 1.2, 1.1, 1.3, 1.3, 1.1, 1.0, 1.4, 1.0, 1.1, 1.0),
    ),
    "prompt_suppress": (
        (1.57, 1.57, 1.55, 1.56, 1.57, 1.47, 1.49, 1.55, 1.46, 1.26, 1.54, 1.44, 1.57, 1.46, 1.3, 1.37),
        (0.1, 0.1, 0.0, 0.3, 0.1, 0.2, 0.1, 0.2, 0.4, 0.4, 0.2, 0.3, 0.1, 0.2, 0.3, 0.2),
        (1.9, 1.9, 2.0, 2.0, 2.0, 1.9, 1.9, 2.0, 2.0, 1.7, 1.9, 1.8, 1.8, 1.9, 1.9, 1.8),
        (1.3, 1.3, 1.1, 1.3, 1.2, 1.1, 1.1, 1.3, 1.2, 1.3, 1.3, 1.3, 1.3, 1.1, 1.0, 1.2),
    ),
}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scores", type=Path, required=True)
    parser.add_argument("--report", type=Path, default=Path("experiments/results/replay.md"))
    args = parser.parse_args()
    rows = pq.read_table(args.scores).to_pylist()
    with tempfile.TemporaryDirectory() as folder, Cache(Path(folder) / "judgements.sqlite") as cache:
        found = {
            (run, column): replay([row for row in rows if row["run"] == run], column, cache)
            for run in FOLDERS
            for column in ("concept_rating_judge", "concept_rating_recorded")
        }
    factors = {run: sorted({row["factor"] for row in rows if row["run"] == run}) for run in FOLDERS}
    args.report.write_text(report(found, factors), encoding="utf-8")
    print(args.report.read_text(encoding="utf-8"))


def replay(rows: list[dict], concept_rating: str, cache: Cache) -> Float[np.ndarray, "4 C I F"]:
    """Score, concept, instruction and fluency of one run, failures NaN; its texts are not known, only their places."""
    rows = sorted(rows, key=lambda row: (row["concept_id"], row["input_id"], row["factor"]))
    items = [Item(row["concept"], str(row["input_id"]), f"{row['run']} {row['factor']}") for row in rows]
    ratings = [Judgement(row[concept_rating], row["instruct_rating"], row["fluency_rating"]) for row in rows]
    judge = replay_judge(dict(zip(items, ratings, strict=True)), f"{rows[0]['run']} {concept_rating}")
    judged = run_judge(judge, items, cache, say=print)
    values = [(j.score, j.concept, j.instruction, j.fluency) for j in judged]
    return np.array(values, float).T.reshape(4, 10, 10, -1)


def report(found: dict[tuple[str, str], Float[np.ndarray, "4 C I F"]], factors: dict[str, list[float]]) -> str:
    """Markdown."""
    lines = [
        "# Replay of AxBench's stored ratings",
        "",
        "`python experiments/replay.py --scores axbench_llama31_8b_l20_judge_scores.parquet`: gpt-4o-mini's ratings of "
        "five AxBench runs",
        "(Llama-3.1-8B, layer 20, 10 concepts × 10 instructions; stanfordnlp/axbench at f9a6a59, Apache-2.0), through "
        "the replay judge.",
        "",
        "## Published and replayed",
        "",
        "Means over the ten instructions by factor, first concept, as each run's `evaluate/steering.jsonl` has them.",
        "The concept rating that AxBench recorded is 2 minus the judge's (suppression) in all runs but "
        "lsreft_200_factor_shuffle_1_20; its score is of the",
        "recorded ratings, its concept mean of the judge's.",
        "",
        "| run | numbers | score, published at three factors | replayed | largest difference of all |",
        "|---|---:|---|---|---:|",
    ]
    for run, published in PUBLISHED.items():
        ours = np.stack([found[run, "concept_rating_recorded"][0, 0], *found[run, "concept_rating_judge"][1:, 0]])
        means, theirs = mean(ours, axis=1), np.array(published)
        some = (0, theirs.shape[1] // 2, -1)
        cells = [", ".join(f"{values[0][index]:.2f}" for index in some) for values in (theirs, means)]
        lines.append(
            f"| {FOLDERS[run]} | {theirs.size} | {cells[0]} | {cells[1]} | {np.abs(means - theirs).max():.1e} |"
        )
    lines += [
        "",
        "## Our protocol on the same ratings",
        "",
        "Each concept's factor is chosen on its first five instructions (ties: the smallest) and scored on the other "
        "five; 95 % intervals over the",
        "10 concepts. AxBench printed no such number for these runs. Steering is scored with the judge's concept "
        "ratings, suppression with 2 minus them.",
        "The last column is where the factor was chosen, which is what a report without the split would show.",
        "",
        "| run | chosen factor, other half | best single factor, all ten | chosen factor, its own half |",
        "|---|---:|---:|---:|",
    ]
    for run, folder in FOLDERS.items():
        steer = not run.endswith("suppress")
        scores = found[run, "concept_rating_judge" if steer else "concept_rating_recorded"][0]
        chosen, by_factor = choose_factors(scores), mean(scores, axis=(0, 1))
        best = int(np.argmax(by_factor))
        other, own = interval(chosen.score), interval(chosen.selection)
        lines.append(
            f"| {folder} ({'steering' if steer else 'suppression'}) | "
            f"{other.mean:.3f} ({other.low:.3f}–{other.high:.3f}) | {by_factor[best]:.3f} at {factors[run][best]:g} | "
            f"{own.mean:.3f} ({own.low:.3f}–{own.high:.3f}) |"
        )
    failed = sum(int(np.isnan(values[1:]).sum()) for (_, column), values in found.items() if column.endswith("judge"))
    lines += [
        "",
        f"{failed} of all ratings had no number in the judge's reply. AxBench took it for a 0, of which suppression "
        "made a 2, the best there is; here it",
        "is a failure, and its text has no score.",
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
