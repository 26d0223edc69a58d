"""The Triton side of core/kernels/rotary.py: what one program does with one block of tokens of one row.

A row is one sequence of one head, b·H + h. Tiles are pairs × tokens, which spreads the tokens of the running sum over the
lanes of a warp. Rows come first in the grid: heads lie side by side in memory, so what runs at the same time reads whole pages.
Strides are named by tensor and dimension: u (q, k, v as they came), q, k, v (gradients), f, s (starts), o (output).

Shapes: T tokens of a block, F pairs (padded), N blocks; F without a subscript is the true number of pairs.
"""

import triton
import triton.language as tl


@triton.jit
def _powers(f_T, i_F, dtype: tl.constexpr, BITS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_F: tl.constexpr):
    """f^i in `dtype` by repeated squaring of f in float64: no logarithm, 0 where f^i is too small, the same on every device."""
    square_T = f_T.to(tl.float64)
    power_FT = tl.full((BLOCK_F, BLOCK_T), 1.0, dtype)
    for bit in tl.static_range(BITS):
        taken_FT = (((i_F >> bit) & 1) == 1)[:, None]
        power_FT = tl.where(taken_FT, power_FT * square_T.to(dtype)[None, :], power_FT)
        square_T = square_T * square_T
    return power_FT


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
    step_FT = (_powers(f_T, i_F, tl.float32, BITS, BLOCK_T, BLOCK_F) * 1073741824.0).to(tl.uint32)
    step_FT = tl.umulhi(step_FT, tl.full((BLOCK_F, BLOCK_T), 2734261102, tl.uint32)).to(tl.int32)
    phase_FT = tl.cumsum(step_FT, axis=1)
    if not INCLUSIVE:
        phase_FT -= step_FT
    start = start_ptr + (row // H).to(tl.int64) * start_b + (row % H).to(tl.int64) * start_h + block * start_n
    phase_FT += tl.load(start + i_F * start_f, mask=i_F < F, other=0)[:, None]
    quarter = (phase_FT + 536870912) >> 30  # the nearest multiple of π/2, and the polynomials of what is left, within π/4
    x = (phase_FT - (quarter << 30)).to(tl.float32) * 1.4629180792671596e-09
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
    return first + t_T[None, :].to(tl.int64) * stride_t + i_F[:, None] * stride_d


@triton.jit
def _load_pair(ptr, offset, there):
    """Channels i and i + F, fp32."""
    a = tl.load(ptr, mask=there, other=0.0).to(tl.float32)
    return a, tl.load(ptr + offset, mask=there, other=0.0).to(tl.float32)


@triton.jit
def block_sums_kernel(
    f_ptr, sums_ptr, H, T, f_b, f_h, f_t, F: tl.constexpr, BITS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_F: tl.constexpr
):
    """Sums of f^i over each block, radians in float64; of the last block too, which nobody reads."""
    row, block, i_F = tl.program_id(0), tl.program_id(1), tl.arange(0, BLOCK_F)
    f_T, _ = _load_f(f_ptr, row, block, H, T, f_b, f_h, f_t, BLOCK_T)
    sum_F = tl.sum(_powers(f_T, i_F, tl.float64, BITS, BLOCK_T, BLOCK_F), axis=1)
    here = sums_ptr + (row.to(tl.int64) * tl.num_programs(1) + block) * F
    tl.store(here + i_F, sum_F, mask=i_F < F)


@triton.jit
def rotate_kernel(
    qkv_ptr, f_ptr, start_ptr, q_ptr, k_ptr, H, T, u_3, u_b, u_h, u_t, u_d, f_b, f_h, f_t, s_b, s_h, s_n, s_f, o_b, o_h, o_t,
    INCLUSIVE: tl.constexpr, F: tl.constexpr, BITS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    """q and k of one block, rotated."""
    row, block, i_F = tl.program_id(0), tl.program_id(1), tl.arange(0, BLOCK_F)
    f_T, t_T = _load_f(f_ptr, row, block, H, T, f_b, f_h, f_t, BLOCK_T)
    cos, sin = _cos_sin(f_T, i_F, start_ptr, row, block, H, s_b, s_h, s_n, s_f, INCLUSIVE, F, BITS, BLOCK_T, BLOCK_F)
    there = (i_F < F)[:, None] & (t_T < T)[None, :]
    for which in tl.static_range(2):
        a, b = _load_pair(_at(qkv_ptr + which * u_3, row, H, t_T, i_F, u_b, u_h, u_t, u_d), F * u_d, there)
        out = _at(q_ptr if which == 0 else k_ptr, row, H, t_T, i_F, o_b, o_h, o_t, 1)
        tl.store(out, a * cos - b * sin, mask=there)
        tl.store(out + F, b * cos + a * sin, mask=there)


@triton.jit
def rotate_backward_kernel(
    gq_ptr, gk_ptr, gv_ptr, qkv_ptr, f_ptr, start_ptr, out_ptr, inside_ptr, totals_ptr, H, T,
    q_b, q_h, q_t, q_d, k_b, k_h, k_t, k_d, v_b, v_h, v_t, v_d, u_3, u_b, u_h, u_t, u_d, f_b, f_h, f_t, s_b, s_h, s_n, s_f,
    o_3, o_b, o_h, o_t, INCLUSIVE: tl.constexpr, NEEDS_F: tl.constexpr,
    F: tl.constexpr, BITS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    """One block's gradients to q and k, turned back; v's, copied; and of f's what comes from inside the block."""
    row, block, i_F = tl.program_id(0), tl.program_id(1), tl.arange(0, BLOCK_F)
    f_T, t_T = _load_f(f_ptr, row, block, H, T, f_b, f_h, f_t, BLOCK_T)
    cos, sin = _cos_sin(f_T, i_F, start_ptr, row, block, H, s_b, s_h, s_n, s_f, INCLUSIVE, F, BITS, BLOCK_T, BLOCK_F)
    there = (i_F < F)[:, None] & (t_T < T)[None, :]
    phase_FT = tl.zeros((BLOCK_F, BLOCK_T), tl.float32)  # the loss differentiated by the phases
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
            phase_FT += a * gb - b * ga
    x, y = _load_pair(_at(gv_ptr, row, H, t_T, i_F, v_b, v_h, v_t, v_d), F * v_d, there)
    out = _at(out_ptr + 2 * o_3, row, H, t_T, i_F, o_b, o_h, o_t, 1)
    tl.store(out, x, mask=there)
    tl.store(out + F, y, mask=there)
    if NEEDS_F:
        total_F = tl.sum(phase_FT, axis=1)
        later_FT = total_F[:, None] - tl.cumsum(phase_FT, axis=1)  # tokens after t in this block
        if INCLUSIVE:
            later_FT += phase_FT
        inside_T = tl.sum(later_FT * _slopes(f_T, i_F, BITS, BLOCK_T, BLOCK_F), axis=0)
        tl.store(inside_ptr + row.to(tl.int64) * T + t_T, inside_T, mask=t_T < T)
        tl.store(totals_ptr + (row.to(tl.int64) * tl.num_programs(1) + block) * F + i_F, total_F, mask=i_F < F)


@triton.jit
def _slopes(f_T, i_F, BITS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_F: tl.constexpr):
    """f^i differentiated by f, i·f^(i−1): without a division, so that f may be as small as it likes."""
    below_F = tl.where(i_F > 0, i_F - 1, 0)
    return i_F.to(tl.float32)[:, None] * _powers(f_T, below_F, tl.float32, BITS, BLOCK_T, BLOCK_F)


@triton.jit
def finish_gradient_kernel(
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
    grad_T += tl.sum(later_F[:, None] * _slopes(f_T, i_F, BITS, BLOCK_T, BLOCK_F), axis=0)
    tl.store(out_ptr + here_T, grad_T, mask=t_T < T)
