"""Rotary tables for packed tokens, for every RoPE type that the supported teachers use.

The frequencies of a type come from Transformers, so a teacher's context extension means here what it means
there. Tables are fp32 and computed for the positions at hand: no table to outgrow, no length to clamp.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from hrwkv.layers.batch import TokenBatch
from hrwkv.layers.common import Rope
from hrwkv.model.config import HybridConfig


class RotaryTable:
    """cos and sin of each token's angles; holds no parameter and no buffer."""

    def __init__(self, config: HybridConfig) -> None:
        self.config = config
        self._inv_freq: dict[torch.device, Tensor] = {}
        self._scale = 1.0

    def __call__(self, batch: TokenBatch) -> Rope:
        """cos and sin [T, K / 2] fp32 at ``batch.positions``, YaRN's attention factor included."""
        positions = batch.positions
        if self.config.rope_parameters["rope_type"] == "dynamic":
            inv_freq = self._dynamic_inv_freq(batch)  # [T, K / 2]
        else:
            inv_freq = self._fixed_inv_freq(positions.device)  # [K / 2]
        angles = positions.float().unsqueeze(-1) * inv_freq
        return angles.cos() * self._scale, angles.sin() * self._scale

    def _fixed_inv_freq(self, device: torch.device) -> Tensor:
        if device not in self._inv_freq:
            rope_type = self.config.rope_parameters["rope_type"]
            if rope_type == "default":
                inv_freq = _inv_freq(self.config, torch.tensor(self.config.rope_parameters["rope_theta"]))
            else:
                inv_freq, self._scale = ROPE_INIT_FUNCTIONS[rope_type](self.config, torch.device("cpu"))
            self._inv_freq[device] = inv_freq.float().to(device)
        return self._inv_freq[device]

    def _dynamic_inv_freq(self, batch: TokenBatch) -> Tensor:
        """NTK scaling by each sequence's own length so far, so that a neighbour cannot change a result."""
        parameters, limit, size = (
            self.config.rope_parameters,
            self.config.max_position_embeddings,
            self.config.head_dim,
        )
        counts = batch.cu_seqlens.diff().long()
        last = (batch.cu_seqlens[1:].long() - 1).clamp(min=0)
        longest = (batch.positions[last] + 1).clamp(min=limit).float()  # [N]; of empty ones, never used
        factor = parameters["factor"]
        base = parameters["rope_theta"] * (factor * longest / limit - (factor - 1)) ** (size / (size - 2))
        per_token = base.repeat_interleave(counts, output_size=batch.positions.shape[0])
        return _inv_freq(self.config, per_token.unsqueeze(-1))


def _inv_freq(config: HybridConfig, base: Tensor) -> Tensor:
    """``base^(-2i / K)`` for i < K / 2; base broadcasts in front."""
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device=base.device) / config.head_dim
    return 1.0 / base**exponents
