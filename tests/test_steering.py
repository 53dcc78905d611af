"""The heart: what a steered logit depends on, and on what it must not."""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import Array

from hypersteer_jax.config import HypernetConfig, RunConfig, SelectionConfig, SteeringConfig, TrainConfig
from hypersteer_jax.data.batch import SteeringBatch
from hypersteer_jax.data.pipeline import Bucket, collate
from hypersteer_jax.models import attention
from hypersteer_jax.models.hypernet import NO_SELECTION, Hypernet
from hypersteer_jax.models.lm import LM, cast, ranks
from hypersteer_jax.steering import (
    lower_blocks,
    read_context,
    steer,
    steered_logits,
    steered_residual,
    write_vectors,
)
from hypersteer_jax.training.train import batch_loss, init_state, objective, train_step
from tests.conftest import random_hypernet, random_rows
from tests.models.tiny import CONFIGS, random_lm

VARIANTS = ("no_context", "in_context", "cross_attention")
BASE = random_lm(dataclasses.replace(CONFIGS["gemma2"], sliding_window=6))  # binds in the LM, not in the hypernetwork
NETS = {variant: random_hypernet(HypernetConfig(variant, blocks=2), BASE.config) for variant in VARIANTS}
NET = NETS["cross_attention"]
ONE = SteeringConfig(layers=(1,))
PROMPTS, LENGTHS, CONCEPTS = (6, 8, 5), (16, 12, 9), (3, 8, 5)
ROWS = random_rows(PROMPTS, LENGTHS, CONCEPTS, factors=(1.0, -0.7, 1.6))
BATCH = collate(ROWS, np.arange(3)[:, None], Bucket(tokens=16, context=8, response=16, concept=8))
COLUMNS = np.arange(16)
EVERYWHERE = BATCH._replace(response_index=np.broadcast_to(COLUMNS, (3, 16)).astype(np.int32))  # same shape as BATCH

logits = jax.jit(steered_logits, static_argnames="config")
forward = jax.jit(LM.__call__)


@jax.jit
def base_logits(lm: LM, batch: SteeringBatch) -> Array:
    """The unsteered LM, in the stretches of blocks that `ONE` needs: one stretch would round differently."""
    residual, positions = lm.embed(batch.tokens), ranks(batch.mask)
    for start, stop in ((0, 1), (1, 2), (2, 4)):
        residual = lm.run(residual, positions, batch.mask, start, stop)
    return lm.unembed(jnp.take_along_axis(residual, batch.response_index[..., None], axis=1))


@partial(jax.jit, static_argnames="config")
def vectors(hypernet: Hypernet, lm: LM, batch: SteeringBatch, config: SteeringConfig) -> Array:
    return write_vectors(hypernet, lm, batch, read_context(lm, batch.tokens, batch.segments, config))


def test_steer_adds_factor_times_vector() -> None:
    rng = np.random.default_rng(0)
    residual, vector, factor = rng.normal(size=(3, 5, 4)), rng.normal(size=(3, 4)), np.array([1.0, -2.5, 0.5])
    where = rng.random((3, 5)) < 0.5
    residual, vector, factor = (x.astype(np.float32) for x in (residual, vector, factor))
    steered = np.asarray(steer(residual, vector, factor, where))
    np.testing.assert_array_equal(steered[~where], residual[~where])
    row, column = np.nonzero(where)
    added = residual[row, column].astype(np.float64) + factor[row, None] * vector[row].astype(np.float64)
    np.testing.assert_allclose(steered[row, column], added, rtol=1e-6, atol=1e-6)
    assert np.abs(steered - residual)[where].max(axis=1).min() > 0.1


