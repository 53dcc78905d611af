"""The HyperStuff release's selection head, eager and without noise: an oracle for `hypersteer_jax.models.selection`.

Letters: B batch, T columns of the mask, S steered positions, D width.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn


class Settings(NamedTuple):
    """What a head's weights do not tell."""

    layer_norm: bool
    straight_through: bool
    learnable_temperature: bool
    sparsity: float  # coefficient of the mean gate in the loss


class SelectionHead(nn.Module):
    """Residual and vector to a gate; parameters are named as in the release's checkpoints."""

    gates: Tensor  # of the last pass, kept for the penalty

    def __init__(self, width: int, settings: Settings):
        super().__init__()
        self.settings = settings
        self.proj = nn.Linear(2 * width, 1)
        self.ln = nn.LayerNorm(2 * width) if settings.layer_norm else None
        self._temperature = nn.Parameter(torch.ones(()), requires_grad=settings.learnable_temperature)

    def forward(self, residual: Tensor, vector: Tensor) -> Tensor:
        """Gates `[B, S]` for residuals `[B, S, D]` and vectors `[B, D]`."""
        both = torch.cat([residual, vector[:, None].expand_as(residual)], dim=-1)
        logits = self.proj(both if self.ln is None else self.ln(both))[..., 0]
        soft = torch.sigmoid(logits / self._temperature)
        hard = (soft > 0.5).to(soft.dtype) + soft - soft.detach()
        self.gates = hard if self.settings.straight_through else soft
        return self.gates


def penalty(gates: Tensor, locations: Tensor, mask: Tensor) -> Tensor:
    """Mean over rows of the sum of gates `[B, S]` at real tokens over their number; `locations [B, S]`, `mask [B, T]`.

    Slots that are not used name a pad, where the mask is 0.
    """
    placed = torch.zeros(mask.shape, dtype=gates.dtype).scatter(1, locations, gates)
    return ((placed * mask).abs().sum(1) / mask.sum(1).clamp_min(1)).mean()
