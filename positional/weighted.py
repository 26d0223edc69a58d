"""Encodings that make the attention weights themselves: their positions depend on queries and keys, or act after the softmax.

Eager, in float32: each keeps a few tensors of T × S per head.

Shapes: B batch, T positions, S cached and new positions, H heads, D head width, P integer positions of CoPE.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from positional.base import Option, OwnWeights, register


def logits_of(q_BHTD: Tensor, k_BHSD: Tensor) -> Tensor:
    """q_i·k_j / √D, (B, H, T, S) float32."""
    return q_BHTD.float() @ k_BHSD.float().mT / math.sqrt(q_BHTD.size(-1))


def causal_softmax(logits_BHTS: Tensor, visible_TS: Tensor) -> Tensor:
    """Softmax over what each query sees, 0 elsewhere."""
    return logits_BHTS.masked_fill(~visible_TS, -math.inf).softmax(-1)


@register("cope")
class CoPE(OwnWeights):
    """Contextual position encoding (Golovneva et al., 2405.18719, section 4): a position counts the keys that the query gates.

    g_ij = σ(q_i·k_j / √D), p_ij = Σ_{j≤s≤i} g_is clamped to P − 1 (P = cope_max), and the logit of query i and key j is
    (q_i·k_j + q_i·e[p_ij]) / √D, where q_i·e[p] is interpolated linearly between the integers around p.

    e, (P, D), belongs to one layer, is shared by its heads and starts at 0; the gates see the logits scaled by 1/√D (in the
    text's formula they are not). q_i·e[p] is divided by √D too, the default of the authors' code; with `cope_divide` false it
    is not, as in the listing of the paper's appendix.
    """

    options = (
        Option("cope_max", 64, "positions that are counted, of gated keys", ge=2, le=65536),
        Option("cope_divide", True, "divide what positions add to a logit by √D, as the authors' code does", before=False),
    )
    per_layer = True
    beyond = "counts gated keys, not tokens, up to cope_max - 1: a longer text only has more keys at the last position"

    def __init__(self, cfg: Any) -> None:
        super().__init__(cfg)
        self.e = nn.Parameter(torch.empty(cfg.cope_max, cfg.n_embd // cfg.n_head))
        self.scale = (cfg.n_embd // cfg.n_head) ** -0.5 if cfg.cope_divide else 1.0

    def init_weights(self) -> None:
        nn.init.zeros_(self.e)

    def weights(
        self, q_BHTD: Tensor, k_BHSD: Tensor, coords_q: Tensor | None, coords_k: Tensor | None, visible_TS: Tensor
    ) -> Tensor:
        with torch.autocast(q_BHTD.device.type, enabled=False):
            logits_BHTS = logits_of(q_BHTD, k_BHSD)
            gates_BHTS = logits_BHTS.sigmoid().masked_fill(~visible_TS, 0)
            # Sums from the query backwards: all up to i less all before j would lose the digits of the near ones
            p_BHTS = gates_BHTS.flip(-1).cumsum(-1).flip(-1).clamp(max=len(self.e) - 1)
            return causal_softmax(logits_BHTS + self._at(self.scale * q_BHTD.float() @ self.e.float().T, p_BHTS), visible_TS)

    def _at(self, at_BHTP: Tensor, p_BHTS: Tensor) -> Tensor:
        """What queries give the integer positions, interpolated at `p_BHTS`."""
        step_BHTP = functional.pad(at_BHTP.diff(dim=-1), (0, 1))  # nothing follows the last position
        floor_BHTS = p_BHTS.detach().floor()
        index_BHTS = floor_BHTS.long()
        return at_BHTP.gather(-1, index_BHTS) + (p_BHTS - floor_BHTS) * step_BHTP.gather(-1, index_BHTS)


@register("urpe")
class URPE(OwnWeights):
    """Universal relative positional encoding (Luo et al., 2205.13401, section 4): softmax(q_i·k_j / √D) ∘ C, C_ij = c_{i−j}.

    C is a learned Toeplitz matrix of each head, the same in all layers (as in the authors' code, where distances share entries,
    too), all ones at first; its rows need not add up to 1, so that even where all tokens are alike, attention can say where one
    stands. The paper applies C to the softmax of any relative encoding's logits; here those are NoPE's, so that C is the only
    position there is. Kept is C's difference from 1, so that weight decay pulls toward plain attention and not toward none.
    """

    beyond = "every distance of block_size or more has the factor of the longest distance trained, block_size - 1"

    def __init__(self, cfg: Any) -> None:
        super().__init__(cfg)
        self.c = nn.Parameter(torch.empty(cfg.n_head, cfg.block_size))  # less 1, by distance

    def init_weights(self) -> None:
        nn.init.zeros_(self.c)

    def weights(
        self, q_BHTD: Tensor, k_BHSD: Tensor, coords_q: Tensor | None, coords_k: Tensor | None, visible_TS: Tensor
    ) -> Tensor:
        with torch.autocast(q_BHTD.device.type, enabled=False):
            return causal_softmax(logits_of(q_BHTD, k_BHSD), visible_TS) * self.toeplitz(*visible_TS.shape)

    def toeplitz(self, T: int, S: int) -> Tensor:
        """C's rows of the last T of S tokens, (H, T, S); what lies above the diagonal is c_0."""
        # Each row is a window of one sequence of falling distances: gradients come back without a T × S scatter
        distance = torch.arange(S - 1, -T, -1, device=self.c.device).clamp(0, self.c.size(1) - 1)
        return 1 + self.c.float()[:, distance].unfold(-1, S, 1).flip(-2)
