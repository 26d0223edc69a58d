"""One step of a run once more, micro-step by micro-step: what was in the batch that blew up, and where it began.

    python train.py config/small.toml config/carope.toml --replay_step=4711

goes to the newest checkpoint at or before the step, takes the steps between, and shows the step. The run folder is only read.
"""

from collections.abc import Iterator
from pathlib import Path

from core.checkpoint import State, newest_checkpoint
from core.errors import UserError
from core.guard import MicroStep, inspect_step
from core.run import Run
from model import GPT


class Replay(Run):
    """A run that ends before cfg.replay_step is taken, shows it, and leaves nothing behind."""

    def _find(self) -> tuple[Path, State] | None:
        if self.cfg.replay_step >= self.cfg.steps:
            raise UserError(f"replay_step = {self.cfg.replay_step}: the run's steps are 0 to {self.cfg.steps - 1}")
        return newest_checkpoint(self.folder, at_most=self.cfg.replay_step)

    def _open(self, found: tuple[Path, State] | None, model: GPT) -> None:
        pass

    @property
    def finished(self) -> bool:
        """A finished run can be replayed, too."""
        return False

    def steps(self, start: int) -> Iterator[int]:
        """`start` … cfg.replay_step − 1; then the step itself is computed, not taken, and shown."""
        if self.dist.is_main:
            print(f"{self.folder}: from step {start} to step {self.cfg.replay_step}", flush=True)
        yield from range(start, self.cfg.replay_step)
        rows = inspect_step(self._guard.model, self._guard.batches, self.cfg.replay_step, self.dist)
        if self.dist.is_main:
            print(render(self.cfg.replay_step, rows))

    def eval_due(self, step: int) -> bool:
        """Never: a validation changes nothing that follows."""
        return False

    def save_due(self, step: int) -> bool:
        """Never."""
        return False

    def log(self, step: int, **values: float) -> None:
        """Nothing."""

    @property
    def exit_code(self) -> int:
        """0: it came to its end."""
        return 0


def render(step: int, rows: list[MicroStep]) -> str:
    """A line per micro-step and rank: loss, gradient norm, tokens, and the first thing that is not finite."""
    lines = [f"step {step}", f"{'micro-step':>10} {'rank':>5} {'loss':>10} {'grad norm':>10}  batch"]
    for row in rows:
        bad = f"; first not finite: {row.first}" if row.first else ""
        lines.append(f"{row.micro:>10} {row.rank:>5} {row.loss:>10.4f} {row.grad_norm:>10.4f}  {row.tokens}{bad}")
    return "\n".join(lines)
