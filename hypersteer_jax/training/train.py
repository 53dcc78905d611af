"""Training: the state, one pure step, and the loop around it."""

import dataclasses
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax import Array
from jax.sharding import Mesh
from jaxtyping import Float, Int

from hypersteer_jax.config import RunConfig, TrainConfig
from hypersteer_jax.data.batch import SteeringBatch
from hypersteer_jax.data.pipeline import collate
from hypersteer_jax.data.sources import TrainData
from hypersteer_jax.models.hypernet import Hypernet, init_hypernet
from hypersteer_jax.models.lm import LM
from hypersteer_jax.models.selection import annealed_temperature, mean_gate, selected_share
from hypersteer_jax.sharding import Share, agreement, make_mesh, shard_batch, shard_weights, shardings, share_of
from hypersteer_jax.steering import steered_residual
from hypersteer_jax.training import checkpoint
from hypersteer_jax.training.activations import ActivationCache
from hypersteer_jax.training.flops import evaluation_interval
from hypersteer_jax.training.ledger import LEDGER, Ledger
from hypersteer_jax.training.loss import response_loss
from hypersteer_jax.training.metrics import MetricsLog
from hypersteer_jax.training.preemption import Notice, Preempted, Watchdog

Metrics = dict[str, Any]
WARM = 10  # steps before a profile


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


def evaluate_loss(loss: Loss, hypernet: Hypernet, lm: LM, batches: Iterable[SteeringBatch]) -> float:
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
    notice: Notice | None = None,
    started: float | None = None,
) -> TrainState:
    """Trains to `config.train.steps`, with metrics, ledger, evaluation and checkpoints in `config.out`.

    Args:
        config: the run; already checked.
        lm: base LM in its own dtype; the computation's dtype follows it.
        data: from `load_data`.
        resume: continue from the newest checkpoint in `config.out`; if the run was ended before its first, start it.
        report: called after every step.
        cache: residuals of all rows of `data`, if they are kept (`train.cache`).
        notice: from `preemption.listen`, if the run has to stop when it is told.
        started: unix time from which the ledger counts; now if not given.

    Raises:
        CheckpointError: `config.out` cannot be written, already holds another run, or has a checkpoint that is not of
            this config.
        FloatingPointError: the loss is not finite; the batch is in `config.out`, and so is the last good checkpoint.
        Preempted: the run was told to stop; its state is saved.
    """
    settings, out = config.train, config.out
    notice, started = notice or Notice(), started or time.time()
    folder = checkpoint.run_path(out)
    if not resume and (folder / "checkpoints").exists():
        raise checkpoint.CheckpointError(
            f"out is {out}, which holds a run; continue it with --resume or give another folder"
        )
    checkpoint.write_config(out, config)
    mesh = make_mesh(**dataclasses.asdict(config.mesh))
    writes = jax.process_index() == 0
    with (
        jax.set_mesh(mesh),
        checkpoint.open_checkpoints(out, settings.keep_last, settings.keep_every) as checkpoints,
        closing(Ledger(folder / LEDGER if writes else None, started)) as ledger,
        Watchdog(settings.stuck_after) as watchdog,
    ):
        notice.leave_at_once(lambda: "nothing to save yet; start again with --resume")
        lm = shard_weights(lm, mesh)
        init = partial(init_state, config)
        abstract = jax.eval_shape(init, lm)
        checkpoint.check_room(out, abstract, config)
        if resume and checkpoint.stored(checkpoints):
            ledger.ended("init")
            restored = checkpoint.restore(checkpoints, abstract, mesh)
            state = restored.state
            data.batches.set_state({"next_index": checkpoint.resume_position(restored)})
            ledger.went_back(int(state.step))
            ledger.ended("restore", int(state.step))
        else:
            state = jax.jit(init, out_shardings=shardings(abstract, mesh))(lm)
            ledger.ended("init")
            notice.hold()
            checkpoint.save(checkpoints, 0, state, 0, config=config)
            ledger.ended("save", 0)
        start = int(state.step)

        def last_act() -> str:
            checkpoint.wait(checkpoints)
            return _saved(start, out)

        notice.leave_at_once(last_act)
        with closing(MetricsLog(folder / "metrics.jsonl" if writes else None, start)) as log:
            loop = _Loop(config, lm, data, cache, mesh, checkpoints, notice, watchdog, ledger, log, report)
            if start == settings.steps and not loop.owes_evaluation(start):
                return state
            loop.compile(state)
            return loop.run(state, start)


def _saved(step: int, out: Path) -> str:
    return f"preempted at step {step}; state saved in {out}; start again with --resume"


