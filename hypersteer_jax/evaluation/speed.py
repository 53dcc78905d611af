"""Seconds per training step of our side and of the PyTorch baseline, on the same rows."""

import os
import platform
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import torch
import transformers

from hypersteer_jax.config import RunConfig
from hypersteer_jax.data.batch import SteeringBatch
from hypersteer_jax.models.lm import LM
from hypersteer_jax.pytorch_baseline.steering import Baseline, release_batch
from hypersteer_jax.pytorch_baseline.train import start
from hypersteer_jax.pytorch_baseline.train import train_step as baseline_step
from hypersteer_jax.training.train import init_state, train_step


class Speed(NamedTuple):
    """One side's training steps, warm."""

    seconds: list[float]  # of each batch
    rows: int  # of each batch
    tokens: float  # response tokens of a batch, the mean

    @property
    def median(self) -> float:
        """Seconds of one step."""
        return float(np.median(self.seconds))


def time_steps(
    config: RunConfig, lm: LM, baseline: Baseline, batches: Sequence[SteeringBatch]
) -> tuple[Speed, Speed, float]:
    """Times of both sides, and the median over batches of the baseline's over ours.

    Ours steps on the batches as they are bucketed, the baseline on the same rows as its collator pads them. All
    batches are stepped on once before the clock runs, so that nothing is compiled under it, and the sides take turns.
    Making the batches is not timed. `baseline` is trained in place.
    """
    state = jax.jit(partial(init_state, config))(lm)
    step = jax.jit(partial(train_step, config=config), donate_argnums=0)
    training = start(baseline, config.train.learning_rate, 2 * len(batches))

    def ours(batch: SteeringBatch) -> None:
        nonlocal state
        state, metrics = step(state, lm, batch)
        jax.block_until_ready((state, metrics))

    pairs = [(batch, release_batch(batch)) for batch in batches]
    for batch, padded in pairs:
        ours(batch)
        baseline_step(training, padded)
    seconds = np.array(
        [(_seconds(ours, batch), _seconds(partial(baseline_step, training), padded)) for batch, padded in pairs]
    )
    tokens = float(np.mean([np.sum(batch.response_mask) for batch in batches]))
    rows = len(batches[0].tokens)
    left, right = (Speed(column.tolist(), rows, tokens) for column in seconds.T)
    return left, right, float(np.median(seconds[:, 1] / seconds[:, 0]))


def _seconds(step: Callable[[Any], Any], batch: Any) -> float:
    begin = time.perf_counter()
    step(batch)  # returns when its results are there
    return time.perf_counter() - begin


def machine() -> dict[str, str]:
    """What the numbers of a report were measured on."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "CPU": f"{names[0] if names else platform.processor()}, {cores} cores usable",
        "JAX": f"{jax.__version__} on {jax.devices()[0].device_kind}",
        "PyTorch": f"{torch.__version__} on {torch.get_default_device()}, {torch.get_num_threads()} threads",
        "transformers": transformers.__version__,
        "Python": platform.python_version(),
    }
