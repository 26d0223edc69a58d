"""Positional encodings for GPT-2: one class each, in a file per family, and the registry ENCODINGS.

An encoding may act on the embeddings (`embed`), on queries and keys (`rotate`), on the attention logits (KeyBias, DistanceBias,
PairBias), or make the attention weights itself (OwnWeights). All but the first read coordinates (`coords`): where each token
stands, as this encoding measures it, always in fp32 or better and outside autocast, since bf16 positions alias beyond 256.

To add one: write a class under @register("NAME"), into a file here or anywhere (`--plugin FILE.py`); see docs/new-encoding.md.
"""

import importlib
import pkgutil

from positional.base import (
    ENCODINGS,
    DistanceBias,
    KeyBias,
    NoPE,
    Option,
    OwnWeights,
    PairBias,
    PositionalEncoding,
    Positions,
    register,
)
from positional.rotary import RoPE

__all__ = [
    "ENCODINGS",
    "DistanceBias",
    "KeyBias",
    "NoPE",
    "Option",
    "OwnWeights",
    "PairBias",
    "PositionalEncoding",
    "Positions",
    "RoPE",
    "register",
]

for _file in pkgutil.iter_modules(__path__):  # last: what they import from here is here by now
    importlib.import_module(f"{__name__}.{_file.name}")
