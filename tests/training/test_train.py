"""Training on a tiny LM: the optimiser by hand, the step on one device and on eight, and runs that are interrupted."""

import dataclasses
import itertools
import json
import sys
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from hypersteer_jax.config import (
    DataConfig,
    HypernetConfig,
    MeshConfig,
    RunConfig,
    SelectionConfig,
    SteeringConfig,
    TrainConfig,
)
from hypersteer_jax.data.batch import SteeringBatch
from hypersteer_jax.data.pipeline import BatchSource, Bucket, collate, evaluation_batches, iterator, make_layout
from hypersteer_jax.data.sources import TrainData
from hypersteer_jax.hlo import read_traffic
from hypersteer_jax.sharding import make_mesh, shard_batch, shard_weights, shardings, share_of
from hypersteer_jax.training.activations import open_cache
from hypersteer_jax.training.checkpoint import CheckpointError, open_checkpoints, restore, stored
from hypersteer_jax.training.ledger import account
from hypersteer_jax.training.preemption import EXIT_CODE, Notice, Preempted, Watchdog
from hypersteer_jax.training.train import (
    Report,
    TrainState,
    evaluate_loss,
    init_state,
    learning_rate,
    make_optimizer,
    next_temperature,
    train,
    train_step,
    unsteered,
)
from tests.conftest import random_rows
from tests.models.tiny import CONFIGS, random_lm

LM = random_lm(CONFIGS["gemma2"])
ROWS = random_rows([4, 5, 6, 7] * 4, [9, 12, 14, 16] * 4, [3, 5, 4, 6] * 4)
DATA = DataConfig(buckets=1, pack=False)
CONFIG = RunConfig(
    hypernet=HypernetConfig(blocks=1),
    steering=SteeringConfig(layers=(1,)),
    mesh=MeshConfig(fsdp=1),
    data=DATA,
    train=TrainConfig(
        steps=4,
        batch=4,
        learning_rate=1e-2,
        factor_range=(0.5, 1.5),
        compute_dtype="float32",
        eval_every=2,
        eval_share=1.0,  # as often as is asked for
        save_every=2,
    ),
)


def having(config: RunConfig, **settings: Any) -> RunConfig:
    return dataclasses.replace(config, train=dataclasses.replace(config.train, **settings))


def assert_same(one: Any, two: Any) -> None:
    for left, right in zip(jax.tree.leaves(one), jax.tree.leaves(two), strict=True):
        np.testing.assert_array_equal(left, right)


# Schedules and the optimiser


@pytest.mark.parametrize(
    ("schedule", "halfway", "end"), [("linear", 0.5, 0.0), ("cosine", 0.5, 0.0), ("constant", 1.0, 1.0)]
)
@pytest.mark.parametrize("warmup", [0, 10])
def test_learning_rate(schedule: str, halfway: float, end: float, warmup: int) -> None:
    rate = learning_rate(TrainConfig(steps=110 - (10 - warmup), learning_rate=2.0, schedule=schedule, warmup=warmup))
    for step in range(warmup):
        assert float(rate(step)) == pytest.approx(2.0 * step / warmup)
    assert float(rate(warmup)) == pytest.approx(2.0)
    assert float(rate(warmup + 50)) == pytest.approx(2.0 * halfway)
    assert float(rate(warmup + 100)) == pytest.approx(2.0 * end, abs=1e-7)


def test_cosine_is_not_linear() -> None:
    rate = learning_rate(TrainConfig(steps=100, learning_rate=1.0, schedule="cosine"))
    assert float(rate(25)) == pytest.approx((1 + np.cos(np.pi / 4)) / 2, rel=1e-6)


