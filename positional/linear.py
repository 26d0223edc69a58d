"""A linear layer with a few outputs a token, for coordinates: fp32 where its digits add up along the text.

Shapes: B batch, T positions, C inputs, H outputs.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from core.numerics import eager_on_cpu


def narrow_linear(layer: nn.Linear, x_BTC: Tensor) -> Tensor:
    """`layer` of `x_BTC`, (B, T, H) fp32, whatever autocast says.

    Its gradients are matmuls in autocast's type, as every other layer's are, where that is faster than fp32: not in eager mode
    on a CPU. Each of their elements is rounded once, by at most 2⁻⁸ of itself in bf16, and none adds up along the text.
    """
    kind = x_BTC.device.type
    reduced = torch.is_autocast_enabled(kind) and not eager_on_cpu(x_BTC)
    with torch.autocast(kind, enabled=False):
        x_BTC, W_HC, b_H = x_BTC.float(), layer.weight.float(), None if layer.bias is None else layer.bias.float()
        if not reduced:
            return functional.linear(x_BTC, W_HC, b_H)
        return _NarrowLinear.apply(x_BTC, W_HC, b_H, torch.get_autocast_dtype(kind))


class _NarrowLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_BTC: Tensor, W_HC: Tensor, b_H: Tensor | None, dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(x_BTC.to(dtype), W_HC.to(dtype))
        return functional.linear(x_BTC, W_HC, b_H)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dz_BTH: Tensor) -> tuple[Tensor | None, ...]:
        x_BTC, W_HC = ctx.saved_tensors
        rounded_NH = dz_BTH.flatten(0, 1).to(x_BTC.dtype)
        dx_BTC, dW_HC = (rounded_NH @ W_HC).view_as(x_BTC), rounded_NH.T @ x_BTC.flatten(0, 1)
        return dx_BTC.float(), dW_HC.float(), dz_BTH.sum((0, 1)) if ctx.needs_input_grad[2] else None, None
