"""The formula against the products in the step itself, traced at full size without a weight being allocated."""

import dataclasses
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.extend.core import Jaxpr, jaxprs_in_params

from hypersteer_jax.config import HypernetConfig, LMConfig, RunConfig, SelectionConfig, SteeringConfig, TrainConfig
from hypersteer_jax.data.batch import SteeringBatch
from hypersteer_jax.data.pipeline import Bucket, Layout
from hypersteer_jax.models.hypernet import Hypernet
from hypersteer_jax.models.lm import LM, cast
from hypersteer_jax.models.presets import PRESETS
from hypersteer_jax.training.flops import StepFlops, evaluation_interval, step_flops
from hypersteer_jax.training.loss import response_loss
from hypersteer_jax.training.train import TrainState, batch_loss, init_state, train_step
from tests.models.tiny import CONFIGS

SHORT = Bucket(tokens=128, context=48, response=80, concept=32)
MIDDLE = Bucket(tokens=192, context=64, response=128, concept=48)
PACKED = Bucket(tokens=304, context=64, response=240, concept=24, rows=2)
LONG = Bucket(tokens=256, context=128, response=128, concept=64)
TINY = Bucket(tokens=24, context=16, response=12, concept=8)  # no two alike


def run(blocks: int, layers: tuple[int, ...], batch: int = 2, **hypernet: Any) -> RunConfig:
    return RunConfig(
        hypernet=HypernetConfig(blocks=blocks, **hypernet),
        steering=SteeringConfig(layers=layers),
        train=TrainConfig(batch=batch),
    )


def with_remat(config: RunConfig) -> RunConfig:
    return dataclasses.replace(config, train=dataclasses.replace(config.train, remat=True))


