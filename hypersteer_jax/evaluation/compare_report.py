"""What a comparison with the PyTorch baseline found, and its report: a page, a figure and all numbers."""

import dataclasses
import json
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from hypersteer_jax.config import LMConfig, RunConfig, to_dict
from hypersteer_jax.evaluation.golden import Row
from hypersteer_jax.evaluation.speed import Speed, machine

Form = Literal["release", "hyperstuff"]


class Text(NamedTuple):
    """One greedy text of each side."""

    concept: str
    prompt: str
    ours: str
    baseline: str
    differs: int | None  # index of the first token that differs; None if the texts are identical


class Comparison(NamedTuple):
    """All that was found."""

    rows: list[Row]
    losses: list[tuple[float, float]]  # of each step, ours and the baseline's, nats per response token
    cosines: list[float]  # of the vectors after training, one for each row of the evaluation sets
    concepts: int  # different steering prompts among these rows
    texts: list[Text]
    speeds: tuple[Speed, Speed]  # ours and the baseline's
    faster: float  # median over batches of the baseline's seconds over ours
    memory: tuple[int | None, int | None] = (None, None)  # peak bytes, ours and the baseline's; None if not measured

    @property
    def agrees(self) -> bool:
        """Whether every row does. Texts do not count: a tie between two tokens may fall either way."""
        return all(row.agrees for row in self.rows)


def write_report(form: Form, config: RunConfig, lm: LMConfig, found: Comparison, out: Path) -> None:
    """FORM.md, FORM.png and FORM.json in a folder that exists."""
    _plot(found, form, out / f"{form}.png")
    text = _markdown(form, config, lm, found)
    (out / f"{form}.md").write_text(text, encoding="utf-8")
    values = found._asdict() | {
        "form": form,
        "agrees": found.agrees,
        "rows": [row._asdict() | {"agrees": row.agrees} for row in found.rows],
        "texts": [each._asdict() for each in found.texts],
        "speeds": {name: each._asdict() for name, each in zip(("jax", "pytorch"), found.speeds, strict=True)},
        "config": to_dict(config),
        "lm": dataclasses.asdict(lm),
        "machine": machine(),
    }
    (out / f"{form}.json").write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")


def _markdown(form: Form, config: RunConfig, lm: LMConfig, found: Comparison) -> str:
    hypernet, train = config.hypernet, config.train
    verdict = "Everything agrees." if found.agrees else "**Some numbers differ; see the first table.**"
    own = "the base LM's table" if hypernet.embedding == "shared" else "its own table"
    lines = [
        f"# JAX against the PyTorch baseline, form `{form}`",
        "",
        verdict,
        "",
        f"Base LM {config.lm}: {lm.layers} blocks, width {lm.width}, vocabulary {lm.vocab}, steered at layer "
        f"{config.steering.layers[0]}. Hypernetwork: {hypernet.blocks} blocks of the same sizes, {own}, padded "
        f"positions. Batch {train.batch}, learning rate {train.learning_rate:g} falling to 0, clip {train.clip:g}, "
        f"seed {train.seed}; float32 throughout, same first weights, same batches in the same order.",
        "",
        "| what | largest relative error | allowed | |",
        "| --- | ---: | ---: | --- |",
    ]
    for row in found.rows:
        lines.append(
            f"| {row.name} | {row.error:.1e} | {row.allowed:.0e} | {'agrees' if row.agrees else '**DIFFERS**'} |"
        )
    low, mean = min(found.cosines), float(np.mean(found.cosines))
    lines += [
        "",
        f"Cosine of the two vectors after training, over {len(found.cosines)} rows with {found.concepts} steering "
        f"prompts: lowest {low:.7f}, mean {mean:.7f}.",
        "",
        f"![loss curves]({form}.png)",
        "",
        "## Greedy texts at factor 1",
        "",
        "| steering prompt | prompt | JAX | PyTorch | |",
        "| --- | --- | --- | --- | --- |",
    ]
    for text in found.texts:
        same = "identical" if text.differs is None else f"token {text.differs} differs"
        cells = (" ".join(cell.split()).replace("|", "\\|") for cell in text[:4])
        lines.append(f"| {' | '.join(cells)} | {same} |")
    lines += [
        "",
        "## Speed and memory",
        "",
        "| | seconds a step | fastest to slowest | examples/s | response tokens/s | GFLOP a step | GFLOP/s | memory |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name, speed, memory in zip(("JAX", "PyTorch"), found.speeds, found.memory, strict=True):
        lines.append(
            f"| {name} | {speed.median:.3f} | {min(speed.seconds):.3f} to {max(speed.seconds):.3f} "
            f"| {speed.rows / speed.median:.1f} | {speed.tokens / speed.median:.0f} | {speed.flops / 1e9:.2f} "
            f"| {speed.flops / np.mean(speed.seconds) / 1e9:.1f} "
            f"| {'not measured' if memory is None else f'{memory / 1e6:.1f} MB'} |"
        )
    ours, theirs = found.speeds
    lines += [
        "",
        f"The baseline takes {found.faster:.1f} times as long: median over {len(ours.seconds)} batches of the same "
        "rows, stepped on in turns by both sides, warm; ours padded to its bucket, the baseline's to its longest row. "
        f"Its matrix products, by formula, are {theirs.flops / ours.flops:.2f} times ours. Models this small measure "
        "overhead as much as arithmetic.",
        "",
        "Peak memory is of each side alone in a process of its own, on random weights: on a CPU weights and optimizer "
        "state, counted, and what warm steps add to the resident set at most; on an accelerator the device's own peak.",
        "",
        "; ".join(f"{name} {value}" for name, value in machine().items()) + ".",
        "",
    ]
    return "\n".join(lines)


def _plot(found: Comparison, form: str, path: Path) -> None:
    """Loss curves of both sides over each other, and their relative difference below."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    ours, theirs = np.array(found.losses).T
    steps = np.arange(1, len(ours) + 1)
    figure = Figure(figsize=(6.4, 4.8), layout="constrained")
    FigureCanvasAgg(figure)
    top, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    top.plot(steps, ours, color="#56b4e9", linewidth=5, label="JAX")
    top.plot(steps, theirs, color="#222222", linewidth=1.2, linestyle="--", label="PyTorch")
    top.set(title=f"Loss from the same start on the same batches, form {form}", ylabel="nats per response token")
    top.legend(frameon=False)
    below.semilogy(steps, np.maximum(np.abs(ours - theirs) / theirs, 1e-9), ".", color="#d55e00", markersize=4)
    below.set(xlabel="step", ylabel="relative\ndifference")
    for axis in (top, below):
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
