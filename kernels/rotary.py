"""CARoPE and RoPE as one pass over queries and keys: powers of f, their running sum, sine and cosine, rotation.

Pair i of the channels, (u_i, u_{i+D/2}), turns at token t by φ_i(t) = Σ_{t'≤t} f(t')^i (CARoPE, `inclusive`), or by the sum over
t' < t, which for a constant f = θ_1 is RoPE's t·θ_i: its first token stands at 0. No phase is ever written to memory.

**Accuracy.** Phases are counted in turns, φ/2π, so that dropping whole turns is exact. Each block of tokens starts at a phase
summed in float64 and reduced to [0, 1); inside the block (at most 128 tokens) the sum is fp32. So the error stays near 1e-5
radians at any length, where a running sum in fp32 loses 1e-3 and more by T = 16,384. Sine and cosine are polynomials on
[−π/4, π/4], the same on every device. f in float64 (RoPE's constant) is read as such.

**Memory traffic** per token and layer, in units of 2·C bytes (one of q, k, v in bf16), without the outer matmuls:

| | forward | backward |
|---|---|---|
| these kernels | 4: q, k in and out | 8: gradients of q, k, v in; q, k in; one gradient (B, T, 3, H, D) out |
| eager, fully fused by a compiler | 6: also cos and sin, fp32, a unit each | 14: also cos and sin in, their gradients out and summed over layers |

f and its gradient add 4·H bytes each, 1/(D/2) unit. The backward pass writes the gradient of c_attn's output whole, v's part too,
as its matmul reads it; with gradients of q and k alone, putting the three side by side would cost 4 units more. It keeps q and k as
c_attn left them: attention keeps v, a view of the same memory, so that nothing is held for these kernels alone but f and the
phases at block starts, D/(2·block) · 4 bytes a token and head.

**The scan over T** has three parts: `_block_sums` (float64, parallel over blocks), a running sum over blocks in PyTorch (a
few hundred values a row at most), and `tl.cumsum` inside `_rotate` and `_rotate_backward`. f's gradient needs the same scan from the
end: `_rotate_backward` leaves the part from inside each block, with the block's total; `_finish_gradient` adds later blocks'.

Not measured on a GPU yet: BLOCK, WARPS and the grid's order are reasoned, not tuned.

Shapes: B batch, H heads, T tokens, D head width, F = D/2 pairs, N blocks of tokens.
"""

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.support import interpreted

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

    Kernels are launched inside `torch.library.custom_op`, not `triton_op`: torch.compile then sees operators of known shapes and
    strides, the same under the interpreter and on a GPU, in torch 2.11 and 2.13, and there is nothing it could fuse into them.
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


@torch.library.custom_op("carope::block_starts", mutates_args=())
def block_starts(f: Tensor, n_pairs: int) -> Tensor:
    """Phases at the start of each block, (B, H, N, F) int32 of which 2³² are a turn, from f (B, H, T)."""
    B, H, T = f.shape
    sizes = _sizes(n_pairs)
    sums = f.new_empty((B, H, triton.cdiv(T, sizes["BLOCK_T"]), n_pairs), dtype=torch.float64)
    _block_sums[(B * H, sums.size(2))](f, sums, H, T, *f.stride(), **sizes)
    turns = (sums.cumsum(2) - sums) / math.tau
    return ((turns - turns.round()) * 2**32).clamp(max=2**31 - 1).to(torch.int32)