def test_steer_is_additive_and_linear_in_the_factor() -> None:
    rng = np.random.default_rng(1)
    residual, one, two = (rng.normal(size=shape).astype(np.float32) for shape in ((2, 3, 4), (2, 4), (2, 4)))
    factor, where = np.array([0.5, -2.0], np.float32), np.ones((2, 3), bool)  # powers of two: products are exact
    both = steer(steer(residual, one, factor, where), two, factor, where)
    np.testing.assert_allclose(both, steer(residual, one + two, factor, where), atol=1e-6)
    moved = [steer(np.zeros_like(residual), one, scale * factor, where) for scale in (1, 4)]
    np.testing.assert_array_equal(4 * moved[0], moved[1])
    np.testing.assert_array_equal(steer(residual, one, 0 * factor, where), residual)


def test_steer_keeps_the_dtype_of_the_residual() -> None:
    residual = jnp.ones((1, 2, 4), jnp.bfloat16)
    steered = steer(residual, jnp.ones((1, 4)), jnp.ones(1), jnp.array([[True, False]]))
    assert steered.dtype == jnp.bfloat16
    assert steered[0, :, 0].tolist() == [2.0, 1.0]


@pytest.mark.parametrize("variant", VARIANTS)
def test_factor_zero_is_the_base_lm(variant: str) -> None:
    base = np.asarray(base_logits(BASE, EVERYWHERE))
    plain = np.asarray(forward(BASE, BATCH.tokens, BATCH.mask))
    factor = np.array([0.0, 1.0, -2.0], np.float32)
    mixed = np.asarray(logits(NETS[variant], BASE, EVERYWHERE._replace(factor=factor), config=ONE))
    np.testing.assert_array_equal(mixed[0], base[0])  # whatever its neighbours' factors
    assert np.abs(mixed - base).max(axis=2)[1:][BATCH.steer_mask[1:]].min() > 0.01
    scored = np.asarray(logits(NETS[variant], BASE, BATCH._replace(factor=0 * factor), config=ONE))[BATCH.response_mask]
    np.testing.assert_array_equal(scored, np.asarray(base_logits(BASE, BATCH))[BATCH.response_mask])
    predicting = np.take_along_axis(plain, BATCH.response_index[..., None], axis=1)
    np.testing.assert_allclose(scored, predicting[BATCH.response_mask], atol=1e-5)


def test_logits_before_the_first_steered_position_are_the_base_lms() -> None:
    base = np.asarray(base_logits(BASE, EVERYWHERE))
    where = BATCH.mask & (np.array([3, 7, 8])[:, None] <= COLUMNS)
    steered = np.asarray(logits(NET, BASE, EVERYWHERE._replace(steer_mask=where), config=ONE))
    before = BATCH.mask & ~where
    np.testing.assert_array_equal(steered[before], base[before])
    assert np.abs(steered - base).max(axis=2)[where].min() > 0.01


@pytest.mark.parametrize("config", [ONE, SteeringConfig((1,), context="leaving")], ids=["entering", "leaving"])
def test_vector_is_blind_to_the_response(config: SteeringConfig) -> None:
    response = BATCH.mask & (np.array(PROMPTS)[:, None] <= COLUMNS)
    other = BATCH._replace(tokens=np.where(response, 96 - BATCH.tokens, BATCH.tokens))
    assert (other.tokens != BATCH.tokens).sum() > 15
    np.testing.assert_array_equal(vectors(NET, BASE, BATCH, config), vectors(NET, BASE, other, config))
    before, after = (np.asarray(logits(NET, BASE, batch, config=config)) for batch in (BATCH, other))
    np.testing.assert_array_equal(before[:, 0], after[:, 0])  # predicts the first response token
    assert np.abs(before - after)[:, 1:][BATCH.response_mask[:, 1:]].max() > 0.1
    prompt = BATCH._replace(tokens=np.where(COLUMNS == 3, 96 - BATCH.tokens, BATCH.tokens))
    assert np.abs(vectors(NET, BASE, BATCH, config) - vectors(NET, BASE, prompt, config)).max(axis=1).min() > 0.01


