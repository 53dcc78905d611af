"""The selection head: how much of the vector each token takes, from its own residual and the vector.

    gate = sigmoid((linear(norm([residual; vector])) + noise) / temperature)

It is no part of the paper; this is the HyperStuff release's (`SelectionHead`), but for three points. The temperature
falls to its end over all steps of the run: the release hands its annealing the current step as the number of steps, so
that it jumps to the end at once. Inference is without noise: the release draws it there, too. Every steered block has a
gate from the residual that it is added to, and all of them are penalised: the release penalises the first only. One
head serves all steered blocks, as in the release.

Letters: B batch, S sequences of one or two rows, T length, D width.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jaxtyping import Bool, Float, Int

from hypersteer_jax.config import SelectionConfig
from hypersteer_jax.models.lm import constant
from hypersteer_jax.sharding import gather

NORM_EPS = 1e-5  # PyTorch's default for a LayerNorm
THRESHOLD = 0.5  # above it a gate is on
MARGIN = 1e-6  # by which the temperature may be beyond its ends


class Selection(nnx.Module):
    """The head. Weights are float32, and so is its arithmetic, whatever the dtype of the residual."""

    def __init__(self, config: SelectionConfig, width: int, rngs: nnx.Rngs):
        self.config = config
        bound = (2 * width) ** -0.5  # PyTorch's default for a linear layer
        self.weight = nnx.Param(jax.random.uniform(rngs.params(), (2 * width, 1), minval=-bound, maxval=bound))
        self.bias = nnx.Param(jax.random.uniform(rngs.params(), (1,), minval=-bound, maxval=bound))
        self.norm_weight = constant(1.0, 2 * width) if config.layer_norm else None
        self.norm_bias = constant(0.0, 2 * width) if config.layer_norm else None
        self.temperature = constant(config.temperature_start)

    def __call__(
        self, residual: Float[Array, "B T D"], vector: Float[Array, "B D"], layer: int, key: Array | None = None
    ) -> Float[Array, "B T"]:
        """Gates between 0 and 1, float32.

        Args:
            residual: the residual leaving a steered block.
            vector: what is to be added to it.
            layer: that block; its noise is its own.
            key: of the noise in training. Without it the gate is that of inference: no noise, and hard if the config
                says so. With `straight_through` it is hard in both (release).
        """
        wide = residual.astype(jnp.float32)
        x = jnp.concatenate([wide, jnp.broadcast_to(vector[:, None], wide.shape)], axis=-1)
        if self.norm_weight is not None and self.norm_bias is not None:
            x = (x - jnp.mean(x, axis=-1, keepdims=True)) * jax.lax.rsqrt(jnp.var(x, axis=-1, keepdims=True) + NORM_EPS)
            x = x * gather(self.norm_weight[...]) + gather(self.norm_bias[...])
        # A sum, not a product of matrices: a TPU would round the factors to bfloat16.
        logit = jnp.sum(x * gather(self.weight[...])[:, 0], axis=-1) + gather(self.bias[...])
        if key is not None and self.config.noise:
            logit = logit + jax.random.logistic(jax.random.fold_in(key, layer), logit.shape)
        soft = jax.nn.sigmoid(logit / self._temperature())
        hard = (soft > THRESHOLD).astype(soft.dtype)
        if self.config.straight_through:
            return hard + (soft - jax.lax.stop_gradient(soft))
        return hard if key is None and self.config.hard_inference else soft

    def _temperature(self) -> Array:
        low, high = self.config.temperature_end, self.config.temperature_start
        bounded = jnp.clip(self.temperature[...], low - MARGIN, high + MARGIN)
        return bounded if self.config.learnable_temperature else jax.lax.stop_gradient(bounded)


def annealed_temperature(config: SelectionConfig, done: Float[Array, ""]) -> Float[Array, ""]:
    """Temperature when a share `done` of the run's steps is done: the start's at 0, the end's at 1."""
    return (1 - done) * config.temperature_start + done * config.temperature_end


def mean_gate(
    gates: Sequence[Float[Array, "S T"]], where: Bool[Array, "S T"], segments: Int[Array, "S T"], rows: int
) -> Float[Array, ""]:
    """Sum of the gates at steered positions over the row's real tokens, the mean over rows and steered blocks.

    A gate of exactly 0 has no gradient, as |0| has none in PyTorch: what straight-through has switched off is not
    pushed further down (release).

    Args:
        gates: of each steered block.
        where: steered positions.
        segments: the row of each token, from 1; 0 in padding. A row's real tokens count, steered or not (release).
        rows: in each sequence.
    """
    own = segments[:, :, None] == 1 + jnp.arange(rows)
    sums = jnp.stack([jnp.sum((jax.nn.relu(gate) * where)[:, :, None] * own, axis=1) for gate in gates])
    return jnp.mean(sums / jnp.maximum(jnp.sum(own, axis=1), 1))


def selected_share(gates: Sequence[Float[Array, "S T"]], where: Bool[Array, "S T"]) -> Float[Array, ""]:
    """Share of the steered positions whose gate is on, over all rows and steered blocks."""
    on = jnp.stack([jnp.sum((gate > THRESHOLD) & where) for gate in gates])
    return jnp.mean(on) / jnp.maximum(jnp.sum(where), 1)
