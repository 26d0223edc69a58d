"""Encodings that turn queries and keys by an angle that their position alone decides.

Shapes: B batch, T positions, S cached and new positions, C width, H heads, D = C/H head width, F = D/2 rotary pairs.
"""

import math
from typing import Any

import torch
from torch import Tensor

from core.cache import KVCache
from core.kernels.support import rotation_kernel
from core.numerics import round_to_bf16, widest
from positional.base import Option, PositionalEncoding, Positions, register
from positional.rotation import turn_pairs


def inverse_frequencies(n_pairs: int, theta: float, device: torch.device) -> Tensor:
    """θ^i for i = 0 … n_pairs−1, (F,) `widest`."""
    return theta ** torch.arange(n_pairs, dtype=widest(device), device=device)


class Fused(Positions):
    """A kernel turns queries and keys itself, from f; the coordinates are never in memory."""

    def __init__(self, encoding: "RoPE", rotation: Any) -> None:
        self.encoding, self.rotation, self.frame = encoding, rotation, None

    def turn(self, qkv_BTM: Tensor, n_head: int) -> tuple[Tensor, Tensor, Tensor]:
        B, T, _ = qkv_BTM.shape
        return self.rotation(qkv_BTM.view(B, T, 3, n_head, -1).permute(2, 0, 3, 1, 4))


@register("rope")
class RoPE(PositionalEncoding):
    """Rotary position embedding (Su et al., 2104.09864): pair i at position m is turned by m·θ_i, θ_i = base^(−2i/D).

    Channels are paired half-split, (u_i, u_{i+D/2}), as in Llama and GPT-NeoX. Coordinates are the phases, radians.

    Where `frequency` describes the whole rotation, a Triton kernel can do it (cfg.kernel). Each class declares that itself,
    `class Mine(RoPE, fused=True)`; a subclass without fused=True runs as written.
    """

    options: tuple[Option, ...] = (
        Option("rope_base", 10000.0, "base of the frequencies of all that turn by them", ge=1.001, le=1e15),
    )
    family = "rotary"
    changes = "queries, keys"
    beyond = "phases grow on: every pair of channels slower than one turn per training length gets angles it has never seen"
    fused = True
    inclusive = False  # the first token stands at 0: its own f does not count in its phase
    scalable = True  # whether its rotation is that by the phases, so that these can be scaled
    scaling: Any = None  # a positional.scaling.Scaling, set for evaluation beyond the training length

    def __init_subclass__(cls, fused: bool = False, **options: Any) -> None:
        super().__init_subclass__(**options)
        cls.fused = fused

    def __init__(self, cfg: Any) -> None:
        super().__init__(cfg)
        self.kernel = rotation_kernel(cfg.kernel) if self.fused else None
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

    def forward(self, x_BTC: Tensor, pos_T: Tensor, cache: KVCache | None = None, layer: int = -1) -> Positions:
        if self.kernel and cache is None and (x_BTC.is_cuda or self.kernel.interpreted):
            return Fused(self, self.kernel(self.frequency(x_BTC), self.n_pairs, self.inclusive))
        return super().forward(x_BTC, pos_T, cache, layer)

    def frequency(self, x_BTC: Tensor) -> Tensor:
        """f, (B or 1, H or 1, T): pair i turns by the running sum of f^i from the first token on."""
        return torch.full((1, 1, 1), self.theta, dtype=widest(x_BTC.device), device=x_BTC.device).expand(1, 1, x_BTC.size(1))

    def coords(self, x_BTC: Tensor, pos_T: Tensor, last: Tensor | None = None) -> Tensor:
        self.check_cache(last)
        # (1, 1, T, F) is small: float64 is free, and the product keeps every digit of fp32 at any position
        phase_TF = pos_T.to(widest(pos_T.device))[:, None] * inverse_frequencies(self.n_pairs, self.theta, pos_T.device)
        return phase_TF[None, None]

    def check_cache(self, last: Tensor | None) -> None:
        """Raise ValueError where there is a cache and the scaling of the phases allows none."""
        if last is not None and self.scaling is not None and self.scaling.dynamic:
            raise ValueError(
                "rope_scaling = 'dynamic': all phases depend on the length of the window, so keys cannot be cached; use 'ntk'"
            )

    def frame(self, at: Positions) -> Any:
        if self.scaling is None:
            return self.cos_sin(at.coords)
        length, n_pairs = at.coords.shape[-2:]
        cos, sin = self.cos_sin(at.coords * self.scaling.factors(self.theta, n_pairs, length).to(at.coords))
        return self.scaling.magnitude * cos, self.scaling.magnitude * sin

    def cos_sin(self, phase: Tensor) -> tuple[Tensor, Tensor]:
        """Cosine and sine of the phases, (B or 1, H or 1, T, F) float32."""
        return phase.cos().float(), phase.sin().float()

    def rotate(self, u_BHTD: Tensor, frame: tuple[Tensor, Tensor]) -> Tensor:
        return turn_pairs(u_BHTD, *frame)


