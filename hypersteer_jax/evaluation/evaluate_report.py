"""One page about any number of evaluations (`hypersteer report`): report.md, its two pictures, and report.json."""

import json
import random
import re
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console
from rich.table import Table

from hypersteer_jax.config import ConfigError
from hypersteer_jax.evaluation.cases import HYPERSTEER, PROMPTING, UNSTEERED
from hypersteer_jax.evaluation.judges import QUESTIONS
from hypersteer_jax.evaluation.measures import (
    CHOSEN,
    Evaluation,
    Group,
    against_stored,
    chosen_factors,
    compare,
    failures,
    measure,
    read_evaluation,
    scores_by_concept,
)
from hypersteer_jax.evaluation.report import COLOURS
from hypersteer_jax.evaluation.scores import Score, interval, mean

SHOWN = 3  # best texts, and worst, of each group
LONGEST = 600  # characters of a text that are shown
PAGE, CURVES, CONCEPTS, NUMBERS = "report.md", "factors.png", "concepts.png", "report.json"
HEAD = ("", "score", "concept", "instruction", "fluency", "perplexity", "wins against prompting", "ties")


def print_scores(path: Path, console: Console | None = None) -> None:
    """The scores of one evaluation at a terminal."""
    console = console or Console()
    evaluation = read_evaluation(path)
    judges = " and ".join(dict.fromkeys(group.judge for group in evaluation.groups.values()))
    table = Table(title=f"Score, 0 to 2 (95 % interval over concepts); judge: {judges}")
    table.add_column("")
    lines = {}
    for name, group in evaluation.groups.items():
        table.add_column(f"{name}\n{len(group.concepts)} concepts", justify="right")
        lines[name] = measure(group, evaluation.fixed_factor)
    for method in next(iter(lines.values())):
        cells = [_with_interval(line[method].score) for line in lines.values()]
        table.add_row(method, *cells, style="bold" if method == CHOSEN else None)
    console.print(table)
    console.print(_failed(evaluation), highlight=False)
    console.print(f"a page with pictures and texts: hypersteer report {path} --out FOLDER", soft_wrap=True)


def write_report(paths: Sequence[Path], out: Path, prompting: Path | None = None) -> None:
    """The page about these evaluations.

    Args:
        paths: folders of runs or of evaluations.
        out: gets report.md, factors.png, concepts.png and report.json.
        prompting: rated texts of prompting to take win rates against; None: each evaluation's own.

    Raises:
        ConfigError: none is given, or one of them is not there or not finished, or nothing in `prompting` is of use.
    """
    if not paths:
        raise ConfigError("no evaluation is given; give folders of evaluated runs")
    evaluations = [read_evaluation(path) for path in paths]
    names = [evaluation.name for evaluation in evaluations]
    if len(set(names)) < len(names):
        evaluations = [each._replace(name=str(path)) for each, path in zip(evaluations, paths, strict=True)]
    if prompting is not None:
        evaluations = [against_stored(each, prompting) for each in evaluations]
    out.mkdir(parents=True, exist_ok=True)
    _plot_factors(evaluations, out / CURVES)
    _plot_concepts(evaluations, out / CONCEPTS)
    (out / PAGE).write_text(_markdown(evaluations, prompting), encoding="utf-8")
    (out / NUMBERS).write_text(json.dumps(_numbers(evaluations), indent=1) + "\n", encoding="utf-8")


def _markdown(evaluations: Sequence[Evaluation], prompting: Path | None) -> str:
    lines = [
        "# Steering scores",
        "",
        "Score: harmonic mean of concept, instruction and fluency, each 0 to 2, 0 if any is 0; in brackets 95 % "
        "intervals, bootstrapped over concepts.",
        "The first half of a concept's instructions chooses its factor (ties: the smallest); all tables are of the "
        "second half.",
        "Perplexity: median over texts, under the unsteered base LM. Wins: a tie is half a win.",
        "",
    ]
    if prompting is not None:
        lines[-1:] = [f"They are against stored ratings of prompting, where {prompting.name} has them.", ""]
    for evaluation in evaluations:
        lines += _about(evaluation)
        for name, group in evaluation.groups.items():
            lines += [f"### {name}, {len(group.concepts)} concepts", "", *_table(HEAD, _rows(evaluation, group)), ""]
        lines += [_failed(evaluation), ""]
    if len(evaluations) > 1:
        lines += _compared(evaluations)
    lines += [
        "## Factors",
        "",
        f"![ratings against the factor]({CURVES})",
        "",
        "Means over the instructions that choose the factor; shaded: 95 % interval of the score over concepts. At 0: "
        "the unsteered base LM.",
        "",
        "## Concepts",
        "",
        f"![score of each concept]({CONCEPTS})",
        "",
        "A dot is a concept: its score with prompting, and with HyperSteer at its chosen factor; moved a little, so "
        "that equal ones can be told apart.",
        "",
        "## Texts",
        "",
        "At the chosen factor, on the scoring half, at most one of a concept; among equally good or bad ones the "
        "lot decides.",
        "",
    ]
    for evaluation in evaluations:
        for name, group in evaluation.groups.items():
            lines += _texts(f"{evaluation.name}, {name}", group)
    return "\n".join(lines).rstrip() + "\n"


