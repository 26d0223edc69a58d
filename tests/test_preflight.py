"""table1.py --preflight: on two gloo ranks by its command, with faults that it is to find, and nothing left behind."""

import json
import signal
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, Hold, as_rank, run_command, start_command

import table1
from core.errors import UserError
from core.sweep import needs, trial
from core.sweep.plan import Entry
from core.sweep.plan import plan as make_plan
from core.sweep.preflight import FOLDER, preflight

FAULTS = Path(__file__).with_name("preflight_faults.py")
TOY = [
    "--n_layer=1", "--n_embd=16", "--n_head=2", "--micro_batch=4", "--tokens_per_step=4096", "--steps=20", "--warmup_steps=2",
    "--device=cpu",
]  # fmt: skip


@pytest.fixture
def words(corpus, tmp_path) -> list[str]:
    """Of a plan whose out_dir is not there yet; a step has eight micro-steps on two ranks."""
    return [f"--data={corpus}", f"--out_dir={tmp_path / 'new/runs'}", *TOY]


def plan(words: list[str], *encodings: str) -> list[Entry]:
    return make_plan(["demo"], encodings, [], words)


def test_two_ranks_by_the_command(words, tmp_path):
    (tmp_path / "tmp").mkdir()
    env = {"TMPDIR": str(tmp_path / "tmp")}
    command = ["table1.py", "--nproc", 2, "--preflight", "--sizes", "demo", "--encodings", "rope", "carope_hidden"]
    done = run_command(*command, *words, "--json", tmp_path / "out.json", env=env)
    assert done.returncode == 0 and done.stderr == ""
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.json", "tmp"]
    assert not list(tmp_path.glob("tmp/bench-*"))

    found = json.loads((tmp_path / "out.json").read_text())
    assert found["world_size"] == 2 and found["problems"] == []
    assert found["exchange"]["backend"] == "gloo" and found["exchange"]["bus_bytes_per_second"] > 0
    assert [data["train_tokens"] for data in found["data"].values()] == [130_000]
    rope, carope = found["results"]
    size = 12 * sum(p.numel() for p in table1_model("carope_hidden", words).parameters())
    assert found["exchange"]["bytes"] == size / 3
    for run in rope, carope:
        assert run["tokens_per_second"] > 0 and run["peak_memory_bytes"] > 1e7 and not run["synthetic"]
        assert (run["n"], run["micro_steps"], run["grad_accum"], len(run["losses"])) == (5, 4, 8, 8)
        assert all(0 < loss < 7 for loss in run["losses"]) and run["losses"][-1] < run["losses"][0]
        assert run["hours"] == pytest.approx(20 * 4096 / run["tokens_per_second"] / 3600)
    assert "checkpoint" not in rope and size < carope["checkpoint"]["bytes"] < size + 20_000  # the largest; random states
    assert found["gpu_hours"] == pytest.approx(2 * found["hours"]) and found["dollars"] == 2.5 * found["gpu_hours"]

    lines = done.stdout.splitlines()
    assert [line.split()[0] for line in lines if line.startswith("demo-")] == ["demo-rope", "demo-carope_hidden"]
    for part in (
        "the sum is right", "130,000 tokens to train on, of which a run reads 81,920", "all came back bit for bit",
        "2 of 2 together", "at $2.50 per", "measured in 5 steps of 4 micro-steps, a run's have 8",
    ):  # fmt: skip
        assert done.stdout.count(part) == 1, part
    assert lines[-1].startswith("all is well")


def table1_model(encoding: str, words: list[str]) -> torch.nn.Module:
    from model import GPT

    return GPT(plan(words, encoding)[0].cfg)


def test_what_is_wrong_is_found_and_the_others_go_on(words, tmp_path):
    """Rank 1 of one run has not the memory, of another it goes astray; the disk is small; there are no data."""
    out = tmp_path / "out.json"
    command = [FAULTS, "--preflight", "--sizes", "demo", "--encodings", "learned", "nope", "rope", *words, "--json", out]
    done = run_command("core.launch", "--nproc_per_node=2", *command, f"--data={tmp_path / 'no'}")
    assert done.returncode == 2 and done.stderr.startswith("error: not ready: ") and done.stderr.count("\n") == 1, done.stderr
    found = json.loads(out.read_text())
    learned, nope, rope = found["results"]
    assert "does not fit into the memory of rank 1 (CUDA out of memory. Tried to allocate 2.00 GiB); " in learned["problem"]
    assert "--micro_batch" in learned["problem"] and "hours" not in learned
    assert nope["problem"] == "demo-nope: the ranks do not agree on weights after 8 steps"
    assert "problem" not in rope and rope["synthetic"] and rope["losses"][0] == pytest.approx(5.8, abs=0.3)
    data, disk = (found["data"][str(tmp_path / "no")]["problem"], *[one["problem"] for one in found["disks"]])
    assert "no such data folder; `python prepare_fineweb.py" in data
    assert "1.0 MB are free and to come are " in disk and "of shards in " in disk and "--out_dir" in disk
    assert found["problems"] == [data, disk, learned["problem"], nope["problem"]]
    assert done.stderr == f"error: not ready: {'; '.join(found['problems'])}\n"
    assert "2 of 3 together" in done.stdout and done.stdout.splitlines()[-1].startswith("not ready")
    assert list(tmp_path.iterdir()) == [out] and "checkpoint" not in rope