@pytest.mark.parametrize(
    ("variant", "config"),
    [("no_context", ONE), ("cross_attention", SteeringConfig((1,), context="leaving"))],
    ids=["no_context", "cross_attention, leaving"],
)
def test_what_each_logit_depends_on(variant: str, config: SteeringConfig) -> None:
    """By the gradient: earlier tokens, and where the vector was added also the prompt that it was made from.

    No other token: not a later one, not padding, and none of another row. All tokens of the batch differ, and the
    table serves as input only, so its rows tell the tokens apart.
    """
    lm = random_lm(CONFIGS["llama"])  # no window, and a head of its own
    hypernet = random_hypernet(HypernetConfig(variant, blocks=2), lm.config)

    @jax.jit
    @jax.jacrev
    def jacobian(table: Array) -> Array:
        replaced = jax.tree_util.tree_map_with_path(lambda path, w: table if "embedding" in str(path) else w, lm)
        return jnp.sum(jnp.square(steered_logits(hypernet, replaced, EVERYWHERE, config)), axis=2)

    influence = np.abs(np.asarray(jacobian(lm.embedding[...]))).sum(axis=3)  # [B, T, V]
    for row, length in enumerate(LENGTHS):
        expected = np.tri(length, dtype=bool)
        if variant == "cross_attention":
            expected |= (COLUMNS[:length, None] >= ROWS.prefix) & (COLUMNS[:length] < PROMPTS[row])
        own = BATCH.tokens[row, :length]
        np.testing.assert_array_equal(influence[row][:length, own] > 0, expected)
        assert not np.delete(influence[row][:length], own, axis=1).any()


def test_row_does_not_depend_on_its_neighbours() -> None:
    first = np.arange(3)[:, None] == 0
    other = BATCH._replace(
        tokens=np.where(first, BATCH.tokens, 96 - BATCH.tokens),
        concept_tokens=np.where(first, BATCH.concept_tokens, 96 - BATCH.concept_tokens),
        factor=BATCH.factor * np.array([1, 2, 3], np.float32),
    )
    before, after = (np.asarray(logits(NET, BASE, batch, config=ONE)) for batch in (BATCH, other))
    np.testing.assert_array_equal(before[0], after[0])
    assert np.abs(before - after)[1:].max(axis=(1, 2)).min() > 0.1


PAIRS = np.array([[0, 2], [3, 1]])  # sequences of two rows
PAIR_ROWS = random_rows((6, 8, 5, 7), (16, 12, 9, 13), (3, 8, 5, 6), factors=(1.0, -0.7, 1.6, 0.5))
PACKED = collate(PAIR_ROWS, PAIRS, Bucket(tokens=32, context=8, response=16, concept=8, rows=2))
UNPACKED = collate(PAIR_ROWS, PAIRS.reshape(4, 1), Bucket(tokens=16, context=8, response=16, concept=8))


def of_rows(batch: SteeringBatch, values: Array) -> list[np.ndarray]:
    """What belongs to the response of each row, from `[S, R, ...]`: a row's come together, its sequence's in order."""
    ends = np.cumsum([PAIR_ROWS.lengths[row] - PAIR_ROWS.prompt_lengths[row] for row in batch.row])
    return np.split(np.asarray(values)[batch.response_mask], ends[:-1])


@pytest.mark.parametrize(
    ("variant", "config"),
    [("no_context", ONE), ("cross_attention", SteeringConfig((0, 2), context="leaving"))],
    ids=["no_context", "cross_attention, leaving, two layers"],
)
def test_rows_of_one_sequence_are_steered_as_if_alone(variant: str, config: SteeringConfig) -> None:
    net = NETS[variant]
    one, two = (vectors(net, BASE, batch, config) for batch in (PACKED, UNPACKED))
    np.testing.assert_allclose(one, two, atol=1e-5)
    one, two = (of_rows(batch, logits(net, BASE, batch, config=config)) for batch in (PACKED, UNPACKED))
    for row, (packed, alone) in enumerate(zip(one, two, strict=True)):
        np.testing.assert_allclose(packed, alone, atol=2e-5, err_msg=f"row {row}")


