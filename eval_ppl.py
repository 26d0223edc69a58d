"""Perplexity of runs or checkpoints at several lengths, on the same tokens at every length.

    python eval_ppl.py runs/small-carope runs/small-rope --lengths 512 1024
    torchrun --standalone --nproc_per_node=2 eval_ppl.py runs/small-carope --json results.json
    python eval_ppl.py runs/small-rope --lengths 1024 2048 --rope_scaling yarn --scale 4
    python eval_ppl.py runs/small-carope --lengths 512 2048 8192 --stride 256 --figure position.png

Windows do not overlap: with length T, window w predicts tokens wT+1 … wT+T from the at most T tokens before each inside
the window, the last window is what is left. So every token of the evaluation set but the first is predicted exactly
once, whatever T is. Perplexity is exp of the mean of their negative log-likelihoods. With --stride S windows begin S tokens
after each other and only the last S tokens of each count, of the first all: the same tokens, each with more before it.
"""

import argparse
import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import system.host  # noqa: F401  before torch, which reads what it sets
from system.console import CommandLine, help_first, no_bar


def parse_args() -> argparse.Namespace:
    """The command line; abbreviations are not taken."""
    parser = CommandLine(__doc__)
    add = parser.add_argument
    add("runs", nargs="+", metavar="RUN", help="run folder (its newest valid checkpoint) or checkpoint folder")
    add("--lengths", nargs="+", type=int, default=[512, 1024], metavar="T", help="window lengths, tokens [default: 512 1024]")
    add("--max_tokens", "--max-tokens", type=int, default=0, help="evaluate the first so many tokens only [default: all]")
    add("--stride", type=int, default=0, metavar="S", help="tokens from one window to the next [default: its length]")
    add("--per_position", "--per-position", action="store_true", help="loss against position in the window, into the JSON too")
    add("--figure", metavar="FILE.png", help="draw it; implies --per_position")
    add("--batch", type=int, default=0, help="windows per forward pass [default: what fits in about a gigabyte of logits]")
    add("--data", help="folder of token shards [default: the one the run was trained on]")
    add("--device", choices=["auto", "cuda", "mps", "cpu"], default="auto", help="[default: auto, the first that is there]")
    add("--dtype", choices=["auto", "bfloat16", "float32"], help="autocast type [default: the one the run was trained with]")
    add(
        "--rope_scaling",
        "--rope-scaling",
        choices=["linear", "ntk", "dynamic", "yarn"],
        help="scale the phases of RoPE or CARoPE to windows beyond the training length, untrained [default: no scaling]",
    )
    add(
        "--scale",
        type=float,
        help="of --rope_scaling, at least 1: evaluation length over training length, the run's block_size",
    )
    add("--json", metavar="FILE", help="also write the results as a list of JSON objects")
    add(
        "--wandb",
        action="store_true",
        help="also put each run's results into its own run at Weights & Biases, online or offline as it was trained: "
        "the table `perplexity` and summary values as perplexity/512",
    )
    return parser.parse_args()


if __name__ == "__main__":
    help_first(parse_args)

import torch
from torch import nn
from tqdm import tqdm

from data import TokenStream
from distributed import Distributed, local_and_eager, pick_dtype
from evaluation.windows import Profile, Windows, losses
from model import GPT
from positional.base import widest
from positional.scaling import SCALINGS, rescale
from system.errors import UserError, command
from system.files import write_json
from system.fsdp import is_sharded, uncompiled
from training.checkpoint import load_model
from training.provenance import git_version
from training.upload import tracked, upload


@dataclass(frozen=True)
class Evaluation:
    """Mean negative log-likelihood per token in nats, its standard error over windows, and the number of tokens."""

    nll: float
    nll_stderr: float
    tokens: int

    @property
    def perplexity(self) -> float:
        return math.inf if self.nll > 700 else math.exp(self.nll)

    @property
    def stderr(self) -> float:
        """Standard error of the perplexity, to first order."""
        return self.perplexity * self.nll_stderr


