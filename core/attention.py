"""Causal attention, with whatever an encoding adds to the logits, in the cheapest way that there is.

Torch's flash attention for CPUs takes, in bf16, two to four times as long as its matmuls would. There a block of queries at a
time meets the keys it may see, so a good part of the half above the diagonal is never computed. The probabilities are kept for
the backward pass, in the type of the matmul, which is why this is for short sequences; results/LOG.md has the measurements
behind PAYS. A token's attention to the keys of a cache is decode.cpp's, where that can be had.

Shapes: B batch, T new positions, S cached and new positions, H heads, D head width, N batch times heads, t queries of a block,
s keys they may see. Values may be narrower than queries and keys, (…, V); then so is the result.
"""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from core.kernels.key_bias import with_gradient
from core.kernels.native import LANES, native
from core.numerics import eager_on_cpu, once, round_to_bf16

BIAS_ELEMENTS = 2**19  # of a block's bias, per head: 512 queries at 1024 keys, 64 at 8192
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]  # queries (B, H, T, D), keys and values (B, H, S, D) → (B, H, T, D)
BLOCK = 128  # queries at a time
PAYS = {torch.bfloat16: range(64, 769), torch.float32: range(256, 513)}  # lengths at which this is faster than torch's own


def attend(q_BHTD: Tensor, k_BHSD: Tensor, v_BHSD: Tensor, bias: Tensor | None = None) -> Tensor:
    """Causal attention of T queries at the end of S keys, (B, H, T, D)."""
    T, S, mask = q_BHTD.size(2), k_BHSD.size(2), None
    if bias is not None:
        mask = bias.to(q_BHTD.dtype).masked_fill(~visible(T, S, q_BHTD.device), -math.inf)
    elif T not in (1, S):
        mask = visible(T, S, q_BHTD.device)
    return attention(q_BHTD, k_BHSD, v_BHSD, mask)


def visible(T: int, S: int, device: torch.device) -> Tensor:
    """Which of S keys the last T tokens may see, (T, S)."""
    return torch.ones(T, S, dtype=torch.bool, device=device).tril(S - T)


def attend_by_key(q_BHTD: Tensor, k_BHSD: Tensor, v_BHSD: Tensor, c_BHS: Tensor) -> Tensor:
    """The same, where the logit of query i and key j grows by c_j − c_i, (B or 1, H, S) float32 or wider."""
    T, S = q_BHTD.size(2), k_BHSD.size(2)
    if T == S > 1 and (q_BHTD.dtype == torch.bfloat16 or blocks_pay(q_BHTD)):
        return attention(q_BHTD, k_BHSD, v_BHSD, None, c_BHS)
    # The difference itself: of a long text c is so large that fp32 logits with c_j alone on top would lose digits
    c_BHT = c_BHS[..., S - T :]
    return attend_by_bias(q_BHTD, k_BHSD, v_BHSD, lambda t, s: c_BHS[..., None, s] - c_BHT[..., t, None])


def attend_by_distance(q_BHTD: Tensor, k_BHSD: Tensor, v_BHSD: Tensor, table_HS: Tensor) -> Tensor:
    """The same, where the logit of query i and key j grows by the table's entry i − j."""
    T, S = q_BHTD.size(2), k_BHSD.size(2)
    pos_S = torch.arange(S, device=q_BHTD.device)

    def bias(t: slice, s: slice) -> Tensor:
        return table_HS[:, (pos_S[S - T :][t, None] - pos_S[s]).clamp(min=0)][None]

    return attend_by_bias(q_BHTD, k_BHSD, v_BHSD, bias)