@block_starts.register_fake
def _(f: Tensor, n_pairs: int) -> Tensor:
    B, H, T = f.shape
    block = _sizes(n_pairs)["BLOCK_T"]
    return f.new_empty((B, H, (T + block - 1) // block, n_pairs), dtype=torch.int32)


@torch.library.custom_op("carope::rotate", mutates_args=())
def rotate(qkv: Tensor, f: Tensor, starts: Tensor, inclusive: bool) -> tuple[Tensor, Tensor]:
    """q and k rotated, (B, H, T, D) laid out as (B, T, H, D), which attention then keeps: its output needs no transposition."""
    _, B, H, T, D = qkv.shape
    q, k = _new_rows(qkv), _new_rows(qkv)
    sizes = _sizes(D // 2)
    grid = (B * H, triton.cdiv(T, sizes["BLOCK_T"]))
    strides = (*qkv.stride(), *f.stride(), *starts.stride(), *q.stride()[:3])
    _rotate[grid](qkv, f, starts, q, k, H, T, *strides, INCLUSIVE=inclusive, num_warps=WARPS, **sizes)
    return q, k


@rotate.register_fake
def _(qkv: Tensor, f: Tensor, starts: Tensor, inclusive: bool) -> tuple[Tensor, Tensor]:
    return _new_rows(qkv), _new_rows(qkv)


@torch.library.custom_op("carope::rotate_backward", mutates_args=())
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
    _rotate_backward[grid](
        grad_q, grad_k, grad_v, qkv, f, starts, grad_qkv, inside, totals, H, T, *strides,
        INCLUSIVE=inclusive, NEEDS_F=needs_f, num_warps=WARPS, **sizes,
    )  # fmt: skip
    if needs_f:
        _finish_gradient[grid](f, inside, totals, grad_f, H, T, *f.stride(), N=n_blocks, BLOCK_N=16, num_warps=WARPS, **sizes)
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


# Below, for Triton: row is one sequence of one head, b·H + h; block the number of the block of tokens along T. Heads lie side by
# side in memory and come first in the grid, so that programs at work at the same time read whole pages.


@triton.jit
def _powers(f_T, i_F, dtype: tl.constexpr, BITS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_F: tl.constexpr):
    """f^i in `dtype` by repeated squaring of f in float64: no logarithm, 0 where f^i is too small, the same on every device."""
    square_T = f_T.to(tl.float64)
    power_TF = tl.full((BLOCK_T, BLOCK_F), 1.0, dtype)
    for bit in tl.static_range(BITS):
        taken_TF = (((i_F >> bit) & 1) == 1)[None, :]
        power_TF = tl.where(taken_TF, power_TF * square_T.to(dtype)[:, None], power_TF)
        square_T = square_T * square_T
    return power_TF


@triton.jit
def _load_f(f_ptr, row, block, H, T, f_b, f_h, f_t, BLOCK_T: tl.constexpr):
    """f of one block, and its tokens."""
    t_T = block * BLOCK_T + tl.arange(0, BLOCK_T)
    here = f_ptr + (row // H).to(tl.int64) * f_b + (row % H).to(tl.int64) * f_h
    return tl.load(here + t_T * f_t, mask=t_T < T, other=0.0), t_T


@triton.jit
def _cos_sin(
    f_T, i_F, start_ptr, row, block, H, start_b, start_h, start_n, start_f,
    INCLUSIVE: tl.constexpr, F: tl.constexpr, BITS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    """Cosine and sine of the phases of one block."""
    # f^i · 2^30, then times 2^34/2π over 2^32: 2^32 is one turn
    step_TF = (_powers(f_T, i_F, tl.float32, BITS, BLOCK_T, BLOCK_F) * 1073741824.0).to(tl.uint32)
    step_TF = tl.umulhi(step_TF, tl.full((BLOCK_T, BLOCK_F), 2734261102, tl.uint32)).to(tl.int32)
    phase_TF = tl.cumsum(step_TF, axis=0)
    if not INCLUSIVE:
        phase_TF -= step_TF
    start = start_ptr + (row // H).to(tl.int64) * start_b + (row % H).to(tl.int64) * start_h + block * start_n
    phase_TF += tl.load(start + i_F * start_f, mask=i_F < F, other=0)[None, :]
    quarter = (phase_TF + 536870912) >> 30  # the nearest multiple of π/2, and the polynomials of what is left, within π/4
    x = (phase_TF - (quarter << 30)).to(tl.float32) * 1.4629180792671596e-09
    y = x * x
    s = x * (1 + y * (-1 / 6 + y * (1 / 120 + y * (-1 / 5040 + y * (1 / 362880)))))
    c = 1 + y * (-1 / 2 + y * (1 / 24 + y * (-1 / 720 + y * (1 / 40320 + y * (-1 / 3628800)))))
    odd, quarter = (quarter & 1) == 1, quarter & 3
    cos, sin = tl.where(odd, s, c), tl.where(odd, c, s)
    return tl.where((quarter == 1) | (quarter == 2), -cos, cos), tl.where(quarter >= 2, -sin, sin)


@triton.jit
def _at(ptr, row, H, t_T, i_F, stride_b, stride_h, stride_t, stride_d):
    """Pointers to the first halves of one row's tokens."""
    first = ptr + (row // H).to(tl.int64) * stride_b + (row % H).to(tl.int64) * stride_h
    return first + t_T[:, None].to(tl.int64) * stride_t + i_F[None, :] * stride_d


@triton.jit
def _load_pair(ptr, offset, there):
    """Channels i and i + F, fp32."""
    a = tl.load(ptr, mask=there, other=0.0).to(tl.float32)
    return a, tl.load(ptr + offset, mask=there, other=0.0).to(tl.float32)


@triton.jit
def _block_sums(
    f_ptr, sums_ptr, H, T, f_b, f_h, f_t, F: tl.constexpr, BITS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_F: tl.constexpr
):
    """Sums of f^i over each block, radians in float64; of the last block too, which nobody reads."""
    row, block, i_F = tl.program_id(0), tl.program_id(1), tl.arange(0, BLOCK_F)
    f_T, _ = _load_f(f_ptr, row, block, H, T, f_b, f_h, f_t, BLOCK_T)
    sum_F = tl.sum(_powers(f_T, i_F, tl.float64, BITS, BLOCK_T, BLOCK_F), axis=0)
    here = sums_ptr + (row.to(tl.int64) * tl.num_programs(1) + block) * F
    tl.store(here + i_F, sum_F, mask=i_F < F)


@triton.jit
def _rotate(
    qkv_ptr, f_ptr, start_ptr, q_ptr, k_ptr, H, T, u_3, u_b, u_h, u_t, u_d, f_b, f_h, f_t, s_b, s_h, s_n, s_f, o_b, o_h, o_t,
    INCLUSIVE: tl.constexpr, F: tl.constexpr, BITS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    """q and k of one block, rotated."""
    row, block, i_F = tl.program_id(0), tl.program_id(1), tl.arange(0, BLOCK_F)
    f_T, t_T = _load_f(f_ptr, row, block, H, T, f_b, f_h, f_t, BLOCK_T)
    cos, sin = _cos_sin(f_T, i_F, start_ptr, row, block, H, s_b, s_h, s_n, s_f, INCLUSIVE, F, BITS, BLOCK_T, BLOCK_F)
    there = (t_T < T)[:, None] & (i_F < F)[None, :]
    for which in tl.static_range(2):
        a, b = _load_pair(_at(qkv_ptr + which * u_3, row, H, t_T, i_F, u_b, u_h, u_t, u_d), F * u_d, there)
        out = _at(q_ptr if which == 0 else k_ptr, row, H, t_T, i_F, o_b, o_h, o_t, 1)
        tl.store(out, a * cos - b * sin, mask=there)
        tl.store(out + F, b * cos + a * sin, mask=there)


@triton.jit
def _rotate_backward(
    gq_ptr, gk_ptr, gv_ptr, qkv_ptr, f_ptr, start_ptr, out_ptr, inside_ptr, totals_ptr, H, T,
    q_b, q_h, q_t, q_d, k_b, k_h, k_t, k_d, v_b, v_h, v_t, v_d, u_3, u_b, u_h, u_t, u_d, f_b, f_h, f_t, s_b, s_h, s_n, s_f,
    o_3, o_b, o_h, o_t, INCLUSIVE: tl.constexpr, NEEDS_F: tl.constexpr,
    F: tl.constexpr, BITS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    """One block's gradients to q and k, turned back; v's, copied; and of f's what comes from inside the block."""
    row, block, i_F = tl.program_id(0), tl.program_id(1), tl.arange(0, BLOCK_F)
    f_T, t_T = _load_f(f_ptr, row, block, H, T, f_b, f_h, f_t, BLOCK_T)
    cos, sin = _cos_sin(f_T, i_F, start_ptr, row, block, H, s_b, s_h, s_n, s_f, INCLUSIVE, F, BITS, BLOCK_T, BLOCK_F)
    there = (t_T < T)[:, None] & (i_F < F)[None, :]
    phase_TF = tl.zeros((BLOCK_T, BLOCK_F), tl.float32)  # the loss differentiated by the phases
    for which in tl.static_range(2):
        if which == 0:
            x, y = _load_pair(_at(gq_ptr, row, H, t_T, i_F, q_b, q_h, q_t, q_d), F * q_d, there)
        else:
            x, y = _load_pair(_at(gk_ptr, row, H, t_T, i_F, k_b, k_h, k_t, k_d), F * k_d, there)
        ga, gb = x * cos + y * sin, y * cos - x * sin
        out = _at(out_ptr + which * o_3, row, H, t_T, i_F, o_b, o_h, o_t, 1)
        tl.store(out, ga, mask=there)
        tl.store(out + F, gb, mask=there)
        if NEEDS_F:
            a, b = _load_pair(_at(qkv_ptr + which * u_3, row, H, t_T, i_F, u_b, u_h, u_t, u_d), F * u_d, there)
            phase_TF += a * gb - b * ga
    x, y = _load_pair(_at(gv_ptr, row, H, t_T, i_F, v_b, v_h, v_t, v_d), F * v_d, there)
    out = _at(out_ptr + 2 * o_3, row, H, t_T, i_F, o_b, o_h, o_t, 1)
    tl.store(out, x, mask=there)
    tl.store(out + F, y, mask=there)
    if NEEDS_F:
        total_F = tl.sum(phase_TF, axis=0)
        later_TF = total_F[None, :] - tl.cumsum(phase_TF, axis=0)  # tokens after t in this block
        if INCLUSIVE:
            later_TF += phase_TF
        inside_T = tl.sum(later_TF * _slopes(f_T, i_F, BITS, BLOCK_T, BLOCK_F), axis=1)
        tl.store(inside_ptr + row.to(tl.int64) * T + t_T, inside_T, mask=t_T < T)
        tl.store(totals_ptr + (row.to(tl.int64) * tl.num_programs(1) + block) * F + i_F, total_F, mask=i_F < F)


@triton.jit
def _slopes(f_T, i_F, BITS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_F: tl.constexpr):
    """f^i differentiated by f, i·f^(i−1): without a division, so that f may be as small as it likes."""
    below_F = tl.where(i_F > 0, i_F - 1, 0)
    return i_F.to(tl.float32)[None, :] * _powers(f_T, below_F, tl.float32, BITS, BLOCK_T, BLOCK_F)


@triton.jit
def _finish_gradient(
    f_ptr, inside_ptr, totals_ptr, out_ptr, H, T, f_b, f_h, f_t, N: tl.constexpr, BLOCK_N: tl.constexpr,
    F: tl.constexpr, BITS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    """f's gradient: what came from inside the block, and what comes from all later ones."""
    row, block, i_F = tl.program_id(0), tl.program_id(1), tl.arange(0, BLOCK_F)
    f_T, t_T = _load_f(f_ptr, row, block, H, T, f_b, f_h, f_t, BLOCK_T)
    later_NF = tl.zeros((BLOCK_N, BLOCK_F), tl.float32)
    for first in range(0, N, BLOCK_N):
        n_N = first + tl.arange(0, BLOCK_N)
        there = ((n_N > block) & (n_N < N))[:, None] & (i_F < F)[None, :]
        here = totals_ptr + (row.to(tl.int64) * N + n_N[:, None]) * F + i_F[None, :]
        later_NF += tl.load(here, mask=there, other=0.0)
    later_F = tl.sum(later_NF, axis=0)
    here_T = row.to(tl.int64) * T + t_T
    grad_T = tl.load(inside_ptr + here_T, mask=t_T < T, other=0.0)
    grad_T += tl.sum(later_F[None, :] * _slopes(f_T, i_F, BITS, BLOCK_T, BLOCK_F), axis=1)
    tl.store(out_ptr + here_T, grad_T, mask=t_T < T)
