"""Causal attention under a positional encoding: whatever it adds to the logits, in the cheapest way that there is.

Shapes: B batch, T new positions, S cached and new positions, H heads, D head width.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from core.attention import attention, blocks_pay
from positional import PositionalEncoding

BLOCK_ELEMENTS = 2**19  # of a bias, per head: 512 queries at 1024 keys, 64 at 8192
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]  # queries (B, H, T, D), keys and values (B, H, S, D) → (B, H, T, D)


def overrides(encoding: PositionalEncoding, *methods: str) -> bool:
    """Whether `encoding` has any of the methods other than the interface's own."""
    return any(getattr(type(encoding), method) is not getattr(PositionalEncoding, method) for method in methods)


def reads_keys_coords(encoding: PositionalEncoding) -> bool:
    """Whether attention needs the coordinates of all keys, and not those of the new tokens only."""
    return overrides(encoding, "key_bias", "bias", "weights")


def attention_of(encoding: PositionalEncoding, coords_q: Any, coords_k: Any, S: int) -> Attend:
    """How queries at `coords_q`, the last of S tokens, attend to keys at `coords_k`."""
    if overrides(encoding, "weights"):
        return partial(_by_weights, encoding, coords_q, coords_k)
    if overrides(encoding, "bias"):
        return partial(_by_bias, encoding, coords_q, coords_k)
    if overrides(encoding, "key_bias"):
        return partial(_by_key, _some(encoding.key_bias(coords_k)))
    if overrides(encoding, "distance_bias"):
        return partial(_by_distance, _some(encoding.distance_bias(S)))
    return attend


def attend(q_BHTD: Tensor, k_BHSD: Tensor, v_BHSD: Tensor, bias: Tensor | None = None) -> Tensor:
    """Causal attention of T queries at the end of S keys, (B, H, T, D)."""
    return attention(q_BHTD, k_BHSD, v_BHSD, causal_mask(q_BHTD.size(2), k_BHSD.size(2), bias, q_BHTD))


def causal_mask(T: int, S: int, bias: Tensor | None, q: Tensor) -> Tensor | None:
    """The additive or boolean mask of T queries at the end of S keys; None where `is_causal` or nothing says it all."""
    if bias is None and (T in (1, S)):
        return None
    visible_TS = visible(T, S, q.device)
    return visible_TS if bias is None else bias.to(q.dtype).masked_fill(~visible_TS, -math.inf)


def visible(T: int, S: int, device: torch.device) -> Tensor:
    """Which of S keys the last T tokens may see, (T, S)."""
    return torch.ones(T, S, dtype=torch.bool, device=device).tril(S - T)


def _by_key(c_BHS: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    T, S = q.size(2), k.size(2)
    if T == S > 1 and (q.dtype == torch.bfloat16 or blocks_pay(q)):
        return attention(q, k, v, None, c_BHS)
    # The difference itself: of a long text c is so large that fp32 logits with c_j alone on top would lose digits
    c_BHT = c_BHS[..., S - T :]
    return _in_blocks(lambda t, s: c_BHS[..., None, s] - c_BHT[..., t, None], q, k, v)


def _by_distance(table_HS: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    T, S = q.size(2), k.size(2)
    pos_S = torch.arange(S, device=q.device)
    return _in_blocks(lambda t, s: table_HS[:, (pos_S[S - T :][t, None] - pos_S[s]).clamp(min=0)][None], q, k, v)


def _by_bias(encoding: PositionalEncoding, coords_q: Tensor, coords_k: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return _in_blocks(lambda t, s: _some(encoding.bias(coords_q[..., t, :], coords_k[..., s, :])), q, k, v)


def _in_blocks(bias: Callable[[slice, slice], Tensor], q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention of a block of queries at a time to the keys that it may see, under the `bias` of slices of both.

    A block's bias lives as long as the block; where there is a backward pass, it makes it once more.
    """
    T, S = q.size(2), k.size(2)
    n = max(64, BLOCK_ELEMENTS // S)
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


def _by_weights(
    encoding: PositionalEncoding, coords_q: Tensor | None, coords_k: Tensor | None, q: Tensor, k: Tensor, v: Tensor
) -> Tensor:
    weights_BHTS = _some(encoding.weights(q, k, coords_q, coords_k, visible(q.size(2), k.size(2), q.device)))
    return weights_BHTS.to(v.dtype) @ v


def _some(given: Tensor | None) -> Tensor:
    assert given is not None  # whoever overrides the method returns something
    return given
