"""NaN and infinity never reach the weights, and jumps only where asked; where they came from is named and can be replayed."""

import math
import os
import re
from pathlib import Path

import pytest
import torch
from conftest import newest_sums, records, run_command
from safetensors.torch import load_file

from core.checkpoint import list_checkpoints, newest_checkpoint
from core.config import load_config
from core.errors import UserError
from core.guard import Guard
from model import GPT
from train import train

INJECT = Path(__file__).with_name("inject.py")
MISTAKES = [
    (("{}/r", "8"), "step 8: the run's steps are 0 to 7"),
    (("{}", "1"), "no run folder, it has no config.toml"),
    (("{}/r", "1", "--n_layer=1"), "--n_layer: the run has 2; with another value"),
]
WORDS = ["--encoding=carope", "--name=r", "--save_every=2"]


def inject(what: str, *args: object, ranks: int = 0):
    launcher = ["core.launch", f"--nproc_per_node={ranks}"] if ranks else []
    return run_command(*launcher, INJECT, *args, env={"INJECT": what})


def assert_clean(run: Path) -> None:
    for path in list_checkpoints(run):
        assert all(tensor.isfinite().all() for tensor in load_file(path / "model.safetensors").values())
    assert all(math.isfinite(r["loss"]) for r in records(run) if "loss" in r)


@pytest.mark.parametrize(
    ("what", "where"),
    [pytest.param("nan_loss", "output of the loss", marks=pytest.mark.slow), ("nan_gradient", "gradient of ")],
)
def test_nan_on_one_of_two_ranks_stops_both_before_the_update(fault, small, tmp_path, what, where):
    happened = fault(f"{what.replace('_', ' of the ')} on rank 1 of two, step 5, micro-step 1")
    done = inject(f"{what} 1 5 1", *small, *WORDS, ranks=2)
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert done.returncode == 2 and "Traceback" not in done.stderr
    # step 5 of 512 tokens, micro-step 1, rank 1, rows of 4 × 32 tokens: 5·512 + (1·2 + 1)·128
    for part in ("step 5: ", "first on rank 1, micro-step 1, 128 tokens from 2,944 of the stream", "train_000001.bin", where,
                 "the last checkpoint is step_000004", f"`python -m lab.replay {tmp_path}/r 5`"):  # fmt: skip
        assert part in line, (part, line)
    assert_clean(tmp_path / "r")
    assert newest_checkpoint(tmp_path / "r")[1].step == 4
    happened("both left with code 2; the line names step, rank, micro-step, tokens, shard and module; step_000004 is the last")


def test_the_step_can_be_replayed(fault, small, tmp_path):
    happened = fault("NaN at step 5, replayed by lab.replay on one rank")
    assert inject("nan_loss 0 5 2", *small, *WORDS).returncode == 2
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "r").rglob("*")}
    done = inject("nan_loss 0 5 2", "replay", tmp_path / "r", 5)
    assert done.returncode == 0, done.stderr
    rows = [line.split(maxsplit=4) for line in done.stdout.splitlines()[3:]]
    assert [row[0] for row in rows] == ["0", "1", "2", "3"] and [row[2] == "nan" for row in rows] == [False, False, True, False]
    assert "first not finite: output of the loss" in rows[2][4] and "from step 4 to step 5" in done.stdout
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "r").rglob("*")}, "a replay only reads"
    happened("the table marks micro-step 2 and the module, and nothing in the folder was touched")


def test_a_replayed_step_has_the_loss_it_had(small, tmp_path, capsys):
    train(load_config([*small, *WORDS]))
    capsys.readouterr()
    done = run_command("lab.replay", tmp_path / "r", 7)
    assert done.returncode == 0, done.stderr
    out = done.stdout
    losses = [float(line.split()[2]) for line in out.splitlines() if re.match(r" +\d+ +0 ", line)]
    (logged,) = [r["loss"] for r in records(tmp_path / "r") if r["step"] == 7]
    assert len(losses) == 4 and sum(losses) / 4 == pytest.approx(logged, abs=1e-3)
    for words, message in MISTAKES:
        done = run_command("lab.replay", *(word.format(tmp_path) for word in words))
        assert done.returncode == 2 and message in done.stderr and done.stderr.count("\n") == 1, done.stderr


