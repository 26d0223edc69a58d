"""Encodings that turn queries and keys by an angle that their position alone decides.

Shapes: B batch, T positions, S cached and new positions, C width, H heads, D = C/H head width, F = D/2 rotary pairs.
"""

from typing import Any

import torch
from torch import Tensor

from positional.base import PositionalEncoding


def inverse_frequencies(n_pairs: int, theta: float, device: torch.device) -> Tensor:
    """θ^i for i = 0 … n_pairs−1, (F,) float64."""
    return theta ** torch.arange(n_pairs, dtype=torch.float64, device=device)


class RoPE(PositionalEncoding):
    """Rotary position embedding (Su et al., 2104.09864): pair i at position m is turned by m·θ_i, θ_i = base^(−2i/D).

    Channels are paired half-split, (u_i, u_{i+D/2}), as in Llama and GPT-NeoX. Coordinates are the phases, radians.
    """

    beyond = "phases grow on: every pair of channels slower than one turn per training length gets angles it has never seen"
    inclusive = False  # the first token stands at 0

    def __init__(self, cfg: Any) -> None:
        super().__init__(cfg)
        self.n_pairs = cfg.n_embd // cfg.n_head // 2
        self.theta = cfg.rope_base ** (-1 / self.n_pairs)  # θ_1 of the paper: θ_i = θ_1^i

    @classmethod
    def check(cls, cfg: Any) -> None:
        head_width = cfg.n_embd // cfg.n_head
        if head_width % 2:
            raise ValueError(
                f"encoding = {cfg.encoding!r}: rotates pairs of channels, so the head width n_embd / n_head = "
                f"{cfg.n_embd} / {cfg.n_head} = {head_width} must be even"
            )

    def frequency(self, x_BTC: Tensor) -> Tensor:
        return torch.full((1, 1, 1), self.theta, dtype=torch.float64, device=x_BTC.device).expand(1, 1, x_BTC.size(1))

    def coords(self, x_BTC: Tensor, pos_T: Tensor, last: Tensor | None = None) -> Tensor:
        # (1, 1, T, F) is small: float64 is free, and the product keeps every digit of fp32 at any position
        phase_TF = pos_T.double()[:, None] * inverse_frequencies(self.n_pairs, self.theta, pos_T.device)
        return phase_TF[None, None]

    def frame(self, coords: Any) -> tuple[Tensor, Tensor]:
        return coords.cos().float(), coords.sin().float()

    def rotate(self, u_BHTD: Tensor, frame: tuple[Tensor, Tensor]) -> Tensor:
        cos, sin = frame
        a, b = u_BHTD.float().chunk(2, dim=-1)
        return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(u_BHTD.dtype)
