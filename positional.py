"""Positional encodings for GPT-2, one small class each, and the registry ENCODINGS.

An encoding may act at three places: on the embeddings (`embed`), on queries and keys (`rotate`), on the attention
logits (`bias`). The last two read coordinates (`coords`): where each token stands, as this encoding measures it,
always in fp32 or better and outside autocast, since bf16 positions alias beyond 256.

To add one: write a class, add it to ENCODINGS; every test that runs on all encodings then runs on it.

Shapes: B batch, T positions, S cached and new positions, C width, H heads, D = C/H head width, F = D/2 rotary pairs.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional


class PositionalEncoding(nn.Module):
    """The interface, and as it stands NoPE: no position at all but the causal mask (Kazemnejad et al., 2305.19466).

    `cfg` has n_embd, n_head, block_size and the encodings' own options (config.Config).
    """

    per_layer = False  # True: one instance per block, which sees that block's ln_1 output instead of the embeddings
    max_len: int | None = None  # longest input it has positions for; None is unlimited
    kernel: Any = None  # does the work of `rotate` from `frequency`; the model sets it
    n_pairs = 0  # for it: pairs of channels of a head
    inclusive = True  # for it: whether a token's own f counts in its phase

    def __init__(self, cfg: Any) -> None:
        super().__init__()

    @classmethod
    def check(cls, cfg: Any) -> None:
        """Raise ValueError, one line, where `cfg` is impossible for this encoding."""

    def init_weights(self) -> None:
        """Set every parameter of its own."""

    def embed(self, x_BTC: Tensor, pos_T: Tensor) -> Tensor:
        """Token embeddings with positions added, (B, T, C)."""
        return x_BTC

    def coords(self, x_BTC: Tensor, pos_T: Tensor, last: Tensor | None = None) -> Tensor | None:
        """Where the tokens stand: (B or 1, H or 1, T, n), or None where `rotate` and `bias` need nothing.

        `x_BTC` are the raw token embeddings (per_layer: the block's ln_1 output). With a KV cache, `last` is the
        coordinate of the last cached token, (…, 1, n) in float64 (zeros before the first), for running sums to go on.
        """
        return None

    def frame(self, coords: Any) -> Any:
        """What `rotate` reads, made from `coords` once and used by every layer that shares them."""
        return coords

    def rotate(self, u_BHTD: Tensor, frame: Any) -> Tensor:
        """Queries or keys turned to their position, same shape and type."""
        return u_BHTD

    def frequency(self, x_BTC: Tensor) -> Tensor | None:
        """f, (B or 1, H or 1, T): `rotate` turns pair i by the running sum of f^i from the first token on. None: it does not.

        All a kernel needs to know in place of `coords`, `frame` and `rotate`; a class that changes these alone gets no kernel.
        """
        return None

    def bias(self, coords_q: Tensor | None, coords_k: Tensor | None) -> Tensor | None:
        """Added to the attention logits, (B or 1, H, T, S), or None. Overriding it makes the cache keep all coords."""
        return None

    def health(self, coords: Tensor) -> dict[str, float]:
        """Figures for the log that tell whether the encoding is at work, from the coordinates of T tokens from the first on."""
        return {}

    def complaint(self, health: dict[str, float]) -> str | None:
        """In words, what is wrong after the warm-up with an encoding of this `health`; None where nothing is."""
        return None


class Learned(PositionalEncoding):
    """A learned table of absolute positions, as GPT-2 has (Radford et al. 2019)."""

    def __init__(self, cfg: Any) -> None:
        super().__init__(cfg)
        self.max_len = cfg.block_size
        self.weight = nn.Parameter(torch.empty(cfg.block_size, cfg.n_embd))  # called wpe.weight, as GPT-2's

    def init_weights(self) -> None:
        nn.init.normal_(self.weight, std=0.02)

    def embed(self, x_BTC: Tensor, pos_T: Tensor) -> Tensor:
        return x_BTC + functional.embedding(pos_T, self.weight)


class Sinusoidal(PositionalEncoding):
    """Fixed sine and cosine waves added to the embeddings (Vaswani et al., 1706.03762, section 3.5)."""

    def __init__(self, cfg: Any) -> None:
        super().__init__(cfg)
        self.scale = cfg.sinusoidal_scale

    def embed(self, x_BTC: Tensor, pos_T: Tensor) -> Tensor:
        n_embd = x_BTC.size(-1)
        freq = inverse_frequencies((n_embd + 1) // 2, 10000 ** (-2 / n_embd), pos_T.device)
        phase_TF = pos_T.double()[:, None] * freq
        waves_TC = torch.stack((phase_TF.sin(), phase_TF.cos()), dim=-1).flatten(-2)[:, :n_embd]
        return x_BTC + self.scale * waves_TC.to(x_BTC.dtype)


class RoPE(PositionalEncoding):
    """Rotary position embedding (Su et al., 2104.09864): pair i at position m is turned by m·θ_i, θ_i = base^(−2i/D).

    Channels are paired half-split, (u_i, u_{i+D/2}), as in Llama and GPT-NeoX. Coordinates are the phases, radians.
    """

    inclusive = False  # the first token stands at 0

    def __init__(self, cfg: Any) -> None:
        super().__init__(cfg)
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

    def frequency(self, x_BTC: Tensor) -> Tensor:
        return torch.full((1, 1, 1), self.theta, dtype=torch.float64, device=x_BTC.device).expand(1, 1, x_BTC.size(1))

    def coords(self, x_BTC: Tensor, pos_T: Tensor, last: Tensor | None = None) -> Tensor:
        # (1, 1, T, F) is small: float64 is free, and the product keeps every digit of fp32 at any position
        phase_TF = pos_T.double()[:, None] * inverse_frequencies(self.n_pairs, self.theta, pos_T.device)
        return phase_TF[None, None]

    def frame(self, coords: Any) -> tuple[Tensor, Tensor]:
        return coords.cos().float(), coords.sin().float()

    def rotate(self, u_BHTD: Tensor, frame: tuple[Tensor, Tensor]) -> Tensor:
        cos, sin = frame
        a, b = u_BHTD.float().chunk(2, dim=-1)
        return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(u_BHTD.dtype)


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

    per_layer = True


class CARoPENoBias(CARoPE):
    """CARoPE as the paper's formula stands, without a bias: it starts at f = 1/(1 + ln 2) = 0.59, not at RoPE."""

    has_bias = False

    def init_weights(self) -> None:
        nn.init.normal_(self.W.weight, std=0.02)


def inverse_frequencies(n_pairs: int, theta: float, device: torch.device) -> Tensor:
    """θ^i for i = 0 … n_pairs−1, (F,) float64."""
    return theta ** torch.arange(n_pairs, dtype=torch.float64, device=device)


ENCODINGS: dict[str, type[PositionalEncoding]] = {
    "nope": PositionalEncoding,
    "learned": Learned,
    "sinusoidal": Sinusoidal,
    "rope": RoPE,
    "carope": CARoPE,
    "carope_hidden": CARoPEHidden,
    "carope_nobias": CARoPENoBias,
}
