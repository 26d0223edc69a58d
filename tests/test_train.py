"""Training through its command: resume, ranks, signals, guards, logs. What it promises is compared bit for bit."""

import json
import math
import os
import shutil
import signal
import time
from itertools import pairwise

import pytest
import torch
from conftest import assert_same_run, records, run_command, torchrun
from safetensors.torch import load_file

from core.checkpoint import list_checkpoints, newest_checkpoint
from core.config import load_config
from core.errors import UserError
from core.optim import learning_rate, make_optimizer
from core.trackers import TensorBoard, put_before_now
from model import GPT
from positional import ENCODINGS
from train import train

WORDS = ["--encoding=carope", "--name=r"]


def test_a_run_leaves_what_it_promises(small, tmp_path):
    assert train(load_config([*small, *WORDS, "--log_every=2", "--keep_checkpoints=1"])) == 0
    run = tmp_path / "r"
    assert load_config([str(run / "config.toml")]).encoding == "carope"
    (start,) = json.loads((run / "env.json").read_text())
    assert start["torch"] == torch.__version__ and start["world_size"] == 1 and start["device"]
    log = records(run)
    assert [r["step"] for r in log if "val_loss" in r] == [0, 4, 8]
    assert [r["step"] for r in log if "val_loss" not in r] == [0, 2, 4, 6]
    assert log[0]["val_loss"] == pytest.approx(math.log(320), abs=0.1)
    assert log[-1]["val_loss"] < log[0]["val_loss"] - 0.5
    assert all(r["val_perplexity"] == pytest.approx(math.exp(r["val_loss"])) for r in log if "val_loss" in r)
    assert [r["val_tokens"] for r in log if "val_loss" in r] == [4000, 4000, 8000]
    assert [path.name for path in list_checkpoints(run)] == ["step_000008"]
    _, state = newest_checkpoint(run)
    assert (state.step, state.tokens, state.tokenizer) == (8, 8 * 512, "bytes")


def test_training_in_process_gives_the_signals_back(small):
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    train(load_config([*small, *WORDS, "--steps=1"]))
    with pytest.raises(UserError):
        train(load_config([*small, *WORDS, "--steps=2"]))
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_a_finished_run_is_left_alone(small, tmp_path, capsys):
    cfg = load_config([*small, *WORDS])
    train(cfg)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "r").rglob("*")}
    assert train(cfg) == 0
    assert "finished at step 8 already" in capsys.readouterr().out
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "r").rglob("*")}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(small, tmp_path, dtype):
    words = [*small, *WORDS, f"--dtype={dtype}"]
    train(load_config([*words, "--name=whole"]))
    train(load_config([*words, "--name=parts"]))
    shutil.rmtree(tmp_path / "parts/checkpoints/step_000008")  # as if it had been killed between step 4 and step 8
    train(load_config([*words, "--name=parts"]))
    assert_same_run(tmp_path / "whole", tmp_path / "parts")
    assert [s["from_step"] for s in json.loads((tmp_path / "parts/env.json").read_text())] == [0, 4]


def test_two_ranks_equal_one_rank(small, tmp_path):
    words = [*small, *WORDS]
    done = torchrun(2, "train.py", *words, "--name=whole")
    assert done.returncode == 0, done.stderr
    train(load_config([*words, "--name=one", "--micro_batch=8"]))
    shutil.copytree(tmp_path / "whole", tmp_path / "mixed")  # four steps on two ranks, then four on one
    shutil.rmtree(tmp_path / "mixed/checkpoints/step_000008")
    train(load_config([*words, "--name=mixed"]))
    for name in ("whole", "mixed"):
        for a, b in zip(records(tmp_path / "one"), records(tmp_path / name), strict=True):
            assert a == pytest.approx(b, rel=1e-4)  # losses within 1e-5: tests/faults/test_02_exact_resume.py