def test_a_signal_leaves_nothing_behind(words, tmp_path, tmp_path_factory):
    """In the second of two runs: the folder of the first one's checkpoint is there."""
    hold = Hold(tmp_path_factory.mktemp("hold"), "core.sweep.trial:take_steps", 2)
    command = ["--nproc", "2", "--preflight", "--sizes", "demo", "--encodings", "rope", "carope", *words]
    child = start_command("table1.py", *command, env=hold.env)
    hold.reached(child)
    assert (tmp_path / "new/runs" / FOLDER).exists()
    child.send_signal(signal.SIGTERM)
    stderr = child.communicate()[1]
    assert child.returncode == 75 and "Traceback" not in stderr
    assert not list(tmp_path.iterdir())


def test_alone_and_after_one_that_was_killed(words, tmp_path, capsys):
    """What is in out_dir stays as it is, but for what the killed one left."""
    out = tmp_path / "new/runs"
    (out / FOLDER / "checkpoints/step_000099").mkdir(parents=True)
    (out / "demo-rope").mkdir()
    (out / "demo-rope/notes").write_text("mine")
    preflight(plan(words, "rope"), None)
    assert [str(path.relative_to(out)) for path in sorted(out.rglob("*"))] == ["demo-rope", "demo-rope/notes"]
    said = capsys.readouterr().out
    assert "exchange: none, one process" in said and "bit for bit" in said and "all is well" in said


def test_a_checkpoint_that_brings_back_something_else(words, monkeypatch):
    monkeypatch.setattr(trial, "load_weights", lambda path, model: None)
    with pytest.raises(UserError, match="not ready: demo-rope: a checkpoint brings back other weights or averages"):
        preflight(plan(words, "rope"), None)


def test_what_is_finished_is_not_tried(words, capsys):
    preflight([replace(entry, state=SimpleNamespace(step=8, finished=True)) for entry in plan(words, "rope")], None)
    assert capsys.readouterr().out == "all runs are finished, nothing to try\n"


def test_the_space_that_a_plan_takes(words, tmp_path, monkeypatch):
    """At most four checkpoints at once of the run at work, three of each that is done; those that are there count."""
    entries = plan([*words, "--keep_checkpoints=2"], "rope", "carope_hidden")
    small, large = (12 * needs.n_parameters(entry.cfg) for entry in entries)
    assert needs.check_files(entries)[1][0]["needed_bytes"] == 3 * small + 4 * large
    (entries[1].cfg.folder / "checkpoints/step_000010").mkdir(parents=True)
    assert needs.check_files(entries)[1][0]["needed_bytes"] == 3 * small + 3 * large
    monkeypatch.setattr(needs, "free_bytes", lambda _: 3 * small + 3 * large - 1)
    (disk,) = needs.check_files(entries)[1]
    assert disk["problem"].startswith("too little space") and str(tmp_path / "new/runs") in disk["problem"]


def test_too_few_tokens(words):
    """A few that are read twice, as the last of FineWeb-Edu's 10B are, do not matter; most of them do."""
    almost, few = (plan([*words, f"--steps={steps}"], "rope") for steps in (33, 66))  # of 4,096; there are 130,000
    assert "problem" not in needs.check_tokens(almost[0].cfg)
    found = needs.check_tokens(few[0].cfg)
    assert "130,000 tokens to train on, a run reads 270,336" in found["problem"]
    assert found["missing_bytes"] == 2 * (66 * 4096 - 130_000)


@pytest.mark.parametrize(
    ("extra", "ranks", "message"),
    [
        (["--json", "x"], 0, "--json: goes with --preflight"),
        (["--preflight", "--nproc", "2"], 2, "--nproc 2: torchrun has started the processes already"),
        (["--preflight", "--nproc", "3"], 0, "is no multiple of micro_batch 4 × block_size 64 × 3 device"),
        (["--preflight", "--name=x"], 0, "--name=x: a run here is called SIZE-ENCODING"),
    ],
)
def test_refusals(words, extra, ranks, message, monkeypatch):
    monkeypatch.chdir(ROOT)
    if ranks:
        as_rank(monkeypatch, 0, ranks)
    monkeypatch.setattr(sys, "argv", ["table1.py", "--sizes", "demo", "--encodings", "rope", *words, *extra])
    with pytest.raises(UserError, match=message):
        table1.main.__wrapped__()