def evaluate(
    net: nn.Module,
    stream: TokenStream,
    length: int,
    batch: int,
    dist: Distributed,
    max_tokens: int = 0,
    progress: bool = False,
    before_each: Callable[[], object] | None = None,
    stride: int = 0,
    profile: Profile | None = None,
) -> Evaluation:
    """Evaluate `net` in windows of `length`, `batch` windows at a time, sharded over ranks; every rank must call it.

    `max_tokens` limits the targets to the first so many; 0 is all of the stream. `before_each` is called before each batch,
    the same number of times on every rank; what it raises ends the evaluation. `stride` is that of the windows, 0 their length;
    a `profile` takes in the loss against position.
    """
    local, eager = local_and_eager(net)  # odd-shaped batches go to the eager model: compiling for them does not pay
    n_tokens = min(len(stream) - 1, max_tokens or len(stream))
    windows = Windows(n_tokens, length, stride or length)
    n_windows = len(windows)
    chunks = list(windows.chunks(batch))
    rounds = [chunks[i : i + dist.world_size] for i in range(0, len(chunks), dist.world_size)]
    sums_W = torch.zeros(n_windows, dtype=widest(dist.device), device=dist.device)
    training = eager.training
    eager.eval()
    try:
        with torch.no_grad(), dist.autocast():
            for done, at_once in enumerate(tqdm(rounds, unit="batch", leave=False, disable=no_bar() if progress else True)):
                dist.at(f"evaluation, batch {done} of {len(rounds)}")
                if before_each:
                    before_each()
                idle = dist.rank >= len(at_once)  # the last round may have no batch for this rank
                if idle and not is_sharded(eager):
                    continue
                first, count, width = at_once[0 if idle else dist.rank]  # a shard is needed by the others: it comes along
                x_BT, y_BT = windows.read(stream, first, count, width, dist.device)
                regular = (count, width) == (batch, length)
                with nullcontext() if regular else uncompiled(eager):
                    nll_BT = losses(local if regular else eager, x_BT, y_BT)
                if not idle:
                    sums_W[first : first + count] = windows.counted(nll_BT, first).sum(1)
                if profile and not idle:
                    profile.add(nll_BT)
    finally:
        eager.train(training)
    dist.sum_(sums_W)
    if profile:
        dist.sum_(profile.moments_3K)
    sizes_W = windows.sizes(dist.device)
    nll = (sums_W.sum() / n_tokens).item()
    spread = (sums_W - nll * sizes_W).square().sum().item()
    stderr = math.sqrt(spread * n_windows / (n_windows - 1)) / n_tokens if n_windows > 1 else math.nan
    return Evaluation(nll, stderr, n_tokens)


def evaluate_run(
    path: str | Path,
    lengths: Sequence[int],
    dist: Distributed,
    *,
    max_tokens: int = 0,
    batch: int = 0,
    data: str | None = None,
    dtype: str | None = None,
    rope_scaling: str | None = None,
    scale: float | None = None,
    stride: int = 0,
    per_position: bool = False,
) -> list[dict[str, Any]]:
    """One result per length for the run or checkpoint at `path`; nulls where its encoding has no positions.

    What is not given is as the run had it (`data`, `dtype`) or fits into memory (`batch`). With `rope_scaling`, a name in
    positional.scaling.SCALINGS, phases are scaled by `scale`.
    """
    model, state, folder = load_model(path)
    scale_phases(model, rope_scaling, scale)
    dist.dtype = pick_dtype(dtype or model.cfg.dtype, dist.device)
    model.to(dist.device)
    stream = TokenStream(data or model.cfg.data, "val", model.cfg.vocab_size)
    if stream.tokenizer != state.tokenizer:
        raise UserError(f"{stream.folder}: tokenized by {stream.tokenizer!r}, but {path} was trained on {state.tokenizer!r}")
    results = []
    for length in lengths:
        result = {
            "run": model.cfg.name, "encoding": model.cfg.encoding, "n_params": model.n_params()["total"], "length": length,
            "tokens": None, "nll": None, "perplexity": None, "stderr": None, "step": state.step,
            "dtype": str(dist.dtype).removeprefix("torch."), "git": git_version(), "checkpoint": str(folder),
            "max_tokens": max_tokens, "rope_scaling": rope_scaling, "scale": scale,
            "stride": stride or length, "block_size": model.cfg.block_size,
        }  # fmt: skip
        if model.max_len is None or length <= model.max_len:
            windows = batch or default_batch(length, model.cfg.vocab_size)
            profile = Profile(length, dist.device) if per_position else None
            found = evaluate(
                model, stream, length, windows, dist, max_tokens, progress=dist.is_main, stride=stride, profile=profile
            )
            stderr = None if math.isnan(found.stderr) else found.stderr  # of a single window it is unknown
            result |= {"tokens": found.tokens, "nll": found.nll, "perplexity": found.perplexity, "stderr": stderr}
            result |= {"per_position": profile.summary()} if profile else {}
        results.append(result)
    return results


