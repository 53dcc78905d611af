"""Training: the state, one pure step, and the loop around it."""

import contextlib
import dataclasses
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax import Array
from jaxtyping import Float, Int

from hypersteer_jax.config import RunConfig, TrainConfig
from hypersteer_jax.data.batch import SteeringBatch
from hypersteer_jax.data.sources import TrainData
from hypersteer_jax.models.hypernet import Hypernet, init_hypernet
from hypersteer_jax.models.lm import LM
from hypersteer_jax.models.selection import annealed_temperature, mean_gate, selected_share
from hypersteer_jax.sharding import make_mesh, shard_batch, shard_weights, shardings
from hypersteer_jax.steering import steered_residual
from hypersteer_jax.training import checkpoint
from hypersteer_jax.training.activations import ActivationCache
from hypersteer_jax.training.flops import evaluation_interval
from hypersteer_jax.training.loss import response_loss
from hypersteer_jax.training.metrics import MetricsLog

Metrics = dict[str, Any]


class TrainState(NamedTuple):
    """Everything that a step changes. The base LM is not part of it."""

    step: Int[Array, ""]
    hypernet: Hypernet
    opt_state: optax.OptState


def learning_rate(config: TrainConfig) -> optax.Schedule:
    """Learning rate by step: a linear warm-up, then the schedule, which reaches zero at `steps`."""
    peak, decay = config.learning_rate, config.steps - config.warmup
    schedules = {
        "linear": optax.linear_schedule(peak, 0.0, decay),
        "cosine": optax.cosine_decay_schedule(peak, decay),
        "constant": optax.constant_schedule(peak),
    }
    warmup = optax.linear_schedule(0.0, peak, config.warmup)
    return optax.join_schedules([warmup, schedules[config.schedule]], [config.warmup])


def make_optimizer(config: TrainConfig) -> optax.GradientTransformation:
    """AdamW behind a global clip: betas .9 and .999, eps 1e-8 (the release's, which are PyTorch's defaults)."""
    adamw = optax.adamw(learning_rate(config), b1=0.9, b2=0.999, eps=1e-8, weight_decay=config.weight_decay)
    return optax.chain(optax.clip_by_global_norm(config.clip), adamw)


def init_state(config: RunConfig, lm: LM) -> TrainState:
    """The state before the first step, float32."""
    rngs = nnx.Rngs(config.train.seed)
    return new_state(init_hypernet(config.hypernet, lm, rngs, config.selection), config.train)


def new_state(hypernet: Hypernet, config: TrainConfig) -> TrainState:
    """Step 0 of a hypernetwork."""
    return TrainState(jnp.zeros((), jnp.int32), hypernet, make_optimizer(config).init(hypernet))


def batch_loss(
    hypernet: Hypernet, lm: LM, batch: SteeringBatch, config: RunConfig, residual: Array | None = None
) -> tuple[Array, Array]:
    """Loss of the steered base LM on the responses in nats, and how many tokens it is over; gates as at inference.

    `residual` is `read_context`'s for this batch, if it is known already.
    """
    _, metrics = objective(hypernet, lm, batch, config, residual)
    return metrics["loss"], metrics["tokens"]


def objective(
    hypernet: Hypernet,
    lm: LM,
    batch: SteeringBatch,
    config: RunConfig,
    residual: Array | None = None,
    key: Array | None = None,
) -> tuple[Array, Metrics]:
    """What a step minimises, and its parts: the loss on the responses, and a selection head's penalty if there is one.

    The penalty is the mean gate over the real tokens times `selection.sparsity` (HyperStuff release). `key` is that of
    the head's noise, `residual` as for `batch_loss`.
    """
    settings = config.train
    last, gates = steered_residual(
        hypernet, lm, batch, config.steering, settings.remat, residual, settings.attention, key
    )
    loss, tokens = response_loss(lm, last, batch.response_tokens, batch.response_share, settings.loss)
    metrics = {"loss": loss, "tokens": tokens}
    if hypernet.selection is None:
        return loss, metrics
    rows = len(batch.factor) // len(batch.tokens)
    penalty = config.selection.sparsity * mean_gate(gates, batch.steer_mask, batch.segments, rows)
    metrics |= {"penalty": penalty, "selected": selected_share(gates, batch.steer_mask)}
    return loss + penalty, metrics


