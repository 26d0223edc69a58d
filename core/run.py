"""The run folder: configuration, environment, logs, checkpoints, resume, and leaving in order when asked to.

runs/NAME/ holds config.toml, env.json (one entry per start), log.jsonl (one object per record), checkpoints/.
"""

import errno
import json
import math
import os
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import torch
from torch.optim import Optimizer

from core.checkpoint import FOLDER as CHECKPOINTS
from core.checkpoint import (
    CheckpointWriter,
    State,
    check_space,
    list_checkpoints,
    load_optimizer,
    load_weights,
    newest_checkpoint,
    peek,
    set_aside_newer,
)
from core.config import FREE_ON_RESUME, Config, to_toml
from core.console import remark
from core.data import ShardRecord, TokenStream, check_unchanged
from core.distributed import Distributed, format_name, peak_memory
from core.errors import EXIT_REQUEUE, UserError
from core.files import atomic_write, locked, standard_json, write_json
from core.fingerprint import made_by, warn_of_other_code
from core.guard import Guard
from core.host import TO_LEAVE, signals_to
from core.initial import load_initial
from core.provenance import environment, git_version
from core.trackers import Progress, Tracker, make_trackers
from model import GPT

LOCK_PATIENCE_S = 10.0  # a run that was told to leave may still be saving when its successor starts


class Leaving(Exception):
    """A signal asks the run to save and leave."""


