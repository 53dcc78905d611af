"""Properties of the LM: caching, splitting, padding, causality, rematerialisation."""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import Array

from hypersteer_jax.models.lm import LM, KVCache, cast, empty_cache, ranks, reserve
from tests.models.tiny import CONFIGS, random_lm

LENGTH = 12  # three windows of the tiny Gemma-2
FAMILIES = [name for name in CONFIGS if name != "llama-tied"]  # as llama, but for the head
LMS = {name: random_lm(CONFIGS[name]) for name in FAMILIES}
TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 97, (2, LENGTH)))
ALL = jnp.ones((2, LENGTH), bool)
POSITIONS = ranks(ALL)

forward = jax.jit(LM.__call__)
run = jax.jit(LM.run, static_argnums=(4, 5, 6))


@jax.jit
def extend(lm: LM, cache: KVCache, tokens: Array, mask: Array) -> tuple[Array, KVCache]:
    cache, positions = reserve(cache, mask)
    residual, cache = lm.extend(lm.embed(tokens), cache, positions, 0, lm.config.layers)
    return lm.unembed(residual), cache


def decode(lm: LM, mask: Array, chunks: Sequence[int]) -> Array:
    """Logits of all tokens, fed in chunks."""
    cache = empty_cache(lm.config, 2, LENGTH + 2, jnp.float32)  # two slots stay empty
    logits = []
    for tokens, real in zip(*(jnp.split(x, np.cumsum(chunks)[:-1], axis=1) for x in (TOKENS, mask)), strict=True):
        out, cache = extend(lm, cache, tokens, real)
        logits.append(out)
    assert int(cache.length) == LENGTH
    return jnp.concatenate(logits, axis=1)


@pytest.mark.parametrize("chunks", [[6, 6], [6, 1, 1, 1, 1, 1, 1], [1] * 12], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_cached_decode_equals_full_forward(family: str, chunks: list[int]) -> None:
    lm = LMS[family]
    np.testing.assert_allclose(decode(lm, ALL, chunks), forward(lm, TOKENS, ALL), atol=2e-5)


@pytest.mark.parametrize("chunks", [[6, 6], [6, 1, 1, 1, 1, 1, 1]], ids=str)
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", FAMILIES)
def test_cached_decode_after_padded_prompts_equals_full_forward(family: str, side: str, chunks: list[int]) -> None:
    lm, column = LMS[family], np.arange(LENGTH)
    first = column < 3 if side == "left" else (column >= 3) & (column < 6)
    real = np.stack([~first, np.ones(LENGTH, bool)])  # the prompts are 6 slots: 3 tokens in one row, 6 in the other
    logits = decode(lm, jnp.asarray(real), chunks)
    order = np.argsort(~real, axis=1, kind="stable")  # real tokens first, and in their order
    compact = forward(lm, jnp.take_along_axis(TOKENS, jnp.asarray(order), axis=1), jnp.asarray(np.sort(real)[:, ::-1]))
    for row, count in enumerate(real.sum(1)):
        np.testing.assert_allclose(logits[row, real[row]], compact[row, :count], atol=2e-5)


def test_window_binds() -> None:
    wide = random_lm(dataclasses.replace(CONFIGS["gemma2"], sliding_window=LENGTH))
    without, within = forward(wide, TOKENS, ALL), forward(LMS["gemma2"], TOKENS, ALL)
    np.testing.assert_allclose(without[:, :4], within[:, :4], atol=2e-5)
    assert np.abs(without[:, 4:] - within[:, 4:]).max(axis=(0, 2)).min() > 0.01


@pytest.mark.usefixtures("splash_on_cpu")
@pytest.mark.parametrize(("family", "remat"), [("gemma2", True), ("qwen2", False)])
def test_run_with_the_splash_kernel_equals_run(family: str, remat: bool) -> None:
    lm, column = LMS[family], np.arange(LENGTH)
    real = jnp.asarray(np.stack([column < 9, column >= 2]))

    def read(residual: Array, attention: str) -> tuple[Array, Array]:
        out = jnp.where(real[..., None], lm.run(residual, ranks(real), real, 0, 4, remat, attention), 0)
        return jnp.sum(jnp.sin(out)), out

    both = jax.jit(jax.value_and_grad(read, has_aux=True), static_argnums=1)
    (_, einsum), theirs = both(lm.embed(TOKENS), "einsum")
    (_, splash), ours = both(lm.embed(TOKENS), "splash")
    assert np.abs(theirs).max() > 0.1
    np.testing.assert_allclose(splash, einsum, atol=1e-5, rtol=1e-5)
    np.testing.assert_allclose(ours, theirs, atol=1e-5 * np.abs(theirs).max())


@pytest.mark.parametrize("split", [1, 3])
def test_run_in_two_parts_equals_run(split: int) -> None:
    lm = LMS["gemma2"]
    residual = lm.embed(TOKENS)
    lower = run(lm, residual, POSITIONS, ALL, 0, split)
    assert np.abs(lower - residual).max() > 0.1
    whole = run(lm, residual, POSITIONS, ALL, 0, 4)
    np.testing.assert_allclose(run(lm, lower, POSITIONS, ALL, split, 4), whole, atol=1e-5, rtol=1e-5)


def test_no_blocks_leave_the_residual_alone() -> None:
    residual = LMS["gemma2"].embed(TOKENS)
    np.testing.assert_array_equal(run(LMS["gemma2"], residual, POSITIONS, ALL, 2, 2), residual)


def test_blocks_run_in_their_order() -> None:
    lm = LMS["gemma2"]
    residual = lm.embed(TOKENS)
    forwards = run(lm, run(lm, residual, POSITIONS, ALL, 0, 1), POSITIONS, ALL, 1, 2)
    backwards = run(lm, run(lm, residual, POSITIONS, ALL, 1, 2), POSITIONS, ALL, 0, 1)
    np.testing.assert_allclose(run(lm, residual, POSITIONS, ALL, 0, 2), forwards, atol=1e-5, rtol=1e-5)
    assert np.abs(forwards - backwards).max() > 0.1


def test_remat_changes_neither_values_nor_gradients() -> None:
    def loss(lm: LM, residual: Array, remat: bool) -> Array:
        return jnp.mean(jnp.square(lm.run(residual, POSITIONS, ALL, 1, 4, remat)))

    lm = LMS["llama"]
    residual = lm.embed(TOKENS)
    both = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)), static_argnums=2)
    plain, remat = both(lm, residual, False), both(lm, residual, True)
    assert all(float(jnp.abs(gradient).max()) > 0 for gradient in jax.tree.leaves(plain[1][0].blocks))
    for a, b in zip(jax.tree.leaves(plain), jax.tree.leaves(remat), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5, rtol=1e-4)
    kept = [
        jax.tree.leaves(jax.eval_shape(lambda x, r=r: jax.vjp(lambda x: loss(lm, x, r), x)[1], residual))
        for r in (False, True)
    ]
    inside = (3, *TOKENS.shape, lm.config.mlp_width)  # of the MLPs of the three blocks
    assert [inside in [leaf.shape for leaf in leaves] for leaves in kept] == [True, False]


