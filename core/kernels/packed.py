"""Linear layers for decoding on a CPU, their weights in the blocks in which they are read fastest.

A new token multiplies a vector, or as many as there are texts, by every weight there is, so the time goes into reading weights.
Torch's fp32 matmul is MKL's, which on an AMD processor reads them at a quarter of the memory's speed, and eight rows slower
than one. decode.cpp reads them at that speed, for one row or eight. Where it cannot be had, and in bf16, whose matmul in torch
puts the weights into blocks anew in every call, oneDNN has blocks of its own. results/LOG.md has the measurements.
"""

import functools
import platform
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from core.kernels.native import WIDTH, native

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


class BlockedLinear(nn.Module):
    """The same in fp32, by decode.cpp."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.n_out, missing = len(weight), -len(weight) % WIDTH
        whole = functional.pad(weight.detach().float(), (0, 0, 0, missing))
        self.weight = whole.unflatten(0, (-1, WIDTH)).transpose(1, 2).contiguous()
        self.bias = None if bias is None else functional.pad(bias.detach().float(), (0, missing))

    def forward(self, x: Tensor) -> Tensor:
        n_blocks, K, _ = self.weight.shape
        x, N = x.float().contiguous(), n_blocks * WIDTH
        M, y = x.numel() // K, x.new_empty(*x.shape[:-1], N)
        b = None if self.bias is None else self.bias.data_ptr()
        native().linear(x.data_ptr(), self.weight.data_ptr(), b, y.data_ptr(), M, N, K)
        return y if self.n_out == N else y[..., : self.n_out]


def can_pack(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether oneDNN has such blocks for `dtype` on this machine: x86 alone, bf16 with the instructions for it."""
    if device.type != "cpu" or platform.machine().lower() not in ("x86_64", "amd64"):
        return False
    if not torch.backends.mkldnn.is_available():
        return False
    return dtype == torch.float32 or (dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())


def pack(model: Any, dtype: torch.dtype) -> None:
    """Replace the linear layers of `model`, a GPT, and its head by such layers in `dtype`, for good; where possible.

    The model can then neither be trained nor saved. The embeddings stay as they are, so the head takes memory of its own.
    """
    device = model.wte.weight.device
    if device.type == "cpu" and dtype == torch.float32 and native():
        packed: Any = BlockedLinear
    elif can_pack(device, dtype):
        packed = functools.partial(PackedLinear, dtype=dtype)
    else:
        return
    for block in model.h:
        for owner, names in ((block.attn, ("c_attn", "c_proj")), (block.mlp, ("c_fc", "c_proj"))):
            for name in names:
                layer = getattr(owner, name)
                setattr(owner, name, packed(layer.weight, layer.bias))
    model.head = packed(model.wte.weight, None)
