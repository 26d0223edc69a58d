"""The loss of a model on a stream of tokens, in windows, on all ranks together: training's validation, and eval_ppl.py's."""

import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from core.console import no_bar
from core.data import TokenStream
from core.distributed import Distributed, local_and_eager
from core.fsdp import is_sharded, uncompiled
from core.numerics import widest
from core.windows import Windows, counted, losses


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
