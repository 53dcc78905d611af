"""The hypernetwork: what it is made of, where it starts, and what its vector depends on."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import Array

from hypersteer_jax.config import HypernetConfig
from hypersteer_jax.models.attention import rms_norm
from hypersteer_jax.models.hypernet import Hypernet, init_hypernet
from hypersteer_jax.models.lm import cast
from tests.conftest import random_hypernet
from tests.models.tiny import CONFIGS, random_lm

VARIANTS = ("no_context", "in_context", "cross_attention")
GEMMA2 = CONFIGS["gemma2"]
CROSS, PLAIN = HypernetConfig(blocks=2), HypernetConfig("no_context", blocks=2)
RNG = np.random.default_rng(0)
TOKENS = RNG.integers(1, 97, (3, 6)).astype(np.int32)
MASK = np.arange(6) >= np.array([0, 2, 3])[:, None]  # left-padded
CONTEXT = RNG.normal(size=(3, 7, 32)).astype(np.float32)
SEEN = np.arange(7) < np.array([7, 4, 5])[:, None]
TABLE = RNG.normal(size=(97, 32)).astype(np.float32)

write = jax.jit(Hypernet.__call__, static_argnames="remat")


def vector(net: Hypernet, **changed: Any) -> np.ndarray:
    inputs = {"tokens": TOKENS, "mask": MASK, "context": CONTEXT, "context_mask": SEEN, "lm_embedding": TABLE}
    return np.asarray(write(net, **(inputs | changed)))


def leaves(tree: Any) -> dict[str, Array]:
    return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def with_same_weights(config: HypernetConfig, net: Hypernet) -> Hypernet:
    """A hypernetwork of another config with the weights of `net`; those that `net` lacks are drawn."""
    have = leaves(net)
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: have.get(jax.tree_util.keystr(path), leaf), random_hypernet(config, net.lm_config, seed=9)
    )


@pytest.mark.parametrize("variant", VARIANTS)
def test_parts_and_shapes(variant: str) -> None:
    net = jax.eval_shape(lambda: Hypernet(HypernetConfig(variant, blocks=3), GEMMA2, nnx.Rngs(0)))
    shapes = {name: leaf.shape for name, leaf in leaves(net).items()}
    assert {leaf.dtype for leaf in jax.tree.leaves(net)} == {jnp.dtype(jnp.float32)}
    assert net.embedding.shape == (97, 32)
    assert net.head.shape == (32, 32)
    assert net.head_bias.shape == net.final_norm.shape == (32,)
    assert {shape[0] for name, shape in shapes.items() if "blocks" in name} == {3}
    cross = {name for name in shapes if "cross" in name}
    assert len(cross) == (6 if variant == "cross_attention" else 0)  # q k v o and two norms
    out = jax.eval_shape(Hypernet.__call__, net, TOKENS, MASK, jnp.zeros((3, 7, 32), jnp.bfloat16), SEEN, TABLE)
    assert (out.shape, out.dtype) == ((3, 32), jnp.float32)


def test_starts_as_the_first_blocks_and_the_embedding_of_the_lm() -> None:
    lm = cast(random_lm(GEMMA2), jnp.bfloat16)
    net = init_hypernet(CROSS, lm, nnx.Rngs(0))
    ours, theirs = leaves(net), leaves(lm)
    copied = [name for name in ours if name in theirs and ("blocks" in name or "embedding" in name)]
    assert len(copied) == 4 + 3 + 4 + 1  # attention, MLP, norms, embedding
    for name in copied:
        whole = np.asarray(theirs[name].astype(jnp.float32))
        np.testing.assert_array_equal(ours[name], whole[:2] if "blocks" in name else whole, err_msg=name)
    assert {leaf.dtype for leaf in ours.values()} == {jnp.dtype(jnp.float32)}


def test_cross_attention_and_head_start_random() -> None:
    net = init_hypernet(CROSS, random_lm(GEMMA2), nnx.Rngs(0))
    drawn = {"head": np.asarray(net.head[...])}
    drawn |= {name: np.asarray(getattr(net.blocks.cross, name)[...]) for name in ("q", "k", "v", "o")}
    for name, value in drawn.items():
        assert 0.015 < value.std() < 0.025, name
        assert abs(value.mean()) < 0.005, name
    assert np.abs(drawn["q"][0] - drawn["q"][1]).max() > 0.01  # each block draws its own
    assert not net.head_bias[...].any()
    assert not net.blocks.pre_cross[...].any()  # Gemma's norms stand around 0
    assert not net.blocks.post_cross[...].any()


def test_seed_decides_what_is_drawn() -> None:
    lm = random_lm(GEMMA2)
    one, same, other = (init_hypernet(CROSS, lm, nnx.Rngs(seed)) for seed in (0, 0, 1))
    np.testing.assert_array_equal(one.head[...], same.head[...])
    assert np.abs(one.head[...] - other.head[...]).max() > 0.01
    np.testing.assert_array_equal(one.blocks.mlp.up[...], other.blocks.mlp.up[...])


def test_random_start_has_nothing_of_the_lm() -> None:
    lm = random_lm(GEMMA2)  # weights of standard deviation 0.2
    net = init_hypernet(dataclasses.replace(CROSS, init="random", blocks=6), lm, nnx.Rngs(0))  # more blocks than the LM
    for part in (net.embedding, net.blocks.attention.q, net.blocks.mlp.down):
        assert 0.015 < np.asarray(part[...]).std() < 0.025
    assert net.blocks.mlp.down.shape[0] == 6


@pytest.mark.parametrize("family", ["gemma2", "llama"])
def test_zero_cross_attention_is_the_identity_and_learns(family: str) -> None:
    lm = random_lm(CONFIGS[family])
    zero = init_hypernet(dataclasses.replace(CROSS, cross_init="zero"), lm, nnx.Rngs(0))
    plain = with_same_weights(PLAIN, zero)
    np.testing.assert_array_equal(vector(zero), vector(plain))
    normal = init_hypernet(CROSS, lm, nnx.Rngs(0))
    assert np.abs(vector(normal) - vector(with_same_weights(PLAIN, normal))).max() > 1e-4

    @jax.jit
    @jax.grad
    def gradient(net: Hypernet) -> Array:
        return jnp.sum(net(TOKENS, MASK, CONTEXT, SEEN, TABLE) * jnp.arange(1.0, 33.0))

    opened = gradient(zero).blocks
    opened = opened.post_cross if family == "gemma2" else opened.cross.o
    assert np.abs(np.asarray(opened[...])).reshape(2, -1).max(axis=1).min() > 1e-4


@pytest.mark.parametrize("variant", ["no_context", "in_context"])
def test_variants_without_context_do_not_read_it(variant: str) -> None:
    net = random_hypernet(HypernetConfig(variant, blocks=2), GEMMA2)
    np.testing.assert_array_equal(vector(net), vector(net, context=-CONTEXT, context_mask=~SEEN))


def test_reads_the_context_where_it_may_and_nowhere_else() -> None:
    net = random_hypernet(CROSS, GEMMA2)
    before = vector(net)
    unseen = np.where(SEEN[..., None], CONTEXT, 1 - CONTEXT)
    np.testing.assert_array_equal(vector(net, context=unseen), before)
    for column in range(4):  # seen in every row
        changed = np.where(np.arange(7)[:, None] == column, 1 - CONTEXT, CONTEXT)
        assert np.abs(vector(net, context=changed) - before).max(axis=1).min() > 1e-3


def test_last_column_is_read_and_every_token_counts() -> None:
    net = random_hypernet(CROSS, dataclasses.replace(GEMMA2, sliding_window=6))
    before = vector(net)
    for column in range(6):
        moved = np.abs(vector(net, tokens=np.where(np.arange(6) == column, 97 - TOKENS, TOKENS)) - before).max(axis=1)
        np.testing.assert_array_equal(moved > 1e-4, MASK[:, column])
        np.testing.assert_array_equal(moved == 0, ~MASK[:, column])  # what stands in padding is not read


@pytest.mark.parametrize("family", ["gemma2", "llama", "qwen2", "qwen3"])
def test_left_padding_changes_nothing(family: str) -> None:
    net = random_hypernet(CROSS, CONFIGS[family])
    more = ((0, 0), (2, 0))
    wider = vector(net, tokens=np.pad(TOKENS, more, constant_values=40), mask=np.pad(MASK, more))
    np.testing.assert_allclose(wider, vector(net), atol=1e-5, rtol=1e-5)
    assert np.abs(wider).max() > 0.1


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_other_families_keep_their_own_parts(family: str) -> None:
    config = CONFIGS[family]
    net = init_hypernet(CROSS, random_lm(config), nnx.Rngs(0))
    parts = {name: leaf.shape for name, leaf in leaves(net.blocks).items()}
    assert sum("bias" in name for name in parts) == (3 if family == "qwen2" else 0)
    assert sum("q_norm" in name or "k_norm" in name for name in parts) == (2 if family == "qwen3" else 0)
    assert sum("post" in name for name in parts) == 0
    assert net.blocks.cross.q_bias is None
    assert net.blocks.cross.q_norm is None
    np.testing.assert_array_equal(net.blocks.pre_cross[...], np.ones((2, 32)))


def test_shared_embedding_is_the_lms_table() -> None:
    own = random_hypernet(CROSS, GEMMA2)
    shared = with_same_weights(dataclasses.replace(CROSS, embedding="shared"), own)
    assert shared.embedding is None
    np.testing.assert_array_equal(vector(shared, lm_embedding=own.embedding[...]), vector(own))
    assert np.abs(vector(shared) - vector(own)).max() > 0.01
    np.testing.assert_array_equal(vector(own, lm_embedding=-TABLE), vector(own))
    started = init_hypernet(shared.config, random_lm(GEMMA2), nnx.Rngs(0))
    assert started.embedding is None


def read_out(config: HypernetConfig) -> tuple[Hypernet, np.ndarray]:
    """A hypernetwork, and what stands at its last position after the blocks."""
    net = random_hypernet(config, GEMMA2)
    open_head = with_same_weights(PLAIN, net)
    open_head.head[...], open_head.head_bias[...] = jnp.eye(32), jnp.zeros(32)
    return net, vector(open_head)


def test_head_is_linear_with_a_bias() -> None:
    net, last = read_out(PLAIN)
    np.testing.assert_allclose(vector(net), last @ net.head[...] + net.head_bias[...], atol=1e-5)
    scaled = with_same_weights(PLAIN, net)
    scaled.final_norm[...] = net.final_norm[...] + 1
    np.testing.assert_array_equal(vector(scaled), vector(net))  # defined, and never applied


def test_final_norm() -> None:
    net, last = read_out(dataclasses.replace(PLAIN, final_norm=True))
    normed = last / np.sqrt(np.mean(np.square(last), axis=1, keepdims=True) + 1e-6) * (1 + net.final_norm[...])
    np.testing.assert_allclose(vector(net), normed @ net.head[...] + net.head_bias[...], atol=1e-5)
    assert np.abs(vector(net) - vector(with_same_weights(PLAIN, net))).max(axis=1).min() > 0.1


def test_mlp_head() -> None:
    net, last = read_out(dataclasses.replace(PLAIN, head="mlp"))
    mlp = net.head_mlp
    assert mlp.gate.shape == mlp.down.shape == (32, 32)
    gated = np.asarray(jax.nn.gelu(last @ mlp.gate[...], approximate=True)) * (last @ mlp.up[...]) @ mlp.down[...]
    np.testing.assert_allclose(vector(net), gated @ net.head[...] + net.head_bias[...], atol=1e-4, rtol=1e-4)
    assert np.abs(vector(net) - vector(with_same_weights(PLAIN, net))).max(axis=1).min() > 0.1


def test_memory_norm() -> None:
    net = random_hypernet(dataclasses.replace(CROSS, memory_norm=True), GEMMA2)
    raw = with_same_weights(CROSS, net)
    normed = rms_norm(CONTEXT, net.memory_norm[...], 1e-6, 1.0)
    np.testing.assert_allclose(vector(net), vector(raw, context=normed), atol=1e-5)
    np.testing.assert_allclose(vector(net, context=10 * CONTEXT), vector(net), atol=1e-5)
    assert np.abs(vector(net) - vector(raw)).max(axis=1).min() > 1e-3
    plain = jax.eval_shape(lambda: Hypernet(dataclasses.replace(PLAIN, memory_norm=True), GEMMA2, nnx.Rngs(0)))
    assert plain.memory_norm is None  # there is no memory to norm


def test_remat_changes_nothing() -> None:
    net = random_hypernet(CROSS, GEMMA2)
    np.testing.assert_allclose(vector(net, remat=True), vector(net), atol=1e-6)
