"""Number formats that phases and long sums need whatever autocast says, and what a compiler is kept from looking into."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

NO_FLOAT64 = {"mps"}  # kinds of device


def widest(device: torch.device) -> torch.dtype:
    """float64, for phases and sums that keep fp32's digits at any length; float32 on Apple's GPUs, which have no more.

    There a position m is off by up to 6e-8 m radians, which at length 1024 is nothing to training.
    """
    return torch.float32 if device.type in NO_FLOAT64 else torch.float64


def eager_on_cpu(u: Tensor) -> bool:
    """Whether what is done to `u` now runs on a CPU as it is written, and is not being compiled."""
    return u.device.type == "cpu" and not torch.compiler.is_compiling()


def once(given: Any) -> Any:
    """`given`, whatever a frame is; tensors that all sequences share, of size 1 in the first dimension, are in memory.

    A compiler would compute it anew inside every kernel that reads it: RoPE's angles, in float64, for each channel of each
    token in each layer. Behind an operator that it does not know, it computes them once and every layer reads the table.
    """
    if type(given) is tuple:
        return tuple(map(once, given))
    is_shared = isinstance(given, Tensor) and given.dim() > 0 and given.size(0) == 1
    return in_memory(given) if is_shared and torch.compiler.is_compiling() else given


def operator(function: Callable[..., Any], changes: Sequence[str] = ()) -> Any:
    """`function` as an operator of torch's, carope::NAME, that a compiler does not look into; it writes to arguments `changes`.

    Another copy of this code in the process, as an export brings along, gets a name of its own, NAME_2 and so on: to define a
    name anew frees what the first copy still calls.
    """
    name, n = function.__name__, 1
    while hasattr(torch.ops.carope, name):
        n += 1
        name = f"{function.__name__}_{n}"
    return torch.library.custom_op(f"carope::{name}", function, mutates_args=changes)


@operator
def in_memory(x: Tensor) -> Tensor:
    """A copy of `x`."""
    return x.clone()


@in_memory.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


in_memory.register_autograd(lambda _, grad: grad)


def round_to_bf16(x: Tensor) -> Tensor:
    """fp32 `x` as bf16 holds it, in fp32, without a gradient.

    By its bits, for a compiler leaves `x.to(bfloat16).float()` out: torch's computes in fp32 whatever it does not store.
    """
    bits = x.detach().view(torch.int32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000).view(torch.float32)
