"""Selective RoPE: the hidden states of the tokens between two positions decide the angle of each pair.

Shapes: B batch, T positions, C width, H heads, D head width, F = D/2 rotary pairs, R rank, K taps of a filter.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from core.numerics import widest
from positional.base import Option, Positions, register
from positional.linear import narrow_linear
from positional.rotary import RoPE, inverse_frequencies
from positional.rotation import cos_sin_of_long

TAPS = 4  # of the convolution over tokens


@register("selective_rope")
class SelectiveRoPE(RoPE):
    """Selective RoPE (Movahedi et al., 2511.17388): pair i turns by θ_i Σ_{t≤m} φ_t, where each token, head and pair has a φ.

    From h, the block's ln_1 output with each head's channels scaled to length 1: φ is a projection of h of rank
    `selective_rank`, then a causal depthwise convolution of 4 tokens without activation. `selective_bias` adds exp(b), per head
    and pair, b = 0 at the start: a clock that runs like RoPE's. `selective_gate` multiplies by σ(h W + c)_h. θ_i are RoPE's
    (the paper's base is 500000: --rope_base=500000). Weights start at N(0, 0.02), the convolution's too, as in the authors'
    code: without the bias there is no position to speak of at the start.

    Coordinates are the phases, (B, H, T, F) `widest`; with a cache, behind them, the convolution's inputs of the last 3 tokens.
    """

    options = (
        Option("selective_rank", 32, "rank of the projection to angles", gt=0, le=65536),
        Option("selective_bias", False, "whether a learned constant is added to each angle"),
        Option("selective_gate", False, "whether a gate per token and head multiplies the angles"),
    )
    family = "context-aware rotary"
    per_layer = hidden = True
    scalable = False
    beyond = "phases keep growing; the tokens set the rate, so training can keep them in a known range"

    def __init__(self, cfg: Any) -> None:
        super().__init__(cfg)
        self.n_head = cfg.n_head
        self.down = nn.Linear(cfg.n_embd, cfg.selective_rank, bias=False)
        self.up = nn.Linear(cfg.selective_rank, cfg.n_head * self.n_pairs, bias=False)
        self.filter = nn.Parameter(torch.empty(cfg.n_head * self.n_pairs, TAPS))  # the last one is the token's own
        self.bias = nn.Parameter(torch.empty(cfg.n_head * self.n_pairs)) if cfg.selective_bias else None
        self.gate = nn.Linear(cfg.n_embd, cfg.n_head) if cfg.selective_gate else None

    def init_weights(self) -> None:
        for weight in (self.down.weight, self.up.weight, self.filter):
            nn.init.normal_(weight, std=0.02)
        if self.bias is not None:
            nn.init.zeros_(self.bias)
        if self.gate is not None:
            nn.init.normal_(self.gate.weight, std=0.02)
            nn.init.zeros_(self.gate.bias)

    def coords(self, x_BTC: Tensor, pos_T: Tensor, last: Tensor | None = None) -> Tensor:
        """Phases, radians, (B, H, T, F) `widest`; with a cache (B, H, T, 4F), the inputs of the last 3 tokens behind them."""
        B, T, _ = x_BTC.shape
        with torch.autocast(x_BTC.device.type, enabled=False):
            h_BTHD = x_BTC.float().unflatten(-1, (self.n_head, -1))
            h_BTC = (h_BTHD * (h_BTHD.square().sum(-1, keepdim=True) + 1e-6).rsqrt()).flatten(2)
            u_BTHF = functional.linear(functional.linear(h_BTC, self.down.weight), self.up.weight)
            u_BHTF = u_BTHF.unflatten(-1, (self.n_head, -1)).transpose(1, 2)
            continued = last is not None and last.size(-1) > 1  # a single 0 stands for no token so far
            before = u_BHTF.new_zeros(B, self.n_head, TAPS - 1, self.n_pairs)
            if last is not None and continued:
                before = torch.stack(last[:, :, 0, self.n_pairs :].float().chunk(TAPS - 1, dim=-1), dim=2)
            inputs_BHTF = torch.cat((before, u_BHTF), dim=2)
            phi_BHTF = self._phi(inputs_BHTF, T)
            if self.gate is not None:
                phi_BHTF = phi_BHTF * narrow_linear(self.gate, h_BTC).sigmoid().transpose(1, 2)[..., None]
            theta_F = inverse_frequencies(self.n_pairs, self.theta, x_BTC.device)
            phase_BHTF = phi_BHTF.cumsum(-2, dtype=widest(x_BTC.device)) * theta_F
            if last is None:
                return phase_BHTF
            state = [inputs_BHTF[:, :, i + 1 : i + 1 + T] for i in range(TAPS - 1)]
            return torch.cat((phase_BHTF + last[..., : self.n_pairs] if continued else phase_BHTF, *state), dim=-1)

    def _phi(self, inputs_BHTF: Tensor, T: int) -> Tensor:
        taps = self.filter.float().view(self.n_head, 1, self.n_pairs, TAPS).unbind(-1)
        first = self.bias.float().exp().view(self.n_head, 1, -1) if self.bias is not None else inputs_BHTF.new_zeros(())
        return sum((tap * inputs_BHTF[:, :, i : i + T] for i, tap in enumerate(taps)), start=first)

    def frame(self, at: Positions) -> tuple[Tensor, Tensor]:
        return cos_sin_of_long(at.coords[..., : self.n_pairs])
