"""Who watches a run: the terminal, Weights & Biases, TensorBoard. Each takes the records of log.jsonl."""

import os
import re
import secrets
import struct
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

from tqdm import tqdm

from core.config import Config
from core.console import quiet
from core.errors import UserError

WANDB_ID = "wandb_id"  # in the run folder
FINISH_S = 60.0


class Tracker(Protocol):
    """Takes each record as it is logged."""

    def log(self, record: dict[str, Any]) -> None: ...

    def close(self) -> None: ...


def make_trackers(cfg: Config, folder: Path, start: int, log: list[dict[str, Any]]) -> list[Tracker]:
    """Those that `cfg` switches on, for the run in `folder`, which goes on from step `start` with this much in its log.

    What a killed run had logged beyond `start` comes again; each tracker sees to it that it counts once.
    """
    trackers: list[Tracker] = []
    if cfg.wandb != "disabled":
        trackers.append(WandB(cfg, folder, log))
    if cfg.tensorboard:
        trackers.append(TensorBoard(folder, start, [record for record in log if record["step"] == start]))
    return trackers


class WandB:
    """Weights & Biases; a continued run goes on under the id kept in the run folder.

    Offline, records that an earlier start has in its file are left out, and those it was killed before writing are made up for.
    Online, what a killed run may or may not have sent after its checkpoint is sent again, with the values it had.
    """

    def __init__(self, cfg: Config, folder: Path, log: list[dict[str, Any]]) -> None:
        id_file = folder / WANDB_ID
        if not id_file.exists():
            id_file.write_text(secrets.token_hex(4))
        self._run = start_wandb(cfg, folder)
        # Our step is a metric like others: wandb's own only grows, and drops what a continued run adds to its last step
        self._run.define_metric("*", step_metric="step")
        self._held = wandb_history(folder) if cfg.wandb == "offline" else Counter()
        for record in log if cfg.wandb == "offline" else []:
            self.log(record)

    def log(self, record: dict[str, Any]) -> None:
        if (record["step"], "val_loss" in record) not in self._held:
            self._run.log({key: value for key, value in record.items() if value is not None})

    def close(self) -> None:
        self._run.finish()


def start_wandb(cfg: Config, folder: Path) -> Any:
    """wandb's run of the id in the run folder: a new one, or that of an earlier start gone on with.

    Raises UserError where there is none to be had. A server that does not answer is given up after 90 s (WANDB_INIT_TIMEOUT).
    One that goes away later lacks what is then on disk only, and costs FINISH_S at the end (WANDB_FINISH_TIMEOUT), where wandb
    itself would wait on.
    """
    try:
        import wandb
    except ImportError:
        raise UserError(f"wandb = {cfg.wandb!r}: `pip install wandb`, or --wandb=disabled") from None
    try:
        return wandb.init(
            project=cfg.wandb_project, name=cfg.name, id=(folder / WANDB_ID).read_text(), resume="allow", mode=cfg.wandb,
            dir=str(folder), config=cfg.model_dump(),
            settings={} if "WANDB_FINISH_TIMEOUT" in os.environ else {"finish_timeout": FINISH_S},
        )  # fmt: skip
    except (wandb.errors.Error, ValueError) as error:  # also of an unusable WANDB_… in the environment
        raise UserError(f"wandb = {cfg.wandb!r}: {error}; --wandb=offline needs no account") from None


def wandb_history(folder: Path) -> Counter[tuple[int, bool]]:
    """How often wandb's offline files in a run folder hold each record: (step, whether it is a validation)."""
    from wandb.proto.wandb_internal_pb2 import Record  # type: ignore[attr-defined]

    found: Counter[tuple[int, bool]] = Counter()
    for path in folder.glob("wandb/offline-run-*/*.wandb"):
        for data in leveldb_records(path.read_bytes()):
            history = Record.FromString(data).history
            items = {item.key or "/".join(item.nested_key): item.value_json for item in history.item}
            if "step" in items:
                found[int(items["step"]), "val_loss" in items] += 1
    return found


