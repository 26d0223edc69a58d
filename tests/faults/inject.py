"""train.py with a fault inside: INJECT="what rank step micro" in the environment, what one of the names below.

Or lab.replay, after the word "replay".

INJECT_PATIENCE_S, where it is given, is --dist_timeout from that step on.

Only the place where the fault strikes is arranged; what happens then is the training code's own doing.
"""

import os
import signal
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch

import train
from core import data
from core.errors import command
from lab.replay import show
from model import GPT

WHAT, RANK, STEP, MICRO = (*os.environ["INJECT"].split(), "0", "0", "0")[:4]
PATIENCE_S = os.environ.get("INJECT_PATIENCE_S")
FIRST_START = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0"
read = data.Batches.__getitem__
forward = GPT.forward
struck = False


def poisoned_read(batches: data.Batches, index: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    """The batch; before it, or in what is computed from it, the fault."""
    global struck
    struck = (batches.dist.rank, *index) == (int(RANK), int(STEP), int(MICRO))
    if struck and FIRST_START and WHAT == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    if struck and FIRST_START and WHAT == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    if index[0] == int(STEP) and FIRST_START and PATIENCE_S and batches.dist._watchdog:
        batches.dist._watchdog.timeout = float(PATIENCE_S)
    if struck and WHAT == "sleep":
        time.sleep(3600)
    return read(batches, index)


def poisoned_forward(model: GPT, *args: torch.Tensor, **options: object) -> torch.Tensor:
    """A loss that is NaN, whose gradient is NaN, or that is thirty times too large."""
    out = forward(model, *args, **options)
    if not struck or len(args) < 2:
        return out
    if WHAT == "nan_loss":
        return out * float("nan")
    if WHAT == "nan_gradient":
        return out + (0 * model.ln_f.bias.sum()).sqrt()
    return 30 * out if WHAT == "spike" else out


data.Batches.__getitem__ = poisoned_read  # type: ignore[method-assign]
GPT.forward = poisoned_forward  # type: ignore[method-assign]

if __name__ == "__main__":
    if sys.argv[1] == "replay":
        command(lambda: show(sys.argv[2:]))()
    command(train.main.__wrapped__)()
