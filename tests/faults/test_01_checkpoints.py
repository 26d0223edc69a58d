"""Checkpoints are whole or not there, written while waiting or behind the back of training; the newest valid one counts."""

import os
import shutil
import signal
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from conftest import Hold, assert_same_run, records, run_command, spread, start_command

from core import checkpoint
from core.checkpoint import CheckpointWriter, State, list_checkpoints, newest_checkpoint
from core.config import load_config
from core.errors import UserError
from core.optim import make_optimizer
from model import GPT
from train import train

WORDS = ["--encoding=carope", "--name=r"]


@pytest.mark.parametrize("mode", ["true", pytest.param("false", marks=pytest.mark.slow)], ids=["behind the back", "waiting"])
def test_a_kill_in_the_middle_of_a_save(fault, small, tmp_path, mode):
    """Three times, each time in the second save of a start and at another file: the temporary folder is there."""
    happened = fault(f"kill -9 while a checkpoint is being written, three times, --async_checkpoint={mode}")
    run = tmp_path / "r"
    words = [*small, *WORDS, f"--async_checkpoint={mode}", "--steps=9", "--save_every=1", "--eval_every=100"]
    newest = []
    # Of one save are two, one and two calls; and one of "sealed" of a start, to check the checkpoint from which it continues
    for function, nth in (("save_file", 4), ("sealed", 3), ("fsync_folder", 3)):
        hold = Hold(tmp_path, f"core.checkpoint:{function}", nth)
        child = start_command("train.py", *words, env=hold.env)
        hold.reached(child)
        os.killpg(child.pid, signal.SIGKILL)
        child.communicate()
        assert [path.name for path in run.glob("checkpoints/.step_*")]
        newest.append(newest_checkpoint(run)[1].step)
    for name in ("r", "whole"):
        done = run_command("train.py", *words, f"--name={name}")
        assert done.returncode == 0, done.stderr
    assert newest == [1, 2, 3]
    assert_same_run(run, tmp_path / "whole")
    assert {path.name for path in (run / "checkpoints").iterdir()} <= {f"step_{step:06d}" for step in (8, 9)}
    happened(f"each start found a whole checkpoint (steps {newest}); the end equals an undisturbed run; no leftovers")


