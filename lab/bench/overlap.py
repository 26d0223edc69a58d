"""Does the exchange of gradients hide behind the backward pass? Steps of the real model on two or more ranks, traced and timed.

    torchrun --standalone --nproc_per_node=2 -m lab.bench overlap config/demo.toml --micro_batch=16 --bucket_mb 0.1 1000

DDP exchanges gradients in buckets, each as soon as the last micro-step's backward has filled it. Steps with every bucket size
named, with torch's own (1 MiB, then 25 MiB each) and without any exchange (no_sync) are timed interleaved; then steps of each
bucket size are traced by torch.profiler, and the intervals of backward and exchange compared on each rank. Tokens are random.
On CPUs the ranks meet by gloo, whose threads take their time from the same cores: it shows that there is overlap, not what
NCCL gains by it.
"""

import argparse
import json
import os
import statistics
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch.nn.utils import clip_grad_norm_
from torch.profiler import ProfilerActivity, profile, record_function

from core.config import Config, grad_accum, load_config
from core.console import new_folder
from core.distributed import Distributed
from core.errors import UserError
from core.host import ranks
from core.measure import interleave, speedup, spread, synchronize
from core.optim import make_optimizer
from core.sweep.scaling import ddp_buckets
from core.tables import table
from model import GPT

Interval = tuple[float, float]
Event = dict[str, Any]  # of a Chrome trace: name, cat, ph; ts and dur in microseconds
PARTS = ("forward", "backward", "optimizer")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options; the configuration's own go beside them."""
    add = parser.add_argument
    add("--bucket_mb", nargs="+", type=float, default=[], metavar="MB", help="bucket sizes, MiB, beside torch's own")
    add("--rounds", type=int, default=20, help="timed steps of each [default: %(default)s]")
    add("--traced", type=int, default=5, help="traced steps of each [default: %(default)s]")
    add("--traces", type=new_folder, metavar="FOLDER", help="keep the Chrome traces there, for Perfetto")


def run(args: argparse.Namespace, rest: list[str]) -> dict[str, Any]:
    """Time, trace, compare; returns a result per bucket size. Raises UserError without ranks to exchange with."""
    for name in ("rounds", "traced", "bucket_mb"):
        values = getattr(args, name)
        for value in values if isinstance(values, list) else [values]:
            if value <= 0:
                raise UserError(f"--{name} = {value}: must be more than 0")
    if ranks().world_size < 2:
        raise UserError("overlap: needs two ranks or more; torchrun --standalone --nproc_per_node=2 -m lab.bench overlap …")
    cfg = load_config(rest)
    with Distributed.start(cfg.device, cfg.dtype, cfg.dist_timeout) as dist:
        sizes: dict[str, float | None] = {"torch's own": None} | {f"{mb:g} MiB": mb for mb in args.bucket_mb}
        steps = {name: Step(cfg, dist, mb) for name, mb in sizes.items()}
        alone = steps["torch's own"]
        candidates = {"no exchange": lambda: alone(exchange=False)} | steps
        seconds = interleave(candidates, args.rounds, warmup=2, device=dist.device)  # DDP forms its buckets in the first step
        timed = {name: spread(found, cfg.tokens_per_step) for name, found in seconds.items()}
        results = []
        for name, step in steps.items():
            traced = dist.gather(step.trace(args.traced, args.traces and Path(args.traces), name))
            speed = {"speed_over_no_exchange": speedup(seconds[name], seconds["no exchange"])}
            results.append({"buckets": name} | step.describe() | timed[name] | speed | {"ranks": traced})
        about = {"world_size": dist.world_size, "backend": step.backend, "cores": os.cpu_count()}
        if dist.is_main:
            print(f"{cfg.name}, {dist.world_size} ranks by {step.backend}\n\n{render(timed['no exchange'], results)}")
    return about | {"config": cfg.model_dump(), "no_exchange": timed["no exchange"], "results": results}


class Step:
    """A training step of a model of its own, as train.py's loop takes it, with DDP's buckets of `bucket_mb` MiB."""

    def __init__(self, cfg: Config, dist: Any, bucket_mb: float | None) -> None:
        self.cfg, self.dist, self.bucket_mb = cfg, dist, bucket_mb
        self.model = GPT(cfg).to(dist.device)
        self.optimizer = make_optimizer(self.model, cfg)
        self.net: Any = dist.wrap(self.model, cfg, **({} if bucket_mb is None else {"bucket_cap_mb": bucket_mb}))
        draw = torch.Generator().manual_seed(dist.rank)
        tokens = torch.randint(cfg.vocab_size, (cfg.micro_batch, cfg.block_size + 1), generator=draw)
        self.x_BT, self.y_BT = tokens[:, :-1].to(dist.device), tokens[:, 1:].to(dist.device)
        self.backend = torch.distributed.get_backend()

    def __call__(self, exchange: bool = True, traced: bool = False) -> None:
        """One step, and the wait for the slowest rank. Traced, the ranks begin the last backward together, its forward done."""
        accum = grad_accum(self.cfg, self.dist.world_size)
        for micro in range(accum):
            last = micro == accum - 1
            with self.dist.sync_if(self.net, last and exchange):
                with record_function("step: forward"), self.dist.autocast():
                    loss = self.net(self.x_BT, self.y_BT) / accum
                if traced and last:
                    self.dist.barrier()
                    synchronize(self.dist.device)
                with record_function("step: last backward" if last else "step: backward"):
                    loss.backward()
                    if traced and last:
                        synchronize(self.dist.device)
        with record_function("step: optimizer"):
            clip_grad_norm_(self.model.parameters(), self.cfg.grad_clip)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            if traced:
                synchronize(self.dist.device)
        self.dist.barrier()

    def trace(self, n: int, folder: Path | None, name: str) -> dict[str, float]:
        """Medians over `n` traced steps of this rank, in ms; the Chrome trace stays in `folder`, if there is one."""
        activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (self.dist.device.type == "cuda")
        with profile(activities=activities) as profiler:
            for _ in range(n):
                self(traced=True)
        with tempfile.TemporaryDirectory() as scratch:
            path = (folder or Path(scratch)) / f"{name.replace(' ', '_')}-rank{self.dist.rank}.json"
            path.parent.mkdir(parents=True, exist_ok=True)
            profiler.export_chrome_trace(str(path))
            return analyze(json.loads(path.read_text())["traceEvents"])

    def describe(self) -> dict[str, Any]:
        """Bytes of gradient in each bucket, as DDP formed them and as the model has it; bytes a rank sends in a step."""
        formed = [int(size) for size in self.net._get_ddp_logging_data()["rebuilt_bucket_sizes"].split(",")]
        caps = () if self.bucket_mb is None else (self.bucket_mb * 2**20,) * 2
        world = self.dist.world_size
        return {
            "bucket_bytes": formed,
            "predicted_bucket_bytes": ddp_buckets(self.cfg, *caps),
            "sent_bytes": 2 * (world - 1) * sum(formed) // world,  # a ring's, as in the model
        }


