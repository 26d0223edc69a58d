"""Decoding: a token early and late in the text, with and without the KV cache, one prompt and a batch of them.

    python -m lab.bench decode config/tiny.toml --dtype=float32 --encodings rope carope learned
    python -m lab.bench decode runs/small-carope --tokens 512 --batch 8

Takes a configuration, whose weights are then random, or a run folder. For each encoding, interleaved round by round:

- early, late: one new token after `--early` and after `--late` others, the mean of a few
- cached: `--tokens` new tokens of one prompt, as sample.py makes them
- batched: `--batch` prompts at a time
- weights: one vector times every weight matrix, and nothing else: what a token cannot cost less than
- uncached: each token from a forward pass over the whole text so far, the head at its last position only; every
  `--stride`-th is timed and stands for the ones between. `uncached_all_logits` has the head at every position, as a
  model that returns all logits has it

A learned table is made long enough for them. The weights are the most that a token has to read from memory, so their bytes
are given beside the time.
"""

import argparse
from pathlib import Path
from typing import Any

import torch

from core.cache import KVCache
from core.checkpoint import load_model
from core.config import load_config
from core.distributed import Distributed, peak_memory
from core.errors import UserError
from core.kernels.packed import pack
from core.measure import interleave, speedup, spread
from model import GPT, sample_token
from prepare_fineweb import positive

NEAR = 8  # tokens timed at a place


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `lab.bench decode`."""
    add = parser.add_argument
    add("--encodings", nargs="+", metavar="NAME", help="[default: the configuration's]")
    add("--early", type=positive, default=50, help="position [default: %(default)s]")
    add("--late", type=positive, default=1000, help="position [default: %(default)s]")
    add("--tokens", type=positive, default=512, help="new tokens, after a prompt of one [default: %(default)s]")
    add("--batch", type=positive, default=8, help="prompts decoded together [default: %(default)s]")
    add("--stride", type=positive, default=16, help="of the timed forward passes without a cache [default: %(default)s]")
    add("--rounds", type=positive, default=5, help="[default: %(default)s]")


def run(args: argparse.Namespace, rest: list[str]) -> dict[str, Any]:
    """Time every encoding in every round; returns the JSON fields. Raises UserError."""
    models = load_models(args, rest)
    cfg = next(iter(models.values())).cfg
    dist = Distributed.start(cfg.device, cfg.dtype)
    n_weights = {encoding: model.n_params()["total"] for encoding, model in models.items()}
    candidates = {}
    with torch.no_grad(), dist.autocast():
        for encoding, model in models.items():
            pack(model.to(dist.device), dist.dtype)
            for name, work in candidates_of(model, args).items():
                candidates[f"{encoding} {name}"] = work
        seconds = interleave(candidates, args.rounds, device=dist.device)
    results = []
    for encoding, model in models.items():
        mine = {name.split()[1]: each for name, each in seconds.items() if name.split()[0] == encoding}
        results.append(figures(model, n_weights[encoding], mine, args, dist))
        print(describe(results[-1]))
    first = results[0]
    headline = ("tokens_per_second", "ms_median", "ms_p10", "ms_p90")
    return {key: first["cached"][key] for key in headline} | {
        "encoding": first["encoding"],
        "config": cfg.model_dump(),
        "dtype": first["dtype"],
        "device_type": dist.device.type,
        "encodings": results,
    }


def load_models(args: argparse.Namespace, rest: list[str]) -> dict[str, Any]:
    """A model for each encoding asked for, random or the run's. Raises UserError."""
    longest = max(args.late + NEAR, args.tokens + 1)
    if rest and Path(rest[0]).is_dir():
        if args.encodings or rest[1:]:
            raise UserError(f"{rest[0]}: a run has its encoding and its options; leave out {(args.encodings or rest[1:])[0]}")
        model, _, _ = load_model(rest[0])
        if model.max_len is not None and model.max_len < longest:
            raise UserError(
                f"{rest[0]}: encoding {model.cfg.encoding!r} has positions for {model.max_len} only, {longest} are wanted; "
                "give a smaller --late and --tokens"
            )
        return {model.cfg.encoding: model.eval()}
    models = {}
    for encoding in args.encodings or [load_config(rest).encoding]:
        cfg = load_config([*rest, f"--encoding={encoding}"])
        models[encoding] = GPT(cfg.model_copy(update={"block_size": max(cfg.block_size, longest)})).eval()
    return models


def candidates_of(model: Any, args: argparse.Namespace) -> dict[str, Any]:
    """What is timed of one model."""
    return {
        "early": tokens_at(model, args.early),
        "late": tokens_at(model, args.late),
        "weights": lambda: read_weights(model),
        "cached": lambda: generate(model, 1, args.tokens),
        "batched": lambda: generate(model, args.batch, args.tokens),
        "uncached": lambda: recompute(model, args.tokens, args.stride, last_only=True),
        "uncached_all_logits": lambda: recompute(model, args.tokens, args.stride, last_only=False),
    }


