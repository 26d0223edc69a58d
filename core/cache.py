"""The cache that makes the next token of a text cost one position instead of all.

Shapes: B batch, T new positions, S cached and new positions, C width, H heads, D head width.
"""

from typing import Any

import torch
from torch import Tensor

from core.attention import Attend, of_any_length
from core.numerics import widest


class KVCache:
    """Keys, values and coordinates of the tokens seen so far, so that the next one costs one position.

    `GPT.forward` fills it; `len(cache)` is the number of positions held. On a CPU keys and values are held in float32 whatever
    autocast says: there, attention of one query over many bf16 keys takes torch several times as long.
    """

    def __init__(self) -> None:
        self.length = 0
        self.kv: dict[int, tuple[Tensor, Tensor]] = {}  # layer → (B, H, capacity, D) twice
        self.coords: dict[int, Tensor] = {}  # layer, or -1 for all → coordinates (…, S or 1, n)

    def __len__(self) -> int:
        return self.length

    def attend(self, layer: int, q_BHTD: Tensor, k_BHTD: Tensor, v_BHTD: Tensor, attend: Attend) -> Tensor:
        """Append this layer's new keys and values; returns what the new queries find in all of them, (B, H, T, D)."""
        k_BHSD, v_BHSD = self.extend(layer, k_BHTD, v_BHTD)
        # Autocast would make a bf16 copy of all that is held
        with torch.autocast(q_BHTD.device.type, enabled=False), of_any_length(q_BHTD):
            return attend(q_BHTD.to(k_BHSD.dtype), k_BHSD, v_BHSD).to(q_BHTD.dtype)

    def extend(self, layer: int, k_BHTD: Tensor, v_BHTD: Tensor) -> tuple[Tensor, Tensor]:
        """Append this layer's new keys and values; returns all of them, (B, H, S, D)."""
        end = self.length + k_BHTD.size(2)
        if layer not in self.kv:
            dtype = k_BHTD.dtype if k_BHTD.is_cuda else torch.promote_types(k_BHTD.dtype, torch.float32)
            self.kv[layer] = k_BHTD[:, :, :0].to(dtype), v_BHTD[:, :, :0].to(dtype)
        k, v = self.kv[layer]
        if end > k.size(2):  # grow by doubling: amortized, appending costs O(1)
            k, v = self.kv[layer] = self._grown(k, end), self._grown(v, end)
        k[:, :, self.length : end] = k_BHTD
        v[:, :, self.length : end] = v_BHTD
        return k[:, :, :end], v[:, :, :end]

    def _grown(self, held: Tensor, end: int) -> Tensor:
        B, H, _, D = held.shape
        buffer = held.new_empty(B, H, max(64, 1 << (end - 1).bit_length()), D)
        buffer[:, :, : self.length] = held[:, :, : self.length]
        return buffer

    def locate(self, layer: int, encoding: Any, x_BTC: Tensor, pos_T: Tensor) -> tuple[Any, Any]:
        """Coordinates of the new tokens, and of all tokens where `encoding` keeps them."""
        held = self.coords.get(layer)
        last = x_BTC.new_zeros((1, 1, 1, 1), dtype=widest(x_BTC.device)) if held is None else held[..., -1:, :]
        new = encoding.coords(x_BTC, pos_T, last)
        if new is None:
            return None, None
        every = torch.cat((held, new), dim=-2) if encoding.keeps_coords and held is not None else new
        self.coords[layer] = every if encoding.keeps_coords else new[..., -1:, :]
        return new, every