def _about(evaluation: Evaluation) -> list[str]:
    run, settings = evaluation.record["run"], evaluation.record["settings"]
    group = next(iter(evaluation.groups.values()))
    judges = " and ".join(dict.fromkeys(each.judge for each in evaluation.groups.values()))
    return [
        f"## {evaluation.name}",
        "",
        f"{run['hypernet']['variant']}, {run['hypernet']['blocks']} blocks, on {run['lm']}, layer "
        f"{', '.join(map(str, run['steering']['layers']))}; trained on {run['data']['source']}, step "
        f"{evaluation.record['step']:,}.",
        f"{settings['per_concept']} instructions a concept, factors {', '.join(f'{f:g}' for f in group.factors)}, at "
        f"most {settings['max_new']} tokens at temperature {settings['temperature']:g}, seed {settings['seed']}. "
        f"Judge: {judges}.",
        "",
    ]


def _rows(evaluation: Evaluation, group: Group) -> list[list[str]]:
    rows = []
    for name, line in measure(group, evaluation.fixed_factor).items():
        parts = [f"{value:.2f}" for value in (line.concept, line.instruction, line.fluency)]
        wins = "" if line.wins is None else _with_interval(line.wins, percent=True)
        ties = "" if line.ties is None else f"{line.ties:.0%}"
        rows.append([name, _with_interval(line.score), *parts, f"{line.perplexity:.3g}", wins, ties])
    return rows


def _with_interval(score: Score, percent: bool = False, sign: str = "") -> str:
    form = "{:.0%}" if percent else f"{{:{sign}.2f}}"
    return f"{form} ({form}{' to ' if sign else '–'}{form})".format(*score[:3])


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = ["| " + " | ".join(head) + " |", "|---|" + "---:|" * (len(head) - 1)]
    return lines + ["| " + " | ".join(cells) + " |" for cells in rows]


def _failed(evaluation: Evaluation) -> str:
    counts = [failures(group, evaluation.fixed_factor) for group in evaluation.groups.values()]
    total = {
        method: [sum(pair) for pair in zip(*(each[method] for each in counts), strict=True)] for method in counts[0]
    }
    failed, whole = (sum(column) for column in zip(*total.values(), strict=True))
    if not failed:
        return f"None of the {whole:,} ratings failed."
    which = ", ".join(f"{method} {bad:,} of {count:,}" for method, (bad, count) in total.items() if bad)
    return f"{failed:,} of {whole:,} ratings failed, and their texts have no score: {which}."


def _compared(evaluations: Sequence[Evaluation]) -> list[str]:
    rows = []
    for one, other in combinations(evaluations, 2):
        for group in [name for name in one.groups if name in other.groups]:
            for what, score in compare(one, other, group).items():
                shown = _with_interval(score, sign="+") if score.concepts else "nothing was asked of both"
                rows.append([f"{other.name} over {one.name}", group, what, str(score.concepts), shown])
    return [
        "## Differences",
        "",
        "Score of the first less that of the second, concept by concept, over concepts that both met with the same "
        "instructions.",
        "",
        *_table(("", "group", "of", "concepts", "difference"), rows),
        "",
    ]


def _texts(title: str, group: Group) -> list[str]:
    ratings, half = group.methods[HYPERSTEER], group.scoring
    factor = chosen_factors(group)
    scored = [
        (ratings.score[c, i, factor[c]], c, i)
        for c in range(len(group.concepts))
        for i in range(len(group.instructions[0]))[half]
    ]
    scored = [found for found in scored if not np.isnan(found[0])]
    random.Random(0).shuffle(scored)
    ascending = sorted(scored, key=lambda found: found[0])  # keeps the drawn order of equals
    lines = []
    for label, ordered in (("best", ascending[::-1]), ("worst", ascending)):
        first = {c: (score, c, i) for score, c, i in reversed(ordered)}  # of each concept
        few = [found for found in ordered if found == first[found[1]]][:SHOWN]
        lines += [f"### {title}: {label}", ""]
        for score, c, i in few:
            values = ratings.rating[1:, c, i, factor[c]]
            rated = ", ".join(f"{name} {value:g}" for name, value in zip(QUESTIONS, values, strict=True))
            text = ratings.text[c, i, factor[c]]
            shown = text if len(text) <= LONGEST else f"{text[:LONGEST]} …"
            lines += [
                f"**{score:.2f}** ({rated}), factor {group.factors[factor[c]]:g}, steered to "
                f"**{_plain(group.concepts[c])}**: {_plain(group.instructions[c][i])}",
                "",
                f"> {_plain(shown) or '(empty)'}",
                "",
            ]
    return lines


