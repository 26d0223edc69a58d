"""What a positional encoding is to the model, the ways in which one may act on attention, and the registry of all.

Shapes: B batch, T positions, S cached and new positions, C width, H heads, D = C/H head width.
"""

import operator
import re
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

from torch import Tensor, nn

from core.attention import attend, attend_by_bias, attend_by_distance, attend_by_key, visible
from core.cache import KVCache
from core.numerics import once

E = TypeVar("E", bound="type[PositionalEncoding]")

ENCODINGS: dict[str, "type[PositionalEncoding]"] = {}
NAME = re.compile(r"[a-z][a-z0-9_]*")  # of an encoding or an option


class Option(NamedTuple):
    """An option of an encoding, of the type of its default: `--help`, config files and their checks know it from here.

    Limits are those of pydantic's fields: ge is ≥, gt >, le ≤, lt <.
    """

    name: str
    default: bool | int | float | str
    help: str
    ge: float | None = None
    gt: float | None = None
    le: float | None = None
    lt: float | None = None
    multiple_of: int | None = None
    choices: tuple[str, ...] = ()
    before: Any = None  # what was computed before there was this option, where that is not the default

    def check(self) -> None:
        """Raise ValueError for a name that cannot be, a default of another type, or one beyond the option's own limits."""
        value: Any = self.default
        if not NAME.fullmatch(self.name):
            raise ValueError(f"option {self.name!r}: its name must have lower-case letters, digits and underscores only")
        if type(value) not in (bool, int, float, str):
            raise ValueError(f"option {self.name!r}: its default {value!r} must be a bool, an int, a float or a str")
        limits = {"ge": self.ge, "gt": self.gt, "le": self.le, "lt": self.lt}
        if isinstance(value, str):
            fits = value in (self.choices or (value,)) and {*limits.values(), self.multiple_of} == {None}
        else:
            fits = all(limit is None or getattr(operator, name)(value, limit) for name, limit in limits.items())
            fits = fits and not self.choices and not (self.multiple_of and value % self.multiple_of)
        if not fits:
            raise ValueError(f"option {self.name!r}: its default {value!r} is beyond its own limits")


def register(name: str) -> Callable[[E], E]:
    """Above a class, makes it the encoding `name`: of --encoding, of every table and of every test that runs on all.

    The options of its bases are added to its own. Raises ValueError for a name that is taken or is not of lower-case letters,
    digits and underscores, and for an option that cannot be, TypeError for what is no PositionalEncoding or no Option.
    """

    def add(cls: E) -> E:
        if not (isinstance(cls, type) and issubclass(cls, PositionalEncoding)):
            raise TypeError(f"{name!r}: {cls!r} is no subclass of PositionalEncoding")
        if not NAME.fullmatch(name):
            raise ValueError(f"{name!r}: the name of an encoding has lower-case letters, digits and underscores only")
        if name in ENCODINGS:
            there = ENCODINGS[name]
            raise ValueError(f"{name!r} is the name of {there.__module__}.{there.__name__} already; give this one another")
        every = [option for base in reversed(cls.__mro__) for option in vars(base).get("options", ())]
        if not all(isinstance(option, Option) for option in every):
            raise TypeError(f"{cls.__name__}.options: must be a tuple of Option; is a comma missing?")
        for option in every:
            option.check()
        cls.options = tuple({option.name: option for option in every}.values())
        ENCODINGS[name] = cls
        return cls

    return add


class Positions:
    """Where the tokens of one forward pass stand, as one encoding measures it. Layers that share the encoding share this.

    `coords` are those of the new tokens, `keys` those of all `n_keys` tokens that they may see, where the encoding keeps them.
    """

    def __init__(self, encoding: "PositionalEncoding", coords: Any, keys: Any, n_keys: int) -> None:
        self.encoding, self.coords, self.keys, self.n_keys = encoding, coords, keys, n_keys
        self.frame = once(encoding.frame(self))

    def turn(self, qkv_BTM: Tensor, n_head: int) -> tuple[Tensor, Tensor, Tensor]:
        """q and k turned to their positions, and v, each (B, H, T, D), from c_attn's output, M = 3C."""
        B, T, _ = qkv_BTM.shape
        # Split first: the backward pass then writes three gradients side by side and transposes none of them
        q, k, v = (u_BTC.view(B, T, n_head, -1).transpose(1, 2) for u_BTC in qkv_BTM.chunk(3, dim=-1))
        return *self.encoding.turn(q, k, self.frame), v

    def attend(self, q_BHTD: Tensor, k_BHSD: Tensor, v_BHSD: Tensor) -> Tensor:
        """What the queries find in all keys and values that they may see, (B, H, T, D)."""
        return self.encoding.attend(q_BHTD, k_BHSD, v_BHSD, self.frame)


