"""f, the angle by which a token turns pair 1, as a forward pass reads it: to note it, or to put something else in its place.

A site is a call of an encoding's `frequency` within one forward pass: one for all layers (`carope`), or one per layer.
Everything here is on what encodings really see: embeddings, hidden states, one set of weights or one per layer.

Shapes: B windows, T positions, H heads, L sites.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from core.checkpoint import State
from core.data import TokenStream
from core.errors import UserError
from model import GPT
from positional import RoPE

Change = Callable[[int, Tensor], Tensor]  # number of the site, its f (B or 1, H, T) → f in its place


def varies(model: GPT) -> tuple[bool, bool]:
    """Whether f depends on tokens, and whether on tokens or heads; (False, False) for encodings without f."""
    probe_BTC = torch.zeros(2, 3, model.cfg.n_embd, device=model.wte.weight.device)
    sizes = [one.frequency(probe_BTC).shape[:2] for one in rotary(model)]
    tokens, heads = any(b > 1 for b, _ in sizes), any(h > 1 for _, h in sizes)
    return tokens, tokens or heads


def rope_theta(model: GPT) -> float:
    """θ_1 of RoPE with the base and the head width of `model`: what f would be there."""
    return model.cfg.rope_base ** (-1 / rotary(model)[0].n_pairs)


def rotary(model: GPT) -> list[RoPE]:
    """The encodings, of RoPE's family."""
    return [one for one in model.encodings if isinstance(one, RoPE)]


def layers(model: GPT) -> list[int | None]:
    """The layer of each site; [None] where one f serves all layers."""
    own = any(type(encoding).per_layer or type(encoding).hidden for encoding in model.encodings)
    return list(range(model.cfg.n_layer)) if own else [None]


@contextmanager
def replaced(model: GPT, change: Change) -> Iterator[None]:
    """Within, the encodings of `model`, of RoPE's family, turn by `change` of their f, in eager mode."""
    site = [0]

    def changed(own: Callable[[Tensor], Any]) -> Callable[[Tensor], Tensor]:
        def frequency(x_BTC: Tensor) -> Tensor:
            site[0] += 1
            return change(site[0] - 1, own(x_BTC))

        return frequency

    hook = model.register_forward_pre_hook(lambda *_: site.__setitem__(0, 0))
    encodings = rotary(model)
    kernels = [encoding.kernel for encoding in encodings]
    for encoding in encodings:
        encoding.frequency, encoding.kernel = changed(encoding.frequency), None  # type: ignore[assignment, method-assign]
    try:
        yield
    finally:
        hook.remove()
        for encoding, kernel in zip(encodings, kernels, strict=True):
            del encoding.frequency  # the class's again
            encoding.kernel = kernel


def collect(model: GPT, idx_BT: Tensor) -> Tensor:
    """f of every token in one forward pass, (L, B, H, T) float32."""
    seen: list[Tensor] = []

    def note(_: int, f_BHT: Tensor) -> Tensor:
        seen.append(f_BHT.float().expand(idx_BT.size(0), model.cfg.n_head, -1))
        return f_BHT

    with replaced(model, note), torch.no_grad():
        model(idx_BT, last_only=True)
    return torch.stack(seen)


def validation(model: GPT, state: State, path: str, data: str | None) -> TokenStream:
    """The validation set of a run, or that of the folder `data`; UserError where another tokenizer made it."""
    stream = TokenStream(data or model.cfg.data, "val", model.cfg.vocab_size)
    if stream.tokenizer != state.tokenizer:
        raise UserError(f"{stream.folder}: tokenized by {stream.tokenizer!r}, but {path} was trained on {state.tokenizer!r}")
    return stream