def analyze(events: Iterable[Event]) -> dict[str, float]:
    """Medians over the steps of one rank's trace, ms: the parts of a step, and how exchange and backward lie to each other.

    `backward_ms` is the last micro-step's computation from first to last, `exchange_ms` the time in which an exchange is under
    way, `overlapped_ms` the part of it within that backward, `exposed_ms` the part after it, `overlap` = overlapped ÷ exchange.
    On a GPU the intervals are those of kernels, on a CPU those of autograd's functions and of gloo's threads.
    """
    spans = [event for event in events if event.get("ph") == "X"]
    marks = [event for event in spans if event.get("cat") == "user_annotation"]
    on_gpu = any(event.get("cat") == "kernel" for event in spans)
    exchanges = [e for e in spans if is_exchange(e, on_gpu)]
    computing = [e for e in spans if is_computing(e, on_gpu)]
    steps = []
    for start, end in sorted(interval(e) for e in marks if e["name"] == "step: last backward"):
        inside = [interval(e) for e in computing if start <= e["ts"] <= end]
        backward = (min(a for a, _ in inside), max(b for _, b in inside))
        exchange = union(interval(e) for e in exchanges if start <= e["ts"] <= end)
        total = sum(b - a for a, b in exchange)
        hidden = sum(max(0.0, min(b, backward[1]) - max(a, backward[0])) for a, b in exchange)
        steps.append((backward[1] - backward[0], total, hidden, total - hidden))
    names = ("backward_ms", "exchange_ms", "overlapped_ms", "exposed_ms")
    found = {name: statistics.median(step[i] for step in steps) / 1e3 for i, name in enumerate(names)}
    found["overlap"] = statistics.median(hidden / total for _, total, hidden, _ in steps)
    for part in PARTS:
        seconds = sum(e["dur"] for e in marks if e["name"] in (f"step: {part}", f"step: last {part}"))
        found[f"step_{part}_ms"] = seconds / len(steps) / 1e3
    return {name: round(value, 4) for name, value in found.items()}


def is_exchange(event: Event, on_gpu: bool) -> bool:
    """Whether a span is a gradient exchange at work: a kernel of NCCL's, or gloo's worker."""
    if on_gpu:
        return event.get("cat") == "kernel" and event["name"].startswith("nccl")
    return event["name"].startswith("gloo:all_reduce")


def is_computing(event: Event, on_gpu: bool) -> bool:
    """Whether a span is computation, in a backward where it lies in one: any other kernel, or a function of autograd's."""
    if on_gpu:
        return event.get("cat") == "kernel" and not event["name"].startswith("nccl")
    return event["name"].startswith("autograd::engine::evaluate_function")


def interval(event: Event) -> Interval:
    """Start and end of a span, microseconds."""
    return event["ts"], event["ts"] + event["dur"]


def union(intervals: Iterable[Interval]) -> list[Interval]:
    """The same time as disjoint intervals, in order."""
    found: list[Interval] = []
    for start, end in sorted(intervals):
        if found and start <= found[-1][1]:
            found[-1] = (found[-1][0], max(found[-1][1], end))
        else:
            found.append((start, end))
    return found


def render(no_exchange: dict[str, Any], results: list[dict[str, Any]]) -> str:
    """A Markdown table, a row per bucket size; traced times are those of the rank that waited least in its exchange."""
    head = ["buckets", "number", "largest", "step, ms", "p10–p90", "speed ÷ no exchange", "backward, ms", "exchange, ms"]
    spread = f"{no_exchange['ms_p10']:.1f}–{no_exchange['ms_p90']:.1f}"
    rows = [["no exchange", "–", "–", f"{no_exchange['ms_median']:.1f}", spread, *"–––––"]]
    for r in results:
        rank = min(r["ranks"], key=lambda rank: rank["exchange_ms"])
        sizes = [str(len(r["bucket_bytes"])), f"{max(r['bucket_bytes']) / 1e6:.1f} MB"]
        times = [f"{r['ms_median']:.1f}", f"{r['ms_p10']:.1f}–{r['ms_p90']:.1f}", f"{r['speed_over_no_exchange']:.2f}"]
        traced = [f"{rank['backward_ms']:.1f}", f"{rank['exchange_ms']:.1f}", f"{rank['overlap']:.0%}"]
        traced += [f"{rank['exposed_ms']:.1f}"]
        rows.append([r["buckets"], *sizes, *times, *traced])
    return table([*head, "hidden", "after it, ms"], rows)