DAMAGE = {
    "a flipped bit": lambda path: path.write_bytes(flip(path.read_bytes())),
    "cut short": lambda path: os.truncate(path, path.stat().st_size // 2),
    "emptied": lambda path: os.truncate(path, 0),
    "removed": Path.unlink,
    "replaced by a folder": lambda path: (path.unlink(), path.mkdir()),
}


def flip(raw: bytes) -> bytes:
    return raw[: len(raw) // 2] + bytes([raw[len(raw) // 2] ^ 1]) + raw[len(raw) // 2 + 1 :]


@pytest.fixture(scope="module")
def trained(corpus, tmp_path_factory) -> Path:
    """A run with checkpoints of steps 2 and 4."""
    out = tmp_path_factory.mktemp("trained")
    words = [f"--data={corpus}", f"--out_dir={out}", "--name=r", "--n_layer=1", "--n_head=1", "--n_embd=8", "--vocab_size=320"]
    words += ["--block_size=16", "--micro_batch=1", "--tokens_per_step=16", "--steps=4", "--save_every=2", "--warmup_steps=0"]
    train(load_config([*words, "--eval_tokens=64", "--final_eval_tokens=64", "--encoding=carope"]))
    return out / "r"


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("file", [checkpoint.MODEL, checkpoint.OPTIMIZER, checkpoint.STATE])
def test_a_damaged_checkpoint_is_named_and_passed_over(fault, trained, tmp_path, capsys, file, damage):
    happened = fault(f"{file} of the newest checkpoint {damage}")
    run = tmp_path / "r"
    shutil.copytree(trained, run)
    assert newest_checkpoint(run)[1].step == 4
    DAMAGE[damage](run / "checkpoints/step_000004" / file)
    found = newest_checkpoint(run)
    assert found[1].step == 2
    warning = capsys.readouterr().err
    assert f"step_000004/{file}" in warning and "damaged; trying the one before" in warning and warning.count("\n") == 1
    happened(warning.replace(str(tmp_path), "").strip())


def test_old_checkpoints_go_only_when_the_new_one_is_safe(fault, small, tmp_path, monkeypatch):
    happened = fault("the write of each second checkpoint fails, --keep_checkpoints=1")
    save_file, calls = checkpoint.save_file, []

    def fails_at_times(tensors, path):
        calls.append(path)
        save_file(tensors, path)
        if path.name == checkpoint.OPTIMIZER and len(calls) % 4 == 0:
            raise OSError(5, "Input/output error", str(path))

    monkeypatch.setattr(checkpoint, "save_file", fails_at_times)
    words = [*small, *WORDS, "--save_every=1", "--keep_checkpoints=1", "--steps=6"]
    kept = []
    while not kept or kept[-1] < 6:
        with suppress(UserError):
            train(load_config(words))
        kept.append(newest_checkpoint(tmp_path / "r")[1].step)
        assert {path.name for path in (tmp_path / "r/checkpoints").iterdir()} >= {f"step_{kept[-1]:06d}"}
    assert kept == sorted(kept) and len(kept) > 2
    happened(f"a whole checkpoint was there after each failure (steps {kept}), and the run came to its end")


def test_an_asynchronous_failure_comes_up_at_the_next_step(fault, small, tmp_path, monkeypatch):
    happened = fault("the disk fails while a checkpoint is written behind the back of training")
    monkeypatch.setattr(checkpoint, "save_file", broken)
    words = [*small, *WORDS, "--save_every=2", "--steps=100", "--async_checkpoint=true", "--eval_every=1000"]
    with pytest.raises(UserError, match=r"checkpoint not written \(Input/output error\); it takes [0-9,]+ bytes"):
        train(load_config(words))
    last = max(r["step"] for r in records(tmp_path / "r"))
    assert last < 20 and not list_checkpoints(tmp_path / "r")
    happened(f"training stopped after step {last}, with the path and the bytes needed")


def broken(_tensors, path: Path) -> None:
    raise OSError(5, "Input/output error", str(path))


def test_checkpoints_written_behind_the_back_are_the_same(fault, small, tmp_path):
    happened = fault("training goes on while its weights are being written (--async_checkpoint)")
    for mode in ("false", "true"):
        train(load_config([*small, *WORDS, f"--name={mode}", f"--async_checkpoint={mode}", "--save_every=1", "--steps=20"]))
    assert_same_run(tmp_path / "true", tmp_path / "false")
    for path in list_checkpoints(tmp_path / "true"):
        other = tmp_path / "false/checkpoints" / path.name
        for file in (checkpoint.MODEL, checkpoint.OPTIMIZER):
            assert checkpoint.read_state(path).sha256[file] == checkpoint.read_state(other).sha256[file]
    happened("every file of every checkpoint has the same sha256 as without")


@pytest.mark.slow
def test_the_stall_of_a_step(fault, tmp_path):
    """A measurement, not a comparison: how long a step of GPT-Tiny waits for its checkpoint of 536 MB, and for a valid one."""
    happened = fault("saving and loading GPT-Tiny (44.7M parameters), n = 5 each")
    cfg = load_config(["config/tiny.toml", "config/carope.toml"])
    model = GPT(cfg)
    optimizer = make_optimizer(model, cfg)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    figures = {}
    for background in (False, True):
        writer = CheckpointWriter(tmp_path, 2, background)
        stalls, whole = [], []
        for step in range(1, 7):
            begun = time.perf_counter()
            writer.save(model, optimizer, state_of(cfg, step))
            stalls.append(time.perf_counter() - begun)
            writer.wait()
            whole.append(time.perf_counter() - begun)
        name = "async" if background else "sync"
        figures[f"{name}_stall_s"] = spread(stalls[1:])
        figures[f"{name}_until_safe_s"] = spread(whole[1:])
    loads = []
    for _ in range(5):
        begun = time.perf_counter()
        path, _ = newest_checkpoint(tmp_path)
        checkpoint.load_weights(path, model)
        checkpoint.load_optimizer(path, model, optimizer)
        loads.append(time.perf_counter() - begun)
    figures["load_and_verify_s"] = spread(loads)
    figures["bytes"] = sum(file.stat().st_size for file in path.iterdir())
    happened("medians with least and most", **figures)


def state_of(cfg, step: int) -> State:
    data = {"tokenizer": "gpt2", "train_tokens": 0, "shards": []}
    return State(step=step, tokens=0, config=cfg.model_dump(), **data, val_loss=None, log_bytes=0, git=None)
