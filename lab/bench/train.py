"""Training: tokens/s, MFU and memory of a step, each encoding beside the others and beside another checkout's model.

    python -m lab.bench train config/tiny.toml --micro_batch=4 --encodings rope carope
    python -m lab.bench train config/small.toml --synthetic --vs ../nanoGPT --vs ../build-nanogpt
    python -m lab.bench train config/small.toml --synthetic --encodings rope rope,kernel=triton rope,residual=bfloat16

Each candidate is a process of its own; in every round each takes one turn, in an order drawn anew, and also times the
matmul that MFU is measured against. `bare` is forward, backward and optimizer alone, on tokens that are there already. Ratios
are of tokens/s, to the first candidate of the same shape.
"""

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from core.config import Config
from core.console import new_file
from core.distributed import pick_device
from core.errors import UserError, at_least
from core.measure import speedup, spread
from core.sweep.trial import bench_config, bench_data
from lab.bench.peers import peer
from lab.bench.trainee import trainee
from lab.bench.turns import Candidate, start_all, take_turns

Pair = tuple[Candidate, Config]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Its flags; what is left of the command line is the configuration."""
    add = parser.add_argument
    add(
        "--encodings",
        nargs="+",
        metavar="NAME",
        help="encodings to compare, the baseline first; with options and files as rope,kernel=triton or rope,config/tiny.toml "
        "[default: the config's]",
    )
    add("--micro_steps", type=int, default=1, help="micro-batches of a step [default: 1]")
    add("--rounds", type=int, default=20, help="rounds that count, each times every candidate once [default: 20]")
    add("--warmup", type=int, default=3, help="rounds before, which do not count [default: 3]")
    add("--at_once", type=int, default=1, help="candidates that get ready (compile) at a time [default: 1]")
    add("--patience", type=float, help="seconds after which who is not ready is left out [default: no limit]")
    add("--wait", action="store_true", help="when all are ready, wait for a line on stdin before the first round")
    add("--synthetic", action="store_true", help="random tokens instead of the config's shards")
    add("--no_bare", action="store_true", help="leave out the bare step")
    add(
        "--vs",
        action="append",
        default=[],
        metavar="PATH",
        help="checkout with a nanoGPT-style model.py or train_gpt2.py, at the first candidate's shape; options as above",
    )
    add(
        "--profile",
        type=new_file,
        metavar="FILE",
        help="also write a table of the operations of the slowest candidate of the first's shape",
    )


def run(args: argparse.Namespace, rest: list[str]) -> dict[str, Any]:
    """Time the candidates of the command line; prints a line each, returns the baseline's figures and all `results`.

    What is known is handed to `args.keep` after each round. Raises UserError, at the end, where a candidate failed.
    """
    if "WORLD_SIZE" in os.environ:
        raise UserError("lab.bench train: times one device; table1.py --preflight times the runs of all ranks")
    at_least(1, micro_steps=args.micro_steps, rounds=args.rounds, at_once=args.at_once)
    at_least(0, warmup=args.warmup)
    names = args.encodings or [bench_config(rest, 1).encoding]
    cfgs = [bench_config(rest, args.micro_steps, name) for name in names]
    shapes = [",".join([names[0].split(",")[0], *word.split(",")[1:]]) for word in args.vs]
    theirs = [bench_config(rest, args.micro_steps, words) for words in shapes]
    with bench_data(cfgs, args.synthetic) as cfgs:
        ours = [(trainee(name, cfg, not args.no_bare), cfg) for name, cfg in zip(names, cfgs, strict=True)]
        device = pick_device(cfgs[0].device)
        peers = [(peer(word, cfg, device), cfg) for word, cfg in zip(args.vs, theirs, strict=True)]
        everyone = [candidate for candidate, _ in (*peers, *ours)]
        keep: Callable[[], None] = lambda: args.keep(summarize(ours, peers, unfinished=True))  # noqa: E731
        try:
            start_all(everyone, args.at_once, args.patience)
            if args.wait:
                sys.stdin.readline()
            take_turns(everyone, args.rounds, args.warmup, keep)
            result = summarize(ours, peers)
            args.keep(result)
            if args.profile and (slowest := slowest_of(ours)):
                slowest.ask(f"profile {Path(args.profile).absolute()}")
        finally:
            for candidate in everyone:
                candidate.close()
    show(result)
    if result["failed"]:
        raise UserError("; ".join(f"{name}: {why}" for name, why in result["failed"].items()))
    return result


def shape(cfg: Any) -> tuple[int, ...]:
    """What two candidates must have in common for a ratio of their speeds to mean something."""
    return cfg.n_layer, cfg.n_head, cfg.n_embd, cfg.vocab_size, cfg.block_size, cfg.tokens_per_step


def slowest_of(ours: list[Pair]) -> Any:
    """The candidate with the longest step of those that are of the first's shape; None where all failed."""
    timed = [c for c, cfg in ours if c.seconds and not c.failure and shape(cfg) == shape(ours[0][1])]
    return max(timed, key=lambda c: spread(c.seconds["step"], 1)["ms_median"], default=None)


