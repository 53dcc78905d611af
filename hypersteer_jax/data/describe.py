"""What is in a source of data: counts, lengths, what is there twice, and what leaks from training into evaluation."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Int
from rich.console import Console
from rich.table import Table

from hypersteer_jax.config import DataConfig
from hypersteer_jax.data.batch import SteeringExample
from hypersteer_jax.data.concepts import normalised
from hypersteer_jax.data.prompts import Prompter, load_tokenizer
from hypersteer_jax.data.readers import read, read_categories
from hypersteer_jax.data.splits import HELD_IN, HELD_OUT, TRAIN, Splits, leaks, row_key

ALL = "all rows"  # the split of a file that is not split yet
PARTS = {
    "steering prompt": "max_concept",
    "prompt": "max_prompt",
    "response": "max_response",
}  # and its limit in tokens
COLOURS = {ALL: "#222222", TRAIN: "#222222", HELD_IN: "#0072b2", HELD_OUT: "#d55e00"}
BINS = 40

Lengths = dict[str, Int[np.ndarray, " rows"]]  # of each part


class Counts(NamedTuple):
    """How much there is of what in one split."""

    rows: int
    concepts: int  # names that differ in more than letter case, punctuation and spacing
    features: int  # SAE features
    twins: int  # rows that are there already
    same_answers: int  # rows whose prompt and response are there already under another steering prompt


def describe(source: Path, out: Path, tokenizer: Path | None, console: Console) -> bool:
    """Prints what is in a source, draws its lengths and says whether it can be trained on.

    Args:
        source: a prepared directory, or a .parquet or .jsonl file, which has no splits yet.
        out: PNG with a histogram of lengths for each part of a row.
        tokenizer: folder with a tokenizer; lengths are in its tokens as training counts them, else in characters.
        console: where to print.

    Returns:
        Whether nothing leaks from training into evaluation.

    Raises:
        DataError: the source or the tokenizer cannot be read.
    """
    splits = read_source(source)
    if source.suffix == ".parquet":
        categories = read_categories(source)
        shown = ", ".join(f"{count:,} {name}" for name, count in categories.most_common())
        console.print(f"{categories.total():,} rows: {shown}; positive ones are counted below")
    measure, unit = (characters, "characters") if tokenizer is None else (tokens(load_tokenizer(tokenizer)), "tokens")
    lengths = {name: measure(rows) for name, rows in splits.items()}
    console.print(count_table({name: count(rows) for name, rows in splits.items()}))
    console.print(length_table(lengths, unit))
    plot_lengths(lengths, unit, out)
    console.print(f"lengths as a picture: {out}")
    found = leaks(splits) if TRAIN in splits else []
    for leak in found:
        console.print(f"LEAK: {leak}", style="bold red", markup=False)
    if TRAIN in splits and not found:
        console.print("nothing leaks from training into evaluation")
    return not found


def read_source(source: Path) -> Splits:
    """Splits of a prepared directory that have rows, or the rows of a file as one."""
    if source.is_dir():
        from hypersteer_jax.data.axbench.builder import read_prepared  # needs [axbench]

        return {name: rows for name, rows in read_prepared(source).items() if rows}
    return {ALL: read(source)[0]}


def count(rows: list[SteeringExample]) -> Counts:
    """Counts of one split."""
    distinct = {row_key(example) for example in rows}
    answers = {(prompt, response) for _, prompt, response in distinct}
    return Counts(
        rows=len(rows),
        concepts=len({normalised(example.concept) for example in rows}),
        features=len({example.feature for example in rows} - {""}),
        twins=len(rows) - len(distinct),
        same_answers=len(distinct) - len(answers),
    )


def characters(rows: list[SteeringExample]) -> Lengths:
    """Lengths in characters."""
    texts = ([e.steering_prompt for e in rows], [e.prompt for e in rows], [e.response for e in rows])
    return {part: np.array([len(text) for text in each]) for part, each in zip(PARTS, texts, strict=True)}


def tokens(tokenizer: object) -> Callable[[list[SteeringExample]], Lengths]:
    """Lengths in tokens, as training counts them: chat template with the prompt, BOS with the steering prompt."""
    prompter = Prompter(tokenizer)

    def measure(rows: list[SteeringExample]) -> Lengths:
        prompts = prompter.prompt_tokens([example.prompt for example in rows])
        whole = prompter.tokenize([prompter.render(example.prompt) + example.response for example in rows])
        concepts = prompter.concept_tokens([example.steering_prompt for example in rows])
        lengths = np.array([[len(each) for each in column] for column in (concepts, prompts, whole)])
        return dict(zip(PARTS, [*lengths[:2], lengths[2] - lengths[1]], strict=True))

    return measure


def count_table(counts: dict[str, Counts]) -> Table:
    """A line for each split."""
    table = Table()
    for name in ("", "rows", "concepts", "SAE features", "rows twice", "answers twice, other concept"):
        table.add_column(name, justify="right" if name else "left")
    for split, each in counts.items():
        table.add_row(split, *(f"{value:,}" for value in each))
    return table


def length_table(lengths: dict[str, Lengths], unit: str) -> Table:
    """Median, 95th percentile and longest of each part, a line for each split."""
    table = Table(title=f"{unit}: median / 95 % are at most / longest")
    for name in ("", *PARTS):
        table.add_column(name, justify="right" if name else "left")
    for split, parts in lengths.items():
        quantiles = [np.quantile(values, (0.5, 0.95, 1.0), method="higher") for values in parts.values()]
        table.add_row(split, *(" / ".join(f"{value:,}" for value in each) for each in quantiles))
    return table


def plot_lengths(lengths: dict[str, Lengths], unit: str, path: Path) -> None:
    """Histograms as a PNG: a panel for each part, a line for each split, and where the limits of tokens are."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    for axis, (part, limit) in zip(figure.subplots(1, len(PARTS)), PARTS.items(), strict=True):
        longest = max(int(values[part].max()) for values in lengths.values())
        edges = np.arange(0, longest + 2 * (width := longest // BINS + 1), width)
        for split, values in lengths.items():
            share = np.histogram(values[part], edges)[0] / len(values[part])
            axis.stairs(
                100 * share, edges, color=COLOURS[split], label=f"{split}, {len(values[part]):,}", linewidth=1.6
            )
        if unit == "tokens":
            axis.axvline(
                getattr(DataConfig, limit), color="#888888", linestyle=":", label="default limit (data.max_...)"
            )
        axis.set(title=part, xlabel=unit, xlim=(0, None), ylim=(0, None))
        axis.spines[["top", "right"]].set_visible(False)
    figure.legend(*axis.get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    figure.axes[0].set_ylabel("rows, %")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
