"""What a positional encoding is to the model; as it stands, it is NoPE.

Shapes: B batch, T positions, S cached and new positions, C width, H heads, D = C/H head width, F = D/2 rotary pairs.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

NO_FLOAT64 = {"mps"}  # kinds of device


def widest(device: torch.device) -> torch.dtype:
    """float64, for phases and sums that keep fp32's digits at any length; float32 on Apple's GPUs, which have no more.

    There a position m is off by up to 6e-8 m radians, which at length 1024 is nothing to training.
    """
    return torch.float32 if device.type in NO_FLOAT64 else torch.float64


def eager_on_cpu(u: Tensor) -> bool:
    """Whether what is done to `u` now runs on a CPU as it is written, and is not being compiled."""
    return u.device.type == "cpu" and not torch.compiler.is_compiling()


def once(given: Any) -> Any:
    """`given`, whatever a frame is; tensors that all sequences share, of size 1 in the first dimension, are in memory.

    A compiler would compute it anew inside every kernel that reads it: RoPE's angles, in float64, for each channel of each
    token in each layer. Behind an operator that it does not know, it computes them once and every layer reads the table.
    """
    if type(given) is tuple:
        return tuple(map(once, given))
    is_shared = isinstance(given, Tensor) and given.dim() > 0 and given.size(0) == 1
    return in_memory(given) if is_shared and torch.compiler.is_compiling() else given


def operator(function: Callable[..., Any], changes: Sequence[str] = ()) -> Any:
    """`function` as an operator of torch's, carope::NAME, that a compiler does not look into; it writes to arguments `changes`.

    Another copy of this code in the process, as an export brings along, gets a name of its own, NAME_2 and so on: to define a
    name anew frees what the first copy still calls.
    """
    name, n = function.__name__, 1
    while hasattr(torch.ops.carope, name):
        n += 1
        name = f"{function.__name__}_{n}"
    return torch.library.custom_op(f"carope::{name}", function, mutates_args=changes)


@operator
def in_memory(x: Tensor) -> Tensor:
    """A copy of `x`."""
    return x.clone()


@in_memory.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


def _same_gradient(ctx: Any, grad: Tensor) -> Tensor:
    return grad


in_memory.register_autograd(_same_gradient)


def round_to_bf16(x: Tensor) -> Tensor:
    """fp32 `x` as bf16 holds it, in fp32, without a gradient.

    By its bits, for a compiler leaves `x.to(bfloat16).float()` out: torch's computes in fp32 whatever it does not store.
    """
    bits = x.detach().view(torch.int32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000).view(torch.float32)


class PositionalEncoding(nn.Module):
    """NoPE, no position at all but the causal mask (Kazemnejad et al., 2305.19466), and the interface of all encodings.

    `cfg` has n_embd, n_head, block_size and the encodings' own options (config.Config).
    """

    per_layer = False  # True: one instance per block
    hidden = False  # True: it sees each block's ln_1 output, False: the raw token embeddings
    max_len: int | None = None  # longest input it has positions for; None is unlimited
    beyond = "no position to run out of: what a token sees of the others is only that they come before it"  # training length
    kernel: Any = None  # does the work of `rotate` from `frequency`; the model sets it
    n_pairs = 0  # for it: pairs of channels of a head
    inclusive = True  # for it: whether a token's own f counts in its phase

    def __init__(self, cfg: Any) -> None:
        super().__init__()

    @classmethod
    def check(cls, cfg: Any) -> None:
        """Raise ValueError, one line, where `cfg` is impossible for this encoding."""

    def init_weights(self) -> None:
        """Set every parameter of its own."""

    def embed(self, x_BTC: Tensor, pos_T: Tensor) -> Tensor:
        """Token embeddings with positions added, (B, T, C)."""
        return x_BTC

    def coords(self, x_BTC: Tensor, pos_T: Tensor, last: Tensor | None = None) -> Tensor | None:
        """Where the tokens stand: (B or 1, H or 1, T, n), or None where nothing below needs it.

        `x_BTC` are the raw token embeddings (`hidden`: the block's ln_1 output). With a KV cache, `last` is the
        coordinate of the last cached token, (…, 1, n) in `widest` (zeros before the first), for running sums to go on.
        """
        return None

    def frame(self, coords: Any) -> Any:
        """What `rotate` reads, made from `coords` once and used by every layer that shares them."""
        return coords

    def rotate(self, u_BHTD: Tensor, frame: Any) -> Tensor:
        """Queries or keys turned to their position, same shape and type."""
        return u_BHTD

    def turn(self, q_BHTD: Tensor, k_BHTD: Tensor, frame: Any) -> tuple[Tensor, Tensor]:
        """Queries and keys at their positions; unless the two are treated differently, `rotate` for both."""
        return self.rotate(q_BHTD, frame), self.rotate(k_BHTD, frame)

    def frequency(self, x_BTC: Tensor) -> Tensor | None:
        """f, (B or 1, H or 1, T): `rotate` turns pair i by the running sum of f^i from the first token on. None: it does not.

        All a kernel needs to know in place of `coords`, `frame` and `rotate`; a class that changes these alone gets no kernel.
        """
        return None

    def key_bias(self, coords_k: Tensor) -> Tensor | None:
        """c, (B or 1, H, S) float32 or wider: the logit of query i and key j grows by c_j − c_i. None: it does not.

        A softmax does not see −c_i, so columns beside the keys do it all and no T × S bias is formed; c's gradient does see it.
        """
        return None

    def distance_bias(self, n: int) -> Tensor | None:
        """(H, n) float32: what the logit of a query and the key 0 … n−1 tokens before it grows by. None: it does not."""
        return None

    def bias(self, coords_q: Tensor, coords_k: Tensor) -> Tensor | None:
        """What the logits grow by, (B or 1, H, T, S), for a few queries at a time. None: they do not.

        For what neither `key_bias` nor `distance_bias` can say.
        """
        return None

    def weights(
        self, q_BHTD: Tensor, k_BHSD: Tensor, coords_q: Tensor | None, coords_k: Tensor | None, visible_TS: Tensor
    ) -> Tensor | None:
        """The attention weights themselves, (B, H, T, S), where no bias gives them; 0 where not `visible_TS`. None: softmax."""
        return None

    def health(self, coords: Tensor) -> dict[str, float]:
        """Figures for the log that tell whether the encoding is at work, from the coordinates of T tokens from the first on."""
        return {}

    def complaint(self, health: dict[str, float]) -> str | None:
        """In words, what is wrong after the warm-up with an encoding of this `health`; None where nothing is."""
        return None
