"""ComRoPE: queries and keys turned in more than a plane at a time, by angle matrices that are learned.

Shapes: B batch, T positions, H heads, D head width, F = D/2 pairs, b channels of a block, N = D/b blocks of a head.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn

from core.numerics import widest
from positional.base import Option, PositionalEncoding, Positions, register
from positional.rotary import RoPE, inverse_frequencies


@register("comrope")
class ComRoPE(PositionalEncoding):
    """ComRoPE (Yu et al., 2506.03737): R(m) = exp(m·A), A block-diagonal of learned skew b × b blocks, b = `comrope_block`.

    R(m) R(n) = R(m + n): only the distance reaches the logits; matrices of several axes must commute. A text has one axis: the
    paper's two ways to make matrices commute, blocks that belong to one axis each (AP) and one matrix times a factor per axis
    (LD), then differ by that factor alone, and this is both. As in the authors' code every layer and head has its own A.
    Theirs, for images, start at random, scale coordinates to (0, 1) and, in training, move each at random by up to half a step.
    Here positions are tokens, and A starts with RoPE's θ_i between the two channels of pair i and 0 elsewhere: exactly RoPE.
    Block n holds the pairs nb/2 … (n+1)b/2 − 1, neighbors in frequency. With b = 2 this is RoPE with learned frequencies.

    Coordinates are the matrices, flat, of position m + 1: the running product of exp(A), in `widest`.
    """

    options = (
        *RoPE.options,
        Option("comrope_block", 8, "channels turned together, even", ge=2, le=65536),
    )
    family = "rotary"
    changes = "queries, keys"
    beyond = "as RoPE: the learned rotation goes on at its rate, into angles that training has not seen"
    per_layer = True

    def __init__(self, cfg: Any) -> None:
        super().__init__(cfg)
        self.n_head, self.block = cfg.n_head, cfg.comrope_block
        self.n_blocks = cfg.n_embd // cfg.n_head // self.block
        self.theta = cfg.rope_base ** (-2 * cfg.n_head / cfg.n_embd)
        n_below = self.block * (self.block - 1) // 2
        # What is below the diagonals of A's blocks; in one dimension, or weight decay would slow down every rotation
        self.angles = nn.Parameter(torch.empty(self.n_head * self.n_blocks * n_below))

    @classmethod
    def check(cls, cfg: Any) -> None:
        RoPE.check(cfg)
        head_width = cfg.n_embd // cfg.n_head
        if cfg.comrope_block % 2 or head_width % cfg.comrope_block:
            works = [b for b in range(2, head_width + 1, 2) if head_width % b == 0]
            raise ValueError(
                f"comrope_block = {cfg.comrope_block}: must be even and divide the head width n_embd / n_head = {head_width}; "
                f"these do: {', '.join(map(str, works))}"
            )

    def init_weights(self) -> None:
        A = torch.zeros(self.n_head, self.n_blocks, self.block, self.block)
        first = torch.arange(0, self.block, 2)
        theta = inverse_frequencies(self.n_blocks * len(first), self.theta, torch.device("cpu"))
        A[..., first + 1, first] = theta.view(self.n_blocks, -1).float()
        row, column = self.below(A.device)
        self.angles.copy_(A[..., row, column].flatten())

    def below(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Rows and columns of a block's entries below its diagonal."""
        row, column = torch.tril_indices(self.block, self.block, -1, device=device)
        return row, column

    def matrices(self) -> Tensor:
        """A's blocks, (H, N, b, b) `widest`, skew-symmetric."""
        row, column = self.below(self.angles.device)
        dtype = widest(self.angles.device)
        lower = self.angles.new_zeros(self.n_head, self.n_blocks, self.block, self.block, dtype=dtype)
        lower[..., row, column] = self.angles.to(dtype).view(self.n_head, self.n_blocks, -1)
        return lower - lower.mT

    def coords(self, x_BTC: Tensor, pos_T: Tensor, last: Tensor | None = None) -> Tensor:
        with torch.autocast(x_BTC.device.type, enabled=False):
            R_THNbb = powers(torch.linalg.matrix_exp(self.matrices()), len(pos_T))
            if last is not None and last.size(-1) > 1:  # not the zero that stands for no token so far
                R_THNbb = R_THNbb @ last.view(R_THNbb.shape[1:])
            return R_THNbb.transpose(0, 1).flatten(2)[None]

    def frame(self, at: Positions) -> Tensor:
        return at.coords[0].float().unflatten(-1, (self.n_blocks, self.block, self.block))

    def rotate(self, u_BHTD: Tensor, frame: Tensor) -> Tensor:
        with torch.autocast(u_BHTD.device.type, enabled=False):
            paired = u_BHTD.float().unflatten(-1, (2, -1)).mT  # the channels of a pair side by side: (B, H, T, F, 2)
            turned = torch.einsum("htnrc,bhtnc->bhtnr", frame, paired.reshape(*u_BHTD.shape[:3], self.n_blocks, self.block))
            return turned.reshape(*paired.shape).mT.flatten(-2).to(u_BHTD.dtype)


def powers(R: Tensor, n: int) -> Tensor:
    """R¹ … Rⁿ, (n, …, b, b), in log2(n) steps of one batched product: from R¹ … Rᵏ come Rᵏ⁺¹ … R²ᵏ."""
    found = R[None]
    for _ in range(math.ceil(math.log2(n))):
        found = torch.cat((found, found[: n - len(found)] @ found[-1]))
    return found
