"""How many of the tokens that training computes are real, with and without two rows in a sequence.

    python experiments/benchmarks/padding.py --tokenizer DIR --data train_data.parquet ...

DIR holds a tokenizer, best the base LM's. For each file a table: shapes, and the real share of sequences, of scored
tokens and of steering prompts. Expected: with six shapes and two rows in a sequence, over 92 % of
the sequences' tokens.
What came out here: experiments/results/padding.md.
"""

import argparse
from pathlib import Path

import numpy as np

from hypersteer_jax.config import DataConfig, SteeringConfig
from hypersteer_jax.data.pipeline import Layout, Rows, encode, make_layout, padding_report
from hypersteer_jax.data.prompts import Prompter, load_tokenizer
from hypersteer_jax.data.readers import read

SHAPES = (1, 2, 4, 6)


def scored_share(rows: Rows, layout: Layout) -> float:
    """Real share of the computed response slots [S, R]."""
    responses = (rows.lengths - rows.prompt_lengths)[layout.sequences].sum()
    return float(responses / sum(layout.buckets[bucket].response for bucket in layout.bucket_of))


def table(rows: Rows) -> str:
    """Markdown, a line for each number of shapes."""
    lines = [
        "| rows in a sequence | shapes | sequences | scored tokens | steering prompts | all tokens |",
        "| ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for pack in (False, True):
        for shapes in SHAPES:
            layout = make_layout(rows, DataConfig(pack=pack, buckets=shapes), seed=0)
            sequences, concepts = padding_report(rows, layout)
            placed = layout.sequences.ravel()
            real = np.array([rows.lengths[placed].sum(), sum(len(rows.concepts[row]) for row in placed)])
            together = real.sum() / (real / [sequences, concepts]).sum()
            shares = (sequences, scored_share(rows, layout), concepts, together)
            cells = " | ".join(f"{share:.1%}" for share in shares)
            lines.append(f"| {1 + pack} | {len(layout.buckets)} | {cells} |")
    return "\n".join(lines)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--data", type=Path, nargs="+", required=True, help="AxBench parquet or JSONL")
    args = parser.parse_args()
    prompter = Prompter(load_tokenizer(args.tokenizer))
    for path in args.data:
        examples, _ = read(path, skip_bad_rows=True)
        rows = encode(examples, prompter, DataConfig(), SteeringConfig(), "cross_attention")
        concepts = [len(concept) for concept in rows.concepts]
        print(
            f"\n## {path.parent.name}/{path.name}\n\n{len(rows)} rows; mean tokens {rows.lengths.mean():.0f}, of them "
            f"{rows.prompt_lengths.mean():.0f} of the prompt; steering prompt {np.mean(concepts):.0f}, at most "
            f"{max(concepts)}.\n\n{table(rows)}"
        )


if __name__ == "__main__":
    main()