def test_clip_and_adamw_by_hand() -> None:
    config = TrainConfig(steps=10, learning_rate=0.1, clip=1.0, weight_decay=0.2)
    optimizer = make_optimizer(config)
    weights = {"a": np.array([1.0, -2.0]), "b": np.array([[3.0]])}
    state = optimizer.init(jax.tree.map(jnp.float32, weights))
    m, v = ({name: 0 * w for name, w in weights.items()} for _ in range(2))
    steps = ({"a": np.array([3.0, 0.0]), "b": np.array([[4.0]])}, {"a": np.array([0.3, 0.1]), "b": np.array([[-0.2]])})
    for index, gradient in enumerate(steps):  # the first is clipped from 5 to 1, the second is not
        updates, state = optimizer.update(
            jax.tree.map(jnp.float32, gradient), state, jax.tree.map(jnp.float32, weights)
        )
        norm = np.sqrt(sum(np.sum(np.square(g)) for g in gradient.values()))
        rate = 0.1 * (1 - index / 10)
        for name, g in gradient.items():
            g = g / max(norm, 1.0)
            m[name] = 0.9 * m[name] + 0.1 * g
            v[name] = 0.999 * v[name] + 0.001 * g**2
            corrected = m[name] / (1 - 0.9 ** (index + 1)), v[name] / (1 - 0.999 ** (index + 1))
            expected = -rate * (corrected[0] / (np.sqrt(corrected[1]) + 1e-8) + 0.2 * weights[name])
            np.testing.assert_allclose(updates[name], expected, rtol=1e-4, atol=1e-8)
            weights[name] = weights[name] + expected


# One step

ONE_BATCH = having(CONFIG, steps=1000, batch=8)
LAYOUT = make_layout(ROWS, DATA, seed=0)
BATCH = collate(ROWS, np.arange(8)[:, None], LAYOUT.buckets[0])
step_fn = jax.jit(partial(train_step, config=ONE_BATCH))


@pytest.fixture(scope="module")
def start() -> TrainState:
    return jax.jit(partial(init_state, ONE_BATCH))(LM)


def test_loss_falls(start: TrainState) -> None:
    state, losses = start, []
    for index in range(20):
        state, metrics = step_fn(state, LM, BATCH)
        losses.append(float(metrics["loss"]))
        assert int(state.step) == index + 1
        assert int(metrics["tokens"]) == BATCH.response_mask.sum()
        assert float(metrics["learning_rate"]) == pytest.approx(1e-2 * (1 - index / 1000), rel=1e-5)
    assert np.mean(losses[-3:]) < 0.8 * losses[0], losses
    assert_same(LM, random_lm(CONFIGS["gemma2"]))


def test_step_is_pure(start: TrainState) -> None:
    before = jax.tree.map(np.array, start)
    one, two = step_fn(start, LM, BATCH), step_fn(start, LM, BATCH)
    assert_same(one, two)
    assert_same(start, before)
    moved = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), one[0].hypernet, start.hypernet)
    assert sorted(jax.tree.leaves(moved))[1] > 0  # every leaf but the final norm, which is not used


def test_factor_is_sampled_by_step(start: TrainState) -> None:
    later = start._replace(step=start.step + 1)
    losses = [float(step_fn(state, LM, BATCH)[1]["loss"]) for state in (start, later)]
    assert abs(losses[0] - losses[1]) > 1e-4
    unsteered = [
        float(step_fn(state, LM, BATCH._replace(factor=0 * BATCH.factor))[1]["loss"]) for state in (start, later)
    ]
    assert unsteered[0] == unsteered[1]  # the sample multiplies each row's own factor


HEAD = SelectionConfig(on=True, temperature_start=0.8, temperature_end=0.2, sparsity=0.5)
GATED = dataclasses.replace(ONE_BATCH, selection=HEAD)
gated_step = jax.jit(train_step, static_argnames="config")


@pytest.fixture(scope="module")
def gated() -> TrainState:
    return jax.jit(partial(init_state, GATED))(LM)


def test_selection_head_changes_nothing_else_of_the_start(start: TrainState, gated: TrainState) -> None:
    one, two = (
        {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(state.hypernet)}
        for state in (start, gated)
    )
    assert len(two) == len(one) + 5
    assert_same(one, {name: leaf for name, leaf in two.items() if "selection" not in name})


def test_penalty_and_selected_share_are_logged(gated: TrainState) -> None:
    _, metrics = gated_step(gated, LM, BATCH, config=GATED)
    assert 0 < float(metrics["selected"]) < 1
    steered = BATCH.steer_mask.sum(1) / BATCH.mask.sum(1)
    assert 0.1 < float(metrics["penalty"]) / (HEAD.sparsity * steered.mean()) < 0.9  # its gates start around a half


