"""PaTH: what lies between two tokens reflects the key on its way to the query.

Shapes: B batch, T positions, S cached and new positions, C width, H heads, D head width, R rank of w's projection.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from positional.base import Option, OwnWeights, register
from positional.weighted import causal_softmax

FILTER = 3  # of the convolution over tokens


@register("path")
class PaTH(OwnWeights):
    """PaTH attention (Yang et al., 2505.16381): accumulated Householder-like transformations.

    The logit of query i and key j is k_jᵀ H_{j+1} … H_i q_i / √D with H_s = I − β_s w_s w_sᵀ. From h, the block's ln_1 output:
    β = 2 σ(h W_β + b) per head; w is a projection of h of rank path_rank, then a causal depthwise convolution of 3
    tokens, then scaled to length 1 per head. The UT transform gives all logits (without 1/√D) at once, as the paper has it:
    A = Q Kᵀ − lower(Q Wᵀ) (I + diag(β) strict(W Wᵀ))⁻¹ diag(β) strict(W Kᵀ); `strict` is `lower` without the diagonal.

    With `path_silu` the convolution ends in a SiLU, as in the authors' library; the paper's text does not mention it. The
    forget gate of PaTH-FoX is left out. Coordinates are w, β, and the convolution's inputs of the token before and of this one,
    (B, H, S, 3D + 1), so that decoding continues from the last of them.
    """

    options = (
        Option("path_rank", 32, "rank of the projection to w, channels", gt=0, le=65536),
        Option("path_silu", True, "SiLU after the convolution, as the authors' library has it", before=False),
    )
    per_layer = hidden = True
    beyond = "no table ends: the product runs over all tokens between key and query, however many, and never grows a vector"

    def __init__(self, cfg: Any) -> None:
        super().__init__(cfg)
        self.n_head, self.silu = cfg.n_head, cfg.path_silu
        self.down = nn.Linear(cfg.n_embd, cfg.path_rank, bias=False)
        self.up = nn.Linear(cfg.path_rank, cfg.n_embd, bias=False)
        self.filter = nn.Parameter(torch.empty(cfg.n_embd, FILTER))  # the last one is the token's own
        self.beta = nn.Linear(cfg.n_embd, cfg.n_head)

    def init_weights(self) -> None:
        for linear in (self.down, self.up, self.beta):
            nn.init.normal_(linear.weight, std=0.02)
        nn.init.zeros_(self.beta.bias)
        nn.init.uniform_(self.filter, -1 / math.sqrt(FILTER), 1 / math.sqrt(FILTER))  # torch's own for a convolution

    def coords(self, x_BTC: Tensor, pos_T: Tensor, last: Tensor | None = None) -> Tensor:
        """w of length 1, β in (0, 2) and the convolution's inputs of two tokens, (B, H, T, 3D + 1) fp32."""
        B, T, C = x_BTC.shape
        D = C // self.n_head
        with torch.autocast(x_BTC.device.type, enabled=False):
            x_BTC = x_BTC.float()
            u_BTC = functional.linear(functional.linear(x_BTC, self.down.weight), self.up.weight)
            u_BHTD = u_BTC.view(B, T, self.n_head, D).transpose(1, 2)
            before = u_BHTD.new_zeros(B, self.n_head, FILTER - 1, D)  # of the first token: nothing
            if last is not None and last.size(-1) > 1:
                before = torch.stack(last[:, :, 0, D + 1 :].float().chunk(FILTER - 1, dim=-1), dim=2)
            inputs_BHTD = torch.cat((before, u_BHTD), dim=2)
            w_BHTD = self._convolved(inputs_BHTD, T)
            beta_BHT1 = 2 * functional.linear(x_BTC, self.beta.weight, self.beta.bias).sigmoid().mT[..., None]
            return torch.cat((w_BHTD, beta_BHT1, inputs_BHTD[:, :, 1:-1], inputs_BHTD[:, :, 2:]), dim=-1)

    def _convolved(self, inputs_BHTD: Tensor, T: int) -> Tensor:
        taps = self.filter.float().view(self.n_head, 1, -1, FILTER).unbind(-1)
        w_BHTD = sum((tap * inputs_BHTD[:, :, i : i + T] for i, tap in enumerate(taps)), start=inputs_BHTD.new_zeros(()))
        return functional.normalize(functional.silu(w_BHTD) if self.silu else w_BHTD, dim=-1, eps=1e-6)

    def weights(
        self, q_BHTD: Tensor, k_BHSD: Tensor, coords_q: Tensor | None, coords_k: Tensor | None, visible_TS: Tensor
    ) -> Tensor:
        assert coords_k is not None
        D = q_BHTD.size(-1)
        w_BHSD, beta_BHS = coords_k[..., :D], coords_k[..., D]
        with torch.autocast(q_BHTD.device.type, enabled=False):
            logits_BHTS = transformed_logits(q_BHTD.float(), k_BHSD.float(), w_BHSD, beta_BHS, visible_TS)
            return causal_softmax(logits_BHTS / math.sqrt(D), visible_TS)


def transformed_logits(q_BHTD: Tensor, k_BHSD: Tensor, w_BHSD: Tensor, beta_BHS: Tensor, visible_TS: Tensor) -> Tensor:
    """k_jᵀ (Π_{s=j+1..i} (I − β_s w_s w_sᵀ)) q_i for the last T of S tokens, (B, H, T, S); only what is visible is meant.

    One triangular solve for T rows: a token decoded with a cache costs O(S² D), not O(S³).
    """
    reached_BHTS = (q_BHTD @ w_BHSD.mT).masked_fill(~visible_TS, 0)  # lower(Q Wᵀ)
    strict_BHSS = (beta_BHS[..., None] * (w_BHSD @ w_BHSD.mT)).tril(-1)
    # The diagonal of ones is not read but implied
    solved_BHTS = torch.linalg.solve_triangular(strict_BHSS, reached_BHTS, upper=False, left=False, unitriangular=True)
    return q_BHTD @ k_BHSD.mT - (solved_BHTS * beta_BHS[..., None, :]) @ (w_BHSD @ k_BHSD.mT).tril(-1)