Shapes = tuple[tuple[int, ...], ...]


def _shapes(batch: SteeringBatch) -> Shapes:
    return tuple(array.shape for array in batch)


class _Abandoned(Exception):
    """An evaluation, because the run has to stop."""


@dataclass
class _Loop:
    """The steps of one attempt and what comes between them; `compile`, then `run`."""

    config: RunConfig
    lm: LM
    data: TrainData
    cache: ActivationCache | None
    mesh: Mesh
    checkpoints: checkpoint.Checkpoints
    notice: Notice
    watchdog: Watchdog
    ledger: Ledger
    log: MetricsLog
    report: Callable[[Report], None] | None

    def __post_init__(self) -> None:
        data, config = self.data, self.config
        self.every = evaluation_interval(self.lm.config, config, data.layout, data.evaluation)
        self.evaluation = {name: [shard_batch(b, self.mesh) for b in rows] for name, rows in data.evaluation.items()}
        self.base: dict[str, float] = {}  # losses of the unsteered base LM: frozen, so measured once
        self.steps: dict[Shapes, Callable[..., tuple[TrainState, Metrics]]] = {}
        self.losses: dict[Shapes, Loss] = {}
        self.ask = agreement(self.mesh)
        self.asked = self.ask(False)  # the newest answer, which may not be known yet
        self.stopping = False  # the newest answer that is
        self.pending: tuple[int, Metrics, SteeringBatch] | None = None  # the step whose values are not known yet
        self.loss = float("nan")  # of the last step whose values are known
        self.evaluating = 0.0  # seconds
        self.tracing = False  # for `train.profile`

    def compile(self, state: TrainState) -> None:
        """Compiles all that the run will need, so that no step does, and a shape that is too large is known now."""
        step = jax.jit(partial(train_step, config=self.config), donate_argnums=0)
        for batch in example_batches(self.data, self.config.train.batch, share_of(self.mesh)):
            if _shapes(batch) not in self.steps:
                placed, residual = self.place(batch)
                self.steps[_shapes(batch)] = step.lower(state, self.lm, placed, residual=residual).compile()
                self.watchdog.progress()
        loss = jax.jit(partial(batch_loss, config=self.config))
        for rows in self.evaluation.values() if self.every else ():
            if _shapes(rows[0]) not in self.losses:
                self.losses[_shapes(rows[0])] = loss.lower(state.hypernet, self.lm, rows[0]).compile()
                self.watchdog.progress()
        self.ask(False).block_until_ready()  # all processes are here
        self.ledger.ended("compile")

    def run(self, state: TrainState, start: int) -> TrainState:
        """From `start` to the last step."""
        settings = self.config.train
        self.notice.hold()
        self.begin = self.clock = time.perf_counter()
        if self.owes_evaluation(start):
            self.evaluate(state, start)
            if self.stopping:
                self.leave(start)
        first = start  # step of the current stretch
        for index in range(start, settings.steps):
            self.profile(index - start)
            state, done = self.step(state, index), index + 1
            last = done == settings.steps
            saves = last or (settings.save_every > 0 and done % settings.save_every == 0)
            if not (saves or self.evaluates(done) or self.stopping):
                continue
            self.settle()  # a state that is not finite must not be saved
            self.ledger.ended("step", first, done)
            first = done
            saves = saves or self.stopping
            if saves:
                self.save(state, done)
            if self.evaluates(done) and not self.stopping:
                self.evaluate(state, done)
            if self.stopping:
                if not saves:
                    self.save(state, done)
                self.leave(done)
            self.clock = time.perf_counter()
        if self.tracing:
            jax.profiler.stop_trace()
        checkpoint.wait(self.checkpoints)
        self.ledger.ended("save", settings.steps)
        return state

    def profile(self, step: int) -> None:
        """Begins and ends the trace of `train.profile` steps, counted from where this attempt began."""
        count = self.config.train.profile
        if count and step == WARM:
            jax.profiler.start_trace(str(checkpoint.run_path(self.config.out) / "profile"))
            self.tracing = True
        elif self.tracing and step == WARM + count:
            self.settle()
            jax.profiler.stop_trace()
            self.tracing = False

    def place(self, batch: SteeringBatch) -> tuple[SteeringBatch, Any]:
        """A batch and its residual, if they are kept, on the devices."""
        residual = None if self.cache is None else shard_batch(self.cache.read(batch), self.mesh)
        return shard_batch(batch, self.mesh), residual

    def step(self, state: TrainState, index: int) -> TrainState:
        """Dispatches a step, and waits for the one before it."""
        batch = next(self.data.batches)
        placed, residual = self.place(batch)
        self.asked = self.ask(self.notice.told)
        state, metrics = self.steps[_shapes(batch)](state, self.lm, placed, residual=residual)
        self.settle()
        self.pending = (index, metrics, batch)
        return state

    def settle(self) -> None:
        """Waits for the values of the last step but those that are known; checks, logs and reports them."""
        if self.pending is None:
            return
        (index, metrics, batch), self.pending = self.pending, None
        values, asked = jax.device_get((metrics, self.asked))
        row = {name: value.item() for name, value in values.items()}
        self.loss, self.stopping = row["loss"], bool(asked)
        self.watchdog.progress()
        now = time.perf_counter()
        seconds, self.clock = now - self.clock, now
        if not np.isfinite([row["loss"], row["grad_norm"]]).all():
            raise _not_finite(self.config.out, index, row, batch)
        self.log.write(index, row | {"seconds": round(seconds, 4)})
        if self.report is not None:
            share = self.evaluating / (now - self.begin)
            self.report(Report(index + 1, row["loss"], row["tokens"] / seconds, {}, share))

    def save(self, state: TrainState, done: int) -> None:
        """Starts saving, once the save before it is through."""
        position = self.data.batches.get_state()["next_index"]
        checkpoint.save(self.checkpoints, done, state, position, config=self.config)
        self.log.flush()
        self.watchdog.progress()
        self.ledger.ended("save", done)

    def leave(self, done: int) -> NoReturn:
        """Ends the run when its state is on disk."""
        checkpoint.wait(self.checkpoints)
        self.ledger.ended("save", done)
        raise Preempted(_saved(done, self.config.out))

    def evaluates(self, done: int) -> bool:
        """Whether there is an evaluation after so many steps."""
        return self.every > 0 and done > 0 and (done == self.config.train.steps or done % self.every == 0)

    def owes_evaluation(self, start: int) -> bool:
        """Whether the last attempt was ended in the evaluation after its last step; only one process has the log."""
        owes = self.evaluates(start) and jax.process_index() == 0 and not self.log.evaluated(start - 1)
        return bool(self.ask(owes))

    def evaluate(self, state: TrainState, done: int) -> None:
        """Measures, logs and reports the losses of all sets, unless the run has to stop."""
        begin = time.perf_counter()

        def loss(batches: list[SteeringBatch]) -> float:
            return evaluate_loss(self.losses[_shapes(batches[0])], state.hypernet, self.lm, self.heeding(batches))

        try:
            for name, rows in self.evaluation.items():
                if name not in self.base:
                    self.base[name] = loss([unsteered(batch) for batch in rows])
            losses = {name: EvalLoss(loss(rows), self.base[name]) for name, rows in self.evaluation.items()}
        except _Abandoned:
            self.ledger.ended("lost", done)
            return
        now = time.perf_counter()
        self.evaluating += now - begin
        share = self.evaluating / (now - self.begin)
        measured = {name: values._asdict() for name, values in losses.items()}
        self.log.write(done - 1, {"evaluation": measured, "evaluation_share": round(share, 4)})
        self.log.flush()
        self.ledger.ended("eval", done)
        if self.report is not None:
            self.report(Report(done, self.loss, 0.0, losses, share))

    def heeding(self, batches: list[SteeringBatch]) -> Iterator[SteeringBatch]:
        """The batches of an evaluation, as long as nobody is told to stop."""
        for batch in batches:
            self.stopping = bool(self.ask(self.notice.told))
            if self.stopping:
                raise _Abandoned
            yield batch
            self.watchdog.progress()


def example_batches(data: TrainData, batch: int, share: Share) -> list[SteeringBatch]:
    """This process's share of one batch of `batch` rows, for each shape that training meets."""
    sequences, bucket_of, buckets = data.layout
    shape = (batch // sequences.shape[1], sequences.shape[1])
    return [
        collate(data.rows, np.resize(sequences[bucket_of == index], shape), bucket, share)
        for index, bucket in enumerate(buckets)
    ]


def _not_finite(out: Path, step: int, row: Metrics, batch: SteeringBatch) -> FloatingPointError:
    """Saves the batch and says where everything is."""
    share = f"_process{jax.process_index()}" if jax.process_count() > 1 else ""
    path = checkpoint.run_path(out) / f"not_finite_step{step}{share}.npz"
    with path.open("wb") as file:
        np.savez(file, **batch._asdict())
    return FloatingPointError(
        f"step {step} has loss {row['loss']} and gradient norm {row['grad_norm']}; its batch is saved in {path}. The "
        "last checkpoint is intact: start again from it with a lower train.learning_rate, or with "
        "train.compute_dtype float32"
    )
