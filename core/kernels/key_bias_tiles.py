"""The Triton side of core/kernels/key_bias.py.

`rows_kernel` takes a block of queries past the keys they see, as flash attention does, and keeps each row's log-sum-exp and δ.
`columns_kernel` takes a block of keys past the queries that see them and adds up dz. c is taken relative to the last query of
a block, in its own type: where a weight counts, the difference is small and has all its digits.

Shapes: T tokens, D head width (padded), I queries and J keys of a block.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from core.kernels.support import interpreted

BLOCK = 64  # queries, and keys, of a program at a time
WARPS = 4


def gradient(q: Tensor, k: Tensor, v: Tensor, dy: Tensor, c: Tensor) -> Tensor:
    """G of core.kernels.key_bias, (B, H, T) fp32; any strides."""
    B, H, T, D = q.shape
    if interpreted():  # which takes bf16 for the integers of its bits in a matmul
        q, k, v, dy = (u.float() for u in (q, k, v, dy))
    lse, delta, G = (torch.empty((B, H, T), dtype=torch.float32, device=q.device) for _ in range(3))
    grid = (triton.cdiv(T, BLOCK), B * H)
    strides = [stride for u in (q, k, v, dy) for stride in u.stride()] + list(c.stride())
    sizes = {"D": D, "BLOCK_D": max(16, triton.next_power_of_2(D)), "BLOCK": BLOCK, "num_warps": WARPS}
    numbers = (H, T, 1 / math.sqrt(D), *strides)
    rows_kernel[grid](q, k, v, dy, c, lse, delta, *numbers, **sizes)
    columns_kernel[grid](q, k, v, dy, c, lse, delta, G, *numbers, **sizes)
    return G


@triton.jit
def _load(ptr, row, H, t_T, T, stride_b, stride_h, stride_t, stride_d, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Some tokens of one row, (t, D)."""
    d_D = tl.arange(0, BLOCK_D)
    here = ptr + (row // H).to(tl.int64) * stride_b + (row % H).to(tl.int64) * stride_h
    there = (t_T < T)[:, None] & (d_D < D)[None, :]
    return tl.load(here + t_T[:, None].to(tl.int64) * stride_t + d_D[None, :] * stride_d, mask=there, other=0.0)


@triton.jit
def _bias(c_ptr, row, H, j_J, i_last, T, c_b, c_h, c_t):
    """c of some keys less that of query `i_last`, fp32."""
    here = c_ptr + (row // H).to(tl.int64) * c_b + (row % H).to(tl.int64) * c_h
    last = tl.load(here + tl.minimum(i_last, T - 1) * c_t)
    return (tl.load(here + j_J * c_t, mask=j_J < T, other=0.0) - last).to(tl.float32)


@triton.jit
def _logits(q_ID, k_JD, bias_J, scale, i_I, j_J, T):
    """Logits of queries and keys, fp32; −inf where a query does not see a key."""
    z_IJ = tl.dot(q_ID, tl.trans(k_JD), input_precision="ieee") * scale + bias_J[None, :]
    return tl.where((j_J[None, :] <= i_I[:, None]) & (i_I < T)[:, None], z_IJ, float("-inf"))


@triton.jit
def rows_kernel(
    q_ptr, k_ptr, v_ptr, dy_ptr, c_ptr, lse_ptr, delta_ptr, H, T, scale,
    q_b, q_h, q_t, q_d, k_b, k_h, k_t, k_d, v_b, v_h, v_t, v_d, y_b, y_h, y_t, y_d, c_b, c_h, c_t,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """log Σ_j exp z_ij, relative to the block's last c, and δ_i."""
    block, row = tl.program_id(0), tl.program_id(1)
    i_I = block * BLOCK + tl.arange(0, BLOCK)
    q_ID = _load(q_ptr, row, H, i_I, T, q_b, q_h, q_t, q_d, D, BLOCK_D)
    dy_ID = _load(dy_ptr, row, H, i_I, T, y_b, y_h, y_t, y_d, D, BLOCK_D)
    most_I = tl.full((BLOCK,), -1e30, tl.float32)  # finite, so that a row past the end gives no NaN
    sum_I = tl.zeros((BLOCK,), tl.float32)
    delta_I = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, (block + 1) * BLOCK, BLOCK):
        j_J = first + tl.arange(0, BLOCK)
        k_JD = _load(k_ptr, row, H, j_J, T, k_b, k_h, k_t, k_d, D, BLOCK_D)
        v_JD = _load(v_ptr, row, H, j_J, T, v_b, v_h, v_t, v_d, D, BLOCK_D)
        bias_J = _bias(c_ptr, row, H, j_J, (block + 1) * BLOCK - 1, T, c_b, c_h, c_t)
        z_IJ = _logits(q_ID, k_JD, bias_J, scale, i_I, j_J, T)
        dp_IJ = tl.dot(dy_ID, tl.trans(v_JD), input_precision="ieee")
        new_I = tl.maximum(most_I, tl.max(z_IJ, axis=1))
        p_IJ, shrink_I = tl.exp(z_IJ - new_I[:, None]), tl.exp(most_I - new_I)
        sum_I = sum_I * shrink_I + tl.sum(p_IJ, axis=1)
        delta_I = delta_I * shrink_I + tl.sum(p_IJ * dp_IJ, axis=1)
        most_I = new_I
    here = row.to(tl.int64) * T + i_I
    sum_I = tl.where(i_I < T, sum_I, 1.0)
    tl.store(lse_ptr + here, most_I + tl.log(sum_I), mask=i_I < T)
    tl.store(delta_ptr + here, delta_I / sum_I, mask=i_I < T)


@triton.jit
def columns_kernel(
    q_ptr, k_ptr, v_ptr, dy_ptr, c_ptr, lse_ptr, delta_ptr, out_ptr, H, T, scale,
    q_b, q_h, q_t, q_d, k_b, k_h, k_t, k_d, v_b, v_h, v_t, v_d, y_b, y_h, y_t, y_d, c_b, c_h, c_t,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """G_j = Σ_i p_ij·(dp_ij − δ_i)."""
    block, row = tl.program_id(0), tl.program_id(1)
    j_J = block * BLOCK + tl.arange(0, BLOCK)
    k_JD = _load(k_ptr, row, H, j_J, T, k_b, k_h, k_t, k_d, D, BLOCK_D)
    v_JD = _load(v_ptr, row, H, j_J, T, v_b, v_h, v_t, v_d, D, BLOCK_D)
    sum_J = tl.zeros((BLOCK,), tl.float32)
    for first in range(block * BLOCK, T, BLOCK):
        i_I = first + tl.arange(0, BLOCK)
        q_ID = _load(q_ptr, row, H, i_I, T, q_b, q_h, q_t, q_d, D, BLOCK_D)
        dy_ID = _load(dy_ptr, row, H, i_I, T, y_b, y_h, y_t, y_d, D, BLOCK_D)
        here = row.to(tl.int64) * T + i_I
        lse_I = tl.load(lse_ptr + here, mask=i_I < T, other=0.0)
        delta_I = tl.load(delta_ptr + here, mask=i_I < T, other=0.0)
        bias_J = _bias(c_ptr, row, H, j_J, first + BLOCK - 1, T, c_b, c_h, c_t)
        z_IJ = _logits(q_ID, k_JD, bias_J, scale, i_I, j_J, T)
        dp_IJ = tl.dot(dy_ID, tl.trans(v_JD), input_precision="ieee")
        sum_J += tl.sum(tl.exp(z_IJ - lse_I[:, None]) * (dp_IJ - delta_I[:, None]), axis=0)
    tl.store(out_ptr + row.to(tl.int64) * T + j_J, sum_J, mask=j_J < T)
