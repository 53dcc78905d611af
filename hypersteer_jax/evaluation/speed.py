"""Seconds, FLOPs and memory of training steps, ours and the PyTorch baseline's, on the same rows."""

import ctypes
import dataclasses
import gc
import multiprocessing
import os
import platform
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers
from flax import nnx
from jaxtyping import Float
from transformers import Gemma2Config, Gemma2ForCausalLM

from hypersteer_jax.config import LMConfig, RunConfig, hypernet_shape
from hypersteer_jax.data.batch import SteeringBatch
from hypersteer_jax.data.pipeline import Bucket
from hypersteer_jax.models.lm import LM, cast
from hypersteer_jax.models.presets import to_hugging_face
from hypersteer_jax.pytorch_baseline.flops import BaselineFlops, baseline_flops
from hypersteer_jax.pytorch_baseline.hypernet import Hypernet, hypernet_config
from hypersteer_jax.pytorch_baseline.steering import FORMS, Baseline, Batch, Form, release_batch
from hypersteer_jax.pytorch_baseline.train import start
from hypersteer_jax.pytorch_baseline.train import train_step as baseline_step
from hypersteer_jax.steering import read_context
from hypersteer_jax.training.flops import StepFlops, step_flops
from hypersteer_jax.training.train import init_state, train_step

CLEAR = Path("/proc/self/clear_refs")  # Linux; 5 written there sets the high-water mark to what is resident now
MARK = Path("/proc/self/status")

Result = TypeVar("Result")
Step = Callable[..., Any]  # on one batch; returns when its results are there


class Speed(NamedTuple):
    """One side's training steps, warm."""

    seconds: list[float]  # of each batch
    rows: int  # of each batch
    tokens: float  # response tokens of a batch, the mean
    flops: float  # of a step, the mean

    @property
    def median(self) -> float:
        """Seconds of one step."""
        return float(np.median(self.seconds))


class Alone(NamedTuple):
    """One side's training steps, warm, in a process of its own.

    Peak memory is the device's own peak where there is an accelerator. On a CPU it is the weights and the optimizer's
    state, counted, plus what one more round of steps adds to the process's resident set at most.
    """

    seconds: list[float]  # of each batch
    memory: int | None  # peak bytes; None where it cannot be known


def our_step(config: RunConfig, lm: LM) -> tuple[Step, Callable[[], Any]]:
    """Our step from the first state on, and all that it holds. It may be given the batch's residual, as `train_step`.

    A residual is numpy's, so that its way to the device is part of the step.
    """
    state = jax.jit(partial(init_state, config))(lm)
    step = jax.jit(partial(train_step, config=config), donate_argnums=0)

    def run(batch: SteeringBatch, residual: Float[np.ndarray, "S T D"] | None = None) -> None:
        nonlocal state
        state, metrics = step(state, lm, batch, residual=residual)
        jax.block_until_ready((state, metrics))

    return run, lambda: (lm, state)


def read_residuals(config: RunConfig, lm: LM, batches: Sequence[SteeringBatch]) -> list[Float[np.ndarray, "S T D"]]:
    """What a cache would hold for each batch."""
    read = jax.jit(partial(read_context, config=config.steering))
    return [np.asarray(read(lm, batch.tokens, batch.segments)) for batch in batches]


def in_turns(
    work: Sequence[Sequence[Callable[[], Any]]], clock: Callable[[], float] = time.perf_counter
) -> Float[np.ndarray, "batches sides"]:
    """Seconds of every side's step on every batch.

    All are stepped on once before the clock runs, so that nothing is compiled under it, and the sides take turns.
    """
    for steps in work:
        for step in steps:
            step()

    def seconds(step: Callable[[], Any]) -> float:
        begin = clock()
        step()
        return clock() - begin

    return np.array([[seconds(step) for step in steps] for steps in work])


def time_steps(
    config: RunConfig, lm: LM, baseline: Baseline, batches: Sequence[SteeringBatch]
) -> tuple[Speed, Speed, float]:
    """Both sides' speed, and the median over batches of the baseline's seconds over ours.

    Ours steps on the batches as they are bucketed, the baseline on the same rows as its collator pads them. Making the
    batches is not timed. `baseline` is trained in place.
    """
    ours, _ = our_step(config, lm)
    theirs = partial(baseline_step, start(baseline, config.train.learning_rate, 2 * len(batches)))
    padded = [release_batch(batch) for batch in batches]
    seconds = in_turns([(partial(ours, a), partial(theirs, b)) for a, b in zip(batches, padded, strict=True)])
    tokens = float(np.mean([np.sum(batch.response_mask) for batch in batches]))
    flops = (
        [our_flops(lm.config, config, batch).total for batch in batches],
        [their_flops(baseline.form, config, lm.config, batch).total for batch in padded],
    )
    left, right = (
        Speed(column.tolist(), len(batches[0].factor), tokens, float(np.mean(counts)))
        for column, counts in zip(seconds.T, flops, strict=True)
    )
    return left, right, float(np.median(seconds[:, 1] / seconds[:, 0]))


