"""Encodings that add to the attention logits a decay that the tokens between query and key decide.

Shapes: B batch, T positions, S keys, C width, H heads.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from core.numerics import widest
from positional.base import KeyBias, register
from positional.linear import narrow_linear

COLLAPSED = 1e-3  # of its mean: f varies less over tokens than bf16 can tell apart


@register("cable")
class CABLE(KeyBias):
    """Context-aware biases for length extrapolation (Veisi et al., 2503.08067): −Σ_{j<t≤i} f(x_t)_h.

    f = softplus(x_t W + b)_h, x_t the block's ln_1 output, W and b per layer, as the authors' code (axiomlab/Cable) has it.
    That code leaves out the 1/√D of the logits; here it stays, as for every encoding. Coordinates are running sums of f,
    (B, H, T, 1) `widest`: what a query sees is a difference of two large ones.
    """

    per_layer = hidden = True
    sign = 1.0  # of x_t W + b
    beyond = "the bias goes on falling with each token by what that token says; far tokens fade out, as they did in training"

    def __init__(self, cfg: Any) -> None:
        super().__init__(cfg)
        self.W = nn.Linear(cfg.n_embd, cfg.n_head)

    def init_weights(self) -> None:
        nn.init.normal_(self.W.weight, std=0.02)
        nn.init.zeros_(self.W.bias)

    def decay(self, x_BTC: Tensor) -> Tensor:
        """f(x_t)_h > 0, what token t takes off the logits of all that is before it, (B, H, T) fp32."""
        z_BTH = narrow_linear(self.W, x_BTC)
        with torch.autocast(x_BTC.device.type, enabled=False):
            # Contiguous on both sides of softplus: of its backward pass AOTAutograd and ATen expect different strides elsewise
            return functional.softplus(self.sign * z_BTH.transpose(1, 2).contiguous())

    def coords(self, x_BTC: Tensor, pos_T: Tensor, last: Tensor | None = None) -> Tensor:
        sum_BHT1 = self.decay(x_BTC).cumsum(-1, dtype=widest(x_BTC.device))[..., None]
        return sum_BHT1 if last is None else last + sum_BHT1

    def key_bias(self, coords_k: Tensor) -> Tensor:
        return coords_k[..., 0]

    def health(self, coords: Tensor) -> dict[str, float]:
        """f's mean and standard deviation over tokens (mean and least over heads)."""
        f_BHT = coords[..., 0].diff(dim=-1)
        std_H = f_BHT.transpose(0, 1).flatten(1).std(1, correction=0)
        return {"f_mean": f_BHT.mean().item(), "f_std": std_H.mean().item(), "f_std_min": std_H.min().item()}

    def complaint(self, health: dict[str, float]) -> str | None:
        if health and health["f_std"] < COLLAPSED * health["f_mean"]:
            spread = f"{health['f_std']:.2g} at a mean of {health['f_mean']:.2g}"
            return f"f has collapsed: over tokens its standard deviation is {spread}; one decay for all tokens is ALiBi"
        return None


@register("fox")
class FoX(CABLE):
    """Forgetting attention (Lin et al., 2503.02130): Σ_{j<t≤i} log σ(x_t w + b)_h, a forget gate per head and layer.

    As −log σ(z) = softplus(−z), it is CABLE with the signs of W and b turned. Of the paper's Transformer only the attention: no
    output gate, no norm of queries and keys. The gate starts as its code has it, b = 0 (a half) and w ~ N(0, 0.02).
    """

    sign = -1.0
