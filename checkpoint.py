"""Checkpoints: a folder `step_NNNNNN` of model.safetensors, optimizer.pt and state.json, written whole or not at all.

`state.json` is JSON, the weights are safetensors and the optimizer is loaded with weights_only=True: opening a
stranger's checkpoint runs no code. It holds the sha256 of the other files, checked on every load.
"""

import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import pydantic
import torch
from torch import nn
from torch.optim import Optimizer

from config import Config
from errors import UserError
from files import fsync_folder, sha256_file
from model import GPT

FOLDER = "checkpoints"
MODEL, OPTIMIZER, STATE = "model.safetensors", "optimizer.pt", "state.json"


def save_checkpoint(run: Path, step: int, model: nn.Module, optimizer: Optimizer, state: dict[str, Any]) -> Path:
    """Write `run`/checkpoints/step_NNNNNN: a temporary folder, fsynced, then renamed. Returns its path."""
    from safetensors.torch import save_file

    path = Path(run) / FOLDER / f"step_{step:06d}"
    temporary = path.with_name(f".{path.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    save_file({name: p.detach().contiguous() for name, p in model.state_dict().items()}, temporary / MODEL)
    torch.save({"optimizer": optimizer.state_dict(), "rng": rng_state()}, temporary / OPTIMIZER)
    sums = {name: sha256_file(temporary / name) for name in (MODEL, OPTIMIZER)}
    (temporary / STATE).write_text(json.dumps({"step": step, **state, "sha256": sums}, indent=1) + "\n")
    for file in temporary.iterdir():
        with open(file, "rb+") as handle:
            os.fsync(handle.fileno())
    fsync_folder(temporary)
    if path.exists():  # only a damaged one: a valid one would have been resumed from
        shutil.rmtree(path)
    os.replace(temporary, path)
    fsync_folder(path.parent)
    return path


def read_state(path: Path) -> dict[str, Any]:
    """`state.json` of a checkpoint after checking every file's sha256. Raises UserError, naming the damaged file."""
    try:
        state = json.loads((path / STATE).read_text())
        for name in (MODEL, OPTIMIZER):
            if sha256_file(path / name) != state["sha256"][name]:
                raise UserError(f"{path / name}: its sha256 is not the one in {STATE}; the checkpoint is damaged")
        return state | {"step": int(state["step"])}
    except OSError as error:
        raise UserError(f"{error.filename}: cannot be read ({error.strerror}); the checkpoint is damaged") from None
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path / STATE}: not a checkpoint's state ({error!r}); the checkpoint is damaged") from None


def list_checkpoints(run: Path) -> list[Path]:
    """Checkpoint folders of a run, oldest first, unchecked."""
    return sorted((Path(run) / FOLDER).glob("step_*"), key=lambda p: int(p.name[5:]) if p.name[5:].isdigit() else -1)


def newest_checkpoint(run: Path) -> tuple[Path, dict[str, Any]] | None:
    """The newest valid checkpoint of a run with its state; damaged ones are named on stderr and passed over."""
    for path in reversed(list_checkpoints(run)):
        try:
            return path, read_state(path)
        except UserError as error:
            print(f"warning: {error}; trying the one before", file=sys.stderr)
    return None


def find_checkpoint(path: str | Path) -> tuple[Path, dict[str, Any]]:
    """The checkpoint meant by `path`, a run folder (its newest valid one) or a checkpoint folder."""
    path = Path(path)
    if (path / STATE).exists():
        return path, read_state(path)
    if not path.is_dir():
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
    """Delete all but the newest `keep` checkpoints and the one of lowest validation loss."""
    paths = list_checkpoints(run)
    losses = {path: loss for path in paths if (loss := _val_loss(path)) is not None}
    best = min(losses, key=losses.__getitem__, default=None)
    for path in paths[:-keep]:
        if path != best:
            shutil.rmtree(path)


def _val_loss(path: Path) -> float | None:
    try:
        return json.loads((path / STATE).read_text())["val_loss"]
    except (OSError, ValueError, KeyError):
        return None


def load_weights(path: Path, model: nn.Module) -> None:
    """Load a checkpoint's weights into `model`. Raises UserError where names or shapes differ."""
    from safetensors.torch import load_file

    try:
        model.load_state_dict(load_file(path / MODEL))
    except RuntimeError as error:
        raise UserError(f"{path / MODEL}: does not fit the model ({' '.join(str(error).split())})") from None


def load_optimizer(path: Path, optimizer: Optimizer) -> None:
    """Load a checkpoint's optimizer and random-number states."""
    saved = torch.load(path / OPTIMIZER, map_location="cpu", weights_only=True)
    optimizer.load_state_dict(saved["optimizer"])
    torch.set_rng_state(saved["rng"]["cpu"])
    if "cuda" in saved["rng"] and torch.cuda.is_available():
        torch.cuda.set_rng_state(saved["rng"]["cuda"])


def rng_state() -> dict[str, torch.Tensor]:
    """States of the random-number generators a step could draw from."""
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def load_model(path: str | Path) -> tuple[GPT, dict[str, Any]]:
    """The model of a run or checkpoint, on the CPU in eval mode, and its state."""
    folder, state = find_checkpoint(path)
    try:
        cfg = Config(**state["config"])
    except pydantic.ValidationError as error:
        reason = error.errors()[0]["msg"]
        raise UserError(f"{folder / STATE}: its configuration is not one of this version ({reason})") from None
    model = GPT(cfg)
    load_weights(folder, model)
    return model.eval(), state | {"path": str(folder)}
