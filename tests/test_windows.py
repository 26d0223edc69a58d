"""What Windows does differently, as far as Linux can stand for it: spawned processes, modules and calls that are missing."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, ends_with_the_test, records, run_command

SCRIPTS = sorted(path.name for path in ROOT.glob("*.py") if "__main__" in path.read_text())
WITHOUT = """
import fcntl as real, os, signal, subprocess, sys, types  # subprocess takes msvcrt for a sign of Windows

def locking(descriptor, mode, count):
    real.lockf(descriptor, real.LOCK_EX | real.LOCK_NB, count, os.lseek(descriptor, 0, os.SEEK_CUR))

def no_folders(path, *rest, _open=os.open, **more):
    if os.path.isdir(path):
        raise PermissionError(13, "Permission denied", path)
    return _open(path, *rest, **more)

def writable_only(descriptor, _fsync=os.fsync):
    if real.fcntl(descriptor, real.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
        raise OSError(9, "Bad file descriptor")
    _fsync(descriptor)

sys.modules |= {"fcntl": None, "resource": None, "msvcrt": types.SimpleNamespace(locking=locking, LK_NBLCK=2)}
os.open, os.fsync = no_folders, writable_only
del signal.SIGUSR1
"""


@pytest.fixture
def windows(tmp_path) -> dict[str, str]:
    """The environment of a Python that lacks what Windows lacks."""
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib/sitecustomize.py").write_text(WITHOUT)
    return {"PYTHONPATH": str(tmp_path / "lib")}


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_spawned_process_imports_a_script_without_running_it(script, tmp_path):
    program = tmp_path / "spawned.py"
    program.write_text(
        f"import runpy, sys\nsys.argv = [{script!r}, '--help']\nrunpy.run_path({script!r}, run_name='__mp_main__')\n"
    )
    done = run_command(program, env={"PYTHONPATH": str(ROOT)})
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.slow
def test_a_run_can_be_trained_in_a_spawned_process(small, tmp_path):
    program = tmp_path / "sweep.py"
    program.write_text(
        "import multiprocessing, sys\n"
        "from core.config import load_config\n"
        "from train import train\n\n"
        'if __name__ == "__main__":\n'
        "    cfg = load_config(sys.argv[1:])\n"
        '    child = multiprocessing.get_context("spawn").Process(target=train, args=(cfg,))\n'
        "    child.start()\n    child.join()\n    sys.exit(child.exitcode)\n"
    )
    done = run_command(program, *small, "--name=r", env={"PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr
    assert records(tmp_path / "r")[-1]["step"] == 8


@pytest.mark.slow
def test_preparation_training_and_evaluation_need_nothing_that_windows_lacks(windows, small, tmp_path):
    sizes = ["--limit_tokens", 9000, "--val_tokens", 3000, "--shard_tokens", 3000]
    commands = [
        ["prepare_fineweb.py", "--source", "demo", "--tokenizer", "bytes", "--out", tmp_path / "d", *sizes],
        ["train.py", *small, f"--data={tmp_path / 'd'}", "--name=r", "--encoding=carope"],
        ["eval_ppl.py", tmp_path / "r", "--lengths", 32, "--json", tmp_path / "eval.json"],
        ["sample.py", tmp_path / "r", "--max_new_tokens", 4],
    ]
    for words in commands:
        done = run_command(*words, env=windows, real=True)
        assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "eval.json").read_text())[0]["perplexity"] > 1


def test_a_folder_is_locked_without_flock_too(windows, tmp_path):
    held = "from pathlib import Path; from core.files import locked\nwith locked(Path('{}')): {}"
    command = [sys.executable, "-c", held.format(tmp_path / "f", "print('in', flush=True); input()")]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    first = ends_with_the_test(subprocess.Popen(command, cwd=ROOT, env=os.environ | windows, **pipes))
    assert first.stdin and first.stdout and first.stdout.readline() == "in\n"
    second = run_command("-c", held.format(tmp_path / "f", "print('in')"), env=windows)
    assert (
        f"process {first.pid} on " in second.stderr
        and "is at work there" in second.stderr
        and "in" not in second.stdout.split()
    )
    first.communicate("\n")
    assert run_command("-c", held.format(tmp_path / "f", "print('in')"), env=windows).stdout == "in\n"
    assert not Path(tmp_path / "f").exists()