def train_step(
    state: TrainState, lm: LM, batch: SteeringBatch, config: RunConfig, residual: Array | None = None
) -> tuple[TrainState, Metrics]:
    """One update. Pure: the random factor and the selection head's noise, if any, depend on seed and step only.

    `residual` is `read_context`'s for this batch, if it is known already.
    """
    key = jax.random.fold_in(jax.random.key(config.train.seed), state.step)
    if config.train.factor_range is not None:
        low, high = config.train.factor_range
        sampled = jax.random.uniform(key, batch.factor.shape, minval=low, maxval=high)
        batch = batch._replace(factor=batch.factor * sampled)
    value_and_grad = jax.value_and_grad(objective, has_aux=True)
    (_, metrics), grads = value_and_grad(state.hypernet, lm, batch, config, residual, key)
    updates, opt_state = make_optimizer(config.train).update(grads, state.opt_state, state.hypernet)
    hypernet = optax.apply_updates(state.hypernet, updates)
    if state.hypernet.selection is not None:
        now, update = state.hypernet.selection.temperature[...], updates.selection.temperature[...]
        hypernet.selection.temperature[...] = next_temperature(now, update, state.step, config)
    metrics |= {
        "grad_norm": optax.tree.norm(grads),
        "learning_rate": jnp.asarray(learning_rate(config.train)(state.step)),
    }
    return TrainState(state.step + 1, hypernet, opt_state), metrics


def next_temperature(
    now: Float[Array, ""], update: Float[Array, ""], step: Int[Array, ""], config: RunConfig
) -> Float[Array, ""]:
    """The selection head's temperature after a step: learned at a rate of its own, or annealed over all steps.

    Adam's steps do not know the scale of a gradient, so another learning rate is a factor on the optimizer's update.
    """
    if config.selection.learnable_temperature:
        return now + update * (config.selection.temperature_learning_rate / config.train.learning_rate)
    return annealed_temperature(config.selection, (step + 1) / config.train.steps)


Loss = Callable[[Hypernet, LM, SteeringBatch], tuple[Array, Array]]


class EvalLoss(NamedTuple):
    """Loss on one set of rows, in nats per response token, with and without steering."""

    steered: float
    unsteered: float


def evaluate_loss(loss: Loss, hypernet: Hypernet, lm: LM, batches: list[SteeringBatch]) -> float:
    """Token-weighted mean over batches, in nats per response token."""
    total, count = 0.0, 0
    for batch in batches:
        value, tokens = loss(hypernet, lm, batch)
        total += float(value) * int(tokens)
        count += int(tokens)
    return total / max(count, 1)


def unsteered(batch: SteeringBatch) -> SteeringBatch:
    """The batch at factor 0, which is the base LM's."""
    return batch._replace(factor=batch.factor * 0)


class Report(NamedTuple):
    """What the loop reports. All numbers are the previous step's, so that reporting never waits for the device."""

    step: int  # steps whose values are known
    loss: float  # nats per response token
    tokens_per_second: float  # response tokens
    evaluation: dict[str, EvalLoss]  # by name; empty but for steps that evaluated
    evaluation_share: float  # of the time since training started