def leveldb_records(raw: bytes) -> Iterator[bytes]:
    """The records in LevelDB's log format (blocks of 32 KiB; seven bytes of checksum, length and kind before each part).

    They end at a part that a killed writer left unfinished.
    """
    parts: list[bytes] = []
    at = 7  # after wandb's own header
    while at + 7 <= len(raw):
        left = 32768 - at % 32768
        if left < 7:
            at += left
            continue
        length, kind = struct.unpack_from("<HB", raw, at + 4)
        if kind not in (1, 2, 3, 4) or at + 7 + length > len(raw):
            return
        parts = [*parts, raw[at + 7 : at + 7 + length]] if kind in (3, 4) else [raw[at + 7 : at + 7 + length]]
        if kind in (1, 4):  # whole, or the last part
            yield b"".join(parts)
        at += 7 + length


class TensorBoard:
    """TensorBoard event files in the run folder; a continued run takes back what came after its checkpoint."""

    def __init__(self, folder: Path, start: int, at_start: list[dict[str, Any]]) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise UserError("tensorboard = true: `pip install tensorboard`, or --tensorboard=false") from None
        put_before_now(folder / "tensorboard")
        self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=start)
        for record in at_start:  # taken back with the rest, though the checkpoint had seen it
            self.log(record)

    def log(self, record: dict[str, Any]) -> None:
        for key, value in record.items():
            if key != "step" and value is not None:
                self._writer.add_scalar(key, value, record["step"])

    def close(self) -> None:
        self._writer.close()


def put_before_now(folder: Path) -> None:
    """Rename event files so that they come before one that is begun now, in the order they have.

    TensorBoard reads them by their names, which begin with the second of their start, and drops what seems to come from before
    a restart. A clock that was put back would have the continued run come first.
    """
    latest = int(time.time()) - 1
    for path in sorted(folder.glob("events.out.tfevents.*"), reverse=True):
        second = re.match(r"\d+", path.name.removeprefix("events.out.tfevents."))
        if second and int(second[0]) > latest:
            path.rename(path.with_name(path.name.replace(second[0], f"{latest:010d}", 1)))
            latest -= 1
        elif second:
            latest = int(second[0])


class Progress:
    """A bar with loss, tokens/s, MFU and ETA on a terminal; elsewhere a line every `seconds`."""

    def __init__(self, cfg: Config, start: int, shown: bool, seconds: float = 60.0) -> None:
        self._bar: Any = None
        self._shown, self._seconds, self._next_line = shown and not quiet(), seconds, 0.0
        self._steps, self._length = cfg.steps, cfg.block_size
        self._last: dict[str, Any] = {}
        if self._shown and sys.stderr.isatty():
            self._bar = tqdm(total=cfg.steps, initial=start, desc=cfg.name, unit="step", dynamic_ncols=True)

    def update(self) -> None:
        """One step is done."""
        if self._bar is not None and self._bar.n < self._steps:
            self._bar.update()

    def show(self, record: dict[str, Any]) -> None:
        """Bring a record before the user's eyes."""
        self._last |= record
        text = describe(self._last, self._length)
        if self._bar is not None:
            self._bar.set_postfix_str(text, refresh=False)
        elif self._shown and ("val_loss" in record or time.monotonic() >= self._next_line):
            print(f"step {record['step']}/{self._steps}: {text}", file=sys.stderr, flush=True)
            self._next_line = time.monotonic() + self._seconds

    def close(self) -> None:
        """Leave the terminal as it was."""
        if self._bar is not None:
            self._bar.close()


def describe(record: dict[str, Any], length: int) -> str:
    """A record in a line: loss 3.1234, val 3.2 (ppl 24.5 at length 512, 10,485,760 tokens), 12.3k tok/s, MFU 41 %."""
    parts = []
    if "loss" in record:
        parts.append(f"loss {record['loss']:.4f}")
    if "val_loss" in record:
        over = f"at length {length}, {record['val_tokens']:,} tokens"
        parts.append(f"val {record['val_loss']:.4f} (ppl {record['val_perplexity']:.2f} {over})")
    if "tokens_per_second" in record:
        parts.append(f"{record['tokens_per_second'] / 1000:.1f}k tok/s")
        parts.append("MFU unknown" if record["mfu"] is None else f"MFU {record['mfu']:.0%}")
    return ", ".join(parts)
