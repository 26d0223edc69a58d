"""The rotation of queries and keys, with a backward pass written out.

As autograd derives it, every product keeps its fp32 operands and sends its own gradient back, to be added up: for CARoPE,
whose cosines and sines have gradients too, twice the time on a CPU, and twice the bytes in a GPU's compiled kernels.

Shapes: B batch, T positions, H heads, D head width, F = D/2 rotary pairs.
"""

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def cos_sin_of_long(phase: Tensor) -> tuple[Tensor, Tensor]:
    """Cosine and sine, fp32, of `phase` in `widest`, radians: without whole turns fp32 holds its digits, and is faster.

    CARoPE.cos_sin computes the same and does not call this: the hash of its code, and so of its runs, would change.
    """
    rest = (phase * (1 / math.tau)).frac().float() * math.tau
    return rest.cos(), rest.sin()


def turn_pairs(u_BHTD: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Pairs (u_i, u_{i+F}) turned by angles of the given cosines and sines, (B or 1, H or 1, T, F) fp32; of u's type."""
    if not torch.is_grad_enabled():  # of a single token the function's bookkeeping would take longer than its turn
        return _turned(u_BHTD.float(), cos, sin, 1).to(u_BHTD.dtype)
    turned = _Turn.apply(u_BHTD, cos, sin)
    assert isinstance(turned, Tensor)
    return turned


class _Turn(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, u: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.shape = u.shape
        held = (u,) if cos.requires_grad or sin.requires_grad else ()
        ctx.save_for_backward(*held, cos, sin)
        turned = _turned(u.float(), cos, sin, 1)
        # Compiled by torch 2.11, a result that `to` leaves as it is would get no gradient at all
        return turned if turned.dtype == u.dtype else turned.to(u.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        *held, cos, sin = ctx.saved_tensors
        g = grad.float()
        grad_u = _turned(g, cos, sin, -1).sum_to_size(ctx.shape).to(grad.dtype) if ctx.needs_input_grad[0] else None
        if not held:
            return grad_u, None, None
        (a, b), (ga, gb) = held[0].float().chunk(2, dim=-1), g.chunk(2, dim=-1)
        grad_cos, grad_sin = (ga * a).addcmul_(gb, b), (gb * a).addcmul_(ga, b, value=-1)
        return grad_u, grad_cos.sum_to_size(cos.shape), grad_sin.sum_to_size(sin.shape)


def _turned(u: Tensor, cos: Tensor, sin: Tensor, sign: int) -> Tensor:
    """u turned forward, or back with sign −1: a cos − b sin and b cos + a sin, straight into their places."""
    if torch.compiler.is_compiling():
        # The partner by its index: a compiler keeps what `cat` joins in memory, and writes this where it goes
        u2 = u.unflatten(-1, (2, -1))
        signs = sign * torch.arange(-1, 2, 2, device=u.device)[:, None]
        return (u2 * cos[..., None, :] + signs * u2.flip(-2) * sin[..., None, :]).flatten(-2)
    shape = (*map(max, u.shape[:-1], cos.shape[:-1]), u.size(-1))  # torch.broadcast_shapes takes longer than all the rest
    turned = u.new_empty(shape, dtype=torch.promote_types(u.dtype, cos.dtype))
    (a, b), (first, second) = u.chunk(2, dim=-1), turned.chunk(2, dim=-1)
    torch.mul(a, cos, out=first).addcmul_(b, sin, value=-sign)
    torch.mul(b, cos, out=second).addcmul_(a, sin, value=sign)
    return turned
