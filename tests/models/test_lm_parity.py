"""The LM against Hugging Face's own code, module by module and whole, with every weight random.

The models are written by `save_pretrained` and read by `load_lm`, so names, layouts and settings are tested with them.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hypersteer_jax.models.attention import causal_mask, rms_norm, rope, rope_frequencies
from hypersteer_jax.models.lm import LM, Block, cast, ranks
from hypersteer_jax.models.weights import load_lm, save_lm
from tests.models.tiny import CONFIGS

torch = pytest.importorskip("torch", reason="parity with PyTorch needs torch; not run: the LM against Hugging Face")
transformers = pytest.importorskip("transformers", reason="not run: the LM against Hugging Face")
torch.set_num_threads(1)

BATCH, LENGTH = 2, 13  # three windows of the tiny Gemma-2 and a token
RNG = np.random.default_rng(0)
TOKENS = RNG.integers(0, 97, (BATCH, LENGTH))
X = RNG.normal(size=(BATCH, LENGTH, 32)).astype(np.float32)
POSITIONS = np.stack([np.arange(LENGTH), np.arange(50, 50 + LENGTH)])

SIZES: dict[str, Any] = {
    "vocab_size": 97,
    "num_hidden_layers": 4,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
}
THEIRS = {  # the tiny LMs once more, in transformers' words
    "gemma2": lambda: transformers.Gemma2Config(
        **SIZES,
        head_dim=16,
        query_pre_attn_scalar=24,
        attn_logit_softcapping=3.0,
        final_logit_softcapping=8.0,
        sliding_window=4,
    ),
    "llama": lambda: transformers.LlamaConfig(
        **SIZES,
        rms_norm_eps=1e-5,
        rope_parameters=LLAMA3_ROPE | {"original_max_position_embeddings": 64},
        tie_word_embeddings=False,
    ),
    "llama-tied": lambda: transformers.LlamaConfig(
        **SIZES,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 5e5},
        tie_word_embeddings=True,
    ),
    "qwen2": lambda: transformers.Qwen2Config(
        **SIZES, rope_parameters={"rope_type": "default", "rope_theta": 1e6}, tie_word_embeddings=False
    ),
    "qwen3": lambda: transformers.Qwen3Config(
        **SIZES, head_dim=16, rope_parameters={"rope_type": "default", "rope_theta": 1e6}, tie_word_embeddings=True
    ),
}


class Pair(NamedTuple):
    name: str
    theirs: Any
    ours: LM


@pytest.fixture(autouse=True)
def highest_precision() -> Iterator[None]:
    with jax.default_matmul_precision("highest"), torch.no_grad():
        yield


@pytest.fixture(scope="module", params=THEIRS)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    path = tmp_path_factory.mktemp(request.param)
    torch.manual_seed(0)
    theirs = transformers.AutoModelForCausalLM.from_config(THEIRS[request.param](), attn_implementation="eager").eval()
    for parameter in theirs.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)  # norms and biases, too
    theirs.save_pretrained(path)
    ours = load_lm(path, jnp.float32)
    assert ours.config == CONFIGS[request.param]
    return Pair(request.param, theirs, ours)


def block_of(lm: LM, index: int) -> Block:
    return jax.tree.map(lambda weight: np.asarray(weight)[index], lm.blocks)


def mask_of(pair: Pair, index: int) -> np.ndarray:
    """Which keys each query sees in a block, by definition."""
    distance = np.arange(LENGTH)[:, None] - np.arange(LENGTH)[None]
    window = 4 if pair.name == "gemma2" and index % 2 == 0 else LENGTH
    return np.broadcast_to((distance >= 0) & (distance < window), (BATCH, LENGTH, LENGTH))


def attention_arguments(pair: Pair, index: int) -> dict[str, Any]:
    """What Hugging Face's attention and block want besides the residual."""
    additive = np.where(mask_of(pair, index), 0.0, np.finfo(np.float32).min).astype(np.float32)
    turns = pair.theirs.model.rotary_emb(torch.tensor(X), torch.tensor(POSITIONS))
    return {"position_embeddings": turns, "attention_mask": torch.tensor(additive)[:, None]}


def test_norm(pair: Pair) -> None:
    config = pair.ours.config
    actual = rms_norm(jnp.asarray(X), pair.ours.final_norm[...], config.norm_eps, config.norm_offset)
    np.testing.assert_allclose(actual, pair.theirs.model.norm(torch.tensor(X)), atol=1e-6, rtol=1e-6)


def test_rope(pair: Pair) -> None:
    config = pair.ours.config
    q = RNG.normal(size=(BATCH, LENGTH, 4, config.head_dim)).astype(np.float32)
    turns = pair.theirs.model.rotary_emb(torch.tensor(X), torch.tensor(POSITIONS))
    apply = transformers.models.llama.modeling_llama.apply_rotary_pos_emb  # the same function in every family
    expected = apply(*[torch.tensor(q).transpose(1, 2)] * 2, *turns)[0].transpose(1, 2)
    actual = rope(jnp.asarray(q), jnp.asarray(POSITIONS), rope_frequencies(config))
    np.testing.assert_allclose(actual, expected, atol=1e-5)


