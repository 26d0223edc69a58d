"""What cannot be read is not absent: a start stops there, and deletes nothing; and what we write, others may read."""

import os
import shutil
import stat
from pathlib import Path

import pytest
from conftest import obey_modes, run_command

from core.checkpoint import Unreadable, list_checkpoints, newest_checkpoint, prune_checkpoints
from core.errors import UserError

NEWEST = "checkpoints/step_000008"


@pytest.fixture
def words(small) -> list[str]:
    return [*small, "--encoding=rope", "--name=demo-rope", "--keep_checkpoints=1"]


@pytest.fixture
def run(words, tmp_path) -> Path:
    done = run_command("train.py", *words)
    assert done.returncode == 0, done.stderr
    return tmp_path / "demo-rope"


def everything(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.parametrize(
    "what",
    [
        f"{NEWEST}/model.safetensors",
        "checkpoints",
        *(pytest.param(what, marks=pytest.mark.slow) for what in (f"{NEWEST}/state.json", NEWEST)),
    ],
)
def test_a_checkpoint_that_cannot_be_read_stops_the_start(run, words, what):
    before, path = everything(run), run / what
    mode = path.stat().st_mode
    path.chmod(0)
    try:
        table = ["table1.py", "--dry_run", "--sizes", "demo", "--encodings", "rope", *words[:-3], "--keep_checkpoints=1"]
        others = [["eval_ppl.py", run, "--lengths", "16"], table] if what == "checkpoints" else []
        for command in (["train.py", *words], *others):
            done = run_command(*command, real=True, preexec_fn=obey_modes)
            assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
            assert "cannot be read (Permission denied), so it is not known what is there" in done.stderr
            assert str(run) in done.stderr and "chmod -R u+rX" in done.stderr
    finally:
        path.chmod(mode)
    assert everything(run) == before
    again = run_command("train.py", *words)
    assert again.returncode == 0 and "finished at step 8 already" in again.stdout


def test_a_run_of_which_no_checkpoint_is_whole_does_not_begin_anew(run, words):
    """Its log would be cut to nothing."""
    for path in list_checkpoints(run):
        (path / "optimizer.safetensors").write_bytes(b"damaged")
    before = everything(run)
    done = run_command("train.py", *words)
    assert done.returncode == 2 and "has checkpoints, and none of them is whole" in done.stderr
    assert everything(run) == before


def test_no_checkpoint_is_pruned_that_cannot_be_read(run, monkeypatch):
    for step in (2, 4, 6):
        shutil.copytree(run / NEWEST, run / f"checkpoints/step_{step:06d}")
    read_bytes = Path.read_bytes

    def refuse(path: Path) -> bytes:
        if "step_000004" in path.parts:
            raise PermissionError(13, "Permission denied", str(path))
        return read_bytes(path)

    monkeypatch.setattr(Path, "read_bytes", refuse)
    prune_checkpoints(run, 1)
    assert [path.name for path in list_checkpoints(run)] == [
        "step_000002",
        "step_000004",
        "step_000008",
    ]  # the first is the best


@pytest.mark.parametrize("error", [5, 116])  # EIO, ESTALE
def test_a_disk_that_fails_is_no_damage(run, monkeypatch, error):
    def refuse(path: Path) -> str:
        raise OSError(error, os.strerror(error), str(path))

    monkeypatch.setattr("core.checkpoint.sha256_file", refuse)
    with pytest.raises(Unreadable, match=os.strerror(error)):
        newest_checkpoint(run)
    assert issubclass(Unreadable, UserError)


@pytest.mark.slow
@pytest.mark.parametrize("umask", [0o002, 0o077])
def test_modes_follow_the_umask(small, tmp_path, umask):
    words = [*small, "--encoding=rope", "--name=r", "--steps=2", "--save_every=1"]
    for command in (["train.py", *words], ["lab.export_hf", tmp_path / "r", tmp_path / "exported"]):
        done = run_command(*command, real=True, umask=umask)
        assert done.returncode == 0, done.stderr
    made = [path for folder in ("r", "exported") for path in (tmp_path / folder, *(tmp_path / folder).rglob("*"))]
    assert {"model.safetensors", "optimizer.safetensors", "state.json", "log.jsonl"} <= {path.name for path in made}
    for path in made:
        expected = (0o777 if path.is_dir() else 0o666) & ~umask
        assert stat.S_IMODE(path.stat().st_mode) == expected, path
