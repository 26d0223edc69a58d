"""table1.py with faults inside, for the preflight to find: a rank without memory, one that goes astray, a disk of a megabyte.

Only the faults are arranged, each on rank 1 of one encoding's run; what happens then is the preflight's own doing.
"""

import os
import shutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch

import table1
from core.sweep import trial
from model import GPT

ON_RANK_1 = os.environ.get("RANK") == "1"
forward, update, disk_usage = GPT.forward, trial.take_step, shutil.disk_usage


def forward_without_memory(model: GPT, *args: torch.Tensor, **options: object) -> torch.Tensor:
    """What a GPU says that is full, in a run of `learned`."""
    if ON_RANK_1 and model.cfg.encoding == "learned":
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has a total capacity of …")
    return forward(model, *args, **options)


def update_that_goes_astray(step: int, net: torch.nn.Module, *args: object) -> dict[str, float]:
    """A step after which one weight is another, in a run of `nope`."""
    seen = update(step, net, *args)
    if ON_RANK_1 and trial_encoding(net) == "nope":
        with torch.no_grad():
            next(net.parameters()).view(-1)[0] += 1
    return seen


def trial_encoding(net: torch.nn.Module) -> str:
    """The encoding of what `Distributed.wrap` returned."""
    return getattr(net, "module", net).cfg.encoding


GPT.forward = forward_without_memory  # type: ignore[method-assign]
trial.take_step = update_that_goes_astray  # type: ignore[assignment]
shutil.disk_usage = lambda path: disk_usage(path)._replace(free=1_000_000)

if __name__ == "__main__":
    table1.main()
