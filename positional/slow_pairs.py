"""Rotations that treat slow pairs apart: those that make less than one turn in the training length L, θ_i < 2π/L.

Beyond L, a slow pair of RoPE gets angles that it has never seen; a fast one has seen all of them.

Shapes: B batch, T positions, C width, H heads, D head width, F = D/2 rotary pairs, N fast pairs.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from core.numerics import widest
from positional.base import Option, Positions, register
from positional.linear import narrow_linear
from positional.rotary import RoPE, inverse_frequencies


class SlowPairsApart(RoPE):
    """RoPE that knows its `n_fast` fast pairs, the first ones, from its `slow` ones."""

    def __init__(self, cfg: Any) -> None:
        super().__init__(cfg)
        self.length = cfg.block_size
        self.n_fast = sum(self.theta**i >= math.tau / self.length for i in range(self.n_pairs))

    @classmethod
    def check(cls, cfg: Any) -> None:
        super().check(cfg)
        if cfg.block_size < math.tau:
            raise ValueError(
                f"block_size = {cfg.block_size}: no pair of channels makes a turn in so few tokens, and {cfg.encoding!r} turns "
                "those that do; from 7 on one does"
            )


@register("hope")
class HoPE(SlowPairsApart):
    """HoPE (Chen et al., 2410.21216, section 4): RoPE on the fast pairs; the slow ones carry no position.

    Not the hyperbolic rotary encoding of the same name (2509.05218), nor the one for videos (2505.20444).
    """

    beyond = "every rotating pair has completed full turns in training; the other pairs carry no position"

    def coords(self, x_BTC: Tensor, pos_T: Tensor, last: Tensor | None = None) -> Tensor:
        return super().coords(x_BTC, pos_T, last) * (torch.arange(self.n_pairs, device=pos_T.device) < self.n_fast)


@register("darope")
class DaRoPE(SlowPairsApart):
    """DaRoPE (2609.34556): RoPE on the fast pairs; a token's content decides where its slow pairs stand.

    Slow pair i of the token h_m at position m turns by c_h(h_m)·θ_i, with c_h = L·σ(w_h·h_m + α_h β_m) in (0, L) and β_m =
    logit((m + ½)/L), the argument between 1e-6 and 1 − 1e-6. With w = 0 and α = 1 that is (m + ½)·θ_i: RoPE up to a constant
    angle. Per layer and head, from the block's ln_1 output; w starts at N(0, 0.1), α at 0.5. The paper's base is 500000
    (--rope_base=500000). Coordinates are position and c, (B, H, T, 2) fp32.
    """

    family = "context-aware rotary"
    per_layer = hidden = True
    scalable = False
    beyond = "slow pairs stay within the angles seen in training at any length; fast pairs have completed full turns there"
    END = 1e-6  # of the training length: how near to its ends β is still finite

    def __init__(self, cfg: Any) -> None:
        super().__init__(cfg)
        self.w = nn.Linear(cfg.n_embd, cfg.n_head, bias=False)
        self.alpha = nn.Parameter(torch.empty(cfg.n_head))

    def init_weights(self) -> None:
        nn.init.normal_(self.w.weight, std=0.1)
        nn.init.constant_(self.alpha, 0.5)

    def coords(self, x_BTC: Tensor, pos_T: Tensor, last: Tensor | None = None) -> Tensor:
        z_BTH = narrow_linear(self.w, x_BTC)
        with torch.autocast(x_BTC.device.type, enabled=False):
            share_T = ((pos_T.to(widest(pos_T.device)) + 0.5) / self.length).clamp(self.END, 1 - self.END)
            z_BTH = z_BTH + self.alpha.float() * share_T.logit().float()[:, None]
            c_BHT = self.length * z_BTH.sigmoid().transpose(1, 2)
            return torch.stack((pos_T.float().expand_as(c_BHT), c_BHT), dim=-1)  # below 2^24 fp32 holds every position

    def frame(self, at: Positions) -> tuple[Tensor, Tensor]:
        theta_F = inverse_frequencies(self.n_pairs, self.theta, at.coords.device)
        pos_11T1, c_BHT1 = at.coords[:1, :1, :, :1], at.coords[..., 1:]
        fast, slow = pos_11T1.to(theta_F) * theta_F[: self.n_fast], c_BHT1 * theta_F[self.n_fast :].float()
        of_all = (*c_BHT1.shape[:3], self.n_fast)
        cos, sin = (torch.cat((wave(fast).float().expand(of_all), wave(slow)), dim=-1) for wave in (torch.cos, torch.sin))
        return cos, sin


@register("fope")
class FoPE(SlowPairsApart):
    """FoPE (Hua et al., 2412.17739, section 4): cosine and sine of a pair are Fourier series of the fast frequencies.

    Cosine i is Σ_j a_ji cos(m θ_j), sine i Σ_j b_ji sin(m θ_j), over the N fast frequencies. As in the authors' code a and b
    are drawn for each layer and head and not learned: the identity and a random part (Xavier's normal, times `fope_gain`: 0.3
    for their 60M model, 0.4 for 180M, 0.6 for 1.2B). At most D/4 pairs have a series; where there are more fast frequencies,
    the identity takes every ⌈N / (D/4)⌉-th. All other pairs have 1 for cosine and sine, as that code has it: they carry no
    position, and their products count twice. Coordinates are the fast phases, (1, 1, T, N) `widest`.
    """

    options = (Option("fope_gain", 0.3, "strength of the random part of the Fourier coefficients", ge=0, le=100),)
    per_layer = True
    scalable = False
    beyond = "sums of waves that have all completed full turns in training; the other pairs carry no position"

    def __init__(self, cfg: Any) -> None:
        super().__init__(cfg)
        self.gain = cfg.fope_gain
        self.n_series = min(self.n_fast, max(1, cfg.n_embd // cfg.n_head // 4))
        self.of_cos: Tensor
        self.of_sin: Tensor
        for name in ("of_cos", "of_sin"):
            self.register_buffer(name, torch.empty(cfg.n_head, self.n_fast, self.n_series))

    def init_weights(self) -> None:
        step = -(-self.n_fast // self.n_series)
        i = torch.arange(-(-self.n_fast // step))
        for a_HNS in (self.of_cos, self.of_sin):
            nn.init.xavier_normal_(a_HNS, gain=self.gain)
            a_HNS[:, i * step, i] += 1

    def coords(self, x_BTC: Tensor, pos_T: Tensor, last: Tensor | None = None) -> Tensor:
        return super().coords(x_BTC, pos_T, last)[..., : self.n_fast]

    def frame(self, at: Positions) -> tuple[Tensor, Tensor]:
        rest = (0, self.n_pairs - self.n_series)
        with torch.autocast(at.coords.device.type, enabled=False):
            waves = (at.coords.cos().float() @ self.of_cos, at.coords.sin().float() @ self.of_sin)
        cos, sin = (functional.pad(wave, rest, value=1.0) for wave in waves)
        return cos, sin