class PositionalEncoding(nn.Module):
    """The interface of all encodings; as it stands, it adds no position.

    `cfg` has n_embd, n_head, block_size and the encoding's own options (core.config.Config).
    """

    options: tuple[Option, ...] = ()  # which it finds in `cfg` under their names; those of its bases are added
    per_layer = False  # True: one instance per block
    hidden = False  # True: it sees each block's ln_1 output, False: the raw token embeddings
    max_len: int | None = None  # longest input it has positions for; None is unlimited
    keeps_coords = False  # True: with a KV cache, the coordinates of all tokens are kept, and not those of the last one only
    family = "none, or added to embeddings"  # under which figures and tables show it
    changes = "nothing"  # of the model: "embeddings", "queries, keys", "logits" or "weights" of attention
    beyond = "not said"  # how it behaves past the training length

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

    def forward(self, x_BTC: Tensor, pos_T: Tensor, cache: KVCache | None = None, layer: int = -1) -> Positions:
        """Where the tokens at `pos_T` stand. `layer` is the encoding's place in the cache, -1 where all layers share it."""
        if cache is None:
            coords = self.coords(x_BTC, pos_T)
            return Positions(self, coords, coords, len(pos_T))
        return Positions(self, *cache.locate(layer, self, x_BTC, pos_T), len(cache) + len(pos_T))

    def coords(self, x_BTC: Tensor, pos_T: Tensor, last: Tensor | None = None) -> Tensor | None:
        """Where the tokens stand: (B or 1, H or 1, T, n), or None where nothing below needs it.

        `x_BTC` are the raw token embeddings (`hidden`: the block's ln_1 output). With a KV cache, `last` is the
        coordinate of the last cached token, (…, 1, n) in `widest` (zeros before the first), for running sums to go on.
        """
        return None

    def frame(self, at: Positions) -> Any:
        """What `turn` and `attend` read, made from `at` once and used by every layer that shares it."""
        return None

    def rotate(self, u_BHTD: Tensor, frame: Any) -> Tensor:
        """Queries or keys turned to their position, same shape and type."""
        return u_BHTD

    def turn(self, q_BHTD: Tensor, k_BHTD: Tensor, frame: Any) -> tuple[Tensor, Tensor]:
        """Queries and keys at their positions; unless the two are treated differently, `rotate` for both."""
        return self.rotate(q_BHTD, frame), self.rotate(k_BHTD, frame)

    def attend(self, q_BHTD: Tensor, k_BHSD: Tensor, v_BHSD: Tensor, frame: Any) -> Tensor:
        """What T queries at the end of S keys find in them, (B, H, T, D): the softmax of q·k / √D, causal."""
        return attend(q_BHTD, k_BHSD, v_BHSD)

    def health(self, coords: Tensor) -> dict[str, float]:
        """Figures for the log that tell whether the encoding is at work, from the coordinates of T tokens from the first on."""
        return {}

    def complaint(self, health: dict[str, float]) -> str | None:
        """In words, what is wrong after the warm-up with an encoding of this `health`; None where nothing is."""
        return None


@register("nope")
class NoPE(PositionalEncoding):
    """NoPE, no position at all but the causal mask (Kazemnejad et al., 2305.19466)."""

    beyond = "no position to run out of: what a token sees of the others is only that they come before it"


class KeyBias(PositionalEncoding):
    """The logit of query i and key j grows by c_j − c_i.

    A softmax does not see −c_i, so columns beside the keys do it all and no T × S bias is formed; c's gradient does see it.
    """

    family = "bias by content"
    changes = "logits"
    keeps_coords = True

    def key_bias(self, coords_k: Tensor) -> Tensor:
        """c, (B or 1, H, S) float32 or wider, from the coordinates of all keys."""
        raise NotImplementedError

    def frame(self, at: Positions) -> Tensor:
        return self.key_bias(at.keys)

    def attend(self, q_BHTD: Tensor, k_BHSD: Tensor, v_BHSD: Tensor, frame: Any) -> Tensor:
        return attend_by_key(q_BHTD, k_BHSD, v_BHSD, frame)


class DistanceBias(PositionalEncoding):
    """The logit of query i and key j grows by what a table says of i − j."""

    family = "bias by distance"
    changes = "logits"

    def distance_bias(self, n: int) -> Tensor:
        """(H, n) float32: what the logit of a query and the key 0 … n−1 tokens before it grows by."""
        raise NotImplementedError

    def frame(self, at: Positions) -> Tensor:
        return self.distance_bias(at.n_keys)

    def attend(self, q_BHTD: Tensor, k_BHSD: Tensor, v_BHSD: Tensor, frame: Any) -> Tensor:
        return attend_by_distance(q_BHTD, k_BHSD, v_BHSD, frame)


class PairBias(PositionalEncoding):
    """The logits grow by what the coordinates of query and key say: for what KeyBias and DistanceBias cannot."""

    family = "bias by distance"
    changes = "logits"
    keeps_coords = True

    def bias(self, coords_q: Tensor, coords_k: Tensor) -> Tensor:
        """(B or 1, H, T, S), for a few queries at a time."""
        raise NotImplementedError

    def frame(self, at: Positions) -> tuple[Tensor, Tensor]:
        return at.coords, at.keys

    def attend(self, q_BHTD: Tensor, k_BHSD: Tensor, v_BHSD: Tensor, frame: Any) -> Tensor:
        coords_q, coords_k = frame
        return attend_by_bias(q_BHTD, k_BHSD, v_BHSD, lambda t, s: self.bias(coords_q[..., t, :], coords_k[..., s, :]))


class OwnWeights(PositionalEncoding):
    """The attention weights themselves, where no bias gives them: a few tensors of T × S per head in memory."""

    family = "attention weights of their own"
    changes = "weights"
    keeps_coords = True

    def weights(
        self, q_BHTD: Tensor, k_BHSD: Tensor, coords_q: Tensor | None, coords_k: Tensor | None, visible_TS: Tensor
    ) -> Tensor:
        """(B, H, T, S), 0 where not `visible_TS`."""
        raise NotImplementedError

    def frame(self, at: Positions) -> tuple[Tensor | None, Tensor | None]:
        return at.coords, at.keys

    def attend(self, q_BHTD: Tensor, k_BHSD: Tensor, v_BHSD: Tensor, frame: Any) -> Tensor:
        coords_q, coords_k = frame
        visible_TS = visible(q_BHTD.size(2), k_BHSD.size(2), q_BHTD.device)
        return self.weights(q_BHTD, k_BHSD, coords_q, coords_k, visible_TS).to(v_BHSD.dtype) @ v_BHSD
