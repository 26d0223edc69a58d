"""Context-aware rotary encodings: the tokens decide by how much they turn what comes after them.

Shapes: B batch, T positions, S cached and new positions, C width, H heads, D = C/H head width, F = D/2 rotary pairs.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from positional.rotary import RoPE

COLLAPSED = 1e-3  # of its mean: f varies less over tokens than bf16 can tell apart


class CARoPE(RoPE):
    """Context-aware RoPE (2507.23083, section 2): the base θ_1 becomes a bounded scalar per token and head.

    f(x_t)_h = 1 / (1 + softplus((x_t W + b)_h)) and φ_i(m) = Σ_{t≤m} f(x_t)_h^i. x_t is the raw token embedding, so f
    is computed once and shared by all layers. The paper writes no bias; b = softplus⁻¹(1/θ_1 − 1) with W = 0 is
    what makes f = θ_1, the "starts as RoPE" that it asks for.
    """

    has_bias = True
    inclusive = True

    def __init__(self, cfg: Any) -> None:
        super().__init__(cfg)
        self.W = nn.Linear(cfg.n_embd, cfg.n_head, bias=self.has_bias)

    def init_weights(self) -> None:
        nn.init.zeros_(self.W.weight)
        y = 1 / self.theta - 1
        nn.init.constant_(self.W.bias, y if y > 30 else math.log(math.expm1(y)))  # softplus⁻¹(y)

    def frequency(self, x_BTC: Tensor) -> Tensor:
        """f(x_t)_h in (0, 1), (B, H, T) fp32."""
        with torch.autocast(x_BTC.device.type, enabled=False):
            z_BTH = functional.linear(x_BTC.float(), self.W.weight, self.W.bias)
            return (1 + functional.softplus(z_BTH)).reciprocal().transpose(1, 2)

    def coords(self, x_BTC: Tensor, pos_T: Tensor, last: Tensor | None = None) -> Tensor:
        step_BHTF = self.frequency(x_BTC)[..., None] ** torch.arange(self.n_pairs, device=x_BTC.device)
        # Sums over a cache go on token by token for as long as one decodes: in float64 they do not drift
        return step_BHTF.cumsum(-2) if last is None else last + step_BHTF.cumsum(-2, dtype=last.dtype)

    def health(self, coords: Tensor) -> dict[str, float]:
        """f's mean and standard deviation over tokens (mean and least over heads), and φ_1 at the last token, radians."""
        if self.n_pairs == 1:  # its one pair turns by f⁰ = 1
            return {}
        f_BHT, phase_BH = coords[..., 1].diff(dim=-1), coords[..., -1, 1]
        std_H = f_BHT.transpose(0, 1).flatten(1).std(1, correction=0)
        return {
            "f_mean": f_BHT.mean().item(),
            "f_std": std_H.mean().item(),
            "f_std_min": std_H.min().item(),
            "phase_min": phase_BH.min().item(),
            "phase_max": phase_BH.max().item(),
        }

    def complaint(self, health: dict[str, float]) -> str | None:
        if health and health["phase_max"] < 1:
            return f"f has collapsed to {health['f_mean']:.2g}: φ_1 grows by {health['phase_max']:.2g} radians at most"
        if health and health["f_std"] < COLLAPSED * health["f_mean"]:
            spread = f"{health['f_std']:.2g} at a mean of {health['f_mean']:.2g}"
            return f"f has collapsed: over tokens its standard deviation is {spread}; one angle for all is RoPE of another base"
        return None


class CARoPEHidden(CARoPE):
    """CARoPE with x_t the block's ln_1 output and a W of its own per layer, as the authors' CABLE does it."""

    per_layer = hidden = True


class CARoPENoBias(CARoPE):
    """CARoPE as the paper's formula stands, without a bias: it starts at f = 1/(1 + ln 2) = 0.59, not at RoPE."""

    has_bias = False

    def init_weights(self) -> None:
        nn.init.normal_(self.W.weight, std=0.02)
