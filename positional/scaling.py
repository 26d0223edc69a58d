"""Longer texts than in training, without training: the phases of RoPE or CARoPE times a factor per pair of channels.

    python eval_ppl.py runs/small-rope --lengths 1024 2048 --rope_scaling yarn --scale 4

RoPE's pair i turns by m·θ_i at position m; with a factor, by m·θ_i·factor_i. CARoPE's turns by Σ f(x_t)^i, which the same
factor multiplies. θ_1, which YaRN asks for, is then that of CARoPE's start: what f has become since differs by token.

Shapes: F rotary pairs.
"""

import math

import torch
from torch import Tensor

from positional.base import PositionalEncoding
from positional.rotary import RoPE


class Scaling:
    """Position interpolation (Chen et al., 2306.15595, equation 4): factor 1 / s for all pairs; s times as many tokens fit."""

    dynamic = False  # True: the factors depend on the length of the window, so what is cached would have to be turned again
    magnitude = 1.0  # of the turned queries, and of the keys

    def __init__(self, scale: float, original: int) -> None:
        """`scale` is s ≥ 1, `original` the training length in tokens."""
        if not 1 <= scale < math.inf:
            raise ValueError(f"scale = {scale:g}: must be at least 1 and finite, evaluation length over training length")
        self.scale, self.original = scale, original

    def factors(self, theta: float, n_pairs: int, length: int) -> Tensor:
        """What multiplies the phases in a window of `length` tokens, (F,) float64; θ_i is `theta`^i."""
        return torch.full((n_pairs,), 1 / self.scale, dtype=torch.float64)


class NTK(Scaling):
    """NTK-aware scaling (bloc97; 2309.00071, section 3.1): the base grows by s^(D/(D−2)), factor s^(−i/(F−1)).

    From 1 for the fastest pair to 1 / s for the slowest. For CARoPE it is f itself that is multiplied, by s^(−1/(F−1)).
    """

    def factors(self, theta: float, n_pairs: int, length: int) -> Tensor:
        return self.ladder(self.scale, n_pairs)

    @staticmethod
    def ladder(scale: float, n_pairs: int) -> Tensor:
        """scale^(−i/(F−1)) for i = 0 … F−1."""
        return scale ** (-torch.arange(n_pairs, dtype=torch.float64) / max(n_pairs - 1, 1))


class DynamicNTK(NTK):
    """NTK-aware scaling by s·l/L − (s − 1) in a window of l tokens, by 1 up to the training length L (emozilla).

    As transformers and the first implementations have it; 2309.00071, section 3.3, has l/L, which is s = 1.
    """

    dynamic = True

    def factors(self, theta: float, n_pairs: int, length: int) -> Tensor:
        return self.ladder(max(1.0, self.scale * length / self.original - (self.scale - 1)), n_pairs)


class YaRN(Scaling):
    """YaRN (Peng et al., 2309.00071, section 3.4): factor 1 for pairs of 32 and more turns over the training length, 1 / s for
    those of one and less, a ramp between them; queries and keys are multiplied by 0.1 ln s + 1 each, so logits by its square.

    The ramp is linear in i, between whole numbers, as in the authors' code and in transformers; in the paper's section 3.2 it
    is linear in the number of turns. Channels that do not turn (`partial_rope_kind` "first") keep their magnitude.
    """

    FAST, SLOW = 32, 1  # turns over the training length: the paper's β and α

    def __init__(self, scale: float, original: int) -> None:
        super().__init__(scale, original)
        self.magnitude = 0.1 * math.log(scale) + 1

    def factors(self, theta: float, n_pairs: int, length: int) -> Tensor:
        low = max(math.floor(self.pair_of(self.FAST, theta)), 0)
        high = min(math.ceil(self.pair_of(self.SLOW, theta)), 2 * n_pairs - 1)
        i_F = torch.arange(n_pairs, dtype=torch.float64)
        ramp_F = ((i_F - low) / max(high - low, 1e-3)).clamp(0, 1)
        return ramp_F / self.scale + (1 - ramp_F)

    def pair_of(self, turns: float, theta: float) -> float:
        """Which i, no whole number, turns so many times over the training length: L·θ_1^i = 2π·turns."""
        return math.log(self.original / (2 * math.pi * turns)) / -math.log(theta)


SCALINGS: dict[str, type[Scaling]] = {"linear": Scaling, "ntk": NTK, "dynamic": DynamicNTK, "yarn": YaRN}


def rescale(encodings: list[PositionalEncoding], name: str, scaling: Scaling | None) -> None:
    """Have all `encodings` of a model, called `name` in messages, turn by phases under `scaling`, or again by their own.

    Raises ValueError where they do not turn by phases. The kernel, which knows no factors, is off from here on.
    """
    for one in encodings:
        if not (isinstance(one, RoPE) and one.scalable):
            raise ValueError(
                f"rope_scaling: encoding {name!r} does not turn queries and keys by phases that could be scaled; RoPE, "
                "HoPE, partial_rope and CARoPE do"
            )
        one.scaling, one.kernel = scaling, None
