"""The run folder: configuration, environment, logs, checkpoints, resume, and leaving in order when asked to.

runs/NAME/ holds config.toml, env.json (one entry per start), log.jsonl (one object per record), checkpoints/.
"""

import json
import math
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from checkpoint import (
    list_checkpoints,
    load_optimizer,
    load_weights,
    newest_checkpoint,
    prune_checkpoints,
    save_checkpoint,
    set_aside_newer,
)
from config import FREE_ON_RESUME, Config, to_toml
from data import TokenStream
from distributed import Distributed
from errors import EXIT_REQUEUE, UserError
from files import atomic_write, write_json
from model import GPT
from provenance import environment, git_version
from trackers import Progress, make_trackers


class Run:
    """What a run leaves behind. Every rank holds one, only rank 0 writes."""

    def __init__(self, cfg: Config, dist: Distributed) -> None:
        self.cfg, self.dist = cfg, dist
        self.folder = Path(cfg.out_dir) / cfg.name
        self.stopping = False
        self._signal: int | None = None
        self._log_file: Any = None
        self._val_loss: float | None = None
        self._start, self._clock, self._steps_timed = 0, time.perf_counter(), 0
        self._saved = 0

    def resume(self, model: GPT, optimizer: Optimizer, data: TokenStream) -> int:
        """Load the newest valid checkpoint, if any; returns the step to go on from, 0 for a fresh run.

        Raises UserError where the run in this folder was started with another configuration or other data.
        """
        self._identity = {"tokenizer": data.tokenizer, "train_tokens": len(data)}
        found = self.dist.from_main(newest_checkpoint(self.folder) if self.dist.is_main else None)
        state: dict[str, Any] = {"step": 0, "log_bytes": 0}
        if found:
            path, state = found
            check_same(state, self.cfg, self._identity)
            load_weights(path, model)
            load_optimizer(path, optimizer)
            self._val_loss = state["val_loss"]
        self._start = state["step"]
        if self.dist.is_main and not self.finished:
            if found:
                set_aside_newer(self.folder, path)
            self._open(state["log_bytes"], model)
        return self._start

    @property
    def finished(self) -> bool:
        """Whether the run had reached its last step when it was resumed."""
        return self._start == self.cfg.steps

    def steps(self, start: int) -> Iterator[int]:
        """`start` … cfg.steps, one more than there are updates: the last pass only evaluates and saves."""
        if self.finished:
            if self.dist.is_main:
                print(f"{self.folder}: finished at step {start} already, nothing to do")
            return
        self._bar = Progress(self.cfg, start, self.dist.is_main)
        self._restart_clock()
        handlers = {number: signal.signal(number, self._on_signal) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            for step in range(start, self.cfg.steps + 1):
                yield step
                self._bar.update()
        finally:  # an error on the way gives them back, too
            for number, handler in handlers.items():
                signal.signal(number, handler)

    def eval_due(self, step: int) -> bool:
        """Every eval_every steps and at the end, but not where the resumed log has it already."""
        due = step % self.cfg.eval_every == 0 or step == self.cfg.steps
        return due and (step > self._start or step == 0)

    def save_due(self, step: int) -> bool:
        """Every save_every steps, at the end, and when any rank was asked to leave. All ranks must ask."""
        self.stopping = self.dist.any(self._signal is not None)
        due = step % self.cfg.save_every == 0 or step == self.cfg.steps or self.stopping
        return due and step > self._start

    def save(self, step: int, model: GPT, optimizer: Optimizer) -> None:
        """Write a checkpoint; only when it is safe are old ones deleted."""
        if self.dist.is_main:
            state = {
                "tokens": step * self.cfg.tokens_per_step,
                "config": self.cfg.model_dump(),
                **self._identity,
                "val_loss": self._val_loss,
                "log_bytes": self._log_file.tell(),
                "git": git_version(),
            }
            try:
                save_checkpoint(self.folder, step, model, optimizer, state)
            except OSError as error:
                raise UserError(
                    f"{self.folder}: checkpoint of step {step} not written ({error}); older ones are whole"
                ) from None
            prune_checkpoints(self.folder, self.cfg.keep_checkpoints)
        self.dist.barrier()
        self._saved = step
        self._restart_clock()

    def guard(self, step: int, loss: Tensor, grad_norm: Tensor) -> None:
        """Stop every rank before NaN or infinity reaches the weights. Both values are means over ranks."""
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            kept = [path.name for path in list_checkpoints(self.folder)[-1:]]
            raise UserError(
                f"step {step}: loss {loss.item()}, gradient norm {grad_norm.item()}; stopped before the update, "
                f"the last checkpoint is {kept[0] if kept else 'none yet'}; a lower --lr (now {self.cfg.lr}) may help"
            )

    def log(self, step: int, **values: float) -> None:
        """Append a record: `values` and what they cost. Validation records are those with a val_loss."""
        validation = "val_loss" in values
        if validation:
            self._val_loss = values["val_loss"]
        else:
            self._steps_timed += 1
            if step % self.cfg.log_every:
                return
        if self.dist.is_main:
            record: dict[str, Any] = {"step": step, "tokens": step * self.cfg.tokens_per_step, **values}
            if not validation:
                record |= self._cost()
            self._log_file.write(json.dumps(record).encode() + b"\n")
            self._log_file.flush()
            for tracker in self._trackers:
                tracker.log(record)
            self._bar.show(record)
        self._restart_clock()

    def close(self) -> int:
        """Exit code of the run: 0 when it is finished, EXIT_REQUEUE when a signal ended it early."""
        early = self.stopping and self._saved < self.cfg.steps
        if self.dist.is_main and self._log_file:
            self._bar.close()
            self._log_file.close()
            for tracker in self._trackers:
                tracker.close()
            if early:
                saved = f"saved at step {self._saved}" if self._saved else "nothing new to save"
                print(f"{self.folder}: {saved}, left when asked to; the same command goes on from here", file=sys.stderr)
        return EXIT_REQUEUE if early else 0

    def _on_signal(self, number: int, _frame: Any) -> None:
        self._signal = number
        if self.dist.is_main:  # os.write: print is not safe in a signal handler
            os.write(2, f"\n{signal.Signals(number).name}: saving and leaving after this step\n".encode())

    def _restart_clock(self) -> None:
        self._clock, self._steps_timed = time.perf_counter(), 0

    def _cost(self) -> dict[str, float | None]:
        """tokens/s over all devices, model FLOPs utilization (None where the peak is unknown), peak bytes of rank 0."""
        rate = self._steps_timed * self.cfg.tokens_per_step / (time.perf_counter() - self._clock)
        peak = self.dist.peak_flops()
        mfu = rate * self.cfg.flops_per_token / (peak * self.dist.world_size) if peak else None
        return {"tokens_per_second": round(rate, 1), "mfu": mfu, "peak_memory_bytes": self.dist.peak_memory()}

    def _open(self, log_bytes: int, model: GPT) -> None:
        """Describe this start, on the terminal too, and open the log, cut to what the checkpoint had seen."""
        env, log = self.folder / "env.json", self.folder / "log.jsonl"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            starts = json.loads(env.read_text()) if self._start and env.exists() else []
            this_start = environment(self.dist, self._start) | {"n_params": model.n_params()}
            write_json(env, [*starts, this_start])
            with atomic_write(self.folder / "config.toml", "w") as file:
                file.write(to_toml(self.cfg))
            if log.exists():
                os.truncate(log, min(log_bytes, log.stat().st_size))
            self._log_file = open(log, "ab")  # noqa: SIM115
        except OSError as error:
            raise UserError(f"{self.folder}: cannot be written ({error.strerror}); --out_dir says where runs go") from None
        self._trackers = make_trackers(self.cfg, self.folder)
        n = this_start["n_params"]
        print(
            f"{self.folder}: {self.cfg.encoding}, {n['total']:,} parameters ({n['embedding']:,} of the embedding and head, "
            f"{n['encoding']:,} of positions), {self.dist.world_size} × {this_start['device']} in {this_start['dtype']}, "
            f"from step {self._start}",
            file=sys.stderr,
        )


def check_same(state: dict[str, Any], cfg: Config, data: dict[str, Any]) -> None:
    """Raise UserError where the run of a checkpoint's `state` computes something else than `cfg` on `data` would."""
    before, now = state["config"] | {key: state[key] for key in data}, cfg.model_dump() | data
    differing = [key for key in now if key not in FREE_ON_RESUME and before.get(key, now[key]) != now[key]]
    if differing:
        what = ", ".join(f"{key} = {before[key]!r} (now {now[key]!r})" for key in differing)
        folder = Path(cfg.out_dir) / cfg.name
        raise UserError(f"{folder}: holds a run with {what}; give this one another --name or --out_dir, or the same values")