def test_nan_stops_before_the_weights_are_touched(small, tmp_path):
    """A real overflow: with a learning rate of 1e18 the weights become so large that the next loss is not finite."""
    with pytest.raises(
        UserError, match=r"step \d+: loss .*stopped before the update.*step_00000\d.*lab\.replay.*--lr"
    ) as error:
        train(load_config([*small, *WORDS, "--lr=1e18", "--min_lr=0", "--save_every=1", "--eval_every=1000", "--steps=20"]))
    assert "\n" not in str(error.value)
    kept = load_file(list_checkpoints(tmp_path / "r")[-1] / "model.safetensors")
    assert all(p.isfinite().all() for p in kept.values())
    assert all(math.isfinite(r["loss"]) for r in records(tmp_path / "r") if "loss" in r)


@pytest.mark.parametrize("change", ["--n_layer=1", "--lr=0.02", "--encoding=rope", "--steps=9", "--seed=2"])
def test_a_folder_that_holds_another_run_is_refused(small, change):
    train(load_config([*small, *WORDS]))
    key = change[2:].split("=")[0]
    with pytest.raises(UserError, match=rf"holds a run with {key} = .*--name") as error:
        train(load_config([*small, *WORDS, change]))
    assert "\n" not in str(error.value)


def test_a_run_without_a_checkpoint_starts_over(small, tmp_path):
    (tmp_path / "r").mkdir()
    (tmp_path / "r/log.jsonl").write_text('{"step": 0}\n')
    train(load_config([*small, *WORDS, "--steps=2", "--warmup_steps=0"]))
    assert [r["step"] for r in records(tmp_path / "r")] == [0, 0, 1, 2]


def test_a_damaged_checkpoint_is_named_and_the_one_before_is_taken(small, tmp_path, capsys):
    train(load_config([*small, *WORDS]))
    train(load_config([*small, *WORDS, "--name=whole"]))
    with open(tmp_path / "r/checkpoints/step_000008/model.safetensors", "r+b") as file:
        file.seek(1000)
        file.write(b"damage")
    train(load_config([*small, *WORDS, "--keep_checkpoints=1", "--save_every=3"]))
    assert "step_000008/model.safetensors" in capsys.readouterr().err
    assert_same_run(tmp_path / "r", tmp_path / "whole")
    kept = sorted(path.name for path in (tmp_path / "r/checkpoints").iterdir())
    assert kept == ["damaged_step_000008", "step_000008"]  # the damaged one is never counted among those to keep


def test_the_best_checkpoint_is_kept(small, tmp_path):
    words = [*small, *WORDS, "--steps=12", "--save_every=2", "--eval_every=2", "--lr=0.5", "--keep_checkpoints=2"]
    train(load_config(words))
    losses = {r["step"]: r["val_loss"] for r in records(tmp_path / "r") if "val_loss" in r and r["step"]}
    best = min(losses, key=losses.__getitem__)
    assert {path.name for path in list_checkpoints(tmp_path / "r")} == {f"step_{s:06d}" for s in (best, 10, 12)}


