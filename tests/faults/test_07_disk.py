"""A disk that is too small is seen before; one that fills up in the middle leaves what was there, and says what it takes."""

import json
import re
import resource
import subprocess
from contextlib import contextmanager
from pathlib import Path

import pytest
from conftest import assert_same_run, run_command
from filler import fill

from core.checkpoint import newest_checkpoint
from core.config import load_config
from core.errors import UserError
from train import train

FILLER = Path(__file__).with_name("filler.py")
WORDS = ["--encoding=carope", "--name=r"]


@contextmanager
def small_disk(folder: Path, megabytes: int):
    """`folder` as a disk of its own; False where mounting takes rights this process has not."""
    folder.mkdir()
    mount = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(folder)], capture_output=True)
    try:
        yield mount.returncode == 0
    finally:
        if mount.returncode == 0:
            subprocess.run(["umount", "-l", str(folder)], check=True)


def limited(megabytes: float):
    """For preexec_fn: no file may become larger; stands in for a full disk where nothing can be mounted."""
    size = int(megabytes * 1e6)
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_disk_that_fills_up_during_a_checkpoint(fault, small, tmp_path, ranks):
    """The first checkpoint of 13 MB fits, then something else takes the space; when that is gone the run ends as any other."""
    happened = fault(f"the disk is full in the middle of a checkpoint, {ranks} rank(s)")
    launcher = ["core.launch", "--nproc_per_node=2"] if ranks == 2 else []
    words = [*small, *WORDS, "--n_embd=192", "--n_layer=2", "--keep_checkpoints=1", f"--out_dir={tmp_path / 'disk'}"]
    with small_disk(tmp_path / "disk", 64) as mounted:
        run, filler = tmp_path / "disk/r", tmp_path / "disk/filler"
        if mounted:
            done = run_command(*launcher, FILLER, *words, env={"FILLER": str(filler)})
        else:
            done = run_command(*launcher, "train.py", *words, preexec_fn=limited(1), real=True)
        (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
        assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
        wanted = r"step_00000[48]: checkpoint not written \(.*(No space left|File too large).*\); it takes ([0-9,]+) bytes"
        match = re.search(wanted, line)
        assert match and int(match[2].replace(",", "")) > 10_000_000
        assert not list(run.glob("checkpoints/.*")), "half a checkpoint was left behind"
        if mounted:
            assert newest_checkpoint(run)[1].step == 4
            filler.unlink()
        for name in ("r", "whole"):
            done = run_command(*launcher, "train.py", *words, f"--name={name}")
            assert done.returncode == 0, done.stderr
        assert_same_run(run, tmp_path / "disk/whole")
    happened("exit code 2; " + line[line.index("checkpoint not written") :].replace(str(tmp_path), ""))


def test_a_disk_that_is_too_small_is_seen_before(fault, small, tmp_path, monkeypatch):
    happened = fault("space for two checkpoints where four are needed")
    from core import checkpoint

    monkeypatch.setattr(checkpoint, "free_bytes", lambda _: 1_000_000)
    with pytest.raises(UserError) as error:
        train(load_config([*small, *WORDS]))
    # 35,778 parameters with two averages of AdamW, in fp32: 429,336 bytes; two to keep, the best, the one being written
    for part in ("1,000,000 bytes are free", "4 checkpoints of 429,336 take 1,717,344", "--keep_checkpoints", "--out_dir"):
        assert part in str(error.value)
    assert not (tmp_path / "r").exists(), "nothing was begun"
    happened(str(error.value).replace(str(tmp_path), ""))


def test_a_log_that_cannot_be_written(fault, small, tmp_path):
    happened = fault("the disk is full when a record of log.jsonl is written")
    with small_disk(tmp_path / "disk", 1) as mounted:
        if not mounted:
            pytest.skip("takes the right to mount a file system")
        (tmp_path / "disk/log.jsonl").touch()
        fill(tmp_path / "disk/filler")
        (tmp_path / "r").mkdir()
        (tmp_path / "r/log.jsonl").symlink_to(tmp_path / "disk/log.jsonl")
        with pytest.raises(UserError, match=r"log.jsonl: not written \(No space left on device\)") as error:
            train(load_config([*small, *WORDS]))
    happened("exit code 2; " + str(error.value).replace(str(tmp_path), ""))


def test_a_disk_that_fills_up_during_preparation(fault, tmp_path):
    happened = fault("the disk is full in the middle of a shard")
    source = tmp_path / "text.jsonl"
    words = "the quick brown fox jumps over the lazy dog and the cat looks on "
    source.write_text("".join(json.dumps({"text": f"{i} " + 40 * words}) + "\n" for i in range(4000)))  # 10.5 MB of text
    command = ["prepare_fineweb.py", "--source", source, "--tokenizer", "bytes", "--val_tokens", 1_000_000]
    command += ["--shard_tokens", 3_000_000]
    with small_disk(tmp_path / "disk", 32) as mounted:
        out, filler = tmp_path / "disk/out", tmp_path / "disk/filler"
        if mounted:  # what another process writes while this one works
            done = run_command(FILLER.with_name("fill_at_shard.py"), *command[1:], "--out", out, env={"FILLER": str(filler)})
            filler.unlink()
        else:
            done = run_command(*command, "--out", out, preexec_fn=limited(5), real=True)
        (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
        assert done.returncode == 2 and re.search(
            r"train_00000\d.bin: cannot be written \(.*\); it takes 6,001,024 bytes", line
        )
        assert not list(out.glob(".*.tmp"))
        for folder in (out, tmp_path / "whole"):
            assert run_command(*command, "--out", folder).returncode == 0
        assert {p.name: p.read_bytes() for p in out.glob("*.bin")} == {
            p.name: p.read_bytes() for p in (tmp_path / "whole").glob("*.bin")
        }
    happened("exit code 2; " + line[line.index("train_") :])
