"""Encodings that add to the attention logits what the distance of query and key says, whatever the tokens are.

Shapes: T positions, S keys, H heads, N buckets, M width of an MLP.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from core.numerics import widest
from positional.base import DistanceBias, KeyBias, Option, PairBias, register


def alibi_slopes(n_head: int, device: torch.device | None = None) -> Tensor:
    """Slopes m_1 … m_H, (H,) `widest`: 2^(−8h/H) where H is a power of two (2108.12409, section 3).

    Other H take those of the power of two below, P, then every second one of 2P, from the first on, as BLOOM does.
    """
    device = device or torch.device("cpu")
    power = 1 << (n_head.bit_length() - 1)
    h = torch.arange(1, n_head + 1, dtype=widest(device), device=device)
    return torch.exp2(-8 / power * torch.where(h <= power, h, h - power - 0.5))


@register("alibi")
class ALiBi(KeyBias):
    """Attention with linear biases (Press et al., 2108.12409, section 3): −m_h·(i − j), nothing is learned.

    Coordinates are positions, (1, 1, T, 1) `widest`.
    """

    family = "bias by distance"
    beyond = "the bias goes on falling linearly: far tokens fade out, as they did in training"

    def __init__(self, cfg: Any) -> None:
        super().__init__(cfg)
        self.n_head = cfg.n_head

    def coords(self, x_BTC: Tensor, pos_T: Tensor, last: Tensor | None = None) -> Tensor:
        return pos_T.to(widest(pos_T.device))[None, None, :, None]

    def key_bias(self, coords_k: Tensor) -> Tensor:
        return alibi_slopes(self.n_head, coords_k.device)[:, None] * coords_k[..., 0]


def t5_bucket(distance_S: Tensor, n_buckets: int, max_distance: int) -> Tensor:
    """The bucket of each distance i − j ≥ 0, (S,) int64, for a decoder (1910.10683, section 2.1).

    One each for the distances below N/2; from there on N/2 buckets that grow logarithmically up to `max_distance`; the last
    one holds all that is beyond. Computed a hair up: where a bucket begins at an integer, that integer is in it.
    """
    exact = n_buckets // 2
    dtype = widest(distance_S.device)
    hair = 1e-9 if dtype == torch.float64 else 1e-5
    ratio_S = (distance_S.to(dtype) / exact).clamp(min=1).log() / math.log(max_distance / exact)
    far_S = exact + (ratio_S * (n_buckets - exact) + hair).long()
    return torch.where(distance_S < exact, distance_S, far_S.clamp(max=n_buckets - 1))


@register("t5")
class T5(DistanceBias):
    """T5's relative positions (Raffel et al., 1910.10683, section 2.1): a learned scalar per bucket of distances and head.

    One table for all layers. T5 leaves out the 1/√D of the logits; here it stays, as for every encoding.
    """

    options = (
        Option("t5_buckets", 32, "buckets of distances, half of them of one distance each", ge=2, le=2**20),
        Option("t5_max_distance", 128, "where the last bucket begins at the latest, tokens", gt=0, le=2**24),
    )
    beyond = "all distances from t5_max_distance on share one learned bias"

    def __init__(self, cfg: Any) -> None:
        super().__init__(cfg)
        self.max_distance, self.std = cfg.t5_max_distance, cfg.n_embd**-0.5
        self.table_NH = nn.Parameter(torch.empty(cfg.t5_buckets, cfg.n_head))

    @classmethod
    def check(cls, cfg: Any) -> None:
        if cfg.t5_max_distance <= cfg.t5_buckets // 2:
            raise ValueError(
                f"t5_max_distance = {cfg.t5_max_distance}: half of t5_buckets = {cfg.t5_buckets} hold one distance each, so it "
                f"must be more than {cfg.t5_buckets // 2}"
            )

    def init_weights(self) -> None:
        nn.init.normal_(self.table_NH, std=self.std)  # as T5 does: its width to the power −1/2

    def distance_bias(self, n: int) -> Tensor:
        distance_S = torch.arange(n, device=self.table_NH.device)
        return self.table_NH[t5_bucket(distance_S, len(self.table_NH), self.max_distance)].T.float()


@register("kerple")
class KERPLE(DistanceBias):
    """KERPLE (Chi et al., 2205.09921): a bias that falls with the distance, by r1, r2 > 0 per head, the same in all layers.

    `kerple_kernel` "log", the paper's best: −r1·log(1 + r2·|i − j|). "power": −r1·|i − j|^r2, r2 ≤ 2. What is learned is the
    softplus⁻¹ of r, and of a power's r2 the logit of r2 / 2; the authors clamp r at 0.01 and 2 instead, which stops at the
    limit. Starts are theirs: r1 ~ U(0, 2) and r2 ~ U(0, 1), and for "power" the other way round.
    """

    options = (Option("kerple_kernel", "log", "how the bias falls: −r1·log(1 + r2·d) or −r1·d^r2", choices=("log", "power")),)
    beyond = "the bias goes on falling, with the logarithm or a power of the distance"

    def __init__(self, cfg: Any) -> None:
        super().__init__(cfg)
        self.power = cfg.kerple_kernel == "power"
        self.r1_H = nn.Parameter(torch.empty(cfg.n_head))
        self.r2_H = nn.Parameter(torch.empty(cfg.n_head))

    def init_weights(self) -> None:
        r1_H, r2_H = (torch.empty_like(self.r1_H).uniform_(0.01, most) for most in ((1, 1.99) if self.power else (2, 1)))
        self.r1_H.copy_(r1_H.expm1().log())  # softplus⁻¹
        self.r2_H.copy_((r2_H / 2).logit() if self.power else r2_H.expm1().log())

    def distance_bias(self, n: int) -> Tensor:
        distance_S = torch.arange(n, device=self.r1_H.device, dtype=torch.float32)
        with torch.autocast(self.r1_H.device.type, enabled=False):
            r1_H1, raw_H1 = functional.softplus(self.r1_H.float())[:, None], self.r2_H.float()[:, None]
            if self.power:
                return -r1_H1 * distance_S ** (2 * raw_H1.sigmoid())
            return -r1_H1 * (functional.softplus(raw_H1) * distance_S).log1p()


@register("fire")
class FIRE(PairBias):
    """FIRE (Li et al., 2310.04418): an MLP of ψ(i − j) / ψ(max(L, i)), ψ(x) = log(c·x + 1), per layer.

    c and L are learned, from 0.1 and 512 on (the listing in the appendix); both count by their absolute value. The MLP has one
    hidden layer of ReLUs and starts as torch's linear layers do. Coordinates are positions from 0 on, (1, 1, T, 1) `widest`.
    """

    options = (Option("fire_width", 32, "hidden width of the MLP, channels", gt=0, le=65536),)
    per_layer = True
    beyond = "distances are relative to the query's position, so the MLP never leaves the interval it was trained on"

    def __init__(self, cfg: Any) -> None:
        super().__init__(cfg)
        self.c, self.threshold = nn.Parameter(torch.empty(1)), nn.Parameter(torch.empty(1))
        self.fc, self.proj = nn.Linear(1, cfg.fire_width), nn.Linear(cfg.fire_width, cfg.n_head)

    def init_weights(self) -> None:
        nn.init.constant_(self.c, 0.1)
        nn.init.constant_(self.threshold, 1.0)  # in units of THRESHOLD: a learning rate moves it by its part, not by a token
        self.fc.reset_parameters()
        self.proj.reset_parameters()

    def coords(self, x_BTC: Tensor, pos_T: Tensor, last: Tensor | None = None) -> Tensor:
        return pos_T.to(widest(pos_T.device))[None, None, :, None]

    def bias(self, coords_q: Tensor, coords_k: Tensor) -> Tensor:
        i_T1, j_S = coords_q[0, 0].float(), coords_k[0, 0, :, 0].float()  # positions below 2^24: fp32 holds them
        with torch.autocast(i_T1.device.type, enabled=False):
            threshold = (self.threshold.float() * THRESHOLD).abs()
            distance_TS = self._psi((i_T1 - j_S).clamp(min=0))  # of later keys, which nobody sees: anything finite
            x_TS = distance_TS / (self._psi(torch.maximum(i_T1, threshold)) + 1e-6)
            hidden_TSM = functional.linear(x_TS[..., None], self.fc.weight.float(), self.fc.bias.float()).relu_()
            bias_TSH = functional.linear(hidden_TSM, self.proj.weight.float(), self.proj.bias.float())
        return bias_TSH.permute(2, 0, 1)[None]

    def _psi(self, x: Tensor) -> Tensor:
        return (self.c.float().abs() * x).log1p()


THRESHOLD = 512  # L at the start, tokens
