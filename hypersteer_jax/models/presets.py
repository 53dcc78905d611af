"""Shapes of published models, and the way to and from Hugging Face's `config.json`."""

import dataclasses
from typing import Any, Literal

from hypersteer_jax.config import ConfigError, LMConfig

FAMILIES: dict[str, dict[str, Any]] = {  # what every model of a family has
    "gemma2": {"norm_offset": 1.0, "sandwich_norms": True, "scale_embedding": True},
    "llama": {},
    "qwen2": {"qkv_bias": True},
    "qwen3": {"qk_norm": True},
}
ASSUMED: dict[str, dict[str, Any]] = {  # what transformers assumes where a config.json is silent
    "gemma2": {
        "head_dim": 256,
        "hidden_activation": "gelu_pytorch_tanh",
        "tie_word_embeddings": True,
        "query_pre_attn_scalar": 256,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
        "sliding_window": 4096,
    },
    "llama": {},
    "qwen2": {},
    "qwen3": {"head_dim": 128},
}
ARCHITECTURES = {
    "gemma2": "Gemma2ForCausalLM",
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
SIZES = {  # ours -> Hugging Face's
    "vocab": "vocab_size",
    "layers": "num_hidden_layers",
    "width": "hidden_size",
    "heads": "num_attention_heads",
    "mlp_width": "intermediate_size",
}
ROPE_SCALING = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
ACTIVATIONS: dict[str, Literal["silu", "gelu_tanh"]] = {
    "silu": "silu",
    "gelu_pytorch_tanh": "gelu_tanh",
}  # Hugging Face's -> ours
UNSUPPORTED = {  # settings that change the arithmetic in a way that `LMConfig` cannot express
    "attention_bias": "qwen2's query, key and value biases are the only ones known",
    "mlp_bias": "use a model whose MLP has no biases",
    "use_sliding_window": "set it to false if no sequence will be longer than the window",
    "use_bidirectional_attention": "use a causal model",
    "quantization_config": "use the unquantised weights",
}


def _preset(family: str, *sizes: int, **settings: Any) -> LMConfig:
    """One row of the table: V, L, D, N, K, H, F, then what differs inside the family."""
    names = ("vocab", "layers", "width", "heads", "kv_heads", "head_dim", "mlp_width")
    values: dict[str, Any] = {"family": family, **FAMILIES[family], **dict(zip(names, sizes, strict=True)), **settings}
    return LMConfig(**values)


def _gemma2(query_pre_attn_scalar: int) -> dict[str, Any]:
    return {
        "activation": "gelu_tanh",
        "attention_scale": query_pre_attn_scalar**-0.5,
        "attention_softcap": 50.0,
        "final_softcap": 30.0,
        "sliding_window": 4096,
    }


def _llama3(factor: float | None = None) -> dict[str, Any]:
    scaling = None if factor is None else (factor, 1.0, 4.0, 8192)
    return {"norm_eps": 1e-5, "rope_theta": 500_000.0, "rope_scaling": scaling}


QWEN = {"rope_theta": 1_000_000.0}

PRESETS: dict[str, LMConfig] = {
    "gemma-2-2b": _preset("gemma2", 256_000, 26, 2304, 8, 4, 256, 9216, **_gemma2(256)),
    "gemma-2-9b": _preset("gemma2", 256_000, 42, 3584, 16, 8, 256, 14336, **_gemma2(256)),  # Google corrected 224
    "gemma-2-27b": _preset("gemma2", 256_000, 46, 4608, 32, 16, 128, 36864, **_gemma2(144)),  # D / N, not H
    "llama-3-8b": _preset("llama", 128_256, 32, 4096, 32, 8, 128, 14336, tied=False, **_llama3()),
    "llama-3.1-8b": _preset("llama", 128_256, 32, 4096, 32, 8, 128, 14336, tied=False, **_llama3(8.0)),
    "llama-3.2-1b": _preset("llama", 128_256, 16, 2048, 32, 8, 64, 8192, **_llama3(32.0)),
    "llama-3.2-3b": _preset("llama", 128_256, 28, 3072, 24, 8, 128, 8192, **_llama3(32.0)),
    "qwen2.5-0.5b": _preset("qwen2", 151_936, 24, 896, 14, 2, 64, 4864, **QWEN),
    "qwen2.5-1.5b": _preset("qwen2", 151_936, 28, 1536, 12, 2, 128, 8960, **QWEN),
    "qwen2.5-7b": _preset("qwen2", 152_064, 28, 3584, 28, 4, 128, 18944, tied=False, **QWEN),
    "qwen3-0.6b": _preset("qwen3", 151_936, 28, 1024, 16, 8, 128, 3072, **QWEN),
    "qwen3-1.7b": _preset("qwen3", 151_936, 28, 2048, 16, 8, 128, 6144, **QWEN),
    "qwen3-4b": _preset("qwen3", 151_936, 36, 2560, 32, 8, 128, 9728, **QWEN),
    "qwen3-8b": _preset("qwen3", 151_936, 36, 4096, 32, 8, 128, 12288, tied=False, **QWEN),
}


def from_hugging_face(config: dict[str, Any]) -> LMConfig:
    """Reads the content of a `config.json`, as written by transformers 4 or 5.

    Raises:
        ConfigError: the family or a setting is not supported, or a size is missing; names the field, value and fix.
    """
    family = config.get("model_type")
    if family not in FAMILIES:
        raise ConfigError(f"model_type is {family!r}; use a model of one of the families {', '.join(FAMILIES)}")
    for name, fix in UNSUPPORTED.items():
        if config.get(name):
            raise ConfigError(f"{name} is {config[name]!r}, which is not supported; {fix}")
    values = {"tie_word_embeddings": False, "rms_norm_eps": 1e-6} | ASSUMED[family] | config
    gemma2 = family == "gemma2"
    for name in (*SIZES.values(), *(["sliding_window"] if gemma2 else [])):
        if not isinstance(values.get(name), int):
            raise ConfigError(f"{name} is {values.get(name)!r}; give the whole number of the published config.json")
    kinds = _layer_types(family, values["num_hidden_layers"])
    if values.get("layer_types") not in (None, kinds):
        raise ConfigError(f"layer_types is {values['layer_types']}; only {', '.join(kinds[:2])}, ... is supported")
    activation = values.get("hidden_activation") or values.get("hidden_act", "silu")
    if activation not in ACTIVATIONS:
        raise ConfigError(f"hidden_act is {activation!r}; use a model with one of {', '.join(ACTIVATIONS)}")
    theta, scaling = _rope(config)
    return LMConfig(
        family=family,
        **FAMILIES[family],
        **{ours: values[theirs] for ours, theirs in SIZES.items()},
        kv_heads=values.get("num_key_value_heads") or values["num_attention_heads"],
        head_dim=values.get("head_dim") or values["hidden_size"] // values["num_attention_heads"],
        norm_eps=values["rms_norm_eps"],
        activation=ACTIVATIONS[activation],
        attention_scale=values["query_pre_attn_scalar"] ** -0.5 if gemma2 else None,
        attention_softcap=values["attn_logit_softcapping"] if gemma2 else None,
        final_softcap=values["final_logit_softcapping"] if gemma2 else None,
        sliding_window=values["sliding_window"] if gemma2 else None,
        rope_theta=theta,
        rope_scaling=scaling,
        tied=values["tie_word_embeddings"],
    )


def _layer_types(family: str, layers: int) -> list[str]:
    """Kind of attention of each block, in Hugging Face's words: Gemma-2's window is on the even blocks."""
    even = "sliding_attention" if family == "gemma2" else "full_attention"
    return ["full_attention" if index % 2 else even for index in range(layers)]


def _rope(config: dict[str, Any]) -> tuple[float, tuple[float, float, float, int] | None]:
    """Base and Llama-3 scaling, from transformers 5's `rope_parameters` or the two keys it replaced."""
    values = config.get("rope_parameters") or config.get("rope_scaling") or {}
    theta = float(values.get("rope_theta", config.get("rope_theta", 10_000.0)))
    kind = values.get("rope_type", values.get("type", "default"))
    if kind == "default":
        return theta, None
    if kind != "llama3":
        raise ConfigError(f"rope_type is {kind!r}; use a model with rope_type default or llama3")
    missing = [name for name in ROPE_SCALING if name not in values]
    if missing:
        raise ConfigError(f"rope_type is 'llama3' without {', '.join(missing)}; take the whole published config.json")
    factor, low, high, original = (values[name] for name in ROPE_SCALING)
    return theta, (float(factor), float(low), float(high), int(original))


def to_hugging_face(config: LMConfig) -> dict[str, Any]:
    """Content of a `config.json` that transformers 4 and 5 load as a causal language model.

    Raises:
        ConfigError: the family's Hugging Face code cannot express a setting; names the field, value and fix.
    """
    values: dict[str, Any] = {
        "architectures": [ARCHITECTURES[config.family]],
        "model_type": config.family,
        **{theirs: getattr(config, ours) for ours, theirs in SIZES.items()},
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "tie_word_embeddings": config.tied,
    }
    activation = next(theirs for theirs, ours in ACTIVATIONS.items() if ours == config.activation)
    values["hidden_activation" if config.family == "gemma2" else "hidden_act"] = activation
    if config.rope_scaling is not None:
        values["rope_scaling"] = {"rope_type": "llama3", **dict(zip(ROPE_SCALING, config.rope_scaling, strict=True))}
    if config.family == "gemma2":
        values |= {
            "query_pre_attn_scalar": round(config.query_scale**-2),
            "attn_logit_softcapping": config.attention_softcap,
            "final_logit_softcapping": config.final_softcap,
            "sliding_window": config.sliding_window,
        }
    wanted, written = (
        dataclasses.replace(each, attention_scale=each.query_scale) for each in (config, from_hugging_face(values))
    )
    for field in dataclasses.fields(LMConfig):
        value, expressible = getattr(wanted, field.name), getattr(written, field.name)
        if value != expressible:
            raise ConfigError(
                f"{field.name} is {value!r}, but Hugging Face's {config.family} always has {expressible!r}; "
                "choose the family that has it"
            )
    return values


def from_llama2c(config: dict[str, Any]) -> LMConfig:
    """Reads the `config.json` of a llama2.c model, whose sizes are called `dim`, `n_layers` and so on.

    Raises:
        ConfigError: a size is missing, or the model is not the plain architecture of llama2.c.
    """
    plain = {"architecture": "llama", "rope_style": "interleaved-pairs", "activation": "silu"}
    for name, value in plain.items():
        if config.get(name, value) != value:
            raise ConfigError(f"{name} is {config[name]!r}; only {value!r} is supported")
    names = ("vocab_size", "n_layers", "dim", "n_heads", "hidden_dim")
    missing = [name for name in names if not isinstance(config.get(name), int)]
    if missing:
        raise ConfigError(f"{', '.join(missing)} missing; a llama2.c config.json gives {', '.join(names)}")
    vocab, layers, width, heads, mlp_width = (config[name] for name in names)
    return LMConfig(
        family="llama",
        vocab=vocab,
        layers=layers,
        width=width,
        heads=heads,
        kv_heads=config.get("n_kv_heads", heads),
        head_dim=width // heads,
        mlp_width=mlp_width,
        norm_eps=config.get("norm_eps", 1e-5),
        rope_theta=config.get("rope_theta", 10_000.0),
        tied=config.get("tied_embeddings", True),
    )
