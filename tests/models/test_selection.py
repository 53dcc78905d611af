"""The selection head: its gate by hand, hard and soft, its noise, its temperature, and what is counted of it."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from hypersteer_jax.config import SelectionConfig
from hypersteer_jax.models.selection import Selection, annealed_temperature, mean_gate, selected_share

RNG = np.random.default_rng(0)
RESIDUAL = RNG.normal(size=(3, 40, 8)).astype(np.float32)
VECTOR = RNG.normal(size=(3, 8)).astype(np.float32)
KEY = jax.random.key(5)


def head(temperature: float = 0.4, **settings: Any) -> Selection:
    """A head with random weights."""
    made = Selection(SelectionConfig(on=True, **settings), 8, nnx.Rngs(0))
    rng = np.random.default_rng(1)
    made = jax.tree.map(lambda w: jnp.asarray(rng.normal(size=w.shape), jnp.float32), made)
    made.temperature[...] = jnp.asarray(temperature)
    return made


def gate(net: Selection, layer: int = 2, key: jax.Array | None = None) -> np.ndarray:
    return np.asarray(net(RESIDUAL, VECTOR, layer, key))


def logits(net: Selection) -> np.ndarray:
    """By the definition, in float64."""
    x = np.concatenate([RESIDUAL, np.repeat(VECTOR[:, None], 40, axis=1)], axis=2).astype(np.float64)
    if net.norm_weight is not None:
        x = (x - x.mean(axis=2, keepdims=True)) / np.sqrt(x.var(axis=2, keepdims=True) + 1e-5)
        x = x * net.norm_weight[...] + net.norm_bias[...]
    return (x @ np.asarray(net.weight[...], np.float64) + np.asarray(net.bias[...]))[..., 0]


@pytest.mark.parametrize("layer_norm", [True, False])
def test_gate_by_hand(layer_norm: bool) -> None:
    net = head(layer_norm=layer_norm)
    assert (net.norm_weight is None) == (net.norm_bias is None) == (not layer_norm)
    np.testing.assert_allclose(gate(net), 1 / (1 + np.exp(-logits(net) / 0.4)), atol=1e-5)
    assert 0.1 < np.mean(gate(net) > 0.5) < 0.9


def test_gate_is_float32_whatever_the_residual() -> None:
    narrow = head()(jnp.asarray(RESIDUAL, jnp.bfloat16), VECTOR, 2)
    assert narrow.dtype == jnp.float32
    wide = head()(jnp.asarray(RESIDUAL, jnp.bfloat16).astype(jnp.float32), VECTOR, 2)
    np.testing.assert_array_equal(narrow, wide)


def test_start_is_that_of_pytorch() -> None:
    made = Selection(SelectionConfig(on=True, temperature_start=0.7), 512, nnx.Rngs(0))
    bound, weight = 1024**-0.5, np.asarray(made.weight[...])
    assert 0.99 * bound < np.abs(weight).max() <= bound
    assert abs(weight.mean()) < 0.1 * bound
    assert np.abs(made.bias[...]) <= bound
    assert made.norm_weight[...].tolist() == [1.0] * 1024
    assert not made.norm_bias[...].any()
    assert float(made.temperature[...]) == np.float32(0.7)


def test_hard_gates() -> None:
    soft = gate(head(noise=False), key=KEY)
    hard = (soft > 0.5).astype(np.float32)
    np.testing.assert_array_equal(gate(head()), soft)
    np.testing.assert_array_equal(gate(head(hard_inference=True)), hard)
    np.testing.assert_array_equal(gate(head(hard_inference=True, noise=False), key=KEY), soft)
    for key in (None, KEY):  # exactly 0 and 1 in training and at inference
        np.testing.assert_array_equal(gate(head(straight_through=True, noise=False), key=key), hard)


def test_straight_through_has_the_gradient_of_the_soft_gate() -> None:
    def gradients(net: Selection) -> Any:
        weights = jnp.asarray(np.random.default_rng(3).normal(size=(3, 40)))
        return jax.grad(lambda net, x, v: jnp.sum(weights * net(x, v, 2)), argnums=(0, 1, 2))(net, RESIDUAL, VECTOR)

    soft, straight = (gradients(head(straight_through=hard, learnable_temperature=True)) for hard in (False, True))
    for one, two in zip(jax.tree.leaves(soft), jax.tree.leaves(straight), strict=True):
        assert np.abs(one).max() > 1e-3
        np.testing.assert_array_equal(one, two)


def test_noise_is_logistic_in_training_only() -> None:
    net = head(temperature=1.0)
    residual = jnp.broadcast_to(RESIDUAL[:1, :1], (1, 20_000, 8))
    [quiet], [noisy] = net(residual[:, :1], VECTOR[:1], 2), net(residual, VECTOR[:1], 2, KEY)
    noise = np.asarray(jnp.log(noisy / (1 - noisy)) - jnp.log(quiet / (1 - quiet)))
    assert abs(noise.mean()) < 0.05
    assert abs(noise.std() - np.pi / np.sqrt(3)) < 0.05
    assert abs(np.mean(noise < np.log(3)) - 0.75) < 0.02
    np.testing.assert_array_equal(gate(head(noise=False), key=KEY), gate(head()))


def test_noise_is_a_function_of_key_and_layer() -> None:
    first = gate(head(), key=KEY)
    np.testing.assert_array_equal(gate(head(), key=KEY), first)
    for other in (gate(head(), layer=3, key=KEY), gate(head(), key=jax.random.key(6)), gate(head())):
        assert np.abs(other - first).max() > 0.3


def test_temperature_falls_over_the_whole_run() -> None:
    config = SelectionConfig(on=True, temperature_start=0.9, temperature_end=0.1)
    found = [float(annealed_temperature(config, jnp.asarray(step / 8))) for step in range(9)]
    assert found == pytest.approx([0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1])


@pytest.mark.parametrize(("stored", "used"), [(3.0, 1.0), (0.01, 0.05), (-1.0, 0.05), (0.3, 0.3)])
def test_temperature_stays_between_its_ends(stored: float, used: float) -> None:
    net = head(stored, learnable_temperature=True)
    np.testing.assert_allclose(gate(net), np.exp(-np.logaddexp(0, -logits(net) / used)), atol=1e-4)


@pytest.mark.parametrize("learnable", [True, False])
def test_temperature_has_a_gradient_if_it_is_learned(learnable: bool) -> None:
    for start in (0.4, 1.0):  # at the start it must be able to move as well
        net = head(start, learnable_temperature=learnable)
        gradient = jax.grad(lambda net: jnp.sum(jnp.square(net(RESIDUAL, VECTOR, 2))))(net)
        assert bool(gradient.temperature[...] != 0) == learnable
        assert gradient.weight[...].all()


GATES = [
    jnp.array([[1.0, 0.4, 0.6, 9.0], [0.2, 0.8, 9.0, 9.0]]),
    jnp.array([[0.0, 0.0, 0.9, 9.0], [0.0, 0.0, 9.0, 9.0]]),
]
WHERE = jnp.array([[True, True, True, False], [True, True, False, False]])


def test_mean_gate_by_hand() -> None:
    """Over the real tokens, of which the first sequence has four and the second three, and over two steered blocks."""
    alone = jnp.array([[1, 1, 1, 1], [1, 1, 1, 0]])
    assert float(mean_gate(GATES, WHERE, alone, 1)) == pytest.approx(((2 / 4 + 1 / 3) / 2 + (0.9 / 4 + 0) / 2) / 2)
    assert float(mean_gate(GATES[:1], WHERE & False, 0 * alone, 1)) == 0
    shared = jnp.array([[1, 2, 2, 2], [1, 1, 2, 0]])  # four rows of 1, 3, 2 and 1 tokens
    assert float(mean_gate(GATES[:1], WHERE, shared, 2)) == pytest.approx((1.0 + 1.0 / 3 + 1.0 / 2 + 0.0) / 4)


def test_selected_share_by_hand() -> None:
    assert float(selected_share(GATES, WHERE)) == pytest.approx((3 + 1) / (2 * 5))
    assert float(selected_share(GATES, WHERE & False)) == 0
