import dataclasses
import json

import pytest

from hypersteer_jax.config import ConfigError, LMConfig
from hypersteer_jax.models.presets import PRESETS, from_hugging_face, from_llama2c, to_hugging_face
from tests.models.tiny import CONFIGS

GEMMA2 = {
    "model_type": "gemma2",
    "attention_bias": False,
    "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
    "hidden_act": "gelu_pytorch_tanh",
    "hidden_activation": "gelu_pytorch_tanh",
    "rms_norm_eps": 1e-06,
    "rope_theta": 10000.0,
    "sliding_window": 4096,
    "vocab_size": 256000,
}
LLAMA3 = {
    "model_type": "llama",
    "attention_bias": False,
    "hidden_act": "silu",
    "mlp_bias": False,
    "num_key_value_heads": 8,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "vocab_size": 128256,
}
LLAMA31_SCALING = {
    "factor": 8.0,
    "high_freq_factor": 4.0,
    "low_freq_factor": 1.0,
    "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
}
LLAMA32 = LLAMA3 | {"rope_scaling": LLAMA31_SCALING | {"factor": 32.0}, "tie_word_embeddings": True}
QWEN25 = {
    "model_type": "qwen2",
    "hidden_act": "silu",
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": 32768,
    "tie_word_embeddings": True,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
QWEN3 = {
    "model_type": "qwen3",
    "attention_bias": False,
    "head_dim": 128,
    "hidden_act": "silu",
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": None,
    "tie_word_embeddings": True,
    "use_sliding_window": False,
    "vocab_size": 151936,
}


def sizes(width: int, mlp_width: int, layers: int, heads: int, **more: object) -> dict[str, object]:
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    return dict(zip(names, (width, mlp_width, layers, heads), strict=True)) | more


PUBLISHED = {  # from each model's config.json on the hub
    "gemma-2-2b": GEMMA2 | sizes(2304, 9216, 26, 8, num_key_value_heads=4, head_dim=256, query_pre_attn_scalar=256),
    "gemma-2-9b": GEMMA2 | sizes(3584, 14336, 42, 16, num_key_value_heads=8, head_dim=256, query_pre_attn_scalar=256),
    "gemma-2-27b": GEMMA2 | sizes(4608, 36864, 46, 32, num_key_value_heads=16, head_dim=128, query_pre_attn_scalar=144),
    "llama-3-8b": LLAMA3 | sizes(4096, 14336, 32, 32),
    "llama-3.1-8b": LLAMA3 | sizes(4096, 14336, 32, 32, rope_scaling=LLAMA31_SCALING),
    "llama-3.2-1b": LLAMA32 | sizes(2048, 8192, 16, 32, head_dim=64),
    "llama-3.2-3b": LLAMA32 | sizes(3072, 8192, 28, 24, head_dim=128),
    "qwen2.5-0.5b": QWEN25 | sizes(896, 4864, 24, 14, num_key_value_heads=2),
    "qwen2.5-1.5b": QWEN25 | sizes(1536, 8960, 28, 12, num_key_value_heads=2),
    "qwen2.5-7b": QWEN25
    | sizes(3584, 18944, 28, 28, num_key_value_heads=4, vocab_size=152064, tie_word_embeddings=False),
    "qwen3-0.6b": QWEN3 | sizes(1024, 3072, 28, 16),
    "qwen3-1.7b": QWEN3 | sizes(2048, 6144, 28, 16),
    "qwen3-4b": QWEN3 | sizes(2560, 9728, 36, 32),
    "qwen3-8b": QWEN3 | sizes(4096, 12288, 36, 32, tie_word_embeddings=False),
}
PARAMETERS = {  # as counted by Hugging Face over the published weights
    "gemma-2-2b": 2_614_341_888,
    "gemma-2-9b": 9_241_705_984,
    "gemma-2-27b": 27_227_128_320,
    "llama-3-8b": 8_030_261_248,
    "llama-3.1-8b": 8_030_261_248,
    "llama-3.2-1b": 1_235_814_400,
    "llama-3.2-3b": 3_212_749_824,
    "qwen2.5-0.5b": 494_032_768,
    "qwen2.5-1.5b": 1_543_714_304,
    "qwen2.5-7b": 7_615_616_512,
    "qwen3-0.6b": 596_049_920,
    "qwen3-1.7b": 1_720_574_976,
    "qwen3-4b": 4_022_468_096,
    "qwen3-8b": 8_190_735_360,
}


def count(c: LMConfig) -> int:
    """Parameters of a model, by arithmetic."""
    heads = 2 * c.heads + 2 * c.kv_heads
    biases = (c.heads + 2 * c.kv_heads) * c.head_dim if c.qkv_bias else 0
    norms = (4 if c.sandwich_norms else 2) * c.width + (2 * c.head_dim if c.qk_norm else 0)
    block = c.width * heads * c.head_dim + 3 * c.width * c.mlp_width + biases + norms
    return c.vocab * c.width * (1 if c.tied else 2) + c.layers * block + c.width


def test_every_preset_has_a_published_config() -> None:
    assert PRESETS.keys() == PUBLISHED.keys() == PARAMETERS.keys()


@pytest.mark.parametrize("name", PRESETS)
def test_preset_equals_published_config(name: str) -> None:
    assert PRESETS[name] == from_hugging_face(PUBLISHED[name])


@pytest.mark.parametrize("name", PRESETS)
def test_preset_has_the_published_number_of_parameters(name: str) -> None:
    assert count(PRESETS[name]) == PARAMETERS[name]


def test_gemma2_27b_scales_queries_by_its_own_constant() -> None:
    assert PRESETS["gemma-2-27b"].query_scale == pytest.approx(1 / 12)
    assert PRESETS["gemma-2-9b"].query_scale == pytest.approx(1 / 16)


@pytest.mark.parametrize("name", PRESETS)
def test_rope_parameters_of_transformers_5(name: str) -> None:
    new = dict(PUBLISHED[name])
    scaling = new.pop("rope_scaling", None) or {"rope_type": "default"}
    new["rope_parameters"] = scaling | {"rope_theta": new.pop("rope_theta")}
    assert from_hugging_face(new) == PRESETS[name]


@pytest.mark.parametrize(
    "config", [*PRESETS.values(), *CONFIGS.values()], ids=[*PRESETS, *(f"tiny-{c}" for c in CONFIGS)]
)
def test_round_trip_through_json(config: LMConfig) -> None:
    back = from_hugging_face(json.loads(json.dumps(to_hugging_face(config))))
    assert dataclasses.replace(back, attention_scale=None) == dataclasses.replace(config, attention_scale=None)
    assert back.query_scale == config.query_scale


def test_what_transformers_leaves_out_is_assumed_as_by_transformers() -> None:
    silent = {key: value for key, value in PUBLISHED["gemma-2-2b"].items() if key in sizes(1, 1, 1, 1)}
    silent |= {"model_type": "gemma2", "vocab_size": 256000, "num_key_value_heads": 4}
    assert from_hugging_face(silent) == PRESETS["gemma-2-2b"]


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("llama-3-8b", {"model_type": "mistral"}, "model_type is 'mistral'.*gemma2, llama, qwen2, qwen3"),
        ("llama-3-8b", {"model_type": None}, "model_type is None"),
        ("llama-3-8b", {"attention_bias": True}, "attention_bias is True"),
        ("llama-3-8b", {"mlp_bias": True}, "mlp_bias is True"),
        ("qwen2.5-7b", {"use_sliding_window": True}, "use_sliding_window is True.*set it to false"),
        ("gemma-2-2b", {"use_bidirectional_attention": True}, "use_bidirectional_attention is True"),
        ("gemma-2-2b", {"sliding_window": None}, "sliding_window is None"),
        (
            "gemma-2-2b",
            {"layer_types": ["full_attention"] * 26},
            "layer_types is .*only sliding_attention, full_attention",
        ),
        ("qwen3-4b", {"layer_types": ["sliding_attention"] * 36}, "layer_types is .*only full_attention"),
        ("llama-3-8b", {"quantization_config": {"bits": 4}}, "quantization_config is .*unquantised"),
        ("llama-3-8b", {"hidden_act": "relu"}, "hidden_act is 'relu'.*silu, gelu_pytorch_tanh"),
        ("llama-3-8b", {"hidden_size": None}, "hidden_size is None"),
        ("qwen2.5-7b", {"rope_scaling": {"type": "yarn", "factor": 4.0}}, "rope_type is 'yarn'.*default or llama3"),
        (
            "llama-3-8b",
            {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}},
            "llama3' without low_freq_factor, high",
        ),
    ],
)
def test_unsupported_settings_are_named(name: str, changes: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        from_hugging_face(PUBLISHED[name] | changes)


def test_layer_types_of_transformers_5_are_accepted() -> None:
    alternating = {"layer_types": ["sliding_attention", "full_attention"] * 13}
    assert from_hugging_face(PUBLISHED["gemma-2-2b"] | alternating) == PRESETS["gemma-2-2b"]


@pytest.mark.parametrize(
    ("config", "changes", "message"),
    [
        ("llama", {"qk_norm": True}, "qk_norm is True, but Hugging Face's llama always has False"),
        ("llama", {"final_softcap": 30.0}, "final_softcap is 30.0"),
        ("qwen2", {"qkv_bias": False}, "qkv_bias is False"),
        ("qwen3", {"attention_scale": 0.3}, "attention_scale is 0.3"),
        ("gemma2", {"attention_scale": 0.3}, "attention_scale is 0.3"),  # Hugging Face wants a whole number below it
        ("gemma2", {"sliding_window": None}, "sliding_window is None"),
    ],
)
def test_what_hugging_face_cannot_express_is_refused(config: str, changes: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        to_hugging_face(dataclasses.replace(CONFIGS[config], **changes))


LLAMA2C = {"dim": 64, "hidden_dim": 172, "n_layers": 5, "n_heads": 8, "n_kv_heads": 4, "vocab_size": 512}


def test_llama2c() -> None:
    config = from_llama2c(LLAMA2C)
    assert (config.width, config.mlp_width, config.layers, config.vocab) == (64, 172, 5, 512)
    assert (config.heads, config.kv_heads, config.head_dim, config.norm_eps, config.tied) == (8, 4, 8, 1e-5, True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architecture": "llama-bitnet"}, "architecture is 'llama-bitnet'.*'llama'"),
        ({"rope_style": "halves"}, "rope_style is 'halves'"),
        ({"n_layers": None, "vocab_size": None}, "vocab_size, n_layers missing"),
    ],
)
def test_llama2c_names_what_is_wrong(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        from_llama2c(LLAMA2C | changes)
