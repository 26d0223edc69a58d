"""A model in training, as train.py trains it, whose steps are taken one at a time to be timed."""

import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from config import Config, load_config
from data import Batches, TokenStream
from distributed import Distributed
from eval_ppl import evaluate
from kernels.attention import chosen
from model import GPT
from text.shards import write_shard
from training.guard import Guard
from training.optim import make_optimizer
from training.run import Run
from training.step import update


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
        self.run.save_due(step)
        self.run.log(step, **update(step, self.net, self.optimizer, self.batches, self.guard, self.dist, self.cfg))

    def bare(self) -> None:
        """Forward, backward, optimizer; nothing else."""
        for micro in range(self.batches.grad_accum):
            with self.dist.sync_if(self.net, micro == self.batches.grad_accum - 1):
                with self.dist.autocast():
                    loss = self.net(*self._batch) / self.batches.grad_accum
                loss.backward()
        self.optimizer.step()
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
            "attention": chosen(q_BHTD),
            "peak_memory_bytes": dist.peak_memory(),
        }


def bench_config(words: list[str], micro_steps: int, candidate: str | None = None, data: str | None = None) -> Config:
    """The configuration of `words`, whose step is `micro_steps` micro-batches on each device.

    A `candidate` is an encoding, or an encoding and options: rope,kernel=triton.
    """
    encoding, *options = candidate.split(",") if candidate else [""]
    extra = [f"--encoding={encoding}", *(f"--{option}" for option in options)] if candidate else []
    cfg = load_config([*words, *extra, *([f"--data={data}"] if data else [])])
    tokens = micro_steps * cfg.micro_batch * cfg.block_size * int(os.environ.get("WORLD_SIZE", "1"))
    return cfg.model_copy(update={"tokens_per_step": tokens})


@contextmanager
def bench_data(cfg: Config, synthetic: bool) -> Iterator[Config]:
    """`cfg`, with random tokens for its data where `synthetic`; they are deleted at the end."""
    with tempfile.TemporaryDirectory(prefix="bench-data-") as folder:
        if synthetic:
            rng, n = np.random.default_rng(1), max(1 << 20, 2 * cfg.tokens_per_step)
            for name in ("val_000000.bin", "train_000001.bin"):
                write_shard(Path(folder) / name, rng.integers(0, min(50257, cfg.vocab_size), n, dtype=np.uint16))
            cfg = cfg.model_copy(update={"data": folder})
        yield cfg
