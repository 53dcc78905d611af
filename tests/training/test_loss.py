"""The loss by hand, and that its chunks change nothing."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from hypersteer_jax.models.lm import LM
from hypersteer_jax.training.loss import CHUNK, response_loss, response_nll
from tests.models.tiny import CONFIGS, random_lm

NLL = jnp.array([[1.0, 2.0, 6.0, 50.0], [11.0, 50.0, 50.0, 50.0], [50.0, 50.0, 50.0, 50.0]])
MASK = jnp.array([[1, 1, 1, 0], [1, 0, 0, 0], [0, 0, 0, 0]], bool)
BASE = random_lm(CONFIGS["gemma2"])


def test_token_mean_weighs_every_token_alike() -> None:
    loss, count = response_loss(NLL, MASK)
    assert (float(loss), int(count)) == (20 / 4, 4)


def test_example_mean_weighs_every_row_with_a_response_alike() -> None:
    loss, count = response_loss(NLL, MASK, "example")
    assert (float(loss), int(count)) == ((3 + 11) / 2, 4)


@pytest.mark.parametrize("mean", ["token", "example"])
def test_nothing_to_score_is_no_loss_and_no_gradient(mean: str) -> None:
    gradient, count = jax.grad(response_loss, has_aux=True)(NLL, jnp.zeros_like(MASK), mean)
    loss, _ = response_loss(NLL, jnp.zeros_like(MASK), mean)
    assert (float(loss), int(count)) == (0.0, 0)
    assert not gradient.any()


@pytest.mark.parametrize("mean", ["token", "example"])
def test_padding_counts_for_nothing_even_when_it_is_not_finite(mean: str) -> None:
    (loss, _), gradient = jax.value_and_grad(response_loss, has_aux=True)(jnp.where(MASK, NLL, jnp.nan), MASK, mean)
    assert float(loss) == float(response_loss(NLL, MASK, mean)[0])
    np.testing.assert_array_equal(np.asarray(gradient) > 0, MASK)


@pytest.mark.parametrize("length", [3 * CHUNK, 12, 5], ids=["chunks", "half chunks", "single positions"])
def test_chunks_change_neither_values_nor_gradients(length: int) -> None:
    rng = np.random.default_rng(0)
    residual = jnp.asarray(rng.normal(size=(2, length, 32)), jnp.float32)
    tokens = jnp.asarray(rng.integers(0, 97, (2, length)))
    weights = jnp.asarray(rng.normal(size=(2, length)), jnp.float32)

    def whole(residual: jax.Array) -> jax.Array:
        return optax.softmax_cross_entropy_with_integer_labels(BASE.unembed(residual), tokens)

    def chunked(residual: jax.Array) -> jax.Array:
        return response_nll(BASE, residual, tokens)

    np.testing.assert_allclose(jax.jit(chunked)(residual), jax.jit(whole)(residual), atol=1e-5)
    one, two = (jax.jit(jax.grad(lambda x, f=f: jnp.sum(weights * f(x))))(residual) for f in (chunked, whole))
    np.testing.assert_allclose(one, two, atol=1e-5)
    assert float(jnp.abs(two).max()) > 0.1


def test_logits_of_the_whole_response_never_exist() -> None:
    def total(lm: LM, residual: jax.Array, tokens: jax.Array) -> jax.Array:
        return jnp.sum(response_nll(lm, residual, tokens))

    text = str(jax.make_jaxpr(jax.grad(total, argnums=1))(BASE, jnp.ones((2, 40, 32)), jnp.ones((2, 40), jnp.int32)))
    assert f"f32[2,{CHUNK},97]" in text
    assert "40,97]" not in text
    assert "5,2,8,97]" not in text  # nor as a stack of chunks, kept for the backward pass
