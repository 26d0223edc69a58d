"""What must not reach the weights: numbers that are not finite, and, if asked, jumps of loss or gradient norm."""

import math
import statistics
import sys
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from core.checkpoint import list_checkpoints
from core.config import Config
from core.data import Batches
from core.distributed import Distributed
from core.errors import UserError
from core.fsdp import own_gradients

WINDOW, LEAST = 128, 32  # steps that the median is taken over; below the least nothing is called a jump
SIGMA_FLOOR = 0.01  # one percent: a loss that hardly moves must not make every wiggle a jump
MOST_SKIPS = 10  # in a row: what goes on for longer is no spike


class MicroStep(NamedTuple):
    """What one micro-step on one rank computed by itself, and on what.

    `first` is the first module whose output, or the first parameter whose gradient, is not finite; None where all are.
    """

    micro: int
    rank: int
    loss: float
    grad_norm: float
    tokens: str
    first: str | None

    @property
    def bad(self) -> bool:
        """Whether its loss or its gradient is not finite."""
        return not (math.isfinite(self.loss) and math.isfinite(self.grad_norm))


def inspect_step(model: nn.Module, batches: Batches, step: int, dist: Distributed) -> list[MicroStep]:
    """Every micro-step of `step` by itself, on all ranks, in the order of its tokens; the weights stay as they are."""
    model.zero_grad(set_to_none=True)
    with own_gradients(model):
        mine = [inspect_micro_step(model, batches, step, micro, dist) for micro in range(batches.grad_accum)]
    return sorted((m for rank in dist.gather(mine) for m in rank), key=lambda m: (m.micro, m.rank))


def inspect_micro_step(model: nn.Module, batches: Batches, step: int, micro: int, dist: Distributed) -> MicroStep:
    """One micro-step on this rank; no gradient is left of it."""
    x_BT, y_BT = batches[step, micro]
    with noting_bad_output(model) as bad, dist.autocast():
        loss = model(x_BT, y_BT)
    loss.backward()
    norms = {name: p.grad.norm() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    bad += [f"gradient of {name}" for name, norm in norms.items() if not norm.isfinite()]
    begin = batches.start(step, micro)
    return MicroStep(
        micro,
        dist.rank,
        loss.item(),
        torch.stack(list(norms.values())).norm().item(),
        f"{x_BT.numel():,} tokens from {begin:,} of the stream on ({batches.stream.locate(begin)})",
        bad[0] if bad else None,
    )


@contextmanager
def noting_bad_output(model: nn.Module) -> Iterator[list[str]]:
    """While entered, the first module of `model` whose output is not finite gets into the list, which is empty before."""
    names = {module: name or "the loss" for name, module in model.named_modules()}
    found: list[str] = []

    def look(module: nn.Module, _inputs: Any, output: Any) -> None:
        # detached: what a hook keeps for a backward pass is missing where a block is computed again, without the hook
        if not found and isinstance(output, Tensor) and not output.detach().isfinite().all():
            found.append(f"output of {names[module]}")

    handles = [module.register_forward_hook(look) for module in names]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


class Guard:
    """Stands between the gradients and the optimizer; `history` goes into checkpoints."""

    def __init__(self, cfg: Config, dist: Distributed, model: nn.Module, batches: Batches) -> None:
        self.cfg, self.dist, self.model, self.batches = cfg, dist, model, batches
        self._history = {"loss": deque[float](maxlen=WINDOW), "gradient norm": deque[float](maxlen=WINDOW)}
        self._skips = 0

    @property
    def history(self) -> dict[str, list[float]]:
        """Logarithms of the last losses and gradient norms, by name."""
        return {name: list(values) for name, values in self._history.items()}

    def restore(self, history: dict[str, list[float]]) -> None:
        """Go on from a checkpoint's `history`."""
        for name, values in self._history.items():
            values.extend(history.get(name, []))

    def passes(self, step: int, loss: float, grad_norm: float) -> bool:
        """Whether the optimizer may use this step's gradients. `loss` and `grad_norm` are the same on every rank.

        Raises UserError on all ranks where they are not finite, or jump and on_spike = stop.
        """
        values = {"loss": loss, "gradient norm": grad_norm}
        if not all(map(math.isfinite, values.values())):
            self._refuse(step, values)
        jumps = [] if self.cfg.on_spike == "off" else list(filter(None, map(self._jump, values, values.values())))
        self._skips = self._skips + 1 if jumps else 0
        if jumps:
            self._say(step, " and ".join(jumps))
            if self.cfg.on_spike == "skip":
                return False  # nor does it become part of what is usual
        for name, value in values.items():
            self._history[name].append(math.log(max(value, 1e-30)))
        return True

    def _jump(self, name: str, value: float) -> str | None:
        """In words, that `value` lies more than spike_threshold above what is usual; None where it does not."""
        past = self._history[name]
        if len(past) < LEAST:
            return None
        middle = statistics.median(past)
        sigma = max(SIGMA_FLOOR, 1.4826 * statistics.median(abs(x - middle) for x in past))
        above = (math.log(max(value, 1e-30)) - middle) / sigma
        if above <= self.cfg.spike_threshold:
            return None
        return f"{name} {value:.4g}, {above:.0f} robust standard deviations above its median {math.exp(middle):.4g}"

    def _say(self, step: int, jumps: str) -> None:
        then = {"warn": "the update is made", "skip": "the update is left out", "stop": "stopped before the update"}
        text = f"step {step}: {jumps}; {then[self.cfg.on_spike]}, `{self._replay(step)}` shows its micro-steps"
        if self.cfg.on_spike == "stop":
            raise UserError(f"{text}; {self._kept()}")
        if self.cfg.on_spike == "skip" and self._skips > MOST_SKIPS:
            raise UserError(f"{text}; it is the {self._skips}th step in a row, no spike but the way it goes; {self._kept()}")
        if self.dist.is_main:
            print(f"warning: {text}", file=sys.stderr)

    def _refuse(self, step: int, values: dict[str, float]) -> None:
        """Find out which batch on which rank it was, and raise UserError."""
        bad = [m for m in inspect_step(self.model, self.batches, step, self.dist) if m.bad]
        found = ", ".join(f"{name} {value}" for name, value in values.items())
        where = "each micro-step by itself is finite, their sum is not"
        if bad:
            where = f"first on rank {bad[0].rank}, micro-step {bad[0].micro}, {bad[0].tokens}, in the {bad[0].first}"
        raise UserError(
            f"step {step}: {found}; {where}; stopped before the update, {self._kept()}; `{self._replay(step)}` computes "
            f"it again, a lower --lr (now {self.cfg.lr}) may help"
        )

    def _replay(self, step: int) -> str:
        return f"python -m lab.replay {self.cfg.folder} {step}"

    def _kept(self) -> str:
        kept = [path.name for path in list_checkpoints(self.cfg.folder)[-1:]]
        return f"the last checkpoint is {kept[0] if kept else 'none yet'}"
