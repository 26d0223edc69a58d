"""Timing that survives a noisy machine: candidates interleaved round by round, medians, ratios within a round."""

import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from core.distributed import peak_memory
from core.errors import at_least

Work = Callable[[], object]


def synchronize(device: torch.device) -> None:
    """Wait until `device` has done all it was given; a CPU always has."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def interleave(
    candidates: Mapping[str, Work], rounds: int, warmup: int = 1, device: torch.device | None = None
) -> dict[str, list[float]]:
    """Seconds of each candidate in each of `rounds` rounds, after `warmup` rounds that do not count.

    In every round each candidate runs once, in an order drawn anew: what runs before, a large matmul say, leaves cold caches.
    Raises UserError for fewer than one round.
    """
    at_least(1, rounds=rounds)
    at_least(0, warmup=warmup)
    device, names, order = device or torch.device("cpu"), list(candidates), random.Random(1)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for number in range(-warmup, rounds):
        for name, took in timed(candidates, order.sample(names, len(names)), device).items():
            if number >= 0:
                seconds[name].append(took)
    return seconds


def timed(work: Mapping[str, Work], order: Sequence[str], device: torch.device) -> dict[str, float]:
    """Seconds that each of `work` takes, one after the other in the `order` given."""
    seconds = {}
    for name in order:
        synchronize(device)
        begin = time.perf_counter()
        work[name]()
        synchronize(device)
        seconds[name] = time.perf_counter() - begin
    return seconds


def turn(work: Mapping[str, Work], order: Sequence[str], device: torch.device, refill: Work) -> dict[str, Any]:
    """The `seconds` of each of `work` in a process whose turn it is among others, and what `release` says.

    On a GPU `refill` comes first: it takes back, outside of the time, the memory that the last turn released.
    """
    if device.type == "cuda":
        refill()
    return {"seconds": timed(work, order, device)} | release(device)


def release(device: torch.device) -> dict[str, int]:
    """Give a GPU's memory that holds no tensor back, for another process; returns the most that this one held so far."""
    peak = peak_memory(device)
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return {"peak_memory_bytes": peak}


def spread(seconds: Sequence[float], tokens: int) -> dict[str, Any]:
    """`n` times as `ms_median`, `ms_p10`, `ms_p90`, and `tokens_per_second` at the median, for `tokens` tokens each."""
    ordered = sorted(seconds)
    return {
        "n": len(ordered),
        "ms_median": round(1e3 * statistics.median(ordered), 3),
        "ms_p10": round(1e3 * ordered[round(0.1 * (len(ordered) - 1))], 3),
        "ms_p90": round(1e3 * ordered[round(0.9 * (len(ordered) - 1))], 3),
        "tokens_per_second": round(tokens / statistics.median(ordered), 1),
    }


def speedup(seconds: Sequence[float], baseline: Sequence[float]) -> float:
    """How many times as fast as `baseline`: the median over rounds of the ratio within the round."""
    return round(statistics.median(b / s for s, b in zip(seconds, baseline, strict=True)), 4)


def matmul(device: torch.device, dtype: torch.dtype) -> tuple[Work, int]:
    """A square matrix product in `dtype`, large enough to run at the device's rate, and its FLOPs."""
    size = 8192 if device.type == "cuda" else 4096
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    out = torch.empty(size, size, device=device, dtype=dtype)
    return lambda: torch.mm(a, b, out=out), 2 * size**3
