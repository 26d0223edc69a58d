"""The gradient to c of causal attention whose logit of query i and key j has c_j − c_i on top.

It is G_j = Σ_i dz_ij, where dz_ij = p_ij·(dp_ij − δ_i) is the gradient of a logit, p the attention weights, dp = dy vᵀ, and
δ_i = Σ_j p_ij·dp_ij. Where c is the running sum of a gate, the gate's gradient at a token is the sum of all later G, which
nearly cancel. Flash attention rounds its gradients to bf16 and takes δ from a rounded output; over a text these errors add up
to as much as the sum itself. So dz is computed again, in fp32, for G alone. With δ from the same p and dp each row of dz sums
to 0, so −c_i has no gradient of its own.

On a GPU this takes four matmuls, two for δ and two for G. Only δ, the softmax's log-sum-exp and G are ever in memory.

Shapes: B batch, H heads, T positions, D head width, t queries of a block, s keys they may see.
"""

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from core.kernels.support import key_bias_kernel
from core.numerics import operator

BLOCK = 128  # queries at a time where there is no Triton


def with_gradient(y_BHTD: Tensor, q_BHTD: Tensor, k_BHTD: Tensor, v_BHTD: Tensor, c_BHT: Tensor) -> Tensor:
    """`y_BHTD`, what attention made of the others with `c_BHT` (B or 1, H, T) detached, and through it c's gradient."""
    if not (torch.is_grad_enabled() and c_BHT.requires_grad):
        return y_BHTD
    return _WithGradient.apply(y_BHTD, *(u.detach() for u in (q_BHTD, k_BHTD, v_BHTD)), c_BHT)


class _WithGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, q: Tensor, k: Tensor, v: Tensor, c: Tensor) -> Tensor:
        ctx.save_for_backward(q, k, v, c)
        return y.view_as(y)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        *qkv, c = ctx.saved_tensors
        with torch.autocast(dy.device.type, enabled=False):  # a backward pass may be called where it is on
            dc = key_bias_gradient(*qkv, dy, c.expand(qkv[0].shape[:3]))
        return dy, None, None, None, dc.sum_to_size(c.shape).to(c.dtype)


@operator
def key_bias_gradient(q: Tensor, k: Tensor, v: Tensor, dy: Tensor, c: Tensor) -> Tensor:
    """G, (B, H, T) fp32, of q, k, v, dy (B, H, T, D) and c (B, H, T), fp32 or float64."""
    return (key_bias_kernel(q.device) or in_blocks)(q, k, v, dy, c)


@key_bias_gradient.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, dy: Tensor, c: Tensor) -> Tensor:
    return torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)


def in_blocks(q: Tensor, k: Tensor, v: Tensor, dy: Tensor, c: Tensor) -> Tensor:
    """The same by plain fp32 matmuls, a block of queries at a time: correct anywhere, and on a GPU several times as slow."""
    T, scale = q.size(2), 1 / math.sqrt(q.size(3))
    G = torch.zeros(q.shape[:3], dtype=torch.float32, device=q.device)
    for i in range(0, T, BLOCK):
        block, seen = slice(i, min(i + BLOCK, T)), slice(min(i + BLOCK, T))
        z_BHts = scale * q[:, :, block].float() @ k[:, :, seen].float().mT
        z_BHts += (c[:, :, seen] - c[:, :, seen.stop - 1 : seen.stop]).float()[:, :, None]  # small where a weight counts
        n = block.stop - i
        z_BHts[..., -n:] += z_BHts.new_full((n, n), -math.inf).triu(1)
        p_BHts, dp_BHts = z_BHts.softmax(-1), dy[:, :, block].float() @ v[:, :, seen].float().mT
        delta_BHt1 = (p_BHts * dp_BHts).sum(-1, keepdim=True)
        G[:, :, seen] += (p_BHts * (dp_BHts - delta_BHt1)).sum(2)
    return G