@pytest.mark.parametrize("index", [0, 1])
def test_attention(pair: Pair, index: int) -> None:
    expected = pair.theirs.model.layers[index].self_attn(torch.tensor(X), **attention_arguments(pair, index))[0]
    attention, frequencies = block_of(pair.ours, index).attention, rope_frequencies(pair.ours.config)
    q, (k, v) = attention.queries(jnp.asarray(X)), attention.keys_values(jnp.asarray(X))
    q, k = (rope(heads, jnp.asarray(POSITIONS), frequencies) for heads in (q, k))
    actual = attention.attend(q, k, v, jnp.asarray(mask_of(pair, index)))
    np.testing.assert_allclose(actual, expected, atol=1e-5, rtol=1e-5)


def test_mlp(pair: Pair) -> None:
    expected = pair.theirs.model.layers[2].mlp(torch.tensor(X))
    np.testing.assert_allclose(block_of(pair.ours, 2).mlp(jnp.asarray(X)), expected, atol=1e-5, rtol=1e-5)


def test_embedding(pair: Pair) -> None:
    tokens = torch.tensor(TOKENS)
    states = pair.theirs.model(tokens, output_hidden_states=True).hidden_states
    np.testing.assert_allclose(pair.ours.embed(jnp.asarray(TOKENS)), states[0], rtol=1e-6)


@pytest.mark.parametrize("index", [2, 3])
def test_block(pair: Pair, index: int) -> None:
    expected = pair.theirs.model.layers[index](torch.tensor(X), **attention_arguments(pair, index))
    positions, real = jnp.asarray(POSITIONS), jnp.ones((BATCH, LENGTH), bool)
    actual = pair.ours.run(jnp.asarray(X), positions, real, index, index + 1)
    np.testing.assert_allclose(actual, expected, atol=1e-5, rtol=1e-5)


def logits_of(pair: Pair, real: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Ours and theirs, at real tokens."""
    ours = jax.jit(LM.__call__)(pair.ours, jnp.asarray(TOKENS), jnp.asarray(real))
    positions = torch.tensor(np.asarray(ranks(jnp.asarray(real))))
    mask = torch.tensor(real.astype(np.int64))
    theirs = pair.theirs(torch.tensor(TOKENS), attention_mask=mask, position_ids=positions).logits
    return np.asarray(ours)[real], theirs.float().numpy()[real]


@pytest.mark.parametrize("padding", ["none", "left", "right"])
def test_logits(pair: Pair, padding: str) -> None:
    first = np.arange(LENGTH) < (0 if padding == "none" else 5)
    real = np.stack([~(first if padding == "left" else first[::-1]), np.ones(LENGTH, bool)])
    ours, theirs = logits_of(pair, real)
    assert np.std(theirs) > 1  # 1e-4 is small beside it
    np.testing.assert_allclose(ours, theirs, atol=1e-4)


def test_transformers_loads_what_we_save(pair: Pair, tmp_path: Path) -> None:
    save_lm(pair.ours, tmp_path, max_shard=20_000)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager").eval()
    assert again.dtype == torch.float32
    tokens = torch.tensor(TOKENS)
    assert torch.equal(again(tokens).logits, pair.theirs(tokens).logits)
    for name, tensor in pair.theirs.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name


@pytest.mark.parametrize("pair", ["gemma2"], indirect=True)
def test_gemma2_in_bfloat16(pair: Pair, tmp_path: Path) -> None:
    """Two bfloat16 programs round at different places, so neither is the truth: float32 is.

    Each result is off by up to 2^-9 of itself, and four blocks round about 40 times: errors that add up at random come
    to 2^-9 * sqrt(40) = 0.012 of logits whose deviation is 1.1. We must be as near to float32 as PyTorch is, but for a
    quarter, and no logit may be off by more than 0.12, nine of those errors.
    """
    real = np.ones((BATCH, LENGTH), bool)
    exact = logits_of(pair, real)[1]
    save_lm(cast(pair.ours, jnp.bfloat16), tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager").eval()
    assert theirs.dtype == torch.bfloat16  # config.json says so
    ours, theirs = logits_of(Pair(pair.name, theirs, load_lm(tmp_path, jnp.bfloat16)), real)

    def error(logits: np.ndarray) -> float:
        return float(np.sqrt(np.mean(np.square(logits - exact))))

    assert 0.001 < error(ours) < 1.25 * error(theirs)  # not below: then it would not have been bfloat16
    np.testing.assert_allclose(ours, theirs, atol=0.12)


def test_mask_equals_definition(pair: Pair) -> None:
    positions, real = jnp.asarray(POSITIONS), jnp.ones((BATCH, LENGTH), bool)
    window = pair.ours.config.sliding_window
    np.testing.assert_array_equal(causal_mask(positions, positions, real[:, None], window), mask_of(pair, 0))