class Run:
    """What a run leaves behind. Every rank holds one, only rank 0 writes. A context: leaving it closes everything."""

    def __init__(self, cfg: Config, dist: Distributed) -> None:
        self.cfg, self.dist, self.folder = cfg, dist, cfg.folder
        self._signal: int | None = None
        self._error: str | None = None  # of rank 0's files; the others learn of it at the next step
        self._open_things = ExitStack()
        self._writer = CheckpointWriter(cfg.folder, cfg.keep_checkpoints, cfg.async_checkpoint)
        self._log_file: Any = None
        self._trackers: list[Tracker] = []
        self._val_loss: float | None = None
        self._val_step: int | None = None
        self._start, self._clock, self._steps_timed = 0, time.perf_counter(), 0
        self._saved: tuple[int, int | None] = (0, None)  # step, val_step

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, *error: object) -> None:
        self._open_things.close()

    def resume(self, model: GPT, optimizer: Optimizer, guard: Guard, streams: Sequence[TokenStream]) -> int:
        """Load the newest valid checkpoint, if any; returns the step to go on from, 0 for a fresh run.

        `streams` are the training and the validation data. Raises UserError, on all ranks, where another process is at work in
        the folder, where its run has another configuration or other data, where the data is damaged or the disk too full.
        """
        with self.dist.together():
            found = self._find() if self.dist.is_main else None
            if self.dist.is_main and self.cfg.verify_data == "full":
                for stream in streams:
                    stream.verify()
            if self.dist.is_main:
                self._data = data_of(streams)
                if found:
                    self._shards = check_all_same(found, self.cfg, streams)
                else:
                    self._shards = [record for stream in streams for record in stream.records()]
        found = self.dist.from_main(found)
        with self.dist.together():
            load(found, model, optimizer, guard, self.cfg, say=self.dist.is_main)
            if found:
                state = found[1]
                self._start, self._val_loss, self._val_step = state.step, state.val_loss, state.val_step
                self._saved = (state.step, state.val_step)
            if self.dist.is_main and not self.finished:
                self._open(found, model)
        return self._start

    def _find(self) -> tuple[Path, State] | None:
        self._open_things.enter_context(locked(self.folder, LOCK_PATIENCE_S))
        self._open_things.callback(self._writer.close)
        found = newest_checkpoint(self.folder)
        if not found and list_checkpoints(self.folder):
            raise UserError(
                f"{self.folder}: has checkpoints, and none of them is whole; restore one, or move the folder away to begin anew"
            )
        if not found and (other := begun_elsewhere(self.cfg)):
            remark(f"{other}: has a run of the same configuration; --name={other.name} goes on with that instead")
        return found

    @property
    def finished(self) -> bool:
        """Whether the last step is taken and validated."""
        return self._saved == (self.cfg.steps, self.cfg.steps)

    def steps(self, start: int) -> Iterator[int]:
        """`start` … cfg.steps, one more than there are updates: the last pass only evaluates and saves."""
        if self.finished:
            if self.dist.is_main:
                print(f"{self.folder}: finished at step {start} already, nothing to do")
            return
        self._bar = Progress(self.cfg, start, self.dist.is_main)
        self._open_things.callback(self._bar.close)
        self._open_things.enter_context(signals_to(self._on_signal, *TO_LEAVE, "SIGUSR1"))  # Slurm's warning
        self._restart_clock()
        for step in range(start, self.cfg.steps + 1):
            yield step
            self._bar.update()

    def eval_due(self, step: int) -> bool:
        """Every eval_every steps and at the end, but not where the resumed log has it already."""
        return (step % self.cfg.eval_every == 0 or step == self.cfg.steps) and step != self._val_step

    def leave_if_asked(self) -> None:
        """Raise Leaving on all ranks where one was sent a signal, out of an evaluation, say. All ranks must ask."""
        if self.dist.any(self._signal is not None):
            raise Leaving

    def asked_to_leave(self) -> bool:
        """Whether any rank was sent a signal. All ranks must ask.

        Raises UserError on all ranks where rank 0 could not write its files.
        """
        wanted = self.dist.any(self._signal is not None or self._error is not None or self._writer.failed)
        if wanted:
            with self.dist.together():
                if self._error:
                    raise UserError(self._error)
                if self._writer.failed:
                    self._writer.wait()
        return wanted

    def save_due(self, step: int, last: bool) -> bool:
        """Every save_every steps, and at the `last` one of this start; not what is saved already."""
        return (last or step % self.cfg.save_every == 0) and step > 0 and (step, self._val_step) != self._saved

    def save(self, step: int, model: GPT, optimizer: Optimizer, guard: Guard, wait: bool) -> None:
        """Write a checkpoint, with `wait` until it is on disk; only when it is safe are old ones deleted.

        Raises UserError on all ranks where it fails.
        """
        self.dist.at(f"step {step}: saving")
        with self.dist.together():
            self._writer.save(model, optimizer, self._state(step, guard) if self.dist.is_main else None)
            if wait:
                self._writer.wait()
        self._saved = (step, self._val_step)
        self._restart_clock()

    def _state(self, step: int, guard: Guard) -> State:
        os.fsync(self._log_file)
        return State(
            step=step,
            tokens=step * self.cfg.tokens_per_step,
            config=self.cfg.model_dump(),
            **self._data,
            shards=self._shards,
            val_loss=self._val_loss,
            val_step=self._val_step,
            log_bytes=self._log_file.tell(),
            guard=guard.history,
            git=git_version(),
            **made_by(self.cfg),
            dtype=format_name(self.dist.dtype),
        )

    def log(self, step: int, **values: float) -> None:
        """Append a record: `values` and what they cost. Validation records are those with a val_loss."""
        validation = "val_loss" in values
        if validation and not math.isfinite(values["val_loss"]):  # the same on every rank
            raise UserError(
                f"step {step}: validation loss {values['val_loss']}; stopped, the last checkpoint is of step {self._saved[0]}; "
                f"a lower --lr (now {self.cfg.lr}) may help"
            )
        if validation:
            self._val_loss, self._val_step = values["val_loss"], step
        else:
            self._steps_timed += 1
            if step % self.cfg.log_every:
                return
        if self.dist.is_main:
            record: dict[str, Any] = {"step": step, "tokens": step * self.cfg.tokens_per_step, **values}
            if not validation:
                record |= self._cost()
            self._write(record)
            for tracker in self._trackers:
                tracker.log(record)
            self._bar.show(record)
        self._restart_clock()

    def warn(self, step: int, text: str | None) -> None:
        """Say `text`, if there is one."""
        if text and self.dist.is_main:
            print(f"warning: step {step}: {text}", file=sys.stderr)

    def exit_code(self) -> int:
        """0 for a finished run; EXIT_REQUEUE for one that a signal ended early, after printing where it was saved."""
        if self.finished:
            return 0
        if self.dist.is_main:
            saved = f"saved at step {self._saved[0]}" if self._saved[0] else "nothing new to save"
            print(f"{self.folder}: {saved}, left when asked to; the same command goes on from here", file=sys.stderr)
        return EXIT_REQUEUE

    def _write(self, record: dict[str, Any]) -> None:
        try:
            line = json.dumps(standard_json(record), allow_nan=False).encode() + b"\n"
            if self._log_file.write(line) < len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            self._error = f"{self._log_file.name}: not written ({error.strerror}); the last checkpoint is whole"

    def _on_signal(self, number: int) -> None:
        self._signal = number
        if self.dist.is_main:  # os.write: print is not safe in a signal handler
            with suppress(OSError):  # nobody may be left to read it
                os.write(2, f"\n{signal.Signals(number).name}: saving and leaving after this step\n".encode())

    def _restart_clock(self) -> None:
        self._clock, self._steps_timed = time.perf_counter(), 0

    def _cost(self) -> dict[str, float | None]:
        """tokens/s over all devices, model FLOPs utilization (None where the peak is unknown), peak bytes of rank 0."""
        rate = self._steps_timed * self.cfg.tokens_per_step / (time.perf_counter() - self._clock)
        peak = self.dist.peak_flops()
        mfu = rate * self.cfg.flops_per_token / (peak * self.dist.world_size) if peak else None
        return {"tokens_per_second": round(rate, 1), "mfu": mfu, "peak_memory_bytes": peak_memory(self.dist.device)}

    def _open(self, found: tuple[Path, State] | None, model: GPT) -> None:
        """Describe this start, on the terminal too, and open the log, cut to what the checkpoint had seen."""
        check_space(self.folder, model, self.cfg.keep_checkpoints)
        log, log_bytes = self.folder / "log.jsonl", found[1].log_bytes if found else 0
        try:
            if found:
                set_aside_newer(self.folder, found[0])
            this_start = environment(self.dist, self._start) | made_by(self.cfg) | {"n_params": model.n_params()}
            write_json(self.folder / "env.json", [*self._earlier_starts(), this_start])
            with atomic_write(self.folder / "config.toml", "w") as file:
                file.write(to_toml(self.cfg))
            if log.exists():
                os.truncate(log, min(log_bytes, log.stat().st_size))
            self._log_file = self._open_things.enter_context(open(log, "ab", buffering=0))  # noqa: SIM115
        except OSError as error:
            raise UserError(f"{self.folder}: cannot be written ({error.strerror}); --out_dir says where runs go") from None
        self._trackers = make_trackers(self.cfg, self.folder, self._start, read_log(log.read_bytes()))
        for tracker in self._trackers:
            self._open_things.callback(tracker.close)
        n = this_start["n_params"]
        remark(
            f"{self.folder}: {self.cfg.encoding}, {n['total']:,} parameters ({n['embedding']:,} of the embedding and head, "
            f"{n['encoding']:,} of positions), {self.dist.world_size} × {this_start['device']} in {this_start['dtype']}, "
            f"from step {self._start}"
        )

    def _earlier_starts(self) -> list[Any]:
        try:
            starts = json.loads((self.folder / "env.json").read_text()) if self._start else []
        except (FileNotFoundError, ValueError, RecursionError):
            return []
        return starts if isinstance(starts, list) else []


