"""Linear layers for decoding on a CPU, their weights in the blocks that oneDNN reads fastest.

A new token multiplies a vector, or as many as there are texts, by every weight there is, so the time goes into reading weights.
Torch's fp32 matmul is MKL's, which reads them at half the speed of oneDNN on an AMD processor, and eight rows slower than one;
its bf16 matmul is oneDNN's, which puts the weights into blocks anew in every call. LOG.md has the measurements.
"""

import platform
from typing import Any

import torch
from torch import Tensor, nn

ROWS = 64  # told to oneDNN: in the blocks that it picks for so many it is at its fastest with one as well


class PackedLinear(nn.Module):
    """x Wᵀ + b without gradients, for `weight` (N, K), `bias` (N,) and x (…, K); the result is of the weights' type."""

    def __init__(self, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight.detach().to(dtype), ROWS)
        self.bias = None if bias is None else bias.detach().to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x.to(self.dtype), self.weight, self.bias, "none", [], "")


def can_pack(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether oneDNN has such blocks for `dtype` on this machine: x86 alone, bf16 with the instructions for it."""
    if device.type != "cpu" or platform.machine().lower() not in ("x86_64", "amd64"):
        return False
    if not torch.backends.mkldnn.is_available():
        return False
    return dtype == torch.float32 or (dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())


def pack(model: Any, dtype: torch.dtype) -> None:
    """Replace the linear layers of `model`, a GPT, and its head by packed ones in `dtype`, for good; where possible.

    The model can then neither be trained nor saved. The embeddings stay as they are, so the head takes memory of its own.
    """
    if not can_pack(model.wte.weight.device, dtype):
        return
    for block in model.h:
        for owner, names in ((block.attn, ("c_attn", "c_proj")), (block.mlp, ("c_fc", "c_proj"))):
            for name in names:
                layer = getattr(owner, name)
                setattr(owner, name, PackedLinear(layer.weight, layer.bias, dtype))
    model.head = PackedLinear(model.wte.weight, None, dtype)
