"""One tiny LM of each family, every setting of the family binding, and every weight random."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from hypersteer_jax.config import LMConfig
from hypersteer_jax.models.lm import LM

SIZES = {"vocab": 97, "layers": 4, "width": 32, "heads": 4, "kv_heads": 2, "mlp_width": 48}
GEMMA2 = {
    "family": "gemma2",
    "norm_offset": 1.0,
    "sandwich_norms": True,
    "activation": "gelu_tanh",
    "attention_softcap": 3.0,
    "final_softcap": 8.0,
    "scale_embedding": True,
}
CONFIGS = {
    "gemma2": LMConfig(**SIZES, **GEMMA2, head_dim=16, attention_scale=24**-0.5, sliding_window=4),
    # over 64 tokens the four frequencies turn 10, 2.1, 0.46 and 0.1 times: kept, blended, slowed, slowed
    "llama": LMConfig(
        family="llama",
        **SIZES,
        head_dim=8,
        norm_eps=1e-5,
        rope_theta=500.0,
        rope_scaling=(8.0, 1.0, 4.0, 64),
        tied=False,
    ),
    "llama-tied": LMConfig(family="llama", **SIZES, head_dim=8, norm_eps=1e-5, rope_theta=500_000.0),
    "qwen2": LMConfig(family="qwen2", **SIZES, head_dim=8, qkv_bias=True, rope_theta=1_000_000.0, tied=False),
    "qwen3": LMConfig(family="qwen3", **SIZES, head_dim=16, qk_norm=True, rope_theta=1_000_000.0),
}


def random_lm(config: LMConfig, seed: int = 0) -> LM:
    """Norms and biases are random, too: at their defaults they would hide an error in their use."""
    rng = np.random.default_rng(seed)

    def draw(path: tuple, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        is_norm = any(word in jax.tree_util.keystr(path) for word in ("norm", "pre_", "post_"))
        return jnp.asarray(is_norm * (1 - config.norm_offset) + 0.2 * rng.normal(size=leaf.shape), jnp.float32)

    return jax.tree_util.tree_map_with_path(draw, jax.eval_shape(lambda: LM(config, nnx.Rngs(0))))