def test_noise_depends_on_seed_and_step_only(gated: TrainState) -> None:
    def loss(state: TrainState, config: RunConfig) -> float:
        return float(gated_step(state, LM, BATCH, config=config)[1]["loss"])

    fixed = having(GATED, factor_range=None)
    later, reseeded = gated._replace(step=gated.step + 1), having(fixed, seed=1)
    found = [loss(gated, fixed), loss(later, fixed), loss(gated, reseeded)]
    assert found[0] == loss(gated, fixed)
    assert min(abs(a - b) for a, b in itertools.combinations(found, 2)) > 1e-5


def test_temperature_falls_to_its_end_with_the_last_step(gated: TrainState) -> None:
    state, found = gated, []
    for _ in range(3):
        found.append(float(state.hypernet.selection.temperature[...]))
        state, _ = gated_step(state, LM, BATCH, config=GATED)
    assert found == pytest.approx([0.8, 0.7994, 0.7988], abs=1e-6)  # of a thousand steps
    assert float(next_temperature(jnp.asarray(0.3), jnp.asarray(0.0), jnp.asarray(999), GATED)) == pytest.approx(0.2)


def test_learned_temperature_has_its_own_rate() -> None:
    """Adam's first step is the learning rate, whatever the gradient; the second is scheduled as all others are."""
    selection = dataclasses.replace(HEAD, learnable_temperature=True, temperature_learning_rate=0.03)
    config = dataclasses.replace(having(GATED, steps=2, clip=1e3), selection=selection)
    state = jax.jit(partial(init_state, config))(LM)
    moves = []
    for _ in range(2):
        before = state.hypernet.selection
        state, _ = gated_step(state, LM, BATCH, config=config)
        after = state.hypernet.selection
        moves.append(
            [abs(float(after.temperature[...] - before.temperature[...])), np.abs(after.bias - before.bias)[0]]
        )
    assert moves[0] == pytest.approx([0.03, 1e-2], rel=1e-3)
    assert moves[1][0] < 0.6 * 0.03


PAIRS = np.arange(16).reshape(8, 2)
PACKED = collate(ROWS, PAIRS, Bucket(tokens=32, context=8, response=24, concept=8, rows=2))
MANY_ROWS = dataclasses.replace(ROWS, concepts=ROWS.concepts[:5] * 3 + ROWS.concepts[:1], context=False)
SHARED = collate(MANY_ROWS, PAIRS, Bucket(tokens=32, context=8, response=24, concept=8, rows=2))


@pytest.mark.parametrize(
    ("variant", "batch", "selection", "axes", "share"),
    [
        ("cross_attention", PACKED, HEAD, {"data": 2, "fsdp": 2, "tensor": 2}, 4),
        ("no_context", SHARED, SelectionConfig(), {"fsdp": 8}, 8),
        ("in_context", BATCH, SelectionConfig(), {"data": 4, "tensor": 2}, 2),
    ],
)
def test_eight_devices_do_what_one_does(
    variant: str, batch: SteeringBatch, selection: SelectionConfig, axes: dict[str, int], share: int
) -> None:
    assert (len(batch.concept_tokens) < len(batch.factor)) == (variant == "no_context")
    config = dataclasses.replace(ONE_BATCH, hypernet=HypernetConfig(variant, blocks=1), selection=selection)
    step = jax.jit(partial(train_step, config=config))
    start = jax.jit(partial(init_state, config))(LM)
    alone, told = step(start, LM, batch)
    mesh = make_mesh(**axes)
    with jax.set_mesh(mesh):
        state, lm, shards = shard_weights(start, mesh), shard_weights(LM, mesh), shard_batch(batch, mesh)
        assert shards.tokens.addressable_shards[0].data.shape[0] * share_of(mesh).ways == len(batch.tokens)
        together, metrics = step(state, lm, shards)
    for name in ("loss", "grad_norm"):
        np.testing.assert_allclose(float(metrics[name]), float(told[name]), rtol=1e-5)
    assert int(metrics["tokens"]) == int(told["tokens"])
    ours, theirs = adam(together), adam(alone)
    largest = max(float(jnp.abs(m).max()) for m in jax.tree.leaves(theirs.mu))
    for one, two in zip(jax.tree.leaves(ours.mu), jax.tree.leaves(theirs.mu), strict=True):
        np.testing.assert_allclose(one, two, atol=1e-5 * largest, rtol=1e-5)  # a tenth of the clipped gradient
    for leaf, wanted in zip(jax.tree.leaves(together), jax.tree.leaves(shardings(together, mesh)), strict=True):
        assert leaf.sharding.is_equivalent_to(wanted, leaf.ndim), leaf.shape
    per_device = sum(leaf.addressable_shards[0].data.size for leaf in jax.tree.leaves(ours))
    # What is not split: vectors, and matrices of a selection head.
    assert per_device < (1 / share + 0.03) * sum(leaf.size for leaf in jax.tree.leaves(ours))


