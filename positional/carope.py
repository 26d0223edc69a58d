"""Context-aware rotary encodings: the tokens decide by how much they turn what comes after them.

Shapes: B batch, T positions, S cached and new positions, C width, H heads, D = C/H head width, F = D/2 rotary pairs.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from core.numerics import widest
from positional.base import register
from positional.linear import narrow_linear
from positional.rotary import RoPE

COLLAPSED = 1e-3  # of its mean: f varies less over tokens than bf16 can tell apart


@register("carope")
class CARoPE(RoPE, fused=True):
    """Context-aware RoPE (2507.23083, section 2): the base θ_1 becomes a bounded scalar per token and head.

    f(x_t)_h = 1 / (1 + softplus((x_t W + b)_h)) and φ_i(m) = Σ_{t≤m} f(x_t)_h^i. x_t is the raw token embedding, so f
    is computed once and shared by all layers. The paper writes no bias; b = softplus⁻¹(1/θ_1 − 1) with W = 0 is
    what makes f = θ_1, the "starts as RoPE" that it asks for.
    """

    family = "context-aware rotary"
    beyond = "as RoPE: phases that grow on; by how much is the tokens' to say, so training may hold them in known ranges"
    has_bias = True
    inclusive = True

    def __init__(self, cfg: Any) -> None:
        super().__init__(cfg)
        y = 1 / self.theta - 1
        self.start = y if y > 30 else math.log(math.expm1(y))  # softplus⁻¹(y): the logit at which f = θ_1
        self.make_parameters(cfg)

    def make_parameters(self, cfg: Any) -> None:
        """What `logit` reads."""
        self.W = nn.Linear(cfg.n_embd, cfg.n_head, bias=self.has_bias)

    def init_weights(self) -> None:
        nn.init.zeros_(self.W.weight)
        nn.init.constant_(self.W.bias, self.start)

    def logit(self, x_BTC: Tensor) -> Tensor:
        """x_t W + b, (B or 1, T, H or 1) fp32."""
        return narrow_linear(self.W, x_BTC)

    def frequency(self, x_BTC: Tensor) -> Tensor:
        """f(x_t)_h in (0, 1), (B or 1, H or 1, T) fp32."""
        logit_BTH = self.logit(x_BTC)
        with torch.autocast(x_BTC.device.type, enabled=False):
            return (1 + functional.softplus(logit_BTH)).reciprocal().transpose(1, 2)

    def coords(self, x_BTC: Tensor, pos_T: Tensor, last: Tensor | None = None) -> Tensor:
        self.check_cache(last)
        step_BHTF = self.frequency(x_BTC)[..., None] ** torch.arange(self.n_pairs, device=x_BTC.device)
        # Sums in fp32 would be off by 2e-3 radians after 1e5 tokens, and those of a cache grow for as long as one decodes
        phase_BHTF = step_BHTF.cumsum(-2, dtype=widest(x_BTC.device))
        return phase_BHTF if last is None else last + phase_BHTF

    def cos_sin(self, phase: Tensor) -> tuple[Tensor, Tensor]:
        rest = (phase * (1 / math.tau)).frac().float() * math.tau  # without whole turns fp32 holds its digits, and is faster
        return rest.cos(), rest.sin()

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
        if stalled := self.stalled(health):
            return stalled
        if health and health["f_std"] < COLLAPSED * health["f_mean"]:
            spread = f"{health['f_std']:.2g} at a mean of {health['f_mean']:.2g}"
            return f"f has collapsed: over tokens its standard deviation is {spread}; one angle for all is RoPE of another base"
        return None

    @staticmethod
    def stalled(health: dict[str, float]) -> str | None:
        """In words, that f is so small that pair 1 hardly turns; None where it turns."""
        if health and health["phase_max"] < 1:
            return f"f has collapsed to {health['f_mean']:.2g}: φ_1 grows by {health['phase_max']:.2g} radians at most"
        return None


@register("carope_hidden")
class CARoPEHidden(CARoPE, fused=True):
    """CARoPE with x_t the block's ln_1 output and a W of its own per layer, as the authors' CABLE does it."""

    per_layer = hidden = True


@register("carope_per_layer")
class CARoPEPerLayer(CARoPE, fused=True):
    """CARoPE with x_t the raw token embedding and a W per layer: what a W per layer does without the hidden state."""

    per_layer = True


@register("carope_hidden_shared")
class CARoPEHiddenShared(CARoPE, fused=True):
    """CARoPE with x_t the block's ln_1 output and one W for all layers: what the hidden state does without a W per layer."""

    hidden = True


@register("carope_nobias")
class CARoPENoBias(CARoPE, fused=True):
    """CARoPE as the paper's formula stands, without a bias: it starts at f = 1/(1 + ln 2) = 0.59, not at RoPE."""

    has_bias = False

    def __init__(self, cfg: Any) -> None:
        super().__init__(cfg)
        self.theta = 1 / (1 + math.log(2))

    def init_weights(self) -> None:
        nn.init.normal_(self.W.weight, std=0.02)


@register("carope_scalar")
class CARoPEScalar(CARoPE, fused=True):
    """CARoPE without the input, the ablation its paper proposes: f_h = 1 / (1 + softplus(b_h)), a learned constant per head.

    It is RoPE with a base per head that is learned, from θ_1 on; one b for all layers, as `carope` has one W.
    """

    beyond = "as RoPE: each head turns on at the rate it has learned"

    def make_parameters(self, cfg: Any) -> None:
        self.b = nn.Parameter(torch.empty(cfg.n_head))

    def init_weights(self) -> None:
        nn.init.constant_(self.b, self.start)

    def logit(self, x_BTC: Tensor) -> Tensor:
        return self.b.float().expand(1, x_BTC.size(1), -1)

    def health(self, coords: Tensor) -> dict[str, float]:
        """f's mean, least and greatest over heads, and φ_1 at the last token, radians."""
        if self.n_pairs == 1:
            return {}
        phase_H = coords[0, :, -1, 1]
        f_H = phase_H / coords.size(-2)
        figures = {"f_mean": f_H.mean(), "f_min": f_H.min(), "f_max": f_H.max()}
        figures |= {"phase_min": phase_H.min(), "phase_max": phase_H.max()}
        return {name: figure.item() for name, figure in figures.items()}

    def complaint(self, health: dict[str, float]) -> str | None:
        """Only of a rate near 0: that f is the same for all tokens is the point here."""
        return self.stalled(health)


@register("carope_frozen")
class CARoPEFrozen(CARoPEScalar, fused=True):
    """CARoPE with f held at θ_1: RoPE by the arithmetic of CARoPE, the control of that arithmetic. No parameters."""

    beyond = "as RoPE, which it is"

    def make_parameters(self, cfg: Any) -> None:
        pass

    def init_weights(self) -> None:
        pass

    def logit(self, x_BTC: Tensor) -> Tensor:
        return torch.full((1, x_BTC.size(1), 1), self.start, device=x_BTC.device)
