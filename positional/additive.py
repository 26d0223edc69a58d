"""Encodings added to the token embeddings.

Shapes: B batch, T positions, C width.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from positional.base import PositionalEncoding
from positional.rotary import inverse_frequencies


class Learned(PositionalEncoding):
    """A learned table of absolute positions, as GPT-2 has (Radford et al. 2019)."""

    beyond = "none: the table ends there, a longer input is refused"

    def __init__(self, cfg: Any) -> None:
        super().__init__(cfg)
        self.max_len = cfg.block_size
        self.weight = nn.Parameter(torch.empty(cfg.block_size, cfg.n_embd))  # called wpe.weight, as GPT-2's

    def init_weights(self) -> None:
        nn.init.normal_(self.weight, std=0.02)

    def embed(self, x_BTC: Tensor, pos_T: Tensor) -> Tensor:
        return x_BTC + functional.embedding(pos_T, self.weight)


class Sinusoidal(PositionalEncoding):
    """Fixed sine and cosine waves added to the embeddings (Vaswani et al., 1706.03762, section 3.5)."""

    beyond = "the waves go on: sums of embedding and position that no layer has seen"

    def __init__(self, cfg: Any) -> None:
        super().__init__(cfg)
        self.scale = cfg.sinusoidal_scale

    def embed(self, x_BTC: Tensor, pos_T: Tensor) -> Tensor:
        n_embd = x_BTC.size(-1)
        freq = inverse_frequencies((n_embd + 1) // 2, 10000 ** (-2 / n_embd), pos_T.device)
        phase_TF = pos_T.double()[:, None] * freq
        waves_TC = torch.stack((phase_TF.sin(), phase_TF.cos()), dim=-1).flatten(-2)[:, :n_embd]
        return x_BTC + self.scale * waves_TC.to(x_BTC.dtype)