def attend_by_bias(q: Tensor, k: Tensor, v: Tensor, bias: Callable[[slice, slice], Tensor]) -> Tensor:
    """The same under the `bias` of slices of queries and keys, a block of queries at a time to the keys that it may see.

    A block's bias lives as long as the block; where there is a backward pass, it makes it once more.
    """
    T, S = q.size(2), k.size(2)
    n = max(64, BIAS_ELEMENTS // S)
    parts = []
    for i in reversed(range(0, T, n)):  # the largest first: what it frees has room for the others
        t, s = slice(i, min(i + n, T)), slice(S - T + min(i + n, T))
        inputs = q[:, :, t], k[:, :, s], v[:, :, s]
        if n < T and torch.is_grad_enabled():
            block = checkpoint(partial(_block, bias, t, s), *inputs, use_reentrant=False, preserve_rng_state=False)
        else:
            block = _block(bias, t, s, *inputs)
        parts.append(block)
    return parts[0] if len(parts) == 1 else torch.cat(parts[::-1], dim=2)


def _block(bias: Callable[[slice, slice], Tensor], t: slice, s: slice, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return attend(q, k, v, bias(t, s))


def attention(q_BHTD: Tensor, k_BHSD: Tensor, v_BHSD: Tensor, mask: Tensor | None, c_BHS: Tensor | None = None) -> Tensor:
    """softmax(q kᵀ/√D + mask) v, (B, H, T, D); without a mask causal, where T > 1 (then T = S).

    `c_BHS`, without a mask and T = S, in bf16 or where `blocks_pay`: c_j − c_i comes on top of the logit of query i and key j.
    """
    if mask is None and c_BHS is None and _is_one_token(q_BHTD, k_BHSD, v_BHSD):
        return _of_one_token(q_BHTD, k_BHSD, v_BHSD)
    if mask is None and q_BHTD.shape == k_BHSD.shape and blocks_pay(q_BHTD):
        return _BlockedAttention.apply(q_BHTD, k_BHSD, v_BHSD, c_BHS)
    if c_BHS is not None:
        return _with_columns(q_BHTD, k_BHSD, v_BHSD, c_BHS)
    if narrower := q_BHTD.size(-1) - v_BHSD.size(-1):  # flash attention wants values as wide as the keys
        return attention(q_BHTD, k_BHSD, functional.pad(v_BHSD, (0, narrower)), mask)[..., :-narrower]
    causal = mask is None and q_BHTD.size(2) > 1
    with nullcontext() if mask is None else of_any_length(q_BHTD):  # blocks have a mask, and each a length of its own
        return functional.scaled_dot_product_attention(q_BHTD, k_BHSD, v_BHSD, attn_mask=mask, is_causal=causal)


def of_any_length(q_BHTD: Tensor) -> AbstractContextManager:
    """On a GPU, attention without cuDNN, torch's first choice on an H100: it compiles a plan for every length that it meets.

    For calls that seldom have the lengths of the one before: a text that grows by a token would take a thousand plans.
    """
    if not q_BHTD.is_cuda or torch.compiler.is_compiling():  # what is compiled keeps its lengths
        return nullcontext()
    return sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH])


def _is_one_token(q_BHTD: Tensor, k_BHSD: Tensor, v_BHSD: Tensor) -> bool:
    """Whether they are a query each and keys and values out of a cache, as decode.cpp wants them, and it can be had."""
    (_, H, T, D), stride = q_BHTD.shape, k_BHSD.stride(1)
    if T != 1 or D % LANES or D > 8 * LANES or torch.is_grad_enabled() or not eager_on_cpu(q_BHTD):
        return False
    lie_alike = k_BHSD.stride() == v_BHSD.stride() == (H * stride, stride, D, 1)
    are_fp32 = all(u.dtype == torch.float32 for u in (q_BHTD, k_BHSD, v_BHSD))
    return lie_alike and are_fp32 and native() is not None


def _of_one_token(q_BHTD: Tensor, k_BHSD: Tensor, v_BHSD: Tensor) -> Tensor:
    q, (B, H, S, D) = q_BHTD.contiguous(), k_BHSD.shape
    y, between = torch.empty_like(q), q.new_empty(B * H * S)
    pointers = (u.data_ptr() for u in (q, k_BHSD, v_BHSD, between, y))
    native().attend(*pointers, B * H, S, D, k_BHSD.stride(1), 1 / math.sqrt(D))
    return y


def _with_columns(q_BHTD: Tensor, k_BHSD: Tensor, v_BHSD: Tensor, c_BHS: Tensor) -> Tensor:
    """Torch's causal attention with c_j beside the keys and ones beside the queries: no T × S bias is ever formed.

    Flash attention wants values as wide as the keys, and widths that are multiples of 8. It would round c's gradient too much.
    """
    D, columns_k = q_BHTD.size(-1), once(key_columns(c_BHS, q_BHTD.size(-1)))
    n = columns_k.size(-1)
    pad = -(D + n) % 8
    columns_k = columns_k.expand(k_BHSD.size(0), -1, -1, -1)
    k = functional.pad(torch.cat((k_BHSD, columns_k), -1), (0, pad))
    q = functional.pad(functional.pad(q_BHTD, (0, n), value=1.0), (0, pad))
    v = functional.pad(v_BHSD, (0, n + pad))
    y_BHTD = functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=1 / math.sqrt(D))[..., :D]
    return with_gradient(y_BHTD, q_BHTD, k_BHSD, v_BHSD, c_BHS)


def key_columns(c_BHS: Tensor, D: int) -> Tensor:
    """Columns whose sum is c_j·√D, up to what all keys have in common, (B or 1, H, S, 3) bf16. No gradient.

    One bf16 column would be wrong by 2.6 at a running sum of 1000, more than most logits differ by; three hold all 24 bits of
    an fp32.
    """
    rest_BHS = ((c_BHS - c_BHS[..., -1:]) * math.sqrt(D)).float().detach()  # less the last one's: smaller numbers
    parts = []
    for _ in range(3):
        parts.append(rest_BHS.bfloat16())
        rest_BHS = rest_BHS - round_to_bf16(rest_BHS)
    return torch.stack(parts, dim=-1)


