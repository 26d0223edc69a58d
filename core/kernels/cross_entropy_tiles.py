"""The Triton side of core/kernels/cross_entropy.py: a row of logits becomes its own gradient, and gives its loss.

A program takes a row in blocks, twice: first for its maximum and the sum of its exponentials, then for the softmax. The rows in
flight fit the L2 cache, so that memory sees one read and one write.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

# Logits of a program at a time, and its warps: the fastest of 16 pairs at 16384 × 50304 (results/cross-entropy-h200.json)
BLOCK, WARPS = 2048, 4


def loss_and_grad_(logits_NV: Tensor, targets_N: Tensor) -> Tensor:
    """Losses (N,) fp32 in nats; the logits, in rows of memory, become softmax − onehot, the gradient, where they lie."""
    N, V = logits_NV.shape
    losses_N = torch.empty(N, dtype=torch.float32, device=logits_NV.device)
    loss_and_grad_kernel[(N,)](logits_NV, targets_N, losses_N, V, logits_NV.stride(0), BLOCK=BLOCK, num_warps=WARPS)
    return losses_N


@triton.jit
def loss_and_grad_kernel(logits_ptr, targets_ptr, losses_ptr, V, stride, BLOCK: tl.constexpr):
    """One row. Each lane keeps the maximum and the sum of what it has seen; they are joined once, at the end."""
    row = tl.program_id(0)
    here = logits_ptr + row.to(tl.int64) * stride
    target = tl.load(targets_ptr + row)
    z_target = tl.load(here + target).to(tl.float32)

    lane = tl.arange(0, BLOCK)
    most = tl.full((BLOCK,), -3e38, tl.float32)  # finite, so that a lane that has seen nothing adds nothing
    total = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, V, BLOCK):
        z = tl.load(here + first + lane, mask=first + lane < V, other=float("-inf")).to(tl.float32)
        more = tl.maximum(most, z)
        total = total * tl.exp(most - more) + tl.exp(z - more)
        most = more
    top = tl.max(most, 0)
    lse = top + tl.log(tl.sum(total * tl.exp(most - top), 0))
    tl.store(losses_ptr + row, lse - z_target)

    for first in range(0, V, BLOCK):
        there = first + lane < V
        z = tl.load(here + first + lane, mask=there, other=float("-inf")).to(tl.float32)
        grad = tl.exp(z - lse) - tl.where(first + lane == target, 1.0, 0.0)
        tl.store(here + first + lane, grad.to(logits_ptr.dtype.element_ty), mask=there)
