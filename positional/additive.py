"""Encodings added to the token embeddings.

Shapes: B batch, T positions, C width, N symbols of a position's numeral, W width of SeqPE's encoder.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from core.numerics import once
from positional.base import Option, PositionalEncoding, register
from positional.rotary import inverse_frequencies


@register("learned")
class Learned(PositionalEncoding):
    """A learned table of absolute positions, as GPT-2 has (Radford et al. 2019)."""

    changes = "embeddings"
    beyond = "none: the table ends there, a longer input is refused"

    def __init__(self, cfg: Any) -> None:
        super().__init__(cfg)
        self.max_len = cfg.block_size
        self.weight = nn.Parameter(torch.empty(cfg.block_size, cfg.n_embd))  # called wpe.weight, as GPT-2's

    def init_weights(self) -> None:
        nn.init.normal_(self.weight, std=0.02)

    def embed(self, x_BTC: Tensor, pos_T: Tensor) -> Tensor:
        return x_BTC + functional.embedding(pos_T, self.weight)


@register("sinusoidal")
class Sinusoidal(PositionalEncoding):
    """Fixed sine and cosine waves added to the embeddings (Vaswani et al., 1706.03762, section 3.5).

    Their amplitude is `sinusoidal_scale`. Token embeddings start at 0.02: the 0.1 of CARoPE's companion code is 3.5 times as
    strong (root mean square), and small models learn slowly under it. config/sinusoidal_equal.toml has the two equal, which
    they are for Vaswani et al. within a factor of √2.
    """

    options = (Option("sinusoidal_scale", 0.1, "amplitude of the waves", gt=0),)
    changes = "embeddings"
    beyond = "the waves go on: sums of embedding and position that no layer has seen"

    def __init__(self, cfg: Any) -> None:
        super().__init__(cfg)
        self.scale = cfg.sinusoidal_scale

    def embed(self, x_BTC: Tensor, pos_T: Tensor) -> Tensor:
        n_embd = x_BTC.size(-1)
        freq = inverse_frequencies((n_embd + 1) // 2, 10000 ** (-2 / n_embd), pos_T.device)
        phase_TF = pos_T.to(freq)[:, None] * freq
        waves_TC = torch.stack((phase_TF.sin(), phase_TF.cos()), dim=-1).flatten(-2)[:, :n_embd]
        return x_BTC + once(self.scale * waves_TC.to(x_BTC.dtype)[None])


@register("seqpe")
class SeqPE(PositionalEncoding):
    """Sequential position encoding (Li et al., 2506.13277): a position is the sequence of its digits, and is read.

    The seqpe_digits digits of m to the base seqpe_base, left-padded with zeros, and then a readout symbol each have an
    embedding, plus one of their place. Two causal pre-norm transformer layers of width seqpe_width read them (two is the
    default of the authors' code; 128 channels and 4 heads are our choice); the readout symbol's output, normalized and
    projected to C channels, is added to the token embedding. The table of T positions is computed once per forward, for all
    sequences.

    Left out, since they need losses of their own: the contrastive objective that makes embeddings as far apart as their
    positions are, and the distillation of far positions from near ones. The paper owes them its extrapolation, so what this
    class shows beyond the training length is not SeqPE's result.

    The encoder learns at the learning rates of config/small.toml; at several times those (2e-3 and above) it was seen not to.
    """

    options = (
        Option("seqpe_base", 10, "base of the numerals", ge=2, le=1024),
        Option("seqpe_digits", 5, "digits of a position", ge=1, le=64),
        Option("seqpe_width", 128, "width of the encoder, channels", gt=0, le=4096, multiple_of=4),
    )
    changes = "embeddings"
    beyond = "any position below seqpe_base ** seqpe_digits can be written, but digits never seen in their place are untrained"

    def __init__(self, cfg: Any) -> None:
        super().__init__(cfg)
        self.base, self.digits, width = cfg.seqpe_base, cfg.seqpe_digits, cfg.seqpe_width
        self.max_len = self.base**self.digits
        self.symbol = nn.Parameter(torch.empty(self.base + 1, width))  # the last one is the readout symbol
        self.place = nn.Parameter(torch.empty(self.digits + 1, width))
        self.layers = nn.ModuleList(DigitLayer(width) for _ in range(2))
        self.norm = nn.LayerNorm(width)
        self.out = nn.Linear(width, cfg.n_embd, bias=False)

    @classmethod
    def check(cls, cfg: Any) -> None:
        if cfg.seqpe_base**cfg.seqpe_digits < cfg.block_size:
            need = next(n for n in range(1, 65) if cfg.seqpe_base**n >= cfg.block_size)
            raise ValueError(
                f"seqpe_digits = {cfg.seqpe_digits}: to the base {cfg.seqpe_base} they write "
                f"{cfg.seqpe_base**cfg.seqpe_digits} positions, fewer than block_size = {cfg.block_size}; {need} digits do"
            )

    def init_weights(self) -> None:
        nn.init.normal_(self.symbol, std=0.02)
        nn.init.normal_(self.place, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):  # outputs as large as inputs, so that what tells positions apart is not lost
                nn.init.normal_(module.weight, std=1 / math.sqrt(module.in_features))
            elif isinstance(module, nn.LayerNorm):
                nn.init.ones_(module.weight)
                nn.init.zeros_(module.bias)
        self.out.weight.mul_(0.02)  # positions as large as a learned table starts

    def embed(self, x_BTC: Tensor, pos_T: Tensor) -> Tensor:
        with torch.autocast(x_BTC.device.type, enabled=False):  # of one sequence for all, and small: float32 costs nothing
            u_TNW = functional.embedding(self.symbols(pos_T), self.symbol) + self.place
            for layer in self.layers:
                u_TNW = layer(u_TNW)
            return x_BTC + self.out(self.norm(u_TNW[:, -1])).to(x_BTC.dtype)

    def symbols(self, pos_T: Tensor) -> Tensor:
        """Digits, the most significant first, and the readout symbol, (T, N) int64."""
        reversed_digits = []
        rest_T = pos_T
        for _ in range(self.digits):
            reversed_digits.append(rest_T % self.base)
            rest_T = rest_T // self.base
        return torch.stack((*reversed_digits[::-1], torch.full_like(pos_T, self.base)), dim=-1)


class DigitLayer(nn.Module):
    """A pre-norm transformer layer of SeqPE's encoder: four heads of causal attention over a numeral, then GELU of 4 W."""

    n_head = 4

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm_1, self.norm_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.mix = nn.Linear(width, width, bias=False)
        self.wide = nn.Linear(width, 4 * width, bias=False)
        self.narrow = nn.Linear(4 * width, width, bias=False)

    def forward(self, u_TNW: Tensor) -> Tensor:
        T, N, W = u_TNW.shape
        q, k, v = self.qkv(self.norm_1(u_TNW)).view(T, N, 3, self.n_head, W // self.n_head).permute(2, 0, 3, 1, 4)
        y_THND = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        u_TNW = u_TNW + self.mix(y_THND.transpose(1, 2).reshape(T, N, W))
        return u_TNW + self.narrow(functional.gelu(self.wide(self.norm_2(u_TNW))))
