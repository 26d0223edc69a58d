"""Asked to leave by a signal, all ranks save at the same step and leave with a code on which a scheduler starts them again."""

import os
import signal
import time
from pathlib import Path

import psutil
import pytest
from conftest import Hold, assert_same_run, logged, records, run_command, start_command, wait_until

from core.checkpoint import newest_checkpoint
from core.errors import EXIT_REQUEUE

WORDS = ["--encoding=carope", "--name=r", "--steps=100000", "--save_every=100000", "--eval_every=100000"]
LAUNCHERS = {"alone": [], "torchrun": ["-m", "torch.distributed.run", "--standalone"], "core.launch": ["core.launch"]}
TWO = "--nproc_per_node=2"


def start(launcher: str, *words: str, **kwargs):
    alone = launcher == "alone"
    return start_command(*LAUNCHERS[launcher], *([] if alone else [TWO]), "train.py", *words, real=not alone, **kwargs)


def ranks(child) -> list[psutil.Process]:
    """The training processes below a launcher, in the order of their ranks."""
    found = [p for p in psutil.Process(child.pid).children(recursive=True) if "train.py" in " ".join(p.cmdline())]
    return sorted(found, key=lambda p: int(p.environ()["RANK"]))


def finish(child) -> tuple[str, float]:
    """stderr, and the seconds until the process was gone."""
    begun = time.monotonic()
    _, stderr = child.communicate()
    return stderr, time.monotonic() - begun


def assert_saved(run: Path, stderr: str) -> int:
    """A checkpoint of the step after the last record; returns the step."""
    step = newest_checkpoint(run)[1].step
    assert step == max(r["step"] for r in records(run)) + 1
    assert 'train.py", line' not in stderr, "torchrun has tracebacks of its own, the ranks have none"
    return step


SLOW = pytest.mark.slow


@pytest.mark.parametrize("number", [pytest.param(signal.SIGTERM, marks=SLOW), signal.SIGINT, signal.SIGUSR1])
@pytest.mark.parametrize("launcher", ["alone", pytest.param("core.launch", marks=SLOW)])
def test_a_signal_saves_and_leaves(fault, small, tmp_path, number, launcher):
    happened = fault(f"{number.name} to train.py, {launcher.replace('core.launch', 'two ranks under core.launch')}")
    child = start(launcher, *small, *WORDS)
    wait_until(child, lambda: logged(tmp_path / "r") > 5)
    child.send_signal(number)
    stderr, seconds = finish(child)
    step = assert_saved(tmp_path / "r", stderr)
    assert child.returncode == EXIT_REQUEUE, stderr
    assert f"{number.name}: saving and leaving" in stderr and f"saved at step {step}" in stderr
    happened(f"saved at the next step, exit code {EXIT_REQUEUE}", leaving_s=round(seconds, 1))


@pytest.mark.parametrize(
    ("number", "target"),
    [
        pytest.param(signal.SIGTERM, "torchrun", marks=SLOW),
        pytest.param(signal.SIGUSR1, "torchrun", marks=SLOW),
        pytest.param(signal.SIGUSR1, "rank 1", marks=SLOW),
        *[pytest.param(number, "rank 0", marks=SLOW) for number in (signal.SIGTERM, signal.SIGINT)],
        pytest.param(signal.SIGINT, "torchrun", marks=SLOW),
        pytest.param(signal.SIGKILL, "torchrun", marks=SLOW),
    ],
)
def test_a_signal_to_torchrun_or_one_rank_saves_on_all(fault, small, tmp_path, number, target):
    happened = fault(f"{number.name} to {target}, two ranks")
    child = start("torchrun", *small, *WORDS)
    wait_until(child, lambda: logged(tmp_path / "r") > 5)
    processes = ranks(child)
    os.kill(child.pid if target == "torchrun" else processes[int(target[-1])].pid, number)
    stderr, seconds = finish(child)  # it ends when nobody holds stderr any more
    assert not any(p.is_running() and p.status() != psutil.STATUS_ZOMBIE for p in processes), "a rank goes on"
    assert_saved(tmp_path / "r", stderr)
    if target != "torchrun":
        assert stderr.count(f"exitcode  : {EXIT_REQUEUE}") == 2 or f"exitcode: {EXIT_REQUEUE}" in stderr, stderr
    code = {True: "killed by it", False: child.returncode}[child.returncode < 0]
    happened(f"both ranks saved the same step and left; torchrun: {code}", leaving_s=round(seconds, 1))


def test_signals_during_the_save_lose_nothing(fault, small, tmp_path):
    happened = fault("ten SIGTERMs while a checkpoint is being written, one rank")
    run, hold = tmp_path / "r", Hold(tmp_path, "core.checkpoint:save_file", 2)  # the weights are written
    child = start("alone", *small, *WORDS, env=hold.env)
    wait_until(child, lambda: logged(run) > 2)
    child.send_signal(signal.SIGTERM)
    hold.reached(child)
    for _ in range(10):
        child.send_signal(signal.SIGTERM)
        time.sleep(0.01)  # signals that have not arrived yet count once
    hold.release()
    stderr, seconds = finish(child)
    assert_saved(run, stderr)
    assert child.returncode == EXIT_REQUEUE and not list(run.glob("checkpoints/.*"))
    happened(f"the checkpoint is whole, exit code {EXIT_REQUEUE}", leaving_s=round(seconds, 1))


@SLOW
@pytest.mark.parametrize("step", [4, 8])
def test_a_signal_during_an_evaluation_does_not_wait_for_its_end(fault, small, tmp_path, step):
    """Step 8 is the last: the weights are final, what remains is the evaluation, and the next start makes up for it."""
    happened = fault(f"SIGTERM in the evaluation of step {step} of 8")
    words, run = [*small, "--encoding=carope"], tmp_path / "r"
    hold = Hold(tmp_path, "core.evaluate:Windows.read", 8 * step + 10)  # each evaluation but the last has 32 batches
    child = start("alone", *words, "--name=r", env=hold.env)
    hold.reached(child)
    child.send_signal(signal.SIGTERM)
    hold.release()
    stderr, seconds = finish(child)
    state = newest_checkpoint(run)[1]
    assert (child.returncode, state.step, state.val_step) == (EXIT_REQUEUE, step, step - 4), stderr
    for name in ("r", "whole"):
        done = run_command("train.py", *words, f"--name={name}")
        assert done.returncode == 0, done.stderr
    assert_same_run(run, tmp_path / "whole")
    happened(
        "left at once; the next start made up for the evaluation and equals an undisturbed run", leaving_s=round(seconds, 1)
    )
