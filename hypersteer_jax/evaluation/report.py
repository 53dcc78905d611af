"""What a person looks at after an evaluation: the table, texts side by side, the plot, and the figures as JSON."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from rich.console import Group as Lines
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from hypersteer_jax.evaluation.protocol import (
    HYPERSTEER_CHOSEN,
    HYPERSTEER_ONE,
    PROMPTING,
    UNSTEERED,
    WRONG_PROMPT,
    Group,
    Results,
    factor_name,
)
from hypersteer_jax.evaluation.scores import Score

METHODS = (UNSTEERED, WRONG_PROMPT, PROMPTING, HYPERSTEER_CHOSEN, HYPERSTEER_ONE)
COLOURS = {"score": "#222222", "concept": "#0072b2", "instruction": "#d55e00", "fluency": "#009e73"}


def score_table(summary: dict[Group, dict[str, Score]]) -> Table:
    """Mean score and 95 % interval of each method on each group of concepts."""
    table = Table(
        title="Score, 0 to 2: harmonic mean of concept, instruction and fluency (95 % interval over concepts)"
    )
    table.add_column("")
    for group, scores in summary.items():
        count = next(iter(scores.values())).concepts
        table.add_column(f"{group}\n{count} concepts", justify="right")
    for method in METHODS:
        cells = [f"{s.mean:.2f} [dim]({s.low:.2f}–{s.high:.2f})[/]" for s in (row[method] for row in summary.values())]
        table.add_row(method, *cells, style="bold" if method == HYPERSTEER_CHOSEN else None)
    return table


def side_by_side(results: Results, rows: Sequence[int], factor: float) -> Lines:
    """Texts of a few trials: the base LM, prompting, and HyperSteer at one factor."""
    panels = []
    for row in rows:
        trial = results.trials[row]
        body = Table.grid(padding=(0, 2))
        body.add_column(style="dim", no_wrap=True)
        body.add_column()
        for label, name in (
            ("unsteered", UNSTEERED),
            ("prompting", PROMPTING),
            (f"HyperSteer ×{factor:g}", factor_name(factor)),
        ):
            rating = results.judgements[name][row]
            mark = f"[dim] (concept {rating.concept}, instruction {rating.instruction}, fluency {rating.fluency})[/]"
            body.add_row(label, Text.from_markup(results.texts[name][row] + mark))
        title = f"[bold]{trial.prompt}[/]  steered to [bold]{trial.steering_prompt}[/] ({trial.group})"
        panels.append(Panel(body, title=title, title_align="left"))
    return Lines(*panels)


def pick_examples(results: Results, factor: float, count: int = 4) -> list[int]:
    """Trials to show: the median text of each group in turn, so that what is shown is typical, not the best."""
    groups: dict[str, list[int]] = {}
    for index, trial in enumerate(results.trials):
        groups.setdefault(trial.group, []).append(index)
    scores = [judgement.score for judgement in results.judgements[factor_name(factor)]]
    ordered = [sorted(rows, key=lambda row: (scores[row], row)) for rows in groups.values()]
    return [rows[len(rows) // 2 + turn] for turn in range(count) for rows in ordered][:count]


def plot_factors(results: Results, factors: Sequence[float], path: Path) -> None:
    """Score, concept, instruction and fluency against the factor, one panel per group, as a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    groups = list(dict.fromkeys(trial.group for trial in results.trials))
    xs = [0.0, *sorted(factors)]
    names = [UNSTEERED, *(factor_name(factor) for factor in sorted(factors))]
    figure = Figure(figsize=(3.6 * len(groups), 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, len(groups), sharey=True, squeeze=False)[0]
    for axis, group in zip(axes, groups, strict=True):
        rows = [index for index, trial in enumerate(results.trials) if trial.group == group]
        ratings = np.array([[(j.score, *j) for j in (results.judgements[name][row] for row in rows)] for name in names])
        for column, label in enumerate(COLOURS):
            wide = 2.4 if label == "score" else 1.4
            axis.plot(xs, ratings[:, :, column].mean(1), "o-", color=COLOURS[label], label=label, linewidth=wide, ms=3)
        prompting = np.mean([results.judgements[PROMPTING][row].score for row in rows])
        axis.axhline(prompting, color="#888888", linestyle=":", label="prompting (score)")
        axis.set(title=group, xlabel="steering factor", ylim=(-0.05, 2.1))
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("mean rating, 0 to 2")
    axes[-1].legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.savefig(path, dpi=150)


def write_summary(summary: dict[Group, dict[str, Score]], path: Path) -> None:
    """The table as JSON."""
    plain = {group: {name: score._asdict() for name, score in scores.items()} for group, scores in summary.items()}
    path.write_text(json.dumps(plain, indent=1) + "\n")
