"""What stands around a training run and its use at a terminal: loading, progress, messages."""

import contextlib
import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from rich.columns import Columns
from rich.console import Console
from rich.panel import Panel
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from hypersteer_jax.config import ConfigError, RunConfig, SteeringConfig, check, to_dict
from hypersteer_jax.data.sources import TrainData, base_shape, load_base, load_data
from hypersteer_jax.decoding import Decoding
from hypersteer_jax.generation import Request, Steered, complete
from hypersteer_jax.models.convert import (
    HYPERSTUFF_WEIGHTS,
    Converted,
    check_expressible,
    hyperstuff_weights,
    new_directory,
    read_hyperstuff,
    read_release,
    write_regression,
    write_release,
)
from hypersteer_jax.models.hypernet import NO_SELECTION, Hypernet
from hypersteer_jax.models.weights import WeightsError
from hypersteer_jax.sharding import make_mesh, share_of
from hypersteer_jax.training import checkpoint
from hypersteer_jax.training.activations import ActivationCache, open_cache
from hypersteer_jax.training.flops import evaluation_interval
from hypersteer_jax.training.ledger import account, account_table
from hypersteer_jax.training.preemption import LINGER, Notice
from hypersteer_jax.training.train import Report, TrainState, init_state, new_state, train


def launch(
    config: RunConfig,
    resume: bool = False,
    console: Console | None = None,
    notice: Notice | None = None,
    started: float | None = None,
) -> None:
    """Loads everything a config names, on all devices of all processes, and trains with a progress bar.

    The first process does the talking.

    Args:
        config: the run.
        resume: continue it from its newest checkpoint.
        console: where to say what happens.
        notice: from `preemption.listen`, if the run has to stop when it is told.
        started: unix time from which the run's ledger counts; now if not given.

    Raises:
        ConfigError, DataError, WeightsError, CheckpointError: before any training, naming what to change.
        Preempted: the run was told to stop; its state is saved.
    """
    first, started = jax.process_index() == 0, started or time.time()
    console = console or Console(quiet=not first)
    if notice is not None and first and jax.process_count() > 1:
        notice.linger = LINGER
    if config.train.attention == "splash" and jax.default_backend() != "tpu":
        raise ConfigError(
            f"train.attention is splash, a kernel for TPUs, but the backend is {jax.default_backend()}; "
            "set it to einsum"
        )
    if resume:
        _check_same(config, checkpoint.read_config(config.out))
    check(config, base_shape(config.lm))
    mesh = make_mesh(**dataclasses.asdict(config.mesh))
    lm, prompter = load_base(config.lm, config.train.compute_dtype, mesh)
    console.print(config_table(config))
    console.print(_devices(mesh))
    if prompter.notice:
        console.print(prompter.notice)
    data = load_data(config, prompter, console.print, share_of(mesh))
    interval, asked = evaluation_interval(lm.config, config, data.layout, data.evaluation), config.train.eval_every
    if interval > asked:
        console.print(
            f"evaluating every {interval} steps instead of {asked}, which would take more than "
            f"{config.train.eval_share:.0%} of the arithmetic (train.eval_share)"
        )
    cache = open_cache(config, lm, data.rows, prompter.tokenizer.chat_template or "", console)
    try:
        train_with_bar(config, lm, data, resume, console, cache, notice, started)
    except KeyboardInterrupt as stop:
        raise KeyboardInterrupt(
            f"interrupted; start again with --resume to go on from the last checkpoint in {config.out}"
        ) from stop
    if first:
        console.print(account_table(account(config.out)))
    console.print(f"checkpoint in {config.out}; try: hypersteer steer --run {config.out} --prompt ... --concept ...")


def _devices(mesh: Mesh) -> str:
    """How many devices of what kind, and what each axis of the mesh does."""
    axes = ", ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
    return (
        f"{mesh.size} of {jax.device_count()} devices ({jax.devices()[0].device_kind}) in {jax.process_count()} "
        f"process{'es' * (jax.process_count() > 1)}: {axes}"
    )


def off_mesh(hypernet: Hypernet) -> Hypernet:
    """The same weights without a mesh in their type, for generation on one device."""
    return jax.device_put(jax.device_get(hypernet))


def config_table(config: RunConfig) -> Table:
    """Every setting of the run, one row for each group of them."""
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold")
    table.add_column(style="dim")
    for group, values in to_dict(config).items():
        shown = (
            ", ".join(f"{key} {value}" for key, value in values.items()) if isinstance(values, dict) else str(values)
        )
        table.add_row(group, shown)
    return table


def train_with_bar(
    config: RunConfig,
    lm: Any,
    data: TrainData,
    resume: bool,
    console: Console,
    cache: ActivationCache | None,
    notice: Notice | None,
    started: float,
) -> TrainState:
    """Trains under a progress bar: loss, response tokens per second, time left, and the evaluation losses as lines."""
    bar = Progress(
        TextColumn("training"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:.3f}  {task.fields[speed]:,.0f} tokens/s"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console,
    )
    with bar:
        task = bar.add_task("", total=config.train.steps, loss=float("nan"), speed=0.0)

        def show(report: Report) -> None:
            bar.update(task, completed=report.step, loss=report.loss, speed=report.tokens_per_second)
            for name, value in report.evaluation.items():
                console.print(f"step {report.step}  {name}: loss {value.steered:.3f}, unsteered {value.unsteered:.3f}")
            if report.evaluation and report.step == config.train.steps:
                console.print(f"evaluation took {report.evaluation_share:.1%} of the time")

        return train(config, lm, data, resume, show, cache, notice, started)


