"""A run that was killed and started again is the run that was not: weights, optimizer, random numbers, every log."""

import shutil
import signal
from collections import Counter

import psutil
import pytest
from conftest import Hold, assert_same_run, records, run_command, start_command

from core.config import load_config
from core.trackers import wandb_history
from train import train

WORDS = ["--encoding=carope"]


def launch(ranks: int, *words: str) -> None:
    launcher = ["core.launch", f"--nproc_per_node={ranks}"] if ranks > 1 else []
    done = run_command(*launcher, "train.py", *words)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_killed_run_ends_bit_for_bit_like_another(fault, small, tmp_path, ranks, dtype):
    happened = fault(f"kill -9 of every process in step 19, {ranks} rank(s), {dtype}, compile off")
    words = [*small, *WORDS, f"--dtype={dtype}", "--steps=30", "--save_every=7", "--compile=off"]
    launcher = ["core.launch", f"--nproc_per_node={ranks}"] if ranks > 1 else []
    hold = Hold(tmp_path, "core.optim:set_lr", 20)
    child = start_command(*launcher, "train.py", *words, "--name=parts", env=hold.env, real=True)
    hold.reached(child)
    for process in [*psutil.Process(child.pid).children(recursive=True), child]:
        process.kill()
    child.communicate()
    for name in ("parts", "whole"):
        launch(ranks, *words, f"--name={name}")
    assert_same_run(tmp_path / "parts", tmp_path / "whole")
    assert [r["step"] for r in records(tmp_path / "parts") if "lr" in r] == list(range(30))
    happened("sha256 of weights and of optimizer with RNG states are equal, and so is every record of the log")


@pytest.mark.slow
def test_other_numbers_of_ranks_see_the_same_batches(fault, small, tmp_path):
    happened = fault("four steps on one rank, four on two, four on four; against twelve on one")
    words = [*small, *WORDS, "--steps=12", "--micro_batch=2", "--verify_data=full"]
    train(load_config([*words, "--name=one"]))
    for ranks, stop in ((1, 4), (2, 8), (4, 12)):
        run = tmp_path / "mixed"
        launch(ranks, *words, "--name=mixed")
        for path in run.glob("checkpoints/step_*"):
            if int(path.name[5:]) > stop:
                shutil.rmtree(path)
    launch(4, *words, "--name=mixed")
    worst = 0.0
    for a, b in zip(records(tmp_path / "one"), records(tmp_path / "mixed"), strict=True):
        assert a["step"] == b["step"]
        for key in a.keys() & {"loss", "val_loss"}:
            worst = max(worst, abs(a[key] / b[key] - 1))
    assert worst < 1e-5
    happened(f"the losses differ by {worst:.1g} at most", relative_difference=worst)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_wandb_and_tensorboard_go_on_without_gap_or_repetition(fault, small, tmp_path, number):
    happened = fault(f"{number.name} in the middle of a run that logs to wandb (offline) and TensorBoard")
    words = [*small, *WORDS, "--name=r", "--steps=200", "--save_every=40", "--wandb=offline", "--tensorboard=true"]
    hold = Hold(tmp_path, "core.optim:set_lr", 120)  # well beyond a checkpoint
    child = start_command("train.py", *words, env=hold.env)
    hold.reached(child)
    child.send_signal(number)
    hold.release()
    child.communicate()
    launch(1, *words)
    expected = [(r["step"], "val" if "val_loss" in r else "train") for r in records(tmp_path / "r")]
    assert len(expected) == len(set(expected)) == 200 + 51
    assert wandb_history(tmp_path / "r") == Counter((step, kind == "val") for step, kind in expected)

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "r/tensorboard"), {"scalars": 0})
    events.Reload()
    assert [e.step for e in events.Scalars("loss")] == [step for step, kind in expected if kind == "train"]
    assert [e.step for e in events.Scalars("val_loss")] == [step for step, kind in expected if kind == "val"]
    happened(f"each of the {len(expected)} records is once in log.jsonl, in wandb's files and in TensorBoard's")