def train(
    config: RunConfig,
    lm: LM,
    data: TrainData,
    resume: bool = False,
    report: Callable[[Report], None] | None = None,
    cache: ActivationCache | None = None,
) -> TrainState:
    """Trains to `config.train.steps`, with metrics, evaluation and checkpoints in `config.out`.

    Args:
        config: the run; already checked.
        lm: base LM in its own dtype; the computation's dtype follows it.
        data: from `load_data`.
        resume: continue from the newest checkpoint in `config.out`.
        report: called after every step.
        cache: residuals of all rows of `data`, if they are kept (`train.cache`).

    Raises:
        CheckpointError: `config.out` cannot be written, already holds another run, or has nothing to resume.
        FloatingPointError: the loss is not finite; the batch is in `config.out`, and so is the last good checkpoint.
    """
    settings, out = config.train, config.out
    if not resume and (out / "checkpoints").exists():
        raise checkpoint.CheckpointError(
            f"out is {out}, which holds a run; continue it with --resume or give another folder"
        )
    checkpoint.write_config(out, config)
    mesh = make_mesh(**dataclasses.asdict(config.mesh))
    opened = checkpoint.open_checkpoints(out, settings.keep_last, settings.keep_every)
    with jax.set_mesh(mesh), opened as checkpoints, contextlib.ExitStack() as stack:
        lm = shard_weights(lm, mesh)
        init = partial(init_state, config)
        abstract = jax.eval_shape(init, lm)
        checkpoint.check_room(out, abstract, config)
        if resume:
            restored = checkpoint.restore(checkpoints, abstract, mesh)
            data.batches.set_state({"next_index": checkpoint.resume_position(restored)})
            state = restored.state
        else:
            state = jax.jit(init, out_shardings=shardings(abstract, mesh))(lm)
        step_fn = jax.jit(partial(train_step, config=config), donate_argnums=0)
        loss_fn = jax.jit(partial(batch_loss, config=config))
        evaluation = {name: [shard_batch(b, mesh) for b in rows] for name, rows in data.evaluation.items()}
        every = evaluation_interval(lm.config, config, data.layout, data.evaluation)
        base: dict[str, float] = {}  # losses of the unsteered base LM: frozen, so measured once
        start = int(state.step)
        log = MetricsLog(out / "metrics.jsonl", start)
        stack.callback(log.close)
        begin = clock = time.perf_counter()
        evaluating = 0.0

        def settle(index: int, metrics: Metrics, batch: SteeringBatch) -> None:
            """Waits for a dispatched step's values, then checks, logs and reports them."""
            nonlocal clock
            row = {name: value.item() for name, value in jax.device_get(metrics).items()}
            now = time.perf_counter()
            seconds, clock = now - clock, now
            if not np.isfinite([row["loss"], row["grad_norm"]]).all():
                raise _not_finite(out, index, row, batch)
            log.write(index, row | {"seconds": round(seconds, 4)})
            if report is not None:
                report(Report(index + 1, row["loss"], row["tokens"] / seconds, {}, evaluating / (now - begin)))

        pending: tuple[int, Metrics, SteeringBatch] | None = None
        for index in range(start, settings.steps):
            batch, done = next(data.batches), index + 1
            last = done == settings.steps
            saves = last or (settings.save_every > 0 and done % settings.save_every == 0)
            evaluates = every > 0 and (last or done % every == 0)
            residual = None if cache is None else shard_batch(cache.read(batch), mesh)
            state, metrics = step_fn(state, lm, shard_batch(batch, mesh), residual=residual)
            if pending is not None:
                settle(*pending)
            pending = (index, metrics, batch)
            if not (saves or evaluates):
                continue
            settle(*pending)  # a state that is not finite must not be saved
            pending = None
            if saves:
                position = data.batches.get_state()["next_index"]
                checkpoint.save(checkpoints, done, state, position, config=config)
            if evaluates:
                clock = time.perf_counter()
                for name, rows in evaluation.items():
                    base.setdefault(name, evaluate_loss(loss_fn, state.hypernet, lm, list(map(unsteered, rows))))
                losses = {
                    name: EvalLoss(evaluate_loss(loss_fn, state.hypernet, lm, rows), base[name])
                    for name, rows in evaluation.items()
                }
                now = time.perf_counter()
                evaluating += now - clock
                share = evaluating / (now - begin)
                measured = {name: loss._asdict() for name, loss in losses.items()}
                log.write(index, {"evaluation": measured, "evaluation_share": round(share, 4)})
                if report is not None:
                    report(Report(done, metrics["loss"].item(), 0.0, losses, share))
            clock = time.perf_counter()
    return state


def _not_finite(out: Path, step: int, row: Metrics, batch: SteeringBatch) -> FloatingPointError:
    """Saves the batch and says where everything is."""
    path = out / f"not_finite_step{step}.npz"
    np.savez(path, **batch._asdict())
    return FloatingPointError(
        f"step {step} has loss {row['loss']} and gradient norm {row['grad_norm']}; its batch is saved in {path}. The "
        "last checkpoint is intact: start again from it with a lower train.learning_rate, or with "
        "train.compute_dtype float32"
    )