def test_what_the_devices_exchange() -> None:
    """Each weight when it is used and once more going back, each gradient once; the embedding tables stay in place."""
    mesh, layers, above = make_mesh(fsdp=8), LM.config.layers, LM.config.layers - 1 - CONFIG.steering.layers[0]
    config = dataclasses.replace(ONE_BATCH, hypernet=HypernetConfig(blocks=2))
    with jax.set_mesh(mesh):
        lm = shard_weights(LM, mesh)
        state = shard_weights(jax.jit(partial(init_state, config))(LM), mesh)
        step = jax.jit(partial(train_step, config=config), donate_argnums=0)
        text = step.lower(state, lm, shard_batch(PACKED, mesh)).compile().as_text()
    moved = {each.kind: each.bytes for each in read_traffic(text).collectives}
    assert set(moved) == {"all-gather", "all-reduce", "all-to-all"}

    def split(tree: Any) -> int:
        return sum(leaf.nbytes for leaf in jax.tree.leaves(tree) if not leaf.sharding.is_fully_replicated)

    base, hypernet = split(lm.blocks), state.hypernet
    once = base + split(hypernet.blocks) + split(hypernet.head) + split(lm.embedding)  # the table as the logits' head
    again = base * above // layers + split(hypernet.blocks)
    assert 0.95 * (once + again) < moved["all-gather"] < once + again  # going back, not every product is needed
    gradients = sum(leaf.nbytes for leaf in jax.tree.leaves(hypernet)) - split(hypernet.embedding)
    assert moved["all-reduce"] == pytest.approx(gradients, abs=256)  # and a few scalars
    assert moved["all-to-all"] < split(hypernet.embedding)  # what was looked up


def adam(state: TrainState) -> Any:
    [moments] = [part for part in jax.tree.leaves(state.opt_state, is_leaf=has_moments) if has_moments(part)]
    return moments


def has_moments(part: Any) -> bool:
    return hasattr(part, "mu")


# Runs


def data(rows: Any = ROWS, evaluate: bool = False) -> TrainData:
    layout, evaluation = make_layout(rows, DATA, seed=0), {"held-in": evaluation_batches(ROWS, 4, 2)}
    return TrainData(rows, layout, iterator(rows, layout, 4, seed=0), evaluation if evaluate else {})


def metrics_of(out: Path) -> list[dict]:
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{name: row[name] for name in row if name not in ("seconds", "evaluation_share")} for row in rows]


class Run(NamedTuple):
    config: RunConfig
    state: TrainState
    data: TrainData
    reports: list[Report]


class Stop(Exception):
    """What kills a run in these tests."""


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Run:
    config = dataclasses.replace(CONFIG, out=tmp_path_factory.mktemp("whole") / "run")
    stream, reports = data(evaluate=True), []
    return Run(config, train(config, LM, stream, report=reports.append), stream, reports)