def _plain(text: str) -> str:
    """Text on one line that Markdown shows as it is."""
    return re.sub(r"([\\`*_{}\[\]<>#|~$])", r"\\\1", " ".join(text.split()))


def _panels(evaluations: Sequence[Evaluation], width: float) -> tuple[Any, dict[tuple[int, str], Any]]:
    """A figure with a row for each evaluation and a column for each group, and its axes by both."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    groups = list(dict.fromkeys(name for evaluation in evaluations for name in evaluation.groups))
    figure = Figure(figsize=(width * len(groups), 3.6 * len(evaluations)), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(len(evaluations), len(groups), squeeze=False)
    axes = {}
    for row, evaluation in enumerate(evaluations):
        for axis, group in zip(grid[row], groups, strict=True):
            axis.spines[["top", "right"]].set_visible(False)
            axis.set_title(f"{evaluation.name}, {group}", fontsize=10)
            if group in evaluation.groups:
                axes[row, group] = axis
            else:
                axis.set_visible(False)
    return figure, axes


def _plot_factors(evaluations: Sequence[Evaluation], path: Path) -> None:
    figure, axes = _panels(evaluations, 5.2)
    for (row, name), axis in axes.items():
        group = evaluations[row].groups[name]
        steered, base, prompting = (
            group.methods[method].rating[:, :, group.selecting] for method in (HYPERSTEER, UNSTEERED, PROMPTING)
        )
        xs, ratings = [0.0, *group.factors], np.concatenate([base[..., :1], steered], axis=-1)
        for place, (label, colour) in enumerate(COLOURS.items()):
            wide = 2.4 if label == "score" else 1.3
            axis.plot(xs, mean(ratings[place], axis=(0, 1)), "o-", color=colour, label=label, linewidth=wide, ms=3)
        bands = [interval(values) for values in mean(ratings[0], axis=1).T]
        axis.fill_between(xs, [b.low for b in bands], [b.high for b in bands], color=COLOURS["score"], alpha=0.15, lw=0)
        axis.axhline(
            float(mean(prompting[0], axis=(0, 1, 2))), color="#888888", linestyle=":", label="prompting (score)"
        )
        axis.set(xlabel="steering factor", ylabel="mean rating, 0 to 2", ylim=(-0.05, 2.1))
    next(iter(axes.values())).figure.legend(
        *next(iter(axes.values())).get_legend_handles_labels(), frameon=False, fontsize=9, loc="outside right upper"
    )
    figure.savefig(path, dpi=130)


def _plot_concepts(evaluations: Sequence[Evaluation], path: Path) -> None:
    figure, axes = _panels(evaluations, 3.8)
    for (row, name), axis in axes.items():
        scores = scores_by_concept(evaluations[row].groups[name], evaluations[row].fixed_factor)
        moved = np.random.default_rng(0).uniform(-0.03, 0.03, (2, len(scores[CHOSEN])))
        axis.plot([0, 2], [0, 2], color="#bbbbbb", linewidth=1, zorder=0)
        axis.scatter(scores["prompting"] + moved[0], scores[CHOSEN] + moved[1], s=18, alpha=0.55, color="#0072b2", lw=0)
        axis.set(xlabel="prompting, score", ylabel=CHOSEN, xlim=(-0.1, 2.1), ylim=(-0.1, 2.1), aspect="equal")
    figure.savefig(path, dpi=130)


def _numbers(evaluations: Sequence[Evaluation]) -> dict[str, Any]:
    """Every number of the page, and each concept's."""
    found: dict[str, Any] = {"jax": jax.__version__, "evaluations": [], "differences": []}
    for evaluation in evaluations:
        groups = {}
        for name, group in evaluation.groups.items():
            lines = measure(group, evaluation.fixed_factor).items()
            scores = scores_by_concept(group, evaluation.fixed_factor)
            factors = [group.factors[index] for index in chosen_factors(group)]
            groups[name] = {
                "judge": group.judge,
                "methods": dict(lines),
                "failures": failures(group, evaluation.fixed_factor),
                "concepts": [
                    {"concept": concept, "factor": factor} | {what: values[c] for what, values in scores.items()}
                    for c, (concept, factor) in enumerate(zip(group.concepts, factors, strict=True))
                ],
            }
        found["evaluations"].append({"name": evaluation.name, **evaluation.record, "groups": groups})
    for one, other in combinations(evaluations, 2):
        for name in [name for name in one.groups if name in other.groups]:
            found["differences"].append(
                {"of": other.name, "over": one.name, "group": name, **compare(one, other, name)}
            )
    return _plain_numbers(found)


def _plain_numbers(value: Any) -> Any:
    """The same with lists for tuples and None for NaN, which JSON does not have."""
    match value:
        case dict():
            return {key: _plain_numbers(each) for key, each in value.items()}
        case tuple() if hasattr(value, "_asdict"):
            return _plain_numbers(value._asdict())
        case list() | tuple():
            return [_plain_numbers(each) for each in value]
        case float() if np.isnan(value):
            return None
    return value
