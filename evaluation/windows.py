"""How an evaluation set is cut into windows, what counts in each, and the loss against the position in the window.

Shapes: B windows, T positions, K bins of positions.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from data import TokenStream, to_batch
from kernels.bias import overrides
from kernels.kv_cache import KVCache
from positional.base import widest

PER_OCTAVE = 4  # bins of positions
PIECE = 1024  # queries at a time, where an encoding makes the attention weights of more


@dataclass(frozen=True)
class Windows:
    """Windows of `length` tokens, each `stride` after the one before, over `n_tokens` targets.

    Of a window only the last `stride` targets count, of the first all: so every target counts exactly once, whatever `length`
    and `stride` are, and none but the first `length` is predicted from less than `length` − `stride` tokens. With a stride of
    the length windows do not overlap. The last window holds what is left.
    """

    n_tokens: int
    length: int
    stride: int

    @property
    def whole(self) -> int:
        """Windows of full length."""
        return 0 if self.n_tokens < self.length else (self.n_tokens - self.length) // self.stride + 1

    @property
    def rest(self) -> int:
        """Length of the shorter window at the end; 0 where there is none."""
        counted = self.length + (self.whole - 1) * self.stride if self.whole else 0
        return self.n_tokens - self.whole * self.stride if counted < self.n_tokens else 0

    def __len__(self) -> int:
        return self.whole + (self.rest > 0)

    def chunks(self, batch: int) -> Iterator[tuple[int, int, int]]:
        """(first window, number of windows, their length) of each forward pass."""
        for first in range(0, self.whole, batch):
            yield first, min(batch, self.whole - first), self.length
        if self.rest:
            yield self.whole, 1, self.rest

    def read(self, stream: TokenStream, first: int, count: int, width: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Inputs and targets of a chunk, (count, width) each."""
        start = first * self.stride
        if count == 1 or self.stride == width:
            return to_batch(stream.read(start, count * width + 1), width, device)
        span = (count - 1) * self.stride + width
        x_1N, y_1N = to_batch(stream.read(start, span + 1), span, device)
        return x_1N[0].unfold(0, width, self.stride).contiguous(), y_1N[0].unfold(0, width, self.stride).contiguous()

    def counted(self, nll_BT: Tensor, first: int) -> Tensor:
        """Losses of the windows from `first` on with 0 for every target that counts in the window before."""
        repeated = self.length - self.stride
        if repeated:
            nll_BT = nll_BT.clone()
            nll_BT[int(first == 0) :, :repeated] = 0
        return nll_BT

    def sizes(self, device: torch.device) -> Tensor:
        """Targets that count in each window, (windows,) `widest`."""
        sizes_W = torch.full((len(self),), self.stride, dtype=widest(device), device=device)
        sizes_W[0] = min(self.length, self.n_tokens)
        if len(self) > 1:
            sizes_W[-1] = self.n_tokens - self.length - (len(self) - 2) * self.stride
        return sizes_W


def bins(length: int) -> list[tuple[int, int]]:
    """Positions 1 … `length` in bins [from, to], four to an octave; the last ends with `length`."""
    ends = sorted({min(length, int(2 ** (k / PER_OCTAVE))) for k in range(PER_OCTAVE * math.ceil(math.log2(length)) + 1)})
    return [(before + 1, end) for before, end in zip([0, *ends], ends, strict=False)]


class Profile:
    """Mean loss against position in the window: moments over windows of each window's mean within a bin.

    Position p is that of the token predicted from the p tokens before it in its window. All targets of a window go in, also
    those that count in the window before; a shorter window fills the bins that it reaches the end of.
    """

    def __init__(self, length: int, device: torch.device) -> None:
        self.bins = bins(length)
        self.moments_3K = torch.zeros(3, len(self.bins), dtype=widest(device), device=device)

    def add(self, nll_BT: Tensor) -> None:
        """Take in the losses of B windows, (B, T) `widest`."""
        reached = [(a, b) for a, b in self.bins if b <= nll_BT.size(1)]
        means_BK = torch.stack([nll_BT[:, a - 1 : b].mean(1) for a, b in reached], dim=1)
        one_BK = torch.ones_like(means_BK)
        self.moments_3K[:, : len(reached)] += torch.stack((one_BK, means_BK, means_BK.square())).sum(1)

    def summary(self) -> list[dict[str, Any]]:
        """A record per bin: positions, mean loss in nats, its standard error over windows (null for one), windows."""
        found = []
        for (first, last), (n, total, squares) in zip(self.bins, self.moments_3K.T.tolist(), strict=True):
            if n:
                variance = max(0.0, squares - total**2 / n) / (n - 1) if n > 1 else math.nan
                stderr = math.sqrt(variance / n) if n > 1 else None
                found.append({"from": first, "to": last, "loss": total / n, "stderr": stderr, "windows": int(n)})
        return found


def pieces(net: Any, idx_BT: Tensor) -> Iterator[tuple[slice, KVCache | None]]:
    """The parts in which a model should be given (B, T) tokens, with the cache that connects them.

    One, without a cache, unless the encoding makes the attention weights itself and the input is longer than in training: of
    these T² per head there would be at a time, and with `PIECE` queries at a time only PIECE · T.
    """
    T = idx_BT.size(1)
    whole = not any(overrides(e, "weights") for e in getattr(net, "encodings", ()))
    if whole or max(PIECE, net.cfg.block_size) >= T:
        yield slice(0, T), None
        return
    cache = KVCache()
    for start in range(0, T, PIECE):
        yield slice(start, start + PIECE), cache


def losses(net: nn.Module, x_BT: Tensor, y_BT: Tensor) -> Tensor:
    """Negative log-likelihood of each target in nats, (B, T) `widest`."""
    parts = [net(x_BT[:, part], y_BT[:, part], reduction="none", **_with(cache)) for part, cache in pieces(net, x_BT)]
    return (parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)).to(widest(x_BT.device))


def _with(cache: KVCache | None) -> dict[str, KVCache]:
    return {} if cache is None else {"cache": cache}  # what stands in for a model need not know of it
