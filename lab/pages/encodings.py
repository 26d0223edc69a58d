"""docs/encodings.md: a row for every encoding of the registry, from what its class says of itself; README.md: the families."""

import inspect
import re
from typing import Any

from core.config import load_config
from core.files import ROOT
from core.tables import table
from positional import ENCODINGS


def parameters(name: str, cfg: Any) -> int:
    """Parameters that the encoding adds to the model of `cfg`."""
    one = ENCODINGS[name](cfg)
    return sum(p.numel() for p in one.parameters()) * (cfg.n_layer if one.per_layer else 1)


def summary(name: str) -> str:
    """What the docstring's first sentence says before sources and equations, and the first source it names."""
    text = " ".join(inspect.cleandoc(ENCODINGS[name].__doc__ or "").split())
    source = re.search(r"\b\d{4}\.\d{5}\b", text)
    what = re.split(r" \(|[:;.] |\.$", text)[0]
    return what + (f" ([{source[0]}](https://arxiv.org/abs/{source[0]}))" if source else "")


def render() -> str:
    """The table: name, what it is, what it changes, parameters of GPT-Tiny's, behavior past the training length."""
    tiny = str(ROOT / "config/tiny.toml")
    rows = []
    for name, cls in ENCODINGS.items():
        n_params = parameters(name, load_config([tiny, f"--encoding={name}"]))
        rows.append([f"`{name}`", summary(name), cls.changes, f"{n_params:,}", cls.beyond])
    return table(["encoding", "what it is", "changes", "parameters, GPT-Tiny", "past the training length"], rows)


def families() -> str:
    """A row per family with the names of its encodings."""
    names: dict[str, list[str]] = {}
    for name, cls in ENCODINGS.items():
        names.setdefault(cls.family, []).append(f"`{name}`")
    return table(["family", "names"], [[title, " ".join(mine)] for title, mine in names.items()])