def test_a_validation_that_is_not_finite_is_no_checkpoint(fault, small, tmp_path):
    happened = fault("weights so large that the validation loss is infinite or NaN, a checkpoint due at every step")
    with pytest.raises(UserError, match=r"step \d: (validation )?loss (nan|inf).*a lower --lr") as error:
        train(load_config([*small, *WORDS, "--save_every=1", "--eval_every=1", "--lr=1e30", "--min_lr=0", "--warmup_steps=0"]))
    assert_clean(tmp_path / "r")
    happened(str(error.value))


SPIKE = ["--encoding=rope", "--name=r", "--steps=40", "--save_every=36"]


@pytest.mark.parametrize("mode", [*[pytest.param(mode, marks=pytest.mark.slow) for mode in ("warn", "stop")], "skip"])
def test_a_spike_is_treated_as_asked(fault, small, tmp_path, mode):
    happened = fault(f"a loss 30 times too large in one micro-step of step 37, --on_spike={mode}")
    done = inject("spike 0 37", *small, *SPIKE, f"--on_spike={mode}")
    line = next(line for line in done.stderr.splitlines() if "step 37: loss" in line)
    assert "robust standard deviations above its median" in line
    if mode == "stop":
        assert done.returncode == 2 and line.startswith("error: ") and "step_000036" in line
        assert records(tmp_path / "r")[-1]["step"] == 36
    else:
        assert done.returncode == 0 and line.startswith("warning: "), done.stderr
        assert records(tmp_path / "r")[-1]["step"] == 40
    happened(line)


@pytest.mark.slow
def test_a_skipped_spike_leaves_the_weights_and_survives_a_resume(small, tmp_path, monkeypatch):
    """The same run without the update of step 37, made by hand, ends with the same weights; so does one resumed at 36."""
    words = [*small, *SPIKE, "--on_spike=skip"]
    for _ in range(2):
        done = inject("spike 0 37", *words)
        assert done.returncode == 0, done.stderr
        sums = newest_sums(tmp_path / "r")
        os.rename(list_checkpoints(tmp_path / "r")[-1], tmp_path / f"aside{len(list(tmp_path.iterdir()))}")
    passes = Guard.passes
    monkeypatch.setattr(Guard, "passes", lambda self, step, *values: passes(self, step, *values) and step != 37)
    train(load_config([*small, *SPIKE, "--name=by_hand"]))
    assert newest_sums(tmp_path / "by_hand")["model.safetensors"] == sums["model.safetensors"]


def test_what_goes_on_is_no_spike():
    """Skipping for ever would be a run that stands still: the eleventh skip in a row stops it."""
    cfg = load_config(["--on_spike=skip", "--encoding=nope", "--n_layer=1", "--n_embd=8", "--n_head=1", "--vocab_size=9"])
    guard = Guard(cfg, type("Main", (), {"is_main": False}), GPT(cfg), None)
    usual, jump = 2.0, 9.0
    assert all(guard.passes(step, usual, usual) for step in range(40))
    assert not any(guard.passes(step, jump, usual) for step in range(40, 50))
    with pytest.raises(UserError, match="11th step in a row"):
        guard.passes(50, jump, usual)


def test_a_collapse_of_f_is_noticed(fault, small, tmp_path, capsys):
    happened = fault("CARoPE whose f is the same for every token, and CARoPE whose f is 0")
    words = [*small, "--encoding=carope", "--steps=4", "--eval_every=2", "--warmup_steps=0"]
    train(load_config([*words, "--name=flat", "--lr=1e-12", "--min_lr=0"]))
    assert "step 2: f has collapsed: over tokens its standard deviation is" in capsys.readouterr().err
    flat = next(r for r in records(tmp_path / "flat") if r["step"] == 4)
    assert flat["f_std"] == pytest.approx(0, abs=1e-6) and flat["f_mean"] > 0.1
    assert 0 < flat["phase_min"] <= flat["phase_max"] < 32

    cfg = load_config([*words, "--name=zero"])
    model = GPT(cfg)
    torch.nn.init.constant_(model.wpe.W.bias, 1e6)
    health, complaint = model.health(torch.arange(32)[None])
    assert "f has collapsed to 1e-06" in complaint and health["phase_max"] < 1
    train(load_config([*words, "--name=rope", "--encoding=rope"]))
    assert not {"f_std", "phase_max"} & set().union(*records(tmp_path / "rope"))
    happened("both are warned of; f's mean, deviation and phase range are in every validation record")
