"""GRAPE-M: positions as rotations whose planes and frequencies are learned.

Shapes: B batch, T positions, C width, H heads, D head width, F = D/2 planes.
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
from positional.rotation import cos_sin_of_long

SLOW = 16  # what a sigmoid's logit is divided by


@register("grape_m")
class GRAPEM(RoPE):
    """GRAPE-M, multiplicative group position encoding (Zhang et al., 2512.07805): position m turns by exp(m·L), L skew.

    L = Σ_j ω_j (a_j b_jᵀ − b_j a_jᵀ) over F orthogonal planes. Learned are log ω_j, which start at RoPE's log θ_j: one set for
    all heads of a layer or, with `grape_per_head`, for each. `grape_planes` "canonical", as in the authors' code: a_j and b_j
    are the channels of pair j, and at the start this is RoPE. "learned": they are the rows of exp(S) per head, with S
    skew-symmetric and 0 at the start. What is kept is `grape_log_scale` times log ω, so that AdamW moves log ω as much more
    slowly; 1 in the authors' first code (8 December 2025), 16 in a later one, for this form only. The norm of queries and keys
    in their model is left out, as for every encoding.
    """

    options = (
        Option("grape_per_head", False, "whether each head learns frequencies of its own"),
        Option(
            "grape_log_scale", 1.0, "what log ω is multiplied by where it is kept: it learns as much more slowly", gt=0, le=1e6
        ),
        Option(
            "grape_planes",
            "canonical",
            "the planes of rotation: pairs of channels, or learned",
            choices=("canonical", "learned"),
        ),
    )
    per_layer = True
    scalable = False
    beyond = "as RoPE: phases keep growing, at the learned rates"

    def __init__(self, cfg: Any) -> None:
        super().__init__(cfg)
        self.n_head, self.width, self.log_scale = cfg.n_head, 2 * self.n_pairs, cfg.grape_log_scale
        n_spectra = cfg.n_head if cfg.grape_per_head else 1
        # In one dimension, or weight decay would draw every frequency to 1, and every plane to the canonical one
        self.log_omega = nn.Parameter(torch.empty(n_spectra * self.n_pairs))
        n_below = self.width * (self.width - 1) // 2
        self.skew = nn.Parameter(torch.empty(cfg.n_head * n_below)) if cfg.grape_planes == "learned" else None

    def init_weights(self) -> None:
        theta_F = inverse_frequencies(self.n_pairs, self.theta, torch.device("cpu"))
        self.log_omega.copy_((self.log_scale * theta_F.log()).float().repeat(len(self.log_omega) // self.n_pairs))
        if self.skew is not None:
            nn.init.zeros_(self.skew)

    def omega(self) -> Tensor:
        """(H or 1, 1, F) `widest`, radians per unit of position."""
        return (self.log_omega.to(widest(self.log_omega.device)) / self.log_scale).exp().view(-1, 1, self.n_pairs)

    def coords(self, x_BTC: Tensor, pos_T: Tensor, last: Tensor | None = None) -> Tensor:
        return (pos_T.to(widest(pos_T.device))[:, None] * self.omega())[None]

    def frame(self, at: Positions) -> tuple[Tensor, ...]:
        """Cosine and sine of the phases, and where planes are learned their axes, (H, D, D) fp32."""
        waves = self.cos_sin(at.coords)
        return waves if self.skew is None else (*waves, self.axes())

    def axes(self) -> Tensor:
        """exp(S), orthogonal, (H, D, D) fp32: rows j and F + j span plane j."""
        assert self.skew is not None
        row, column = torch.tril_indices(self.width, self.width, -1, device=self.skew.device)
        dtype = widest(self.skew.device)  # in fp32 its gradient would be off by 2e-4 of itself
        lower = self.skew.new_zeros(self.n_head, self.width, self.width, dtype=dtype)
        lower[:, row, column] = self.skew.to(dtype).view(self.n_head, -1)
        with torch.autocast(self.skew.device.type, enabled=False):
            return torch.linalg.matrix_exp(lower - lower.mT).float()

    def rotate(self, u_BHTD: Tensor, frame: Any) -> Tensor:
        if len(frame) == 2:
            return super().rotate(u_BHTD, frame)
        with torch.autocast(u_BHTD.device.type, enabled=False):
            in_planes = (u_BHTD.float() @ frame[2].mT).to(u_BHTD.dtype)
        return super().rotate(in_planes, frame[:2])


@register("grape_m_ctx")
class GRAPEMContextual(GRAPEM):
    """Contextual GRAPE-M (2512.07805): a token adds softplus(h W + b) to the position of all that come after it.

    h is the block's ln_1 output; one clock a layer or, with `grape_clock_per_head`, one a head. W = 0, and b such that a token
    counts `grape_clock_start` at the start: 0.001 in the authors' first code (8 December 2025), next to no position; 1 is
    RoPE. Their code of 22 December has `grape_clock` "sigmoid", σ((h W + b) / 16), and starts at 0.394.
    """

    options = (
        Option("grape_clock", "softplus", "what the clock's steps are made by", choices=("softplus", "sigmoid")),
        Option("grape_clock_start", 0.001, "what a token adds to the position at the start", gt=0, le=1000),
        Option("grape_clock_per_head", False, "whether each head has a clock of its own"),
    )
    family = "context-aware rotary"
    hidden = True
    beyond = "as RoPE: phases keep growing; the tokens set the rate, so training can keep them in a known range"

    def __init__(self, cfg: Any) -> None:
        super().__init__(cfg)
        self.start, self.bounded = cfg.grape_clock_start, cfg.grape_clock == "sigmoid"
        self.clock = nn.Linear(cfg.n_embd, cfg.n_head if cfg.grape_clock_per_head else 1)

    @classmethod
    def check(cls, cfg: Any) -> None:
        super().check(cfg)
        if cfg.grape_clock == "sigmoid" and cfg.grape_clock_start >= 1:
            raise ValueError(f"grape_clock_start = {cfg.grape_clock_start:g}: a sigmoid's step is less than 1")

    def init_weights(self) -> None:
        super().init_weights()
        nn.init.zeros_(self.clock.weight)
        start = self.start
        b = SLOW * math.log(start / (1 - start)) if self.bounded else start + math.log(-math.expm1(-start))
        nn.init.constant_(self.clock.bias, b)

    def coords(self, x_BTC: Tensor, pos_T: Tensor, last: Tensor | None = None) -> Tensor:
        """Position on the clock and what the token adds to it, (B, 1 or H, T, 2) `widest`."""
        z_BTH = narrow_linear(self.clock, x_BTC)
        with torch.autocast(x_BTC.device.type, enabled=False):
            z_BHT = z_BTH.transpose(1, 2).contiguous()
            step_BHT = (z_BHT / SLOW).sigmoid() if self.bounded else functional.softplus(z_BHT)
            step_BHT = step_BHT.to(widest(x_BTC.device))
            before = 0 if last is None or last.size(-1) == 1 else last.sum(-1)
            return torch.stack((step_BHT.cumsum(-1) - step_BHT + before, step_BHT), dim=-1)

    def frame(self, at: Positions) -> tuple[Tensor, ...]:
        waves = cos_sin_of_long(at.coords[..., :1] * self.omega())
        return waves if self.skew is None else (*waves, self.axes())