@pytest.mark.parametrize("mean", ["token", "example"])
def test_rows_of_one_sequence_give_the_loss_and_gradient_of_rows_alone(mean: str) -> None:
    config = RunConfig(hypernet=NET.config, steering=ONE, train=TrainConfig(loss=mean))
    (one, count), packed = loss_and_gradient(NET, BASE, PACKED, config=config)
    (two, expected), alone = loss_and_gradient(NET, BASE, UNPACKED, config=config)
    assert int(count) == int(expected)
    np.testing.assert_allclose(one, two, rtol=1e-6)
    for left, right in zip(jax.tree.leaves(packed), jax.tree.leaves(alone), strict=True):
        np.testing.assert_allclose(left, right, rtol=0, atol=1e-5 * float(jnp.abs(right).max()))


@pytest.mark.parametrize("place", [0, 1])
def test_row_does_not_depend_on_the_row_it_shares_a_sequence_with(place: int) -> None:
    changed = np.arange(4) % 2 != place
    other = PACKED._replace(
        tokens=np.where(PACKED.segments == 2 - place, 96 - PACKED.tokens, PACKED.tokens),
        concept_tokens=np.where(changed[:, None], 96 - PACKED.concept_tokens, PACKED.concept_tokens),
        factor=np.where(changed, 3 * PACKED.factor, PACKED.factor),
    )
    assert (other.tokens != PACKED.tokens).sum() > 15
    one, two = (np.asarray(vectors(NET, BASE, batch, ONE)) for batch in (PACKED, other))
    np.testing.assert_array_equal(one[~changed], two[~changed])
    assert np.abs(one - two)[changed].max(axis=1).min() > 0.01
    before, after = (of_rows(batch, logits(NET, BASE, batch, config=ONE)) for batch in (PACKED, other))
    for row in range(4):
        if changed[row]:
            assert np.abs(before[row] - after[row]).max() > 0.1
        else:
            np.testing.assert_array_equal(before[row], after[row])


def test_padding_changes_nothing_in_true_positions() -> None:
    scribbled = BATCH._replace(
        tokens=np.where(BATCH.mask, BATCH.tokens, 50),
        concept_tokens=np.where(BATCH.concept_mask, BATCH.concept_tokens, 60),
    )
    before = np.asarray(logits(NET, BASE, BATCH, config=ONE))
    after = np.asarray(logits(NET, BASE, scribbled, config=ONE))
    np.testing.assert_array_equal(after[BATCH.response_mask], before[BATCH.response_mask])
    more = collate(ROWS, np.arange(3)[:, None], Bucket(tokens=24, context=16, response=24, concept=16))
    wider = np.asarray(logits(NET, BASE, more, config=ONE))
    np.testing.assert_allclose(wider[more.response_mask], before[BATCH.response_mask], atol=2e-5)


def test_padding_changes_vectors_in_padded_positions_as_in_the_release() -> None:
    padded = random_hypernet(dataclasses.replace(NET.config, positions="padded"), BASE.config)  # the same weights
    moved = np.abs(vectors(NET, BASE, BATCH, ONE) - vectors(padded, BASE, BATCH, ONE)).max(axis=1)
    assert CONCEPTS[1] == 8  # not padded
    assert moved[1] < 1e-5
    assert moved[[0, 2]].min() > 0.01


CASES = {
    "unpadded": SteeringConfig(layers=(1,)),
    "first block": SteeringConfig(layers=(0,)),
    "last block": SteeringConfig(layers=(3,)),
    "several": SteeringConfig(layers=(1, 3)),
    "leaving": SteeringConfig(layers=(1,), context="leaving"),
    "leaving, several": SteeringConfig(layers=(0, 1, 3), context="leaving"),
}
POSITIONS = np.broadcast_to(COLUMNS, BATCH.tokens.shape)
run_block = jax.jit(lambda lm, x, block: lm.run(x, POSITIONS, BATCH.mask, block, block + 1), static_argnums=2)
unembed = jax.jit(LM.unembed)
write = jax.jit(Hypernet.__call__)


