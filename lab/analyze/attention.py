"""Where attention looks: distances, entropy, and the mass on the first token, the token itself and the last 16.

Each layer and head, averaged over the queries in the second half of windows of the training length, whatever the encoding. In
float32. Weights that do not add up to one (urpe) count as shares of their magnitudes; `sum` in the JSON is what they add up to.

Shapes: B windows, H heads, T positions (S the same, as keys), D head width, t queries of the second half, s keys at a time,
K bins of distances.
"""

import argparse
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from core.attention import Attend
from core.checkpoint import load_model
from core.data import TokenStream, to_ids
from core.distributed import Distributed
from core.errors import at_least
from core.figures import BASELINE, line, log_ticks, panels, save
from core.numerics import widest
from lab.analyze.frequencies import validation
from model import GPT
from positional import Positions

RECENT = 16  # tokens, the query's own among them
PER_OCTAVE = 2  # bins of distances
BATCH_TOKENS = 2**12  # at a time
Visit = Callable[[int, Attend, Tensor, Tensor, Tensor, Tensor], object]  # layer, attend, q, k, v, and what attend made of them


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's own options."""
    text = "of the validation text, spread over it [default: 32]"
    parser.add_argument("--windows", type=int, default=32, metavar="N", help=text)


def run(args: argparse.Namespace, out: Path) -> dict[str, Any]:
    """Measure each run, draw attention.png into `out`; returns what was found."""
    at_least(1, windows=args.windows)
    with Distributed.start(args.device, "float32") as dist:
        found = []
        for path in args.runs:
            model, state, _ = load_model(path)
            stream, cfg = validation(model, state, path, args.data), model.cfg
            about = {"run": cfg.name, "encoding": cfg.encoding, "step": state.step, "block_size": cfg.block_size}
            found.append(about | measure(model.to(dist.device).eval(), stream, args.windows))
    draw(found, out / "attention.png")
    return {"recent": RECENT, "runs": found}


def weight_columns(attend: Attend, q_BHTD: Tensor, k_BHTD: Tensor) -> Iterator[tuple[int, Tensor]]:
    """The weights that `attend` gives the keys, at most D keys at a time: the first of them, and (B, H, T, s).

    Attention is linear in the values, so for values that are columns of the identity its output is columns of the weights. It
    is the model's own computation that is looked at, under every encoding and kernel, and T × S are never in memory at once.
    """
    T, D = q_BHTD.shape[-2:]
    for start in range(0, T, D):
        count = min(D, T - start)
        v_TD = q_BHTD.new_zeros(T, D)
        v_TD[start : start + count, :count] = torch.eye(count, dtype=v_TD.dtype, device=v_TD.device)
        yield start, attend(q_BHTD, k_BHTD, v_TD.expand_as(q_BHTD).contiguous())[..., :count]