@register("partial_rope")
class PartialRoPE(RoPE):
    """RoPE on a fraction p = `partial_rope_fraction` of each head's channels; the others carry no position.

    `partial_rope_kind` "first" (GPT-J; GPT-NeoX, 2204.06745, section 2.1.1): the first pD channels turn, on a ladder of their
    own, θ_i = base^(−2i/(pD)), from fast to slow. "high" (p-RoPE of Barbero et al., 2410.06205): the ladder is RoPE's,
    base^(−2i/D), and the slowest (1 − p)D/2 pairs stand still. pD/2 is rounded down to whole pairs.
    """

    options = (
        Option("partial_rope_fraction", 0.25, "share of a head's channels that turn", gt=0, le=1),
        Option(
            "partial_rope_kind",
            "first",
            "the channels: first has a ladder of frequencies of its own, high is RoPE's without its slowest",
            choices=("first", "high"),
        ),
    )
    beyond = "as RoPE for the channels that turn; those that do not know no length"

    def __init__(self, cfg: Any) -> None:
        super().__init__(cfg)
        self.turning = self.pairs(cfg)
        self.own_ladder = cfg.partial_rope_kind == "first"
        if self.own_ladder:
            self.n_pairs = self.turning
            self.theta = cfg.rope_base ** (-1 / self.n_pairs)

    @staticmethod
    def pairs(cfg: Any) -> int:
        """How many pairs of channels of a head turn."""
        # 0.29 of 100 pairs is 28.999… in floating point
        return int(cfg.partial_rope_fraction * (cfg.n_embd // cfg.n_head // 2) + 1e-9)

    @classmethod
    def check(cls, cfg: Any) -> None:
        super().check(cfg)
        head_width = cfg.n_embd // cfg.n_head
        if not cls.pairs(cfg):
            raise ValueError(
                f"partial_rope_fraction = {cfg.partial_rope_fraction}: leaves no pair of channels to turn, of the head width "
                f"n_embd / n_head = {head_width}; from 2 / {head_width} on it does"
            )

    def coords(self, x_BTC: Tensor, pos_T: Tensor, last: Tensor | None = None) -> Tensor:
        moves_F = torch.arange(self.n_pairs, device=pos_T.device) < self.turning
        return super().coords(x_BTC, pos_T, last) * moves_F

    def rotate(self, u_BHTD: Tensor, frame: tuple[Tensor, Tensor]) -> Tensor:
        if not self.own_ladder:
            return super().rotate(u_BHTD, frame)
        turned = super().rotate(u_BHTD[..., : 2 * self.turning], frame)
        return torch.cat((turned, u_BHTD[..., 2 * self.turning :]), dim=-1)


@register("xpos")
class XPos(RoPE):
    """xPos (Sun et al., 2212.10554): RoPE, and of q · k pair i fades by ζ_i^(distance / `xpos_scale_base`).

    q at position n is multiplied by ζ_i^(n/512), k by ζ_i^(−n/512), with ζ_i = (2i/D + 0.4) / 1.4. Only the distance reaches
    the logits, but each factor alone leaves fp32's range: `max_len` is where k's largest, ζ_0's, comes to 2^106; what remains
    to 2^127 is for the keys themselves. The authors' attention by blocks at inference (BCA) is not part of it.
    """

    options = (Option("xpos_scale_base", 512.0, "tokens over which q · k fades by ζ (2/7 to 1) once", gt=0, le=2**24),)
    scalable = False
    beyond = "as RoPE, but what is far counts less pair by pair, the fast ones most; ends where fp32 does (max_len)"

    def __init__(self, cfg: Any) -> None:
        super().__init__(cfg)
        self.scale_base = cfg.xpos_scale_base
        self.max_len = self.longest(cfg)

    @staticmethod
    def longest(cfg: Any) -> int:
        """Positions for which the factors stay within fp32, and bf16, which reaches as far."""
        return int(cfg.xpos_scale_base * 106 * math.log(2) / math.log(1.4 / 0.4))

    @classmethod
    def check(cls, cfg: Any) -> None:
        super().check(cfg)
        if cfg.block_size > cls.longest(cfg):
            raise ValueError(
                f"block_size = {cfg.block_size}: with xpos_scale_base = {cfg.xpos_scale_base:g} the factors of xpos leave "
                f"fp32's range after {cls.longest(cfg)} tokens; a larger xpos_scale_base reaches further"
            )

    def frame(self, at: Positions) -> Any:
        """Cosine and sine for q, and for k, with their factors."""
        coords = at.coords
        i_F = torch.arange(self.n_pairs, dtype=coords.dtype, device=coords.device)
        zeta_F = (i_F / self.n_pairs + 0.4) / 1.4
        scale = zeta_F ** (coords[..., :1] / self.scale_base)  # θ_0 = 1: the phase of pair 0 is the position
        cos, sin = coords.cos(), coords.sin()
        return ((cos * scale).float(), (sin * scale).float()), ((cos / scale).float(), (sin / scale).float())

    def turn(self, q_BHTD: Tensor, k_BHTD: Tensor, frame: Any) -> tuple[Tensor, Tensor]:
        return self.rotate(q_BHTD, frame[0]), self.rotate(k_BHTD, frame[1])


@register("rope_bf16pos")
class RoPEbf16Positions(RoPE):
    """RoPE with positions rounded to bf16, a defect on purpose: what the rotary library of CARoPE's companion code does.

    There positions are counted in the type of the queries, bf16 under autocast, and then multiplied by fp32 frequencies. bf16
    has 8 bits: from 256 on only even positions exist, from 512 on every fourth, so 256 … 511 give 129 rotations. Here they are
    rounded whatever the run's dtype, to see this effect alone.
    """

    beyond = "as RoPE, and neighbors coincide: 2 positions share a rotation from 256 on, 4 from 512, 8 from 1024, …"

    def coords(self, x_BTC: Tensor, pos_T: Tensor, last: Tensor | None = None) -> Tensor:
        return super().coords(x_BTC, round_to_bf16(pos_T.float()), last)
