"""Nobody listens: a run loses its messages and nothing else, and a product that nobody reads is no success."""

import json
import os
import signal
import subprocess
import sys

import pytest
from conftest import ROOT, Hold, assert_same_run, run_command, start_command

from core.checkpoint import newest_checkpoint

CLOSED = (0, 1, 2)


@pytest.fixture
def words(small) -> list[str]:
    return [*small, "--encoding=rope", "--name=r"]


def nobody() -> int:
    """The end to write to of a pipe that nobody reads."""
    ours, theirs = os.pipe()
    os.close(ours)
    return theirs


def full() -> int:
    """A disk that is full."""
    return os.open("/dev/full", os.O_WRONLY)


@pytest.mark.parametrize("stream", [nobody, full])
def test_a_run_that_nobody_hears_is_whole(words, tmp_path, stream):
    out = stream()
    child = start_command("train.py", *words, stdout=out, stderr=out)
    assert child.wait() == 0
    assert run_command("train.py", *words, "--name=heard").returncode == 0
    assert_same_run(tmp_path / "r", tmp_path / "heard")


def close_all() -> None:
    for number in CLOSED:
        os.close(number)


@pytest.mark.slow
def test_closed_streams_do_not_become_files_of_the_run(words, tmp_path):
    """The next file to be opened would take the number of the closed one, and with it all that is printed."""
    child = start_command("train.py", *words, "--wandb=disabled", real=True, preexec_fn=close_all)
    child.communicate()
    assert child.returncode == 0
    assert run_command("train.py", *words, "--name=heard").returncode == 0
    assert_same_run(tmp_path / "r", tmp_path / "heard")
    for line in (tmp_path / "r/log.jsonl").read_text().splitlines():
        assert "step" in json.loads(line)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_saves_where_nobody_listens(words, tmp_path, number):
    hold, out = Hold(tmp_path, "core.optim:set_lr", 6), nobody()
    child = start_command("train.py", *words, env=hold.env, stdout=out, stderr=out)
    hold.reached(child)
    child.send_signal(number)
    hold.release()
    assert child.wait() == 75
    assert newest_checkpoint(tmp_path / "r")[1].step == 6
    assert run_command("train.py", *words).returncode == 0


def ignore_hangup() -> None:
    """What nohup does."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)


def test_under_nohup_a_terminal_that_closes_changes_nothing(words, tmp_path):
    hold = Hold(tmp_path, "core.optim:set_lr", 6)
    child = start_command("train.py", *words, env=hold.env, real=True, preexec_fn=ignore_hangup)
    hold.reached(child)
    child.send_signal(signal.SIGHUP)
    hold.release()
    child.communicate()
    assert child.returncode == 0


@pytest.mark.slow
def test_a_preparation_and_a_table_go_on(corpus, words, tmp_path):
    sizes = ["--val_tokens", 20_000, "--shard_tokens", 50_000, "--limit_tokens", 150_000]
    demo = ["--source", "demo", "--tokenizer", "bytes", "--out", tmp_path / "data", *sizes]
    table = ["--sizes", "demo", "--encodings", "rope", "--lengths", "16", "--max_tokens", "500", *words[:-2]]
    for command in (["prepare_fineweb.py", *demo], ["table1.py", *table]):
        out = nobody()
        assert start_command(*command, stdout=out, stderr=out).wait() == 0
    assert {path.name: path.read_bytes() for path in (tmp_path / "data").glob("*.bin")} == {
        path.name: path.read_bytes() for path in corpus.glob("*.bin")
    }
    assert (tmp_path / "table1.md").exists() and (tmp_path / "table1.png").exists()


@pytest.mark.parametrize("script", ["eval_ppl.py", "sample.py"])
def test_a_product_that_nobody_reads_is_no_success(runs, tmp_path, script):
    words = {
        "eval_ppl.py": ["--lengths", "16", "--max_tokens", "500", "--json", tmp_path / "a.json"],
        "sample.py": ["--max_new_tokens", "5"],
    }[script]
    child = start_command(script, runs / "carope", *words, "--device", "cpu", stdout=nobody())
    _, said = child.communicate()
    assert child.returncode == 141 and "Traceback" not in said and "Broken" not in said
    assert script == "sample.py" or len(json.loads((tmp_path / "a.json").read_text())) == 1


@pytest.mark.parametrize("encoding", ["ascii", *(pytest.param(name, marks=pytest.mark.slow) for name in ("latin-1", "cp1252"))])
def test_a_terminal_of_few_characters_gets_what_it_can_show(runs, encoding):
    for command in (["train.py", "--help"], ["eval_ppl.py", runs / "learned", "--lengths", "16", "64", "--max_tokens", "500"]):
        done = subprocess.run(
            [sys.executable, *map(str, command)], cwd=ROOT, capture_output=True, env=os.environ | {"PYTHONIOENCODING": encoding}
        )
        assert done.returncode == 0 and b"Traceback" not in done.stderr, done.stderr
        said = done.stdout.decode(encoding)
    assert "?" in said or "±" in said
