"""How an evaluation set is cut into windows, what counts in each, and the loss against the position in the window.

Shapes: W windows, B of them in a batch, T positions, P parts of a stream, K bins of positions.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from core.cache import KVCache
from core.data import TokenStream, to_ids
from core.numerics import widest
from positional import OwnWeights

PER_OCTAVE = 4  # bins of positions
PIECE = 1024  # queries at a time, where an encoding makes the attention weights of more


@dataclass(frozen=True)
class Windows:
    """Windows of `length` tokens, each `stride` after the one before, over the targets 1 … `n_tokens` of a stream.

    Of a window only the last `stride` targets count, of the first all: so every target counts exactly once, whatever `length`
    and `stride` are, and none but the first `length` is predicted from less than `length` − `stride` tokens. With a stride of
    the length windows do not overlap. The last window holds what is left.

    All this holds of each of the `parts` by itself: the first token of each, an index into the stream, and the number of its
    targets, (P,) int64 each, in the order of the stream. The stream is one part unless they are given. A window reads on past
    the end of its part, so that batches keep their shape; only at `n_tokens` it is shorter.
    """

    n_tokens: int
    length: int
    stride: int
    parts: tuple[np.ndarray, np.ndarray] | None = None

    @cached_property
    def places_3W(self) -> np.ndarray:
        """Of each window the first token, and of its targets the first that counts and the first after those, (3, W) int64."""
        first_P, tokens_P = self.parts or (np.zeros(1, dtype=np.int64), np.array([self.n_tokens]))
        windows_P = 1 + np.maximum(0, -((self.length - tokens_P) // self.stride))
        part_W = np.repeat(np.arange(len(first_P)), windows_P)
        nth_W = np.arange(len(part_W)) - np.repeat(np.cumsum(windows_P) - windows_P, windows_P)
        from_W = np.where(nth_W == 0, 0, self.length - self.stride)
        to_W = np.minimum(self.length, tokens_P[part_W] - nth_W * self.stride)
        return np.stack((first_P[part_W] + nth_W * self.stride, from_W, to_W))

    def __len__(self) -> int:
        return self.places_3W.shape[1]

    def chunks(self, batch: int) -> Iterator[tuple[int, int, int]]:
        """(first window, number of windows, their length) of each forward pass."""
        left_W = self.n_tokens - self.places_3W[0]
        whole = int(np.count_nonzero(left_W >= self.length))
        for first in range(0, whole, batch):
            yield first, min(batch, whole - first), self.length
        for first in range(whole, len(self)):
            yield first, 1, int(left_W[first])

    def read(self, stream: TokenStream, first: int, count: int, width: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Inputs and targets of a chunk, (count, width) each."""
        start_B = self.places_3W[0, first : first + count]
        span = int(start_B[-1] - start_B[0]) + width + 1
        if span <= count * (width + 1):  # nothing is left out between them: to read once is ten times as fast
            rows = stream.read(int(start_B[0]), span)[(start_B - start_B[0])[:, None] + np.arange(width + 1)]
        else:
            rows = np.stack([stream.read(start, width + 1) for start in start_B.tolist()])
        ids = to_ids(rows, device)
        ids = ids.to(device, non_blocking=ids.is_pinned())
        return ids[:, :-1].contiguous(), ids[:, 1:].contiguous()

    def sizes(self, device: torch.device) -> Tensor:
        """Targets that count in each window, (W,) `widest`."""
        _, from_W, to_W = self.places_3W
        return torch.from_numpy(to_W - from_W).to(device, widest(device))


def counted(nll_BT: Tensor, from_B: Tensor, to_B: Tensor) -> Tensor:
    """Losses with 0 for every target of a window that does not count in it."""
    at_T = torch.arange(nll_BT.size(1), device=nll_BT.device)
    return nll_BT.masked_fill((at_T < from_B[:, None]) | (at_T >= to_B[:, None]), 0)


def bins(length: int) -> list[tuple[int, int]]:
    """Positions 1 … `length` in bins [from, to], four to an octave; the last ends with `length`."""
    ends = sorted({min(length, int(2 ** (k / PER_OCTAVE))) for k in range(PER_OCTAVE * math.ceil(math.log2(length)) + 1)})
    return [(before + 1, end) for before, end in zip([0, *ends], ends, strict=False)]


class Profile:
    """Mean loss against position in the window: moments over windows of each window's mean within a bin.

    Position p is that of the token predicted from the p tokens before it in its window. All targets of a window go in, also
    those that count in the window before; a shorter window, as at the end of a document, fills the bins that it reaches the
    end of.
    """

    def __init__(self, length: int, device: torch.device) -> None:
        self.bins = bins(length)
        self.ends_K = torch.tensor([end for _, end in self.bins], device=device)
        self.moments_3K = torch.zeros(3, len(self.bins), dtype=widest(device), device=device)

    def add(self, nll_BT: Tensor, to_B: Tensor) -> None:
        """Take in the losses of B windows, (B, T) `widest`, of which the first `to_B` are their own."""
        reached = [(a, b) for a, b in self.bins if b <= nll_BT.size(1)]
        inside_BK = self.ends_K[: len(reached)] <= to_B[:, None]
        means_BK = torch.stack([nll_BT[:, a - 1 : b].mean(1) for a, b in reached], dim=1).masked_fill(~inside_BK, 0)
        one_BK = inside_BK.to(means_BK.dtype)
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
    whole = not any(isinstance(one, OwnWeights) for one in getattr(net, "encodings", ()))
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