def test_run_leaves_metrics_and_reports(whole: Run) -> None:
    rows = metrics_of(whole.config.out)
    assert [row["step"] for row in rows] == [0, 1, 1, 2, 3, 3]
    steps, evaluations = ([row for row in rows if (name in row)] for name in ("loss", "evaluation"))
    assert [row["learning_rate"] for row in steps] == pytest.approx([1e-2, 0.75e-2, 0.5e-2, 0.25e-2])
    assert [report.loss for report in whole.reports if not report.evaluation] == [row["loss"] for row in steps]
    assert [report.step for report in whole.reports] == [1, 2, 2, 3, 4, 4]
    shares = [report.evaluation_share for report in whole.reports]
    assert shares[:2] == [0, 0]
    assert 0 < shares[2] < 1
    first, last = (row["evaluation"]["held-in"] for row in evaluations)
    assert first["unsteered"] == last["unsteered"]  # the base LM is frozen
    assert last["steered"] < first["steered"]
    assert_same(LM, random_lm(CONFIGS["gemma2"]))  # still there, though the state is donated at every step


def test_interrupted_run_goes_on_bitwise(whole: Run, tmp_path: Path) -> None:
    config = dataclasses.replace(whole.config, out=tmp_path / "run")

    def kill(report: Report) -> None:
        if report.step == 3:
            raise Stop

    with pytest.raises(Stop):
        train(config, LM, data(evaluate=True), report=kill)
    assert [row["step"] for row in metrics_of(config.out)] == [0, 1, 1, 2]  # one step beyond the checkpoint
    stream, steps = data(evaluate=True), []
    state = train(config, LM, stream, resume=True, report=lambda report: steps.append(report.step))
    assert steps == [3, 4, 4]
    assert jax.tree.structure(state) == jax.tree.structure(whole.state)
    assert_same(state, whole.state)
    assert int(state.step) == 4
    assert_same(next(stream.batches), next(whole.data.batches))
    assert metrics_of(config.out) == metrics_of(whole.config.out)


