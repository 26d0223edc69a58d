"""GPT-2: embeddings, blocks, loss, generation. It names no positional encoding and knows no device.

Shapes: B batch, T new positions, S cached and new positions, C width, H heads, D head width, V vocabulary.
"""

import math
import statistics
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from core.cache import KVCache
from core.kernels.cross_entropy import linear_cross_entropy
from core.numerics import widest
from positional import ENCODINGS, PositionalEncoding, Positions


class Attention(nn.Module):
    """Causal multi-head self-attention."""

    def __init__(self, cfg: Any, layer: int) -> None:
        super().__init__()
        self.layer, self.n_head = layer, cfg.n_head
        self.c_attn = nn.Linear(cfg.n_embd, 3 * cfg.n_embd)
        self.c_proj = nn.Linear(cfg.n_embd, cfg.n_embd)

    def forward(self, x_BTC: Tensor, positions: Positions, cache: KVCache | None) -> Tensor:
        B, T, C = x_BTC.shape
        q, k, v = positions.turn(self.c_attn(x_BTC), self.n_head)
        y_BHTD = positions.attend(q, k, v) if cache is None else cache.attend(self.layer, q, k, v, positions.attend)
        return self.c_proj(y_BHTD.transpose(1, 2).reshape(B, T, C))


class MLP(nn.Module):
    """Two linear layers around GELU (tanh form)."""

    def __init__(self, cfg: Any) -> None:
        super().__init__()
        self.c_fc = nn.Linear(cfg.n_embd, 4 * cfg.n_embd)
        self.c_proj = nn.Linear(4 * cfg.n_embd, cfg.n_embd)

    def forward(self, x_BTC: Tensor) -> Tensor:
        return self.c_proj(functional.gelu(self.c_fc(x_BTC), approximate="tanh"))


class Block(nn.Module):
    """Pre-norm transformer block; `shared` is the encoding that all blocks share, None where each has its own."""

    def __init__(self, cfg: Any, layer: int, shared: PositionalEncoding | None) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(cfg.n_embd)
        self.attn = Attention(cfg, layer)
        self.ln_2 = nn.LayerNorm(cfg.n_embd)
        self.mlp = MLP(cfg)
        if shared is None:
            self.wpe = ENCODINGS[cfg.encoding](cfg)
        else:
            vars(self)["wpe"] = shared  # not as a module of the block's: its parameters are the model's

    def forward(
        self, x_BTC: Tensor, emb_BTC: Tensor, pos_T: Tensor, positions: Positions | None, cache: KVCache | None
    ) -> Tensor:
        """`positions` that all blocks share, or None where each block makes its own; `emb_BTC` are the token embeddings."""
        h_BTC = self.ln_1(x_BTC)
        if positions is None:
            positions = self.wpe(h_BTC if self.wpe.hidden else emb_BTC, pos_T, cache, self.attn.layer)
        x_BTC = x_BTC + self.attn(h_BTC, positions, cache)
        return x_BTC + self.mlp(self.ln_2(x_BTC))


