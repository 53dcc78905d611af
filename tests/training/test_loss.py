"""The loss by hand, and that its chunks change nothing."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from hypersteer_jax.models.lm import LM
from hypersteer_jax.training import loss as module
from hypersteer_jax.training.loss import response_loss
from tests.models.tiny import CONFIGS, random_lm

BASE = random_lm(CONFIGS["gemma2"])
MASK = np.array([[1, 1, 1, 0], [1, 0, 0, 0], [0, 0, 0, 0]], bool)


def case(mask: np.ndarray, seed: int = 0) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Residual, tokens and shares of rows that are sequences of their own."""
    rng = np.random.default_rng(seed)
    share = mask / np.maximum(mask.sum(1, keepdims=True), 1)
    residual, tokens = rng.normal(size=(*mask.shape, 32)), rng.integers(0, 97, mask.shape)
    return jnp.asarray(residual, jnp.float32), jnp.asarray(tokens), jnp.asarray(share, jnp.float32)


def nll_of(residual: jax.Array, tokens: jax.Array) -> np.ndarray:
    """All at once."""
    return np.asarray(optax.softmax_cross_entropy_with_integer_labels(BASE.unembed(residual), tokens))


def test_token_mean_weighs_every_token_alike() -> None:
    residual, tokens, share = case(MASK)
    nll = nll_of(residual, tokens)
    loss, count = response_loss(BASE, residual, tokens, share)
    np.testing.assert_allclose(loss, (nll[0, :3].sum() + nll[1, 0]) / 4, rtol=1e-6)
    assert int(count) == 4


def test_example_mean_weighs_every_row_with_a_response_alike() -> None:
    residual, tokens, share = case(MASK)
    nll = nll_of(residual, tokens)
    loss, count = response_loss(BASE, residual, tokens, share, "example")
    np.testing.assert_allclose(loss, (nll[0, :3].mean() + nll[1, 0]) / 2, rtol=1e-6)
    assert int(count) == 4


@pytest.mark.parametrize("mean", ["token", "example"])
def test_nothing_to_score_is_no_loss_and_no_gradient(mean: str) -> None:
    residual, tokens, share = case(np.zeros_like(MASK))
    (loss, count), gradient = jax.value_and_grad(response_loss, argnums=1, has_aux=True)(
        BASE, residual, tokens, share, mean
    )
    assert (float(loss), int(count)) == (0.0, 0)
    assert not gradient.any()


@pytest.mark.parametrize("mean", ["token", "example"])
def test_padding_counts_for_nothing_even_when_it_is_not_finite(mean: str) -> None:
    residual, tokens, share = case(MASK)
    run = jax.value_and_grad(response_loss, argnums=1, has_aux=True)
    (expected, _), _ = run(BASE, residual, tokens, share, mean)
    (loss, _), gradient = run(BASE, jnp.where(MASK[..., None], residual, jnp.nan), tokens, share, mean)
    assert float(loss) == float(expected)
    assert np.isfinite(gradient[MASK]).all()
    assert (jnp.abs(gradient).max(axis=-1)[MASK] > 0).all()


@pytest.mark.parametrize("mean", ["token", "example"])
@pytest.mark.parametrize(("length", "chunk"), [(24, 8), (12, 5), (7, 4)], ids=["chunks", "uneven", "single positions"])
def test_chunks_change_neither_values_nor_gradients(
    length: int, chunk: int, mean: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    mask = np.random.default_rng(1).random((2, length)) < 0.7
    residual, tokens, share = case(mask)
    weights = share if mean == "example" else mask
    monkeypatch.setattr(module, "CHUNK", 2 * chunk)

    def whole(residual: jax.Array) -> jax.Array:
        nll = optax.softmax_cross_entropy_with_integer_labels(BASE.unembed(residual), tokens)
        return jnp.sum(nll * weights) / jnp.sum(weights)

    def chunked(residual: jax.Array) -> jax.Array:
        return 3 * response_loss(BASE, residual, tokens, share, mean)[0]

    one, two = (jax.jit(jax.value_and_grad(run))(residual) for run in (chunked, whole))
    np.testing.assert_allclose(one[0], 3 * two[0], rtol=1e-6)
    np.testing.assert_allclose(one[1], 3 * two[1], atol=1e-6)
    assert float(jnp.abs(two[1]).max()) > 0.01


def test_logits_of_the_whole_response_never_exist_and_are_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CHUNK", 16)

    def total(residual: jax.Array, lm: LM, tokens: jax.Array) -> jax.Array:
        return response_loss(lm, residual, tokens, jnp.ones((2, 40)))[0]

    text = str(jax.make_jaxpr(jax.grad(total))(jnp.ones((2, 40, 32)), BASE, jnp.ones((2, 40), jnp.int32)))
    assert "f32[2,8,97] = dot_general" in text
    assert text.count("dot_general") == 2  # logits, and the gradient from them
    assert "40,97]" not in text
    assert "5,2,8,97]" not in text  # nor as a stack of chunks, kept for the backward pass


def test_a_chunk_is_what_a_device_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CHUNK", 16)
    monkeypatch.setattr(module, "batch_ways", lambda: 4)
    residual, tokens, share = case(np.ones((8, 24), bool))
    text = str(jax.make_jaxpr(lambda x: response_loss(BASE, x, tokens, share)[0])(residual))
    assert "f32[8,8,97] = dot_general" in text  # two of eight sequences on each of four devices
