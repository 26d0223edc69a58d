"""CARoPE and RoPE as one pass over queries and keys: powers of f, their running sum, sine and cosine, rotation.

Pair i of the channels, (u_i, u_{i+D/2}), turns at token t by φ_i(t) = Σ_{t'≤t} f(t')^i (CARoPE, `inclusive`), or by the sum
over t' < t, which for a constant f = θ_1 is RoPE's t·θ_i: its first token stands at 0. No phase is ever written to memory.

**Accuracy.** Phases are integers of which 2³² are a turn: sums are exact in any order, whole turns drop out by themselves.
Powers are fp32, and float64 in the sums of whole blocks. So the error stays near 1e-6 radians at any length, where a running
sum in fp32 is off by 1e-4 and more at T = 16,384. Sine and cosine are polynomials on [−π/4, π/4], the same on every device.
f in float64 (RoPE's constant) is read as such.

**Memory traffic** per token and layer, in units of 2·C bytes (one of q, k, v in bf16), without the matmuls around it:

| | forward | backward |
|---|---|---|
| these kernels | 4: q, k in and out | 8: gradients of q, k, v in; q, k in; one gradient (B, T, 3, H, D) out |
| eager, were each pass fully fused | 6: also cos and sin, fp32, a unit each | 12: also cos and sin in, their gradients out |

and where layers share f, eager adds up their gradients of cos and sin, 4 more. f and its gradient are 2/D of a unit each. The
backward pass writes the gradient of c_attn's output whole, v's part too, as the matmuls before it read it: with gradients of
q and k alone, setting the three side by side would cost 4 units. It keeps q and k as c_attn left them. Attention keeps v, a
view of the same memory, so nothing is held for these kernels but f and the phases at block starts, 1/block of a unit.

**The scan over T** has three parts: `block_sums_kernel` (float64, parallel over blocks), a running sum over blocks in PyTorch
(at most a few hundred values a row), and `tl.cumsum` inside `rotate_kernel` and `rotate_backward_kernel`. f's gradient is the
same scan from the end: `rotate_backward_kernel` leaves what comes from inside each block, and the block's total;
`finish_gradient_kernel` adds the totals of later blocks.

On an H200, for a layer of GPT-Small (32 × 512) with f's gradient, the forward pass takes 34 µs and the backward pass 77; a copy
of as many bytes would take 31 and 56. BLOCK, WARPS and the order of the grid are not tuned.

Shapes: B batch, H heads, T tokens, D head width, F = D/2 pairs, N blocks of tokens.
"""

import math
from typing import Any

import torch
import triton
from torch import Tensor

from core.kernels.rotary_tiles import block_sums_kernel, finish_gradient_kernel, rotate_backward_kernel, rotate_kernel
from core.kernels.support import interpreted
from core.numerics import operator

BLOCK = 2048  # phases a program holds, tokens × pairs: about seven fp32 tiles of it must fit the registers of WARPS warps
WARPS = 4