class GPT(nn.Module):
    """GPT-2 with a pluggable positional encoding (`wpe`, after GPT-2's name for its own); the head is tied to `wte`.

    `cfg` is a config.Config, or anything with its model fields and `seed`, which alone decides the initial weights.
    """

    def __init__(self, cfg: Any) -> None:
        super().__init__()
        self.cfg = cfg
        encoding = ENCODINGS[cfg.encoding]
        self.wte = nn.Embedding(cfg.vocab_size, cfg.n_embd)
        self.head: nn.Module | None = None  # in place of wte's weights, with which it is tied: core.kernels.packed
        wpe = None if encoding.per_layer else encoding(cfg)
        self.h = nn.ModuleList(Block(cfg, layer, wpe) for layer in range(cfg.n_layer))
        self.ln_f = nn.LayerNorm(cfg.n_embd)
        self.wpe = wpe
        self.encodings: list[PositionalEncoding] = [m for m in self.modules() if isinstance(m, PositionalEncoding)]
        # Longest input the encoding has positions for; None is unlimited
        self.max_len = min((e.max_len for e in self.encodings if e.max_len is not None), default=None)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(cfg.seed)
            self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """Set every parameter: the table below, then what the encoding says of its own.

        The encoding comes last, so that with one seed the rest of the model starts the same under every encoding.
        """
        residual = 0.02 / math.sqrt(2 * self.cfg.n_layer)
        std = {"wte": 0.02, "c_attn": 0.02, "c_fc": 0.02, "c_proj": residual}
        for name, module in self.named_modules():
            kind = name.rsplit(".", 1)[-1]
            if kind in std:
                nn.init.normal_(module.weight, std=std[kind])
            elif kind in ("ln_1", "ln_2", "ln_f"):
                nn.init.ones_(module.weight)
            else:
                continue
            if kind != "wte":
                nn.init.zeros_(module.bias)
        for encoding in self.encodings:
            encoding.init_weights()

    def n_params(self) -> dict[str, int]:
        """Parameters: `total`; `embedding` (wte, shared with the head); `encoding` (positions); `body` (the rest)."""
        total = sum(p.numel() for p in self.parameters())
        encoding = sum(p.numel() for e in self.encodings for p in e.parameters())
        embedding = self.wte.weight.numel()
        return {"total": total, "embedding": embedding, "encoding": encoding, "body": total - embedding - encoding}

    def forward(
        self,
        idx_BT: Tensor,
        targets_BT: Tensor | None = None,
        reduction: str = "mean",
        cache: KVCache | None = None,
        last_only: bool = False,
    ) -> Tensor:
        """Logits (B, T, V), with `last_only` (B, 1, V); with targets, the cross-entropy in nats: a scalar, or (B, T) for
        reduction="none".

        With a cache, `idx_BT` are the tokens after those it holds. Raises ValueError beyond the encoding's max_len.
        """
        start = 0 if cache is None else len(cache)
        T = idx_BT.size(1)
        if self.max_len is not None and start + T > self.max_len:
            raise ValueError(
                f"sequence of {start + T} tokens: encoding {self.cfg.encoding!r} has positions for {self.max_len} only"
            )
        pos_T = torch.arange(start, start + T, device=idx_BT.device)
        x_BTC = emb_BTC = self.wte(idx_BT)
        positions = None
        if self.wpe is not None:
            positions = None if self.wpe.hidden else self.wpe(emb_BTC, pos_T, cache)
            x_BTC = self.wpe.embed(emb_BTC, pos_T)
        if self.cfg.residual == "bfloat16" and torch.is_autocast_enabled(x_BTC.device.type):
            x_BTC = x_BTC.bfloat16()
        recompute = self.cfg.activation_checkpointing and self.training and torch.is_grad_enabled() and cache is None
        for block in self.h:
            if recompute:  # of a block only its input is kept; nothing in it is random, so no generator's state either
                recomputed: Any = {"use_reentrant": False, "preserve_rng_state": False}
                x_BTC = checkpoint(block, x_BTC, emb_BTC, pos_T, positions, None, **recomputed)
            else:
                x_BTC = block(x_BTC, emb_BTC, pos_T, positions, cache)
        if cache is not None:
            cache.length += T
        if last_only:  # of a long prompt, the other logits would take more memory than all the rest
            x_BTC = x_BTC[:, -1:]
        x_BTC = self.ln_f(x_BTC)
        if targets_BT is None:
            return functional.linear(x_BTC, self.wte.weight) if self.head is None else self.head(x_BTC)
        return linear_cross_entropy(x_BTC, self.wte.weight, targets_BT, reduction)

    @torch.no_grad()
    def health(self, idx_BT: Tensor) -> tuple[dict[str, float], str | None]:
        """What the encodings measure of themselves on `idx_BT`, over layers with one of their own, and what is wrong, if it is.

        Over layers a …_min is their least, a …_max their greatest, anything else their mean.
        """
        found = []

        def note(encoding: PositionalEncoding, inputs: tuple[Tensor, Tensor], _: Positions) -> None:
            if (coords := encoding.coords(*inputs[:2])) is not None:
                found.append(encoding.health(coords))

        hooks = [encoding.register_forward_hook(note) for encoding in self.encodings]
        try:
            self(idx_BT, last_only=True)
        finally:
            for hook in hooks:
                hook.remove()
        over = {"min": min, "max": max}
        merged = {}
        for key in found[0] if found else ():
            merged[key] = over.get(key.split("_")[-1], statistics.fmean)([one[key] for one in found])
        return merged, next(filter(None, map(self.encodings[0].complaint, found)), None)

    @torch.no_grad()
    def generate(
        self,
        idx_BT: Tensor,
        max_new_tokens: int,
        n_vocab: int,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float = 1.0,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
    ) -> Iterator[Tensor]:
        """Yield up to `max_new_tokens` next tokens, (B,) int64 each, sampled with a KV cache.

        Only ids below `n_vocab`, the tokenizer's size, are drawn: the padding of the vocabulary never is. Temperature 0
        takes the likeliest. One `generator` for each row makes what a row draws independent of the rows beside it. Ends early
        where a learned table of positions ends.
        """
        cache, new_BT = KVCache(), idx_BT
        for _ in range(max_new_tokens):
            if self.max_len is not None and len(cache) + new_BT.size(1) > self.max_len:
                return
            logits_BV = self(new_BT, cache=cache, last_only=True)[:, -1, :n_vocab].float()
            next_B = sample_token(logits_BV, temperature, top_k, top_p, generator)
            yield next_B
            new_BT = next_B[:, None]


