"""Three variants over three seeds on the tiny world: does the paper's order hold here?

    python experiments/tinyworld_variants.py --out runs/variants

About 40 minutes on 2 cores; finished runs are kept and not repeated. Expected (arXiv 2506.03292, Table 1, Gemma-2-2B):
cross-attention above in-context above no-context, held-in and held-out, and prompting above all on held-out concepts.
What came out here: experiments/results/tinyworld_variants.md, which this script writes.
"""

import argparse
import dataclasses
import json
from pathlib import Path

import jax
import numpy as np
from rich.console import Console

from hypersteer_jax.config import RECIPES
from hypersteer_jax.evaluation.protocol import GROUPS, make_trials, run_trials, summarise
from hypersteer_jax.evaluation.report import METHODS, write_summary
from hypersteer_jax.training.launch import launch

VARIANTS = ("cross_attention", "in_context", "no_context")
SEEDS = (0, 1, 2)
CONCEPTS, INSTRUCTIONS = 24, 4


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=RECIPES["tinyworld"][1].train.steps)
    parser.add_argument("--report", type=Path, default=Path("experiments/results/tinyworld_variants.md"))
    args = parser.parse_args()
    console = Console()
    for seed in SEEDS:
        for variant in VARIANTS:
            out = args.out / f"{variant}_{seed}"
            if (out / "scores.json").exists():
                continue
            recipe = RECIPES["tinyworld"][1]
            config = dataclasses.replace(
                recipe,
                out=out,
                hypernet=dataclasses.replace(recipe.hypernet, variant=variant),
                train=dataclasses.replace(recipe.train, steps=args.steps, seed=seed),
            )
            model = launch(config, console=console)
            results = run_trials(model, make_trials(CONCEPTS, INSTRUCTIONS, seed), report=console.print)
            write_summary(summarise(results), out / "scores.json")
    scores = {
        variant: [json.loads((args.out / f"{variant}_{seed}" / "scores.json").read_text()) for seed in SEEDS]
        for variant in VARIANTS
    }
    args.report.write_text(report(scores, args.steps))
    console.print(args.report.read_text())


def report(scores: dict[str, list[dict]], steps: int) -> str:
    """The table as markdown: means over seeds, with the smallest and largest seed."""
    train = RECIPES["tinyworld"][1].train
    lines = [
        "# Three variants on the tiny world",
        "",
        f"`python experiments/tinyworld_variants.py --out runs/variants`: {len(SEEDS)} seeds, {steps} steps of batch "
        f"{train.batch}, {train.compute_dtype}, {CONCEPTS} concepts a group, {INSTRUCTIONS} instructions a concept "
        "(half choose the factor, half score), sampling at temperature 1; jax "
        + jax.__version__
        + ", CPU. Scores are harmonic means of concept, "
        "instruction and fluency, 0 to 2: mean over seeds (lowest seed to highest seed).",
        "",
        "| | " + " | ".join(GROUPS) + " |",
        "|---" * (len(GROUPS) + 1) + "|",
    ]
    for variant, runs in scores.items():
        for method in METHODS:
            cells = []
            for group in GROUPS:
                means = np.array([run[group][method]["mean"] for run in runs])
                cells.append(f"{means.mean():.2f} ({means.min():.2f} to {means.max():.2f})")
            lines.append(f"| {variant}: {method} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