def batch_of(rows: int, shape: Bucket, prompts: int | None = None) -> SteeringBatch:
    def array(dtype: Any, *lengths: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(lengths, dtype)

    t, c, r, p, each = shape
    s, u = rows // each, prompts or rows
    return SteeringBatch(
        tokens=array(jnp.int32, s, t),
        segments=array(jnp.int32, s, t),
        steer_mask=array(jnp.bool, s, t),
        context_index=array(jnp.int32, rows, c),
        context_mask=array(jnp.bool, rows, c),
        response_index=array(jnp.int32, s, r),
        response_tokens=array(jnp.int32, s, r),
        response_share=array(jnp.float32, s, r),
        concept_tokens=array(jnp.int32, u, p),
        concept_mask=array(jnp.bool, u, p),
        concept_row=array(jnp.int32, rows),
        factor=array(jnp.float32, rows),
        row=array(jnp.int32, rows),
    )


def abstract(lm_config: LMConfig, config: RunConfig) -> tuple[LM, TrainState]:
    """Shapes of the base LM in bfloat16 and of the state; nothing is allocated."""
    lm = jax.eval_shape(lambda: cast(LM(lm_config, nnx.Rngs(0)), jnp.bfloat16))
    return lm, jax.eval_shape(partial(init_state, config), lm)


def count(jaxpr: Jaxpr) -> int:
    """FLOPs of all matrix products, those in the body of a scan as often as it runs."""
    total = 0
    for equation in jaxpr.eqns:
        name, params = equation.primitive.name, equation.params
        inner = sum(count(body) for body in jaxprs_in_params(params))
        assert inner == 0 or name not in ("while", "cond"), f"{name}: how often its products run is not known"
        total += inner * params["length"] if name == "scan" else inner
        if name == "dot_general":
            (contracted, _), _ = params["dimension_numbers"]
            [left, _], [out] = equation.invars, equation.outvars
            total += 2 * math.prod(out.aval.shape) * math.prod(left.aval.shape[axis] for axis in contracted)
    return total


def count_of(function: Callable[..., Any], *arguments: Any) -> int:
    return count(jax.make_jaxpr(function)(*arguments).jaxpr)


def counted(lm_config: LMConfig, config: RunConfig, shape: Bucket, prompts: int | None = None) -> int:
    lm, state = abstract(lm_config, config)
    return count_of(partial(train_step, config=config), state, lm, batch_of(config.train.batch, shape, prompts))


# The counter itself


def test_counter_by_hand() -> None:
    def products(x: jax.Array, w: jax.Array) -> jax.Array:
        y = jnp.einsum("bmk,bkn->bmn", x, w)  # 2 · 6 · 3 · 4 · 5
        return jax.lax.scan(lambda carry, _: (jax.jit(jnp.matmul)(carry, jnp.ones((5, 5))), None), y, length=7)[0]

    assert count_of(products, jnp.ones((6, 3, 4)), jnp.ones((6, 4, 5))) == 2 * 6 * 3 * 4 * 5 + 7 * 2 * 6 * 3 * 5 * 5


def test_counter_refuses_a_loop_of_unknown_length() -> None:
    def loop(x: jax.Array) -> jax.Array:
        return jax.lax.while_loop(lambda x: x.sum() < 9, lambda x: x @ x, x)

    with pytest.raises(AssertionError, match="while: how often"):
        count_of(loop, jnp.ones((2, 2)))


# The step at full size

FULL = {
    "2b": ("gemma-2-2b", run(22, (20,), batch=12), MIDDLE),
    "2b-short": ("gemma-2-2b", run(22, (20,), batch=12), SHORT),
    "2b-packed": ("gemma-2-2b", run(22, (20,), batch=12), PACKED),
    "2b-release": ("gemma-2-2b", run(4, (20,), batch=12), LONG),
    "9b": ("gemma-2-9b", run(34, (20,), batch=4), MIDDLE),
    "9b-layer-31": ("gemma-2-9b", run(34, (31,), batch=4), LONG),
    "llama": ("llama-3.1-8b", run(8, (15,), batch=4), MIDDLE),
}


@pytest.mark.parametrize("name", FULL)
def test_step_wastes_nothing(name: str) -> None:
    preset, config, shape = FULL[name]
    lm = PRESETS[preset]
    executed, flops = counted(lm, config, shape), step_flops(lm, config, shape)
    assert executed == flops.total
    assert 1.0 <= executed / flops.minimal < 1.03
    assert flops.blocks_again == 0


@pytest.mark.parametrize("name", ["2b", "2b-packed", "9b"])
def test_xla_counts_at_most_three_percent_above_the_formula(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """XLA's own count of the whole step, elementwise work and optimizer included.

    It counts the body of a loop once, so loops are unrolled while the step is traced; one that stayed would show as far
    less than the formula.
    """
    monkeypatch.setattr(jax.lax, "scan", partial(jax.lax.scan, unroll=True))
    monkeypatch.setattr(jax.lax, "map", lambda f, xs: jax.lax.scan(lambda _, x: (None, f(x)), None, xs)[1])
    preset, config, shape = FULL[name]
    lm, state = abstract(PRESETS[preset], config)
    step = jax.jit(partial(train_step, config=config)).lower(state, lm, batch_of(config.train.batch, shape))
    assert 1.0 <= step.cost_analysis()["flops"] / step_flops(PRESETS[preset], config, shape).minimal <= 1.03


def test_a_step_that_also_trains_the_lm_is_seen() -> None:
    lm_config, config, shape = PRESETS["gemma-2-2b"], *FULL["2b"][1:]
    lm, state = abstract(lm_config, config)
    both = jax.grad(partial(batch_loss, config=config), argnums=(0, 1), has_aux=True)
    executed = count_of(both, state.hypernet, lm, batch_of(12, shape))
    assert executed > 1.4 * step_flops(lm_config, config, shape).total


# Every part and every option, on tiny shapes


@pytest.mark.parametrize("again", [False, True], ids=["kept", "remat"])
@pytest.mark.parametrize("family", CONFIGS)
def test_families(family: str, again: bool) -> None:
    config = run(2, (1,))
    flops = step_flops(CONFIGS[family], config, TINY)
    if again:
        config = with_remat(config)
        more = step_flops(CONFIGS[family], config, TINY)
        assert more.minimal == flops.minimal
        assert more.blocks_again == more.total - flops.total > 0
        flops = more
    assert counted(CONFIGS[family], config, TINY) == flops.total


@pytest.mark.parametrize(
    ("layers", "context", "again"),
    [((0, 2), "entering", False), ((2,), "leaving", True), ((3,), "leaving", False)],
    ids=["two layers", "remat", "last layer"],
)
@pytest.mark.parametrize(
    "settings",
    [
        {"variant": "no_context"},
        {"memory_norm": True, "head": "mlp", "final_norm": True},
        {"embedding": "shared", "cross_init": "zero", "init": "random", "positions": "padded"},
        {"init": "random", "heads": 6, "kv_heads": 3, "mlp_width": 40, "attention_scale": 0.1},
    ],
    ids=["no context", "memory norm", "shared embedding", "own sizes"],
)
def test_options(settings: dict[str, Any], context: str, layers: tuple[int, ...], again: bool) -> None:
    config = run(3, layers, **settings)
    config = dataclasses.replace(config, steering=SteeringConfig(layers, context))
    config = with_remat(config) if again else config
    assert counted(CONFIGS["gemma2"], config, TINY) == step_flops(CONFIGS["gemma2"], config, TINY).total


def test_a_selection_head_has_no_matrix_products() -> None:
    config = dataclasses.replace(run(2, (1, 2)), selection=SelectionConfig(on=True))
    assert counted(CONFIGS["gemma2"], config, TINY) == step_flops(CONFIGS["gemma2"], config, TINY).total


def test_rows_that_share_sequences_and_steering_prompts() -> None:
    config, shape = run(2, (1,), batch=12, variant="no_context"), TINY._replace(rows=2)
    flops = step_flops(CONFIGS["gemma2"], config, shape, prompts=5)
    assert counted(CONFIGS["gemma2"], config, shape, prompts=5) == flops.total
    alone = step_flops(CONFIGS["gemma2"], config, TINY)
    assert (2 * flops.lower, 2 * flops.unembed, 12 * flops.hypernet) == (alone.lower, alone.unembed, 5 * alone.hypernet)


def test_each_part_is_that_part_of_the_model() -> None:
    lm_config, config = CONFIGS["llama"], run(3, (1,), batch=2)
    lm, state = abstract(lm_config, config)
    batch, flops = batch_of(2, TINY), step_flops(lm_config, config, TINY)
    square = 4 * 4 * 8 * 2  # FLOPs of one query and one key: two products of four heads of eight, for two rows
    masked, masked_concept = (square * n * (n - 1) // 2 for n in (TINY.tokens, TINY.concept))

    residual = jax.ShapeDtypeStruct((2, TINY.tokens, 32), jnp.bfloat16)
    context, response = (jax.ShapeDtypeStruct((2, n, 32), jnp.bfloat16) for n in (TINY.context, TINY.response))
    lower = count_of(partial(LM.run, start=0, stop=2), lm, residual, batch.tokens, batch.segments)
    upper = count_of(partial(LM.run, start=2, stop=4), lm, residual, batch.tokens, batch.segments)
    hypernet = count_of(
        Hypernet.__call__,
        state.hypernet,
        batch.concept_tokens,
        batch.concept_mask,
        context,
        batch.context_mask,
        jax.ShapeDtypeStruct((97, 32), jnp.bfloat16),
    )
    assert lower == flops.lower + 2 * masked
    assert upper == flops.upper + 2 * masked
    assert hypernet == flops.hypernet + flops.cross + 3 * masked_concept
    assert count_of(response_loss, lm, response, batch.response_tokens, batch.response_share) == flops.unembed
    assert flops.masked == (4 + 2 * 2) * masked + 3 * 3 * masked_concept
    assert flops.minimal == flops.total - flops.masked


def test_flops_grow_with_the_batch() -> None:
    one, twelve = (step_flops(PRESETS["gemma-2-2b"], run(22, (20,), batch=n), MIDDLE) for n in (1, 12))
    assert twelve == StepFlops(*(12 * part for part in one))


# Evaluation within its share

EVALUATED = {"held-in": [batch_of(2, TINY)] * 3, "held-out": [batch_of(2, TINY)] * 2}
LAYOUT = Layout(np.zeros((4, 1), int), np.zeros(4, int), (TINY,))


def interval(evaluation: dict[str, list[SteeringBatch]] = EVALUATED, **settings: Any) -> int:
    config = run(2, (1,))
    config = dataclasses.replace(config, train=TrainConfig(batch=2, **settings))
    return evaluation_interval(CONFIGS["gemma2"], config, LAYOUT, evaluation)


def test_evaluations_are_spaced_out_to_their_share() -> None:
    flops = step_flops(CONFIGS["gemma2"], run(2, (1,)), TINY)
    forward = flops.lower + flops.upper + flops.hypernet + flops.cross + flops.unembed
    for steps, share in ((1000, 0.05), (1000, 0.2), (5000, 0.01)):
        spaced = interval(steps=steps, eval_every=1, eval_share=share)
        times = math.ceil(steps / spaced)
        assert times * 5 * forward <= share * steps * flops.minimal < (times + 2) * 5 * forward
        assert spaced > 1


def test_evaluations_within_their_share_come_when_asked() -> None:
    assert interval(steps=1000, eval_every=500) == 500
    assert interval(steps=1000, eval_every=1, eval_share=10.0) == 1


def test_one_evaluation_is_always_left_and_none_where_none_is_wanted() -> None:
    assert interval(steps=10, eval_every=1, eval_share=1e-6) == 10
    assert interval(steps=10, eval_every=0) == 0
    assert interval({}, steps=10, eval_every=3) == 3


def test_cached_steps_leave_less_to_evaluation() -> None:
    often = {"steps": 1000, "eval_every": 1}
    assert interval(cache="memory", **often) > interval(**often)


@pytest.mark.parametrize("context", ["entering", "leaving"])
def test_cached_residual_saves_the_lower_blocks(context: str) -> None:
    config = dataclasses.replace(run(2, (2,)), steering=SteeringConfig((2,), context))
    lm, state = abstract(CONFIGS["gemma2"], config)
    residual = jax.ShapeDtypeStruct((2, TINY.tokens, 32), jnp.bfloat16)
    found = count_of(
        lambda state, lm, batch, residual: train_step(state, lm, batch, config, residual),
        state,
        lm,
        batch_of(2, TINY),
        residual,
    )
    assert found == step_flops(CONFIGS["gemma2"], config, TINY, cached=True).total
    assert found < step_flops(CONFIGS["gemma2"], config, TINY).total
