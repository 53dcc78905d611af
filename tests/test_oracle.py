"""The optimised step against the naive one of `oracle.py`: the same loss and the same gradients, to the bit."""

import dataclasses
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest

from hypersteer_jax.config import HypernetConfig, RunConfig, SteeringConfig, TrainConfig
from hypersteer_jax.data.batch import SteeringBatch
from hypersteer_jax.data.pipeline import Bucket, collate
from hypersteer_jax.models.hypernet import Hypernet
from hypersteer_jax.models.lm import LM
from hypersteer_jax.steering import read_context
from hypersteer_jax.training import loss
from hypersteer_jax.training.train import batch_loss, new_state, train_step
from tests import oracle
from tests.conftest import random_hypernet, random_rows
from tests.models.tiny import CONFIGS, random_lm

ROWS = random_rows((6, 8, 5, 7), (16, 12, 9, 13), (3, 8, 5, 6), factors=(1.0, -0.7, 1.6, 0.5))
ALONE = collate(ROWS, np.arange(4)[:, None], Bucket(tokens=16, context=8, response=16, concept=8))
PACKED = collate(ROWS, np.array([[0, 2], [1, 3]]), Bucket(tokens=32, context=8, response=16, concept=8, rows=2))
SHARED = PACKED._replace(  # rows 0 and 3 of the batch have one steering prompt, rows 1 and 2 another
    concept_tokens=PACKED.concept_tokens[:2],
    concept_mask=PACKED.concept_mask[:2],
    concept_row=np.array([0, 1, 1, 0], np.int32),
)
OWN_SIZES = {"init": "random", "heads": 6, "kv_heads": 3, "mlp_width": 40, "attention_scale": 0.1}


class Case(NamedTuple):
    """One way to train; every option is in some case, with both kinds of batch and all families."""

    family: str
    batch: SteeringBatch
    steering: SteeringConfig
    hypernet: HypernetConfig
    train: TrainConfig = TrainConfig()

    @property
    def config(self) -> RunConfig:
        return RunConfig(hypernet=self.hypernet, steering=self.steering, train=self.train)

    @property
    def networks(self) -> tuple[Hypernet, LM]:
        lm = random_lm(dataclasses.replace(CONFIGS[self.family], layers=3))
        return random_hypernet(self.hypernet, lm.config), lm


PLAIN = Case("gemma2", ALONE, SteeringConfig((1,)), HypernetConfig(blocks=2))
CASES = {
    "gemma2": PLAIN,
    "packed, leaving, two layers, own sizes": Case(
        "gemma2",
        PACKED,
        SteeringConfig((1, 2), context="leaving"),
        HypernetConfig(blocks=2, **OWN_SIZES),
        TrainConfig(loss="example"),
    ),
    "no_context, packed, first layer, mlp head, final norm": Case(
        "llama", PACKED, SteeringConfig((0,)), HypernetConfig("no_context", blocks=2, head="mlp", final_norm=True)
    ),
    "in_context, last layer, shared embedding": Case(
        "qwen2",
        ALONE,
        SteeringConfig((2,)),
        HypernetConfig("in_context", blocks=1, embedding="shared"),
        TrainConfig(loss="example"),
    ),
    "packed, three layers, memory norm, padded positions": Case(
        "qwen3",
        PACKED,
        SteeringConfig((0, 1, 2)),
        HypernetConfig(blocks=2, memory_norm=True, positions="padded", cross_init="zero"),
    ),
}


def optimised(case: Case, residual: Any = None) -> tuple[Any, Any]:
    run = oracle.program(jax.value_and_grad(partial(batch_loss, config=case.config), has_aux=True))
    (value, _), gradient = run(*case.networks, case.batch, residual=residual)
    return value, gradient


def naive(case: Case) -> tuple[Any, Any]:
    return oracle.loss_and_gradient(*case.networks, case.batch, case.config)


def assert_same(found: tuple[Any, Any], expected: tuple[Any, Any]) -> None:
    for (path, one), two in zip(jax.tree.leaves_with_path(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(one, two, err_msg=jax.tree_util.keystr(path))
    assert sum(np.any(leaf) for leaf in jax.tree.leaves(expected)) >= len(jax.tree.leaves(expected)) - 1  # final norm


@pytest.fixture(autouse=True)
def several_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss, "CHUNK", 16)


@pytest.mark.parametrize("name", CASES)
def test_optimised_step_equals_the_naive_one(name: str) -> None:
    assert_same(optimised(CASES[name]), naive(CASES[name]))


def test_what_is_kept_and_what_is_made_again_changes_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = naive(PLAIN)
    monkeypatch.setattr(loss, "CHUNK", 4)  # one position of each sequence
    assert_same(optimised(PLAIN._replace(train=TrainConfig(remat=True))), expected)
    monkeypatch.setattr(loss, "CHUNK", 1000)  # all positions
    _, lm = PLAIN.networks
    cached = oracle.program(read_context, "config")(lm, ALONE.tokens, ALONE.segments, config=PLAIN.steering)
    assert_same(optimised(PLAIN, residual=np.asarray(cached)), expected)


def test_sampled_factor_and_the_gradient_that_adam_gets() -> None:
    train = TrainConfig(factor_range=(-1.0, 2.0), clip=1e9, learning_rate=1e-3)
    case = PLAIN._replace(train=train)
    hypernet, lm = case.networks
    state, metrics = oracle.program(partial(train_step, config=case.config))(new_state(hypernet, train), lm, ALONE)
    key = jax.random.fold_in(jax.random.key(train.seed), 0)
    sampled = oracle.program(lambda: jax.random.uniform(key, (4,), minval=-1.0, maxval=2.0))()
    value, gradient = naive(case._replace(batch=ALONE._replace(factor=ALONE.factor * np.asarray(sampled))))
    first_moment = state.opt_state[1][0].mu
    assert_same((metrics["loss"], first_moment), (value, jax.tree.map(lambda g: np.float32(0.1) * g, gradient)))


def test_steering_prompts_that_are_shared_round_differently() -> None:
    # A sum over the rows in another order: here the cotangents of one prompt's rows are added, then pulled through one
    # reading of it; there each row's is pulled through a reading of its own, and the gradients of these are added.
    case = Case("gemma2", SHARED, SteeringConfig((1,)), HypernetConfig("no_context", blocks=2))
    (value, gradient), (expected, naive_gradient) = optimised(case), naive(case)
    np.testing.assert_array_equal(value, expected)
    for one, two in zip(jax.tree.leaves(gradient), jax.tree.leaves(naive_gradient), strict=True):
        np.testing.assert_allclose(one, two, rtol=0, atol=2e-6 * np.abs(two).max())
