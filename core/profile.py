"""The loss against the position in the window.

Shapes: B windows, T positions, K bins of positions.
"""

import math
from typing import Any

import torch
from torch import Tensor

from core.numerics import widest

PER_OCTAVE = 4  # bins of positions


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