def test_causality() -> None:
    """The gradient of position t's logits is zero at every later token, and not at any earlier one."""
    lm = LMS["gemma2"]

    @jax.jit
    @jax.jacrev
    def jacobian(residual: Array) -> Array:
        return jnp.sum(jnp.square(lm.unembed(lm.run(residual, POSITIONS, ALL, 0, 4))), axis=(0, 2))

    influence = np.abs(jacobian(lm.embed(TOKENS))).sum(axis=(1, 3))  # [T of the logits, T of the residual]
    np.testing.assert_array_equal(influence > 0, np.tri(LENGTH, dtype=bool))


@pytest.mark.parametrize(("block", "reach"), [(1, LENGTH), (2, 4)])
def test_window_is_on_even_blocks_only(block: int, reach: int) -> None:
    lm = LMS["gemma2"]

    @jax.jit
    @jax.grad
    def gradient(residual: Array) -> Array:
        return jnp.sum(jnp.square(lm.run(residual, POSITIONS, ALL, block, block + 1)[:, -1]))

    seen = np.abs(gradient(lm.embed(TOKENS))).sum(axis=(0, 2)) > 0
    np.testing.assert_array_equal(seen, np.arange(LENGTH) >= LENGTH - reach)


@pytest.mark.parametrize("left", [0, 2, 5])
@pytest.mark.parametrize("family", FAMILIES)
def test_padding_does_not_change_real_tokens(family: str, left: int) -> None:
    lm, count = LMS[family], LENGTH - 5
    around = ((0, 0), (left, 5 - left))
    padded = forward(lm, jnp.pad(TOKENS[:, :count], around, constant_values=13), jnp.pad(ALL[:, :count], around))
    unpadded = forward(lm, TOKENS, ALL)[:, :count]  # what follows them does not change them, see `test_causality`
    np.testing.assert_allclose(padded[:, left : left + count], unpadded, atol=2e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_of_a_batch_do_not_meet(family: str) -> None:
    lm = LMS[family]
    other = TOKENS.at[1].set((TOKENS[1] + 1) % 97)
    before, after = forward(lm, TOKENS, ALL), forward(lm, other, ALL)
    np.testing.assert_array_equal(before[0], after[0])
    assert np.abs(before[1] - after[1]).max() > 0.1


def test_gemma2_scales_embeddings_by_a_rounded_constant() -> None:
    lm = cast(LMS["gemma2"], jnp.bfloat16)
    root = jnp.asarray(32**0.5, jnp.bfloat16)
    assert float(root) != 32**0.5
    np.testing.assert_array_equal(lm.embed(TOKENS), lm.embedding[...][TOKENS] * root)


def test_logits_are_float32_and_within_the_softcap() -> None:
    logits = forward(cast(LMS["gemma2"], jnp.bfloat16), TOKENS, ALL)
    assert logits.dtype == jnp.float32
    assert 4 < float(jnp.abs(logits).max()) <= 8


def test_cast_changes_every_weight() -> None:
    assert {leaf.dtype for leaf in jax.tree.leaves(cast(LMS["qwen2"], jnp.bfloat16))} == {jnp.dtype(jnp.bfloat16)}


@pytest.mark.parametrize("name", ["llama", "llama-tied"])
def test_head_is_the_embedding_when_tied(name: str) -> None:
    lm = random_lm(CONFIGS[name])
    head = np.asarray(lm.embedding[...]).T if name == "llama-tied" else np.asarray(lm.head[...])
    assert (lm.head is None) == (name == "llama-tied")
    residual = np.asarray(lm.embed(TOKENS))
    normed = residual / np.sqrt(np.mean(np.square(residual), -1, keepdims=True) + 1e-5) * lm.final_norm[...]
    np.testing.assert_allclose(lm.unembed(jnp.asarray(residual)), normed @ head, atol=2e-5)
