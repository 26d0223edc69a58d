"""Perplexity with the tokens' f replaced: does the content matter to CARoPE, or only the base that it has learned?

    python analyze.py intervene runs/small-carope --lengths 512 1024 2048

Shapes: B windows, T positions, C width, H heads.
"""

import argparse
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data import TokenStream
from distributed import pick_device
from eval_ppl import default_batch
from evaluation.figures import line, log_ticks, mark_training_length, panels, plain_log_y, save
from evaluation.windows import losses
from model import GPT
from system.errors import UserError
from training.checkpoint import load_model


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Its own options; analyze.py has the others."""
    add = parser.add_argument
    add("--lengths", nargs="+", type=int, metavar="T", help="tokens [default: 1, 2 and 4 times the training length]")
    add("--max_tokens", "--max-tokens", type=int, default=65_536, help="tokens of its validation set [default: 65536]")
    add("--seed", type=int, default=1, help="of the shuffles [default: 1]")


def run(args: argparse.Namespace, out: Path) -> dict[str, Any]:
    """Draw intervene.png for the one run of `args`; returns what stands in the JSON."""
    if len(args.runs) > 1:
        raise UserError(f"{args.runs[1]}: intervene takes one run at a time")
    if min(args.lengths or [1]) < 1 or args.max_tokens < 0:
        raise UserError("--lengths must be at least 1 and --max_tokens at least 0")
    model, state, folder = load_model(args.runs[0])
    model.to(pick_device(args.device))
    check(model, args.runs[0])
    cfg = model.cfg
    stream = TokenStream(args.data or cfg.data, "val", cfg.vocab_size)
    if stream.tokenizer != state.tokenizer:
        raise UserError(
            f"{stream.folder}: tokenized by {stream.tokenizer!r}, but {args.runs[0]} was trained on {state.tokenizer!r}"
        )
    lengths = args.lengths or [cfg.block_size * k for k in (1, 2, 4)]
    batch = min(64, default_batch(max(lengths), cfg.vocab_size))
    found = intervene(model, stream, lengths, args.max_tokens, batch, args.seed)
    draw(found, cfg.block_size, out / "intervene.png")
    for r in found:
        print(f"{r['length']:>7}  {r['f']:8}{r['perplexity']:>10.2f}  {r['growth']:+.4f} ± {r['growth_stderr']:.4f} nats")
    about = {"run": cfg.name, "encoding": cfg.encoding, "step": state.step, "checkpoint": str(folder), "seed": args.seed}
    return about | {"results": found}


Change = Callable[[int, Tensor], Tensor]  # number of the encoding, its f (B, H, T) → f in its place
LABELS = {
    "none": "f as learned",
    "shuffle": "shuffled over the tokens of the window",
    "mean": "mean per head",
    "other": "another text's",
}


def check(model: GPT, path: str) -> None:
    """Raise UserError for an encoding whose f, where it has one, is the same whatever the tokens are."""
    probe_BTC = torch.zeros(2, 3, model.cfg.n_embd, device=model.wte.weight.device)
    f = [encoding.frequency(probe_BTC) for encoding in model.encodings]
    if not f or any(one is None or one.size(0) == 1 for one in f):
        raise UserError(f"{path}: encoding {model.cfg.encoding!r} has no f that depends on tokens; carope's family has")


@contextmanager
def replaced(model: GPT, change: Change) -> Iterator[None]:
    """Within, every encoding of the model turns by `change` of its f."""
    for i, encoding in enumerate(model.encodings):
        encoding.frequency = _changed(change, i, encoding.frequency)  # type: ignore[assignment, method-assign]
    try:
        yield
    finally:
        for encoding in model.encodings:
            del encoding.frequency  # the class's again


def _changed(change: Change, i: int, own: Callable[[Tensor], Any]) -> Callable[[Tensor], Tensor]:
    return lambda x_BTC: change(i, own(x_BTC))


def shuffle(seed: int) -> Change:
    """The f of one window's tokens in an order drawn anew for each window and encoding, the same for all heads."""
    generator = torch.Generator().manual_seed(seed)

    def change(_: int, f_BHT: Tensor) -> Tensor:
        B, H, T = f_BHT.shape
        order_BT = torch.rand(B, T, generator=generator).argsort(1).to(f_BHT.device)
        return f_BHT.gather(2, order_BT[:, None].expand(B, H, T))

    return change