@contextmanager
def watched(model: GPT, visit: Visit) -> Iterator[None]:
    """Show `visit` the queries and keys of every layer, at their positions, in forward passes without a cache."""

    def seen(layer: int, positions: Positions, attend: Attend, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        del positions.attend  # the class's again: layers may share it
        y = attend(q, k, v)
        visit(layer, attend, q, k, v, y)
        return y

    def before(module: Any, inputs: tuple[Any, ...]) -> None:
        positions = inputs[1]
        positions.attend = partial(seen, module.layer, positions, positions.attend)

    handles = [block.attn.register_forward_pre_hook(before) for block in model.h]  # type: ignore[union-attr, arg-type]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def distance_bins(length: int) -> list[tuple[int, int]]:
    """Distances 0 … `length`−1 in bins [from, to]: 0, then PER_OCTAVE to an octave, with an edge at every power of two."""
    n = PER_OCTAVE * math.ceil(math.log2(length))
    starts = sorted(a for a in {0} | {round(2 ** (k / PER_OCTAVE)) for k in range(n)} if a < length)
    return [(a, b - 1) for a, b in zip(starts, [*starts[1:], length], strict=True)]


class Sums:
    """What is known of each layer and head, summed over queries: shares of mass by distance, on the first token, and so on."""

    def __init__(self, n_layer: int, n_head: int, length: int, device: torch.device) -> None:
        self.bins, self.first_query, self.n_queries = distance_bins(length), length // 2, 0
        starts_K = torch.tensor([a for a, _ in self.bins], device=device)
        pos_T = torch.arange(length, device=device)
        self.distance_tS = pos_T[self.first_query :, None] - pos_T
        self.bin_tS = (torch.bucketize(self.distance_tS.clamp(min=0), starts_K, right=True) - 1).contiguous()
        self.histogram_LHK = torch.zeros(n_layer, n_head, len(self.bins), dtype=widest(device), device=device)
        self.rest_LH4 = torch.zeros(n_layer, n_head, 4, dtype=widest(device), device=device)  # distance, entropy, first, sum

    def add(self, layer: int, attend: Attend, q: Tensor, k: Tensor, v: Tensor, y: Tensor) -> None:
        """Take in the weights of one layer in a batch of windows."""
        B, H, T, _ = q.shape
        t = T - self.first_query
        histogram_BHtK = self.histogram_LHK.new_zeros(B, H, t, len(self.bins))
        distance_BHt, plogp_BHt, first_BHt, signed_BHt = histogram_BHtK.new_zeros(4, B, H, t)
        for start, w_BHTs in weight_columns(attend, q, k):
            keys, signed_BHts = slice(start, start + w_BHTs.size(-1)), w_BHTs[:, :, self.first_query :].to(histogram_BHtK)
            w_BHts = signed_BHts.abs()
            histogram_BHtK.scatter_add_(-1, self.bin_tS[:, keys].expand_as(w_BHts), w_BHts)
            distance_BHt += (w_BHts * self.distance_tS[:, keys]).sum(-1)
            plogp_BHt += torch.xlogy(w_BHts, w_BHts).sum(-1)
            signed_BHt += signed_BHts.sum(-1)
            if start == 0:
                first_BHt += w_BHts[..., 0]
        mass_BHt = histogram_BHtK.sum(-1).clamp(min=1e-30)
        entropy_BHt = mass_BHt.log() - plogp_BHt / mass_BHt
        rest_4BHt = torch.stack((distance_BHt / mass_BHt, entropy_BHt, first_BHt / mass_BHt, signed_BHt))
        self.rest_LH4[layer] += rest_4BHt.sum((1, 3)).T
        self.histogram_LHK[layer] += (histogram_BHtK / mass_BHt[..., None]).sum((0, 2))
        self.n_queries += B * t if layer == 0 else 0

    def summary(self) -> dict[str, Any]:
        """Means, by layer and head."""
        recent = [b < RECENT for _, b in self.bins]
        histogram_LHK, rest_LH4 = self.histogram_LHK / self.n_queries, self.rest_LH4 / self.n_queries
        layers = [
            [
                dict(zip(("distance", "entropy", "first", "sum"), rest_LH4[i, h].tolist(), strict=True))
                | {
                    "itself": histogram_LHK[i, h, 0].item(),
                    "recent": histogram_LHK[i, h, recent].sum().item(),
                    "histogram": histogram_LHK[i, h].tolist(),
                }
                for h in range(rest_LH4.size(1))
            ]
            for i in range(len(rest_LH4))
        ]
        keys_K = torch.bincount(self.bin_tS[self.distance_tS >= 0], minlength=len(self.bins)) / len(self.bin_tS)
        return {"queries": self.n_queries, "bins": self.bins, "keys": keys_K.tolist(), "layers": layers}


@torch.no_grad()
def measure(model: GPT, stream: TokenStream, windows: int) -> dict[str, Any]:
    """Distances and masses of a model's heads in `windows` windows of `stream`, as many as there are at most."""
    cfg = model.cfg
    length = min(cfg.block_size, len(stream))
    count = min(windows, len(stream) // length)
    device = model.wte.weight.device
    sums = Sums(cfg.n_layer, cfg.n_head, length, device)
    starts = [(len(stream) - length) * i // max(1, count - 1) for i in range(count)]
    batch = max(1, BATCH_TOKENS // length)
    with watched(model, sums.add):
        for i in range(0, count, batch):
            rows = [to_ids(stream.read(start, length), device) for start in starts[i : i + batch]]
            model(torch.stack(rows).to(device), last_only=True)
    return {"length": length, "windows": count} | sums.summary()


def draw(found: list[dict[str, Any]], path: Path) -> None:
    """Per run, mean distance of each layer and head above mass against distance of each layer; four runs to a row."""
    columns = min(4, len(found))
    rows = -(-len(found) // columns)
    figure, axes = panels(2 * rows, columns, width=4.0, height=3.4)
    farthest = max(head["distance"] for one in found for layer in one["layers"] for head in layer)
    image = None
    for i in range(rows * columns):
        upper, lower = axes[2 * (i // columns), i % columns], axes[2 * (i // columns) + 1, i % columns]
        if i >= len(found):
            upper.set_visible(False)
            lower.set_visible(False)
            continue
        image = draw_distances(upper, found[i], farthest)
        draw_curves(lower, found[i])
    figure.colorbar(image, ax=axes[::2].ravel().tolist(), label="mean attention distance, tokens", shrink=0.8)
    save(figure, path)


def draw_distances(axis: Any, one: dict[str, Any], farthest: float) -> Any:
    """A run's heat map, dark is far; returns the image, for the scale beside it."""
    distance = [[head["distance"] for head in layer] for layer in one["layers"]]
    image = axis.imshow(distance, cmap="Greys", vmin=0, vmax=farthest, aspect="auto")
    axis.grid(False)
    axis.set(title=f"{one['run']} ({one['encoding']})", xlabel="head", ylabel="layer")
    axis.set_xticks(range(len(distance[0])))
    axis.set_yticks(range(len(distance)))
    if len(distance) * len(distance[0]) <= 144:  # beyond, numbers would run into each other
        for y, layer in enumerate(distance):
            for x, value in enumerate(layer):
                color = "white" if value > 0.55 * farthest else "black"
                axis.text(x, y, f"{value:.0f}", ha="center", va="center", fontsize=7, color=color)
    return image


def draw_curves(axis: Any, one: dict[str, Any]) -> None:
    """A run's mass per key against distance, mean over heads, a line per layer (at most six, spread over the depth)."""
    n = len(one["layers"])
    shown = sorted({round(i * (n - 1) / min(5, max(1, n - 1))) for i in range(min(6, n))})
    bins = one["bins"][1:]
    x = [math.sqrt(a * b) for a, b in bins]
    for number, i in enumerate(shown):
        heads = one["layers"][i]
        mean = [sum(head["histogram"][k] for head in heads) / len(heads) for k in range(1, len(one["bins"]))]
        density = [max(mass / keys, 1e-12) for mass, keys in zip(mean, one["keys"][1:], strict=True)]
        axis.plot(x, density, label=f"layer {i}", **line(number))
    axis.plot(x, [2 * math.log(2) / one["length"]] * len(x), label="evenly over all", **BASELINE)
    axis.set_yscale("log")
    log_ticks(axis, [2**k for k in range(one["length"].bit_length())])
    axis.set(xlabel="distance, tokens (0 left out)", ylabel="attention per key, mean over heads")
    axis.legend(fontsize=7)
