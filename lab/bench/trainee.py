"""A model in training, as train.py trains it, whose steps are taken one at a time to be timed."""

import core.host  # noqa: F401  isort: skip  before torch, which reads what it sets

import json
import os
import random
import shutil
import sys
import tempfile
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend
from torch.profiler import ProfilerActivity, profile

from core.attention import blocks_pay
from core.config import Config
from core.console import QUIET
from core.data import Batches, TokenStream
from core.distributed import Distributed, peak_memory
from core.evaluate import evaluate
from core.guard import Guard
from core.measure import matmul, release, synchronize, turn
from core.optim import make_optimizer
from core.plugins import load, plugin_paths
from core.run import Run
from core.sweep.trial import take_step
from lab.bench.turns import Candidate, own_stdout, serve
from model import GPT


class TimedBatches(Batches):
    """Batches that add up the seconds one waits for them."""

    waited = 0.0

    def __getitem__(self, index: tuple[int, int]) -> tuple[Tensor, Tensor]:
        begin = time.perf_counter()
        batch = super().__getitem__(index)
        self.waited += time.perf_counter() - begin
        return batch


class Trainee:
    """Model, optimizer, data and run folder of `cfg`, in a folder that `close` deletes.

    `whole` takes a step with all that train.py does; `bare` is forward, backward and optimizer on one batch, always the same.
    """

    def __init__(self, cfg: Config, dist: Distributed, name: str = "") -> None:
        self.name = name or cfg.encoding
        self.scratch = Path(tempfile.mkdtemp(prefix="bench-"))
        never = {"steps": 2**40, "eval_every": 2**40, "save_every": 2**40, "name": "bench", "out_dir": str(self.scratch)}
        self.cfg, self.dist = cfg.model_copy(update=never), dist
        self.model = dist.shard(GPT(self.cfg), self.cfg)
        self.optimizer = make_optimizer(self.model, self.cfg)
        self.batches = TimedBatches(self.cfg, "train", dist)
        self.val = TokenStream(self.cfg.data, "val", self.cfg.vocab_size)
        self.guard = Guard(self.cfg, dist, self.model, self.batches)
        self.run = Run(self.cfg, dist)
        self.run.resume(self.model, self.optimizer, self.guard, [self.batches.stream, self.val])
        self.net = dist.wrap(self.model, self.cfg)
        self._steps = self.run.steps(0)
        self._batch = self.batches[0, 0]

    def whole(self) -> None:
        """What train.py does for a step."""
        step = next(self._steps)
        self.run.eval_due(step)
        self.run.save_due(step, last=self.run.asked_to_leave())
        self.run.log(step, **take_step(step, self.net, self.optimizer, self.batches, self.guard, self.dist, self.cfg))

    def bare(self) -> None:
        """Forward, backward, optimizer; nothing else."""
        for _ in range(self.batches.grad_accum):
            self.micro_step()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def micro_step(self) -> None:
        """Forward and backward on the one batch."""
        with self.dist.autocast():
            loss = self.net(*self._batch) / self.batches.grad_accum
        loss.backward()

    def discarded_micro_step(self) -> None:
        """A micro-step whose gradients are thrown away."""
        self.micro_step()
        self.optimizer.zero_grad(set_to_none=True)

    def evaluate(self) -> None:
        """As many tokens of the validation data as a step has of the training data."""
        cfg = self.cfg
        evaluate(self.net, self.val, cfg.block_size, cfg.micro_batch, self.dist, min(cfg.tokens_per_step, len(self.val) - 1))

    def close(self) -> None:
        """Close the run and delete its folder."""
        self.run.__exit__()
        shutil.rmtree(self.scratch, ignore_errors=True)

    def describe(self) -> dict[str, Any]:
        """What a result says of the model it timed; memory is that of the process so far."""
        cfg, dist = self.cfg, self.dist
        q_BHTD = torch.empty(1, cfg.n_head, cfg.block_size, cfg.n_embd // cfg.n_head, device=dist.device, dtype=dist.dtype)
        return {
            "encoding": cfg.encoding,
            "candidate": self.name,
            "n_params": self.model.n_params(),
            "flops_per_token": cfg.flops_per_token,
            "dtype": str(dist.dtype).removeprefix("torch."),
            "compiled": dist.compiles(cfg),
            "attention": chosen(q_BHTD),
            "peak_memory_bytes": peak_memory(dist.device),
        }

    def profile(self, path: Path) -> None:
        """Write a table of what three steps spend their time on, by operation and shape."""
        on_gpu = self.dist.device.type == "cuda"
        with profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU], record_shapes=True) as seen:
            for _ in range(3):
                self.whole()
        events = seen.key_averages(group_by_input_shape=True)
        path.parent.mkdir(parents=True, exist_ok=True)
        key = "self_cuda_time_total" if on_gpu else "self_cpu_time_total"
        path.write_text(events.table(sort_by=key, row_limit=60, max_name_column_width=100, max_shapes_column_width=60))


def chosen(q_BHTD: Tensor) -> str:
    """What core.attention runs for queries, keys and values like `q_BHTD` without a mask: "blocked", or torch's back-end."""
    if blocks_pay(q_BHTD):
        return "blocked"
    return SDPBackend(torch._fused_sdp_choice(q_BHTD, q_BHTD, q_BHTD, is_causal=True)).name.lower()


def trainee(name: str, cfg: Config, bare: bool) -> Candidate:
    """A trainee in a process of its own, whose turn is a `whole` step, a `bare` one where asked for, and a matmul."""
    return Candidate(
        name, "lab.bench.trainee", {"name": name, "config": cfg.model_dump(), "plugins": plugin_paths(), "bare": bare}
    )


def main() -> None:
    """Be what `trainee` starts."""
    answers, job = own_stdout(), json.loads(sys.argv[1])
    os.environ[QUIET] = "1"
    for path in job["plugins"]:
        load(path)
    cfg, begin = Config(**job["config"]), time.perf_counter()
    with Distributed.start(cfg.device, cfg.dtype) as dist, closing(Trainee(cfg, dist, job["name"])) as one:
        one.whole()
        synchronize(dist.device)
        about = one.describe() | {"first_step_seconds": round(time.perf_counter() - begin, 2)}
        mm, mm_flops = matmul(dist.device, dist.dtype)
        work = {"step": one.whole, "matmul": mm} | ({"bare": one.bare} if job["bare"] else {})
        order = random.Random(1)

        def answer(question: str) -> dict[str, Any]:
            if question != "turn":
                one.profile(Path(question.removeprefix("profile ")))
                return {}
            one.batches.waited = 0.0
            found = turn(work, order.sample(list(work), len(work)), dist.device, refill=one.discarded_micro_step)
            found["seconds"]["waiting"] = one.batches.waited
            return found

        release(dist.device)
        serve(answers, about | {"matmul_flops": mm_flops, "peak_flops": dist.peak_flops()}, answer)


if __name__ == "__main__":
    main()