@pytest.mark.parametrize("config", CASES.values(), ids=CASES)
def test_equals_a_computation_in_separate_passes(config: SteeringConfig) -> None:
    first = config.layers[0]
    context = BASE.embed(BATCH.tokens)
    for block in range(first + 1 if config.context == "leaving" else first):
        context = run_block(BASE, context, block)
    vector = write(
        NET, BATCH.concept_tokens, BATCH.concept_mask, context[:, :8], BATCH.context_mask, BASE.embedding[...]
    )
    added = BATCH.factor[:, None, None] * np.asarray(vector)[:, None] * BATCH.steer_mask[..., None]
    residual = np.asarray(BASE.embed(BATCH.tokens))
    for block in range(BASE.config.layers):
        residual = np.asarray(run_block(BASE, residual, block))
        if block in config.layers:
            residual = residual + added
    expected = np.stack([np.asarray(unembed(BASE, residual))[row, BATCH.response_index[row]] for row in range(3)])
    found = logits(NET, BASE, BATCH, config=config)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(np.asarray(found)[BATCH.response_mask], expected[BATCH.response_mask], atol=2e-5)


def test_context_is_read_at_the_first_steered_block() -> None:
    names = ("last block", "several", "leaving", "leaving, several")
    assert [lower_blocks(CASES[name]) for name in names] == [3, 1, 2, 1]


HEAD = SelectionConfig(on=True)
GATED = random_hypernet(NET.config, BASE.config, seed=3, selection=HEAD)
with_gates = jax.jit(steered_residual, static_argnames=("config", "remat"))


@pytest.mark.parametrize("context", ["entering", "leaving"])
def test_each_steered_block_is_gated_by_its_own_residual(context: str) -> None:
    config = SteeringConfig(layers=(1, 2), context=context)
    vector = np.asarray(vectors(GATED, BASE, BATCH, config))
    residual, expected = np.asarray(BASE.embed(BATCH.tokens)), []
    for block in range(BASE.config.layers):
        residual = np.asarray(run_block(BASE, residual, block))
        if block in config.layers:
            expected.append(np.asarray(GATED.selection(residual, vector, block)) * BATCH.steer_mask)
            residual = residual + BATCH.factor[:, None, None] * vector[:, None] * expected[-1][..., None]
    _, gates = with_gates(GATED, BASE, BATCH, config)
    np.testing.assert_allclose(np.stack(gates), np.stack(expected), atol=1e-4)
    assert np.abs(expected[0] - expected[1])[BATCH.steer_mask].max() > 0.1
    rows = np.stack([np.asarray(unembed(BASE, residual))[row, BATCH.response_index[row]] for row in range(3)])
    found = np.asarray(logits(GATED, BASE, BATCH, config=config))
    np.testing.assert_allclose(found[BATCH.response_mask], rows[BATCH.response_mask], atol=1e-4)


def test_gates_keep_what_steering_promises() -> None:
    """Factor 0 is the base LM to the bit, neighbours and padding are not seen, and an open gate is no gate."""
    base = np.asarray(base_logits(BASE, EVERYWHERE))
    silent = np.asarray(logits(GATED, BASE, EVERYWHERE._replace(factor=0 * BATCH.factor), config=ONE))
    np.testing.assert_array_equal(silent, base)
    before = np.asarray(logits(GATED, BASE, EVERYWHERE, config=ONE))
    first = np.arange(3)[:, None] == 0
    other = EVERYWHERE._replace(tokens=np.where(first & BATCH.mask, BATCH.tokens, 96 - BATCH.tokens))
    np.testing.assert_array_equal(np.asarray(logits(GATED, BASE, other, config=ONE))[0], before[0])
    opened = jax.tree.map(jnp.copy, GATED)
    opened.selection.bias[...] = opened.selection.bias[...] + 100.0
    plain = jax.tree.map(jnp.copy, GATED)
    plain.selection = None
    ungated = np.asarray(logits(plain, BASE, EVERYWHERE, config=ONE))
    np.testing.assert_allclose(logits(opened, BASE, EVERYWHERE, config=ONE), ungated, atol=1e-5)
    assert np.abs(before - ungated)[BATCH.steer_mask].max() > 0.1