def our_flops(lm: LMConfig, config: RunConfig, batch: SteeringBatch, cached: bool = False) -> StepFlops:
    """FLOPs of our step on a batch; `cached` if it is given the residual."""
    rows = len(batch.factor)
    shape = Bucket(
        tokens=batch.tokens.shape[1],
        context=batch.context_mask.shape[1],
        response=batch.response_tokens.shape[1],
        concept=batch.concept_tokens.shape[1],
        rows=rows // len(batch.tokens),
    )
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, batch=rows))
    return step_flops(lm, config, shape, len(batch.concept_tokens), cached)


def their_flops(form: Form, config: RunConfig, lm: LMConfig, batch: Batch) -> BaselineFlops:
    """FLOPs of the baseline's step on a batch."""
    base = Gemma2Config(**to_hugging_face(lm))
    return baseline_flops(form, base, _their_hypernet(base, config, lm), config.steering.layers[0], batch)


def _their_hypernet(base: Gemma2Config, config: RunConfig, lm: LMConfig) -> Gemma2Config:
    """Our hypernetwork's shape in their words."""
    shape = hypernet_shape(config.hypernet, lm)
    return hypernet_config(
        base,
        config.hypernet.blocks,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        intermediate_size=shape.mlp_width,
        query_pre_attn_scalar=round(shape.query_scale**-2),
    )


def random_lm(lm: LMConfig, dtype: str) -> LM:
    """A base LM of random weights, made on the device that it stays on."""
    return jax.jit(lambda: cast(LM(lm, nnx.Rngs(0)), jnp.dtype(dtype)))()


def random_baseline(form: str, config: RunConfig, lm: LMConfig) -> Baseline:
    """One release of random weights, all in `config.train.compute_dtype`, made on PyTorch's default device."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(getattr(torch, config.train.compute_dtype))
    try:
        base = Gemma2ForCausalLM(Gemma2Config(**to_hugging_face(lm))).eval().requires_grad_(False)
        hypernet = Hypernet(_their_hypernet(base.config, config, lm))
    finally:
        torch.set_default_dtype(before)
    return Baseline(FORMS[form], base, hypernet, config.steering.layers[0])


def alone(function: Callable[..., Result], *arguments: Any) -> Result:
    """`ours_alone`, `baseline_alone` or anything else in a fresh process."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def ours_alone(config: RunConfig, lm: LMConfig, batches: Sequence[SteeringBatch], cached: bool = False) -> Alone:
    """Our steps from random weights on these batches; `cached` if their residuals are given."""
    weights = random_lm(lm, config.train.compute_dtype)
    step, held = our_step(config, weights)
    residuals = read_residuals(config, weights, batches) if cached else [None] * len(batches)
    work = [partial(step, batch, residual) for batch, residual in zip(batches, residuals, strict=True)]
    seconds = in_turns([[each] for each in work])[:, 0].tolist()
    device = jax.devices()[0]
    if device.platform != "cpu":
        return Alone(seconds, (device.memory_stats() or {}).get("peak_bytes_in_use"))
    return Alone(seconds, _peak(work, sum(leaf.nbytes for leaf in jax.tree.leaves(held()))))


def baseline_alone(form: str, config: RunConfig, lm: LMConfig, batches: Sequence[SteeringBatch], device: str) -> Alone:
    """The baseline's steps from random weights, on these rows."""
    torch.set_default_device(device)
    training = start(random_baseline(form, config, lm), config.train.learning_rate, 9 * len(batches))
    work = [partial(baseline_step, training, release_batch(batch)) for batch in batches]
    seconds = in_turns([[each] for each in work])[:, 0].tolist()
    if device != "cpu":
        return Alone(seconds, torch.cuda.max_memory_allocated())
    weights = [*training.baseline.lm.parameters(), *training.baseline.hypernet.parameters()]
    moments = [x for state in training.optimizer.state.values() for x in state.values()]
    return Alone(seconds, _peak(work, sum(x.nbytes for x in weights + moments)))


def _peak(work: Sequence[Callable[[], Any]], held: int) -> int | None:
    """Bytes held between steps and what the steps add to the resident set."""
    if not CLEAR.exists():
        return None
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what was freed leaves the resident set, as if it had never been there
    CLEAR.write_text("5")
    before = _resident("VmRSS")
    for step in work:
        step()
    return held + _resident("VmHWM") - before


def _resident(name: str) -> int:
    [line] = [line for line in MARK.read_text().splitlines() if line.startswith(name)]
    return 1024 * int(line.split()[1])


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