def other(_: int, f_BHT: Tensor) -> Tensor:
    """Position for position the f of the window half a batch away; `pairs` puts text from half the set away there."""
    return f_BHT.roll(f_BHT.size(0) // 2, dims=0)


def constant(f_H: list[Tensor]) -> Change:
    """For every token the same f, one per encoding and head."""
    return lambda i, f_BHT: f_H[i][:, None].expand_as(f_BHT)


def pairs(stream: TokenStream, length: int, max_tokens: int, batch: int, device: torch.device) -> Iterator[Tensor]:
    """Non-overlapping windows (B, T + 1), B even; row b + B/2 lies half of the tokens after row b."""
    half = min(len(stream) - 1, max_tokens or len(stream)) // length // 2
    if half == 0:
        raise UserError(f"--lengths {length}: two windows of it are needed and {stream.folder} has no more in --max_tokens")
    for first in range(0, half, max(1, batch // 2)):
        rows = [w + h for h in (0, half) for w in range(first, min(half, first + max(1, batch // 2)))]
        ids = [torch.from_numpy(stream.read(w * length, length + 1).astype("int64")) for w in rows]
        yield torch.stack(ids).to(device)


@torch.no_grad()
def window_losses(model: GPT, batches: list[Tensor]) -> Tensor:
    """Mean loss of each window in nats, (windows,) float64."""
    return torch.cat([losses(model, idx[:, :-1], idx[:, 1:]).mean(1) for idx in batches])


@torch.no_grad()
def means(model: GPT, batches: list[Tensor]) -> list[Tensor]:
    """f's mean over tokens per head, (H,) for each encoding."""
    sums: list[Any] = [0.0] * len(model.encodings)

    def note(i: int, f_BHT: Tensor) -> Tensor:
        sums[i] = sums[i] + f_BHT.double().mean((0, 2)) * f_BHT.size(0)
        return f_BHT

    with replaced(model, note):
        window_losses(model, batches)
    n_windows = sum(len(idx) for idx in batches)
    return [(total / n_windows).float() for total in sums]


def intervene(
    model: GPT, stream: TokenStream, lengths: list[int], max_tokens: int, batch: int, seed: int = 1
) -> list[dict[str, Any]]:
    """A record per length and replacement: perplexity, and by how much the loss grows, paired window by window."""
    device, found = model.wte.weight.device, []
    for length in lengths:
        batches = list(pairs(stream, length, max_tokens, batch, device))
        changes: dict[str, Change] = {
            "none": lambda _, f_BHT: f_BHT,
            "shuffle": shuffle(seed),
            "mean": constant(means(model, batches)),
            "other": other,
        }
        plain_W = None
        for name, change in changes.items():
            with replaced(model, change):
                nll_W = window_losses(model, batches)
            plain_W = nll_W if plain_W is None else plain_W
            grown_W, n = nll_W - plain_W, len(nll_W)
            found.append({
                "length": length, "f": name, "tokens": n * length, "nll": nll_W.mean().item(),
                "perplexity": math.exp(min(700, nll_W.mean().item())), "growth": grown_W.mean().item(),
                "growth_stderr": (grown_W.std() / math.sqrt(n)).item(),
            })  # fmt: skip
    return found


def draw(results: list[dict[str, Any]], block_size: int, path: Path) -> None:
    """Perplexity against length, a line per replacement."""
    figure, axes = panels(1, 1, width=6.0, height=4.2)
    axis = axes[0, 0]
    for i, (name, label) in enumerate(LABELS.items()):
        points = [(r["length"], r["perplexity"]) for r in results if r["f"] == name]
        axis.plot(*zip(*points, strict=True), label=label, **line(i))
    log_ticks(axis, sorted({r["length"] for r in results}))
    plain_log_y(axis)
    mark_training_length(axis, {block_size})
    axis.set(xlabel="length, tokens", ylabel="perplexity")
    axis.legend(fontsize=8, title="f of each token")
    save(figure, path)