def test_the_schedule_is_the_papers():
    cfg = load_config(["config/small.toml"])
    lrs = [learning_rate(step, cfg) for step in range(cfg.steps + 1)]
    assert lrs[0] == pytest.approx(6e-4 / 750) and lrs[749] == lrs[750] == 6e-4
    assert lrs[-1] == pytest.approx(6e-5) and lrs[750 + 18_250 // 2] == pytest.approx(3.3e-4)
    assert all(a < b for a, b in pairwise(lrs[:750]))
    assert all(a > b for a, b in pairwise(lrs[750:]))


def test_a_run_may_end_before_its_warm_up_does():
    cfg = load_config(["config/tiny.toml", "--steps=20"])
    assert [learning_rate(step, cfg) for step in (0, 19)] == pytest.approx([6e-4 / 750, 6e-4 * 20 / 750])


@pytest.mark.parametrize("encoding", sorted(ENCODINGS))
def test_every_parameter_is_in_exactly_one_group(encoding):
    model = GPT(load_config(["--n_layer=1", "--n_embd=32", f"--encoding={encoding}", "--n_head=2", "--vocab_size=9"]))
    decay, rest = make_optimizer(model, load_config([])).param_groups
    assert {id(p) for p in decay["params"]} | {id(p) for p in rest["params"]} == {id(p) for p in model.parameters()}
    assert len(decay["params"]) + len(rest["params"]) == len(list(model.parameters()))
    assert all(p.dim() >= 2 for p in decay["params"]) and all(p.dim() < 2 for p in rest["params"])
    assert (decay["weight_decay"], rest["weight_decay"]) == (0.1, 0)


@pytest.mark.parametrize(
    ("size", "encoding"),
    [
        ("tiny", "carope"),
        *[pytest.param("tiny", encoding, marks=pytest.mark.slow) for encoding in ("rope", "learned", "sinusoidal")],
        *[pytest.param("small", encoding, marks=pytest.mark.slow) for encoding in ("rope", "carope", "learned", "sinusoidal")],
    ],
)
def test_the_configurations_of_table_1_take_a_step_at_full_size(corpus, tmp_path, size, encoding):
    words = ["--tokens_per_step=64", "--micro_batch=1", "--block_size=64", "--steps=1", "--warmup_steps=0"]
    words = [f"--data={corpus}", f"--out_dir={tmp_path}", "--device=cpu", *words, "--eval_tokens=64", "--final_eval_tokens=64"]
    assert train(load_config([f"config/{size}.toml", f"config/{encoding}.toml", *words])) == 0
    first, last = (r for r in records(tmp_path / f"{size}-{encoding}") if "val_loss" in r)
    assert first["val_loss"] == pytest.approx(math.log(50304), abs=0.5) and last["val_loss"] < first["val_loss"]


def test_wandb_and_tensorboard_log_offline(small, tmp_path):
    done = run_command("train.py", *small, *WORDS, "--wandb=offline", "--tensorboard=true")
    assert done.returncode == 0, done.stderr
    assert list((tmp_path / "r/wandb").glob("offline-run-*/*.wandb"))
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "r/tensorboard"))
    events.Reload()
    logged = [r["loss"] for r in records(tmp_path / "r") if "loss" in r]
    assert [e.value for e in events.Scalars("loss")] == pytest.approx(logged)


def test_tensorboard_has_every_step_though_the_clock_was_put_back(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder, now = tmp_path / "tensorboard", int(time.time())
    for number, (start, ends) in enumerate([(0, 6), (4, 9), (8, 12)]):
        board = TensorBoard(tmp_path, start, [])
        for step in range(start, ends):
            board.log({"step": step, "loss": 100 * number + step})
        board.close()
        for path in folder.glob(f"events.out.tfevents.*.{os.getpid()}.*"):  # as if begun tomorrow, and its process another
            path.rename(folder / f"events.out.tfevents.{now + 86400:010d}.host.{9 - number}.0")
    assert len(list(folder.iterdir())) == 3
    put_before_now(folder)
    put_before_now(folder)
    events = EventAccumulator(str(folder), {"scalars": 0})
    events.Reload()
    found = [(event.step, event.value) for event in events.Scalars("loss")]
    assert found == [*((i, i) for i in range(4)), *((i, 100 + i) for i in range(4, 8)), *((i, 200 + i) for i in range(8, 12))]


@pytest.mark.slow
def test_compiled_training_follows_the_eager_one(small, tmp_path):
    for name, mode in (("eager", "off"), ("compiled", "on")):
        train(load_config([*small, "--encoding=carope", f"--name={name}", f"--compile={mode}"]))
    for a, b in zip(records(tmp_path / "eager"), records(tmp_path / "compiled"), strict=True):
        assert a == pytest.approx(b, rel=1e-3)


def test_an_out_dir_that_cannot_be_written_is_one_line(small, tmp_path):
    (tmp_path / "file").write_text("")
    done = run_command("train.py", *small, *WORDS, f"--out_dir={tmp_path / 'file'}")
    assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