def test_rows_of_one_sequence_are_gated_as_if_alone() -> None:
    rows = np.array([1, 2])
    apart = collate(ROWS, rows[:, None], Bucket(tokens=16, context=8, response=16, concept=8))
    packed = collate(ROWS, rows[None], Bucket(tokens=24, context=8, response=24, concept=8, rows=2))
    alone, together = (with_gates(GATED, BASE, batch, ONE)[1][0] for batch in (apart, packed))
    one, two = (np.asarray(gates)[batch.mask] for gates, batch in ((alone, apart), (together, packed)))
    np.testing.assert_allclose(two, one, atol=1e-4)
    config = run_config(GATED.config, selection=HEAD)
    parts = [jax.jit(partial(objective, config=config))(GATED, BASE, batch)[1] for batch in (apart, packed)]
    for name in ("loss", "penalty", "selected"):
        assert float(parts[0][name]) == pytest.approx(float(parts[1][name]), rel=1e-4)


def run_config(net: HypernetConfig, remat: bool = False, selection: SelectionConfig = NO_SELECTION) -> RunConfig:
    config = RunConfig(hypernet=net, steering=ONE, selection=selection)
    return dataclasses.replace(config, train=dataclasses.replace(config.train, remat=remat))


loss_and_gradient = jax.jit(jax.value_and_grad(batch_loss, has_aux=True), static_argnames="config")


@pytest.mark.parametrize(
    ("family", "net"),
    [
        ("gemma2", HypernetConfig(blocks=2)),
        ("qwen3", HypernetConfig("no_context", blocks=2)),
        ("qwen2", HypernetConfig(blocks=2, embedding="shared", head="mlp", final_norm=True, memory_norm=True)),
    ],
    ids=["cross_attention", "no_context", "everything else"],
)
def test_gradient_reaches_every_weight_of_the_hypernetwork(family: str, net: HypernetConfig) -> None:
    lm = BASE if family == "gemma2" else random_lm(CONFIGS[family])
    (_, count), gradient = loss_and_gradient(random_hypernet(net, lm.config), lm, BATCH, config=run_config(net))
    assert int(count) == sum(LENGTHS) - sum(PROMPTS)
    found = set()
    for path, leaf in jax.tree_util.tree_leaves_with_path(gradient):
        name, size = jax.tree_util.keystr(path), np.abs(np.asarray(leaf))
        found.add(name)
        if "final_norm" in name and not net.final_norm:
            assert not size.any(), name  # kept for the release's checkpoints only
        elif "blocks" in name:
            assert size.reshape(net.blocks, -1).max(axis=1).min() > 0, name
        elif "embedding" in name:
            read = np.unique(BATCH.concept_tokens[BATCH.concept_mask])
            np.testing.assert_array_equal(np.flatnonzero(size.any(axis=1)), read)
        else:
            assert size.any(), name
    assert any("embedding" in name for name in found) == (net.embedding == "own")
    assert any("final_norm" in name for name in found)