def scale_phases(model: GPT, rope_scaling: str | None, scale: float | None) -> None:
    """Set the scaling that is asked for, from the length that `model` was trained at. Raises UserError where it cannot be."""
    if (rope_scaling is None) != (scale is None):
        missing = "--scale" if scale is None else "--rope_scaling"
        raise UserError(
            f"{missing} is missing: --rope_scaling says how to scale phases and --scale by how much, e.g. yarn and 4"
        )
    if rope_scaling is not None and scale is not None:
        try:
            rescale(model.encodings, model.cfg.encoding, SCALINGS[rope_scaling](scale, model.cfg.block_size))
        except ValueError as error:
            raise UserError(f"--{error}") from None


def default_batch(length: int, vocab_size: int) -> int:
    """Windows per forward pass that keep the fp32 logits near a gigabyte."""
    return max(1, 2**28 // (length * vocab_size))


def render(results: list[dict[str, Any]]) -> str:
    """The results as a table: a row per run, a column per length, – where there is none."""
    lengths = list(dict.fromkeys(r["length"] for r in results))
    rows: dict[tuple, dict[int, str]] = {}
    for r in results:
        spread = f" ± {r['stderr']:.2f}" if r["stderr"] is not None else ""
        cell = "–" if r["perplexity"] is None else f"{r['perplexity']:.2f}{spread}"
        scaled = f" {r['rope_scaling']}×{r['scale']:g}" if r.get("rope_scaling") else ""
        rows.setdefault((r["run"], r["encoding"] + scaled, r["step"]), {})[r["length"]] = cell
    table = [("run", "encoding", "step", *map(str, lengths))]
    table += [(run, encoding, str(step), *(cells[n] for n in lengths)) for (run, encoding, step), cells in rows.items()]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return "\n".join(
        "  ".join(cell.rjust(w) if i > 1 else cell.ljust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True)))
        for row in table
    )


@command
def main() -> None:
    """Evaluate the runs of the command line, print the table, write the JSON."""
    args = parse_args()
    for flag, smallest, values in (
        ("lengths", 1, args.lengths),
        ("max_tokens", 0, [args.max_tokens]),
        ("batch", 0, [args.batch]),
        ("stride", 0, [args.stride]),
    ):
        if min(values) < smallest:
            raise UserError(f"--{flag} = {min(values)}: must be at least {smallest}")
    if args.stride > min(args.lengths):
        shortest = f"the shortest of --lengths = {min(args.lengths)}"
        raise UserError(f"--stride = {args.stride}: tokens between windows would not count; must be at most {shortest}")
    for path in filter(None, (args.json, args.figure)):
        if not Path(path).absolute().parent.is_dir():
            raise UserError(f"{path}: its folder is not there; make it first")
    for path in args.runs if args.wandb else []:
        tracked(path)
    with Distributed.start(args.device, args.dtype or "auto") as dist:
        results: list[dict[str, Any]] = []
        for path in args.runs:
            options = {"max_tokens": args.max_tokens, "batch": args.batch, "data": args.data, "dtype": args.dtype}
            options |= {"rope_scaling": args.rope_scaling, "scale": args.scale}
            options |= {"stride": args.stride, "per_position": args.per_position or bool(args.figure)}
            results += evaluate_run(path, args.lengths, dist, **options)
            if dist.is_main and args.json:  # after each run: what is evaluated is kept, whatever happens to the next
                write_json(Path(args.json), results)
        if dist.is_main and args.figure:
            from evaluation.figures import draw_profiles

            draw_profiles(results, Path(args.figure))
        if dist.is_main:
            print(render(results))
            tokens = max((r["tokens"] or 0 for r in results), default=0)
            print(f"perplexity ± standard error over windows, {tokens:,} tokens, {results[0]['dtype']} on {dist.device.type}")
        with dist.together():  # last: whatever happens to it, the results are there
            for i, path in enumerate(args.runs if args.wandb and dist.is_main else []):
                upload(path, results[i * len(args.lengths) :][: len(args.lengths)])


if __name__ == "__main__":
    main()
