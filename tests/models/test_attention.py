"""Attention, RoPE, masks and norm against their definitions, written out as loops in numpy."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import Array

from hypersteer_jax.models.attention import (
    WholeRows,
    attend,
    causal_mask,
    rms_norm,
    rope,
    rope_frequencies,
    row_mask,
)
from hypersteer_jax.models.lm import ranks
from hypersteer_jax.models.presets import PRESETS
from hypersteer_jax.sharding import make_mesh, shard_batch
from tests.models.tiny import CONFIGS

RNG = np.random.default_rng(0)


def normal(*shape: int) -> np.ndarray:
    return RNG.normal(size=shape).astype(np.float32)


@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_rms_norm(offset: float) -> None:
    x, weight = normal(2, 3, 16), normal(16)
    expected = x / np.sqrt(np.mean(np.square(x), -1, keepdims=True) + 1e-5) * (offset + weight)
    np.testing.assert_allclose(
        rms_norm(jnp.asarray(x), jnp.asarray(weight), 1e-5, offset), expected, rtol=1e-5, atol=1e-6
    )


def test_rms_norm_of_bfloat16_is_computed_in_float32() -> None:
    # 300 squared needs more than bfloat16's eight bits; 1 + 1/256 is not a bfloat16
    x = jnp.asarray([[300.0, 1.0, -2.0, 3.0]], jnp.bfloat16)
    weight = jnp.full((4,), 1 / 256, jnp.bfloat16)
    wide = rms_norm(x.astype(jnp.float32), weight.astype(jnp.float32), 1e-6, 1.0)
    narrow = rms_norm(x, weight, 1e-6, 1.0)
    assert narrow.dtype == jnp.bfloat16
    np.testing.assert_array_equal(narrow, wide.astype(jnp.bfloat16))


def test_rope_turns_pairs_of_halves() -> None:
    config = CONFIGS["qwen3"]
    x, positions = normal(2, 5, 3, 16), np.array([[0, 1, 2, 3, 4], [7, 0, 100, 3, 3]])
    expected = np.empty_like(x)
    for pair in range(8):
        angle = positions[:, :, None] / config.rope_theta ** (2 * pair / 16)
        a, b = x[..., pair], x[..., pair + 8]
        expected[..., pair] = a * np.cos(angle) - b * np.sin(angle)
        expected[..., pair + 8] = b * np.cos(angle) + a * np.sin(angle)
    actual = rope(jnp.asarray(x), jnp.asarray(positions), rope_frequencies(config))
    np.testing.assert_allclose(actual, expected, atol=2e-5)
    np.testing.assert_array_equal(actual[0, 0], x[0, 0])  # position 0 is not turned


def test_rope_makes_scores_depend_on_distance_only() -> None:
    q, k = jnp.asarray(normal(1, 1, 1, 8)), jnp.asarray(normal(1, 1, 1, 8))
    frequencies = rope_frequencies(CONFIGS["llama"])

    def score(i: int, j: int) -> float:
        return float(jnp.sum(rope(q, jnp.array([[i]]), frequencies) * rope(k, jnp.array([[j]]), frequencies)))

    assert score(9, 4) == pytest.approx(score(25, 20), abs=1e-5)
    assert score(9, 4) != pytest.approx(score(9, 5), abs=1e-2)


def test_rope_tells_positions_apart_that_bfloat16_cannot() -> None:
    x = jnp.ones((1, 2, 1, 16), jnp.bfloat16)
    turned = rope(x, jnp.array([[256, 257]]), rope_frequencies(CONFIGS["gemma2"]))
    assert turned.dtype == jnp.bfloat16
    assert not np.array_equal(turned[0, 0], turned[0, 1])


def test_llama3_scaling_keeps_blends_and_slows() -> None:
    config = CONFIGS["llama"]
    plain = 1 / 500.0 ** (np.arange(4) / 4)
    wavelength = 2 * np.pi / plain
    smooth = (64 / wavelength[1] - 1.0) / (4.0 - 1.0)
    expected = [plain[0], (1 - smooth) * plain[1] / 8 + smooth * plain[1], plain[2] / 8, plain[3] / 8]
    assert wavelength[0] < 64 / 4 < wavelength[1] < 64 / 1 < wavelength[2]  # so that all three cases are here
    np.testing.assert_allclose(rope_frequencies(config), expected, rtol=1e-6)


def test_llama31_slows_only_the_slow_frequencies() -> None:
    scaled, plain = (rope_frequencies(PRESETS[name]) for name in ("llama-3.1-8b", "llama-3-8b"))
    np.testing.assert_array_equal(scaled[:29], plain[:29])
    np.testing.assert_allclose(scaled[36:], plain[36:] / 8, rtol=1e-6)
    assert np.all(scaled[29:35] < plain[29:35])


@pytest.mark.parametrize("window", [None, 1, 3])
def test_causal_mask_by_definition(window: int | None) -> None:
    real = np.array([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1]], bool)
    positions = np.asarray(ranks(jnp.asarray(real)))
    mask = np.asarray(causal_mask(jnp.asarray(positions), jnp.asarray(positions), jnp.asarray(real)[:, None], window))
    for b, t, s in np.ndindex(*mask.shape):
        if real[b, t]:  # nothing reads what padding sees
            assert mask[b, t, s] == (real[b, s] and s <= t and (window is None or t - s < window))


def test_ranks_count_from_the_first_token_of_each_segment() -> None:
    mask = jnp.array([[0, 0, 1, 1], [1, 1, 1, 0]], bool)
    np.testing.assert_array_equal(np.where(mask, ranks(mask), -1), [[-1, -1, 0, 1], [0, 1, 2, -1]])
    segments = np.array([[1, 1, 1, 2, 2, 0, 0], [1, 2, 2, 2, 2, 2, 2]], np.int32)
    np.testing.assert_array_equal(
        np.where(segments, ranks(jnp.asarray(segments)), -1), [[0, 1, 2, 0, 1, -1, -1], [0, 0, 1, 2, 3, 4, 5]]
    )


def reference_attention(q, k, v, mask, scale, softcap) -> np.ndarray:
    """Head by head, in float64."""
    b, t, n, _ = q.shape
    out = np.zeros(q.shape)
    for i, j, head in np.ndindex(b, t, n):
        kv = head // (n // k.shape[2])
        seen = np.flatnonzero(mask[i, j])
        logits = k[i, seen, kv].astype(np.float64) @ q[i, j, head] * scale
        if softcap is not None:
            logits = softcap * np.tanh(logits / softcap)
        weights = np.exp(logits - logits.max())
        out[i, j, head] = weights / weights.sum() @ v[i, seen, kv]
    return out


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("kv_heads", [1, 2, 6])
def test_attend_by_definition(kv_heads: int, softcap: float | None) -> None:
    q, k, v = normal(2, 5, 6, 4), normal(2, 7, kv_heads, 4), normal(2, 7, kv_heads, 4)
    mask = RNG.random((2, 5, 7)) < 0.5
    mask[..., 0] = True
    expected = reference_attention(q, k, v, mask, 1.3, softcap)
    actual = attend(*map(jnp.asarray, (q, k, v, mask)), scale=1.3, softcap=softcap)
    np.testing.assert_allclose(actual, expected, atol=2e-6)


def test_softcap_comes_before_the_mask() -> None:
    # masking first and capping then would leave a masked key a weight of exp(-softcap)
    q, k, v = normal(1, 1, 1, 4), normal(1, 2, 1, 4), normal(1, 2, 1, 4)
    out = attend(*map(jnp.asarray, (q, k, v)), jnp.array([[[True, False]]]), scale=1.0, softcap=0.5)
    np.testing.assert_array_equal(out[0, 0, 0], v[0, 0, 0])


def test_a_query_that_sees_nothing_stays_finite() -> None:
    q, k, v = normal(1, 1, 2, 4), normal(1, 3, 1, 4), normal(1, 3, 1, 4)
    out = attend(*map(jnp.asarray, (q, k, v)), jnp.zeros((1, 1, 3), bool), scale=1.0, softcap=None)
    np.testing.assert_allclose(out[0, 0, 1], v[0, :, 0].mean(0), atol=1e-6)


def test_softmax_of_bfloat16_is_float32() -> None:
    # 600 equal keys: weights of 1/600 survive, and sum to one better than bfloat16 could add them up
    q, k = jnp.zeros((1, 1, 1, 4), jnp.bfloat16), jnp.zeros((1, 600, 1, 4), jnp.bfloat16)
    out = attend(q, k, jnp.ones((1, 600, 1, 4), jnp.bfloat16), jnp.ones((1, 1, 600), bool), 1.0, None)
    assert out.dtype == jnp.bfloat16
    np.testing.assert_allclose(out.astype(jnp.float32), 1.0, atol=0.01)


# The splash kernel, against the einsum


def padded_rows(length: int) -> np.ndarray:
    """Real tokens of four rows: all, the first ones, the last ones, none."""
    column = np.arange(length)
    return np.stack([column >= 0, column < length - 7, column >= 9, column < 0])


def both_ways(
    q: Array, k: Array, v: Array, real: Array, seed: Array, window: int | None, softcap: float | None
) -> list[list[np.ndarray]]:
    """Outputs and gradients at the real tokens, [einsum, splash]; `seed` is the gradient of the output."""

    def weighted(q: Array, k: Array, v: Array, attention: str) -> tuple[Array, Array]:
        out = attend(q, k, v, row_mask(ranks(real), real, window, attention), 0.3, softcap)
        out = jnp.where(real[..., None, None], out, 0)  # nothing reads what padding queries get
        return jnp.sum(out.astype(jnp.float32) * seed.astype(jnp.float32)), out

    ways = []
    for attention in ("einsum", "splash"):
        value_and_grad = jax.value_and_grad(partial(weighted, attention=attention), argnums=(0, 1, 2), has_aux=True)
        (_, out), grads = jax.jit(value_and_grad)(q, k, v)
        ways.append([np.asarray(x, np.float32) for x in (out, *grads)])
    return ways


@pytest.mark.usefixtures("splash_on_cpu")
@pytest.mark.parametrize(
    ("length", "kv_heads", "window", "softcap"),
    [
        (136, 2, None, 2.0),  # two blocks, the second almost empty
        (136, 1, 20, 2.0),  # a window across blocks
        (128, 2, 128, None),  # one whole block, and a window that cannot bind
        (24, 4, 5, None),
    ],
)
def test_splash_equals_einsum(length: int, kv_heads: int, window: int | None, softcap: float | None) -> None:
    q, k, v, seed = (jnp.asarray(normal(4, length, heads, 16)) for heads in (4, kv_heads, kv_heads, 4))
    einsum, splash = both_ways(q, k, v, jnp.asarray(padded_rows(length)), seed, window, softcap)
    for theirs, ours in zip(einsum, splash, strict=True):
        assert np.abs(theirs).max() > 0.5
        np.testing.assert_allclose(ours, theirs, atol=5e-6)


@pytest.mark.usefixtures("splash_on_cpu")
def test_splash_in_bfloat16_is_as_near_to_float32_as_einsum() -> None:
    # Both round intermediate values to eight bits, but not the same ones: each is off by some 2^-9, relatively.
    shapes = [(4, 24, heads, 16) for heads in (4, 2, 2, 4)]
    q, k, v, seed = (jnp.asarray(normal(*shape), jnp.bfloat16) for shape in shapes)
    real = jnp.asarray(padded_rows(24))
    exact, _ = both_ways(*(x.astype(jnp.float32) for x in (q, k, v)), real, seed, 5, 2.0)
    for ways in both_ways(q, k, v, real, seed, 5, 2.0):
        for rounded, reference in zip(ways, exact, strict=True):
            assert np.linalg.norm(rounded - reference) < 2**-7 * np.linalg.norm(reference)


@pytest.mark.usefixtures("splash_on_cpu")
@pytest.mark.parametrize("sides", [{}, {"data": 2, "fsdp": 2}])
def test_splash_runs_on_each_device_of_a_mesh(sides: dict[str, int]) -> None:
    mesh = make_mesh(**sides)
    arrays = [*(normal(4, 24, heads, 16) for heads in (4, 2, 2)), padded_rows(24), normal(4, 24, 4, 16)]
    with jax.set_mesh(mesh):
        einsum, splash = both_ways(*shard_batch(arrays, mesh), 5, 2.0)
    for theirs, ours in zip(einsum, splash, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=5e-6)


@pytest.mark.usefixtures("splash_on_cpu")
def test_padding_of_splash_stays_finite_and_unread() -> None:
    q, k, v = (normal(4, 24, heads, 16) for heads in (4, 2, 2))
    real = padded_rows(24)
    spoilt = np.where(real[..., None, None], v, np.float32(1e3))
    splash = jax.jit(lambda values: attend(q, k, values, WholeRows(real, None), 0.3, None))
    ways = [np.asarray(splash(values)) for values in (v, spoilt)]
    np.testing.assert_array_equal(ways[0][real], ways[1][real])
    assert np.isfinite(ways[1]).all()