def test_run_that_was_killed_in_an_evaluation_makes_it_first(
    whole: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = dataclasses.replace(whole.config, out=tmp_path / "run")

    def kill(*_: Any) -> float:
        raise Stop

    with monkeypatch.context() as patch:
        patch.setattr("hypersteer_jax.training.train.evaluate_loss", kill)
        with pytest.raises(Stop):
            train(config, LM, data(evaluate=True))
    reports: list[Report] = []
    assert_same(train(config, LM, data(evaluate=True), resume=True, report=reports.append), whole.state)
    assert [(report.step, "held-in" in report.evaluation) for report in reports] == [
        *((2, True), (3, False)),
        *((4, False), (4, True)),
    ]
    assert metrics_of(config.out) == metrics_of(whole.config.out)


@pytest.mark.parametrize(
    ("settings", "told_after", "evaluated", "stops_at", "evaluations"),
    [
        ({}, 1, False, 2, []),  # in the evaluation, when the step is saved already
        ({"save_every": 0}, 1, False, 2, []),  # in the evaluation, and the step has to be saved
        ({"save_every": 0, "eval_every": 0}, 1, False, 3, []),  # one step was on its way, and one waits for its values
        ({}, 2, True, 4, [1]),  # at the end, when only an evaluation is missing
    ],
)
def test_run_that_is_told_to_stop_saves_and_goes_on_bitwise(
    whole: Run,
    tmp_path: Path,
    settings: dict[str, int],
    told_after: int,
    evaluated: bool,
    stops_at: int,
    evaluations: list[int],
) -> None:
    config, notice = dataclasses.replace(having(whole.config, **settings), out=tmp_path / "run"), Notice()

    def tell(report: Report) -> None:
        if (report.step, bool(report.evaluation)) == (told_after, evaluated):
            notice.give("the test")

    message = f"preempted at step {stops_at}; state saved in .*run; start again with --resume"
    with pytest.raises(Preempted, match=message):
        train(config, LM, data(evaluate=True), report=tell, notice=notice)
    rows = metrics_of(config.out)
    assert [row["step"] for row in rows if "loss" in row] == list(range(stops_at))
    assert [row["step"] for row in rows if "evaluation" in row] == evaluations
    with open_checkpoints(config.out) as checkpoints:
        assert stored(checkpoints)[-1] == stops_at
    assert_same(train(config, LM, data(evaluate=True), resume=True), whole.state)
    measures = config.train.eval_every > 0
    expected = [row for row in metrics_of(whole.config.out) if measures or "evaluation" not in row]
    assert metrics_of(config.out) == expected
    found = account(config.out)
    assert found.attempts == 2
    assert sum(found.seconds.values()) == pytest.approx(found.wall, abs=1e-2)
    assert min(seconds for kind, seconds in found.seconds.items() if measures or kind != "eval") > 0


def test_run_that_is_told_to_stop_while_it_compiles_leaves_at_once(
    whole: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config, notice = dataclasses.replace(whole.config, out=tmp_path / "run"), Notice()

    def leave(code: int) -> None:
        assert code == EXIT_CODE
        raise Stop

    def told(*args: Any, **settings: Any) -> Any:
        notice.give("told by the test")
        return train_step(*args, **settings)

    with monkeypatch.context() as patch:
        patch.setattr("os._exit", leave)
        patch.setattr("hypersteer_jax.training.train.train_step", told)
        with pytest.raises(Stop):
            train(config, LM, data(evaluate=True), notice=notice)
    assert capsys.readouterr().err == (
        f"told by the test: preempted at step 0; state saved in {config.out}; start again with --resume\n"
    )
    with open_checkpoints(config.out) as checkpoints:
        assert stored(checkpoints) == [0]
    assert_same(train(config, LM, data(evaluate=True), resume=True), whole.state)
    assert metrics_of(config.out) == metrics_of(whole.config.out)


def test_run_that_was_told_to_stop_before_does_nothing(tmp_path: Path) -> None:
    notice = Notice()
    notice.hold()
    notice.give("the test")
    with pytest.raises(Preempted, match="nothing to save yet; start again with --resume"):
        train(dataclasses.replace(CONFIG, out=tmp_path / "run"), LM, data(), notice=notice)


def test_watchdog_sees_every_kind_of_progress(whole: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, seen = dataclasses.replace(having(whole.config, stuck_after=77.0), out=tmp_path / "run"), []

    class Watched(Watchdog):
        def progress(self) -> None:
            seen.append(sys._getframe(1).f_code.co_name)
            assert self._seconds == 77

    monkeypatch.setattr("hypersteer_jax.training.train.Watchdog", Watched)
    train(config, LM, data(evaluate=True))
    batches = 3 * 2  # of the base LM once, and of the steered one after two of the steps
    assert Counter(seen) == {"__enter__": 1, "compile": 2, "settle": 4, "save": 2, "heeding": batches}


def test_finished_run_has_nothing_to_do(whole: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hypersteer_jax.training.train.train_step", None)
    before = metrics_of(whole.config.out)
    assert_same(train(whole.config, LM, data(evaluate=True), resume=True), whole.state)
    assert metrics_of(whole.config.out) == before


def test_step_is_traced_once_for_each_shape(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = random_rows([4, 5, 6, 7] * 6, [9, 16, 22, 30] * 6, [3, 5, 12, 6] * 6)
    settings = DataConfig(buckets=3)
    layout = make_layout(rows, settings, seed=0)
    source, steps = BatchSource(rows, layout, 2, seed=0), 12  # two epochs
    used = {tuple(leaf.shape for leaf in jax.tree.leaves(source[index])) for index in range(steps)}
    traced = []

    def counted(state: Any, lm: Any, batch: SteeringBatch, config: Any, residual: Any) -> Any:
        traced.append(tuple(leaf.shape for leaf in jax.tree.leaves(batch)))
        return train_step(state, lm, batch, config, residual)

    monkeypatch.setattr("hypersteer_jax.training.train.train_step", counted)
    config = dataclasses.replace(having(CONFIG, steps=steps, eval_every=0, save_every=0), out=tmp_path / "run")
    known = []
    stream = TrainData(rows, layout, iterator(rows, layout, 4, seed=0), {})
    train(config, LM, stream, report=lambda _: known.append(len(traced)))
    assert len(used) > 1
    assert sorted(traced) == sorted(used)
    assert known == [len(used)] * steps  # all before the first step


def test_folder_that_holds_a_run_is_refused(whole: Run) -> None:
    before = metrics_of(whole.config.out)
    with pytest.raises(
        CheckpointError, match=r"run, which holds a run; continue it with --resume or give another folder"
    ):
        train(whole.config, LM, data())
    assert metrics_of(whole.config.out) == before


def test_run_that_was_ended_before_its_first_checkpoint_starts(whole: Run, tmp_path: Path) -> None:
    config = dataclasses.replace(whole.config, out=tmp_path / "run")
    (config.out / "checkpoints").mkdir(parents=True)
    assert_same(train(config, LM, data(evaluate=True), resume=True), whole.state)
    assert metrics_of(config.out) == metrics_of(whole.config.out)


def test_loss_that_is_not_finite_stops_the_run(tmp_path: Path) -> None:
    source = BatchSource(ROWS, LAYOUT, 4, seed=0)
    order = [source[index] for index in range(4)]
    bad = next(row for row, tokens in enumerate(ROWS.tokens) if (order[2].tokens[0, : len(tokens)] == tokens).all())
    factors = ROWS.factors.copy()
    factors[bad] = np.nan
    config = dataclasses.replace(CONFIG, out=tmp_path / "run")
    with pytest.raises(FloatingPointError, match=r"step 2 has loss nan .*saved in .*not_finite_step2\.npz") as error:
        train(config, LM, data(dataclasses.replace(ROWS, factors=factors)))
    assert "lower train.learning_rate" in str(error.value)
    batch = SteeringBatch(**np.load(config.out / "not_finite_step2.npz"))
    assert_same(batch._replace(factor=order[2].factor), order[2])
    assert np.isnan(batch.factor).tolist() == [True, False, False, False]
    assert [row["step"] for row in metrics_of(config.out)] == [0, 1, 1]
    with open_checkpoints(config.out) as checkpoints:
        state = restore(checkpoints, jax.eval_shape(partial(init_state, config), LM), make_mesh()).state
    assert int(state.step) == 2
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state))


def test_profile_is_left_beside_the_run(tmp_path: Path) -> None:
    config = dataclasses.replace(having(CONFIG, steps=12, eval_every=0, save_every=0, profile=1), out=tmp_path / "run")
    train(config, LM, data())
    assert [path.suffixes for path in (config.out / "profile").rglob("*.pb")] == [[".xplane", ".pb"]]


def test_evaluation_is_a_mean_over_tokens() -> None:
    def loss(hypernet: Any, lm: Any, batch: SteeringBatch) -> tuple[float, int]:
        return float(batch.factor[0]), 1 if batch.tokens[0, 0] == BATCH.tokens[0, 0] else 3

    second = BATCH._replace(tokens=BATCH.tokens[::-1], factor=5 * BATCH.factor)
    assert evaluate_loss(loss, None, LM, [BATCH, second]) == (1 * 1 + 5 * 3) / 4
    assert evaluate_loss(loss, None, LM, list(map(unsteered, [BATCH, second]))) == 0
    assert evaluate_loss(loss, None, LM, []) == 0


def test_evaluation_can_be_switched_off(tmp_path: Path) -> None:
    config = dataclasses.replace(having(CONFIG, eval_every=0, steps=2), out=tmp_path / "run")
    train(config, LM, data(evaluate=True))
    assert [row["step"] for row in metrics_of(config.out)] == [0, 1]


def test_cached_residuals_change_nothing_but_the_work(tmp_path: Path) -> None:
    config = dataclasses.replace(having(CONFIG, eval_every=0, cache="memory"), out=tmp_path / "cached")
    stream = data()
    cache = open_cache(config, LM, stream.rows, "", Console(quiet=True))
    cached = train(config, LM, stream, cache=cache)
    plain = train(dataclasses.replace(config, out=tmp_path / "plain"), LM, data())
    for one, two in zip(jax.tree.leaves(cached), jax.tree.leaves(plain), strict=True):
        np.testing.assert_allclose(one, two, atol=1e-5)
    zeros = cache._replace(residual=0 * cache.residual)
    other = train(dataclasses.replace(config, out=tmp_path / "zeros"), LM, data(), cache=zeros)
    moved = [float(jnp.abs(a - b).max()) for a, b in zip(*map(jax.tree.leaves, (cached, other)), strict=True)]
    assert max(moved) > 1e-3  # what is cached is what is read
