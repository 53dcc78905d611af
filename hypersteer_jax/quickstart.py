"""The whole method in five minutes: train, evaluate, look (`hypersteer quickstart`)."""

import dataclasses
import time
from itertools import count
from pathlib import Path

from rich.console import Console

from hypersteer_jax.config import RECIPES
from hypersteer_jax.evaluation.protocol import FACTORS, make_trials, run_trials, summarise
from hypersteer_jax.evaluation.report import pick_examples, plot_factors, score_table, side_by_side, write_summary
from hypersteer_jax.training.launch import launch, load_run

CONCEPTS, INSTRUCTIONS = 24, 4  # concepts in each of the four groups, and instructions each of them meets


def run_quickstart(out: Path, steps: int | None, seed: int) -> None:
    """Trains a cross-attention HyperSteer on the tiny world, scores it, and leaves table, texts, plot and checkpoint.

    Args:
        out: folder of the run; the next free name is taken if it exists.
        steps: training steps, or None for the recipe's.
        seed: of initialisation, data and trials.
    """
    console = Console()
    begin = time.perf_counter()
    recipe = RECIPES["tinyworld"][1]
    settings = dataclasses.replace(recipe.train, steps=steps or recipe.train.steps, seed=seed)
    config = dataclasses.replace(recipe, out=free_name(out), train=settings)
    launch(config, console=console)
    model = load_run(config.out)
    trials = make_trials(CONCEPTS, INSTRUCTIONS, seed)
    with console.status("evaluating") as status:
        results = run_trials(model, trials, FACTORS, report=lambda name: status.update(f"evaluating: {name}"))
    summary = summarise(results)
    console.print(score_table(summary))
    console.print(side_by_side(results, pick_examples(results, 1.0), 1.0))
    plot_factors(results, FACTORS, config.out / "factors.png")
    write_summary(summary, config.out / "scores.json")
    console.print(
        f"{(time.perf_counter() - begin) / 60:.1f} minutes. Plot: {config.out / 'factors.png'}. Now try\n"
        f"  hypersteer steer --run {config.out} --prompt 'Describe the moon.' --concept 'references to sailing' "
        "--factor 0 0.75 1 1.5\n"
        f"  hypersteer train tinyworld --hypernet.variant no_context --out runs/no_context\n"
        f"  hypersteer train --help",
        soft_wrap=True,
        highlight=False,
    )


def free_name(folder: Path) -> Path:
    """The folder, or the first of folder-2, folder-3, ... that does not exist."""
    names = (folder if number == 1 else folder.with_name(f"{folder.name}-{number}") for number in count(1))
    return next(name for name in names if not name.exists())
