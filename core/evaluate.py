"""The loss of a model on a stream of tokens, in windows, on all ranks together: training's validation, and eval_ppl.py's.

Shapes: W windows, B of them in a batch, T positions, P parts of a stream, U windows or documents.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from core.cache import KVCache
from core.console import no_bar
from core.data import TokenStream, to_ids
from core.distributed import Distributed, local_and_eager
from core.fsdp import is_sharded, uncompiled
from core.numerics import widest
from positional import OwnWeights

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


@dataclass(frozen=True)
class Evaluation:
    """Mean negative log-likelihood per token in nats, its standard error over windows or documents, and number of tokens."""

    nll: float
    nll_stderr: float
    tokens: int

    @property
    def perplexity(self) -> float:
        return math.inf if self.nll > 700 else math.exp(self.nll)

    @property
    def stderr(self) -> float:
        """Standard error of the perplexity, to first order."""
        return self.perplexity * self.nll_stderr


def evaluate(
    net: nn.Module,
    stream: TokenStream,
    length: int,
    batch: int,
    dist: Distributed,
    max_tokens: int = 0,
    progress: bool = False,
    before_each: Callable[[], object] | None = None,
    stride: int = 0,
    profile: Any = None,
    by_document: Any = None,
) -> Evaluation:
    """Evaluate `net` in windows of `length`, `batch` windows at a time, sharded over ranks; every rank must call it.

    `max_tokens` limits the targets to the first so many; 0 is all of the stream. `before_each` is called before each batch,
    the same number of times on every rank; what it raises ends the evaluation. `stride` is that of the windows, 0 their length;
    a `profile` (a core.profile.Profile) takes in the loss against position, `by_document` (a core.documents.LossSums) that of
    each document. Where documents are to be evaluated by themselves it says which: `max_tokens` has limited them already, and
    the standard error is over them.
    """
    local, eager = local_and_eager(net)  # odd-shaped batches go to the eager model: compiling for them does not pay
    parts = by_document.documents.parts if by_document else None
    limit = 0 if parts else max_tokens
    windows = Windows(min(len(stream) - 1, limit or len(stream)), length, stride or length, parts)
    places_3W = torch.from_numpy(windows.places_3W).to(dist.device)
    chunks = list(windows.chunks(batch))
    rounds = [chunks[i : i + dist.world_size] for i in range(0, len(chunks), dist.world_size)]
    sums_W = torch.zeros(len(windows), dtype=widest(dist.device), device=dist.device)
    training = eager.training
    eager.eval()
    try:
        with torch.no_grad(), dist.autocast():
            for done, at_once in enumerate(tqdm(rounds, unit="batch", leave=False, disable=no_bar() if progress else True)):
                dist.at(f"evaluation, batch {done} of {len(rounds)}")
                if before_each:
                    before_each()
                idle = dist.rank >= len(at_once)  # the last round may have no batch for this rank
                if idle and not is_sharded(eager):
                    continue
                first, count, width = at_once[0 if idle else dist.rank]  # a shard is needed by the others: it comes along
                x_BT, y_BT = windows.read(stream, first, count, width, dist.device)
                regular = (count, width) == (batch, length)
                with nullcontext() if regular else uncompiled(eager):
                    nll_BT = losses(local if regular else eager, x_BT, y_BT)
                if idle:
                    continue
                start_B, from_B, to_B = places_3W[:, first : first + count]
                counted_BT = counted(nll_BT, from_B, to_B)
                sums_W[first : first + count] = counted_BT.sum(1)
                if by_document:
                    by_document.add(counted_BT, start_B)
                if profile:
                    profile.add(nll_BT, to_B)
    finally:
        eager.train(training)
    dist.sum_(sums_W)
    if profile:
        dist.sum_(profile.moments_3K)
    if by_document:
        dist.sum_(by_document.sums_D)
    if by_document and parts:
        return summarize(by_document.sums_D, by_document.tokens_D, int(parts[1].sum()))
    return summarize(sums_W, windows.sizes(dist.device), windows.n_tokens)


def summarize(sums_U: Tensor, sizes_U: Tensor, n_tokens: int) -> Evaluation:
    """Mean and standard error from the sums over U windows or documents, of `sizes_U` tokens, `n_tokens` together."""
    n_units = len(sums_U)
    nll = (sums_U.sum() / n_tokens).item()
    spread = (sums_U - nll * sizes_U).square().sum().item()
    stderr = math.sqrt(spread * n_units / (n_units - 1)) / n_tokens if n_units > 1 else math.nan
    return Evaluation(nll, stderr, n_tokens)
