"""Causal attention: torch's, except where blocks of plain matmuls are faster.

Torch's flash attention for CPUs takes, in bf16, two to four times as long as its matmuls would. Here a block of queries at a
time meets the keys it may see, so a good part of the half above the diagonal is never computed. The probabilities are kept for
the backward pass, in the type of the matmul, which is why this is for short sequences. LOG.md has the measurements behind PAYS.

Shapes: N batch times heads, T positions, S keys, D head width, t queries of a block, s keys they may see.
"""

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import SDPBackend

BLOCK = 128  # queries at a time
PAYS = {torch.bfloat16: range(64, 769), torch.float32: range(256, 513)}  # lengths at which this is faster than torch's own


def attention(q_BHTD: Tensor, k_BHSD: Tensor, v_BHSD: Tensor, mask: Tensor | None) -> Tensor:
    """softmax(q kᵀ/√D + mask) v, (B, H, T, D); without a mask causal, where T > 1 (then T = S)."""
    if mask is None and q_BHTD.shape == k_BHSD.shape and _blocks_pay(q_BHTD):
        return _BlockedAttention.apply(q_BHTD, k_BHSD, v_BHSD)
    causal = mask is None and q_BHTD.size(2) > 1
    return functional.scaled_dot_product_attention(q_BHTD, k_BHSD, v_BHSD, attn_mask=mask, is_causal=causal)


def _blocks_pay(q_BHTD: Tensor) -> bool:
    on_cpu = q_BHTD.device.type == "cpu" and not torch.compiler.is_compiling()
    return on_cpu and q_BHTD.size(2) in PAYS.get(q_BHTD.dtype, ())


def chosen(q_BHTD: Tensor) -> str:
    """What `attention` runs for queries, keys and values like `q_BHTD` without a mask: "blocked", or torch's back-end."""
    if _blocks_pay(q_BHTD):
        return "blocked"
    return SDPBackend(torch._fused_sdp_choice(q_BHTD, q_BHTD, q_BHTD, is_causal=True)).name.lower()


def _probabilities(q_NtD: Tensor, k_NsD: Tensor) -> Tensor:
    """Attention of the last t of s positions to all s, (N, t, s) fp32."""
    t, scale, k_NDs = q_NtD.size(1), 1 / math.sqrt(q_NtD.size(2)), k_NsD.transpose(1, 2)
    scores_Nts = torch.baddbmm(q_NtD.new_empty(1), q_NtD, k_NDs, beta=0, alpha=scale)
    if q_NtD.dtype != torch.float32:
        # A CPU's bf16 matmul gives bf16, too coarse for a logit. The same again, less what it gave, is what rounding left out.
        rest_Nts = torch.baddbmm(scores_Nts, q_NtD, k_NDs, beta=-1, alpha=scale)
        scores_Nts = scores_Nts.float().add_(rest_Nts)
    scores_Nts[..., -t:] += scores_Nts.new_full((t, t), -math.inf).triu(1)
    return scores_Nts.softmax(-1)


class _BlockedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *qkv_BHTD: Tensor) -> Tensor:
        q_NTD, k_NTD, v_NTD = (u.flatten(0, 1).contiguous() for u in qkv_BHTD)
        y_NTD, kept = torch.empty_like(q_NTD), []
        for i in range(0, q_NTD.size(1), BLOCK):
            block, seen = slice(i, i + BLOCK), slice(i + BLOCK)
            p_Nts = _probabilities(q_NTD[:, block], k_NTD[:, seen]).to(q_NTD.dtype)
            y_NTD[:, block] = torch.bmm(p_Nts, v_NTD[:, seen])
            kept.append(p_Nts)
        ctx.save_for_backward(q_NTD, k_NTD, v_NTD, y_NTD, *kept)
        return y_NTD.view_as(qkv_BHTD[0])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy_BHTD: Tensor) -> tuple[Tensor, ...]:
        q_NTD, k_NTD, v_NTD, y_NTD, *kept = ctx.saved_tensors
        dy_NTD, scale, dtype = dy_BHTD.flatten(0, 1), 1 / math.sqrt(q_NTD.size(2)), q_NTD.dtype
        inner_NT1 = (dy_NTD.float() * y_NTD.float()).sum(-1, keepdim=True)
        dq_NTD, dk_NTD, dv_NTD = torch.empty_like(q_NTD), *(torch.zeros(q_NTD.shape) for _ in range(2))
        for i, p_Nts in enumerate(kept):
            block, seen = slice(i * BLOCK, (i + 1) * BLOCK), slice((i + 1) * BLOCK)
            dp_Nts = torch.bmm(dy_NTD[:, block], v_NTD[:, seen].transpose(1, 2)).float()
            dz_Nts = dp_Nts.sub_(inner_NT1[:, block]).mul_(p_Nts).to(dtype)
            dq_NTD[:, block] = torch.bmm(dz_Nts, k_NTD[:, seen]).mul_(scale)
            dk_NTD[:, seen] += torch.bmm(dz_Nts.transpose(1, 2), q_NTD[:, block])
            dv_NTD[:, seen] += torch.bmm(p_Nts.transpose(1, 2), dy_NTD[:, block])
        grads = dq_NTD, dk_NTD.mul_(scale).to(dtype), dv_NTD.to(dtype)
        return tuple(grad.view_as(dy_BHTD) for grad in grads)