def begun_elsewhere(cfg: Config) -> Path | None:
    """A folder beside the run's with a run that computes the same, as under an earlier version's name; None where none is."""
    for path in sorted(Path(cfg.out_dir).glob(f"*/{CHECKPOINTS}")):
        state = next(map(peek, reversed(list_checkpoints(path.parent))), None)
        with suppress(UserError):
            if state:
                check_same(state, cfg, {})
                return path.parent
    return None


def read_log(text: bytes) -> list[dict[str, Any]]:
    """The whole records in `text`; a full disk or a power cut may have left part of one."""
    found = []
    for line in text.split(b"\n")[:-1]:
        with suppress(ValueError, RecursionError):
            found.append(json.loads(line))
    return [record for record in found if isinstance(record, dict) and "step" in record]


def data_of(streams: Sequence[TokenStream]) -> dict[str, Any]:
    """What a run's state says of its data beside the shards: the tokenizer, and the number of tokens to train on."""
    return {"tokenizer": streams[0].tokenizer, "train_tokens": len(streams[0])}


def check_same(state: State, cfg: Config, data: dict[str, Any]) -> None:
    """Raise UserError where the run of a checkpoint's `state` computes something else than `cfg` on `data` would."""
    before, now = state.config | {key: getattr(state, key) for key in data}, cfg.model_dump() | data
    differing = [key for key in now if key not in FREE_ON_RESUME and before.get(key, now[key]) != now[key]]
    if differing:
        what = ", ".join(f"{key} = {before[key]!r} (now {now[key]!r})" for key in differing)
        raise UserError(f"{cfg.folder}: holds a run with {what}; give this one another --name or --out_dir, or the same values")


def check_all_same(found: tuple[Path, State], cfg: Config, streams: Sequence[TokenStream]) -> list[ShardRecord]:
    """Raise UserError where the run of the checkpoint `found` has another configuration or other data; warn of other code.

    Returns the shards of training and validation as they are now.
    """
    path, state = found
    check_same(state, cfg, data_of(streams))
    warn_of_other_code(path, state, made_by(cfg))
    return check_unchanged(state.shards, streams)


def load(found: tuple[Path, State] | None, model: GPT, optimizer: Optimizer, guard: Guard, cfg: Config, say: bool) -> None:
    """Load what training continues from: the checkpoint `found`, or else the seed's random numbers and cfg.init_from.

    With `say`, print on stderr what was taken from there.
    """
    torch.manual_seed(cfg.seed)
    if found:
        path, state = found
        load_weights(path, model)
        load_optimizer(path, model, optimizer)
        guard.restore(state.guard)
    elif cfg.init_from:
        load_initial(cfg.init_from, model, say)