def blocks_pay(q_BHTD: Tensor) -> bool:
    """Whether blocks of plain matmuls are the fastest attention of as many keys as queries here."""
    return eager_on_cpu(q_BHTD) and q_BHTD.size(2) in PAYS.get(q_BHTD.dtype, ())


def _probabilities(q_NtD: Tensor, k_NsD: Tensor, c_Ns: Tensor | None) -> Tensor:
    """Attention of the last t of s positions to all s, (N, t, s) fp32."""
    t, scale, k_NDs = q_NtD.size(1), 1 / math.sqrt(q_NtD.size(2)), k_NsD.transpose(1, 2)
    scores_Nts = torch.baddbmm(q_NtD.new_empty(1), q_NtD, k_NDs, beta=0, alpha=scale)
    if q_NtD.dtype != torch.float32:
        # A CPU's bf16 matmul gives bf16, too coarse for a logit. The same again, less what it gave, is what rounding left out.
        rest_Nts = torch.baddbmm(scores_Nts, q_NtD, k_NDs, beta=-1, alpha=scale)
        scores_Nts = scores_Nts.float().add_(rest_Nts)
    if c_Ns is not None:  # less that of the last key: where a weight counts, the number is small
        scores_Nts += (c_Ns - c_Ns[:, -1:]).float()[:, None]
    scores_Nts[..., -t:] += scores_Nts.new_full((t, t), -math.inf).triu(1)
    return scores_Nts.softmax(-1)


class _BlockedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q_BHTD: Tensor, k_BHTD: Tensor, v_BHTD: Tensor, c_BHT: Tensor | None) -> Tensor:
        q_NTD, k_NTD, v_NTD = (u.flatten(0, 1).contiguous() for u in (q_BHTD, k_BHTD, v_BHTD))
        c_NT = None if c_BHT is None else c_BHT.expand(q_BHTD.shape[:3]).flatten(0, 1)
        ctx.c = None if c_BHT is None or not ctx.needs_input_grad[3] else (c_BHT.shape, c_BHT.dtype)
        y_NTD, kept = torch.empty_like(v_NTD), []
        for i in range(0, q_NTD.size(1), BLOCK):
            block, seen = slice(i, i + BLOCK), slice(i + BLOCK)
            p_Nts = _probabilities(q_NTD[:, block], k_NTD[:, seen], None if c_NT is None else c_NT[:, seen]).to(q_NTD.dtype)
            y_NTD[:, block] = torch.bmm(p_Nts, v_NTD[:, seen])
            kept.append(p_Nts)
        ctx.save_for_backward(q_NTD, k_NTD, v_NTD, y_NTD, *kept)
        return y_NTD.view_as(v_BHTD)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy_BHTD: Tensor) -> tuple[Tensor | None, ...]:
        q_NTD, k_NTD, v_NTD, y_NTD, *kept = ctx.saved_tensors
        dy_NTD, scale, dtype = dy_BHTD.flatten(0, 1), 1 / math.sqrt(q_NTD.size(2)), q_NTD.dtype
        inner_NT1 = (dy_NTD.float() * y_NTD.float()).sum(-1, keepdim=True)
        dq_NTD, dk_NTD, dv_NTD = torch.empty_like(q_NTD), torch.zeros(k_NTD.shape), torch.zeros(v_NTD.shape)
        dc_NT = torch.zeros(q_NTD.shape[:2])
        for i, p_Nts in enumerate(kept):
            block, seen = slice(i * BLOCK, (i + 1) * BLOCK), slice((i + 1) * BLOCK)
            dp_Nts = torch.bmm(dy_NTD[:, block], v_NTD[:, seen].transpose(1, 2)).float()
            dz_Nts = dp_Nts.sub_(inner_NT1[:, block]).mul_(p_Nts)
            if ctx.c:
                dc_NT[:, seen] += dz_Nts.sum(1)
                dc_NT[:, block] -= dz_Nts.sum(2)  # 0 but for rounding, which a running sum from the end would add up
            dz_Nts = dz_Nts.to(dtype)
            dq_NTD[:, block] = torch.bmm(dz_Nts, k_NTD[:, seen]).mul_(scale)
            dk_NTD[:, seen] += torch.bmm(dz_Nts.transpose(1, 2), q_NTD[:, block])
            dv_NTD[:, seen] += torch.bmm(p_Nts.transpose(1, 2), dy_NTD[:, block])
        grads = dq_NTD, dk_NTD.mul_(scale).to(dtype), dv_NTD.to(dtype)
        dc_BHT = dc_NT.view(dy_BHTD.shape[:3]).sum_to_size(ctx.c[0]).to(ctx.c[1]) if ctx.c else None
        return *(grad.view(*dy_BHTD.shape[:3], -1) for grad in grads), dc_BHT