def sample_token(
    logits_BV: Tensor,
    temperature: float,
    top_k: int | None,
    top_p: float,
    generator: torch.Generator | Sequence[torch.Generator] | None,
) -> Tensor:
    """One id per row, (B,): the likeliest at temperature 0, else drawn from the `top_k` likeliest that hold mass `top_p`."""
    if temperature == 0:
        return logits_BV.argmax(-1)
    logits_BV = logits_BV / temperature
    if top_k is not None:
        kth_B1 = logits_BV.topk(min(top_k, logits_BV.size(-1))).values[:, -1:]
        logits_BV = logits_BV.masked_fill(logits_BV < kth_B1, -math.inf)
    if top_p < 1:
        sorted_BV, order_BV = logits_BV.sort(descending=True)
        probs_BV = sorted_BV.softmax(-1)
        beyond_BV = probs_BV.cumsum(-1) - probs_BV >= top_p  # the token that crosses top_p stays in
        logits_BV = logits_BV.masked_fill(beyond_BV.scatter(-1, order_BV, beyond_BV), -math.inf)
    # The cumulative distribution inverted at one number a row; torch.multinomial draws one for every id there is, on a CPU
    # 1.3 ms a row. The number stays below the whole mass, so that an id of probability 0 is never found
    mass_BV = logits_BV.softmax(-1, dtype=widest(logits_BV.device)).cumsum(-1)
    options: Any = {"dtype": mass_BV.dtype, "device": mass_BV.device}
    if isinstance(generator, Sequence):
        drawn_B1 = torch.cat([torch.rand(1, 1, generator=own, **options) for own in generator])
    else:
        drawn_B1 = torch.rand(len(mass_BV), 1, generator=generator, **options)
    whole_B1 = mass_BV[:, -1:]
    at_B1 = torch.minimum(drawn_B1 * whole_B1, whole_B1.nextafter(torch.zeros_like(whole_B1)))
    return torch.searchsorted(mass_BV, at_B1, right=True).squeeze(1)
