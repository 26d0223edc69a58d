"""The LM head and its cross-entropy as one operation, exact, whose logits are never in memory as fp32.

Written out, N tokens and V words take N·V·4 bytes several times over: logits, their fp32 copy, log-softmax, its gradient. Here
a chunk of rows at a time is multiplied, turned into its own gradient where it lies, and multiplied into the gradients of
`x` and of the weights; so the gradients are there when the forward pass ends, the logits are held once, in the type of the
matmul, for one chunk only, and the softmax runs on rows that are still in the cache.

Shapes: N tokens, V vocabulary, C width.
"""

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from core.kernels.support import cross_entropy_kernel
from core.numerics import operator

CHUNK_BYTES = {
    "cpu": 128 << 20,
    "cuda": 2 << 30,
    "mps": 256 << 20,
}  # logits held at a time: small in memory, large for a matmul
CACHE_BYTES = {"cpu": 4 << 20, "cuda": 256 << 20, "mps": 64 << 20}  # fp32 logits worked on at a time


def linear_cross_entropy(x_BTC: Tensor, weight_VC: Tensor, targets_BT: Tensor, reduction: str = "mean") -> Tensor:
    """cross_entropy(x @ weightᵀ, targets) in nats: the mean, a scalar, or (B, T) for reduction="none".

    The matmuls run in autocast's type where it is on, the softmax in fp32. With reduction="none" gradients are formed the plain
    way. Raises RuntimeError where gradients of the gradients are asked for.
    """
    kind = x_BTC.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x_BTC.dtype
    x_NC, targets_N = x_BTC.flatten(0, 1), targets_BT.flatten()
    wants_grad = torch.is_grad_enabled() and (x_NC.requires_grad or weight_VC.requires_grad)
    with torch.autocast(kind, enabled=False):
        if not wants_grad:
            loss_N = losses_and_grads(x_NC.to(dtype), weight_VC.to(dtype), targets_N, False)[0]
            return loss_N.mean() if reduction == "mean" else loss_N.view_as(targets_BT)
        if reduction == "mean":
            return _LinearCrossEntropy.apply(x_NC, weight_VC, targets_N, dtype)
        logits_NV = functional.linear(x_NC.to(dtype), weight_VC.to(dtype)).float()
        return functional.cross_entropy(logits_NV, targets_N, reduction=reduction).view_as(targets_BT)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_NC: Tensor, weight_VC: Tensor, targets_N: Tensor, dtype: torch.dtype) -> Tensor:
        loss_N, *grads = losses_and_grads(x_NC.to(dtype), weight_VC.to(dtype), targets_N, True)
        ctx.save_for_backward(*grads)
        ctx.dtypes = x_NC.dtype, weight_VC.dtype
        return loss_N.mean()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        dx_NC, dw_VC = ctx.saved_tensors
        grad = grad / len(dx_NC)
        return (dx_NC * grad).to(ctx.dtypes[0]), (dw_VC * grad).to(ctx.dtypes[1]), None, None


def losses_and_grads(
    x_NC: Tensor, weight_VC: Tensor, targets_N: Tensor, with_grads: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Loss of each token (N,) fp32; with grads those of the losses' sum to `x` and the weights too, fp32."""
    losses, dx, dw_VC = [], [], None
    n_chunks = math.ceil(len(x_NC) * len(weight_VC) * x_NC.element_size() / CHUNK_BYTES[x_NC.device.type])
    for x_nC, targets_n in zip(x_NC.tensor_split(n_chunks), targets_N.tensor_split(n_chunks), strict=True):
        logits_nV = x_nC @ weight_VC.T
        losses.append(_loss_and_grad_(logits_nV, targets_n, with_grads))
        if with_grads:
            dx.append((logits_nV @ weight_VC).float())
            dw_nVC = logits_nV.T @ x_nC
            dw_VC = dw_nVC.float() if dw_VC is None else dw_VC.add_(dw_nVC)
    return torch.cat(losses), torch.cat(dx) if with_grads else None, dw_VC


def _loss_and_grad_(logits_nV: Tensor, targets_n: Tensor, with_grads: bool) -> Tensor:
    """Losses of some rows, (n,) fp32; with grads the logits become softmax − onehot, the gradient, where they lie."""
    if with_grads and cross_entropy_kernel(logits_nV.device):
        return loss_and_grad_(logits_nV, targets_n)
    if torch.compiler.is_compiling():  # it makes one kernel of all rows without our help
        return _fusible(logits_nV, targets_n) if with_grads else _losses(logits_nV, targets_n)
    rows = max(1, CACHE_BYTES[logits_nV.device.type] // (4 * logits_nV.size(1)))
    losses = []
    for part_mV, targets_m in zip(logits_nV.split(rows), targets_n.split(rows), strict=True):
        if not with_grads:
            losses.append(_losses(part_mV, targets_m))
            continue
        z_mV, targets_m1 = part_mV.float(), targets_m[:, None]
        p_mV = z_mV.softmax(1)
        # log Σ exp z by the likeliest word, whose probability cannot underflow: the softmax already holds the sum
        lse_m = z_mV.amax(1) - p_mV.amax(1).log()
        losses.append(lse_m - z_mV.gather(1, targets_m1).squeeze(1))
        part_mV.copy_(p_mV.scatter_add_(1, targets_m1, p_mV.new_full(targets_m1.shape, -1)))
    return torch.cat(losses)


@partial(operator, changes=("logits",))
def loss_and_grad_(logits: Tensor, targets: Tensor) -> Tensor:
    """Losses (n,) fp32 of logits (n, V), which become their gradient where they lie."""
    losses: Tensor = cross_entropy_kernel(logits.device)(logits, targets)
    return losses


@loss_and_grad_.register_fake
def _(logits: Tensor, targets: Tensor) -> Tensor:
    return logits.new_empty(len(logits), dtype=torch.float32)


def _losses(logits_nV: Tensor, targets_n: Tensor) -> Tensor:
    return functional.cross_entropy(logits_nV.float(), targets_n, reduction="none")


def _fusible(logits_nV: Tensor, targets_n: Tensor) -> Tensor:
    """Losses and gradients by a formula that a compiler makes one kernel of: each row is read twice, its gradient written once.

    A scatter would be a kernel of its own, with fp32 probabilities in memory before and after it.
    """
    log_p_nV, targets_n1 = logits_nV.float().log_softmax(1), targets_n[:, None]
    is_target_nV = torch.arange(log_p_nV.size(1), device=log_p_nV.device) == targets_n1
    loss_n = -log_p_nV.gather(1, targets_n1).squeeze(1)
    logits_nV.copy_(log_p_nV.exp() - is_target_nV.float())
    return loss_n