def tokens_at(model: Any, position: int) -> Any:
    """Work that decodes NEAR tokens after `position` others; the cache is filled before."""
    cache, device = KVCache(), model.wte.weight.device
    model(torch.zeros(1, position, dtype=torch.long, device=device), cache=cache, last_only=True)
    token = torch.zeros(1, 1, dtype=torch.long, device=device)

    def work() -> None:
        cache.length = position  # back again: a running sum goes on from where it was, which takes the same time
        for _ in range(NEAR):
            model(token, cache=cache)

    return work


def read_weights(model: Any) -> None:
    """The matrix-vector products of NEAR tokens."""
    C, weight = model.cfg.n_embd, model.wte.weight
    x, wide = weight.new_ones(1, 1, C), weight.new_ones(1, 1, 4 * C)
    for _ in range(NEAR):
        for block in model.h:
            for layer in (block.attn.c_attn, block.attn.c_proj, block.mlp.c_fc):
                layer(x)
            block.mlp.c_proj(wide)
        torch.nn.functional.linear(x, weight) if model.head is None else model.head(x)


def generate(model: Any, batch: int, n_tokens: int) -> None:
    """Decode `n_tokens` for each of `batch` prompts of one token."""
    prompts = torch.zeros(batch, 1, dtype=torch.long, device=model.wte.weight.device)
    for _ in model.generate(prompts, n_tokens, model.cfg.vocab_size):
        pass


def recompute(model: Any, n_tokens: int, stride: int, last_only: bool) -> None:
    """Every `stride`-th token of `n_tokens` from a forward pass over all before it."""
    for length in range(max(1, stride // 2), n_tokens + 1, stride):
        idx = torch.zeros(1, length, dtype=torch.long, device=model.wte.weight.device)
        sample_token(model(idx, last_only=last_only)[:, -1].float(), 1.0, None, 1.0, None)


def figures(model: Any, n_weights: int, seconds: dict[str, list[float]], args: argparse.Namespace, dist: Any) -> dict[str, Any]:
    """Times and ratios of one encoding; `seconds` are per round."""
    scale = args.tokens / len(range(max(1, args.stride // 2), args.tokens + 1, args.stride))
    for name in ("uncached", "uncached_all_logits"):
        seconds[name] = [scale * one for one in seconds[name]]
    tokens = {"early": NEAR, "late": NEAR, "weights": NEAR, "batched": args.batch * args.tokens}
    result: dict[str, Any] = {name: spread(each, tokens.get(name, args.tokens)) for name, each in seconds.items()}
    weight = 2 if str(dist.dtype) == "torch.bfloat16" else 4
    return result | {
        "encoding": model.cfg.encoding,
        "dtype": str(dist.dtype).removeprefix("torch."),
        "positions": {"early": args.early, "late": args.late},
        "ms_per_token": {name: round(result[name]["ms_median"] / NEAR, 3) for name in ("early", "late", "weights")},
        "late_over_early": speedup(seconds["early"], seconds["late"]),
        "cache_speedup": speedup(seconds["cached"], seconds["uncached"]),
        "cache_speedup_all_logits": speedup(seconds["cached"], seconds["uncached_all_logits"]),
        "batch": args.batch,
        "batch_speedup": round(args.batch * speedup(seconds["batched"], seconds["cached"]), 4),
        "weight_bytes": weight * n_weights,
        "peak_memory_bytes": peak_memory(dist.device),
    }


def describe(result: dict[str, Any]) -> str:
    """The lines for people."""
    at, ms, batch = result["positions"], result["ms_per_token"], result["batch"]
    one, together = result["cached"]["tokens_per_second"], result["batched"]["tokens_per_second"]
    times, more = result["cache_speedup"], result["cache_speedup_all_logits"]
    weights = f"{ms['weights']:.2f} of them the weights at {result['weight_bytes'] / ms['weights'] / 1e6:.1f} GB/s"
    return "\n".join(
        (
            f"{result['encoding']} ({result['dtype']}): {one:.1f} tokens/s; {batch} prompts together {together:.1f}, "
            f"{result['batch_speedup']:.2f} ×",
            f"  at position {at['early']} {ms['early']:.2f} ms a token, {weights}; "
            f"at position {at['late']} {ms['late']:.2f} ms, {result['late_over_early']:.2f} ×",
            f"  {times:.1f} × as fast as without the cache, {more:.1f} × where that has the head at every position",
        )
    )