def test_train_state_holds_nothing_of_the_base_lm() -> None:
    config = run_config(HypernetConfig(blocks=2, embedding="shared"))
    state = jax.eval_shape(partial(init_state, config), BASE)
    after, _ = jax.eval_shape(partial(train_step, config=config), state, BASE, BATCH)
    assert jax.tree.structure(after) == jax.tree.structure(state)
    shapes = [(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(state)]
    assert [(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(after)] == shapes
    ours = [(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(state.hypernet)]
    arrays = [each for each in shapes if each[0]]
    assert sorted(arrays, key=str) == sorted(3 * ours, key=str)  # weights and two moments, no other array
    frozen = {leaf.shape for leaf in (*jax.tree.leaves(BASE.blocks), BASE.embedding[...])}
    assert not frozen & {shape for shape, _ in shapes}


def test_a_selection_head_is_trained_with_the_hypernetwork() -> None:
    selection = dataclasses.replace(HEAD, noise=False, learnable_temperature=True)
    hypernet = random_hypernet(NET.config, BASE.config, seed=3, selection=selection)
    config = run_config(NET.config, selection=selection)
    gradient = jax.jit(jax.grad(objective, has_aux=True), static_argnames="config")(hypernet, BASE, BATCH, config)[0]
    leaves = jax.tree_util.tree_leaves_with_path(gradient)
    still = {jax.tree_util.keystr(path) for path, leaf in leaves if not np.asarray(leaf).any()}
    assert [name for name in still if "final_norm" not in name] == []
    assert sum("selection" in jax.tree_util.keystr(path) for path, _ in leaves) == 5


def test_remat_changes_neither_the_loss_nor_its_gradient() -> None:
    configs = [run_config(NET.config, remat) for remat in (False, True)]
    plain, remat = (loss_and_gradient(NET, BASE, BATCH, config=config) for config in configs)
    np.testing.assert_allclose(plain[0][0], remat[0][0], rtol=1e-6)
    for one, two in zip(jax.tree.leaves(plain[1]), jax.tree.leaves(remat[1]), strict=True):
        np.testing.assert_allclose(one, two, atol=1e-6 * max(1.0, float(jnp.abs(one).max())), rtol=1e-4)


def test_no_copies_of_weights_are_kept_for_the_backward_pass() -> None:
    """Nor, with remat, the activations inside a block."""

    net = random_hypernet(HypernetConfig(blocks=3), BASE.config)

    def kept(config: RunConfig) -> list[tuple[int, ...]]:
        def pull(hypernet: Hypernet) -> Any:
            return jax.vjp(lambda hypernet: batch_loss(hypernet, BASE, BATCH, config)[0], hypernet)[1]

        return [leaf.shape for leaf in jax.tree.leaves(jax.eval_shape(pull, net))]

    above = BASE.config.layers - 1 - ONE.layers[0]
    gate = (above, BASE.config.width, BASE.config.mlp_width)
    activation = (above, *BATCH.tokens.shape, BASE.config.mlp_width)
    assert above not in (net.config.blocks, BASE.config.layers)  # the stacks themselves are kept, of course
    plain, remat = (kept(run_config(net.config, remat)) for remat in (False, True))
    assert activation in plain
    assert activation not in remat
    assert gate not in plain + remat


@pytest.mark.usefixtures("splash_on_cpu")
def test_splash_kernel_in_both_networks_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    config = run_config(NET.config)
    einsum = loss_and_gradient(NET, BASE, BATCH, config=config)
    monkeypatch.setattr(attention, "causal_mask", None)  # no self-attention may want it now
    settings = dataclasses.replace(config.train, attention="splash")
    splash = loss_and_gradient(NET, BASE, BATCH, config=dataclasses.replace(config, train=settings))
    np.testing.assert_allclose(splash[0][0], einsum[0][0], rtol=1e-6)
    for one, two in zip(jax.tree.leaves(splash[1]), jax.tree.leaves(einsum[1]), strict=True):
        np.testing.assert_allclose(one, two, atol=1e-5 * max(1.0, float(jnp.abs(two).max())))


def test_loss_and_gradient_are_float32_over_a_bfloat16_lm() -> None:
    lm = jax.eval_shape(lambda: cast(BASE, jnp.bfloat16))
    run = jax.value_and_grad(partial(batch_loss, config=run_config(NET.config)), has_aux=True)
    (loss, _), gradient = jax.eval_shape(run, NET, lm, BATCH)
    assert {leaf.dtype for leaf in (loss, *jax.tree.leaves(gradient))} == {jnp.dtype(jnp.float32)}
    assert jax.eval_shape(partial(read_context, config=ONE), lm, BATCH.tokens, BATCH.mask).dtype == jnp.bfloat16
