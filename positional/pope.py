"""PoPE: a channel's content is a length, its position an angle, and neither changes the other.

Shapes: B batch, T positions, H heads, D head width.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from core.numerics import widest
from positional.base import Option, PositionalEncoding, Positions, register
from positional.rotary import RoPE, inverse_frequencies


@register("pope")
class PoPE(PositionalEncoding):
    """PoPE, polar coordinate position embedding (2509.10534): the logit is Σ_c σ(q_c) σ(k_c) cos((n − m)θ_c + δ_c), σ softplus.

    Query at m, key at n; every channel has a frequency, θ_c = base^(−c/D), and for each layer and head a learned δ_c, held in
    [−2π, 0]. They start at 0 or, with `pope_delta` "uniform", anywhere in between, as in the library pope-pytorch. Queries and
    keys come out as (σ cos, σ sin), twice as wide as values; the logits keep the 1/√D of a head's width. Coordinates are the
    phases m θ_c, (1, 1, T, D) `widest`.
    """

    options = (*RoPE.options, Option("pope_delta", "zero", "where the angles δ start", choices=("zero", "uniform")))
    family = "rotary"
    changes = "queries, keys"
    per_layer = True
    beyond = "as RoPE: every channel slower than one turn per training length reaches angles it has never seen"

    def __init__(self, cfg: Any) -> None:
        super().__init__(cfg)
        self.n_head, self.width = cfg.n_head, cfg.n_embd // cfg.n_head
        self.theta, self.start = cfg.rope_base ** (-1 / self.width), cfg.pope_delta
        self.delta = nn.Parameter(torch.empty(cfg.n_head * self.width))  # in one dimension, or weight decay would draw it to 0

    def init_weights(self) -> None:
        nn.init.uniform_(self.delta, -math.tau if self.start == "uniform" else 0.0, 0.0)

    def coords(self, x_BTC: Tensor, pos_T: Tensor, last: Tensor | None = None) -> Tensor:
        dtype = widest(pos_T.device)
        return (pos_T.to(dtype)[:, None] * inverse_frequencies(self.width, self.theta, pos_T.device))[None, None]

    def frame(self, at: Positions) -> tuple[Tensor, ...]:
        """Cosine and sine for queries, √2 times as large, (1, 1, T, D), and for keys, (1, H, T, D); float32.

        What divides the logits is the root of the width that attention sees, √(2D).
        """
        delta_H1D = self.delta.clamp(-math.tau, 0).view(self.n_head, 1, self.width).to(at.coords)
        of_keys = at.coords + delta_H1D
        q_waves = (math.sqrt(2) * at.coords.cos(), math.sqrt(2) * at.coords.sin())
        return tuple(wave.float() for wave in (*q_waves, of_keys.cos(), of_keys.sin()))

    def turn(self, q_BHTD: Tensor, k_BHTD: Tensor, frame: Any) -> tuple[Tensor, Tensor]:
        return on_circles(q_BHTD, *frame[:2]), on_circles(k_BHTD, *frame[2:])


def on_circles(u_BHTD: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """softplus(u) at the angles of these cosines and sines, (B, H, T, 2D), of u's type."""
    with torch.autocast(u_BHTD.device.type, enabled=False):
        length_BHTD = functional.softplus(u_BHTD.float())
        return torch.cat((length_BHTD * cos, length_BHTD * sin), dim=-1).to(u_BHTD.dtype)
