"""The whole evaluation on the tiny world: three variants on 200 held-in and 200 held-out concepts, on one page.

    python experiments/tinyworld_evaluation.py --out runs/tinyworld_evaluation

Trains each variant, evaluates it as AxBench does (10 instructions a concept, 14 factors, half of the instructions
choose and half score, prompting and controls beside), and reports. Killed at any point, the same command goes on:
training from its newest checkpoint, generation from its last part, judging from the cache of judgements. 216,000 texts:
about an hour on 2 cores (one variant on idle ones: 14 minutes for 72,000 texts, 2 for their ratings, 3 for training).
Expected (arXiv 2506.03292, Table 1, Gemma-2-2B): cross-attention above in-context above no-context.
What came out: experiments/results/tinyworld_evaluation/report.md, which this script writes.
"""

import argparse
import dataclasses
from pathlib import Path

from rich.console import Console

from hypersteer_jax.config import RECIPES, EvaluateConfig, JudgeConfig
from hypersteer_jax.evaluation.evaluate import evaluate, newest_step
from hypersteer_jax.evaluation.evaluate_report import print_scores, write_report
from hypersteer_jax.evaluation.protocol import DECODING
from hypersteer_jax.training.checkpoint import CheckpointError
from hypersteer_jax.training.launch import launch

VARIANTS = ("cross_attention", "in_context", "no_context")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=VARIANTS, help="some of them")
    parser.add_argument("--concepts", type=int, default=200, help="of each group")
    parser.add_argument("--steps", type=int, default=RECIPES["tinyworld"][1].train.steps)
    parser.add_argument("--report", type=Path, default=Path("experiments/results/tinyworld_evaluation"))
    args = parser.parse_args()
    console = Console()
    runs = [args.out / variant for variant in args.variants]
    for run in runs:
        train(run, args.steps, console)
        config = EvaluateConfig(
            concepts=args.concepts,
            max_new=DECODING.max_new,
            judge=JudgeConfig(kind="rules", cache=args.out / "judgements.sqlite"),
        )
        evaluate(run, config, console=console)
        print_scores(run, console)
    write_report(runs, args.report)
    console.print(f"report: {args.report}")


def train(run: Path, steps: int, console: Console) -> None:
    """Trains the variant that the folder is named after, or goes on with it."""
    if finished(run, steps):
        return
    recipe = RECIPES["tinyworld"][1]
    config = dataclasses.replace(
        recipe,
        out=run,
        hypernet=dataclasses.replace(recipe.hypernet, variant=run.name),
        train=dataclasses.replace(recipe.train, steps=steps, save_every=50),
    )
    launch(config, resume=(run / "config.json").exists(), console=console)


def finished(run: Path, steps: int) -> bool:
    """Whether the run has been trained to its end."""
    try:
        return newest_step(run) >= steps
    except CheckpointError:
        return False


if __name__ == "__main__":
    main()