class Rotation:
    """Rotates queries and keys by the running sums of powers of `f`, (B or 1, H or 1, T) fp32 or float64, in (0, 1].

    Made once, it serves every layer that shares f.
    """

    interpreted = interpreted()  # fixed when Triton is imported, as Triton fixes it

    def __init__(self, f: Tensor, n_pairs: int, inclusive: bool) -> None:
        self.f, self.inclusive = f, inclusive
        self.starts_BHNF = block_starts(f.detach(), n_pairs)

    def __call__(self, qkv_3BHTD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q and k rotated, in their type, and v as it is, each (B, H, T, D); any strides, gradients to qkv and f."""
        _, B, H, T, _ = qkv_3BHTD.shape
        starts_BHNF = self.starts_BHNF.expand(B, H, -1, -1)
        return _Rotate.apply(qkv_3BHTD, self.f.expand(B, H, T), starts_BHNF, self.inclusive)


class _Rotate(torch.autograd.Function):
    """The operators below, and v passed through, so that one gradient holds all three.

    Kernels are launched inside `torch.library.custom_op`, not `triton_op`: torch.compile then sees operators of known shapes
    and strides, the same under the interpreter as on a GPU, in torch 2.11 and 2.13; and nothing could be fused into them.
    """

    @staticmethod
    def forward(ctx: Any, qkv_3BHTD: Tensor, f_BHT: Tensor, starts_BHNF: Tensor, inclusive: bool) -> tuple[Tensor, ...]:
        ctx.save_for_backward(qkv_3BHTD, f_BHT, starts_BHNF)
        ctx.inclusive = inclusive
        q_BHTD, k_BHTD = rotate(qkv_3BHTD, f_BHT, starts_BHNF, inclusive)
        return q_BHTD, k_BHTD, qkv_3BHTD[2]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        needs_f = ctx.needs_input_grad[1]
        grad_3BHTD, grad_BHT = rotate_backward(*grads, *ctx.saved_tensors, ctx.inclusive, needs_f)
        return grad_3BHTD, grad_BHT if needs_f else None, None, None


@operator
def block_starts(f: Tensor, n_pairs: int) -> Tensor:
    """Phases at the start of each block, (B, H, N, F) int32 of which 2³² are a turn, from f (B, H, T)."""
    B, H, T = f.shape
    sizes = _sizes(n_pairs)
    sums = f.new_empty((B, H, triton.cdiv(T, sizes["BLOCK_T"]), n_pairs), dtype=torch.float64)
    block_sums_kernel[(B * H, sums.size(2))](f, sums, H, T, *f.stride(), **sizes)
    turns = (sums.cumsum(2) - sums) / math.tau
    return ((turns - turns.round()) * 2**32).clamp(max=2**31 - 1).to(torch.int32)


@block_starts.register_fake
def _(f: Tensor, n_pairs: int) -> Tensor:
    B, H, T = f.shape
    block = _sizes(n_pairs)["BLOCK_T"]
    return f.new_empty((B, H, (T + block - 1) // block, n_pairs), dtype=torch.int32)


@operator
def rotate(qkv: Tensor, f: Tensor, starts: Tensor, inclusive: bool) -> tuple[Tensor, Tensor]:
    """q and k rotated, (B, H, T, D) laid out as (B, T, H, D), which attention then keeps: its output needs no transposition."""
    _, B, H, T, D = qkv.shape
    q, k = _new_rows(qkv), _new_rows(qkv)
    sizes = _sizes(D // 2)
    grid = (B * H, triton.cdiv(T, sizes["BLOCK_T"]))
    strides = (*qkv.stride(), *f.stride(), *starts.stride(), *q.stride()[:3])
    rotate_kernel[grid](qkv, f, starts, q, k, H, T, *strides, INCLUSIVE=inclusive, num_warps=WARPS, **sizes)
    return q, k


@rotate.register_fake
def _(qkv: Tensor, f: Tensor, starts: Tensor, inclusive: bool) -> tuple[Tensor, Tensor]:
    return _new_rows(qkv), _new_rows(qkv)


@operator
def rotate_backward(
    grad_q: Tensor, grad_k: Tensor, grad_v: Tensor, qkv: Tensor, f: Tensor, starts: Tensor, inclusive: bool, needs_f: bool
) -> tuple[Tensor, Tensor]:
    """Gradients to qkv, (3, B, H, T, D) laid out as (B, T, 3, H, D), and to f, (B, H, T); the latter unset unless `needs_f`."""
    _, B, H, T, D = qkv.shape
    sizes = _sizes(D // 2)
    n_blocks = triton.cdiv(T, sizes["BLOCK_T"])
    grad_qkv, grad_f = _new_packed(qkv), torch.empty(f.shape, dtype=f.dtype, device=f.device)
    inside = torch.empty(f.shape if needs_f else 0, dtype=torch.float32, device=f.device)
    totals = torch.empty((B, H, n_blocks, D // 2) if needs_f else 0, dtype=torch.float32, device=f.device)
    grid = (B * H, n_blocks)
    strides = (*grad_q.stride(), *grad_k.stride(), *grad_v.stride(), *qkv.stride(), *f.stride(), *starts.stride())
    strides += grad_qkv.stride()[:4]
    rotate_backward_kernel[grid](
        grad_q, grad_k, grad_v, qkv, f, starts, grad_qkv, inside, totals, H, T, *strides,
        INCLUSIVE=inclusive, NEEDS_F=needs_f, num_warps=WARPS, **sizes,
    )  # fmt: skip
    if needs_f:
        blocks = {"N": n_blocks, "BLOCK_N": 16}
        finish_gradient_kernel[grid](f, inside, totals, grad_f, H, T, *f.stride(), **blocks, num_warps=WARPS, **sizes)
    return grad_qkv, grad_f


@rotate_backward.register_fake
def _(
    grad_q: Tensor, grad_k: Tensor, grad_v: Tensor, qkv: Tensor, f: Tensor, starts: Tensor, inclusive: bool, needs_f: bool
) -> tuple[Tensor, Tensor]:
    return _new_packed(qkv), torch.empty(f.shape, dtype=f.dtype, device=f.device)


def _new_rows(qkv: Tensor) -> Tensor:
    _, B, H, T, D = qkv.shape
    return qkv.new_empty((B, T, H, D)).transpose(1, 2)


def _new_packed(qkv: Tensor) -> Tensor:
    _, B, H, T, D = qkv.shape
    return qkv.new_empty((B, T, 3, H, D)).permute(2, 0, 3, 1, 4)


def _sizes(n_pairs: int) -> dict[str, int]:
    """What the kernels are compiled for: the block of phases, tokens × pairs (padded to a power of two)."""
    padded = max(16, 1 << (n_pairs - 1).bit_length())
    tokens = max(16, min(128, BLOCK // padded))
    return {"F": n_pairs, "BITS": max(1, (n_pairs - 1).bit_length()), "BLOCK_T": tokens, "BLOCK_F": padded}
