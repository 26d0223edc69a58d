"""Positional encodings for GPT-2, one small class each in a file per family, and the registry ENCODINGS.

An encoding may act on the embeddings (`embed`), on queries and keys (`rotate`), on the attention logits (KeyBias, DistanceBias,
PairBias), or make the attention weights itself (OwnWeights). All but the first read coordinates (`coords`): where each token
stands, as this encoding measures it, always in fp32 or better and outside autocast, since bf16 positions alias beyond 256.

To add one: write a class, add it to ENCODINGS; every test that runs on all encodings then runs on it.
"""

from positional.additive import Learned, SeqPE, Sinusoidal
from positional.base import DistanceBias, KeyBias, NoPE, OwnWeights, PairBias, PositionalEncoding, Positions
from positional.bias import FIRE, KERPLE, T5, ALiBi
from positional.carope import (
    CARoPE,
    CARoPEFrozen,
    CARoPEHidden,
    CARoPEHiddenShared,
    CARoPENoBias,
    CARoPEPerLayer,
    CARoPEScalar,
)
from positional.comrope import ComRoPE
from positional.context import CABLE, FoX
from positional.path import PaTH
from positional.rotary import PartialRoPE, RoPE, RoPEbf16Positions, XPos
from positional.weighted import URPE, CoPE

__all__ = [
    "ENCODINGS",
    "CARoPE",
    "DistanceBias",
    "KeyBias",
    "OwnWeights",
    "PairBias",
    "PositionalEncoding",
    "Positions",
    "RoPE",
]

ENCODINGS: dict[str, type[PositionalEncoding]] = {
    "nope": NoPE,
    "learned": Learned,
    "sinusoidal": Sinusoidal,
    "seqpe": SeqPE,
    "rope": RoPE,
    "rope_bf16pos": RoPEbf16Positions,
    "partial_rope": PartialRoPE,
    "xpos": XPos,
    "comrope": ComRoPE,
    "carope": CARoPE,
    "carope_hidden": CARoPEHidden,
    "carope_hidden_shared": CARoPEHiddenShared,
    "carope_per_layer": CARoPEPerLayer,
    "carope_nobias": CARoPENoBias,
    "carope_scalar": CARoPEScalar,
    "carope_frozen": CARoPEFrozen,
    "alibi": ALiBi,
    "t5": T5,
    "kerple": KERPLE,
    "fire": FIRE,
    "cable": CABLE,
    "fox": FoX,
    "cope": CoPE,
    "urpe": URPE,
    "path": PaTH,
}