def _check_same(config: RunConfig, stored: RunConfig) -> None:
    """Resuming with another config would silently be another run."""
    ours, theirs = _flat(to_dict(config)), _flat(to_dict(stored))
    changed = [
        f"{name} is {ours[name]!r} here and {theirs[name]!r} there" for name in ours if ours[name] != theirs[name]
    ]
    changed = [line for line in changed if not line.startswith("out ")]
    if changed:
        raise ConfigError(
            f"--resume: {config.out} was started with other settings ({'; '.join(changed)}); give the same"
        )


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def load_run(run: Path) -> Steered:
    """The steered model of a run, at its newest checkpoint.

    Raises:
        CheckpointError: there is no run or no checkpoint in this folder.
    """
    return load_run_at(run)[0]


def load_run_at(run: Path, mesh: Mesh | None = None) -> tuple[Steered, int]:
    """The steered model of a run, on a mesh if one is given, and after how many steps."""
    config = checkpoint.read_config(run)
    lm, prompter = load_base(config.lm, config.train.compute_dtype, mesh)
    with contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh):
        abstract = jax.eval_shape(lambda: init_state(config, lm))
    with checkpoint.open_checkpoints(run) as checkpoints:
        state = checkpoint.restore(checkpoints, abstract, mesh or make_mesh()).state
    hypernet = off_mesh(state.hypernet) if mesh is None else state.hypernet
    return Steered(lm, prompter, hypernet, dataclasses.replace(config, out=run)), int(state.step)


def convert(source: Path, target: Path, lm: str | None, layer: int, console: Console | None = None) -> None:
    """Turns a PyTorch release's checkpoint into a run, or a run into a release's checkpoint.

    What `source` is tells the direction. A run with cross-attention becomes an AxBench release directory, one without
    context the weights of a HyperStuff regression run. A new run has no optimizer state but zeros and no place in any
    data: it can be steered with, not resumed. It stands at step 0, or where its selection head's count does. Settings
    that neither the arguments nor the files tell (`models.convert`) are the defaults.

    Args:
        source: a run (config.json and checkpoints/), an AxBench release (config.json and safetensors) or a HyperStuff
            run (train/HyperSteer_weight.safetensors).
        target: a name that is free; nothing is left there if anything is wrong.
        lm: base LM of the new run, since no release names it; not used when `source` is a run.
        layer: its steering layer ℓ, likewise; 20 in all published results.
        console: where to say what was made.

    Raises:
        ConfigError, WeightsError, CheckpointError: naming the setting, the file or the tensors.
    """
    console = console or Console()
    if (source / "checkpoints").is_dir():
        model, step = load_run_at(source)
        check_expressible(model.config, model.lm.config)
        regression = model.config.hypernet.variant == "no_context"
        write = write_regression if regression else write_release
        with new_directory(target) as part:
            write(Converted(model.hypernet, step), model.lm.embedding[...], part)
        console.print(f"{'HyperStuff regression run' if regression else 'AxBench release directory'} in {target}")
        return
    weights = hyperstuff_weights(source)
    if weights is None and not (source / "config.json").is_file():
        raise WeightsError(
            f"{source} is neither a run nor a release; give a folder with config.json and checkpoints, "
            f"with config.json and safetensors, or with train/{HYPERSTUFF_WEIGHTS}"
        )
    if lm is None:
        raise ConfigError(f"--lm is not given, and {source} does not name its base LM; give a directory or a hub id")
    shape = base_shape(lm)
    hypernet, step = read_release(source, shape) if weights is None else read_hyperstuff(weights, shape)
    config = RunConfig(
        lm=lm,
        out=target,
        hypernet=hypernet.config,
        steering=SteeringConfig((layer,), train_positions="after_prefix" if weights is None else "after_bos"),
        selection=NO_SELECTION if hypernet.selection is None else hypernet.selection.config,
    )
    check(config, shape)
    state = new_state(hypernet, config.train)._replace(step=jnp.asarray(step, jnp.int32))
    with new_directory(target) as part:
        checkpoint.write_config(part, config)
        with checkpoint.open_checkpoints(part) as checkpoints:
            checkpoint.save(checkpoints, step, state, config=config)
    console.print(f"run in {target}; try: hypersteer steer --run {target} --prompt ... --concept ...")


def show_steered(
    run: Path, prompt: str, concept: str, factors: Sequence[float], max_new: int, temperature: float, seed: int
) -> None:
    """Prints one text per factor, side by side.

    Raises:
        ConfigError: nothing to answer or to steer to.
        CheckpointError: there is no trained run in this folder.
    """
    for name, text in (("prompt", prompt), ("concept", concept)):
        if not text.strip():
            raise ConfigError(f"--{name} is empty; give some text")
    console = Console()
    model = load_run(run)
    requests = [Request(prompt, concept, factor, seed) for factor in factors]
    texts = complete(model, requests, Decoding(max_new, temperature, batch=len(requests)))
    console.print(f"[bold]{prompt}[/]  steered to [bold]{concept}[/]")
    width = max(28, console.width // len(factors) - 1)
    console.print(
        Columns(
            [
                Panel(
                    text or "[dim](empty)[/]",
                    title=f"factor {factor:g}" if factor else "factor 0: base LM",
                    width=width,
                )
                for factor, text in zip(factors, texts, strict=True)
            ]
        )
    )
