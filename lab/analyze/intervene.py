"""Perplexity with the tokens' f replaced: does the content matter to CARoPE, or only the base that it has learned?

    python -m lab.analyze intervene runs/small-carope --lengths 512 1024 2048

Replaced in every layer and head, without training: by the f of other tokens of the window (`shuffle`), by that of another
window at the same positions (`other`), by its mean per head (`mean`), by RoPE's θ_1 (`rope`). A shuffle takes values from
later tokens too, so what it measures is not a causal language model; one number per token and head is all it could leak.

Shapes: B windows, T positions, H heads, L sites, W windows of all batches.
"""

import argparse
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from core.checkpoint import load_model
from core.data import TokenStream
from core.distributed import Distributed, pick_dtype
from core.errors import UserError, at_least
from core.evaluate import losses
from core.figures import BASELINE, line, panels, plain_log_y, save
from core.numerics import widest
from eval_ppl import default_batch
from lab.analyze.frequencies import Change, replaced, rope_theta, validation, varies
from model import GPT

LABELS = {
    "none": "f as learned",
    "shuffle": "of other tokens of the window",
    "other": "of another window",
    "mean": "mean per head",
    "rope": "RoPE's $\\theta_1$",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Its own options; lab.analyze has the others."""
    add = parser.add_argument
    add("--lengths", nargs="+", type=int, metavar="T", help="tokens [default: 1, 2 and 4 times the training length]")
    add("--max_tokens", "--max-tokens", type=int, default=65_536, help="tokens of the validation set [default: 65536; 0: all]")
    add("--seed", type=int, default=1, help="of the shuffles [default: 1]")


def run(args: argparse.Namespace, out: Path) -> dict[str, Any]:
    """Print a table and draw intervene.png for the runs of `args`; returns what stands in the JSON."""
    at_least(1, lengths=args.lengths)
    at_least(0, max_tokens=args.max_tokens)
    with Distributed.start(args.device, "auto") as dist:
        found = [intervene_run(path, args, dist) for path in args.runs]
    draw(found, out / "intervene.png")
    for one in found:
        print(f"{one['run']}: perplexity with f replaced, and the difference it makes, nats a token")
        for r in one["results"]:
            grown = f"{r['difference']:+.4f} ± {r['difference_stderr']:.4f}"
            print(f"{r['length']:>7}  {r['f']:8}{r['perplexity']:>10.3f}  {grown}")
    return {"seed": args.seed, "max_tokens": args.max_tokens, "runs": found}


def intervene_run(path: str, args: argparse.Namespace, dist: Distributed) -> dict[str, Any]:
    """What is found about the run or checkpoint at `path`."""
    model, state, folder = load_model(path)
    model.to(dist.device)
    if not varies(model)[0]:
        raise UserError(f"{path}: encoding {model.cfg.encoding!r} has no f that depends on tokens; that of carope does")
    cfg, stream = model.cfg, validation(model, state, path, args.data)
    dist.dtype = pick_dtype(cfg.dtype, dist.device)
    lengths = args.lengths or [cfg.block_size * k for k in (1, 2, 4)]
    with dist.autocast():
        results = intervene(model, stream, lengths, args.max_tokens, args.seed)
    return {
        "run": cfg.name, "encoding": cfg.encoding, "step": state.step, "checkpoint": str(folder), "data": str(stream.folder),
        "block_size": cfg.block_size, "theta_1": rope_theta(model), "results": results,
    }  # fmt: skip


def shuffle(seed: int) -> Change:
    """The f of one window's tokens in another order, drawn anew for each window, site and head."""
    generator = torch.Generator().manual_seed(seed)

    def change(_: int, f_BHT: Tensor) -> Tensor:
        return f_BHT.gather(2, torch.rand(f_BHT.shape, generator=generator).argsort(2).to(f_BHT.device))

    return change


def other(_: int, f_BHT: Tensor) -> Tensor:
    """Position for position the f of the window half a batch away; `pairs` puts text from half the set away there."""
    return f_BHT.roll(f_BHT.size(0) // 2, dims=0)


def constant(f_H: list[Tensor]) -> Change:
    """For every token the same f, (H,) or (1,) for each site."""
    return lambda site, f_BHT: f_H[site].to(f_BHT)[:, None].expand_as(f_BHT)


def pairs(stream: TokenStream, length: int, max_tokens: int, batch: int, device: torch.device) -> Iterator[Tensor]:
    """Non-overlapping windows (B, T + 1), B even; row b + B/2 lies half of the tokens after row b."""
    n_tokens = min(len(stream) - 1, max_tokens or len(stream))
    half, at_once = n_tokens // length // 2, max(1, batch // 2)
    if half == 0:
        raise UserError(
            f"--lengths {length}: two windows of it are needed, {stream.folder} and --max_tokens leave {n_tokens} tokens; "
            f"{n_tokens // 2} is the longest"
        )
    for first in range(0, half, at_once):
        rows = [w + h for h in (0, half) for w in range(first, min(half, first + at_once))]
        ids = [torch.from_numpy(stream.read(w * length, length + 1).astype("int64")) for w in rows]
        yield torch.stack(ids).to(device)


@torch.no_grad()
def window_losses(model: GPT, batches: list[Tensor]) -> Tensor:
    """Mean loss of each window in nats, (W,) `widest`."""
    return torch.cat([losses(model, idx[:, :-1], idx[:, 1:]).mean(1) for idx in batches])


def means(model: GPT, batches: list[Tensor]) -> list[Tensor]:
    """f's mean over tokens per head, (H,) `widest` for each site."""
    sums: dict[int, Tensor] = {}

    def note(site: int, f_BHT: Tensor) -> Tensor:
        total_H = f_BHT.to(widest(f_BHT.device)).mean(2).sum(0)
        sums[site] = sums[site] + total_H if site in sums else total_H
        return f_BHT

    with replaced(model, note):
        window_losses(model, batches)
    return [total_H / sum(map(len, batches)) for _, total_H in sorted(sums.items())]


def intervene(model: GPT, stream: TokenStream, lengths: list[int], max_tokens: int, seed: int = 1) -> list[dict[str, Any]]:
    """A record per length and replacement: loss, perplexity, and the difference to f as learned, paired window by window."""
    device, found = model.wte.weight.device, []
    for length in lengths:
        batch = min(64, default_batch(length, model.cfg))
        batches = list(pairs(stream, length, max_tokens, batch, device))
        mean_H = means(model, batches)
        changes: dict[str, Change] = {
            "none": lambda _, f_BHT: f_BHT,
            "shuffle": shuffle(seed),
            "other": other,
            "mean": constant(mean_H),
            "rope": constant([torch.tensor([rope_theta(model)])] * len(mean_H)),
        }
        losses_W = {}
        for name, change in changes.items():
            with replaced(model, change):
                losses_W[name] = window_losses(model, batches)
        found += [record(name, length, nll_W, losses_W["none"]) for name, nll_W in losses_W.items()]
    return found


def record(name: str, length: int, nll_W: Tensor, plain_W: Tensor) -> dict[str, Any]:
    """What the JSON has of one replacement at one length; standard errors are over windows."""
    n, grown_W = len(nll_W), nll_W - plain_W
    nll = nll_W.mean().item()
    return {
        "length": length, "f": name, "tokens": n * length, "windows": n, "nll": nll,
        "nll_stderr": (nll_W.std() / math.sqrt(n)).item(), "perplexity": math.exp(min(700, nll)),
        "difference": grown_W.mean().item(), "difference_stderr": (grown_W.std() / math.sqrt(n)).item(),
    }  # fmt: skip


def draw(found: list[dict[str, Any]], path: Path) -> None:
    """Perplexity by length, and below it the difference in nats, a point per replacement and a column of panels per run."""
    figure, axes = panels(2, len(found), width=5.2, height=3.4)
    every = [r["perplexity"] for one in found for r in one["results"]]
    for column, one in enumerate(found):
        above, below = axes[:, column]
        above.sharey(axes[0, 0])
        draw_points(above, one, "perplexity", [0.0] * len(one["results"]))
        draw_points(below, one, "difference", [r["difference_stderr"] for r in one["results"]])
        above.set(title=one["run"], ylabel="perplexity")
        below.set(xlabel="length, tokens", ylabel="difference, nats (± paired std. error)")
    if max(every) > 3 * min(every):
        plain_log_y(axes[0, 0])
    figure.legend(
        *axes[0, 0].get_legend_handles_labels(), fontsize=8, loc="outside lower center", ncols=3, title="f of each token"
    )
    save(figure, path)


def draw_points(axis: Any, one: dict[str, Any], key: str, errors: list[float]) -> None:
    """A figure of each record of a run by length, side by side; dotted is f as learned."""
    lengths = sorted({r["length"] for r in one["results"]})
    for i, (name, label) in enumerate(LABELS.items()):
        shown = [(lengths.index(r["length"]), r[key], e) for r, e in zip(one["results"], errors, strict=True) if r["f"] == name]
        if name == "none":
            for x, y, _ in shown:
                axis.plot([x - 0.4, x + 0.4], [y, y], **BASELINE)
        style = line(i) | {"linestyle": "none", "markersize": 6, "capsize": 2, "elinewidth": 1}
        axis.errorbar(
            [x + 0.14 * (i - 2) for x, _, _ in shown], [y for _, y, _ in shown], [e for _, _, e in shown], label=label, **style
        )
    axis.set_xticks(range(len(lengths)), [f"{n}\n(trained at)" if n == one["block_size"] else str(n) for n in lengths])
    axis.grid(axis="x", visible=False)