def summarize(ours: list[Pair], peers: list[Pair], unfinished: bool = False) -> dict[str, Any]:
    """The baseline's figures, those of all candidates in `results` and `peers`, and why others `failed`."""
    results = [figures(c, cfg, ours) for c, cfg in ours if c.seconds]
    theirs = [
        {"peer": c.name, "ours_over_theirs": round(1 / one["vs_baseline"], 4) if one["vs_baseline"] else None} | one
        for c, cfg in peers
        if c.seconds
        for one in [figures(c, cfg, ours)]
    ]
    return {
        **(results[0] if results else {}),
        "results": results,
        "peers": theirs,
        "failed": {c.name: c.failure for c, _ in (*ours, *peers) if c.failure},
    } | ({"unfinished": True} if unfinished else {})


def figures(candidate: Any, cfg: Any, ours: list[Pair]) -> dict[str, Any]:
    """What one candidate has come to so far."""
    seconds, about = candidate.seconds, dict(candidate.about)
    mm_flops, peak = about.pop("matmul_flops", None), about.pop("peak_flops", None)
    base = next((c for c, other in ours if c.seconds and shape(other) == shape(cfg)), None)
    common = min(len(seconds["step"]), len(base.seconds["step"])) if base else 0
    one = about | spread(seconds["step"], cfg.tokens_per_step)
    one["vs_baseline"] = speedup(seconds["step"][:common], base.seconds["step"][:common]) if base and common else None
    if mm_flops:
        mm, rate = spread(seconds["matmul"], 1), one["tokens_per_second"] * cfg.flops_per_token
        mm_rate = 1e3 * mm_flops / mm["ms_median"]
        one |= {
            "mfu_measured": round(rate / mm_rate, 4),
            "mfu": round(rate / peak, 4) if peak else None,
            "data_wait_share": round(sum(seconds["waiting"]) / sum(seconds["step"]), 5),
            "matmul_tflops": round(mm_rate / 1e12, 4),
            "matmul_ms": [mm["ms_p10"], mm["ms_median"], mm["ms_p90"]],
        }
    if "bare" in seconds:
        bare = spread(seconds["bare"], cfg.tokens_per_step)["ms_median"]
        one |= {"bare_ms_median": bare, "whole_over_bare": speedup(seconds["bare"], seconds["step"])}
    return one | {"config": cfg.model_dump(exclude={"name", "out_dir"})}


def show(result: dict[str, Any]) -> None:
    """The result for people."""
    before = None
    for one in (*result["results"], *result["peers"]):
        cfg = one["config"]
        size = (
            f"{cfg['n_layer']} layers, {cfg['n_head']} heads, width {cfg['n_embd']}, {cfg['micro_batch']} × {cfg['block_size']}"
        )
        if size != before:
            print(size if before else f"{size}, {one['dtype']}; matmul {one['matmul_tflops']:.3f} TFLOP/s")
            if "flops_per_token" in one:
                print(f"{one['flops_per_token']:,} FLOPs per token = 6 (12 L C² + V C) + 12 L C T")
            columns = "".join(f"{name:>10}" for name in ("ms", "p10", "p90"))
            print(f"{'':28}{columns}{'tokens/s':>12}{'ratio':>8}{'MFU':>8}{'bare':>8}{'GB':>8}")
            before = size
        print(row(one))
    for name, why in result["failed"].items():
        print(f"{name:28}{why}")
    print(
        "ratio: of tokens/s, to the first of the same shape; MFU: of the matmul rate; bare: whole step over forward, backward,"
    )
    print("optimizer; GB: peak memory of the process, on a GPU that of its tensors")


def row(one: dict[str, Any]) -> str:
    """A candidate's line."""
    spread = "".join(f"{one[key]:>10.1f}" for key in ("ms_median", "ms_p10", "ms_p90"))
    shares = [f"{one['vs_baseline']:.3f}" if one["vs_baseline"] else "–"]
    shares.append(f"{one['mfu_measured']:.1%}" if "mfu_measured" in one else "–")
    shares.append(f"{one['whole_over_bare']:.3f}" if "whole_over_bare" in one else "–")
    rest = "".join(f"{share:>8}" for share in (*shares, f"{one['peak_memory_bytes'] / 1e9:.2f}"))
    return f"{one.get('candidate') or one['peer']:28}{spread}{one['tokens_per_second']:>12,.0f}{rest}"
