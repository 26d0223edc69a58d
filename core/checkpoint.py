"""Checkpoints: a folder `step_NNNNNN` of model.safetensors, optimizer.safetensors and state.json, whole or not there.

Tensors are safetensors and the rest is JSON, checked by its model below: opening a stranger's checkpoint runs no code.
state.json holds the sha256 of each file, of itself too, checked on every load.
"""

import hashlib
import json
import os
import shlex
import shutil
import sys
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Any, Literal

import pydantic
import torch
from pydantic import BaseModel, ConfigDict, NonNegativeInt
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim import Optimizer

from core.config import Config, options
from core.data import ShardRecord
from core.errors import UserError
from core.files import fsync_folder, sha256_file
from core.fsdp import cut, gather, is_sharded
from model import GPT
from positional import ENCODINGS
from text.shards import first_error

FOLDER = "checkpoints"
MODEL, OPTIMIZER, STATE = "model.safetensors", "optimizer.safetensors", "state.json"
RNG = "rng."  # the names in OPTIMIZER that belong to no parameter

Finite = Annotated[float, pydantic.Field(allow_inf_nan=False)]
Tensors = dict[str, dict[str, Tensor]]  # file → name → tensor


class Unreadable(UserError):
    """What is there cannot be read, so nobody knows whether it is whole: it is not passed over, and nothing takes its place."""


class State(BaseModel):
    """state.json: where the run was, on what data, under which configuration. Raises pydantic.ValidationError."""

    model_config = ConfigDict(frozen=True, strict=True)

    step: NonNegativeInt
    tokens: NonNegativeInt
    config: dict[str, Any]
    tokenizer: str
    train_tokens: NonNegativeInt
    shards: list[ShardRecord]
    val_loss: Finite | None
    val_step: NonNegativeInt | None = None  # the step of val_loss: an interrupted validation is made up for
    log_bytes: NonNegativeInt
    guard: dict[str, list[Finite]] = {}
    git: str | None
    source: str | None = None  # of the encoding, core.fingerprint.source_of
    probe: dict[str, Finite] | None = None  # what the encoding computes, core.fingerprint.probe
    plugin: dict[str, str] | None = None  # path and sha256 of the file that the encoding comes from, where that is a plugin
    dtype: Literal["bfloat16", "float32"] | None = None  # autocast type of this start
    sha256: dict[str, str] = {}

    @pydantic.field_validator("config")
    @classmethod
    def _as_it_was(cls, config: dict[str, Any]) -> dict[str, Any]:
        return {key: option.before for key, option in options().items() if option.before is not None} | config

    @pydantic.model_validator(mode="after")
    def _possible(self) -> "State":
        steps = self.config.get("steps")
        if not isinstance(steps, int) or self.step > steps:
            raise ValueError(f"step {self.step} of {steps!r} steps")
        return self

    @property
    def finished(self) -> bool:
        """Whether nothing is left to do: the last step is taken and validated."""
        return self.step == self.config.get("steps") == self.val_step


class CheckpointWriter:
    """Writes the checkpoints of one run, one at a time; with `background`, while training goes on.

    A step then waits only for a copy of the weights to memory. Errors of the background come up at the next `save` or `wait`.
    """

    def __init__(self, run: Path, keep: int, background: bool) -> None:
        self._run, self._keep, self._background = run, keep, background
        self._pool = ThreadPoolExecutor(1, "checkpoint")
        self._pending: Future[None] | None = None
        self._buffers: Tensors = {}

    def save(self, model: nn.Module, optimizer: Optimizer, state: State | None) -> None:
        """Write a checkpoint; only when it is safe are old ones deleted. Raises UserError; older ones are whole then.

        Every rank must call it, for what is sharded over them is put together here; the one with a `state` writes.
        """
        sharded = is_sharded(model)
        if state is None and not sharded:
            return
        # state_dict first: it brings back the shards where an evaluation has left parameters whole
        tensors = {MODEL: dict(model.state_dict()), OPTIMIZER: optimizer_tensors(model, optimizer)}
        if sharded:
            tensors = {file: gather(named, keep=state is not None) for file, named in tensors.items()}
        if state is None:
            return
        self.wait()  # not before gather, where the others would wait for a rank that has left by an error
        if self._background:
            tensors = tensors if sharded else self._copy(tensors)  # what was gathered is a copy
            self._pending = self._pool.submit(self._write, tensors, state)
        else:
            self._write(tensors, state)

    @property
    def failed(self) -> bool:
        """Whether what `save` began is known to have failed; `wait` raises the error."""
        return self._pending is not None and self._pending.done() and self._pending.exception() is not None

    def wait(self) -> None:
        """Until what `save` began is on disk. Raises UserError where it is not."""
        if self._pending:
            pending, self._pending = self._pending, None
            pending.result()

    def close(self) -> None:
        """Until nothing is being written; what failed stays unsaid, the error that led here is said already."""
        self._pool.shutdown(wait=True)

    def _write(self, tensors: Tensors, state: State) -> None:
        write_checkpoint(self._run, tensors, state)
        prune_checkpoints(self._run, self._keep)

    def _copy(self, tensors: Tensors) -> Tensors:
        """Into buffers kept from save to save: fresh memory, pinned above all, costs more than the copy."""
        for file, named in tensors.items():
            held = self._buffers.setdefault(file, {})
            for name, tensor in named.items():
                if name not in held:
                    held[name] = torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda)
                held[name].copy_(tensor, non_blocking=tensor.is_cuda)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return self._buffers


