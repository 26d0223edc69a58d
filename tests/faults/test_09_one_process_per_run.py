"""Two processes on one run folder: the second is refused and told who holds it; a killed owner holds nothing."""

import json
import signal
import subprocess

import pytest
from conftest import Hold, logged, run_command, start_command, wait_until

from core import files
from core import run as run_module
from core.checkpoint import list_checkpoints
from core.config import load_config
from core.errors import UserError
from train import train


def starts(run) -> int:
    return len(json.loads((run / "env.json").read_text()))


@pytest.mark.slow
def test_the_second_process_is_refused_and_a_killed_owner_holds_nothing(fault, small, tmp_path, monkeypatch):
    happened = fault("a second train.py on a run folder; then kill -9 of the first and another start")
    monkeypatch.setattr(run_module, "LOCK_PATIENCE_S", 0.5)
    words = [*small, "--encoding=carope", "--name=r"]
    child = start_command("train.py", *words, "--steps=100000", "--save_every=2", real=True)
    wait_until(child, lambda: logged(tmp_path / "r") > 5)
    before = logged(tmp_path / "r")
    with pytest.raises(UserError) as refused:
        train(load_config([*words, "--steps=100000", "--save_every=2"]))
    message = str(refused.value)
    assert f"process {child.pid} on " in message and "train.py" in message and "is at work there" in message
    assert "\n" not in message and logged(tmp_path / "r") >= before and child.poll() is None
    child.send_signal(signal.SIGKILL)
    child.communicate()
    held = list_checkpoints(tmp_path / "r")[-1]
    assert (tmp_path / "r/.lock").exists(), "the owner had no time to tidy up"
    child = start_command("train.py", *words, "--steps=100000", "--save_every=2")
    wait_until(child, lambda: starts(tmp_path / "r") == 2 and list_checkpoints(tmp_path / "r")[-1] > held)
    child.terminate()
    child.communicate()
    assert not (tmp_path / "r/.lock").exists()
    happened(message[message.index("process ") :])


@pytest.mark.slow
def test_a_start_waits_for_its_predecessor_to_save(fault, small, tmp_path):
    happened = fault("a start while the run before it is still saving")
    words = [*small, "--encoding=carope", "--name=r", "--n_embd=512", "--n_layer=4"]
    child = start_command("train.py", *words, "--steps=100000", "--save_every=100000")
    wait_until(child, lambda: logged(tmp_path / "r") > 1)
    child.terminate()
    done = run_command("lab.replay", tmp_path / "r", 0)  # only reads: needs no lock
    assert done.returncode == 0, done.stderr
    child.communicate()
    holder = start_command("-c", HOLD, tmp_path / "r", stdin=subprocess.PIPE)
    wait_until(holder, lambda: (tmp_path / "r/held").exists())
    second_try = Hold(tmp_path, "core.files:_lock", 2)
    after = start_command("train.py", *words, "--steps=100000", env=second_try.env)
    second_try.reached(after)
    holder.communicate()
    assert holder.returncode == 0 and starts(tmp_path / "r") == 1
    before = logged(tmp_path / "r")
    second_try.release()
    wait_until(after, lambda: logged(tmp_path / "r") > before)  # only then does it listen to a signal
    assert starts(tmp_path / "r") == 2
    after.terminate()
    assert "from step" in after.communicate()[1]
    happened("it waited until the folder was free (ten seconds at most) and went on from there")


def test_a_folder_that_goes_with_its_owner_is_made_again(tmp_path, monkeypatch):
    """The owner made it, leaves it empty and takes it away while another waits for it."""
    folder, lock, calls = tmp_path / "f", files._lock, []

    def as_the_owner_leaves(file):
        calls.append(file)
        if len(calls) == 1:
            (folder / files.LOCK).unlink()
            folder.rmdir()
            raise BlockingIOError
        lock(file)

    monkeypatch.setattr(files, "_lock", as_the_owner_leaves)
    with files.locked(folder, patience=60):
        assert (folder / files.LOCK).exists()
    assert not folder.exists()


HOLD = """
import sys
from pathlib import Path
from core.files import locked
with locked(Path(sys.argv[1])):
    (Path(sys.argv[1]) / "held").touch()
    sys.stdin.read()
"""