def write_checkpoint(run: Path, tensors: Tensors, state: State) -> Path:
    """Write `run`/checkpoints/step_NNNNNN: a temporary folder, fsynced, then renamed. Returns its path.

    Raises UserError, with the bytes it takes, where it cannot be written; nothing of it is left then.
    """
    path = Path(run) / FOLDER / f"step_{state.step:06d}"
    temporary, old = path.with_name(f".{path.name}.tmp"), path.with_name(f".{path.name}.old")
    try:
        for leftover in path.parent.glob(".step_*"):  # of a process that was killed while it wrote or deleted
            shutil.rmtree(leftover)
        temporary.mkdir(parents=True)
        for file, named in tensors.items():
            save_file({name: tensor.detach().contiguous() for name, tensor in named.items()}, temporary / file)
        sums = {file: sha256_file(temporary / file) for file in tensors}
        (temporary / STATE).write_text(sealed(state.model_dump() | {"sha256": sums}))
        for file in tensors:  # which safetensors gives to nobody but their owner, whatever the umask
            (temporary / file).chmod((temporary / STATE).stat().st_mode)
        for written in temporary.iterdir():
            with open(written, "rb+") as handle:
                os.fsync(handle.fileno())
        fsync_folder(temporary)
        if path.exists():  # saved before the validation of its step was interrupted
            path.rename(old)
        temporary.rename(path)
        fsync_folder(path.parent)
        shutil.rmtree(old, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        needed = sum(tensor.nbytes for named in tensors.values() for tensor in named.values())
        raise UserError(
            f"{path}: checkpoint not written ({reason(error)}); it takes {needed:,} bytes, {free_bytes(run):,} are free; older "
            "checkpoints are whole, the same command goes on from the newest"
        ) from None
    return path


def check_space(run: Path, model: nn.Module, keep: int) -> None:
    """Raise UserError where the disk cannot take as many checkpoints more as a run will have at a time."""
    size = 3 * sum(p.numel() * 4 for p in model.parameters())  # weights and AdamW's two averages, in fp32
    missing = keep + 2 - len(list_checkpoints(run))  # the newest, the best, and the one being written
    free = free_bytes(run)
    if missing > 0 and free < missing * size:
        raise UserError(
            f"{run}: too little space, {free:,} bytes are free and {missing} checkpoints of {size:,} take {missing * size:,}; "
            f"make room, keep fewer (--keep_checkpoints, now {keep}) or choose another --out_dir"
        )


def sealed(state: dict[str, Any]) -> str:
    """The text of state.json, with the sha256 of itself, as it would be without that entry, among its sha256."""
    sums = {file: digest for file, digest in state.get("sha256", {}).items() if file != STATE}
    digest = hashlib.sha256(json.dumps(state | {"sha256": sums}, sort_keys=True).encode()).hexdigest()
    return json.dumps(state | {"sha256": sums | {STATE: digest}}, indent=1) + "\n"


def reason(error: Exception) -> str:
    """An error of writing in a few words."""
    return error.strerror if isinstance(error, OSError) and error.strerror else str(error).removeprefix("Error while ")


def free_bytes(folder: Path) -> int:
    """Bytes that are free where `folder` is, or will be."""
    return shutil.disk_usage(next(p for p in [folder, *folder.absolute().parents] if p.exists())).free


def optimizer_tensors(model: nn.Module, optimizer: Optimizer) -> dict[str, Tensor]:
    """The optimizer's state as KEY.PARAMETER, e.g. exp_avg.wte.weight, and the random-number generators' as rng.*."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found = {
        f"{key}.{names[id(parameter)]}": torch.as_tensor(value)
        for parameter, values in optimizer.state.items()
        for key, value in values.items()
    }
    found[f"{RNG}cpu"] = torch.get_rng_state()
    if torch.cuda.is_available():
        found[f"{RNG}cuda"] = torch.cuda.get_rng_state()
    return found


def read_state(path: Path) -> State:
    """`state.json` of a checkpoint after checking every file's sha256.

    Raises UserError, naming the file, for a damaged one, and Unreadable where it is not known whether it is.
    """
    try:
        text = (path / STATE).read_bytes()
        state = State.model_validate_json(text)
        if json.loads(sealed(json.loads(text)))["sha256"] != state.sha256:
            raise UserError(f"{path / STATE}: its sha256 is not the one in it; the checkpoint is damaged")
        for name in (MODEL, OPTIMIZER):
            if sha256_file(path / name) != state.sha256.get(name):
                raise UserError(f"{path / name}: its sha256 is not the one in {STATE}; the checkpoint is damaged")
        if path.name.startswith("step_") and path.name != f"step_{state.step:06d}":
            raise UserError(f"{path / STATE}: it is of step {state.step}; the checkpoint is damaged")
        return state
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError) as error:
        raise UserError(f"{error.filename}: cannot be read ({error.strerror}); the checkpoint is damaged") from None
    except OSError as error:
        raise _unreadable(error, path) from None
    except pydantic.ValidationError as error:
        raise UserError(f"{path / STATE}: {first_error(error)}; the checkpoint is damaged") from None


def _unreadable(error: OSError, path: Path) -> Unreadable:
    return Unreadable(
        f"{error.filename or path}: cannot be read ({error.strerror}), so it is not known what is there; make it readable "
        "(chmod -R u+rX), or give another --name or --out_dir"
    )


def list_checkpoints(run: Path) -> list[Path]:
    """Checkpoint folders of a run, oldest first, unchecked. Raises Unreadable where there may be some."""
    folder = Path(run) / FOLDER
    try:
        found = [path for path in folder.iterdir() if path.name.startswith("step_") and path.name[5:].isdecimal()]
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise _unreadable(error, folder) from None
    return sorted(found, key=lambda path: int(path.name[5:]))


def newest_checkpoint(run: Path, at_most: int | None = None) -> tuple[Path, State] | None:
    """The newest valid checkpoint of a run (of step `at_most`) and its state; damaged ones are named and passed over.

    Raises Unreadable where a newer one cannot be read.
    """
    for path in reversed(list_checkpoints(run)):
        if at_most is not None and int(path.name[5:]) > at_most:
            continue
        try:
            return path, read_state(path)
        except Unreadable:
            raise
        except UserError as error:
            print(f"warning: {error}; trying the one before", file=sys.stderr)
    return None


def find_checkpoint(path: str | Path) -> tuple[Path, State]:
    """The checkpoint meant by `path`, a run folder (its newest valid one) or a checkpoint folder."""
    path = Path(path)
    if os.path.exists(path / STATE):  # Path.exists raises for some names, as one too long
        return path, read_state(path)
    if not os.path.isdir(path):
        raise UserError(f"{path}: no such run or checkpoint")
    found = newest_checkpoint(path)
    if found is None:
        raise UserError(f"{path}: no valid checkpoint in it; is it a run folder, and has the run saved one?")
    return found


def set_aside_newer(run: Path, path: Path) -> None:
    """Rename the checkpoints after `path`, the newest valid one: they are damaged and must not count as kept."""
    paths = list_checkpoints(run)
    for newer in paths[paths.index(path) + 1 :]:
        aside = newer.with_name(f"damaged_{newer.name}")
        shutil.rmtree(aside, ignore_errors=True)
        newer.rename(aside)


def prune_checkpoints(run: Path, keep: int) -> None:
    """Delete all but the newest `keep` checkpoints and the one of lowest validation loss; none that cannot be read."""
    paths = list_checkpoints(run)
    states = {path: state for path in paths if (state := peek(path))}
    losses = {path: state.val_loss for path, state in states.items() if state.val_loss is not None}
    best = min(losses, key=losses.__getitem__, default=None)
    for path in paths[:-keep]:
        if path in states and path != best:  # renamed first: a checkpoint is never there in part
            shutil.rmtree(path.rename(path.with_name(f".{path.name}.old")), ignore_errors=True)


def peek(path: Path) -> State | None:
    """`state.json` of a checkpoint, with no file checked against it; None where it cannot be read or is damaged."""
    try:
        return State.model_validate_json((path / STATE).read_bytes())
    except (OSError, pydantic.ValidationError):
        return None


def read_tensors(path: Path, expected: dict[str, Tensor], also: tuple[str, ...] = ()) -> dict[str, Tensor]:
    """The tensors of a safetensors file, on the CPU: of the `expected` names, shapes and types, or named beginning with `also`.

    Raises UserError, naming what differs.
    """
    try:
        with safe_open(path, "pt") as file:
            shapes = {name: list(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
            for name in sorted(n for n in shapes.keys() | expected.keys() if not n.startswith(also)):
                here, there = shapes.get(name), list(expected[name].shape) if name in expected else None
                if here != there:
                    what = f"{name} has shape {'none' if here is None else here}"
                    raise UserError(f"{path}: {what}, the model's is {'none' if there is None else there}")
            found = {name: file.get_tensor(name) for name in shapes}
    except (OSError, SafetensorError, ValueError, RuntimeError) as error:
        raise UserError(f"{path}: not a readable safetensors file ({error})") from None
    for name, tensor in expected.items():
        if found[name].dtype != tensor.dtype:
            raise UserError(f"{path}: {name} is {found[name].dtype}, the model's is {tensor.dtype}")
    return found


def load_weights(path: Path, model: nn.Module) -> None:
    """Load a checkpoint's weights into `model`. Raises UserError where names, shapes or types differ."""
    own = model.state_dict()
    found = read_tensors(path / MODEL, own)
    model.load_state_dict({name: cut(found[name], like) for name, like in own.items()})


def load_optimizer(path: Path, model: nn.Module, optimizer: Optimizer) -> None:
    """Load a checkpoint's AdamW and random-number states. Raises UserError where they do not fit the model."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    like = {"exp_avg": lambda p: p, "exp_avg_sq": lambda p: p, "step": lambda _: torch.zeros(())}
    expected = {f"{key}.{names[id(p)]}": form(p) for p in parameters for key, form in like.items()}
    found = read_tensors(path / OPTIMIZER, expected, also=(RNG,))
    state = {
        i: {key: cut(found[f"{key}.{names[id(p)]}"], form(p)) for key, form in like.items()} for i, p in enumerate(parameters)
    }
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    try:
        torch.set_rng_state(found[f"{RNG}cpu"])
        if f"{RNG}cuda" in found and torch.cuda.is_available():
            torch.cuda.set_rng_state(found[f"{RNG}cuda"])
    except (KeyError, RuntimeError, TypeError) as error:
        why = error
        raise UserError(f"{path / OPTIMIZER}: no state of the random-number generators in it ({why})") from None


def config_of(path: Path, state: State) -> Config:
    """The configuration of a checkpoint. Raises UserError where it is not one of this version, or its encoding a plugin's."""
    if state.plugin and state.config.get("encoding") not in ENCODINGS:
        file, sha256 = state.plugin.get("path"), str(state.plugin.get("sha256"))[:12]
        what = f"encoding = {state.config.get('encoding')!r} is of the plugin {file} (sha256 {sha256}…)"
        raise UserError(f"{path}: its {what}; --plugin {shlex.quote(str(file))} loads it")
    try:
        return Config(**state.config)
    except (pydantic.ValidationError, TypeError) as error:
        why = first_error(error) if isinstance(error, pydantic.ValidationError) else error
        raise UserError(f"{path / STATE}: its configuration is not one of this version ({why})") from None


def load_model(path: str | Path) -> tuple[GPT, State, Path]:
    """The model of a run or checkpoint, on the CPU in eval mode, the checkpoint's state and its folder."""
    folder, state = find_checkpoint(path)
    cfg = config_of(folder, state)
    with torch.device("meta"):  # a stranger's sizes cost nothing until the file has shown to have them
        expected = GPT(cfg).state_dict()
    tensors = read_tensors(folder / MODEL, expected)
    model = GPT(cfg)
    model.load_state_dict(tensors)
    return model.eval(), state, folder
